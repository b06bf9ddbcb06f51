import dataclasses
import functools

import jax
import numpy as np
import pytest

from experiments import hints
from experiments.configs import kepo
from kepo_jax import exploration
from kepo_jax.data import processor
from kepo_jax.models.qwen3_vl import model
from kepo_jax.training import rollouts as rollouts_lib
from kepo_jax.training.batched_model import BatchedModel
from kepo_jax.training.programs import SamplingSettings
from kepo_jax.types import Rollouts
from tests.training import cases
from tests.training.runs import changed

GOOD, LEAKY = "<think> a</think><answer>B</answer>", "<think> as the hint says</think><answer>B</answer>"
ACCEPT = exploration.Acceptance()
MRI, CT, OCT = (dataclasses.replace(cases.example("q"), modality=modality) for modality in ("MRI", "CT", "OCT"))


def candidate(attempt, text=GOOD, *, accurate=True, well_formed=True, hint="look left"):
  drawn = {"tokens": np.zeros(2, np.int32), "logps": np.zeros(2, np.float32), "mask": np.ones(2, bool)}
  judged = {"accurate": accurate, "well_formed": well_formed}
  return exploration.Candidate(**drawn, **judged, text=text, hint=hint, attempt=attempt)


def outcome_of(candidates, written):
  """An outcome whose candidates [row] were judged round by round."""
  accepted = {row: [each for each in tried if ACCEPT([each])] for row, tried in enumerate(candidates)}
  return exploration.Exploration(accepted, dict(enumerate(candidates)), dict(enumerate(written)))


def effect(reliance=(), gain=(), letters=(), answers=0):
  return hints.HintEffect(*(np.array(values, np.float32) for values in (reliance, gain, letters)), answers)


@pytest.fixture
def worked():
  """Three cliffs, three rounds of two candidates: accepted at once, in the third round, and never."""
  wrong, bare = {"accurate": False}, {"well_formed": False}
  candidates = [
    [candidate(1), candidate(1, **wrong), candidate(2), candidate(2), candidate(3), candidate(3, LEAKY)],
    [candidate(1, **bare), candidate(1, **wrong), candidate(3), candidate(3, **wrong)],  # no hint in round 2
    [candidate(1, **wrong), candidate(1, LEAKY)],  # no hint after round 1
  ]
  block = "<hint> look left</hint>"
  return outcome_of(candidates, [[block] * 3, [block, "none", block], [block, "<hint></hint>", ""]])


def test_worked_example(worked):
  effects = {
    0: effect(reliance=[0.5] * 4, gain=[1.0, 3.0], letters=[3.0], answers=1),
    1: effect(reliance=[1.5] * 2),  # the teacher was never right, too
    2: effect(gain=[-1.0, 0.0, 0.5, 0.5], letters=[0.5, 0.0], answers=2),
  }
  found = hints.hint_record(worked, effects, [CT] * 3, [0, 1, 2], questions=10, rounds=3)
  assert (found["questions"], found["prompts"], found["hints"], found["candidates"]) == (10, 3, 9, 12)
  # Rounds 1 and 2: row 0 alone; round 3: row 1 as well; row 2 has a candidate that the leak filter refuses.
  np.testing.assert_allclose(found["accept_rate"], [1 / 3, 1 / 3, 2 / 3])
  assert found["accepted"] == 4 + 1
  # Positive are 5 of row 0 (the leaking one among them), 1 of row 1 and 1 of row 2; the bare one is accurate as well.
  assert (found["positive_rate"], found["accurate_rate"]) == (7 / 12, 8 / 12)
  assert (found["format_rate"], found["leak_rate"], found["quote_rate"]) == (11 / 12, 2 / 12, 0)
  assert found["parse_failure_rate"] == 3 / 9
  np.testing.assert_allclose(found["reliance"], (4 * 0.5 + 2 * 1.5) / 6)
  np.testing.assert_allclose(found["gain"], (1 + 3 - 1 + 0 + 0.5 + 0.5) / 6)
  np.testing.assert_allclose(found["letter_gain"], (3 + 0.5 + 0) / 3)
  assert found["gain_answers"] == 3


