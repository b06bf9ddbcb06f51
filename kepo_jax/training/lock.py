"""One process per workdir, also in a bucket.

On a local folder the operating system keeps the lock and frees it when its process dies. A bucket has no such lock, and
some network file systems keep one for each host apart: there a record that the holder renews shows that it is alive.
Nothing compares clocks.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from typing import Any

import filelock
import fsspec
from absl import logging
from etils import epath

from kepo_jax import storage

NAME = "lock.json"
_BEAT = 10.0  # seconds
_SILENT = 3  # beats without a renewal after which a holder counts as dead
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems without locks


class WorkdirLock:
  """The lock of one workdir; held inside its block."""

  def __init__(self, workdir: epath.PathLike, *, beat: float = _BEAT, flag: str = "--workdir"):
    """Touches nothing before the block is entered.

    Args:
      workdir: exists when the block is entered.
      beat: seconds between renewals of the record.
      flag: command line flag that names another folder.
    """
    self._path = epath.Path(workdir) / NAME
    self._beat = beat
    self._flag = flag
    self._record: dict[str, Any] = {
      "token": secrets.token_hex(8),
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "beat": 0,
    }
    self._lost = ""
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._renew, name="workdir lock", daemon=True)
    self._remote = storage.is_remote(self._path)
    # Not the soft lock of filelock where the system has none: a killed process would leave it behind.
    self._file_lock = filelock.FileLock(os.fspath(self._path), thread_local=False, fallback_to_soft=False)

  def __enter__(self) -> "WorkdirLock":
    """Takes the lock.

    Raises:
      ValueError: another process holds it; names the process and the way out.
      OSError: the workdir cannot be written.
    """
    try:
      locked = not self._remote and self._lock_file()
      if holder := self._read():
        # Only a process of this host is sure to have ended when the system gives us its lock.
        if not (locked and _parsed(holder).get("host") == self._record["host"]):
          self._check_silent(holder)
        logging.warning("%s is that of a process that has ended; taking it over.", self._path)
        if self._remote:
          with storage.reaching(self._path):
            self._path.unlink(missing_ok=True)
      self._write(create=True)
    except BaseException:
      self._file_lock.release()
      raise
    self._thread.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._stop.set()
    if self._thread.is_alive():
      self._thread.join()
    with contextlib.suppress(OSError):
      if self._is_ours(self._read()):
        self._path.unlink()
    self._file_lock.release()

  def check(self) -> None:
    """Checks that no renewal has found the lock taken.

    Raises:
      ValueError: another process has taken it.
    """
    if self._lost:
      raise ValueError(self._lost)

  def check_now(self) -> None:
    """Reads the record and checks that the lock is still ours.

    Raises:
      ValueError: another process has taken it.
    """
    if not self._is_ours(record := self._read()):
      raise ValueError(f"{self._path.parent}: {_holder(record)} took it at the same moment; one per folder.")

  def _lock_file(self) -> bool:
    """Locks the file on this host; returns False where the file system has no locks."""
    try:
      self._file_lock.acquire(blocking=False)
    except filelock.Timeout:
      raise ValueError(self._in_use(self._read())) from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      return False
    return True

  def _check_silent(self, holder: str) -> None:
    """Watches the record of a holder for some beats.

    Raises:
      ValueError: it was renewed.
    """
    silence = _SILENT * self._beat
    logging.warning("%s names %s; watching it for %.0f s.", self._path, _holder(holder), silence)
    end = time.monotonic() + silence
    while time.monotonic() < end:
      time.sleep(min(1.0, self._beat))
      if (record := self._read()) and record != holder:
        raise ValueError(self._in_use(record))

  def _in_use(self, record: str) -> str:
    return (
      f"{self._path.parent} is in use by {_holder(record)}. Wait for it, stop it, or pass another {self._flag}. "
      f"If it is certainly gone, remove {self._path}."
    )

  def _renew(self) -> None:
    while not self._stop.wait(self._beat):
      try:
        record = self._read()
        if record and not self._is_ours(record):
          self._lost = f"{self._path} was taken by {_holder(record)}; this one stops before two write into one folder."
          return
        self._record["beat"] += 1
        self._write()
      except (OSError, ValueError) as error:  # storage, or credentials, that come back are no reason to stop
        logging.warning("the lock %s could not be renewed: %s", self._path, error)

  def _is_ours(self, record: str) -> bool:
    return _parsed(record).get("token") == self._record["token"]

  def _read(self) -> str:
    """Returns the record, "" where there is none."""
    try:
      with storage.reaching(self._path):
        return str(self._path.read_text())
    except (FileNotFoundError, UnicodeDecodeError):
      return ""

  def _write(self, *, create: bool = False) -> None:
    text = json.dumps(self._record)
    if not self._remote:
      self._path.write_text(text)  # in place: a renamed file would be another one than the one that is locked
    elif create:
      with storage.reaching(self._path):
        system, name = fsspec.url_to_fs(os.fspath(self._path))
        try:
          system.pipe_file(name, text.encode(), mode="create")  # in Google's buckets, `ifGenerationMatch=0`
        except FileExistsError:
          raise ValueError(self._in_use(self._read())) from None
    else:
      storage.write_text(self._path, text)


def _parsed(record: str) -> dict[str, Any]:
  try:
    fields = json.loads(record)
  except ValueError:
    return {}
  return fields if isinstance(fields, dict) else {}


def _holder(record: str) -> str:
  fields = _parsed(record)
  return f"process {fields.get('pid', '?')} on {fields.get('host', 'an unknown host')}"
