"""KEPO on several hosts and on every kind of mesh is KEPO on one device.

Three steps from the same files, with hints for prompts that failed, unevenly over the hosts: the same tokens, and loss,
gradients and parameters that differ by rounding alone. Models are those of the phantom with heads that a mesh of eight
can share out (`wide`), weights and moments float32, Adam as every config has it.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest

from kepo_jax.models.qwen3_vl import conversion, model
from tests.conftest import ROOT
from tests.training.hosts import FEW, MANY, PROMPTS, ROLLOUTS, STEPS
from tests.training.runs import ASSETS
from tests.training.wide import widened

TOLERANCE = 1e-5  # of a loss, and of a tensor in norm, relative to one device
MESHES = ("8,1,1", "1,8,1", "1,1,8", "2,2,2")
CROSSING = ("1,8,1", "1,1,8")  # meshes whose weights, or heads, lie on both hosts
SECONDS = 1500  # that a process may take, on cores that other tests use as well
KINDS = ("tokens of rollout", "tokens of hint", "tokens of candidate", "tokens of the update", "injected", "gate of")


@contextlib.contextmanager
def started(folder, *arguments, processes=1, devices=8):
  """Processes of `tests.training.hosts` on virtual devices; what is left of them is killed at the end of the block."""
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last count holds
  with contextlib.ExitStack() as stack:
    if processes > 1:
      with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
      arguments += (f"--coordinator={address}", f"--processes={processes}")
    running = []
    for number in range(processes):
      log = stack.enter_context((folder / f"log-{'-'.join(arguments[:1])}-of-{processes}-{number}").open("w"))
      command = [sys.executable, "-m", "tests.training.hosts", str(folder), *arguments]
      command += [f"--process_id={number}"] if processes > 1 else []
      process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, stdout=log, stderr=log)
      stack.callback(process.wait)
      stack.callback(process.kill)
      running.append((process, log.name))
    yield running


def finish(running):
  """Waits for processes, which all must succeed."""
  for process, log in running:
    assert process.wait(timeout=SECONDS) == 0, open(log).read()[-3000:]


def result(folder, mesh, processes=1, number=0):
  """(arrays, what was noted) of a process."""
  name = f"{mesh.replace(',', '-')}-of-{processes}-{number}"
  with np.load(folder / f"{name}.npz") as arrays:
    return dict(arrays), json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A folder with student and teacher, whose results follow."""
  folder = tmp_path_factory.mktemp("hosts")
  widened("confused", folder / "student")
  widened("weak", folder / "teacher")
  return folder


@pytest.fixture(scope="module")
def short(models):
  """Results of one device and of each of two hosts with four devices, after short steps."""
  folder = models / "short"
  folder.mkdir()
  for role in ("student", "teacher"):
    (folder / role).symlink_to(models / role)
  with (
    started(folder, "8,1,1", "--short", processes=2, devices=4) as hosts,
    started(folder, "1,1,1", "--short", devices=1) as device,
  ):
    finish(device + hosts)
  return result(folder, "1,1,1"), [result(folder, "8,1,1", 2, number) for number in range(2)]


@pytest.fixture(scope="module")
def full(models):
  """Name -> result: of one device, of every mesh in one process, and of a mesh over two hosts; with two rounds."""
  with started(models, "1,1,1", *MESHES) as running:
    finish(running)
  with started(models, "2,2,2", processes=2, devices=4) as hosts:
    finish(hosts)
  found = {mesh: result(models, mesh) for mesh in ("1,1,1", *MESHES)}
  return found | {f"host {number}": result(models, "2,2,2", 2, number) for number in range(2)}


@pytest.fixture(scope="module")
def crossing(short, models):
  """(mesh, host) -> result of one of two hosts with four devices, on meshes of which each cuts weights over both."""
  folder = models / "short"
  with started(folder, *CROSSING, "--short", processes=2, devices=4) as hosts:
    finish(hosts)
  return {(mesh, number): result(folder, mesh, 2, number) for mesh in CROSSING for number in range(2)}


def assert_same_tokens(expected, actual):
  """Every token that was sampled, and what became of it."""
  names = [name for name in expected if name.startswith(KINDS)]
  assert len([name for name in names if name.startswith("tokens of rollout")]) == STEPS
  assert {name.split("/")[0] for name in names} >= set(KINDS[:4])
  assert set(expected) == {name for name in actual if name in expected}
  for name in names:
    np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
  assert any(expected[name].any() for name in names if name.startswith("injected"))


def assert_close(expected, actual, kind, least):
  """Arrays of a kind in norm, at least so many; returns the largest relative difference."""
  names = [name for name in expected if name.startswith(kind)]
  assert len(names) >= least
  far = {
    name: float(np.linalg.norm(actual[name] - expected[name]) / max(np.linalg.norm(expected[name]), 1e-12))
    for name in names
  }
  worst = max(far, key=far.get)
  assert far[worst] <= TOLERANCE, (worst, far[worst])
  return far[worst]


