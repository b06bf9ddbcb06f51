import dataclasses
import json

import numpy as np
import pytest

from kepo_jax import exploration
from kepo_jax.data.prompts import BRIEF, problem
from kepo_jax.training import metrics
from kepo_jax.training import rollouts as rollouts_lib
from tests.training import cases
from tests.training.cases import BARE, END, NOTHING, RIGHT, WRONG, G, P

GATE = np.array([[True, False, True], [False, True, False]])


def test_reward_metrics():
  # Rewards 1.5 0.5 1 and 0 0.5 0.5; the second prompt is a cliff, and neither group is dead.
  assert metrics.reward_metrics(cases.mixed()) == {
    "reward/accuracy": pytest.approx(2 / 6), "reward/format": pytest.approx(4 / 6),
    "reward/mean": pytest.approx(4 / 6), "cliff_rate": 0.5, "dead_group_rate": 0.0, "dead_group_rate/right": 0.0,
    "dead_group_rate/wrong": 0.0,
  }  # fmt: skip


def test_dead_groups_are_all_right_or_all_wrong_or_neither():
  # All right; all wrong in one way; all wrong, yet with rewards that differ; right and wrong with one reward.
  texts = [[RIGHT, RIGHT], [WRONG, WRONG], [WRONG, NOTHING], [RIGHT, WRONG]]
  groups = cases.groups(texts, [[4, 4]] * 4)
  groups.scores["total"][3] = 1.0
  found = metrics.reward_metrics(groups)
  assert found["dead_group_rate"] == 3 / 4
  assert (found["dead_group_rate/right"], found["dead_group_rate/wrong"]) == (1 / 4, 1 / 4)
  assert found["cliff_rate"] == 2 / 4  # a cliff may have a signal


def test_graded_accuracy_is_neither_a_cliff_nor_wrong():
  groups = cases.groups([[NOTHING] * 3], [[4] * 3])
  groups.scores["accuracy"][0] = 0.5
  groups.scores["mine"] = np.array([[1, 2, 6]], np.float32)
  found = metrics.reward_metrics(groups)
  assert found["cliff_rate"] == 0 and found["dead_group_rate/right"] == 1 and found["reward/mine"] == 3
  assert metrics.gate_metrics(groups, np.ones((1, 3), bool))["gate/wrong_share"] == 0


def test_mixed_metrics_of_the_students_own_groups():
  groups = cases.mixed()
  # Lengths 4 3 1 and 4 2 3; one row of six is cut off.
  assert metrics.mixed_metrics(groups, (END,)) == {
    "injected_frac": 0.0,
    "completion/length": pytest.approx(17 / 6),
    "completion/truncated_frac": pytest.approx(1 / 6),
  }
  rollouts_lib.inject(groups, [(1, 0, cases.candidate())])
  # The row that was cut off becomes a right one of two tokens: rewards 1.5 0.5 1 and 1.5 0.5 0.5.
  assert metrics.mixed_metrics(groups, (END,)) == {
    "injected_frac": pytest.approx(1 / 6), "injected/reward_mean": pytest.approx(5.5 / 6),
    "completion/length": pytest.approx(15 / 6), "completion/truncated_frac": 0.0,
  }  # fmt: skip


def test_mixed_metrics_count_own_rows_apart_from_supervised_ones():
  others = cases.groups([[RIGHT, RIGHT, RIGHT]] * 2, [[1, 1, 1]] * 2)
  accepted = np.array([[True, True, False], [True, False, False]])
  own = cases.mixed()
  supervised = rollouts_lib.supervised_groups(others, accepted=accepted)
  groups = rollouts_lib.joined(own, supervised, axis=1)
  # Three of six supervised rows hold something, out of twelve rows; all else is as without them.
  assert metrics.mixed_metrics(groups, (END,)) == metrics.mixed_metrics(own, (END,)) | {
    "supervised/row_frac": 3 / 12,
    "supervised/accept_rate": 3 / 6,
  }
  alone = metrics.mixed_metrics(supervised, (END,))
  assert alone == {"supervised/row_frac": 3 / 6, "supervised/accept_rate": 3 / 6}


