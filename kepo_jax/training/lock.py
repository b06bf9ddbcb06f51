"""One process per workdir: a lock that is an object with a beating heart, so that it works on any storage.

Nothing compares clocks. A holder on the same machine is looked up among its processes; one elsewhere is alive if its
beat changes while we watch.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath

from kepo_jax import storage

NAME = "lock.json"
_BEAT = 10.0  # seconds
_SILENT = 3  # beats without a sign of life after which a holder elsewhere counts as dead
_SETTLE = 2.0  # seconds until a write of a rival would be seen, where nobody can be kept out meanwhile


class WorkdirLock:
  """The lock of one workdir; held inside its block."""

  def __init__(self, workdir: epath.PathLike, *, beat: float = _BEAT, flag: str = "--workdir"):
    """Nothing is touched before the block is entered.

    Args:
      workdir: exists when the block is entered.
      beat: seconds between signs of life.
      flag: what names another folder.
    """
    self._path = epath.Path(workdir) / NAME
    self._beat = beat
    self._flag = flag
    self._record: dict[str, Any] = {"token": secrets.token_hex(8), **_identity(), "beat": 0}
    self._lost = ""
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._keep, name="workdir lock", daemon=True)

  def __enter__(self) -> "WorkdirLock":
    """Takes the lock.

    Raises:
      ValueError: another process holds it; says which.
      OSError: the workdir cannot be written.
    """
    with self._alone() as alone:
      held = self._read()
      if held is not None:
        self._check_dead(held)
        logging.warning("%s is that of a process that has ended; taking it over.", self._path)
      if held is None and not storage.is_remote(self._path):
        self._create()
      else:
        self._write()
    if not alone:
      # Whoever wrote last has it: read after everybody who saw the same state has written.
      time.sleep(_SETTLE)
    self.check_now()
    self._thread.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._stop.set()
    if self._thread.is_alive():
      self._thread.join()
    with contextlib.suppress(OSError):
      if _token(self._read()) == self._record["token"]:
        self._path.unlink()

  def check(self) -> None:
    """Makes sure that the lock is still ours.

    Raises:
      ValueError: another process has taken it.
    """
    if self._lost:
      raise ValueError(self._lost)

  def check_now(self) -> None:
    """`check`, looking at the lock itself.

    Raises:
      ValueError: another process has taken it.
    """
    found = self._read()
    if _token(found) != self._record["token"]:
      raise ValueError(f"{self._path.parent}: {_who(found)} took it at the same moment; one per folder.")

  @contextlib.contextmanager
  def _alone(self) -> Iterator[bool]:
    """Keeps others on this machine from looking at the lock until it is written; false where storage cannot do that.

    The system lets go of it when a process dies, so that nothing is left behind.
    """
    with contextlib.ExitStack() as stack:
      alone = False
      if not storage.is_remote(self._path):
        descriptor = os.open(self._path.parent, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        with contextlib.suppress(OSError):  # some network file systems
          fcntl.flock(descriptor, fcntl.LOCK_EX)
          alone = True
      yield alone

  def _create(self) -> None:
    try:
      descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
      raise ValueError(f"{self._path.parent}: another process took it at the same moment; one per folder.") from None
    with os.fdopen(descriptor, "w") as file:
      file.write(json.dumps(self._record))

  def _check_dead(self, held: str) -> None:
    record = _parsed(held)
    refused = (
      f"{self._path.parent} is in use by {_who(held)}. Wait for it, stop it, or pass another {self._flag}. "
      f"If it is certainly gone, remove {self._path}."
    )
    if all(record.get(name) == self._record[name] for name in ("host", "boot", "namespace")):
      if _alive(record):
        raise ValueError(refused)
      return
    silence = _SILENT * self._beat
    logging.warning("%s names %s; watching it for %.0f s.", self._path, _who(held), silence)
    end = time.monotonic() + silence
    while time.monotonic() < end:
      time.sleep(min(1.0, self._beat))
      now = self._read()
      if now is not None and now != held:
        raise ValueError(refused)

  def _keep(self) -> None:
    while not self._stop.wait(self._beat):
      try:
        found = self._read()
        if found is not None and _token(found) != self._record["token"]:
          self._lost = f"{self._path} was taken by {_who(found)}; this one stops before two write into one folder."
          return
        self._record["beat"] += 1
        self._write()
      except (OSError, ValueError) as error:  # storage, or credentials, that come back are no reason to stop
        logging.warning("the lock %s could not be renewed: %s", self._path, error)

  def _read(self) -> str | None:
    try:
      with storage.reaching(self._path):
        return self._path.read_text()
    except FileNotFoundError:
      return None
    except UnicodeDecodeError:
      return ""

  def _write(self) -> None:
    storage.write_text(self._path, json.dumps(self._record))


def _identity() -> dict[str, Any]:
  """What tells this process from any other: host, boot, process namespace, number and start."""
  return {
    "host": socket.gethostname(),
    "boot": _proc("sys/kernel/random/boot_id"),
    "namespace": _namespace(),
    "pid": os.getpid(),
    "started": _started(os.getpid()),
  }


def _alive(record: dict[str, Any]) -> bool:
  pid = record.get("pid")
  if not isinstance(pid, int) or pid <= 0:
    return False
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass  # it exists and belongs to somebody else
  return bool(_started(pid) == record.get("started"))  # otherwise a later process has got its number


def _started(pid: int) -> str:
  """When a process started, in ticks since boot; "" where the system does not say."""
  fields = _proc(f"{pid}/stat").rpartition(")")[2].split()
  # A process that has ended and was not yet waited for holds nothing any more.
  return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def _proc(name: str) -> str:
  try:
    return (pathlib.Path("/proc") / name).read_text().strip()
  except OSError:
    return ""


def _namespace() -> str:
  try:
    return os.readlink("/proc/self/ns/pid")
  except OSError:
    return ""


def _parsed(text: str | None) -> dict[str, Any]:
  try:
    record = json.loads(text or "")
  except ValueError:
    return {}
  return record if isinstance(record, dict) else {}


def _token(text: str | None) -> Any:
  return _parsed(text).get("token")


def _who(text: str | None) -> str:
  record = _parsed(text)
  return f"process {record.get('pid', '?')} on {record.get('host', 'an unknown host')}"
