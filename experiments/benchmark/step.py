"""Times the phases of a training step on random weights and made-up prompts, beside their floors.

The programs are those of training. Weights are random, since time does not depend on them, and no completion may end,
so that every run does the same work.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import floors, peaks
from kepo_jax import memory as process_memory
from kepo_jax import sharding
from kepo_jax.config import Config
from kepo_jax.models.qwen3_vl import model, positions
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig
from kepo_jax.planning import chips, memory
from kepo_jax.planning.compile import special_tokens
from kepo_jax.training import checks, programs, setup
from kepo_jax.types import Experience, Prompts, VisionInputs

# Between the tiny models of the embedded default and the smallest that is published: large enough for products to
# dominate on a CPU, small enough to run there.
MEDIUM = Qwen3VLConfig(
  text=TextConfig(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    rope_theta=5_000_000.0,
    mrope_section=(12, 10, 10),
  ),
  vision=VisionConfig(
    depth=6,
    hidden_size=256,
    intermediate_size=1024,
    num_heads=4,
    out_hidden_size=512,
    num_position_embeddings=2304,
    deepstack_visual_indexes=(1, 3, 5),
  ),
  tie_word_embeddings=True,
  image_token_id=5,
  video_token_id=6,
  vision_start_token_id=7,
  vision_end_token_id=8,
)


def model_sizes(name: str) -> Qwen3VLConfig:
  """`memory.model_sizes`, which does not know "medium"."""
  return MEDIUM if name == "medium" else memory.model_sizes(name)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Lengths of everything in a batch, without padding."""

  image_tokens: int  # merged tokens of the image of each prompt; 0: no image
  text_tokens: int  # other tokens of a prompt
  new_tokens: int  # tokens of a completion


