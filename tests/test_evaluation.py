"""Intervals against closed forms, counting against hand-made completions, paired comparison against a slow one."""

import dataclasses
import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax import evaluation
from kepo_jax.evaluation import figures, statistics
from kepo_jax.types import Example, Rollouts

END, PAD = 1, 0
COMPLETIONS = {  # what the stub model says, by number of the question
  0: "<think>a</think><answer>A</answer>",
  1: "<think>a</think><answer>A.</answer>",  # unparsed, right to a forgiving reader
  2: "<answer>B</answer>",
  3: "no idea",
}


class StubProcessor:
  """Tokens are code points; the prompt of a question is its number."""

  end_ids = (END,)

  def __init__(self, kind="evaluation"):
    self.sizes, self.kind = [], kind

  def prompts(self, examples, kind, hints=None):
    assert kind == self.kind
    self.sizes.append(len(examples))
    return [int(example.id[1:]) for example in examples]

  def decode(self, tokens, mask):
    return ["".join(map(chr, row[keep])).replace(chr(END), "") for row, keep in zip(tokens, mask, strict=True)]


def says(number):
  return COMPLETIONS[number % 4]


def sample(prompts, length=40):
  """One completion per prompt; those of question 3 (and 7, ...) have no end token."""
  tokens = np.full((len(prompts), 1, length), PAD)
  mask = np.zeros(tokens.shape, bool)
  for p, number in enumerate(prompts):
    ids = [ord(letter) for letter in says(number)] + [END] * (number % 4 != 3)
    tokens[p, 0, : len(ids)] = ids
    mask[p, 0, : len(ids)] = True
  return jax.tree.map(jnp.asarray, Rollouts(tokens=tokens, logps=np.zeros(tokens.shape, np.float32), mask=mask))


