"""The example of the README is a program: it runs as printed, on drawn images, for fewer steps, off the network."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from experiments.configs import kepo
from tests.conftest import ROOT
from tests.test_security import reached

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


MORE = """
from absl import flags
from experiments import export_checkpoint
flags.FLAGS(["export", f"--workdir={sys.argv[1]}", f"--output={sys.argv[1]}-export"])
export_checkpoint.main([])
"""


@pytest.mark.slow
def test_the_example_trains_on_other_data_with_another_reward_and_reaches_for_no_network(tmp_path, rng):
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
  assert reached(program + MORE, tmp_path / "run") == "reached []"
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2] and 0 <= lines[0]["reward/brevity"] <= 1
  # accuracy + format + 0.2 brevity, in float32.
  total = lines[0]["reward/accuracy"] + lines[0]["reward/format"] + 0.2 * lines[0]["reward/brevity"]
  np.testing.assert_allclose(lines[0]["reward/mean"], total, rtol=1e-5)
  assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]["overall"]["count"] == 64
  for folder in ("run/model", "run-export"):
    assert (tmp_path / folder / "model.safetensors").exists() and (tmp_path / folder / "config.json").exists()
