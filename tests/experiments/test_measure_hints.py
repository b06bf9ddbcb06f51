import json
import shutil

import pytest
from absl.testing import flagsaver

from tests.conftest import ROOT
from tests.experiments.test_evaluate_medvqa import checkpoint  # noqa: F401, a fixture

PHANTOM = ROOT / "experiments" / "assets" / "phantom"


def test_figures_are_not_written_over(measure_hints, tmp_path):
  path = tmp_path / "figures.json"
  path.write_text("{}")
  with flagsaver.flagsaver(output=str(path), student="nowhere"):
    with pytest.raises(ValueError, match=r"figures.json exists; choose another --output, or pass --overwrite"):
      measure_hints.main([])
    with flagsaver.flagsaver(overwrite=True), pytest.raises(ValueError, match="nowhere"):
      measure_hints.main([])


def test_flags_and_folder_make_the_config(measure_hints, tmp_path):
  chosen = {"hint_prompt": "hint_only", "samples": 3, "rounds": 2, "candidates": 4, "seed": 7, "data": "here"}
  with flagsaver.flagsaver(**chosen, lenient=True):
    config = measure_hints.settings_for(PHANTOM / "confused")
  explored = config.exploration
  assert (explored.hint_prompt, explored.rounds, explored.candidates) == ("hint_only", 2, 4)
  assert (config.batch.rollouts, config.seed, config.data.directory, config.data.lenient) == (3, 7, "here", True)
  # As a run with these models has them.
  assert (config.data.templates, config.data.resize, explored.hint_tokens) == ("brief", "native", 24)
  shutil.copy(PHANTOM / "confused" / "config.json", tmp_path)  # as published ones: no wordings in tokenizer_config.json
  config = measure_hints.settings_for(tmp_path)
  assert (config.data.templates, config.data.resize) == ("standard", "squash384")
  assert (config.exploration.hint_tokens, config.sampling.max_new_tokens) == (256, 1024)
  assert (config.batch.rollouts, config.exploration.rounds, config.exploration.candidates) == (8, 5, 2)


def test_a_stranger_as_a_teacher_is_refused(measure_hints, checkpoint, tmp_path):  # noqa: F811
  stranger = tmp_path / "stranger"
  shutil.copytree(checkpoint, stranger)
  settings = json.loads((stranger / "config.json").read_text())
  settings["vision_config"]["num_position_embeddings"] = 144
  (stranger / "config.json").write_text(json.dumps(settings))
  with flagsaver.flagsaver(student=str(checkpoint), teacher=str(stranger), output=str(tmp_path / "figures.json")):
    with pytest.raises(ValueError, match="do not match: .*num_position_embeddings 64 and 144"):
      measure_hints.main([])


@pytest.mark.slow
def test_the_phantom_models(measure_hints, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where the benchmark is drawn
  path = tmp_path / "figures.json"
  with flagsaver.flagsaver(output=str(path), limit=5, batch=40, rounds=2):
    measure_hints.main([])
  everything = json.loads(path.read_text())["records"][-1]
  assert (everything["student"], everything["teacher"]) == ("confused", "weak")
  assert everything["questions"] == 40 and 5 <= everything["prompts"] <= 25
  assert everything["accept_rate"][1] > 0.6 and everything["positive_rate"] > 0.3
  assert 0.05 < everything["reliance"] < 1 and everything["gain"] > 0