def examples(count=12):
  return [
    Example(
      id=f"q{n}",
      question="?",
      options=("x", "y"),
      answer="A",
      images=(),
      modality=("MRI", "CT", "OCT")[n // 4 % 3],
      question_type=("Lesion Grading", "")[n % 2],
      dataset="d",
    )
    for n in range(count)
  ]


def test_wilson_interval():
  # 8 of 10: center (0.8 + 1.92/10) / (1 + 3.84/10), Newcombe 1998 style; value from the closed form by hand.
  low, high = evaluation.wilson_interval(8, 10)
  assert (low, high) == (pytest.approx(0.4901625), pytest.approx(0.9433178))
  assert evaluation.wilson_interval(0, 0) == (0, 1)
  assert evaluation.wilson_interval(0, 20)[0] == 0 and evaluation.wilson_interval(20, 20)[1] == 1
  for count in (1, 7, 300):
    for correct in range(count + 1):
      low, high = evaluation.wilson_interval(correct, count)
      mirrored = evaluation.wilson_interval(count - correct, count)
      assert 0 <= low <= correct / count <= high <= 1
      assert (low, high) == (pytest.approx(1 - mirrored[1]), pytest.approx(1 - mirrored[0]))


def test_wilson_interval_covers():
  # Exact coverage at n = 50: the binomial mass of the outcomes whose interval holds the truth.
  for truth in (0.25, 0.5, 0.8):
    mass = sum(
      math.comb(50, k) * truth**k * (1 - truth) ** (50 - k)
      for k in range(51)
      if evaluation.wilson_interval(k, 50)[0] <= truth <= evaluation.wilson_interval(k, 50)[1]
    )
    assert 0.93 < mass < 0.98


def test_mean_over_modalities_matches_the_normal_interval():
  entries = {"CT": evaluation.share(150, 300), "OCT": evaluation.share(240, 300)}
  found = evaluation.mean_over_modalities(entries)
  error = 1.96 * math.sqrt(0.5 * 0.5 / 300 + 0.8 * 0.2 / 300) / 2
  assert found["mean"] == pytest.approx(0.65) and found["count"] == 600 and found["modalities"] == ["CT", "OCT"]
  assert found["low"] == pytest.approx(0.65 - error, abs=0.003)
  assert found["high"] == pytest.approx(0.65 + error, abs=0.003)
  assert found == evaluation.mean_over_modalities(entries)  # seeded
  assert evaluation.mean_over_modalities({}) is None


def test_evaluate_counts_each_question_once():
  processor, outputs, progress = StubProcessor(), [], []
  result = evaluation.evaluate(
    sample,
    processor,
    examples(),
    batch_size=5,
    progress=lambda done, total: progress.append((done, total)),
    on_output=outputs.append,
  )
  assert processor.sizes == [5, 5, 5]  # the last batch is filled: one shape, one program
  assert progress == [(5, 12), (10, 12), (12, 12)]
  assert [output["id"] for output in outputs] == [f"q{n}" for n in range(12)]
  assert [output["completion"] for output in outputs] == [says(n) for n in range(12)]
  # Of every four: one right, one unparsed but right when read kindly, one wrong, one unparsed and cut off.
  assert result["overall"] == evaluation.share(3, 12)
  assert result["in_domain"] == result["modalities"]["MRI"] == evaluation.share(1, 4)
  assert list(result["modalities"]) == ["CT", "MRI", "OCT"]
  assert result["question_types"] == {"Lesion Grading": evaluation.share(3, 6)}
  assert result["out_of_domain"]["mean"] == 0.25 and result["out_of_domain"]["modalities"] == ["CT", "OCT"]
  assert result["lenient"]["overall"] == evaluation.share(6, 12)
  assert result["lenient"]["out_of_domain"]["mean"] == 0.5
  assert (result["unparsed"], result["truncated"], result["format"]) == (0.5, 0.25, 0.5)
  lengths = [len(says(n)) + (n % 4 != 3) for n in range(12)]
  assert result["completion_length"] == pytest.approx(np.mean(lengths))
  assert json.loads(json.dumps([result, outputs])) == [result, outputs]


def test_an_answer_without_reasoning_is_well_formed_where_none_is_asked():
  outputs = []
  asked = {"batch_size": 4, "kind": "no_think", "on_output": outputs.append}
  result = evaluation.evaluate(sample, StubProcessor("no_think"), examples(4), **asked)
  # Of the four completions the third is an answer block alone; with reasoning asked for, the first two are well formed.
  assert [output["format"] for output in outputs] == [False, False, True, False]
  assert result["format"] == 0.25
  reasoned = evaluation.evaluate(sample, StubProcessor(), examples(4), batch_size=4)
  assert {name for name in result if result[name] != reasoned[name]} == {"format"}  # answers are read alike


def test_the_result_does_not_depend_on_the_batch():
  results = [evaluation.evaluate(sample, StubProcessor(), examples(), batch_size=size) for size in (1, 5, 12, 64)]
  assert all(result == results[0] for result in results)


def test_one_modality_has_no_out_of_domain_figure():
  result = evaluation.evaluate(sample, StubProcessor(), examples(4), batch_size=4)
  assert result["out_of_domain"] is None and result["in_domain"]["count"] == 4
  other = evaluation.evaluate(sample, StubProcessor(), examples(4), batch_size=4, train_modality="CT")
  assert other["in_domain"] is None and other["out_of_domain"]["mean"] == 0.25


def test_nothing_to_evaluate():
  with pytest.raises(ValueError, match="no question to evaluate"):
    evaluation.evaluate(sample, StubProcessor(), [], batch_size=4)


def test_mcnemar():
  # 1 lost, 5 gained: 2 * (C(6,0) + C(6,1)) / 64 = 14/64.
  assert evaluation.mcnemar(5, 1) == evaluation.mcnemar(1, 5) == 14 / 64
  assert evaluation.mcnemar(0, 0) == evaluation.mcnemar(3, 3) == 1
  assert evaluation.mcnemar(0, 10) == 2 / 1024
  assert 0 < evaluation.mcnemar(900, 1500) < 1e-30


def outputs_of(correct):
  return [
    {"id": f"q{n}", "modality": ("MRI", "CT", "OCT")[n % 3], "correct": bool(value)} for n, value in enumerate(correct)
  ]


def test_paired_comparison(rng):
  first = rng.random(600) < 0.5
  second = np.where(rng.random(600) < 0.2, rng.random(600) < 0.9, first)
  found = evaluation.compared(outputs_of(first), outputs_of(second)[::-1])
  entry = found["modalities"]["CT"]
  a, b = first[1::3].astype(float), second[1::3].astype(float)
  assert entry["count"] == 200 and entry["difference"] == pytest.approx((b - a).mean())
  assert (entry["first"], entry["second"]) == (pytest.approx(a.mean()), pytest.approx(b.mean()))
  assert (entry["gained"], entry["lost"]) == (((b - a) == 1).sum(), ((b - a) == -1).sum())
  # The bootstrap done slowly: indices of questions drawn with replacement.
  slow = [(b - a)[rng.integers(0, 200, 200)].mean() for _ in range(4000)]
  np.testing.assert_allclose([entry["low"], entry["high"]], np.percentile(slow, [2.5, 97.5]), atol=0.012)
  others = [found["modalities"][name]["difference"] for name in ("CT", "OCT")]
  assert found["out_of_domain"]["difference"] == pytest.approx(np.mean(others))
  assert found["in_domain"] == found["modalities"]["MRI"]
  assert found["overall"]["difference"] == pytest.approx(second.mean() - first.mean())
  assert json.loads(json.dumps(found)) == found


def test_equal_evaluations_do_not_differ():
  found = evaluation.compared(outputs_of([1, 0, 1]), outputs_of([1, 0, 1]))["overall"]
  assert (found["difference"], found["low"], found["high"], found["p_value"]) == (0, 0, 0, 1)


def test_other_questions_cannot_be_compared():
  with pytest.raises(ValueError, match=r"different questions: 1 only in the second \(q2\)"):
    evaluation.compared(outputs_of([1, 0]), outputs_of([1, 0, 1]))


def test_sections_rates_and_chance():
  asked = [
    dataclasses.replace(example, dataset="ab"[n % 2], options=("x", "y", "z", "w")[: 2 + 2 * (n // 4 == 1)])
    for n, example in enumerate(examples())
  ]
  result = evaluation.evaluate(sample, StubProcessor(), asked, batch_size=4)
  assert result["datasets"] == {"a": evaluation.share(3, 6), "b": evaluation.share(0, 6)}
  assert result["lenient"]["datasets"] == {"a": evaluation.share(3, 6), "b": evaluation.share(3, 6)}
  assert result["rates"] == {name: {"unparsed": 0.5, "truncated": 0.25} for name in ("CT", "MRI", "OCT")}
  # Two options everywhere but in CT, which has four.
  chance = result["chance"]
  assert {name: entry["accuracy"] for name, entry in chance["modalities"].items()} == {
    "CT": 0.25,
    "MRI": 0.5,
    "OCT": 0.5,
  }
  assert chance["overall"]["accuracy"] == pytest.approx(5 / 12) and chance["out_of_domain"]["mean"] == 0.375
  assert chance["in_domain"] == chance["modalities"]["MRI"]
  # Four fair throws: 0.5 -+ 1.96 * sqrt(0.25 / 4).
  bounds = (chance["in_domain"]["low"], chance["in_domain"]["high"])
  assert bounds == (pytest.approx(0.01, abs=1e-4), pytest.approx(0.99, abs=1e-4))


def several(samples):
  """A model whose completion g of question n is that of question n + g."""

  def drawn(prompts):
    parts = [sample([number + g for number in prompts]) for g in range(samples)]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=1), *parts)

  return drawn


def test_several_completions_of_a_question():
  outputs = []
  asked = {"batch_size": 5, "on_output": outputs.append}
  result = evaluation.evaluate(several(3), StubProcessor(), examples(), **asked)
  assert [(output["id"], output["sample"]) for output in outputs] == [(f"q{n}", g) for n in range(12) for g in range(3)]
  assert [output["completion"] for output in outputs] == [says(n + g) for n in range(12) for g in range(3)]
  # Of n, n + 1, n + 2 one is right (divisible by four) for n = 0, 2, 3 modulo 4: three of four questions, one of three.
  assert result["samples"] == 3 and result["overall"]["count"] == 12
  assert result["overall"]["accuracy"] == pytest.approx(3 / 4 / 3)
  assert result["overall"]["low"] < 0.25 < result["overall"]["high"]
  # k = 2: 1 - C(2, 2) / C(3, 2) = 2/3 for those. Three is no power of two.
  passed = result["pass_at_k"]
  assert list(passed) == ["1", "2"]
  assert passed["1"]["overall"]["accuracy"] == pytest.approx(result["overall"]["accuracy"])
  assert passed["2"]["modalities"]["CT"]["accuracy"] == pytest.approx(3 / 4 * 2 / 3)
  assert passed["2"]["out_of_domain"]["mean"] == pytest.approx(0.5)
  assert passed["1"]["overall"]["low"] < 0.25 < passed["1"]["overall"]["high"]
  # Unparsed are n + g = 1, 3 modulo 4, truncated 3: over all completions.
  assert result["unparsed"] == 0.5 and result["truncated"] == 0.25
  assert json.loads(json.dumps(result)) == result


def test_intervals_of_several_completions_are_over_questions():
  # Eight equal answers to each of 60 questions are no more than 60 answers.
  records = [
    {"id": f"q{n}", "modality": "CT", "question_type": "", "dataset": "", "options": ["x", "y"], "parsed": None,
     "truncated": False, "format": False, "tokens": 1, "correct": n < 30, "lenient_correct": n < 30}
    for n in range(60)
  ]  # fmt: skip
  once, often = evaluation.summarised(records), evaluation.summarised([r for r in records for _ in range(8)])
  width = [result["overall"]["high"] - result["overall"]["low"] for result in (once, often)]
  assert width[0] == pytest.approx(width[1], rel=0.1)
  assert often["pass_at_k"]["8"]["overall"]["accuracy"] == 0.5


def test_questions_that_share_an_image_form_a_cluster():
  shown = [["a"], ["b"], ["a", "c"], [], ["c"], ["b"], []]
  records = [[{"id": f"q{n}", "images": images}] for n, images in enumerate(shown)]
  assert figures.clusters(records).tolist() == [0, 1, 0, 2, 0, 1, 3]  # the fifth by way of the third
  assert figures.distinct_images(records) == 3
  assert figures.clusters([[{"id": "q0"}], [{"id": "q1"}]]).tolist() == [0, 1]  # records that do not tell


def test_images_are_recorded_and_counted(tmp_path):
  for name in "abc":
    (tmp_path / f"{name}.png").write_bytes(name[0].encode())
  (tmp_path / "copy.png").write_bytes(b"a")
  files = ["a.png", "copy.png", "b.png", "c.png"] * 3
  asked = [
    dataclasses.replace(example, images=(str(tmp_path / name),))
    for example, name in zip(examples(), files, strict=True)
  ]
  outputs = []
  result = evaluation.evaluate(sample, StubProcessor(), asked, batch_size=5, on_output=outputs.append)
  digest = hashlib.sha256(b"a").hexdigest()[:16]
  assert [output["images"] for output in outputs[:2]] == [[digest], [digest]]  # by content
  counts = result["images"]
  assert (counts["overall"], counts["in_domain"], counts["out_of_domain"]) == (3, 3, 3)
  assert counts["modalities"] == {"CT": 3, "MRI": 3, "OCT": 3} and counts["datasets"] == {"d": 3}
  assert counts["question_types"] == {"Lesion Grading": 2}
  # Wilson's intervals are over questions; the out-of-domain interval draws clusters inside each modality.
  assert result["overall"] == evaluation.share(3, 12)
  values = {name: np.array([1.0, 0.0, 0.0, 0.0]) for name in ("CT", "OCT")}
  clusters = {name: np.array([0, 0, 1, 2]) for name in values}
  expected = statistics.mean_over_groups(values, clusters)
  assert result["out_of_domain"] == expected != statistics.mean_over_groups(values)
  assert (evaluation.summarised(outputs)["lenient"]["out_of_domain"]["high"]) < 1


def test_the_number_of_completions_must_be_equal():
  outputs = []
  evaluation.evaluate(several(2), StubProcessor(), examples(4), batch_size=4, on_output=outputs.append)
  with pytest.raises(ValueError, match="question q3 has 1 completions and q0 2"):
    evaluation.summarised(outputs[:-1])


def test_what_is_answered_is_not_asked_again():
  outputs, progress = [], []
  whole = evaluation.evaluate(several(2), StubProcessor(), examples(), batch_size=5, on_output=outputs.append)
  processor, more = StubProcessor(), []
  found = evaluation.evaluate(
    several(2),
    processor,
    examples(),
    batch_size=5,
    earlier=outputs[:10],
    on_output=more.append,
    progress=lambda done, total: progress.append((done, total)),
  )
  assert found == whole and more == outputs[10:]
  assert processor.sizes == [5, 5] and progress == [(5, 12), (10, 12), (12, 12)]
