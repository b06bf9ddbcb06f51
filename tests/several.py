"""One of two processes of four devices, without a run: python -m tests.several WHAT ADDRESS NUMBER FILE.

What it finds goes to FILE, a line of JSON each: the libraries write to the standard output whenever they like.
"""

import dataclasses
import json
import os
import pathlib
import resource
import sys
import traceback

import jax
import numpy as np
from PIL import Image

from kepo_jax import processes, rewards, sharding
from kepo_jax.data.rules import Rejected
from kepo_jax.models.qwen3_vl import conversion
from kepo_jax.training import groups as grouping
from kepo_jax.training import question_checks
from kepo_jax.training.profiling import CompileCounter
from kepo_jax.types import Rollouts
from tests.training.cases import example
from tests.training.runs import ASSETS


class Processor:
  """Tokens that are their own text."""

  def decode(self, tokens, mask):
    return [f"{row[keep].tolist()}" for row, keep in zip(tokens, mask, strict=True)]


def say(**said):
  with open(sys.argv[-1], "a", encoding="utf-8") as file:
    file.write(json.dumps(said) + "\n")


def gather(number):
  """Values of different sizes, one of them longer than a message; and how many programs that compiles."""

  counter, sizes = CompileCounter(), []
  for values in (["", "é" * 3], ["a" * (3 * processes.CHUNK), "b"], ["c", "d" * 1000]):
    found = processes.gathered(lambda values=values: {"number": number, "text": values[number]})
    assert [each["text"] for each in found] == values and [each["number"] for each in found] == [0, 1]
    sizes.append(counter.figures()["compiled/programs"])
  say(compiled=sizes)


def fail(number):
  """An error on the second process, of a kind that nobody expects."""

  def work():
    return {}[0] if number else 0

  try:
    processes.gathered(work)
  except (KeyError, OSError) as error:
    say(error=type(error).__name__)


def rollouts(prompts, samples):
  tokens = np.arange(prompts * samples, dtype=np.int32).reshape(prompts, samples, 1)
  return Rollouts(tokens=tokens, mask=np.ones(tokens.shape, bool), logps=np.zeros(tokens.shape, np.float32))


# Meshes that hold the rows of a batch in different ways: (mesh, (prompts, rollouts)).
HELD = (((8, 1, 1), (8, 2)), ((2, 4, 1), (2, 4)), ((1, 8, 1), (3, 8)), ((1, 1, 8), (2, 2)), ((8, 1, 1), (3, 2)))


def score(_):
  """What each process scores."""
  for axes, shape in HELD:
    scored = []

    def reward(completion, _, scored=scored):
      scored.append(int(completion.strip("[]")))
      return scored[-1] / 3

    judge = rewards.Scorer({"accuracy": (reward, 1.0), "format": (rewards.strict_format, 1.0)})
    with jax.set_mesh(sharding.make_mesh(*axes)):
      examples = [example(f"q{p}") for p in range(shape[0])]
      groups = grouping.scored_groups(Processor(), examples, rollouts(*shape), judge)
    expected = (np.arange(np.prod(shape)) / 3).astype(np.float32).reshape(shape)
    np.testing.assert_array_equal(groups.scores["accuracy"], expected)
    np.testing.assert_array_equal(groups.scores["total"], expected)
    assert groups.texts.tolist() == [[f"[{p * shape[1] + g}]" for g in range(shape[1])] for p in range(shape[0])]
    say(scored=scored)


def refuse(_):
  """A reward that is no number for a rollout of the second process."""

  def reward(completion, _):
    return float("nan") if completion == "[13]" else 0.0

  judge = rewards.Scorer({"accuracy": (reward, 1.0), "format": (rewards.strict_format, 1.0)})
  with jax.set_mesh(sharding.make_mesh(8)):
    try:
      grouping.scored_groups(Processor(), [example(f"q{p}") for p in range(8)], rollouts(8, 2), judge)
    except (ValueError, OSError) as error:
      say(error=type(error).__name__, text=str(error))


def look(number):
  """Images of which each process has copies, some of them damaged, and what both make of that."""
  folder, questions, calls = pathlib.Path(sys.argv[-1]).with_name(f"images-{number}"), [], []
  folder.mkdir()
  for name in range(5):
    Image.effect_noise((64, 64), 50).save(folder / f"{name}.png")
    questions.append(dataclasses.replace(example(f"q{name}"), images=(str(folder / f"{name}.png"),)))
  whole = (folder / "3.png").read_bytes()
  if number:
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])

  def refusals(split, examples):
    say(measured=[each.id for each in examples])
    return {each.id: Rejected("prompt_too_long", "9 tokens") for each in examples if number and each.id == "set/q1"}

  summaries = []
  kept = question_checks.with_readable_images(
    {"train": questions},
    lenient=True,
    progress=lambda done, total: calls.append([done, total]),
    refusals=refusals,
    report=summaries.append,
  )
  say(decoded=calls)
  say(kept=[each.id for each in kept["train"]], rules=dict(summaries[0].rules), first=summaries[0].first)


def export(number):
  """An export that the first process cannot write to its end, for its second half; then one for which there is room."""
  folder = pathlib.Path(sys.argv[-1]).with_name("model")
  mesh = sharding.make_mesh(fsdp=8)
  config, params = conversion.load_pretrained(ASSETS / "confused", np.float32, mesh)
  assert any(not leaf.is_fully_addressable for leaf in jax.tree.leaves(params))
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  for room in (100_000, limits[0]):
    if not number:
      resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    error = ""
    try:
      conversion.save_pretrained(folder, config, params, source=ASSETS / "confused")
    except OSError as raised:
      error = str(raised)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    say(error=error, there=(folder / "config.json").exists())


def leave(status):
  """Ends the process when its input does, without jax's exit handlers: their last meeting sometimes takes minutes."""
  if status:
    traceback.print_exc()
  sys.stdin.read()
  os._exit(status)


WHAT = {"gather": gather, "fail": fail, "score": score, "refuse": refuse, "look": look, "export": export}


def main(what, address, number, _):
  jax.distributed.initialize(address, 2, int(number), cluster_detection_method="deactivate")
  status = 1
  try:
    WHAT[what](int(number))
    status = 0
  finally:
    leave(status)


if __name__ == "__main__":
  main(*sys.argv[1:])
