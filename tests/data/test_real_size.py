"""As many records as OmniMedVQA has: indexed in seconds, in less memory than a checkpoint."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.data import real_size

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_89000_records(tmp_path, capsys):
  assert real_size.write(tmp_path) == 89_000
  # In a process of its own: peak memory is that of the process.
  command = [sys.executable, "-m", "tests.data.real_size", str(tmp_path)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
  figures = json.loads(done.stdout)
  with capsys.disabled():
    print(f"\n89,000 records: read in {figures['read_s']:.1f} s, cut in {figures['cut_s']:.1f} s")
    print(f"peak {figures['peak_bytes'] / 1e6:.0f} MB, {figures['before_bytes'] / 1e6:.0f} MB of it imports")
  assert (figures["files"], figures["records"], figures["kept"]) == (42, 89_000, 89_000)
  assert figures["parts"] == {"train": 600, "validation": 320, "test": 2400}
  assert figures["read_s"] + figures["cut_s"] < 60 and figures["peak_bytes"] < 1e9  # 6 s when nothing else runs
