"""What processes tell each other: everything arrives, in one shape, and an error on one of them ends all."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import jax
import numpy as np

from kepo_jax import processes, sharding
from tests.conftest import ROOT


def two(what):
  """What each of two processes of `tests.several` says, line by line; both must succeed."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    files, running = [folder / "0", folder / "1"], []
    for number, file in enumerate(files):
      command = [sys.executable, "-m", "tests.several", what, address, str(number), str(file)]
      pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
      process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, **pipes)
      stack.callback(process.wait)
      stack.callback(process.kill)
      running.append(process)
    for process in reversed(running):  # the first one serves the connection, and must leave last
      _, log = process.communicate(timeout=120)
      assert process.returncode == 0, log[-3000:]
    return [[json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in files]


def test_values_of_any_size_are_gathered_by_the_same_programs():
  for (said,) in two("gather"):
    first, *others = said["compiled"]
    assert first > 0 and others == [first, first]


def test_an_error_on_one_process_ends_all():
  assert two("fail") == [[{"error": "OSError"}], [{"error": "KeyError"}]]


def test_a_reward_that_is_no_number_on_one_process_ends_all():
  ((first,), (second,)) = two("refuse")
  assert first["error"] == "OSError" and "another process" in first["text"]
  assert second["error"] == "ValueError" and "set/q6" in second["text"]


def test_each_rollout_is_scored_by_the_lowest_process_that_holds_it():
  whole, rest = two("score")
  expected = [
    ([*range(8)], [*range(8, 16)]),  # four prompts of eight each
    ([0, 1, 2, 3], [4, 5, 6, 7]),  # one prompt of two each, its rollouts over fsdp
    ([0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19], [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]),  # half of each group
    ([0, 1, 2, 3], []),  # both hold all
    ([0, 1, 2, 3, 4, 5], []),  # three prompts on eight devices: both hold all
  ]
  assert [(a["scored"], b["scored"]) for a, b in zip(whole, rest, strict=True)] == expected


def test_an_image_that_one_process_cannot_read_is_left_out_by_all():
  first, second = two("look")
  assert [first[1], second[1]] == [{"decoded": [[1, 3], [2, 3], [3, 3]]}, {"decoded": [[1, 2], [2, 2]]}]
  # Without the damaged one four are left to be measured.
  assert [first[0], second[0]] == [{"measured": ["set/q0", "set/q2"]}, {"measured": ["set/q1", "set/q4"]}]
  for said in (first[2], second[2]):
    assert said["kept"] == ["set/q0", "set/q2", "set/q4"]
    assert said["rules"] == {"unreadable_image": 1, "prompt_too_long": 1}
    assert said["first"]["prompt_too_long"] == "question set/q1: 9 tokens"
    assert "question set/q3: image" in said["first"]["unreadable_image"]
    assert "images-1/3.png: damaged" in said["first"]["unreadable_image"]


def test_an_export_for_which_there_is_no_room_ends_all_and_leaves_nobody_behind():
  first, second = two("export")
  assert "File too large" in first[0]["error"] and "another process" in second[0]["error"]
  assert [each["there"] for each in (first[0], second[0])] == [False, False]
  assert first[1]["error"] == second[1]["error"] == "" and first[1]["there"]


def test_what_is_shared_out_comes_back_in_its_order(monkeypatch):
  asked = []

  def squares(numbers):
    asked.append(list(numbers))
    return [number**2 for number in numbers]

  assert processes.divided(range(5), squares) == [0, 1, 4, 9, 16] and asked == [[0, 1, 2, 3, 4]]
  monkeypatch.setattr("jax.process_count", lambda: 2)
  monkeypatch.setattr("jax.process_index", lambda: 1)
  monkeypatch.setattr(processes, "gathered", lambda work: [squares([0, 2, 4]), work()])
  assert processes.divided(range(5), squares) == [0, 1, 4, 9, 16] and asked[2] == [1, 3]


def test_a_lone_process_hands_over_what_it_made():
  value = {"not": ("JSON", object())}
  assert processes.gathered(lambda: value) == [value]
  assert processes.gathered(lambda: value)[0] is value


def test_a_lone_process_reads_every_rollout_but_not_the_padding(mesh_of):
  with jax.set_mesh(mesh_of(data=4)):
    assert sharding.row_holders(8, 2).tolist() == [[0, 0]] * 8
    read = []
    found = processes.by_holders((8, 2), 3, lambda prompt, slots: read.append(prompt) or [(prompt, g) for g in slots])
  assert read == [0, 1, 2] and found.shape == (3, 2)
  assert found.tolist() == [[(p, g) for g in range(2)] for p in range(3)]
  assert sharding.row_holders(2, 3).tolist() == np.zeros((2, 3), int).tolist()  # nor is a mesh needed


def test_what_is_done_together_comes_back():
  assert processes.together(lambda: 3) == 3