def test_candidates_of_a_prompt_are_drawn_together():
  # Half of the prompts always succeed: with prompts drawn, the deviation of the mean is that of 20 coins, not of 200.
  candidates = [[candidate(1, accurate=row % 2 == 0) for _ in range(10)] for row in range(20)]
  outcome = outcome_of(candidates, [["<hint>h</hint>"]] * 20)
  gains = {row: effect(gain=[float(row % 2)] * 5, answers=1) for row in range(20)}
  found = hints.hint_record(outcome, gains, [CT] * 20, range(20), questions=20, rounds=1)
  for name in ("positive_rate", "gain"):
    low, high = found[f"{name}_interval"]
    assert found[name] == 0.5
    half = 1.96 * 0.5 / 20**0.5  # 0.22; of 200 coins 0.07
    np.testing.assert_allclose([low, high], [0.5 - half, 0.5 + half], atol=0.06)
  assert found == hints.hint_record(outcome, gains, [CT] * 20, range(20), questions=20, rounds=1)


def test_modalities_and_all_of_them(worked):
  effects = {row: effect(gain=[float(row)], answers=1) for row in range(3)}
  found = hints.hint_records(worked, effects, [MRI, CT, MRI], [MRI, CT, MRI, OCT, MRI], rounds=3)
  assert [each["modality"] for each in found] == ["CT", "MRI", "OCT", "all"]
  assert [(each["prompts"], each["questions"]) for each in found] == [(1, 1), (2, 3), (0, 1), (3, 5)]
  assert [each["gain"] for each in found] == [1.0, 1.0, None, 1.0]
  # One prompt has no interval.
  assert found[0]["positive_rate_interval"] is None and len(found[1]["positive_rate_interval"]) == 2
  assert found[1]["accept_rate"] == [0.5, 0.5, 0.5] and found[0]["accept_rate"] == [0, 0, 1]
  nothing = found[2]
  rates = ("answer_rate", "leak_rate", "parse_failure_rate", "positive_rate", "accept_rate")
  for name in ("gain", "letter_gain", "reliance", *rates):
    assert nothing[name] is None, name
  assert nothing["candidates"] == nothing["hints"] == nothing["accepted"] == 0


@pytest.mark.parametrize(("pieces", "place"), [
  (["<think>", " B", "</think>", "<answer>", " B", "</answer>"], 4),
  (["<think> A B</think>", "<", "answer", ">B", "</answer>"], 3),
  (["<answer>", " ", "\n", "C", "</answer>", " B"], 3),
  (["<think> B</think>", "<answer>", "</answer>"], None),
  ([], None),
])  # fmt: skip
def test_the_token_of_the_letter(pieces, place):
  assert hints.letter_place(np.arange(len(pieces)), lambda tokens: "".join(pieces[n] for n in tokens)) == place


T = 5
END, PAD = 9, 0
KINDS = {"think": 21, "hint_request": 22, "hint_only": 23, "hint_and_answer": 24}
EXAMPLES = [cases.example(f"q{i}") for i in range(5)]
BLOCK = "<hint>{}</hint>"


def ids_of(example, kind, hint=""):
  """Prompt tokens: the kind, the question's number, and the letters of the hint."""
  return [KINDS[kind], 2 + int(example.id[-1]), *(10 + ord(letter) % 9 for letter in hint)]


def prompts_of(rows, config):
  """Prompts of text alone, their padding as wide as the longest."""
  size, length = len(rows), max(map(len, rows))
  made = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype), processor.prompt_shapes(size, length, 0, config.vision.patch_width)
  )
  made.image_slot[:] = -1
  for i, row in enumerate(rows):
    made.tokens[i, : len(row)], made.mask[i, : len(row)] = row, True
    made.positions[i] = np.arange(length)
    made.next_position[i] = len(row)
    made.row[i] = row[1]
  return made


class Processor:
  end_ids, pad_id = (END,), PAD

  def __init__(self, config, allowed):
    self.config, self.allowed = config, allowed

  def prompts(self, examples, kind, *, hints=None):
    hints = hints or [""] * len(examples)
    return prompts_of([ids_of(e, kind, hint) for e, hint in zip(examples, hints, strict=True)], self.config)


@pytest.fixture(scope="module")
def loaded(tiny_config, tiny_params, allowed, mesh_of):
  """`loaded(size)`: the tiny model in batches of a size, two of which fit no mesh."""
  mesh = mesh_of(data=2)
  # Logits far apart: with the weights as drawn every token is as likely as any other, and hints say nothing.
  params = jax.tree.map(lambda x: 3 * x, tiny_params)
  with jax.set_mesh(mesh):
    yield lambda size: BatchedModel(tiny_config, params, Processor(tiny_config, allowed), mesh, size=size, chunk=4)


