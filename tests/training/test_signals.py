import signal
import subprocess
import sys
import threading

from kepo_jax.training.signals import Interruption

# At last it waits inside one call into C, as a compilation does: Python's own handlers do not run meanwhile.
PROGRAM = """
import threading
from kepo_jax.training.signals import Interruption
for _ in range(2):
  with Interruption() as interruption:
    print("ready", flush=True)
    while not interruption.requested():
      pass
    print("asked", flush=True)
busy = threading.Lock()
busy.acquire()
with Interruption() as interruption:
  print("ready", flush=True)
  sum(1 for _ in iter(lambda: busy.acquire(timeout=0.05), True))
"""


def test_the_first_signal_asks_and_the_second_ends_the_process_at_once():
  process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  for number in (signal.SIGTERM, signal.SIGINT):
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "asked\n"
    assert f"{number.name}: the run stops as soon as its state can be saved" in process.stderr.readline()
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGINT)
  assert "again to exit at once" in process.stderr.readline()
  process.send_signal(signal.SIGTERM)
  try:
    assert process.wait(timeout=300) == 128 + signal.SIGTERM
  finally:
    process.kill()


def test_handlers_are_put_back_and_outside_the_main_thread_none_is_installed():
  before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  with Interruption() as interruption:
    assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert not interruption.requested()
    interruption.check()
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
  assert signal.set_wakeup_fd(-1) == -1
  found = []

  def work():
    with Interruption() as interruption:
      found.append((interruption.requested(), signal.getsignal(signal.SIGTERM) is before[0]))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [(False, True)]
