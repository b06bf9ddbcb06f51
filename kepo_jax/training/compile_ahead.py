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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
  """The needs of questions, each measured once per wording."""

  def __init__(self, processor: processor_lib.Processor):
    self._processor = processor
    self._known: dict[tuple[str, int], dict[str, Need]] = {}

  def __call__(self, examples: Sequence[Example], kind: str, *, hint: int = 0) -> list[Need]:
    """The need of each question.

    Args:
      examples: questions for which there is room, see `limits.refusals`.
      kind: wording, as in `data.prompts.prompt_text`.
      hint: most tokens that a hint adds to the prompt; which text it will have is not known.

    Raises:
      ValueError: a file is no image; names it.
    """
    known = self._known.setdefault((kind, hint), {})
    fresh = list({example.id: example for example in examples if example.id not in known}.values())
    for example, (tokens, rows) in zip(fresh, self._processor.sizes(fresh, kind), strict=True):
      known[example.id] = Need(
        lengths=_reached(self._processor.prompt_buckets, tokens, tokens + hint),
        patches=_reached(self._processor.patch_buckets, rows, rows)[0] if rows else 0,
      )
    return [known[example.id] for example in examples]


def compile_ahead(run: setup.Run, state: TrainState, start: int, splits: Sequence[str]) -> None:
  """Compiles what the steps after `start`, and evaluations on `splits`, are going to need; shows how far it is.

  Raises:
    ValueError: a program cannot be compiled; says which.
    OSError: so it is on another process, or an image could not be read there.
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
  """What is worth compiling: all that is certain, then the likeliest of what is possible."""
  needs = Needs(run.processor)
  sure = dict.fromkeys((*_asked(run, needs, start), *_evaluated(run, needs, splits)))
  chances = collections.Counter(call for call in _possible(run, needs, start) if call not in sure)
  return [*sure, *(call for call, _ in chances.most_common(MOST_POSSIBLE))]


def _batches(run: setup.Run, start: int) -> Iterator[list[Example]]:
  """The questions of each step from `start` on."""
  config = run.config
  batches = batching.epoch_batches(run.questions["train"], config.batch.prompts, config.seed, start)
  return itertools.islice(batches, max(0, config.train.steps - start))


def _asked(run: setup.Run, needs: Needs, start: int) -> Iterator[Call]:
  """What every step does with the batch that it begins with, with repetitions."""
  config = run.config
  # Under dynamic sampling it is not known which prompts the update will see.
  names = ["update", "answer"] if not config.sampling.dynamic_rounds else []
  for batch in _batches(run, start):
    pair = batch_buckets(needs(batch, config.data.prompt))
    yield from ((name, config.batch.prompts, pair) for name in _used(run, *names, "rollout"))


def _evaluated(run: setup.Run, needs: Needs, splits: Sequence[str]) -> Iterator[Call]:
  """The batches of the evaluations, with repetitions."""
  config = run.config.eval
  for split in splits:
    questions = run.questions[split]
    for first in range(0, len(questions), config.prompts):
      batch = needs(questions[first : first + config.prompts], config.prompt)
      yield "evaluation", config.prompts, batch_buckets(batch)


def _possible(run: setup.Run, needs: Needs, start: int) -> Iterator[Call]:
  """What may happen in each step; the more often a call comes here, the likelier it is."""
  config, asks = run.config, run.config.exploration
  wanted: list[tuple[str, str, int, tuple[int, int]]] = []  # program, wording, tokens of a hint, sizes of the batch
  rows = config.batch.prompts
  if config.sampling.dynamic_rounds:
    wanted += [(name, config.data.prompt, 0, (rows, rows)) for name in _used(run, "rollout", "update", "answer")]
  if config.explores:
    sizes = setup.row_sizes(config)
    for least, most in zip((1, *(size + 1 for size in sizes)), sizes, strict=False):
      wanted += [("hint", "hint_request", 0, (least, most))]
      wanted += [("candidate", asks.hint_prompt, asks.hint_tokens, (least, most))]
  # Dynamic sampling draws from all questions; else a step explores those of its batch.
  pools = [run.questions["train"]] if config.sampling.dynamic_rounds else _batches(run, start)
  for pool in pools if wanted else ():
    for name, kind, hint, (least, most) in wanted:
      for pair in sorted(reachable(needs(pool, kind, hint=hint), least, most)):
        yield name, most, pair


def _used(run: setup.Run, *names: str) -> list[str]:
  """Those of some programs that the method calls for a batch of training."""
  unused = set() if run.config.own_rollouts else {"rollout"}
  unused |= set() if run.config.teacher_answers else {"answer"}
  return [name for name in names if name not in unused]


def compile_calls(run: setup.Run, state: TrainState) -> Mapping[str, Callable[[int, Buckets], Any]]:
  """Name of a program -> what compiles it, and all that it needs, for so many prompts in a pair of buckets."""
  config, programs = run.config, run.programs
  student = compiling.shapes_of(state)
  # Keys have one shape; which one it is compiles the same.
  names = ("rollout", "hint", "candidate", "evaluation", "answer")
  rollout, hint, candidate, evaluation, answer = (setup.random_key(config.seed, name, 0) for name in names)

  def prompts(size: int, pair: Buckets) -> Prompts:
    return sharding.placed_shapes(run.mesh, run.processor.shapes(size, *pair))

  def sampled(sample: Callable[..., Any], key: jax.Array) -> Callable[[int, Buckets], Any]:
    return lambda size, pair: sample(programs.decode_weights(student.params), prompts(size, pair), key)

  def asked(ask: Callable[..., Any], key: jax.Array) -> Callable[[int, Buckets], Any]:
    return lambda size, pair: ask(prompts(size, pair), key)

  def update(size: int, pair: Buckets) -> None:
    shown = prompts(size, pair)
    experience = experience_shapes(run.mesh, shown, (size, config.batch.rollouts, config.sampling.max_new_tokens))
    targets = programs.targets(shown, experience.tokens)
    programs.update.compile(student, experience, targets, compare=config.compares_gradients)

  return {
    "update": update,
    "rollout": sampled(programs.rollout, rollout),
    "candidate": sampled(programs.candidate, candidate),
    "evaluation": sampled(programs.greedy, evaluation),
    "hint": asked(programs.hint, hint),
    "answer": asked(programs.answer, answer),
  }


def experience_shapes(mesh: jax.sharding.Mesh, prompts: Prompts, rows: tuple[int, int, int]) -> Experience:
  """The shapes of a batch of the update.

  Args:
    mesh: of the run.
    prompts: their shapes.
    rows: P, G, T.
  """

  def of(dtype: type, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)

  group = rows[:2]
  return Experience(
    prompts=prompts,
    **sharding.placed_shapes(
      mesh,
      {
        "tokens": of(np.int32, *rows),
        "mask": of(np.bool_, *rows),
        "logps": of(np.float32, *rows),
        "advantages": of(np.float32, *group),
        "gate": of(np.bool_, *group),
        "injected": of(np.bool_, *group),
        "supervised": of(np.bool_, *group),
        "kept": of(np.bool_, *group),
      },
    ),
  )


def _reached(buckets: Sequence[int], least: int, most: int) -> tuple[int, ...]:
  """The buckets of sizes from `least` to `most`, or the largest."""
  first, last = (min(bisect.bisect_left(buckets, size), len(buckets) - 1) for size in (least, most))
  return tuple(buckets[first : last + 1])


def batch_buckets(needs: Sequence[Need]) -> Buckets:
  """The buckets of a batch of exactly these questions, without hints."""
  return max(need.lengths[0] for need in needs), max(need.patches for need in needs)


def reachable(needs: Sequence[Need], least: int, most: int) -> set[Buckets]:
  """Every pair of buckets that a batch of `least` to `most` of these questions can have, whatever the hints are.

  Args:
    needs: of the questions to choose from.
    least: questions in the batch, 1 or more.
    most: the same or more.
  """
  found = set()
  for length in {length for need in needs for length in need.lengths}:
    for patches in {need.patches for need in needs}:
      fitting = [need for need in needs if need.lengths[0] <= length and need.patches <= patches]
      long = [need for need in fitting if length in need.lengths]
      large = [need for need in fitting if need.patches == patches]
      # One question may fill both buckets; two questions always can.
      filled = bool(long and large) and (most > 1 or any(need.patches == patches for need in long))
      if filled and len(fitting) >= least:
        found.add((length, patches))
  return found
