import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from kepo_jax.config import Config
from tests.conftest import ROOT
from tests.training.runs import lines

README = (ROOT / "README.md").read_text()


def test_every_target_and_field_of_the_readme_exists():
  makefile, config = (ROOT / "Makefile").read_text(), Config().fields()
  for target in re.findall(r"\bmake ([a-z-]+)", README):
    assert re.search(rf"^{target}:", makefile, re.M), target
  for section, field in re.findall(r"--config\.([a-z_]+)\.([a-z_]+)=", README):
    assert f"{section}.{field}" in config


MORE = """
from absl import flags
from experiments import export_checkpoint
flags.FLAGS(["export", f"--workdir={sys.argv[1]}", f"--output={sys.argv[1]}-export"])
export_checkpoint.main([])
print("reached", reached)
import contextlib, socket
with contextlib.suppress(OSError):  # as a library would, that goes on without an answer
  socket.create_connection(("127.0.0.1", 9), timeout=1)
print("reached", reached)
"""
# Audit events are raised inside the interpreter's own socket module, whoever calls it and whatever it catches.
WATCHED = """
import sys
reached = []
def watch(event, args):
  if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"):
    reached.append(f"{event} {args[1:] if event == 'socket.connect' else args}")
    raise OSError(f"the network is watched: {reached[-1]}")
sys.addaudithook(watch)
"""


@pytest.mark.slow
def test_the_example_trains_on_other_data_with_another_reward_and_reaches_for_no_network(tmp_path, rng):
  for split in ("train", "validation", "test"):
    for number in range(64):
      pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
      Image.fromarray(pixels).save(tmp_path / f"{split}-{number}.png")
  (program,) = [text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "kepo_jax.train(" in text]
  shortened = {'"runs/mine"': f'"{tmp_path}/run"', "images/": f"{tmp_path}/"}
  shortened |= {'"train.steps": 20': '"train.steps": 2, "mesh.data": 1'}
  for text, replacement in shortened.items():
    assert text in program
    program = program.replace(text, replacement)
  offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
  environment = {name: value for name, value in os.environ.items() if name not in offline} | {"PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-c", WATCHED + program + MORE, str(tmp_path / "run")]
  found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
  assert found.returncode == 0, found.stderr[-3000:]
  before, after = found.stdout.splitlines()[-2:]
  assert before == "reached []" and "socket.getaddrinfo ('127.0.0.1', 9" in after
  first, second = lines(tmp_path / "run" / "metrics.jsonl")
  assert (first["step"], second["step"]) == (1, 2) and 0 <= first["reward/brevity"] <= 1
  # accuracy + format + 0.2 brevity, in float32.
  total = first["reward/accuracy"] + first["reward/format"] + 0.2 * first["reward/brevity"]
  np.testing.assert_allclose(first["reward/mean"], total, rtol=1e-5)
  assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]["overall"]["count"] == 64
  for folder in ("run/model", "run-export"):
    assert (tmp_path / folder / "model.safetensors").exists() and (tmp_path / folder / "config.json").exists()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
  cells = json.loads((ROOT / "docs" / "demo.ipynb").read_text())["cells"]
  program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
  config = "settings.typed(kepo.get_config())"
  assert config in program
  program = program.replace(config, f'{config}.replace({{"train.steps": 5, "data.test_items": 4}})')
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-c", program]
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  assert "seven others" in done.stdout and "after the hint: " in done.stdout
