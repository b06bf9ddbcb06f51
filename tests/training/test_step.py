import contextlib
import functools
import types

import jax
import numpy as np
import pytest

from experiments.configs import kepo
from kepo_jax.training import metrics, prefetch, step
from kepo_jax.training import rollouts as rollouts_lib
from kepo_jax.types import Rollouts
from tests.training import cases
from tests.training.cases import END, example
from tests.training.runs import changed

TEXTS = {0: "<hint>look</hint>", 2: cases.RIGHT, 3: cases.WRONG, 4: cases.BARE}  # what the first token of a row says


class Processor:
  end_ids = (END,)

  def decode(self, tokens, mask):
    return [TEXTS[int(row[0])] for row in tokens]


def run_of(**changes):
  """The fields of a run that a step uses, with a config of KEPO; changes as `section__field=value`."""
  processor = Processor()
  return types.SimpleNamespace(
    config=changed(kepo, batch__prompts=3, **changes), processor=processor,
    score=functools.partial(rollouts_lib.scored_groups, processor, cases.SCORER), mesh=None,
    prompts=lambda examples, wording, hints=None, sizes=None: types.SimpleNamespace(row=examples),
  )  # fmt: skip


@pytest.fixture(autouse=True)
def keys(monkeypatch):
  """What random keys are asked for; nothing is placed on a mesh."""
  asked = []

  def key(seed, purpose, *counters):
    asked.append((purpose, *counters))
    return jax.random.key(0)

  monkeypatch.setattr(step.setup, "random_key", key)
  monkeypatch.setattr(step.sharding, "place", lambda mesh, batch: batch)
  return asked


def tokens_of(first):
  """Rollouts of two tokens each from the first ones, [P][G]."""
  first = np.array(first, np.int32)
  tokens = np.stack([first, np.full_like(first, END)], -1)
  return Rollouts(tokens=tokens, mask=np.ones(tokens.shape, bool), logps=np.zeros(tokens.shape, np.float32))


def groups_of(rows):
  return cases.groups([[TEXTS[t] for t in row] for row in rows], np.full(np.shape(rows), 2))


def ids(examples):
  return [example.id.removeprefix("set/") for example in examples]


def stepped(run, rollouts, *, number=0):
  """What `train_step` makes of the student's rollouts [P][G], with an update that changes nothing."""
  examples = [example(f"q{number}") for number in range(len(rollouts.tokens))]
  pending = prefetch.Pending(number, examples, None, "weights", rollouts)
  run.programs = types.SimpleNamespace(**vars(run.programs) if hasattr(run, "programs") else {})
  run.programs.targets = lambda prompts, tokens: ()
  run.programs.update = lambda state, experience, targets, compare: (state, {})
  _, trained = step.train_step(run, None, pending, metrics.PhaseClock())
  assert pending.weights is None  # before the update, which needs their memory
  return trained


def test_injected_rollouts_are_distilled_or_not():
  for distilled in (True, False):
    run = run_of(objective__gate_injected=distilled, exploration__rounds=1, exploration__replacements=1)
    exploring(run, [[2]])
    trained = stepped(run, tokens_of([[3, 3, 3]]))
    assert trained.groups.injected.sum() == 1
    assert trained.gate.tolist() == (trained.groups.injected & distilled).tolist()


def test_truncated_rollouts_of_the_student_are_kept_or_not():
  for masked in (False, True):
    run = run_of(batch__rollouts=2, batch__on_policy_fraction=0.5, supervised__source="teacher")
    run.config = run.config.replace({"objective.mask_truncated": masked, "exploration.rounds": 0})
    cut = tokens_of([[2]])
    cut.tokens[...] = 2
    run.programs = types.SimpleNamespace(answer=lambda prompts, key, cut=cut: cut)
    trained = stepped(run, cut)
    assert trained.kept.tolist() == trained.gate.tolist() == [[not masked, True]]


def test_advantages_compare_the_students_own_rollouts():
  run = run_of(batch__rollouts=4, batch__on_policy_fraction=0.5, supervised__source="teacher", exploration__rounds=0)
  run.programs = types.SimpleNamespace(answer=lambda prompts, key: tokens_of([[2, 2]]))
  experience = stepped(run, tokens_of([[2, 3]])).experience
  # Rewards 1.5 and 0.5 of the own two: mean 1, sample deviation 0.707.
  x = 0.5 / (0.5**0.5 + 1e-4)
  np.testing.assert_allclose(experience.advantages, [[x, -x, 0, 0]], rtol=1e-5)
  assert experience.supervised.tolist() == [[False, False, True, True]]


def test_useful_groups_come_first_and_others_fill_up():
  groups = groups_of([[2, 2], [2, 3], [3, 3], [3, 2], [2, 2]])
  # Two of five have a signal; the first of the others fills the batch of three, and the order of asking stays.
  useful = step.useful_groups(run_of(exploration__rounds=0).config, groups)
  assert useful.tolist() == [False, True, False, True, False] and step.first_useful(useful, 3) == [0, 1, 3]
  # A prompt without an accurate rollout may be explored, so it is useful.
  useful = step.useful_groups(run_of(exploration__rounds=1).config, groups)
  assert step.first_useful(useful, 3) == [1, 2, 3]


