"""Greedy accuracy per modality and question type with intervals, and paired comparison of two evaluations.

The in-domain figure is that of the training modality; the out-of-domain figure is the mean over the others,
each modality counting the same (arXiv 2602.00400, Table 1).
"""

import collections
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kepo_jax import rewards, sharding
from kepo_jax.data.pipeline import Lookahead, Processor
from kepo_jax.types import Example, Prompts, Rollouts

NORMAL_QUANTILE = 1.959963984540054  # of 0.975: two-sided 95 %
RESAMPLES = 10_000


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
  """Wilson's 95 % interval of a share of successes; (0, 1) without trials."""
  if not count:
    return 0.0, 1.0
  share, z2 = correct / count, NORMAL_QUANTILE**2
  center = (share + z2 / (2 * count)) / (1 + z2 / count)
  half = NORMAL_QUANTILE / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
  # At shares of 0 and 1 the bound is exact; rounding must not push it off.
  return (0.0 if correct == 0 else center - half), (1.0 if correct == count else center + half)


def share(correct: int, count: int) -> dict[str, Any]:
  """A share of correct answers with its 95 % interval: count, correct, accuracy, low, high."""
  low, high = wilson_interval(correct, count)
  return {"count": count, "correct": correct, "accuracy": correct / count if count else 0.0, "low": low, "high": high}


def mean_over_modalities(modalities: Mapping[str, Mapping[str, Any]], *, seed: int = 0) -> dict[str, Any] | None:
  """Unweighted mean of accuracies with a bootstrap 95 % interval; questions are resampled inside each modality.

  Args:
    modalities: name -> entry of `share`.
    seed: of the resampling.

  Returns:
    mean, low, high, count and the names; None for no modality.
  """
  if not modalities:
    return None
  rng = np.random.default_rng(seed)
  # Resampling n answers of which k are right draws a binomial number of right ones.
  draws = [rng.binomial(entry["count"], entry["accuracy"], RESAMPLES) / entry["count"] for entry in modalities.values()]
  low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
  return {
    "mean": float(np.mean([entry["accuracy"] for entry in modalities.values()])),
    "low": float(low),
    "high": float(high),
    "count": sum(entry["count"] for entry in modalities.values()),
    "modalities": list(modalities),
  }


