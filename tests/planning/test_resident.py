"""The most memory of a process: its own, whoever started it."""

import subprocess
import sys

import pytest

from kepo_jax.planning import resident

READ = "from kepo_jax.planning import resident; print(resident.peak_resident_bytes())"
HOLD = "held = b'x' * 300_000_000; "


def peak_of(program: str) -> int:
  return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_what_was_held_and_given_back_counts_and_the_parent_does_not():
  small, large = peak_of(READ), peak_of(f"{HOLD}del held; {READ}")
  assert 1e6 < small < 1e8
  assert 2.9e8 < large - small < 3.1e8
  child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {READ!r}], check=True)"
  assert peak_of(HOLD + child) < 1e8


def test_the_figure_of_proc_is_read_and_without_it_that_of_getrusage(monkeypatch, tmp_path):
  exact = resident.peak_resident_bytes()
  monkeypatch.setattr(resident, "_STATUS", tmp_path / "status")
  # Inherited over exec, so no smaller.
  assert resident.peak_resident_bytes() >= 0.99 * exact
  (tmp_path / "status").write_text("Name:\tpython\nVmPeak:\t   300 kB\nVmHWM:\t   200 kB\nVmRSS:\t   100 kB\n")
  assert resident.peak_resident_bytes() == 200 * 1024
