"""Reads from the operating system how much memory this process has held at most."""

import pathlib
import resource
import sys

_STATUS = pathlib.Path("/proc/self/status")


def peak_resident_bytes() -> int:
  """Returns the peak resident memory of this process so far, in bytes.

  Linux tells it in `VmHWM` of /proc/self/status (proc_pid_status(5)). Its `ru_maxrss` is another figure: it outlives
  exec, so that a small program started by a large one reports the size of the large one (getrusage(2)); it is read
  only where the other is not to be had.
  """
  if _STATUS.exists():
    for line in _STATUS.read_text().splitlines():
      if line.startswith("VmHWM:"):
        return int(line.split()[1]) * 1024
  unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
