"""Buckets of batches before they are made: those of the batches themselves, and all that choices can have."""

import dataclasses
import itertools

import jax
import pytest

from kepo_jax.data import buckets, pipeline, prompts
from kepo_jax.data.buckets import Need

SMALL = {"templates": prompts.BRIEF, "prompt_buckets": (72, 128, 512), "patch_buckets": (16, 48, 128)}


@pytest.fixture(scope="module")
def processor(checkpoint):
  return pipeline.Processor.from_directory(checkpoint, **SMALL)


def buckets_of(batch):
  return batch.tokens.shape[1], batch.vision.patches.shape[1]


@pytest.mark.parametrize("kind", ["think", "hint_request"])
def test_batches_have_the_buckets_that_were_told(processor, questions, kind):
  needs = buckets.Needs(processor)
  sets = [chosen for size in (1, 2, 3) for chosen in itertools.combinations(questions, size)]
  told = [buckets.batch_buckets(needs(chosen, kind)) for chosen in sets]
  assert told == [buckets_of(processor.prompts(chosen, kind)) for chosen in sets]
  assert len(set(told)) > 2  # the questions differ enough


def test_hints_reach_no_other_buckets(processor, questions):
  needs = buckets.Needs(processor)
  hint = " ".join(["look"] * 10)  # a token per character at most
  for example in questions:
    (need,) = needs([example], "hint_only", hint=60)
    lengths = {buckets_of(processor.prompts([example], "hint_only", hints=[text]))[0] for text in ("", hint[:4], hint)}
    assert lengths <= set(need.lengths)
  assert any(len(need.lengths) > 1 for need in needs(questions, "hint_only", hint=60))


def test_every_question_is_measured_once(processor, questions, monkeypatch):
  needs, asked = buckets.Needs(processor), []
  sizes = processor.sizes
  monkeypatch.setattr(processor, "sizes", lambda examples, kind: asked.extend(examples) or sizes(examples, kind))
  first = needs([questions[0], questions[1], questions[0]], "think")
  assert needs([questions[1]], "think") == first[1:2] and first[0] == first[2]
  assert [example.id for example in asked] == [questions[0].id, questions[1].id]
  needs([dataclasses.replace(questions[0], id="other")], "think")
  assert len(asked) == 3


def slowly_reachable(needs, least, most):
  """By trying every choice of questions and every length of their hints."""
  found = set()
  for size in range(least, most + 1):
    for chosen in itertools.combinations(needs, size):
      for lengths in itertools.product(*(need.lengths for need in chosen)):
        found.add((max(lengths), max(need.patches for need in chosen)))
  return found


NEEDS = (
  Need(lengths=(64,), patches=16),
  Need(lengths=(64, 128), patches=0),
  Need(lengths=(128, 256), patches=16),
  Need(lengths=(256,), patches=64),
)


CROSSED = (Need(lengths=(64,), patches=64), Need(lengths=(256,), patches=16))  # no one fills both buckets


@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 2), (2, 2), (2, 4), (3, 4), (4, 4)])
@pytest.mark.parametrize("needs", [NEEDS, NEEDS[:3], NEEDS[1:], CROSSED, NEEDS[:1] * 4], ids=len)
def test_reachable_buckets_are_those_of_all_choices(needs, least, most):
  assert buckets.reachable(needs, least, most) == slowly_reachable(needs, least, most)


def test_shapes_are_those_of_the_arrays(processor, questions):
  for chosen in (questions, questions[3:4]):  # the latter without an image
    batch = processor.prompts(chosen, "think")
    told = processor.shapes(len(chosen), *buckets_of(batch))
    same = jax.tree.map(lambda array, shape: (array.shape, array.dtype) == (shape.shape, shape.dtype), batch, told)
    assert all(jax.tree.leaves(same))