def test_gate_metrics():
  # Open for rows of 4, 1 and 2 of 17 tokens; the last of the three is wrong.
  assert metrics.gate_metrics(cases.mixed(), GATE) == {
    "gate/frac": 3 / 6, "gate/token_frac": pytest.approx(7 / 17), "gate/wrong_share": pytest.approx(1 / 3),
  }  # fmt: skip
  closed = np.zeros((P, G), bool)
  assert metrics.gate_metrics(cases.mixed(), closed) == {"gate/frac": 0.0, "gate/token_frac": 0.0}
  # Empty rows count among rollouts and not among tokens: rows of 4, 0 and 2 are all that there are.
  empty = rollouts_lib.supervised_groups(cases.mixed(), accepted=np.array([[True, False, False], [False, True, False]]))
  found = metrics.gate_metrics(empty, GATE)
  assert (found["gate/frac"], found["gate/token_frac"]) == (3 / 6, 1.0)
  nothing = rollouts_lib.supervised_groups(cases.mixed(), accepted=closed)
  assert metrics.gate_metrics(nothing, ~closed)["gate/token_frac"] == 0.0


def test_sample_records():
  groups = cases.mixed()
  rollouts_lib.inject(groups, [(0, 2, cases.candidate(BARE))])
  groups.supervised[0, 1] = True
  records = metrics.sample_records(groups, GATE, step=7, prompts=1, templates=BRIEF)
  assert len(records) == G and [record["rollout"] for record in records] == [0, 1, 2]
  assert json.loads(json.dumps(records)) == list(records)
  assert records[2] == {
    "kind": "rollout", "step": 7, "id": "set/q0", "modality": "MRI", "question_type": "Counting",
    "images": ["q0.png"], "prompt": problem(groups.examples[0], BRIEF), "question": "What is q0?",
    "options": ["one", "two"], "answer": "B", "rollout": 2, "completion": BARE,
    "rewards": {"accuracy": 1.0, "format": 0.0}, "reward": 1.0, "gate": True, "injected": True, "supervised": False,
    "hint": "look left",
  }  # fmt: skip
  marks = [(record["gate"], record["injected"], record["supervised"], record["hint"]) for record in records[:2]]
  assert marks == [(True, False, False, ""), (False, False, True, "")]


def outcome():
  """Two prompts asked for help: the second got nothing, the first one of three candidates after a bad hint."""
  refused, twin = cases.candidate("the hint says B"), cases.candidate(RIGHT)
  accepted = dataclasses.replace(cases.candidate(RIGHT), attempt=2)
  return exploration.Exploration(
    accepted={1: [accepted], 0: []},
    candidates={1: [refused, twin, accepted], 0: []},
    hints={1: ["no block", "<hint> look left </hint>"], 0: ["<hint></hint>"]},
  )


def test_hint_records():
  records = metrics.hint_records(outcome(), cases.mixed(), step=7, prompts=2)
  assert json.loads(json.dumps(records)) == list(records)
  first, last = {"step": 7, "id": "set/q1"}, {"step": 7, "id": "set/q0"}
  tried = first | {"kind": "candidate", "hint": "look left", "accurate": True, "well_formed": True}
  assert records == (
    first | {"kind": "hint", "text": "no block"},
    first | {"kind": "hint", "text": "<hint> look left </hint>"},
    tried | {"round": 1, "completion": "the hint says B", "leaks": True, "accepted": False},
    tried | {"round": 1, "completion": RIGHT, "leaks": False, "accepted": False},
    tried | {"round": 2, "completion": RIGHT, "leaks": False, "accepted": True},
    last | {"kind": "hint", "text": "<hint></hint>"},
  )
