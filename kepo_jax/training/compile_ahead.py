"""Ahead-of-time compilation of a run: every program for every pair of buckets that its batches have, or may have.

Batches of training and evaluation are known: their order is seeded, and texts and headers of images tell their buckets.
Which prompts will ask for a hint, how long its text is, and which further prompts dynamic sampling asks and keeps
depends on what the models write: of these, what can happen in most steps is compiled, up to `MOST_POSSIBLE`. The rest
compiles when it is first met.
"""

import bisect
import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kepo_jax import multihost, sharding
from kepo_jax.data import batching
from kepo_jax.data import processor as processor_lib
from kepo_jax.training import compiling, setup
from kepo_jax.training.compiling import Compilation
from kepo_jax.training.optimizer import TrainState
from kepo_jax.types import Example, Experience, Prompts

# Calls that may never come. Each is a sampler, or with dynamic sampling an update: seconds for the phantom's models,
# minutes for large ones, which are better spent when one is met than on every pair that could be.
MOST_POSSIBLE = 24

Buckets = tuple[int, int]  # prompt tokens S, patch rows R (0 without images)
Call = tuple[str, int, Buckets]  # name of the program, prompts of the batch, and their buckets


@dataclasses.dataclass(frozen=True)
class Need:
  """The buckets that one question needs."""

  lengths: tuple[int, ...]  # of prompt tokens, rising: without a hint, and what longer and longer ones make of it
  patches: int  # of patch rows, 0 without images


class Needs:
  """Measures the needs of questions, each once per wording."""

  def __init__(self, processor: processor_lib.Processor):
    self._processor = processor
    self._known: dict[tuple[str, int], dict[str, Need]] = {}

  def __call__(self, examples: Sequence[Example], wording: str, *, hint: int = 0) -> list[Need]:
    """Returns the need of each question.

    Args:
      examples: questions for which there is room, see `usable.refusals`.
      wording: as in `data.prompts.prompt_text`.
      hint: most tokens that a hint adds to the prompt; which text it will have is not known.

    Raises:
      ValueError: a file is no image; names it.
    """
    known = self._known.setdefault((wording, hint), {})
    fresh = list({example.id: example for example in examples if example.id not in known}.values())
    for example, (tokens, rows) in zip(fresh, self._processor.sizes(fresh, wording), strict=True):
      known[example.id] = Need(
        lengths=_reached(self._processor.prompt_buckets, tokens, tokens + hint),
        patches=_reached(self._processor.patch_buckets, rows, rows)[0] if rows else 0,
      )
    return [known[example.id] for example in examples]


def compile_ahead(run: setup.Run, state: TrainState, start: int, splits: Sequence[str]) -> None:
  """Compiles what the steps after `start`, and evaluations on `splits`, are going to need; shows how far it is.

  Raises:
    ValueError: a program cannot be compiled; says which.
    OSError: another process has failed, or could not read an image.
    Interrupted: the run was asked to stop; looked at between programs.
  """

  def progress(count: int, total: int) -> None:
    setup.show_progress(run.hooks, "compiling", count, total)
    run.interruption.check()

  programs = compile_calls(run, state)
  compilations = [
    Compilation(
      f"{name} of {size} prompts of {pair[0]} tokens and {pair[1]} patch rows",
      functools.partial(programs[name], size, pair),
    )
    for name, size, pair in multihost.run_on_all(lambda: calls(run, start, splits))
  ]
  compiling.compile_all(compilations, run.mesh, progress=progress)


def calls(run: setup.Run, start: int, splits: Sequence[str]) -> list[Call]:
  """Returns what is worth compiling: all that is certain, then the likeliest of what is possible."""
  config, needs, rows = run.config, Needs(run.processor), run.config.batch.prompts
  batches = batching.epoch_batches(run.questions["train"], rows, config.seed, start)
  steps = list(itertools.islice(batches, max(0, config.train.steps - start)))
  sampled = ["rollout"] if config.own_rollouts else []
  trained = ["update", *(["answer"] if config.teacher_answers else [])]
  # Under dynamic sampling it is not known which prompts the update will see.
  dynamic = [*sampled, *trained] if config.sampling.dynamic_rounds else []
  certain: dict[Call, None] = {}
  for batch in steps:
    pair = batch_buckets(needs(batch, config.data.prompt))
    certain |= {(name, rows, pair): None for name in (sampled if dynamic else [*trained, *sampled])}
  for split in splits:
    examples, count = run.questions[split], config.eval.prompts
    for first in range(0, len(examples), count):
      certain["evaluation", count, batch_buckets(needs(examples[first : first + count], config.eval.prompt))] = None

  # Program, wording, tokens of a hint, sizes of the batch.
  wanted: list[tuple[str, str, int, tuple[int, int]]]
  wanted = [(name, config.data.prompt, 0, (rows, rows)) for name in dynamic]
  if config.explores:
    hinted = config.exploration
    sizes = setup.row_sizes(config)
    for least, most in zip((1, *(size + 1 for size in sizes)), sizes, strict=False):
      wanted += [("hint", "hint_request", 0, (least, most))]
      wanted += [("candidate", hinted.hint_prompt, hinted.hint_tokens, (least, most))]  # rounds_at_once as many rows
  # Dynamic sampling draws from all questions; else a step explores those of its batch.
  pools = [run.questions["train"]] if dynamic else steps
  possible = collections.Counter(
    (name, most, pair)
    for pool in (pools if wanted else ())
    for name, wording, hint, (least, most) in wanted
    for pair in sorted(reachable(needs(pool, wording, hint=hint), least, most))
  )
  likeliest = (call for call, _ in possible.most_common() if call not in certain)
  return [*certain, *itertools.islice(likeliest, MOST_POSSIBLE)]


