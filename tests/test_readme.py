"""The example of the README is a program: it runs as printed, on drawn images and for fewer steps."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from experiments.configs import kepo
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def block(containing: str) -> str:
  """The Python block of the README that contains some text."""
  (found,) = [text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if containing in text]
  return found


def test_every_target_and_field_of_the_readme_exists():
  makefile, config = (ROOT / "Makefile").read_text(), kepo.get_config()
  targets = set(re.findall(r"\bmake ([a-z-]+)", README))
  assert {"demo", "test"} <= targets
  assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)] == []
  fields = re.findall(r"--config\.([a-z_]+)\.([a-z_]+)=", README)
  assert len(fields) > 5
  assert [field for field in fields if field[1] not in config[field[0]]] == []


@pytest.mark.slow
def test_the_example_trains_on_other_data_with_another_reward(tmp_path, monkeypatch, rng):
  for split in ("train", "validation", "test"):
    for number in range(64):
      pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
      Image.fromarray(pixels).save(tmp_path / f"{split}-{number}.png")
  program = block("training.train")
  shortened = {
    '"runs/mine"': f'"{tmp_path}/run"',
    "images/": f"{tmp_path}/",
    "steps = 20": "steps = 2\nconfig.mesh.data = 1",
  }
  for text, replacement in shortened.items():
    assert text in program
    program = program.replace(text, replacement)
  monkeypatch.chdir(ROOT)
  exec(compile(program, "README.md", "exec"), {})  # noqa: S102
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2] and 0 <= lines[0]["reward/brevity"] <= 1
  # accuracy + format + 0.2 brevity, in float32.
  total = lines[0]["reward/accuracy"] + lines[0]["reward/format"] + 0.2 * lines[0]["reward/brevity"]
  np.testing.assert_allclose(lines[0]["reward/mean"], total, rtol=1e-5)
  assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]["overall"]["count"] == 64
  assert (tmp_path / "run" / "model" / "config.json").exists()
