"""The gate: which rollouts are distilled, by a signal of their quality."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

# The quality of each rollout for the gate, float32[P, G], from its scores.
SIGNALS: Mapping[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
  "accuracy": lambda scores: scores["accuracy"],
  "mean": lambda scores: (scores["accuracy"] + scores["format"]) / 2,
  "sum": lambda scores: scores["accuracy"] + scores["format"],
  "product": lambda scores: scores["accuracy"] * scores["format"],
}
MODES = ("positive", "negative", "none")


def quality_gate(signal: jax.Array | np.ndarray, *, threshold: float, mode: str = "positive") -> jax.Array:
  """Returns the gate g of KEPO (arXiv:2602.00400): true where the teacher's signal enters the loss.

  Args:
    signal: float32[P, G], quality of each rollout, for example its accuracy.
    threshold: tau, in units of the signal.
    mode: `positive` distils signal >= tau, `negative` the failures signal < tau, `none` has no gate: every
      rollout is distilled.

  Returns:
    bool[P, G].

  Raises:
    ValueError: an unknown mode.
  """
  signal = jnp.asarray(signal)
  if mode == "positive":
    return signal >= threshold
  if mode == "negative":
    return signal < threshold
  if mode == "none":
    return jnp.ones_like(signal, bool)
  raise ValueError(f"gate mode {mode!r} is unknown; choose one of {MODES}.")
