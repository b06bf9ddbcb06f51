"""A run over mixed sizes compiles before its first step, and nothing after it; what it does is the same to the bit."""

import dataclasses
import itertools

import jax
import pytest
from PIL import Image

from experiments.configs import kepo
from kepo_jax import training
from kepo_jax.training import compile_ahead
from kepo_jax.training.compile_ahead import Need
from kepo_jax.training.monitoring import CompileCounter
from tests.data.conftest import checkpoint, processor
from tests.data.conftest import questions as data_questions
from tests.training.cases import example
from tests.training.runs import Recorder, Signal, changed, equal, shrunk

__all__ = ["checkpoint", "data_questions", "processor"]  # fixtures
SIZES = ((64, 64), (128, 64))  # 64 and 128 patch rows: two buckets


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
  """Questions of two lengths about images of two sizes, in turn."""
  folder, found = tmp_path_factory.mktemp("images"), []
  for number in range(10):
    path = folder / f"{number}.png"
    Image.new("RGB", SIZES[number % 2], (number, 0, 0)).save(path)
    stem = "How many bright spots?" + " Look." * (8 if number % 3 == 2 else 0)
    found.append(dataclasses.replace(example(f"q{number}"), question=stem, images=(str(path),)))
  return {"train": found[:6], "validation": found[6:8], "test": found[8:]}


def mixed(**changes):
  """KEPO that asks for a hint in every step, one prompt at a time, and compares gradients in the second."""
  sizes = {"train__steps": 5, "eval__every": 2, "eval__prompts": 1, "checkpoint__every": 0, "batch__micro_batches": 1}
  asks = {"exploration__trigger": "always", "exploration__rounds": 1, "exploration__replacements": 1}
  buckets = {"data__prompt_buckets": (64, 128), "data__patch_buckets": (64, 128), "log__gradients_every": 2}
  lengths = {"sampling__max_new_tokens": 4, "eval__max_new_tokens": 4, "exploration__hint_tokens": 4}
  batch = {"batch__prompts": 1, "batch__rollouts": 2}
  return shrunk(changed(kepo), **sizes | asks | buckets | lengths | batch | changes)


class Compiled(Recorder):
  """Also keeps how many programs were compiled by the end of the first step, and how far compiling was."""

  def __init__(self):
    super().__init__()
    self.counter, self.told = CompileCounter(), []

  def programs(self):
    return self.counter.metrics()["compiled/programs"]

  def progress(self, what, done, total):
    if what == "compiling":
      assert not self.reports
      self.told.append((done, total))

  def step(self, report):
    super().step(report)
    self.first = self.first if len(self.reports) > 1 else self.programs()


def run(questions, **changes):
  hook = Compiled()
  result = training.train(mixed(**changes), records=questions, hooks=[hook])
  hook.counter.close()
  return result, hook, hook.programs() - hook.first


@pytest.mark.slow
def test_nothing_compiles_after_the_first_step(questions):
  fewer = {"train__steps": 3, "data__prompt_buckets": (128,)}  # pictures of two sizes are enough
  ahead, hook, late = run(questions, train__compile_ahead=True, **fewer)
  met, other, later = run(questions, train__compile_ahead=False, **fewer)
  assert late == 0 < later
  total = hook.told[-1][1]
  assert hook.told == [(done, total) for done in range(1, total + 1)] and not other.told
  assert [report.metrics for report in hook.reports] == [report.metrics for report in other.reports]
  assert [report.samples for report in hook.reports] == [report.samples for report in other.reports]
  assert ahead.evaluations == met.evaluations and equal(ahead.state, met.state)


class Stop(Exception):
  """Ends a run where its first program would compile."""


@pytest.fixture
def calls_of(questions, monkeypatch):
  """What a run with some changes would compile."""

  def calls(splits=("validation", "test"), start=0, **changes):
    kept = []

    def instead(run, state, start_, splits_):
      kept.extend(compile_ahead.calls(run, start, splits))
      raise Stop

    monkeypatch.setattr(compile_ahead, "compile_ahead", instead)
    with pytest.raises(Stop):
      training.train(mixed(train__compile_ahead=True, **changes), records=questions)
    return kept

  return calls


def named(calls, name):
  return {call[1:] for call in calls if call[0] == name}


