"""One of two processes of four devices, without a run: python -m tests.several NUMBER FILE.

What one finds goes to FILE, a line of JSON each: the libraries write to the standard output whenever they like.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import resource
import sys
import traceback

import jax
import numpy as np
from absl import flags
from PIL import Image

from experiments import environment
from kepo_jax import multihost, rewards, sharding
from kepo_jax.data.cleaning import Rejected
from kepo_jax.models.qwen3_vl import checkpoint
from kepo_jax.training import checks
from kepo_jax.training import rollouts as rollouts_lib
from kepo_jax.training.monitoring import CompileCounter
from kepo_jax.types import Rollouts
from tests.training.cases import example
from tests.training.runs import ASSETS


class Processor:
  def decode(self, tokens, mask):
    return [f"{row[keep].tolist()}" for row, keep in zip(tokens, mask, strict=True)]


def say(about, **said):
  with open(sys.argv[-1], "a", encoding="utf-8") as file:
    file.write(json.dumps({"about": about} | said) + "\n")


def gather(number):
  """Values of different sizes, the longest longer than a message; and how many programs that compiles."""
  counter, sizes = CompileCounter(), []
  values = ["", "é" * 3], ["a" * (3 * multihost.CHUNK), "b"], ["c", "d" * (2 * multihost.CHUNK)]
  for both in values:
    assert multihost.all_gather(lambda both=both: {"text": both[number]}) == [{"text": text} for text in both]
    sizes.append(counter.metrics()["compiled/programs"])
  say("gather", compiled=sizes)
  say("gather", flags=multihost.any_process(number == 1, False, True))


@contextlib.contextmanager
def told(about):
  """Says which error ends a block."""
  try:
    yield
  except (KeyError, OSError, ValueError) as error:
    say(about, error=type(error).__name__, text=str(error))


def fail(number):
  """An error on one process, of a kind that nobody expects."""

  def work(failing):
    return {}[0] if number == failing else 0

  with told("fail"):
    multihost.all_gather(lambda: work(1))
  with told("fail"):
    multihost.run_on_all(lambda: work(1))
  with told("fail"):
    multihost.on_first(lambda: work(0))
  say("fail", first=multihost.on_first(lambda: f"é{number}"))


def groups_of(axes, shape, reward):
  judge = rewards.Scorer({"accuracy": (reward, 1.0), "format": (rewards.strict_format, 1.0)})
  tokens = np.arange(np.prod(shape), dtype=np.int32).reshape(*shape, 1)
  rollouts = Rollouts(tokens=tokens, mask=np.ones(tokens.shape, bool), logps=np.zeros(tokens.shape, np.float32))
  with jax.set_mesh(sharding.make_mesh(*axes)):
    return rollouts_lib.scored_groups(Processor(), judge, [example(f"q{p}") for p in range(shape[0])], rollouts)


# Meshes that hold the rows of a batch in different ways: (mesh, (prompts, rollouts)).
HELD = (((8, 1, 1), (8, 2)), ((2, 4, 1), (2, 4)), ((1, 8, 1), (3, 8)), ((1, 1, 8), (2, 2)), ((8, 1, 1), (3, 2)))


def score(_):
  for axes, shape in HELD:
    scored = []

    def reward(completion, _, scored=scored):
      scored.append(int(completion.strip("[]")))
      return scored[-1] / 3

    groups = groups_of(axes, shape, reward)
    expected = (np.arange(np.prod(shape)) / 3).astype(np.float32).reshape(shape)
    np.testing.assert_array_equal(groups.scores["total"], expected)
    assert groups.texts.tolist() == [[f"[{p * shape[1] + g}]" for g in range(shape[1])] for p in range(shape[0])]
    say("score", scored=scored)


def look(number):
  """Images of which each process has copies, one of them damaged, and what both make of that."""
  folder, questions, summaries = pathlib.Path(sys.argv[-1]).with_name(f"images-{number}"), [], []
  folder.mkdir()
  for name in range(5):
    Image.effect_noise((64, 64), 50).save(folder / f"{name}.png")
    questions.append(dataclasses.replace(example(f"q{name}"), images=(str(folder / f"{name}.png"),)))
  whole = (folder / "3.png").read_bytes()
  (folder / "3.png").write_bytes(whole[: len(whole) // (1 + number)])

  def refusals(split, examples):
    say("look", measured=[each.id for each in examples])
    return {each.id: Rejected("prompt_too_long", "9 tokens") for each in examples if number and each.id == "set/q1"}

  settings = {"progress": lambda done, total: None, "refusals": refusals, "report": summaries.append}
  kept = checks.with_readable_images({"train": questions}, lenient=True, **settings)
  say("look", kept=[each.id for each in kept["train"]], rules=dict(summaries[0].rules), first=summaries[0].first)


def export(number):
  """An export that the first process cannot write to its end, for its second half; then one for which there is room."""
  folder = pathlib.Path(sys.argv[-1]).with_name("model")
  mesh = sharding.make_mesh(fsdp=8)
  config, params = checkpoint.load_pretrained(ASSETS / "confused", np.float32, mesh)
  assert any(not leaf.is_fully_addressable for leaf in jax.tree.leaves(params))
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  for room in (100_000, limits[0]):
    if not number:
      resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    error = ""
    try:
      checkpoint.save_pretrained(folder, config, params, source=ASSETS / "confused")
    except OSError as raised:
      error = str(raised)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    say("export", error=error, there=(folder / "config.json").exists())


def main(number):
  environment.define_process_flags()
  flags.FLAGS(["several"])
  say("join", several=environment.join_processes(), number=jax.process_index(), count=jax.process_count())
  for work in (gather, fail, score, look, export):
    work(number)
  say("end")
  # Leaves when its input ends, without jax's exit handlers: their last meeting sometimes takes minutes.
  sys.stdin.read()
  os._exit(0)


if __name__ == "__main__":
  try:
    main(int(sys.argv[1]))
  except BaseException:  # noqa: BLE001 - whatever ends it, jax's exit handlers would wait for the other process
    traceback.print_exc()
    os._exit(1)
