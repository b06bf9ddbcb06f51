"""Processes that tests start."""

import contextlib
import os
import socket
import subprocess
import sys

from tests.conftest import ROOT


def free_address():
  """HOST:PORT that nobody listens at."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"


@contextlib.contextmanager
def started(folder, *commands, devices, environ=({}, {})):
  """Processes `python -m COMMAND` with virtual devices, whose logs go to FOLDER/N.log; ended with the block."""
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last count holds
  base = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
  with contextlib.ExitStack() as stack:
    processes = []
    for number, command in enumerate(commands):
      log = stack.enter_context((folder / f"{number}.log").open("a"))
      settings = {"env": base | {"XLA_FLAGS": flags} | environ[number], "stdin": subprocess.PIPE}
      processes.append(
        subprocess.Popen([sys.executable, "-m", *map(str, command)], cwd=ROOT, stdout=log, stderr=log, **settings)
      )
      stack.callback(processes[-1].wait)
      stack.callback(processes[-1].kill)
    yield processes


def logs(folder):
  return "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("*.log")))
