"""Questions that a run cannot ask stop it before the first step, or are left out and counted."""

import pytest
from PIL import Image

from experiments.configs import kepo
from kepo_jax.data.rules import Rejected
from kepo_jax.training import question_checks
from kepo_jax.types import Example
from tests.training.runs import changed


def test_every_image_is_decoded_before_the_first_step(tmp_path, caplog):
  for name in ("good", "cut"):
    Image.effect_noise((64, 64), 50).save(tmp_path / f"{name}.png")
  whole = (tmp_path / "cut.png").read_bytes()
  (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header can still be read
  asked = [
    Example(
      id=name, question="?", options=("a", "b"), answer="A", images=(str(tmp_path / f"{name}.png"),), modality="CT"
    )
    for name in ("good", "cut")
  ]
  calls = []
  progress = lambda done, total: calls.append((done, total))  # noqa: E731
  with pytest.raises(ValueError, match=r"train question cut: image .*cut.png.* set data.lenient to leave them out"):
    question_checks.with_readable_images({"train": asked}, lenient=False, progress=progress)
  assert calls == [(1, 2), (2, 2)]
  with caplog.at_level("WARNING"):
    kept = question_checks.with_readable_images({"train": asked, "test": asked[:1]}, lenient=True, progress=progress)
  assert {name: [example.id for example in part] for name, part in kept.items()} == {
    "train": ["good"],
    "test": ["good"],
  }
  assert "1 questions left out: train questions of the run: 1 of 2 records kept" in caplog.text
  assert "unreadable_image 1: error: " in caplog.text and "(first: question cut: image" in caplog.text


def plain(name, split="train"):
  return Example(id=f"{split}/{name}", question="?", options=("a", "b"), answer="A", images=(), modality="CT")


def test_questions_without_room_stop_a_run_or_are_counted(caplog):
  asked = {split: [plain(name, split) for name in "abcd"] for split in ("train", "test")}
  seen, summaries = [], []

  def refusals(split, examples):
    seen.append((split, len(examples)))
    large = {f"{split}/b": Rejected("image_too_large", "image b.png: 9 patch rows, more than 4")}
    return {} if split == "train" else large | {f"{split}/{n}": Rejected("prompt_too_long", "9 tokens") for n in "cd"}

  settings = {"progress": lambda done, total: None, "refusals": refusals, "report": summaries.append}
  with pytest.raises(
    ValueError,
    match=r"test question test/b: image b.png: 9 patch rows, more than 4 \(3 such questions: .*'image_too_large': 1, "
    r"'prompt_too_long': 2.* data.lenient to leave them out",
  ):
    question_checks.with_readable_images(asked, lenient=False, **settings)
  summaries.clear()
  with caplog.at_level("WARNING"):
    kept = question_checks.with_readable_images(asked, lenient=True, **settings)
  assert kept == {"train": asked["train"], "test": asked["test"][:1]}
  assert seen == [("train", 4), ("test", 4)] * 2
  assert [(each.records, each.kept, dict(each.rules)) for each in summaries] == [
    (4, 4, {}),
    (4, 1, {"image_too_large": 1, "prompt_too_long": 2}),
  ]
  assert "3 questions left out: test questions of the run: 1 of 4 records kept" in caplog.text
  assert "prompt_too_long 2: error: " in caplog.text and "first: question test/c: 9 tokens" in caplog.text


def test_the_wordings_that_a_run_uses():
  config = changed(kepo, data__prompt="no_think", eval__prompt="evaluation", exploration__hint_tokens=17)
  hinted = {"hint_request": 0, config.exploration.hint_prompt: 17}
  assert config.exploration.hint_prompt == "hint_and_answer"
  assert question_checks.prompt_kinds(config, "train") == {"no_think": 0} | hinted
  assert (
    question_checks.prompt_kinds(config, "validation")
    == question_checks.prompt_kinds(config, "test")
    == {"evaluation": 0}
  )
  config.exploration.trigger = "never"
  assert question_checks.prompt_kinds(config, "train") == {"no_think": 0}
