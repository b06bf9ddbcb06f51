import concurrent.futures
import errno
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


def test_a_living_process_keeps_its_lock_and_a_killed_one_loses_it_at_once(tmp_path):
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
    taken.check_now()
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
  assert time.monotonic() - start < 10  # without watching the record
  assert not (tmp_path / lock.NAME).exists()
  holder.communicate()


def write_other_host(tmp_path, beat):
  (tmp_path / lock.NAME).write_text(json.dumps({"token": "theirs", "host": "node7", "pid": 1, "beat": beat}))


def no_locks(descriptor, operation):
  raise OSError(errno.ENOSYS, "not implemented")


@pytest.mark.parametrize("locks", [True, False])
def test_a_holder_on_another_host_is_alive_while_it_renews_its_record(tmp_path, monkeypatch, locks):
  if not locks:
    monkeypatch.setattr("fcntl.flock", no_locks)
  write_other_host(tmp_path, 0)
  timer = threading.Timer(0.15, write_other_host, (tmp_path, 1))
  timer.start()
  with pytest.raises(ValueError, match="in use by process 1 on node7"):
    WorkdirLock(tmp_path, beat=0.1).__enter__()
  timer.join()
  for record in ((tmp_path / lock.NAME).read_text(), "", "[1]", "\x00\x01"):  # silent, or damaged
    (tmp_path / lock.NAME).write_text(record)
    with WorkdirLock(tmp_path, beat=0.02) as taken:
      taken.check_now()


def test_a_lock_that_was_taken_stops_its_run(tmp_path):
  with WorkdirLock(tmp_path, beat=0.05) as held:
    write_other_host(tmp_path, 0)
    with pytest.raises(ValueError, match="process 1 on node7 took it at the same moment"):
      held.check_now()
    until(lambda: held._lost)
    with pytest.raises(ValueError, match="was taken by process 1 on node7; this one stops"):
      held.check()
  assert json.loads((tmp_path / lock.NAME).read_text())["token"] == "theirs"  # not ours to remove


def test_storage_that_answers_again_is_no_reason_to_stop(tmp_path, monkeypatch):
  with WorkdirLock(tmp_path, beat=0.05) as held:
    failing = threading.Event()

    def unreachable():
      failing.set()
      raise OSError("the network is down")

    with monkeypatch.context() as outage:
      outage.setattr(held, "_read", unreachable)
      assert failing.wait(10)
    (tmp_path / lock.NAME).unlink()
    until(lambda: (tmp_path / lock.NAME).exists() and (tmp_path / lock.NAME).read_text())  # renewed again
    held.check()


@pytest.mark.parametrize("remote", [False, True])
def test_of_several_that_start_at_once_one_gets_the_lock(tmp_path, bucket, remote):
  gate, done = threading.Barrier(4), threading.Barrier(4)

  def take(_):
    gate.wait()
    try:
      with WorkdirLock("gs://bucket/run" if remote else tmp_path, beat=0.2) as held:
        done.wait()
        held.check_now()
      return True
    except ValueError:
      done.wait()
      return False

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert sorted(pool.map(take, range(4))) == [False, False, False, True]


def test_in_a_bucket_a_killed_process_loses_its_lock_after_some_silence(bucket):
  killed = WorkdirLock("gs://bucket/run", beat=60)
  killed.__enter__()
  with pytest.raises(ValueError, match=f"is in use by process {os.getpid()}"):
    with WorkdirLock("gs://bucket/run", beat=0.05), WorkdirLock("gs://bucket/run", beat=0.1):
      pass
  assert bucket.names("bucket") == []