@pytest.fixture(scope="module")
def brute_force(tiny_config, tiny_params, allowed):
  """log pi of each token of a completion, each prefix run alone as a prompt; log_softmax over the full logits."""
  params = jax.tree.map(lambda x: 3 * x, tiny_params)
  head = np.asarray(model.head_weight(tiny_config, params), np.float64)
  prefill = jax.jit(functools.partial(model.prefill, tiny_config))

  def logps(example, kind, tokens, *, hint=""):
    prompt = ids_of(example, kind, hint)
    rows = [[*prompt, *tokens[:t]] for t in range(T)] + [[1] * 20]  # one width, so that one program serves all
    logits = np.asarray(prefill(params, prompts_of(rows, tiny_config)).last_hidden, np.float64)[:T] @ head.T
    logits = np.where(allowed, logits, -np.inf)
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(T), tokens]

  return logps


def drawn(rng, *shape):
  """Completions of 1 to T tokens, and where they are real."""
  mask = np.arange(T) < rng.integers(1, T + 1, (*shape, 1))
  return np.where(mask, rng.integers(2, 20, mask.shape), PAD).astype(np.int32), mask


def answers_of(tokens, mask, right):
  scores = {name: np.asarray(right, np.float32) for name in ("accuracy", "format", "total")}
  blank = np.zeros(mask.shape[:2], bool)
  return rollouts_lib.Groups(
    EXAMPLES[: len(tokens)], tokens, mask, np.zeros(mask.shape), blank.astype(object), scores, blank, blank, blank
  )


def test_gain_equals_brute_force(loaded, brute_force, rng):
  tokens, mask = drawn(rng, 4, 3)
  right = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]
  written = [[BLOCK.format("ab"), "none", BLOCK.format("cde")], [BLOCK.format("a")] * 3, [BLOCK.format("b")], ["none"]]
  outcome = exploration.Exploration({}, {}, dict(enumerate(written)))
  found = hints.gains(
    loaded(3), answers_of(tokens, mask, right), outcome, kind="think", hint_prompt="hint_only", temperature=1.0
  )
  assert [list(numbers) for numbers, _ in found] == [[0, 2], [], [1], []]  # no answer is right, no hint can be read
  for row, given in ((0, ["ab", "cde"]), (2, ["b"])):
    for number, values in zip(*found[row], strict=True):
      score = functools.partial(brute_force, EXAMPLES[row], tokens=tokens[row, number])
      expected = np.mean([score("hint_only", hint=hint) for hint in given], axis=0) - score("think")
      kept = mask[row, number]
      assert np.abs(expected[kept]).max() > 0.01
      np.testing.assert_allclose(values[kept], expected[kept], rtol=1e-3, atol=1e-4)


def test_reliance_equals_brute_force(loaded, brute_force, rng):
  tokens, mask = drawn(rng, 4, 2)

  def pair(row, hint, attempt):
    """Two candidates of a round, both accurate: what is accepted is another question."""
    said = {"text": "", "hint": hint, "accurate": True, "well_formed": True, "attempt": attempt}
    return [exploration.Candidate(tokens=tokens[row, i], logps=mask[row, i], mask=mask[row, i], **said) for i in (0, 1)]

  first, second, refused, other = pair(0, "ab", 1), pair(1, "c", 3), pair(2, "d", 1), pair(3, "a", 2)
  tried = {0: [*first, *second], 1: refused, 2: other}
  accepted = {0: [first[0], *second], 1: [], 2: [other[1]]}
  outcome = exploration.Exploration(accepted, tried, {})
  found = hints.reliances(
    loaded(2), EXAMPLES[:3], outcome, kind="think", hint_prompt="hint_and_answer", temperature=1.0
  )
  for row, group in accepted.items():
    parts = [np.zeros(0)]
    for each in group:
      score = functools.partial(brute_force, EXAMPLES[row], tokens=each.tokens)
      parts.append((score("hint_and_answer", hint=each.hint) - score("think"))[each.mask])
    np.testing.assert_allclose(found[row], np.concatenate(parts), rtol=1e-3, atol=1e-4)
  assert len(found[1]) == 0 and np.abs(found[0]).max() > 0.01


