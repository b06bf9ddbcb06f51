"""An interrupted evaluation continued from its folder equals an unbroken one; what does not fit is refused."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kepo_jax import evaluation
from kepo_jax.data import prompts
from kepo_jax.evaluation import journal
from kepo_jax.types import Example, Rollouts
from tests import fake_bucket

END, SAMPLES, BATCH = 1, 2, 3
IDENTITY = {"model_hash": "m", "count": 8, "samples": SAMPLES, "control": "none", "batch": BATCH}


def examples(count=8, **changes):
  fields = {"question": "?", "options": ("x", "y"), "answer": "A", "images": (), "dataset": "d"} | changes
  return [Example(id=f"q{n}", modality=("MRI", "CT")[n % 2], **fields) for n in range(count)]


class Asked:
  """A processor and a model in one: tokens are code points, an answer depends on question and sample alone."""

  end_ids = (END,)

  def __init__(self, dies_after=None):
    self.questions, self.dies_after = [], dies_after

  def prompts(self, shown, kind, hints=None):
    return [int(example.id[1:]) for example in shown]

  def decode(self, tokens, mask):
    return ["".join(map(chr, row[keep])).replace(chr(END), "") for row, keep in zip(tokens, mask, strict=True)]

  def __call__(self, numbers):
    if self.dies_after is not None and len(self.questions) >= self.dies_after:
      raise KeyboardInterrupt
    self.questions += numbers
    tokens = np.zeros((len(numbers), SAMPLES, 40), np.int32)
    for p, number in enumerate(numbers):
      for g in range(SAMPLES):
        text = f"<answer>{'AB'[(number * number + g) % 3 % 2]}</answer> é{number}"
        tokens[p, g, : len(text) + 1] = [*map(ord, text), END]
    return Rollouts(tokens=tokens, logps=np.zeros(tokens.shape, np.float32), mask=tokens > 0)


def opened(folder, *, asked=None, resume=False, identity=IDENTITY, **notes):
  asked = asked or examples()
  order = [(example.id, number) for example in asked for number in range(SAMPLES)]
  return journal.Journal(folder, identity, notes, order=order, batch=BATCH * SAMPLES, resume=resume)


def run(folder, *, model=None, resume=False, progress=None):
  """One evaluation into a folder; returns the model, which knows what it was asked."""
  model = model or Asked()
  with opened(folder, resume=resume) as record:
    result = evaluation.evaluate(
      model, model, examples(), batch_size=BATCH, earlier=record.earlier, on_output=record.write, progress=progress
    )
  record.finish(result)
  return model


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  folder = tmp_path_factory.mktemp("unbroken") / "out"
  run(folder)
  return folder


def test_the_files_of_an_evaluation(unbroken):
  found = contents(unbroken)
  assert found.keys() == {"about.json", "outputs.jsonl", "evaluation.json"}
  records = journal.read_outputs(unbroken)
  assert records == journal.read_outputs(unbroken / "outputs.jsonl")
  assert [(r["id"], r["sample"]) for r in records] == [(f"q{n}", g) for n in range(8) for g in range(SAMPLES)]
  assert json.loads(found["about.json"]) == IDENTITY
  result = json.loads(found["evaluation.json"])
  assert result == IDENTITY | evaluation.summarised(records)
  assert journal.read_settings(unbroken / "outputs.jsonl") == result


def test_a_kill_at_any_byte_changes_nothing(unbroken, tmp_path, rng):
  whole = contents(unbroken)["outputs.jsonl"]
  ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
  cuts = {0, 1, *ends, *(end - 1 for end in ends), *rng.integers(0, len(whole), 20).tolist()}
  for cut in sorted(cuts):
    folder = tmp_path / str(cut)
    folder.mkdir()
    (folder / "about.json").write_bytes(contents(unbroken)["about.json"])
    (folder / "outputs.jsonl").write_bytes(whole[:cut])
    seen = []
    model = run(folder, resume=True, progress=lambda done, total, seen=seen: seen.append((done, total)))
    assert contents(folder) == contents(unbroken), cut
    # Whole batches are kept, and batches are composed as before; the last one is filled with its first question.
    lines = sum(end <= cut for end in ends)
    kept = 8 if lines == 16 else lines // (BATCH * SAMPLES) * BATCH
    assert model.questions == [*range(kept, 8), *([6] if kept < 8 else [])]
    if 0 < kept < 8:
      assert seen[0] == (kept, 8) and seen[-1] == (8, 8)


def test_a_crash_in_the_middle_leaves_whole_batches(unbroken, tmp_path):
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, model=Asked(dies_after=6))
  left = contents(tmp_path)
  assert left.keys() == {"about.json", "outputs.jsonl"} and left["outputs.jsonl"].count(b"\n") == 6 * SAMPLES
  with pytest.raises(ValueError, match="holds an unfinished evaluation; --resume continues it"):
    run(tmp_path)
  assert contents(tmp_path) == left
  assert run(tmp_path, resume=True).questions == [6, 7, 6]
  assert contents(tmp_path) == contents(unbroken)


def test_what_a_kill_left_is_said(unbroken, tmp_path):
  found = contents(unbroken)
  ends = [i + 1 for i, byte in enumerate(found["outputs.jsonl"]) if byte == ord("\n")]
  (tmp_path / "about.json").write_bytes(found["about.json"])
  assert opened(tmp_path, resume=True).resumed == ""  # killed before the first answer
  for cut, text in (
    (ends[6], "resumed: 6 of 16 completions are there"),
    (ends[6] + 9, "resumed: 6 of 16 completions are there; the last line was cut short (9 bytes) and is asked again"),
    (4, "resumed: 0 of 16 completions are there; the last line was cut short (4 bytes) and is asked again"),
    (ends[-1], "resumed: 16 of 16 completions are there"),
  ):
    (tmp_path / "outputs.jsonl").write_bytes(found["outputs.jsonl"][:cut])
    assert opened(tmp_path, resume=True).resumed == text
  # What a power cut may leave where a line was to stand.
  (tmp_path / "outputs.jsonl").write_bytes(found["outputs.jsonl"][: ends[6]] + bytes(512))
  assert "(512 bytes)" in opened(tmp_path, resume=True).resumed
  run(tmp_path, resume=True)
  assert contents(tmp_path) == found


def test_a_finished_folder_is_refused_and_may_be_counted_again(unbroken, tmp_path):
  with pytest.raises(ValueError, match="holds an evaluation already; choose another --output"):
    run(unbroken)
  for name, content in contents(unbroken).items():
    (tmp_path / name).write_bytes(content)
  (tmp_path / "evaluation.json").unlink()
  with opened(tmp_path, resume=True) as record:
    assert record.complete
  record.finish(evaluation.summarised(record.earlier))
  assert contents(tmp_path) == contents(unbroken)


def test_what_cannot_be_resumed(unbroken, tmp_path):
  with pytest.raises(ValueError, match="--resume needs the --output"):
    opened("", resume=True)
  with pytest.raises(ValueError, match=r"holds no evaluation to resume \(no about.json\); start without"):
    opened(tmp_path, resume=True)
  with pytest.raises(ValueError, match=r"something else \(control: 'none' -> 'blank'\); ask as it did"):
    opened(unbroken, resume=True, identity=IDENTITY | {"control": "blank"})


@pytest.mark.parametrize("dies_after", [4, None])
def test_a_folder_in_a_bucket_is_continued_like_a_local_one(unbroken, tmp_path, dies_after):
  (tmp_path / "cloud" / "bucket").mkdir(parents=True)
  with fake_bucket.served(tmp_path / "cloud"):
    if dies_after:
      with pytest.raises(KeyboardInterrupt):
        run("gs://bucket/evaluation", model=Asked(dies_after=dies_after))
      with pytest.raises(ValueError, match="gs://bucket/evaluation holds an unfinished evaluation"):
        opened("gs://bucket/evaluation")
    model = run("gs://bucket/evaluation", resume=bool(dies_after))
    assert len(model.questions) == (3 if dies_after else 9)  # two of three batches were answered
    for name in (journal.ABOUT, journal.OUTPUTS, journal.RESULT):
      assert (tmp_path / "cloud" / "bucket" / "evaluation" / name).read_bytes() == (unbroken / name).read_bytes()
    assert journal.read_outputs("gs://bucket/evaluation") == journal.read_outputs(unbroken)
    with pytest.raises(ValueError, match="holds an evaluation already"):
      opened("gs://bucket/evaluation")
    with pytest.raises(ValueError, match="there is no bucket gs://other"):
      opened("gs://other/evaluation")


def test_answers_reach_a_bucket_before_the_end(tmp_path, monkeypatch):
  monkeypatch.setattr(journal, "_COPY_SECONDS", -1)
  (tmp_path / "bucket").mkdir()
  with fake_bucket.served(tmp_path), opened("gs://bucket/evaluation") as record:
    record.write({"id": "q0", "sample": 0})
    assert (tmp_path / "bucket" / "evaluation" / journal.OUTPUTS).read_text() == '{"id": "q0", "sample": 0}\n'


def test_notes_may_differ(unbroken):
  assert opened(unbroken, resume=True, data="elsewhere").about == IDENTITY


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda lines: [lines[1], lines[0], *lines[2:]], r"outputs.jsonl:1 answers another question"),
    (lambda lines: [*lines, lines[-1]], r"outputs.jsonl:17 answers another question"),
    (lambda lines: [lines[0], lines[1][:20], *lines[2:]], r"outputs.jsonl:2 is not JSON"),
    (lambda lines: [lines[0], b"[1, 2]"], r"outputs.jsonl:2 is no record of an evaluation: it is no JSON object"),
    (lambda lines: [b"null"], r"outputs.jsonl:1 is no record"),
    (lambda lines: [b"3", *lines[1:]], r"outputs.jsonl:1 is no record"),
    (lambda lines: [b'{"id": "q0", "sample": 0}'], r"outputs.jsonl:1 is no record of an evaluation: it has no dataset"),
    (lambda lines: [lines[0].replace(b'"sample": 0', b'"sample": "0"')], r"outputs.jsonl:1 .*: sample is '0'"),
    (lambda lines: [bytes(range(9)), *lines[1:]], r"outputs.jsonl:1 is not JSON"),
    (lambda lines: [b"\xff\xfe", *lines[1:]], r"outputs.jsonl:1 is not JSON"),
    (lambda lines: [b"", *lines], r"outputs.jsonl:1 is not JSON"),
  ],
)
def test_damaged_outputs_are_refused(unbroken, tmp_path, damage, message):
  found = contents(unbroken)
  (tmp_path / "about.json").write_bytes(found["about.json"])
  (tmp_path / "outputs.jsonl").write_bytes(
    b"".join(line + b"\n" for line in damage(found["outputs.jsonl"].splitlines()))
  )
  with pytest.raises(ValueError, match=message):
    opened(tmp_path, resume=True)


@given(garbage=st.binary(max_size=60), line=st.integers(0, 16))
@settings(max_examples=300, deadline=None)
def test_no_garbage_ends_otherwise_than_in_words(unbroken, tmp_path_factory, garbage, line):
  folder = tmp_path_factory.mktemp("garbage")
  found = contents(unbroken)
  (folder / "about.json").write_bytes(found["about.json"])
  lines = found["outputs.jsonl"].splitlines(keepends=True)
  (folder / "outputs.jsonl").write_bytes(b"".join([*lines[:line], garbage, *lines[line:]]))
  try:
    kept = opened(folder, resume=True).earlier
    assert kept == journal.read_outputs(unbroken)[: len(kept)]  # what is kept is what was written
  except ValueError as error:
    assert "outputs.jsonl" in str(error)
  try:
    assert journal.read_outputs(folder) == journal.read_outputs(unbroken)
  except ValueError as error:
    assert "outputs.jsonl" in str(error)


@pytest.mark.parametrize("content", [b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_about_is_named(unbroken, tmp_path, content):
  (tmp_path / "about.json").write_bytes(content)
  with pytest.raises(ValueError, match="about.json is no"):
    opened(tmp_path, resume=True)


def test_every_field_of_a_record_is_checked(unbroken, tmp_path):
  record = journal.read_outputs(unbroken)[0]
  for name in record.keys() - {"images"}:
    for other in ({key: value for key, value in record.items() if key != name}, record | {name: {}}):
      (tmp_path / "outputs.jsonl").write_text(json.dumps(other) + "\n")
      with pytest.raises(ValueError, match=rf"outputs.jsonl:1 is no record of an evaluation: .*{name}"):
        journal.read_outputs(tmp_path)
  (tmp_path / "outputs.jsonl").write_text(json.dumps(record | {"more": 1}) + "\n")
  assert journal.read_outputs(tmp_path) == [record | {"more": 1}]


def test_a_torn_line_cannot_be_compared(unbroken, tmp_path):
  (tmp_path / "outputs.jsonl").write_bytes(contents(unbroken)["outputs.jsonl"][:-3])
  with pytest.raises(ValueError, match="last line of .* is cut short; --resume finishes"):
    journal.read_outputs(tmp_path)
  with pytest.raises(ValueError, match="nothing.jsonl does not exist; give the --output"):
    journal.read_outputs(tmp_path / "nothing.jsonl")
  assert journal.read_settings(tmp_path) == {}


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  run("")
  assert list(tmp_path.iterdir()) == []


def test_questions_are_told_apart(tmp_path):
  first = journal.questions_identity(examples(), prompts.STANDARD, "evaluation")
  assert first == journal.questions_identity(examples(), prompts.STANDARD, "evaluation")

  def changed(asked, templates=prompts.STANDARD, kind="evaluation"):
    other = journal.questions_identity(asked, templates, kind)
    return {name.removesuffix("_hash") for name in first if first[name] != other[name]}

  assert changed(examples()[::-1]) == {"ids", "questions"}  # in another order; all read the same
  assert changed(examples(7)) == {"count", "ids", "questions", "images", "prompts"}
  assert changed(examples(options=("x", "z"))) == {"questions", "prompts"}
  assert changed(examples(answer="B")) == {"questions"}
  (tmp_path / "a.png").write_bytes(b"a")
  assert changed(examples(images=(str(tmp_path / "a.png"),))) == {"questions", "images"}
  assert changed(examples(), kind="no_think") == changed(examples(), prompts.BRIEF) == {"prompts"}


def test_images_are_told_apart_by_content(tmp_path):
  def identity(*contents):
    paths = []
    for number, content in enumerate(contents):
      paths.append(tmp_path / f"{number}.png")
      paths[-1].write_bytes(content)
      os.utime(paths[-1], ns=(0, int.from_bytes(content)))  # a change of content leaves size and name alone
    return journal.questions_identity(examples(1, images=tuple(map(str, paths))), prompts.STANDARD, "evaluation")

  first = identity(b"abc", b"def")
  assert first == identity(b"abc", b"def")
  for other in (identity(b"abc", b"deg"), identity(b"def", b"abc")):
    assert {name for name in first if first[name] != other[name]} == {"images_hash"}
  identity(b"abc", b"def")
  (tmp_path / "moved").mkdir()
  moved = [str((tmp_path / f"{n}.png").rename(tmp_path / "moved" / f"{n + 5}.png")) for n in range(2)]
  assert first == journal.questions_identity(examples(1, images=tuple(moved)), prompts.STANDARD, "evaluation")
  with pytest.raises(ValueError, match=r"image .*0.png: cannot be read \(No such file"):
    journal.questions_identity(examples(1, images=(str(tmp_path / "0.png"),)), prompts.STANDARD, "evaluation")


def test_models_are_told_apart(tmp_path):
  def written(name, content):
    (tmp_path / name).write_bytes(content)
    return journal.model_hash(tmp_path)

  large = bytearray(np.random.default_rng(0).bytes(6 << 20))  # more than the blocks that are read
  first = written("model.safetensors", bytes(large))
  assert first == written("record.json", b"{}") == written("README.md", b"notes")
  named = written("generation_config.json", b"{}")
  assert named != first
  large[::4096] = bytes(len(large[::4096]))  # what training changes is everywhere
  assert written("model.safetensors", bytes(large)) != named
  small = written("model.safetensors", b"abc")
  assert small != written("model.safetensors", b"abd")
