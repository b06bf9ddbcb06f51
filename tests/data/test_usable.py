"""Room of a run: what is too long or too large is named before the first step, by rule, file, sizes and field."""

import dataclasses

import pytest
from PIL import Image

from kepo_jax.data import processor as processor_lib
from kepo_jax.data import prompts, usable
from kepo_jax.data.records import LONGEST

KINDS = {"think": 0, "hint_request": 0, "hint_and_answer": 0}


def made(checkpoint, **changes):
  settings = {"templates": prompts.STANDARD, "prompt_buckets": (512,), "patch_buckets": (16, 48)}
  return processor_lib.Processor.from_directory(checkpoint, **settings | changes)


def lengths(processor, questions, kind, hints=None):
  """Prompt tokens of each question as a run would make them."""
  return [int(n) for n in processor.prompts(questions, kind, hints=hints).mask.sum(axis=1)]


def test_the_longest_prompt_that_fits(checkpoint, questions):
  for kind in KINDS:
    tokens = lengths(made(checkpoint), questions, kind)
    longest = max(tokens)
    assert tokens.count(longest) == 1
    name = questions[tokens.index(longest)].id
    assert usable.refusals(questions, made(checkpoint, prompt_buckets=(64, longest)), {kind: 0}) == {}
    tight = made(checkpoint, prompt_buckets=(64, longest - 1))
    refused = usable.refusals(questions, tight, {kind: 0})
    assert {each: rejected.rule for each, rejected in refused.items()} == {name: "prompt_too_long"}
    assert f"the prompt {kind} has {longest} tokens" in str(refused[name])
    assert f"data.prompt_buckets=(64, {longest - 1}); add a larger bucket" in str(refused[name])
    with pytest.raises(ValueError, match=f"question {name}: its prompt has {longest} tokens, more than the largest"):
      tight.prompts(questions, kind)  # as the run would have found out
  # Every kind counts: here the longest of them alone is too long.
  refused = usable.refusals(questions, tight, KINDS)
  assert [str(rejected).split()[2] for rejected in refused.values()] == ["hint_and_answer"]


def test_room_for_the_longest_hint(checkpoint, questions):
  bare = max(lengths(made(checkpoint), questions, "hint_only"))
  processor = made(checkpoint, prompt_buckets=(bare + 7,))
  assert usable.refusals(questions, processor, {"hint_only": 7}) == {}
  (rejected,) = usable.refusals(questions, processor, {"hint_only": 8}).values()
  assert "and 8 for the longest hint" in str(rejected) and "or lower exploration.hint_tokens" in str(rejected)
  # A hint of seven tokens does fit: " 1" is a token of a space and one of a digit.
  assert max(lengths(processor, questions, "hint_only", ["1 1 1 1"] * len(questions))) <= bare + 7


def test_prompts_are_tokenized_in_parts(checkpoint, questions, monkeypatch):
  processor = made(checkpoint, prompt_buckets=(64,))
  whole = usable.refusals(questions, processor, KINDS)
  monkeypatch.setattr(usable, "_AT_ONCE", 2)
  parts = usable.refusals(questions, processor, KINDS)
  assert {name: str(why) for name, why in parts.items()} == {name: str(why) for name, why in whole.items()}
  assert len(whole) == len(questions)


def test_patches_of_all_images_of_a_question(checkpoint, questions):
  # set/2 shows two images, set/0 and set/4 one of them each.
  questions = [example for example in questions if example.id != "set/1"]
  processor = made(checkpoint)
  rows = {example.id: 4 * sum(processor.image_tokens([example])) for example in questions}
  largest = rows["set/2"]
  assert largest > max(rows["set/0"], rows["set/4"])
  assert usable.refusals(questions, made(checkpoint, patch_buckets=(largest,)), {}) == {}
  refused = usable.refusals(questions, made(checkpoint, patch_buckets=(16, largest - 4)), KINDS)
  assert {name: rejected.rule for name, rejected in refused.items()} == {"set/2": "image_too_large"}
  expected = f"{largest} patch rows, more than the largest of data.patch_buckets=(16, {largest - 4}); add a larger"
  for part in ("square.png of 32 x 32 pixels, ", "tall.png of 20 x 60 pixels", expected):
    assert part in str(refused["set/2"])


@pytest.mark.parametrize(("size", "rule"), [((3000, 10), "image_too_narrow"), ((400, 300), "image_too_large")])
def test_images_that_only_a_square_can_hold(size, rule, checkpoint, questions, tmp_path):
  path = str(tmp_path / "odd.png")
  Image.new("L", size).save(path)
  asked = [questions[0], dataclasses.replace(questions[1], images=(path,))]
  native = made(checkpoint)
  if rule == "image_too_large":  # the tiny model's processor would scale everything down
    native.image_processor = dataclasses.replace(native.image_processor, max_pixels=1 << 20)
  (rejected,) = usable.refusals(asked, native, KINDS).values()
  assert rejected.rule == rule
  assert all(part in str(rejected) for part in (f"{size[0]} x {size[1]}", path, "data.resize=squash384"))
  square = made(checkpoint, resize="squash384", patch_buckets=(2304,), prompt_buckets=(4096,))
  assert usable.refusals(asked, square, KINDS) == {}


def test_a_text_that_no_question_has(checkpoint, questions):
  processor = made(checkpoint, prompt_buckets=(1 << 20,))
  rest = sum(map(len, questions[0].options))
  for length, found in ((LONGEST - rest, {}), (LONGEST - rest + 1, {"set/0": "question_too_long"})):
    long = dataclasses.replace(questions[0], question="a" * length)
    refused = usable.refusals([long, questions[1]], processor, {"think": 0})
    assert {name: rejected.rule for name, rejected in refused.items()} == found
