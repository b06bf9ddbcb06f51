"""One process per workdir, whatever became of the last one, and whatever the clocks say."""

import concurrent.futures
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from kepo_jax.training import lock
from kepo_jax.training.lock import WorkdirLock
from tests.training.cases import until

# Without the import of everything that trains.
HOLD = """
import sys, time, types
import kepo_jax
sys.modules["kepo_jax.training"] = package = types.ModuleType("kepo_jax.training")
package.__path__ = [kepo_jax.__path__[0] + "/training"]
from kepo_jax.training.lock import WorkdirLock
with WorkdirLock(sys.argv[1]):
  print("held", flush=True)
  time.sleep(600)
"""


def test_the_lock_of_a_living_process_is_respected_and_that_of_a_killed_one_taken_over_at_once(tmp_path):
  holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
  try:
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"{tmp_path} is in use by process {holder.pid} on .*another\s+--workdir"):
      WorkdirLock(tmp_path).__enter__()
  finally:
    holder.kill()
  os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked for its end
  start = time.monotonic()
  with WorkdirLock(tmp_path) as taken:
    taken.check()
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
  assert time.monotonic() - start < 10  # nobody waited for a beat
  assert not (tmp_path / lock.NAME).exists()
  holder.communicate()


def leave_dead_holder(tmp_path):
  """The lock of a process that had the number of this one before it."""
  with WorkdirLock(tmp_path):
    record = json.loads((tmp_path / lock.NAME).read_text())
  (tmp_path / lock.NAME).write_text(json.dumps(record | {"token": "other", "started": "1"}))


def test_a_later_process_with_the_same_number_is_no_holder(tmp_path):
  leave_dead_holder(tmp_path)
  with WorkdirLock(tmp_path) as taken:
    taken.check()
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
      WorkdirLock(tmp_path).__enter__()


def elsewhere(tmp_path, beat):
  record = {"token": "theirs", "host": "node7", "boot": "b", "namespace": "n", "pid": 1, "started": "5", "beat": beat}
  (tmp_path / lock.NAME).write_text(json.dumps(record))


def test_a_holder_elsewhere_is_alive_while_its_beat_changes(tmp_path):
  elsewhere(tmp_path, 0)
  timer = threading.Timer(0.15, elsewhere, (tmp_path, 1))
  timer.start()
  with pytest.raises(ValueError, match="in use by process 1 on node7"):
    WorkdirLock(tmp_path, beat=0.1).__enter__()
  timer.join()


def test_a_silent_holder_elsewhere_or_a_damaged_lock_is_taken_over_whatever_the_clock_says(tmp_path, monkeypatch):
  elsewhere(tmp_path, 0)
  now = time.time
  for text in ((tmp_path / lock.NAME).read_text(), "", "[1]", "\x00\x01"):
    for jump in (-86_400, 86_400):
      (tmp_path / lock.NAME).write_text(text)
      monkeypatch.setattr("time.time", lambda jump=jump: now() + jump)
      with WorkdirLock(tmp_path, beat=0.02) as taken:
        taken.check()


def test_a_lock_that_was_taken_stops_its_run(tmp_path):
  with WorkdirLock(tmp_path, beat=0.05) as held:
    elsewhere(tmp_path, 0)
    until(lambda: held._lost)
    with pytest.raises(ValueError, match="was taken by process 1 on node7; this one stops"):
      held.check()
  assert json.loads((tmp_path / lock.NAME).read_text())["token"] == "theirs"  # not ours to remove


def test_a_removed_lock_comes_back(tmp_path):
  with WorkdirLock(tmp_path, beat=0.05) as held:
    (tmp_path / lock.NAME).unlink()
    until((tmp_path / lock.NAME).exists)
    held.check()


def test_storage_that_answers_again_is_no_reason_to_stop(tmp_path, monkeypatch):
  with WorkdirLock(tmp_path, beat=0.05) as held:
    failing = threading.Event()
    read = held._read

    def unreachable():
      failing.set()
      raise OSError("the network is down")

    monkeypatch.setattr(held, "_read", unreachable)
    assert failing.wait(10)
    monkeypatch.setattr(held, "_read", read)
    held.check()


@pytest.mark.parametrize("left", [False, True], ids=["nothing there", "a dead holder"])
def test_of_several_that_start_at_once_one_gets_it(tmp_path, monkeypatch, left):
  if left:
    leave_dead_holder(tmp_path)
  look = WorkdirLock._check_dead

  def slowly(self, held):
    look(self, held)
    time.sleep(0.3)  # between the look and the write

  monkeypatch.setattr(WorkdirLock, "_check_dead", slowly)
  gate, done = threading.Barrier(4), threading.Barrier(4)

  def take(_):
    gate.wait()
    try:
      with WorkdirLock(tmp_path):
        done.wait()
      return True
    except ValueError:
      done.wait()
      return False

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert sorted(pool.map(take, range(4))) == [False, False, False, True]