def test_what_a_run_compiles(calls_of):
  calls = calls_of()
  pairs = set(itertools.product((64, 128), (64, 128)))
  assert named(calls, "rollout") == named(calls, "update") == {(1, pair) for pair in pairs}
  assert named(calls, "evaluation") <= {(1, pair) for pair in pairs}
  assert named(calls, "hint") and named(calls, "candidate") and not named(calls, "answer")
  fewer = calls_of(splits=(), exploration__trigger="never", start=4)
  assert {call[0] for call in fewer} == {"rollout", "update"} and len(fewer) == 2  # of the last step alone


def test_what_is_only_possible_comes_last_and_has_a_limit(calls_of, monkeypatch):
  calls = calls_of(sampling__dynamic_rounds=1, exploration__trigger="never")
  first = calls.index(next(call for call in calls if call[0] == "update"))
  assert {call[0] for call in calls[:first]} == {"rollout", "evaluation"} and len(named(calls, "update")) == 4
  monkeypatch.setattr(compile_ahead, "MOST_POSSIBLE", 3)
  assert sum(call[0] in ("hint", "candidate") for call in calls_of()) == 3


class Asking(Signal):
  """Asks the run to stop as soon as a program is compiled; counts how many are."""

  compiled = 0

  def progress(self, what, done, total):
    super().progress(what, done, total)
    self.compiled += what == "compiling"


def test_a_run_that_is_asked_to_stop_ends_between_programs(questions, monkeypatch):
  hook, names = Asking(progress="compiling"), ("update", "rollout", "candidate", "evaluation", "hint", "answer")
  programs = dict.fromkeys(names, lambda size, pair: None)
  monkeypatch.setattr(compile_ahead, "compile_calls", lambda run, state: programs)
  with pytest.raises(training.Interrupted, match="interrupted after step 0; nothing was saved"):
    training.train(mixed(train__compile_ahead=True), records=questions, hooks=[hook], interruption=hook)
  assert hook.compiled == 1


def buckets_of(batch):
  return batch.tokens.shape[1], batch.vision.patches.shape[1]


def test_batches_have_the_buckets_that_were_told(processor, data_questions):  # noqa: F811
  needs, pairs = compile_ahead.Needs(processor), set()
  for kind in ("think", "hint_request"):
    for chosen in itertools.chain.from_iterable(itertools.combinations(data_questions, size) for size in (1, 2, 3)):
      batch = processor.prompts(chosen, kind)
      assert compile_ahead.batch_buckets(needs(chosen, kind)) == buckets_of(batch), (kind, [each.id for each in chosen])
      told = processor.shapes(len(chosen), *buckets_of(batch))
      same = jax.tree.map(lambda array, shape: (array.shape, array.dtype) == (shape.shape, shape.dtype), batch, told)
      assert all(jax.tree.leaves(same))
      pairs.add(buckets_of(batch))
  assert len(pairs) > 2  # the questions differ enough


def test_hints_reach_no_other_buckets(processor, data_questions):  # noqa: F811
  needs = compile_ahead.Needs(processor)
  hint = " ".join(["look"] * 10)  # a token per character at most
  for asked in data_questions:
    (need,) = needs([asked], "hint_only", hint=60)
    lengths = {buckets_of(processor.prompts([asked], "hint_only", hints=[text]))[0] for text in ("", hint[:4], hint)}
    assert lengths <= set(need.lengths)
  assert any(len(need.lengths) > 1 for need in needs(data_questions, "hint_only", hint=60))


def slowly_reachable(needs, least, most):
  """By trying every choice of questions and every length of their hints."""
  found = set()
  for size in range(least, most + 1):
    for chosen in itertools.combinations(needs, size):
      for lengths in itertools.product(*(need.lengths for need in chosen)):
        found.add((max(lengths), max(need.patches for need in chosen)))
  return found


def test_reachable_buckets_are_those_of_all_choices():
  needs = (Need((64,), 16), Need((64, 128), 0), Need((128, 256), 16), Need((256,), 64))
  crossed = (Need((64,), 64), Need((256,), 16))  # no one fills both buckets
  for chosen in (needs, needs[:3], needs[1:], crossed, needs[:1] * 4):
    for least, most in [(1, 1), (1, 2), (2, 2), (2, 4), (3, 4), (4, 4)]:
      found, expected = (find(chosen, least, most) for find in (compile_ahead.reachable, slowly_reachable))
      assert found == expected, (chosen, least, most)
