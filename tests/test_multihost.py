import collections
import json
import time

import jax
import numpy as np

from kepo_jax import multihost, sharding
from tests.started import free_address, logs, started

SECONDS = 180


def two(folder):
  """What two processes of `tests.several` say, of each: what it is about -> lines."""
  address, files = free_address(), [folder / "0", folder / "1"]
  slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1,other", "SLURM_NTASKS": "2"}
  slurm |= {"JAX_COORDINATOR_PORT": address.partition(":")[2], "JAX_COORDINATOR_BIND_ADDRESS": address}
  environ = [slurm | {"SLURM_PROCID": number, "SLURM_LOCALID": number} for number in "01"]
  commands = [("tests.several", number, file) for number, file in enumerate(files)]
  for file in files:
    file.touch()
  with started(folder, *commands, devices=4, environ=environ) as running:
    deadline = time.monotonic() + SECONDS
    # Where one has failed, the other one waits for it.
    while time.monotonic() < deadline and not any(process.poll() for process in running):
      if all('"end"' in file.read_text("utf-8") for file in files):
        for process in reversed(running):  # the first one serves the connection, and must leave last
          process.communicate()
        break
      time.sleep(0.05)
  said = [collections.defaultdict(list) for _ in files]
  for lines, file in zip(said, files, strict=True):
    for line in map(json.loads, file.read_text("utf-8").splitlines()):
      lines[line.pop("about")].append(line)
  return said


def test_two_processes_act_as_one(tmp_path):
  first, second = two(tmp_path)
  log = logs(tmp_path)
  # Joined as SLURM says.
  assert first["join"] + second["join"] == [{"several": True, "number": n, "count": 2} for n in range(2)], log
  # Values of any size are gathered by the same programs.
  for said in (first, second):
    assert len(said["gather"]) == 2, log
    compiled, *others = said["gather"][0]["compiled"]
    assert compiled > 0 and others == [compiled, compiled]
    assert said["gather"][1]["flags"] == [True, False, True]
  # An error on one ends all.
  errors = [[each.get("error") for each in said["fail"]] for said in (first, second)]
  assert errors == [["OSError", "OSError", "KeyError", None], ["KeyError", "KeyError", "ValueError", None]]
  assert first["fail"][-1]["first"] == second["fail"][-1]["first"] == "é0"
  assert_scored_by_the_lowest_that_holds_it(first["score"], second["score"])
  assert_bad_images_are_left_out_by_all(first["look"], second["look"])
  # An export for which there is no room ends all, and leaves nobody behind.
  full, room = zip(first["export"], second["export"], strict=True)
  assert "File too large" in full[0]["error"] and "another process" in full[1]["error"]
  assert [each["there"] for each in full] == [False, False]
  assert [each["error"] for each in room] == ["", ""] and room[0]["there"]
  assert "end" in first and "end" in second, log


def assert_scored_by_the_lowest_that_holds_it(first, second):
  assert [(a["scored"], b["scored"]) for a, b in zip(first, second, strict=True)] == [
    ([*range(8)], [*range(8, 16)]),  # four prompts of eight each
    ([0, 1, 2, 3], [4, 5, 6, 7]),  # one prompt of two each, its rollouts over fsdp
    ([0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19], [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]),  # half of each group
    ([0, 1, 2, 3], []),  # both hold all
    ([0, 1, 2, 3, 4, 5], []),  # three prompts on eight devices: both hold all
  ]


def assert_bad_images_are_left_out_by_all(first, second):
  # Without the damaged one four are left to be measured.
  assert [first[0], second[0]] == [{"measured": ["set/q0", "set/q2"]}, {"measured": ["set/q1", "set/q4"]}]
  for said in (first[1], second[1]):
    assert said["kept"] == ["set/q0", "set/q2", "set/q4"]
    assert said["rules"] == {"unreadable_image": 1, "prompt_too_long": 1}
    assert said["first"]["prompt_too_long"] == "question set/q1: 9 tokens"
    assert "images-1/3.png: damaged" in said["first"]["unreadable_image"]


def test_what_is_shared_out_comes_back_in_its_order(monkeypatch):
  asked = []

  def squares(numbers):
    asked.append(list(numbers))
    return [number**2 for number in numbers]

  assert multihost.shard_across_hosts(range(5), squares) == [0, 1, 4, 9, 16] and asked == [[0, 1, 2, 3, 4]]
  monkeypatch.setattr("jax.process_count", lambda: 2)
  monkeypatch.setattr("jax.process_index", lambda: 1)
  monkeypatch.setattr(multihost, "all_gather", lambda work: [squares([0, 2, 4]), work()])
  assert multihost.shard_across_hosts(range(5), squares) == [0, 1, 4, 9, 16] and asked[2] == [1, 3]


def test_a_lone_process_reads_every_rollout_but_not_the_padding(mesh_of):
  value = {"not": ("JSON", object())}
  assert multihost.all_gather(lambda: value)[0] is value and multihost.run_on_all(lambda: value) is value
  with jax.set_mesh(mesh_of(data=4)):
    assert sharding.row_holders(8, 2).tolist() == [[0, 0]] * 8
    read = []
    found = multihost.gather_from_owners(
      (8, 2), 3, lambda prompt, slots: read.append(prompt) or [(prompt, g) for g in slots]
    )
  assert read == [0, 1, 2] and found.shape == (3, 2)
  assert found.tolist() == [[(p, g) for g in range(2)] for p in range(3)]
  assert sharding.row_holders(2, 3).tolist() == np.zeros((2, 3), int).tolist()  # nor is a mesh needed
