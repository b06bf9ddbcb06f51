"""Buckets of batches before they are made: those of the batches themselves, and all that choices can have."""

import itertools

import jax

from kepo_jax.training import compile_ahead
from kepo_jax.training.compile_ahead import Need
from tests.data.conftest import checkpoint, processor, questions

__all__ = ["checkpoint", "processor", "questions"]  # fixtures


def buckets_of(batch):
  return batch.tokens.shape[1], batch.vision.patches.shape[1]


def test_batches_have_the_buckets_that_were_told(processor, questions):  # noqa: F811
  needs, found = compile_ahead.Needs(processor), set()
  for kind in ("think", "hint_request"):
    for chosen in itertools.chain.from_iterable(itertools.combinations(questions, size) for size in (1, 2, 3)):
      batch = processor.prompts(chosen, kind)
      assert compile_ahead.batch_buckets(needs(chosen, kind)) == buckets_of(batch), (kind, [each.id for each in chosen])
      told = processor.shapes(len(chosen), *buckets_of(batch))
      same = jax.tree.map(lambda array, shape: (array.shape, array.dtype) == (shape.shape, shape.dtype), batch, told)
      assert all(jax.tree.leaves(same))
      found.add(buckets_of(batch))
  assert len(found) > 2  # the questions differ enough


def test_hints_reach_no_other_buckets(processor, questions):  # noqa: F811
  needs = compile_ahead.Needs(processor)
  hint = " ".join(["look"] * 10)  # a token per character at most
  for example in questions:
    (need,) = needs([example], "hint_only", hint=60)
    lengths = {buckets_of(processor.prompts([example], "hint_only", hints=[text]))[0] for text in ("", hint[:4], hint)}
    assert lengths <= set(need.lengths)
  assert any(len(need.lengths) > 1 for need in needs(questions, "hint_only", hint=60))


def slowly_reachable(needs, least, most):
  """By trying every choice of questions and every length of their hints."""
  found = set()
  for size in range(least, most + 1):
    for chosen in itertools.combinations(needs, size):
      for lengths in itertools.product(*(need.lengths for need in chosen)):
        found.add((max(lengths), max(need.patches for need in chosen)))
  return found


def test_reachable_buckets_are_those_of_all_choices():
  needs = (Need((64,), 16), Need((64, 128), 0), Need((128, 256), 16), Need((256,), 64))
  crossed = (Need((64,), 64), Need((256,), 16))  # no one fills both buckets
  for chosen in (needs, needs[:3], needs[1:], crossed, needs[:1] * 4):
    for least, most in [(1, 1), (1, 2), (2, 2), (2, 4), (3, 4), (4, 4)]:
      assert compile_ahead.reachable(chosen, least, most) == slowly_reachable(chosen, least, most), (
        chosen,
        least,
        most,
      )