def compile_calls(run: setup.Run, state: TrainState) -> Mapping[str, Callable[[int, Buckets], Any]]:
  """Returns program name -> the call that compiles it, and all that it needs, for (number of prompts, buckets)."""
  config, programs = run.config, run.programs
  student = compiling.shapes_of(state)
  # Which key it is compiles the same.
  rollout, evaluation, answer = (setup.random_key(config.seed, name, 0) for name in ("rollout", "evaluation", "answer"))

  def prompts(size: int, pair: Buckets) -> Prompts:
    return sharding.placed_shapes(run.mesh, run.processor.shapes(size, *pair))

  def of_student(sample: Callable[..., Any], key: jax.Array) -> Callable[[int, Buckets], Any]:
    return lambda size, pair: sample(programs.decode_weights(student.params), prompts(size, pair), key)

  def of_teacher(sample: Callable[..., Any], key: jax.Array) -> Callable[[int, Buckets], Any]:
    return lambda size, pair: sample(prompts(size, pair), key)

  def candidate(size: int, pair: Buckets) -> Any:
    rows = size * config.rounds_at_once
    return programs.candidate(
      programs.decode_weights(student.params), prompts(rows, pair), key_shapes(run.mesh, rows, 1)
    )

  def update(size: int, pair: Buckets) -> None:
    rows = (size, config.batch.rollouts, config.sampling.max_new_tokens)
    experience = experience_shapes(run.mesh, prompts(size, pair), rows)
    targets = programs.targets(experience.prompts, experience.tokens)
    programs.update.compile(student, experience, targets, compare=config.compares_gradients)

  return {
    "update": update,
    "rollout": of_student(programs.rollout, rollout),
    "candidate": candidate,
    "evaluation": of_student(programs.greedy, evaluation),
    "hint": lambda size, pair: programs.hint(prompts(size, pair), key_shapes(run.mesh, 1, config.rounds_at_once)),
    "answer": of_teacher(programs.answer, answer),
  }


def key_shapes(mesh: jax.sharding.Mesh, prompts: int, completions: int) -> Any:
  """Returns the shape of the data of keys, one per prompt or per completion."""
  return sharding.placed_shapes(mesh, jax.ShapeDtypeStruct((prompts, completions, 2), np.uint32))


def experience_shapes(mesh: jax.sharding.Mesh, prompts: Prompts, rows: tuple[int, int, int]) -> Experience:
  """Returns the shapes of a batch of the update.

  Args:
    mesh: of the run.
    prompts: their shapes.
    rows: P, G, T.
  """

  arrays = {name: jax.ShapeDtypeStruct(rows[:2], np.bool_) for name in ("gate", "injected", "supervised", "kept")}
  arrays["advantages"] = jax.ShapeDtypeStruct(rows[:2], np.float32)
  for name, dtype in (("tokens", np.int32), ("mask", np.bool_), ("logps", np.float32)):
    arrays[name] = jax.ShapeDtypeStruct(rows, dtype)
  return Experience(prompts=prompts, **sharding.placed_shapes(mesh, arrays))


def _reached(buckets: Sequence[int], least: int, most: int) -> tuple[int, ...]:
  """Returns the buckets of sizes from `least` to `most`, or the largest."""
  first, last = (min(bisect.bisect_left(buckets, size), len(buckets) - 1) for size in (least, most))
  return tuple(buckets[first : last + 1])


def batch_buckets(needs: Sequence[Need]) -> Buckets:
  """Returns the buckets of a batch of exactly these questions, without hints."""
  return max(need.lengths[0] for need in needs), max(need.patches for need in needs)


def reachable(needs: Sequence[Need], least: int, most: int) -> set[Buckets]:
  """Returns every pair of buckets that a batch of `least` to `most` of the questions can have, whatever the hints are.

  Args:
    needs: of the questions to choose from.
    least: questions in the batch, 1 or more.
    most: the same or more.
  """
  pairs = set()
  for length in {length for need in needs for length in need.lengths}:
    for patches in {need.patches for need in needs}:
      fitting = [need for need in needs if need.lengths[0] <= length and need.patches <= patches]
      long = [need for need in fitting if length in need.lengths]
      large = [need for need in fitting if need.patches == patches]
      # One question may fill both buckets; two questions always can.
      filled = bool(long and large) and (most > 1 or any(need.patches == patches for need in long))
      if filled and len(fitting) >= least:
        pairs.add((length, patches))
  return pairs
