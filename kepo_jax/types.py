"""Records that travel between the rooms of the project.

The legend of shape letters, used in every docstring: P prompts, G rollouts per prompt, S prompt tokens
(padded), T completion tokens, V vocabulary, D width, L layers, N query heads, K key/value heads, H head
size, R patch rows per prompt (padded), M merged image tokens per prompt (R / merge size squared).
"""

import dataclasses
from typing import Any

import chex
import jax

from kepo_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Example:
  """One question about zero or more images, as a reader leaves it on the host."""

  id: str  # unique within a data set and stable over runs; seeds the row's random stream
  question: str  # the stem, without options
  options: tuple[str, ...]  # option texts in the order of their letters
  answer: str  # gold letter, "A" for options[0]
  images: tuple[str, ...]  # absolute paths of the image files, in prompt order
  modality: str  # canonical name, for example "MRI"
  question_type: str = ""  # for example "Disease Diagnosis"
  dataset: str = ""  # source data set of the record

  @property
  def answer_text(self) -> str:
    """Returns the text of the gold option."""
    return self.options[ord(self.answer) - ord("A")]


@chex.dataclass(frozen=True)
class VisionInputs:
  """Patches of all images of a prompt and the index tables of the tower; rows in merge-block order."""

  patches: jax.Array  # float32[P, R, C], C = channels * temporal patch * patch * patch, normalised
  segments: jax.Array  # int32[P, R], number of the image within its prompt, -1 for padding
  coordinates: jax.Array  # int32[P, R, 2], (row, column) of the patch in its image, in patches
  table_index: jax.Array  # int32[P, R, 4], rows of the position table to interpolate
  table_weight: jax.Array  # float32[P, R, 4], bilinear weights; zeros for padding


@chex.dataclass(frozen=True)
class Prompts:
  """A batch of right-padded prompts, ready for the device."""

  tokens: jax.Array  # int32[P, S]
  mask: jax.Array  # bool[P, S], true on real tokens
  positions: jax.Array  # int32[P, 3, S], temporal, height and width position (M-RoPE)
  next_position: jax.Array  # int32[P], position of the first completion token on all three axes
  image_slot: jax.Array  # int32[P, S], merged image row that replaces the token, -1 elsewhere
  row: jax.Array  # uint32[P], identity of the prompt: folded into its random keys
  vision: VisionInputs  # R = 0 when no prompt of the batch has an image


@chex.dataclass(frozen=True)
class Rollouts:
  """What sampling leaves behind; T counts completion tokens only."""

  tokens: jax.Array  # int32[P, G, T], pad id where mask is false
  logps: jax.Array  # float32[P, G, T], nats, under the policy that sampled them; 0 where mask is false
  mask: jax.Array  # bool[P, G, T], true up to and including the end token


@chex.dataclass(frozen=True)
class Experience:
  """Scored rollouts of the global batch: everything that one update needs besides parameters."""

  prompts: Prompts
  tokens: jax.Array  # int32[P, G, T]
  mask: jax.Array  # bool[P, G, T]
  logps: jax.Array  # float32[P, G, T], the sampler's, nats; those of injected rollouts are given the hint
  advantages: jax.Array  # float32[P, G]
  gate: jax.Array  # bool[P, G], true where the rollout is distilled
  injected: jax.Array  # bool[P, G], true where an accepted hinted candidate replaced the rollout
  supervised: jax.Array  # bool[P, G], rows that the student did not sample: gold answers or the teacher's
  kept: jax.Array  # bool[P, G], false for rollouts that no term of the loss sees


@dataclasses.dataclass(frozen=True)
class RunPlan:
  """What a run is about to do; handed to the hooks before the first step."""

  config: Config
  workdir: str  # "" when nothing is written
  models: dict[str, Any]  # role ("student", "teacher", "reference") -> its Qwen3VLConfig
  mesh: dict[str, int]  # devices per mesh axis
  questions: dict[str, int]  # split -> number of questions
  programs: tuple[str, ...]  # jitted programs that will be compiled, at least once each
  start_step: int  # steps already done
  data: str = ""  # in words which questions these are
  images: str = ""  # in words how images are brought to size, and what one costs
  positions: dict[str, int] = dataclasses.field(default_factory=dict)  # what `Hook.position` gave at that step


@dataclasses.dataclass(frozen=True)
class StepReport:
  """What one step did; handed to the hooks after each update."""

  step: int  # updates done, this one included
  metrics: dict[str, float]  # names of docs/metrics.md; deterministic values only
  timing: dict[str, float]  # seconds per phase, tokens per second
  samples: tuple[dict[str, Any], ...]  # decoded rollouts, JSON-able


class Hook:
  """Follows a run; every method may be overridden and does nothing by default."""

  def start(self, plan: RunPlan) -> None:
    """Runs before the first step."""

  def step(self, report: StepReport) -> None:
    """Runs after each update."""

  def evaluation(self, step: int, name: str, result: dict[str, Any]) -> None:
    """Runs after an evaluation: `name` is "before", "validation" or "after", `result` of kepo_jax.evaluation."""

  def position(self) -> dict[str, int]:
    """Returns, before a checkpoint, file of the hook -> bytes that belong to the steps done and are stored safely."""
    return {}

  def progress(self, what: str, done: int, total: int) -> None:
    """Runs during long work other than steps: loading and evaluations."""

  def finish(self) -> None:
    """Runs after the last step, the last evaluation and the export."""

  def stop(self) -> None:
    """Runs instead of `finish`, when an error or a signal ends the run early."""
