"""A model outside of a run that answers or scores any number of questions, in batches of one size."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kepo_jax import evaluation, sharding
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.training import compiling, update
from kepo_jax.training.programs import SamplingSettings, sampling_program
from kepo_jax.types import Example, Prompts, Rollouts

Progress = Callable[[int, int], None]


class BatchedModel:
  """A loaded model; its calls are cut into batches, of which the last one is filled with repeated questions.

  Random keys belong to questions (`sampling.sample`), so the size of a batch changes no random number; it can change
  the last bits of a logit, as the padding of prompts can.
  """

  def __init__(
    self,
    config: Qwen3VLConfig,
    params: Any,
    processor: Any,
    mesh: jax.sharding.Mesh,
    *,
    size: int,
    chunk: int = 1024,
  ):
    """Compiles nothing yet.

    Args:
      config: of the model.
      params: its weights on the mesh, best as the token loop has them: layout `decode`, layers `model.unstack_layers`.
      processor: of the model.
      mesh: where batches are placed; must be in force (`jax.set_mesh`) in every call.
      size: questions per batch over all devices.
      chunk: completion tokens of a device whose logits exist at one time, in scoring.
    """
    self.config, self.processor = config, processor
    self._params, self._mesh, self._size, self._chunk = params, mesh, size, chunk
    self._samplers: dict[SamplingSettings, Callable[..., Rollouts]] = {}
    self._scorers: dict[float, compiling.Program] = {}

  def rollouts(
    self,
    examples: Sequence[Example],
    wording: str,
    settings: SamplingSettings,
    key: jax.Array,
    *,
    hints: Sequence[str] | None = None,
    control: str = "none",
    progress: Progress | None = None,
  ) -> Rollouts:
    """Samples completions [N, G, T] of N questions and returns them on the host.

    Args:
      examples: the questions, at least one.
      wording: as in `data.prompts.prompt_text`.
      settings: of the sampling; one program is compiled for each.
      key: of this call; each question folds its identity into it.
      hints: one per question, for the hinted kinds.
      control: see `evaluation.shown_prompts`.
      progress: receives (questions done, questions in all) after each batch.
    """
    if settings not in self._samplers:
      self._samplers[settings] = sampling_program(self.config, self.processor, settings)
    sample = self._samplers[settings]

    def ask(prompts: Prompts, rows: list[int]) -> Rollouts:
      del rows
      return sample(self._params, prompts, key)

    return self._in_batches(ask, examples, wording, hints, control, progress)

  def logps(
    self,
    examples: Sequence[Example],
    wording: str,
    tokens: np.ndarray,
    *,
    temperature: float = 1.0,
    hints: Sequence[str] | None = None,
    progress: Progress | None = None,
  ) -> np.ndarray:
    """Computes log-probabilities float32[N, G, T], nats, of given completions, teacher-forced as in the update.

    Args:
      examples: N questions, at least one.
      wording: of the prompt before them.
      tokens: int32[N, G, T]; what follows an end token changes nothing before it, and its own values mean nothing.
      temperature: divides the logits.
      hints: one per question, for the hinted kinds.
      progress: receives (questions done, questions in all) after each batch.
    """
    if temperature not in self._scorers:
      allowed = jnp.asarray(self.processor.allowed)

      def scored(params, prompts, tokens):
        return update.logps_of(
          self.config, params, prompts, tokens, allowed, temperature=temperature, chunk=self._chunk
        )

      self._scorers[temperature] = compiling.Program("scoring of given completions", scored)
    score = self._scorers[temperature]

    def ask(prompts: Prompts, rows: list[int]) -> jax.Array:
      return score(self._params, prompts, sharding.place(self._mesh, tokens[rows]))

    return self._in_batches(ask, examples, wording, hints, "none", progress)

  def _in_batches(
    self,
    ask: Callable[[Prompts, list[int]], Any],
    examples: Sequence[Example],
    wording: str,
    hints: Sequence[str] | None,
    control: str,
    progress: Progress | None,
  ) -> Any:
    """Calls `ask` with the prompts of each batch and the numbers of its questions; joins the results on the host."""
    parts = []
    for start in range(0, len(examples), self._size):
      count = min(self._size, len(examples) - start)
      rows = [start + i % count for i in range(self._size)]
      shown = evaluation.shown_prompts(
        self.processor,
        [examples[row] for row in rows],
        wording,
        control,
        hints=None if hints is None else [hints[row] for row in rows],
      )
      results = ask(sharding.place(self._mesh, shown), rows)
      parts.append(jax.tree.map(lambda x, count=count: sharding.to_host(x)[:count], results))
      if progress:
        progress(start + count, len(examples))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
