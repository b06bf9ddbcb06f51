"""Accuracy of a model on questions, with intervals, controls and paired comparisons.

The protocol is that of Med-R1; KEPO's (arXiv 2602.00400, Table 1) differs in one case, named in docs/method.md. A
completion's answer is what the regular expression `<answer>\\s*(\\w+)\\s*</answer>` finds first
(`rewards.answer_letter`); it is right when it equals the gold letter exactly. What does not parse counts as wrong, and
so does what ran out of tokens before its answer. Beside this strict parser stands a forgiving one
(`rewards.lenient_letter`): where the two differ much, a model is being marked for its format. Decoding is greedy, or
sampled with the mean accuracy and pass@k.

The in-domain figure is that of the training modality; the out-of-domain figure is the mean over the others, each
modality counting the same. Chance, the mean of 1 / number of options, differs between modalities and stands beside
every accuracy. Two controls say how much the pictures matter: grey ones, and none.
"""

from kepo_jax.evaluation.accuracy import summarised
from kepo_jax.evaluation.comparison import compared
from kepo_jax.evaluation.evaluate import CONTROLS, evaluate, shown_prompts
from kepo_jax.evaluation.statistics import (
  guessing,
  holm,
  mcnemar,
  pass_at_k,
  share,
  wilson_interval,
)

__all__ = [
  "CONTROLS", "compared", "evaluate", "guessing", "holm", "mcnemar", "pass_at_k", "share",
  "shown_prompts", "summarised", "wilson_interval",
]  # fmt: skip