def made_up_prompts(config: Qwen3VLConfig, count: int, sizes: Sizes) -> Prompts:
  """Makes host arrays of `count` prompts, each with one image of random patches, and random text.

  Raises:
    ValueError: too few text tokens to mark the image.
  """
  rng = np.random.default_rng(0)
  merge, grids = config.vision.spatial_merge_size, []
  marks = []
  if sizes.image_tokens:
    rows = next(side for side in range(round(sizes.image_tokens**0.5), 0, -1) if sizes.image_tokens % side == 0)
    grids = [(1, rows * merge, sizes.image_tokens // rows * merge)]
    marks = [config.vision_start_token_id, *[config.image_token_id] * sizes.image_tokens, config.vision_end_token_id]
  words = sizes.text_tokens - (2 if marks else 0)
  if words < 1:
    raise ValueError(f"{sizes.text_tokens} text tokens do not hold the two marks of an image and a question.")
  usable = np.flatnonzero(special_tokens(config).allowed)
  texts = [np.array([*marks, *rng.choice(usable, words)], np.int32) for _ in range(count)]
  places, following, slots = zip(
    *(positions.prompt_positions(text.tolist(), grids, config) for text in texts), strict=True
  )
  patches = sizes.image_tokens * config.vision.merge_area
  names = ("segments", "coordinates", "table_index", "table_weight")
  tables = dict(zip(names, positions.vision_tables(grids, config), strict=True)) if grids else _no_tables()
  return Prompts(
    tokens=np.stack(texts),
    mask=np.ones((count, len(texts[0])), bool),
    positions=np.stack(places),
    next_position=np.array(following, np.int32),
    image_slot=np.stack(slots),
    row=np.arange(count, dtype=np.uint32),
    vision=VisionInputs(
      patches=rng.normal(size=(count, patches, config.vision.patch_width)).astype(np.float32),
      **{name: np.broadcast_to(table, (count, *table.shape)).copy() for name, table in tables.items()},
    ),
  )


def _no_tables() -> dict[str, np.ndarray]:
  whole, parts = np.int32, np.float32
  return {
    "segments": np.zeros((0,), whole),
    "coordinates": np.zeros((0, 2), whole),
    "table_index": np.zeros((0, 4), whole),
    "table_weight": np.zeros((0, 4), parts),
  }


def random_weights(config: Qwen3VLConfig, mesh: jax.sharding.Mesh, dtype: Any, seed: int) -> Any:
  """Draws random parameters in the train layout."""
  shardings = sharding.weight_shardings(mesh, model.abstract_params(config), model.logical_axes(config))
  # The generator of the hardware: threefry for 32 billion numbers takes longer than all else here.
  key = jax.random.key(seed, impl="unsafe_rbg")
  draw = functools.partial(model.init_params, config, dtype=dtype, by_layer=True)
  return jax.jit(draw, out_shardings=shardings)(key)


@dataclasses.dataclass
class Phase:
  """A phase of a step: what it takes, and what it has to do."""

  name: str
  tokens: int  # completion tokens that it samples, scores or learns from
  work: floors.Work
  seconds: list[float] = dataclasses.field(default_factory=list)  # of each repetition

  @property
  def median(self) -> float:
    """Median seconds."""
    return statistics.median(self.seconds)

  def metrics(self, chip: chips.Chip, devices: int) -> dict[str, float]:
    """Returns everything that is printed of a phase."""
    return {
      "seconds": self.median,
      "fastest": min(self.seconds),
      "slowest": max(self.seconds),
      "tokens": float(self.tokens),
      "tokens_per_second": self.tokens / self.median,
      "flops": self.work.flops,
      "flops_utilisation": self.work.flops / (self.median * chip.flops * devices),
      "bytes": self.work.moved,
      "bandwidth_share": self.work.moved / (self.median * chip.bandwidth * devices),
      "floor_seconds": self.work.floor,
      "gap": self.median / self.work.floor if self.work.floor else 0.0,
    }


class Benchmark:
  """One training step of a config, phase by phase."""

  def __init__(self, config: Config, student: Qwen3VLConfig, teacher: Qwen3VLConfig, sizes: Sizes):
    """Makes weights, prompts and programs.

    Args:
      config: of a run; its models are replaced.
      student: sizes of the student, and of the reference where there is one.
      teacher: sizes of the teacher, of the same vocabulary.
      sizes: of the batch; `sampling.max_new_tokens` is theirs.

    Raises:
      ValueError: the vocabularies differ, or the sizes do not fit together.
    """
    if student.text.vocab_size != teacher.text.vocab_size:
      raise ValueError(
        f"student and teacher have {student.text.vocab_size} and {teacher.text.vocab_size} tokens; "
        "distillation needs one vocabulary."
      )
    config.validate()
    self.config, self.sizes = config, sizes
    self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    self.configs = {"student": student}
    if config.needs_teacher:
      self.configs["teacher"] = teacher
    if config.objective.reference_weight:
      self.configs["reference"] = student
    dtype = jnp.dtype(config.model.compute_dtype)
    self.chip, self.devices = peaks.chip_of(jax.local_devices()[0], dtype), self.mesh.size
    self._special = special_tokens(student)
    self.models = {role: self._model(role, seed) for seed, role in enumerate(self.configs)}
    self.adapted = self.models["student"].config  # the student with its matrices of LoRA, if it has some
    with jax.set_mesh(self.mesh):
      checks.check_attention(config, student)
      self.state, self.programs = setup.build_programs(config, self._special, self.models)
    count = config.batch.prompts
    self.prompts = sharding.place(self.mesh, made_up_prompts(student, count, sizes))
    few = max(1, count // 4)  # ask for hints, and are asked again with each of them
    self.few = sharding.place(self.mesh, made_up_prompts(student, few, sizes))
    hinted = dataclasses.replace(sizes, text_tokens=sizes.text_tokens + config.exploration.hint_tokens)
    self.hinted = sharding.place(self.mesh, made_up_prompts(student, few * config.rounds_at_once, hinted))
    self._batch: Any = ()  # shapes of the experience and the targets of the last turn

  def _model(self, role: str, seed: int) -> programs.Model:
    sizes = self.configs[role]
    params = random_weights(sizes, self.mesh, setup.model_dtype(self.config, role), seed)
    return setup.model_of(self.config, role, sizes, params)

  def phases(self, repeats: int, between: Callable[[int], None] = lambda turn: None) -> list[Phase]:
    """Runs the step `repeats` times after one that compiles, and whatever else is measured in turns with it.

    Args:
      repeats: timed turns.
      between: called with the number of each turn, from 0, after it; the first one compiles and is not timed.
    """
    phases: dict[str, Phase] = {}
    for turn in range(repeats + 1):
      for name, taken in self._turn(turn):
        if turn == 0:
          phases[name] = Phase(name, self._tokens(name), floors.Work(0.0, 0.0))
        else:
          phases[name].seconds.append(taken)
      between(turn)
    work = self.work()
    for name, phase in phases.items():
      phase.work = work[name]
    return list(phases.values())

  def _turn(self, turn: int) -> Iterator[tuple[str, float]]:
    """Runs one step; yields the name and the seconds of each of its phases."""
    key, timed = jax.random.key(turn), peaks.timed
    with jax.set_mesh(self.mesh):
      actor, seconds = timed(self.programs.decode_weights, self.state.params)
      yield "decode weights", seconds
      rollouts, seconds = timed(self.programs.rollout, actor, self.prompts, key)
      yield "sampling", seconds
      if self.config.explores:
        rounds, rows = self.config.rounds_at_once, len(self.hinted.row)
        keys = np.asarray(jax.random.key_data(jax.random.split(key, rounds)))[None]
        yield "hints", timed(self.programs.hint, self.few, sharding.place(self.mesh, keys))[1]
        keys = np.asarray(jax.random.key_data(jax.random.split(key, rows)))[:, None]
        yield "candidates", timed(self.programs.candidate, actor, self.hinted, sharding.place(self.mesh, keys))[1]
      del actor
      experience = self._experience(rollouts)
      targets, seconds = timed(self.programs.targets, experience.prompts, experience.tokens)
      self._batch = jax.eval_shape(lambda *batch: batch, experience, targets)
      if len(self.configs) > 1:
        yield "scoring", seconds
      (self.state, _), seconds = timed(self.programs.update, self.state, experience, targets)
      yield "update", seconds

  def _tokens(self, name: str) -> int:
    config = self.config
    if name == "hints":
      return len(self.few.row) * config.rounds_at_once * config.exploration.hint_tokens
    if name == "candidates":
      return len(self.hinted.row) * config.candidates * self.sizes.new_tokens
    return config.batch.prompts * config.batch.rollouts * self.sizes.new_tokens

  def _experience(self, rollouts: Any) -> Experience:
    """Gives every rollout an advantage, and distills all of them."""
    rows = rollouts.tokens.shape[:2]
    rng = np.random.default_rng(0)
    on_rows = {
      "advantages": rng.normal(size=rows).astype(np.float32),
      "gate": np.ones(rows, bool),
      "injected": np.zeros(rows, bool),
      "supervised": np.zeros(rows, bool),
      "kept": np.ones(rows, bool),
    }
    placed = sharding.place(self.mesh, on_rows, ("prompt", "rollout"))
    return Experience(prompts=self.prompts, tokens=rollouts.tokens, mask=rollouts.mask, logps=rollouts.logps, **placed)

  def work(self) -> dict[str, floors.Work]:
    """Counts what each phase has to do at least."""
    # Counted in the plain form: what is inside a fused kernel is not seen.
    config, student = self.config, self.configs["student"]
    adapted = dataclasses.replace(self.adapted, attention="plain")
    others = {role: dataclasses.replace(each, attention="plain") for role, each in self.configs.items()}
    settings = setup.update_settings(config)
    frozen = jnp.dtype(config.model.teacher_dtype)
    where: dict[str, Any] = {"chip": self.chip, "devices": self.devices}
    shapes = jax.eval_shape(lambda prompts: prompts, self.prompts)
    rows = (config.batch.prompts, config.batch.rollouts, self.sizes.new_tokens)
    tokens = jax.ShapeDtypeStruct(rows, jnp.int32)
    work = {
      "decode weights": floors.copying(student, self.state.params, settings.compute_dtype).on(**where),
      "sampling": floors.sampling(
        others["student"], settings.compute_dtype, shapes, samples=rows[1], new_tokens=rows[2], **where
      ),
    }
    if "teacher" in self.configs and config.explores:
      few = jax.eval_shape(lambda prompts: prompts, self.few)
      hints = config.exploration.hint_tokens
      work["hints"] = floors.sampling(
        others["teacher"], frozen, few, samples=config.rounds_at_once, new_tokens=hints, **where
      )
      hinted = jax.eval_shape(lambda prompts: prompts, self.hinted)
      sampled: dict[str, Any] = {"samples": config.candidates, "new_tokens": rows[2]}
      work["candidates"] = floors.sampling(others["student"], settings.compute_dtype, hinted, **sampled, **where)
    roles = [role for role in ("teacher", "reference") if role in self.configs]
    if roles:
      scored = [floors.scoring(others[role], frozen, shapes, tokens).on(**where) for role in roles]
      work["scoring"] = floors.total(scored)
    token_loss = setup.token_loss(config, self._special)
    work["update"] = floors.update(adapted, token_loss, settings, self.state, *self._batch, **where)
    return work


def peak_bytes() -> tuple[float, str]:
  """Returns the most memory in use until now, and whose it is."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
  if peaks and jax.default_backend() != "cpu":
    return float(max(peaks)), "of the fullest device"
  return float(process_memory.peak_resident_bytes()), "of the process"
