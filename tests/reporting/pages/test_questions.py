from kepo_jax.reporting import pages
from kepo_jax.reporting.pages import questions
from tests.evaluation.scripted import output
from tests.reporting.pages.cases import rollout


def group(accuracies, **fields):
  return [rollout(number=n, accuracy=value, **fields) for n, value in enumerate(accuracies)]


def test_outcome_of_a_group():
  for number, (records, outcome) in enumerate((
    (group([0.0, 0.0]), questions.ALL_WRONG),
    (group([0.0, 1.0]), questions.MIXED),
    (group([1.0, 1.0]), questions.ALL_RIGHT),
    # What a hint or another model wrote is not the student's.
    ([rollout(accuracy=0.0), rollout(number=1, accuracy=1.0, injected=True, hint="look left")], questions.ALL_WRONG),
    ([rollout(accuracy=1.0), rollout(number=1, accuracy=0.0, supervised=True)], questions.ALL_RIGHT),
  )):  # fmt: skip
    (sample,) = pages.training_samples(records)
    assert sample.outcome == outcome, number


def test_a_group_has_its_rollouts_with_all_that_is_known():
  records = [
    rollout(accuracy=1.0, gate=True),
    rollout(number=1, accuracy=1.0, gate=True, injected=True, hint="look left"),
    rollout(number=2, supervised=True, images=["x.png"]),
  ]
  records[0]["images"] = ["x.png", "gs://bucket/y.png"]
  (sample,) = pages.training_samples(records)
  assert sample.images == ("x.png", "gs://bucket/y.png") and sample.options == ("one", "two") and sample.answer == "A"
  assert sample.tags == (questions.INJECTED, questions.GATED) and sample.details == (("step", "1"),)
  (rollouts,) = sample.groups
  first, second, third = rollouts.answers
  assert first.values == (("accuracy", "1"), ("format", "1"), ("total", "2")) and first.right
  assert [each.marks for each in rollouts.answers] == [("distilled",), ("distilled", "injected"), ("supervised",)]
  assert second.hint == "look left" and first.hint == "" and not third.right


def candidate(number, hint, **fields):
  return {"step": 1, "id": "q1", "kind": "candidate", "round": number, "hint": hint, "completion": "said",
          "accurate": True, "well_formed": True, "leaks": False, "accepted": True} | fields  # fmt: skip


def test_hints_stand_with_their_candidates():
  records = group([0.0, 0.0]) + [
    {"step": 1, "id": "q1", "kind": "hint", "text": "<hint> look left </hint>"},
    {"step": 1, "id": "q1", "kind": "hint", "text": "no block"},
    candidate(1, "look left"),
    candidate(1, "look left", accurate=False, well_formed=False, leaks=True, accepted=False),
    candidate(2, "look up"),
    candidate(2, "elsewhere", id="q9"),  # of a question whose rollouts were not stored
  ]
  (sample,) = pages.training_samples(records)
  _, first, second, lost = sample.groups
  assert (first.heading, first.hint) == ("Candidates of round 1", "look left") and second.hint == "look up"
  assert [(each.label, each.right, each.marks) for each in first.answers] == [
    ("candidate 1", True, ("accepted", "well formed")),
    ("candidate 2", False, ("not accepted", "not well formed", "talks about the hint")),
  ]
  assert (lost.heading, lost.hint, lost.answers) == ("Hint that was not used", "no block", ())


def test_evaluations_stand_side_by_side():
  before = [output("t1", correct=False, format=False, truncated=True), output("t2"), output("t3", files=["x.png"])]
  after = [output("t1"), output("t2", correct=False), output("t1", correct=False, sample=1), output("t4")]
  samples = {each.id: each for each in pages.evaluated_samples({"before": before, "after": after})}
  assert {name: each.outcome for name, each in samples.items()} == {
    "t1": "wrong → right", "t2": "right → wrong", "t3": "right → not asked", "t4": "not asked → right",
  }  # fmt: skip
  (answers,) = samples["t1"].groups
  assert [(a.label, a.right, a.values, a.marks) for a in answers.answers] == [
    ("before", False, (("letter", "none"),), ("not well formed", "truncated")),
    ("after", True, (("letter", "A"),), ()),
  ]
  assert samples["t3"].images == ("x.png",) and len(samples["t3"].groups[0].answers) == 1


def test_samples_are_told_apart_by_run_and_part_of_the_training():
  samples = pages.training_samples([rollout(step=step, name=f"q{step % 9}") for step in range(1, 11)])
  parts = ["steps 1-3"] * 3 + ["steps 4-6"] * 3 + ["steps 7-9"] * 3 + ["step 10"]  # in quarters
  assert [each.source for each in samples] == [f"training, {part}" for part in parts]
  assert samples[0].id == samples[9].id and len({each.key for each in samples}) == 10
  (one,), (two,) = (pages.evaluated_samples({"after": [output()]}, prefix=f"kepo, seed {seed}") for seed in (0, 1))
  assert one.key != two.key and (one.source, one.outcome) == ("kepo, seed 0: test", "right")
