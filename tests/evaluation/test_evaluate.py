import dataclasses
import hashlib

import numpy as np
import pytest

from kepo_jax import evaluation, multihost
from kepo_jax.evaluation import statistics
from tests.evaluation.scripted import Scripted, examples, says


def evaluated(model, asked, **options):
  outputs = []
  result = evaluation.evaluate(model, model, asked, **{"batch_size": 5} | options, on_output=outputs.append)
  return result, outputs


def test_each_question_counts_once():
  model, progress = Scripted(), []
  result, outputs = evaluated(model, examples(), progress=lambda done, total: progress.append((done, total)))
  # The last batch is filled: one shape, one program.
  assert model.batches == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 10, 10, 10]]
  assert progress == [(5, 12), (10, 12), (12, 12)]
  assert [output["id"] for output in outputs] == [f"q{n}" for n in range(12)]
  assert [output["completion"] for output in outputs] == [says(n) for n in range(12)]
  # Of every four: one right, one unparsed but right when read kindly, one wrong, one unparsed and cut off.
  assert result["overall"] == evaluation.share(3, 12)
  assert result["in_domain"] == result["modalities"]["MRI"] == evaluation.share(1, 4)
  assert list(result["modalities"]) == ["CT", "MRI", "OCT"]
  assert result["question_types"] == {"Lesion Grading": evaluation.share(3, 6)}
  assert result["out_of_domain"]["mean"] == 0.25 and result["out_of_domain"]["modalities"] == ["CT", "OCT"]
  assert result["lenient"]["overall"] == evaluation.share(6, 12) and result["lenient"]["out_of_domain"]["mean"] == 0.5
  assert (result["unparsed"], result["truncated"], result["format"]) == (0.5, 0.25, 0.5)
  assert result["completion_length"] == pytest.approx(np.mean([len(says(n)) + (n % 4 != 3) for n in range(12)]))
  assert evaluated(Scripted(), examples(), batch_size=64) == (result, outputs)


def test_an_answer_without_reasoning_is_well_formed_where_none_is_asked():
  result, outputs = evaluated(Scripted(kind="no_think"), examples(4), kind="no_think")
  # Of the four completions the third is an answer block alone; with reasoning asked for, the first two are well formed.
  assert [output["format"] for output in outputs] == [False, False, True, False]
  assert result["format"] == 0.25
  reasoned, _ = evaluated(Scripted(), examples(4))
  assert {name for name in result if result[name] != reasoned[name]} == {"format"}  # answers are read alike


def test_one_modality_is_in_or_out_of_domain():
  result, outputs = evaluated(Scripted(), examples(4))
  assert result["out_of_domain"] is None and result["in_domain"]["count"] == 4
  other = evaluation.summarised(outputs, train_modality="CT")
  assert other["in_domain"] is None and other["out_of_domain"]["mean"] == 0.25
  with pytest.raises(ValueError, match="no question to evaluate"):
    evaluated(Scripted(), [])


def test_sections_rates_and_chance():
  asked = [
    dataclasses.replace(example, dataset="ab"[n % 2], options=("x", "y", "z", "w")[: 2 + 2 * (n // 4 == 1)])
    for n, example in enumerate(examples())
  ]
  result, _ = evaluated(Scripted(), asked)
  assert result["datasets"] == {"a": evaluation.share(3, 6), "b": evaluation.share(0, 6)}
  assert result["rates"] == {name: {"unparsed": 0.5, "truncated": 0.25} for name in ("CT", "MRI", "OCT")}
  # Two options everywhere but in CT, which has four.
  chance = result["chance"]
  accuracies = {name: entry["accuracy"] for name, entry in chance["modalities"].items()}
  assert accuracies == {"CT": 0.25, "MRI": 0.5, "OCT": 0.5}
  assert chance["overall"]["accuracy"] == pytest.approx(5 / 12) and chance["out_of_domain"]["mean"] == 0.375
  assert chance["in_domain"] == chance["modalities"]["MRI"]


def test_several_completions_of_a_question():
  result, outputs = evaluated(Scripted(3), examples())
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
  # Unparsed are n + g = 1, 3 modulo 4, truncated 3: over all completions.
  assert result["unparsed"] == 0.5 and result["truncated"] == 0.25
  with pytest.raises(ValueError, match="question q11 has 2 completions and q0 3"):
    evaluation.summarised(outputs[:-1])


def test_what_is_answered_is_not_asked_again():
  whole, outputs = evaluated(Scripted(2), examples())
  model, progress = Scripted(2), []
  found, more = evaluated(
    model, examples(), earlier=outputs[:10], progress=lambda done, total: progress.append((done, total))
  )
  assert found == whole and more == outputs[10:]
  assert model.batches == [[5, 6, 7, 8, 9], [10, 11, 10, 10, 10]] and progress == [(5, 12), (10, 12), (12, 12)]


def test_images_are_recorded_and_counted(tmp_path):
  files = [tmp_path / f"{name}.png" for name in ("a", "copy of a", "b", "c")]
  for path in files:
    path.write_bytes(path.stem[-1].encode())
  asked = [dataclasses.replace(example, images=(str(files[n % 4]),)) for n, example in enumerate(examples())]
  result, outputs = evaluated(Scripted(), asked)
  digest = hashlib.sha256(b"a").hexdigest()[:16]
  assert [output["images"] for output in outputs[:2]] == [[digest], [digest]]  # by content
  counts = result["images"]
  assert counts["overall"] == counts["in_domain"] == counts["out_of_domain"] == 3
  assert counts["modalities"] == {"CT": 3, "MRI": 3, "OCT": 3} and counts["question_types"] == {"Lesion Grading": 2}
  # Wilson's intervals are over questions; the out-of-domain interval draws clusters inside each modality.
  assert result["overall"] == evaluation.share(3, 12)
  values = {name: np.array([1.0, 0.0, 0.0, 0.0]) for name in ("CT", "OCT")}
  clusters = {name: np.array([0, 0, 1, 2]) for name in values}
  expected = statistics.mean_over_groups(values, clusters)
  assert result["out_of_domain"] == expected != statistics.mean_over_groups(values)


def test_where_another_host_cannot_prepare_a_batch_all_read_the_one_before_and_end(monkeypatch):
  prepared = []

  def together(work):
    prepared.append(work())
    if len(prepared) == 2:
      raise OSError("another process of this run has failed; its log says why.")
    return prepared[-1]

  monkeypatch.setattr(multihost, "run_on_all", together)
  outputs, model = [], Scripted()
  with pytest.raises(OSError, match="another process"):
    evaluation.evaluate(model, model, examples(), batch_size=2, on_output=outputs.append)
  assert [output["id"] for output in outputs] == ["q0", "q1"]
