"""Hints without training: all rounds, and what hints do to likelihoods, against full logits one prefix at a time."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from experiments import hints as hints_lib
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
  """Tokens are words of themselves."""

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
  found = hints_lib.gains(
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
  found = hints_lib.reliances(
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
  ct, mri, everything = hints_lib.measured(settings(), student, teacher, examples)
  assert [(each["modality"], each["questions"], each["prompts"]) for each in (ct, mri, everything)] == [
    ("CT", 1, 1), ("MRI", 2, 1), ("all", 3, 2),
  ]  # fmt: skip
  assert everything["candidates"] == 2 * 2 * 2 and everything["positive_rate"] == 0.5
  assert everything["accept_rate"] == [1.0, 1.0] and everything["gain_answers"] == 2  # the other one is wrong
  # Log-probabilities 0.75 apart at temperature 1, under that of the student.
  assert everything["reliance"] == everything["gain"] == 0.75 / 0.5
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
  *_, everything = hints_lib.measured(settings(), student, teacher, EXAMPLES)
  assert everything["questions"] == 5 and everything["prompts"] == 0 and everything["gain"] is None
  assert teacher.asked == [] and len(student.asked) == 1