def test_the_size_of_a_batch_changes_nothing(loaded, rng):
  tokens, _ = drawn(rng, 5, 2)
  settings = SamplingSettings(samples=2, max_new_tokens=T, temperature=1.0)
  shown = {"hints": list("abcab")}
  progress = []
  told = {"progress": lambda *counts: progress.append(counts)}
  one, other = ((m.rollouts(EXAMPLES, "hint_only", settings, jax.random.key(3), **shown, **told),
                 m.logps(EXAMPLES, "hint_only", tokens, **shown)) for m in (loaded(2), loaded(5)))  # fmt: skip
  assert progress == [(2, 5), (4, 5), (5, 5), (5, 5)]
  np.testing.assert_array_equal(one[0].tokens, other[0].tokens)
  assert len(np.unique(one[0].tokens.reshape(10, T), axis=0)) > 3
  np.testing.assert_allclose(one[1], other[1], rtol=1e-4, atol=1e-5)
  assert one[1].shape == (5, 2, T)
  # What the sampler drew has the log-probs that scoring gives it.
  scored = loaded(5).logps(EXAMPLES, "hint_only", one[0].tokens, **shown)
  np.testing.assert_allclose(scored[one[0].mask], one[0].logps[one[0].mask], rtol=1e-3, atol=1e-4)


class Speaker:
  """Stands for a model: says what `says(kind, example, hint, sample, round)` gives."""

  def __init__(self, says):
    self.says, self.asked, self.settings, self.processor = says, [], [], self
    self.texts: list[str] = []

  def rollouts(self, examples, kind, settings, key, *, hints=None, progress=None):
    self.asked.append((kind, [example.id for example in examples], hints, key))
    self.settings.append(settings)
    hints = hints or [""] * len(examples)
    tokens = np.zeros((len(examples), settings.samples, 2), np.int32)
    for p, (example, hint) in enumerate(zip(examples, hints, strict=True)):
      for g in range(settings.samples):
        self.texts.append(self.says(kind, example, hint, g, key))
        tokens[p, g] = len(self.texts) - 1
    mask = np.ones(tokens.shape, bool)
    return Rollouts(tokens=tokens, logps=np.zeros(tokens.shape, np.float32), mask=mask)

  def decode(self, tokens, mask):
    return [self.texts[row[0]] for row in tokens]

  def logps(self, examples, kind, tokens, *, temperature, hints=None, progress=None):
    del examples, kind, progress
    return np.full(tokens.shape, -1.0 if hints is None else -0.25, np.float32) / temperature


def settings():
  temperatures = {"sampling__temperature": 0.5, "exploration__hint_temperature": 0.6, "supervised__temperature": 0.7}
  return changed(kepo, batch__rollouts=2, exploration__rounds=2, **temperatures)


def test_from_questions_to_records():
  def said(kind, example, hint, g, key):
    solves = example.id == "set/q0" or (kind == "hint_and_answer" and g == 0)
    return cases.RIGHT if solves else cases.WRONG

  def told(kind, example, hint, g, key):
    return BLOCK.format("look left") if kind == "hint_request" else (cases.RIGHT, cases.WRONG)[g]

  student, teacher = Speaker(said), Speaker(told)
  examples = [EXAMPLES[0], EXAMPLES[1], dataclasses.replace(EXAMPLES[2], modality="CT")]
  ct, mri, everything = hints.measured(settings(), student, teacher, examples)
  assert [(each["modality"], each["questions"], each["prompts"]) for each in (ct, mri, everything)] == [
    ("CT", 1, 1), ("MRI", 2, 1), ("all", 3, 2),
  ]  # fmt: skip
  assert everything["candidates"] == 2 * 2 * 2 and everything["positive_rate"] == 0.5
  assert everything["accept_rate"] == [1.0, 1.0] and everything["gain_answers"] == 2  # the other one is wrong
  # Log-probabilities 0.75 apart at temperature 1, under that of the student.
  assert everything["reliance"] == everything["gain"] == everything["letter_gain"] == 0.75 / 0.5
  assert [each.temperature for each in teacher.settings] == [0.6, 0.6, 0.7]  # two rounds of hints, then answers
  assert {each.temperature for each in student.settings} == {0.5}
  # Each round has a hint of its own, and no success ends the rounds.
  rounds = [jax.random.key_data(key).tolist() for *_, key in teacher.asked[:2]]
  assert rounds[0] != rounds[1] and len(student.asked) == 3
  assert student.asked[2][:3] == ("hint_and_answer", ["set/q1", "set/q2"], ["look left"] * 2)
  # The teacher answers as the student is asked, and about cliffs alone.
  assert teacher.asked[-1][:3] == ("think", ["set/q1", "set/q2"], None)


def test_without_cliffs_nobody_is_asked():
  student, teacher = Speaker(lambda *_: cases.RIGHT), Speaker(lambda *_: "")
  *_, everything = hints.measured(settings(), student, teacher, EXAMPLES)
  assert everything["questions"] == 5 and everything["prompts"] == 0 and everything["gain"] is None
  assert teacher.asked == [] and len(student.asked) == 1