def test_sampling_goes_on_until_enough_groups_are_useful(keys):
  run = run_of(sampling__dynamic_rounds=3, exploration__rounds=0)
  run.questions = {"train": [example(f"q{number}") for number in range(9)]}
  rounds = iter([[[2, 3], [3, 3], [3, 2]], [[2, 3]] * 3])

  def rollout(weights, prompts, key):
    assert weights == "weights"
    return tokens_of(next(rounds))

  run.programs = types.SimpleNamespace(rollout=rollout)
  pending = prefetch.Pending(7, run.questions["train"][:3], None, "weights")
  groups = step.sample_further(run, pending, run.score(pending.examples, tokens_of([[2, 2], [2, 3], [2, 2]])))
  # One useful group of three, then three of six: enough after the second of four rounds.
  assert len({*ids(groups.examples)}) == 6 and ids(groups.examples)[:3] == ["q0", "q1", "q2"]
  assert keys == [("rollout", 7)]


def test_refused_answers_of_the_teacher_leave_their_rows_empty(keys):
  run = run_of(batch__rollouts=3, batch__on_policy_fraction=0.0, supervised__source="teacher")
  rollouts = tokens_of([[2, 3, 4]])  # right; wrong; right and not well formed
  run.programs = types.SimpleNamespace(answer=lambda prompts, key: rollouts)
  groups, written = step.supervised_rows(run, [example("q0")], None, 4)
  assert written == 6  # the refused ones cost as much
  assert groups.mask.any(-1).tolist() == [[True, False, False]]
  assert groups.supervised.all() and keys == [("answer", 4)]


def exploring(run, candidates):
  """Gives the run a teacher with one hint of one token, and candidates [P][M]; the phases of the teacher."""
  hint = Rollouts(tokens=np.zeros((1, 1, 1), np.int32), mask=np.ones((1, 1, 1), bool), logps=np.zeros((1, 1, 1)))
  run.programs = types.SimpleNamespace(
    hint=lambda prompts, key: hint, candidate=lambda weights, prompts, key: tokens_of(candidates)
  )
  phases = []

  @contextlib.contextmanager
  def on_device():
    phases.append("begun")
    yield
    phases.append("over")

  run.models = {"teacher": types.SimpleNamespace(weights=types.SimpleNamespace(on_device=on_device))}
  return phases


def test_each_round_of_exploration_draws_anew(keys):
  run = run_of(exploration__hints="once", exploration__rounds=3)
  phases = exploring(run, [[3, 3]])
  outcome, *tokens = step.explore(run, None, groups_of([[3, 3]]), 9)
  assert keys == [("hint", 9, 1), *[("candidate", 9, attempt) for attempt in (1, 2, 3)]]
  assert phases == ["begun", "over"]  # the teacher comes once for three rounds, and not where nobody asks
  step.explore(run, None, groups_of([[2, 2]]), 9)
  assert phases == ["begun", "over"]
  assert outcome.accepted == {0: []} and len(outcome.candidates[0]) == 6
  assert tokens == [1, 3 * 2 * 2]  # one hint of one token, once for three rounds


def test_candidates_count_as_sampled_and_their_slots_differ_from_step_to_step():
  run = run_of(batch__rollouts=8, exploration__rounds=1, exploration__replacements=2)
  exploring(run, [[2, 3, 2]])
  slots = []
  for number in (0, 1, 2, 3, 0):
    trained = stepped(run, tokens_of([[3] * 8]), number=number)
    assert trained.sampled == 2 * 8 + 2 * 3  # replaced rollouts and refused candidates included
    assert trained.written == 1
    slots.append(np.flatnonzero(trained.groups.injected[0]).tolist())
  assert all(len(each) == 2 for each in slots)
  assert len({tuple(each) for each in slots[:4]}) > 1 and slots[4] == slots[0]
  run.config = run.config.replace({"seed": 1})
  assert np.flatnonzero(stepped(run, tokens_of([[3] * 8])).groups.injected[0]).tolist() != slots[0]


def test_tokens_are_counted_by_what_was_done_with_them():
  config = changed(kepo, batch__updates=2, objective__distill_weight=1.0, exploration__rounds=1)
  groups = groups_of([[2, 3], [3, 3]])
  groups.mask[0, 0, 1] = False
  kept = np.array([[True, True], [True, False]])
  trained = metrics.StepResult(1, groups, kept, kept, None, {}, (), sampled=20, written=5)
  said = metrics.token_metrics(config, trained)
  assert said == {"tokens/trained": 10.0, "tokens/sampled": 20.0, "tokens/written": 5.0, "tokens/scored": 7.0}
  config = config.replace({"objective.distill_weight": 0.0, "exploration.rounds": 0})
  assert metrics.token_metrics(config, trained).keys() == {"tokens/trained", "tokens/sampled"}
