import json
import os
import shutil

import numpy as np
import pytest

from kepo_jax import evaluation
from kepo_jax.data import prompts
from kepo_jax.evaluation import outputs as outputs_lib
from tests.evaluation.scripted import Scripted, examples

SAMPLES, BATCH = 2, 3
ASKED = examples(8)
IDENTITY = {"model_hash": "m", "count": 8, "samples": SAMPLES, "control": "none", "batch": BATCH}


def opened(folder, *, resume=False, identity=IDENTITY, **notes):
  order = [(example.id, number) for example in ASKED for number in range(SAMPLES)]
  return outputs_lib.Journal(folder, identity, notes, order=order, batch=BATCH * SAMPLES, resume=resume)


def run(folder, *, resume=False, progress=None, dies_after=None):
  """One evaluation into a folder; returns the questions that were asked."""
  model = Scripted(SAMPLES, dies_after=dies_after)
  with opened(folder, resume=resume) as record:
    result = evaluation.evaluate(
      model, model, ASKED, batch_size=BATCH, earlier=record.earlier, on_output=record.write, progress=progress
    )
  record.finish(result)
  return model.questions


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  folder = tmp_path_factory.mktemp("unbroken") / "out"
  run(folder)
  return folder


@pytest.fixture
def interrupted(unbroken, tmp_path):
  """`interrupted(outputs)`: a folder whose outputs are these bytes."""

  def make(outputs, name="cut"):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    shutil.copy(unbroken / "about.json", folder)
    (folder / "outputs.jsonl").write_bytes(outputs)
    return folder

  return make


def test_the_files_of_an_evaluation(unbroken):
  found = contents(unbroken)
  assert found.keys() == {"about.json", "outputs.jsonl", "evaluation.json"}
  records = outputs_lib.read_outputs(unbroken)
  assert records == outputs_lib.read_outputs(unbroken / "outputs.jsonl")
  assert [(r["id"], r["sample"]) for r in records] == [(f"q{n}", g) for n in range(8) for g in range(SAMPLES)]
  assert json.loads(found["about.json"]) == IDENTITY
  result = json.loads(found["evaluation.json"])
  assert result == IDENTITY | evaluation.summarised(records)
  assert outputs_lib.read_settings(unbroken / "outputs.jsonl") == result


def test_a_kill_at_any_byte_changes_nothing(unbroken, interrupted, rng):
  whole = contents(unbroken)["outputs.jsonl"]
  ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
  cuts = {0, 1, *(ends[n] for n in (0, 4, 5, 6, 11, 14, 15)), ends[5] - 1, *rng.integers(0, len(whole), 6).tolist()}
  for cut in sorted(cuts):
    folder, seen = interrupted(whole[:cut], str(cut)), []
    lines, torn = whole[:cut].count(b"\n"), cut - max([0, *(end for end in ends if end <= cut)])
    # Whole batches are kept, and batches are composed as before; the last one is filled with its first question.
    kept = 8 if lines == 16 else lines // (BATCH * SAMPLES) * BATCH
    said = opened(folder, resume=True).resumed
    assert (f"{kept * SAMPLES} of 16 completions" in said) == bool(kept or torn), cut
    assert (f"({torn} bytes)" in said) == bool(torn), cut
    asked = run(folder, resume=True, progress=lambda done, total, seen=seen: seen.append((done, total)))
    assert contents(folder) == contents(unbroken), cut
    assert asked == [*range(kept, 8), *([6] if kept < 8 else [])], cut
    if 0 < kept < 8:
      assert seen[0] == (kept, 8) and seen[-1] == (8, 8)


def test_a_finished_folder_is_refused_and_may_be_counted_again(unbroken, interrupted):
  with pytest.raises(ValueError, match="choose another --output"):
    run(unbroken)
  folder = interrupted(contents(unbroken)["outputs.jsonl"])
  with opened(folder, resume=True) as record:
    assert record.complete
  record.finish(evaluation.summarised(record.earlier))
  assert contents(folder) == contents(unbroken)


def test_what_cannot_be_resumed(unbroken, tmp_path):
  with pytest.raises(ValueError, match="--resume needs the --output"):
    opened("", resume=True)
  with pytest.raises(ValueError, match="start without --resume"):
    opened(tmp_path, resume=True)
  with pytest.raises(ValueError, match=r"\(control: 'none' -> 'blank'\); ask as it did"):
    opened(unbroken, resume=True, identity=IDENTITY | {"control": "blank"})
  assert opened(unbroken, resume=True, data="elsewhere").about == IDENTITY  # notes may differ
  (tmp_path / "about.json").write_bytes(b"{")
  with pytest.raises(ValueError, match=r"about\.json is no"):
    opened(tmp_path, resume=True)


def test_a_folder_in_a_bucket_is_continued_like_a_local_one(unbroken, bucket, monkeypatch):
  folder = bucket.root / "bucket"
  with pytest.raises(KeyboardInterrupt):
    run("gs://bucket/evaluation", dies_after=4)
  assert run("gs://bucket/evaluation", resume=True) == [6, 7, 6]  # two of three batches were answered
  assert contents(folder / "evaluation") == contents(unbroken)
  assert outputs_lib.read_outputs("gs://bucket/evaluation") == outputs_lib.read_outputs(unbroken)
  with pytest.raises(ValueError, match="there is no bucket gs://other"):
    opened("gs://other/evaluation")
  monkeypatch.setattr(outputs_lib, "_COPY_SECONDS", -1)
  with opened("gs://bucket/more") as record:
    record.write({"id": "q0", "sample": 0})
    assert (folder / "more" / outputs_lib.OUTPUTS).read_text() == '{"id": "q0", "sample": 0}\n'