def assert_the_same(expected, actual):
  """Tokens, losses, gradients of the first step, and parameters after the last one."""
  assert_same_tokens(expected, actual)
  for kind, least in (("loss/", STEPS), ("gradient", 20), ("parameters", 20)):
    print(f"{kind} {assert_close(expected, actual, kind, least):.1e}")


def failed_on(said, host):
  """Failed prompts of each step among the rows that one of two hosts holds."""
  half = PROMPTS // 2
  return [sum(host * half <= row < (host + 1) * half for row in rows) for rows in said["failed"]]


@pytest.mark.parametrize("number", range(2))
def test_two_hosts_do_what_one_device_does(short, number):
  (expected, noted), hosts = short
  actual, said = hosts[number]
  assert_the_same(expected, actual)
  assert (said["failed"], said["hints"], said["accepted"]) == (noted["failed"], noted["hints"], noted["accepted"])
  # In every step more prompts failed on the second host than on the first one.
  assert [failed_on(said, host) for host in range(2)] == [[1] * STEPS, [2] * STEPS]


def test_hosts_report_the_same(short):
  _, ((_, first), (_, second)) = short
  assert first["metrics"] == second["metrics"]


def test_every_rollout_is_scored_once_and_where_it_lies(short):
  (_, noted), hosts = short
  for step in range(STEPS):
    both = [Counter(map(tuple, said["scored"][step])) for _, said in hosts]
    assert both[0] + both[1] == Counter(map(tuple, noted["scored"][step]))
    # Each host scores its own half of the prompts, and again what it accepted for them.
    half, accepted = PROMPTS // 2, dict(zip(noted["failed"][step], noted["accepted"][step], strict=True))
    placed = [sum(many for row, many in accepted.items() if row // half == host) for host in range(2)]
    assert [each.total() for each in both] == [half * ROLLOUTS + again for again in placed]
    assert not {question for question, _ in both[0]} & {question for question, _ in both[1]}


def test_images_are_decoded_by_the_host_that_holds_their_rows(short):
  (_, noted), hosts = short
  assert noted["images"][0] == list(range(PROMPTS))
  for number, (_, said) in enumerate(hosts):
    half = PROMPTS // 2
    assert said["images"][0] == list(range(number * half, (number + 1) * half))
    assert len(said["images"]) > STEPS  # batches of exploration are among them
    assert "other images" not in said


def test_uneven_numbers_of_failed_prompts_compile_nothing(short):
  _, hosts = short
  for _, said in hosts:
    assert said["compiled by steps"] > 5
    assert said["compiled"][1:] == [0] * len(MANY)


def test_the_wide_models_are_the_models_of_the_phantom(models):
  config, params = conversion.load_pretrained(models / "student", np.float32)
  assert config.text.num_attention_heads == config.text.num_key_value_heads == 8
  shapes = {path: leaf.shape for path, leaf in _leaves(params)}
  axes = model.logical_axes(config)
  for path, names in _leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple)):
    for size, name in zip(shapes[path], names, strict=True):
      assert name is None or size % 8 == 0, (path, name, size)


def _leaves(tree, is_leaf=None):

  return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_leaf)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MESHES, "host 0", "host 1"])
def test_every_mesh_does_what_one_device_does(full, name):
  expected, noted = full["1,1,1"]
  actual, said = full[name]
  assert_the_same(expected, actual)
  assert (said["failed"], said["hints"], said["accepted"]) == (noted["failed"], noted["hints"], noted["accepted"])
  assert failed_on(said, 0) != failed_on(said, 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("mesh", CROSSING)
def test_weights_on_several_hosts_change_nothing(short, crossing, mesh, number):
  (expected, noted), _ = short
  actual, said = crossing[mesh, number]
  assert_the_same(expected, actual)
  assert (said["failed"], said["hints"], said["accepted"]) == (noted["failed"], noted["hints"], noted["accepted"])
  assert "other images" not in said
  # Where only heads are cut, both hosts hold all rows, and the first one alone scores them.
  scored = [sum(map(len, said["scored"])) for _, said in (crossing[mesh, each] for each in range(2))]
  assert sum(scored) == sum(map(len, noted["scored"])) and (mesh == "1,8,1" or scored[1] == 0)


@pytest.mark.slow
def test_heads_that_do_not_divide_change_nothing(tmp_path):
  # The phantom's models as they are: four heads and two key-value heads on eight devices of the axis "tensor".
  (tmp_path / "student").symlink_to(ASSETS / "confused")
  (tmp_path / "teacher").symlink_to(ASSETS / "weak")
  with started(tmp_path, "1,1,1", "1,1,8", "--short") as running:
    finish(running)
  assert_the_same(result(tmp_path, "1,1,1")[0], result(tmp_path, "1,1,8")[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
def test_few_or_many_failed_prompts_compile_nothing(full, number):
  _, said = full[f"host {number}"]
  assert said["compiled"][1:] == [0] * len(MANY + FEW)