def evaluate(
  sample: Callable[[Prompts], Rollouts],
  processor: Processor,
  examples: Sequence[Example],
  *,
  batch_size: int,
  train_modality: str = "MRI",
  kind: str = "evaluation",
  progress: Callable[[int, int], None] | None = None,
  on_output: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
  """Asks every question once and counts.

  Args:
    sample: host prompts of exactly `batch_size` rows -> Rollouts [P, 1, T], normally greedy; the last batch is
      filled with repeated questions, which are not counted.
    processor: of the model.
    examples: questions, at least one.
    batch_size: P.
    train_modality: canonical name of the in-domain modality.
    kind: wording, "evaluation" or "no_think".
    progress: receives (questions done, questions in all) after each batch.
    on_output: receives one JSON-able record per question: identity, completion, what was read from it.

  Returns:
    JSON-able figures: `overall`, `in_domain`, `modalities`, `question_types` (entries of `share`),
    `out_of_domain` (of `mean_over_modalities`), the same accuracies under the forgiving parser in `lenient`, and
    the shares `unparsed`, `truncated`, `format` and the mean `completion_length` in tokens.

  Raises:
    ValueError: there is nothing to evaluate, or a prompt cannot be made.
  """
  if not examples:
    raise ValueError("no question to evaluate; check the data directory and the split.")
  starts = range(0, len(examples), batch_size)

  def prepared(index: int) -> tuple[Sequence[Example], Prompts]:
    batch = list(examples[starts[index] : starts[index] + batch_size])
    filled = batch + batch[:1] * (batch_size - len(batch))
    return batch, processor.prompts(filled, kind)

  outputs: list[dict[str, Any]] = []
  batches = Lookahead(prepared, stop=len(starts))
  for index in range(len(starts)):
    batch, prompts = batches(index)
    rollouts = sample(prompts)
    tokens, mask = (sharding.to_host(array)[:, 0] for array in (rollouts.tokens, rollouts.mask))
    texts = processor.decode(tokens[: len(batch)], mask[: len(batch)])
    for example, text, row, kept in zip(batch, texts, tokens, mask, strict=False):
      outputs.append(_output(example, text, row[kept], processor.end_ids))
      if on_output:
        on_output(outputs[-1])
    if progress:
      progress(len(outputs), len(examples))
  return summarised(outputs, train_modality=train_modality)


def _output(example: Example, text: str, tokens: np.ndarray, end_ids: Iterable[int]) -> dict[str, Any]:
  parsed, lenient = rewards.answer_letter(text), rewards.lenient_letter(text, example)
  return {
    "id": example.id,
    "dataset": example.dataset,
    "modality": example.modality,
    "question_type": example.question_type,
    "question": example.question,
    "options": list(example.options),
    "answer": example.answer,
    "completion": text,
    "parsed": parsed,
    "correct": parsed == example.answer,
    "lenient": lenient,
    "lenient_correct": lenient == example.answer,
    "format": bool(rewards.strict_format(text)),
    "tokens": len(tokens),
    "truncated": not len(tokens) or int(tokens[-1]) not in set(end_ids),
  }


def summarised(outputs: Sequence[Mapping[str, Any]], *, train_modality: str = "MRI") -> dict[str, Any]:
  """The figures of `evaluate` from its output records."""
  modalities = _shares(outputs, "modality", "correct")
  lenient = _shares(outputs, "modality", "lenient_correct")
  count = len(outputs)

  def rate(field: str) -> float:
    return sum(bool(output[field]) for output in outputs) / count

  return {
    "train_modality": train_modality,
    "overall": share(sum(output["correct"] for output in outputs), count),
    "in_domain": modalities.get(train_modality),
    "out_of_domain": mean_over_modalities(_without(modalities, train_modality)),
    "modalities": modalities,
    "question_types": _shares(outputs, "question_type", "correct"),
    "lenient": {
      "overall": share(sum(output["lenient_correct"] for output in outputs), count),
      "in_domain": lenient.get(train_modality),
      "out_of_domain": mean_over_modalities(_without(lenient, train_modality)),
      "modalities": lenient,
    },
    "unparsed": sum(output["parsed"] is None for output in outputs) / count,
    "truncated": rate("truncated"),
    "format": rate("format"),
    "completion_length": sum(output["tokens"] for output in outputs) / count,
  }


def _without(entries: Mapping[str, Any], name: str) -> dict[str, Any]:
  return {key: entry for key, entry in entries.items() if key != name}


def _shares(outputs: Sequence[Mapping[str, Any]], field: str, correct: str) -> dict[str, dict[str, Any]]:
  """Entries of `share` per value of a field, sorted by name; the empty value is left out."""
  answers = collections.defaultdict(list)
  for output in outputs:
    answers[output[field]].append(bool(output[correct]))
  return {name: share(sum(values), len(values)) for name, values in sorted(answers.items()) if name}


def mcnemar(gained: int, lost: int) -> float:
  """Two-sided exact p-value of McNemar's test: questions that only the second, only the first got right."""
  discordant = gained + lost
  tail = sum(math.comb(discordant, k) for k in range(min(gained, lost) + 1))
  return min(1.0, 2 * tail / 2**discordant)


def compared(
  first: Sequence[Mapping[str, Any]],
  second: Sequence[Mapping[str, Any]],
  *,
  train_modality: str = "MRI",
  field: str = "correct",
  seed: int = 0,
) -> dict[str, Any]:
  """Paired comparison of two evaluations of the same questions.

  Args:
    first: output records of `evaluate`.
    second: those of another model.
    train_modality: canonical name of the in-domain modality.
    field: "correct", or "lenient_correct".
    seed: of the bootstrap.

  Returns:
    JSON-able entries under `overall`, `in_domain` and each of `modalities`: count, both accuracies, their difference
    with a paired bootstrap 95 % interval, gained, lost, and the exact p-value of McNemar's test; `out_of_domain`: the
    unweighted mean difference over the other modalities with its interval.

  Raises:
    ValueError: the two do not hold the same questions.
  """
  right = [{output["id"]: bool(output[field]) for output in outputs} for outputs in (first, second)]
  if right[0].keys() != right[1].keys() or not right[0]:
    different = sorted(right[0].keys() ^ right[1].keys())
    raise ValueError(f"{len(different)} questions are in one of the evaluations only, for example {different[:3]}.")
  pairs = collections.defaultdict(list)
  for output in first:
    pairs[output["modality"]].append((right[0][output["id"]], right[1][output["id"]]))
  rng = np.random.default_rng(seed)
  draws = {name: _difference_draws(pairs[name], rng) for name in sorted(pairs)}
  others = [draws[name] for name in draws if name != train_modality]
  modalities = {name: _comparison(pairs[name], draws[name]) for name in draws}
  everything = [pair for name in draws for pair in pairs[name]]
  return {
    "train_modality": train_modality,
    "overall": _comparison(everything, _difference_draws(everything, rng)),
    "in_domain": modalities.get(train_modality),
    "out_of_domain": _mean_difference(_without(modalities, train_modality), others) if others else None,
    "modalities": modalities,
  }


def _counts(pairs: Sequence[tuple[bool, bool]]) -> tuple[int, int]:
  """(gained, lost)."""
  return sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs)


def _difference_draws(pairs: Sequence[tuple[bool, bool]], rng: np.random.Generator) -> np.ndarray:
  gained, lost = _counts(pairs)
  count = len(pairs)
  drawn = rng.multinomial(count, [gained / count, lost / count, 1 - (gained + lost) / count], RESAMPLES)
  return (drawn[:, 0] - drawn[:, 1]) / count


def _comparison(pairs: Sequence[tuple[bool, bool]], draws: np.ndarray) -> dict[str, Any]:
  gained, lost = _counts(pairs)
  low, high = np.percentile(draws, [2.5, 97.5])
  count = len(pairs)
  return {
    "count": count,
    "first": sum(a for a, _ in pairs) / count,
    "second": sum(b for _, b in pairs) / count,
    "difference": (gained - lost) / count,
    "low": float(low),
    "high": float(high),
    "gained": gained,
    "lost": lost,
    "p_value": mcnemar(gained, lost),
  }


def _mean_difference(modalities: Mapping[str, Mapping[str, Any]], draws: Sequence[np.ndarray]) -> dict[str, Any]:
  low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
  return {
    "count": sum(entry["count"] for entry in modalities.values()),
    "difference": float(np.mean([entry["difference"] for entry in modalities.values()])),
    "low": float(low),
    "high": float(high),
    "modalities": list(modalities),
  }