def test_damaged_outputs_are_refused(unbroken, interrupted):
  lines = contents(unbroken)["outputs.jsonl"].splitlines()
  for number, damaged, message in (
    (1, [lines[1], lines[0], *lines[2:]], "answers another question"),
    (2, [lines[0], lines[1][:20], *lines[2:]], "is not JSON"),
    (1, [b"\xff\xfe", *lines[1:]], "is not JSON"),
    (2, [lines[0], b"[1, 2]"], "no JSON object"),
  ):
    with pytest.raises(ValueError, match=rf"outputs.jsonl:{number} .*{message}"):
      opened(interrupted(b"".join(line + b"\n" for line in damaged)), resume=True)


def test_every_field_of_a_record_is_checked(unbroken, tmp_path):
  record = outputs_lib.read_outputs(unbroken)[0]

  def reread(record):
    (tmp_path / "outputs.jsonl").write_text(json.dumps(record) + "\n")
    return outputs_lib.read_outputs(tmp_path)

  for name in record.keys() - {"images"}:
    for other in ({key: value for key, value in record.items() if key != name}, record | {name: {}}):
      with pytest.raises(ValueError, match=rf"outputs.jsonl:1 is no record of an evaluation: .*{name}"):
        reread(other)
  with pytest.raises(ValueError, match="no lists of texts"):
    reread(record | {"images": [1]})
  assert reread(record | {"more": 1}) == [record | {"more": 1}]


def test_what_is_not_finished_cannot_be_read(unbroken, interrupted, tmp_path):
  lines = contents(unbroken)["outputs.jsonl"].splitlines(keepends=True)
  for outputs, message in (
    (lines[:4], "holds 4 of 16 completions; --resume finishes"),
    ([*lines[:4], lines[4][:-3]], "cut short; --resume finishes"),
    ([*lines, lines[0]], "a completion twice"),
    ([*lines, lines[0].replace(b"q0", b"q9")], "holds 17 completions and .* 16"),
  ):
    with pytest.raises(ValueError, match=message):
      outputs_lib.read_outputs(interrupted(b"".join(outputs)))
  with pytest.raises(ValueError, match="nothing.jsonl does not exist; give the --output"):
    outputs_lib.read_outputs(tmp_path / "nothing.jsonl")
  assert outputs_lib.read_settings(tmp_path) == {}
  (tmp_path / "run" / "outputs").mkdir(parents=True)
  (tmp_path / "run" / "outputs" / "after.jsonl").write_bytes(b"".join(lines))
  assert outputs_lib.read_outputs(tmp_path / "run") == outputs_lib.read_outputs(unbroken)


def test_questions_are_told_apart():
  first = outputs_lib.questions_identity(ASKED, prompts.STANDARD, "evaluation")

  def changed(asked, templates=prompts.STANDARD, kind="evaluation"):
    other = outputs_lib.questions_identity(asked, templates, kind)
    return {name.removesuffix("_hash") for name in first if first[name] != other[name]}

  assert changed(examples(8)) == set()
  assert changed(ASKED[::-1]) == {"ids", "questions"}  # in another order; all read the same
  assert changed(examples(7)) == {"count", "ids", "questions", "images", "prompts"}
  assert changed(examples(8, options=("x", "z"))) == {"questions", "prompts"}
  assert changed(examples(8, answer="B")) == {"questions"}
  assert changed(ASKED, kind="no_think") == changed(ASKED, prompts.BRIEF) == {"prompts"}


def test_images_are_told_apart_by_content(tmp_path):
  def identity(*contents, folder="images"):
    (tmp_path / folder).mkdir(exist_ok=True)
    paths = [tmp_path / folder / f"{number}.png" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
      path.write_bytes(content)
      os.utime(path, ns=(0, int.from_bytes(content)))  # a change of content leaves size and name alone
    return identity_of(paths)

  def identity_of(paths):
    asked = examples(1, images=tuple(map(str, paths)))
    return outputs_lib.questions_identity(asked, prompts.STANDARD, "evaluation")

  first = identity(b"abc", b"def")
  for other in (identity(b"abc", b"deg"), identity(b"def", b"abc")):
    assert {name for name in first if first[name] != other[name]} == {"images_hash"}
  assert identity(b"abc", b"def", folder="moved") == first
  with pytest.raises(ValueError, match=r"image .*9.png: cannot be read \(No such file"):
    identity_of([tmp_path / "9.png"])


def test_models_are_told_apart(tmp_path):
  def written(name, content):
    (tmp_path / name).write_bytes(content)
    return outputs_lib.model_hash(tmp_path)

  large = bytearray(np.random.default_rng(0).bytes(6 << 20))  # more than the blocks that are read
  first = written("model.safetensors", bytes(large))
  assert first == written("record.json", b"{}") == written("README.md", b"notes")
  large[::4096] = bytes(len(large[::4096]))  # what training changes is everywhere
  others = [written("model.safetensors", weights) for weights in (bytes(large), b"abc", b"abd")]
  assert len({first, *others, written("generation_config.json", b"{}")}) == 5
