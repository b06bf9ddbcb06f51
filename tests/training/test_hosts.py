"""KEPO on two hosts and on a mesh of eight devices is KEPO on one device.

Two steps from the same files, with hints for prompts that failed, unevenly over the hosts: the same tokens, and loss,
gradients and parameters that differ by rounding alone. Weights and moments are float32, Adam is as every config has it.
"""

import json
from collections import Counter

import numpy as np
import pytest

from tests.started import free_address, logs, started
from tests.training.hosts import ASKING, PROMPTS, ROLLOUTS, STEPS

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5  # of a loss, and of a tensor in norm, relative to one device
MESHES = ("2,2,2", "1,1,8")  # on the last one heads do not divide
HOSTS = "1,4,2"  # rows and weights lie on both hosts
SECONDS = 1500  # that a process may take, on cores that other tests use as well
KINDS = ("tokens of rollout", "tokens of hint", "tokens of candidate", "tokens of the update", "injected", "gate of")


def finish(folder, *commands, devices):
  """Runs processes of `tests.training.hosts`, which all must succeed."""
  with started(folder, *(("tests.training.hosts", folder, *each) for each in commands), devices=devices) as running:
    for process in running:
      assert process.wait(timeout=SECONDS) == 0, logs(folder)


def result(folder, mesh, processes=1, number=0):
  """(arrays, what was noted) of a process."""
  name = f"{mesh.replace(',', '-')}-of-{processes}-{number}"
  with np.load(folder / f"{name}.npz") as arrays:
    return dict(arrays), json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
  """Mesh -> result, of one device and of meshes of eight."""
  folder = tmp_path_factory.mktemp("one")
  finish(folder, ("1,1,1", *MESHES), devices=8)
  return {mesh: result(folder, mesh) for mesh in ("1,1,1", *MESHES)}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
  """Results of each of two hosts with four devices."""
  folder = tmp_path_factory.mktemp("hosts")
  shared = (HOSTS, f"--coordinator={free_address()}", "--processes=2")
  finish(folder, *((*shared, f"--process_id={number}") for number in range(2)), devices=4)
  return [result(folder, HOSTS, 2, number) for number in range(2)]


def assert_the_same(expected, actual):
  """Tokens, what became of them, losses, gradients of the first step, and parameters after the last one."""
  (expected, noted), (actual, said) = expected, actual
  names = [name for name in expected if name.startswith(KINDS)]
  assert len([name for name in names if name.startswith("tokens of rollout")]) == STEPS
  assert {name.split("/")[0] for name in names} >= set(KINDS[:4])
  for name in names:
    np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
  assert any(expected[name].any() for name in names if name.startswith("injected"))
  for kind, least in (("loss/", STEPS), ("gradient", 20), ("parameters", 20)):
    names = [name for name in expected if name.startswith(kind)]
    assert len(names) >= least
    for name in names:
      far = np.linalg.norm(actual[name] - expected[name]) / max(np.linalg.norm(expected[name]), 1e-12)
      assert far <= TOLERANCE, (name, far)
  assert (said["failed"], said["hints"], said["accepted"]) == (noted["failed"], noted["hints"], noted["accepted"])
  assert "other images" not in said


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_does_what_one_device_does(one_process, mesh):
  assert_the_same(one_process["1,1,1"], one_process[mesh])


@pytest.mark.parametrize("number", range(2))
def test_two_hosts_do_what_one_device_does(one_process, hosts, number):
  assert_the_same(one_process["1,1,1"], hosts[number])


def test_hosts_share_the_work_and_report_the_same(one_process, hosts):
  _, noted = one_process["1,1,1"]
  both, half = [said for _, said in hosts], PROMPTS // 2
  assert both[0]["metrics"] == both[1]["metrics"]
  for host, said in enumerate(both):
    # In every step more prompts failed on the second host than on the first one, and compiled nothing anew.
    assert [sum(row // half == host for row in rows) for rows in said["failed"]] == [1 + host] * STEPS
    assert said["compiled by steps"] > 5 and said["compiled"][1:] == [0] * len(ASKING)
    # Images are decoded by the host that holds their rows; batches of exploration are among them.
    assert said["images"][0] == list(range(host * half, (host + 1) * half)) and len(said["images"]) > STEPS
  assert noted["images"][0] == list(range(PROMPTS))
  for step in range(STEPS):
    scored = [Counter(map(tuple, said["scored"][step])) for said in both]
    assert scored[0] + scored[1] == Counter(map(tuple, noted["scored"][step]))
    # Each host scores its own half of the prompts, and again what it accepted for them.
    accepted = dict(zip(noted["failed"][step], noted["accepted"][step], strict=True))
    placed = [sum(many for row, many in accepted.items() if row // half == host) for host in range(2)]
    assert [each.total() for each in scored] == [half * ROLLOUTS + again for again in placed]
    assert not {question for question, _ in scored[0]} & {question for question, _ in scored[1]}
