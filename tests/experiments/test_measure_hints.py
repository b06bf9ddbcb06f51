import json
import shutil

import numpy as np
import pytest
from absl.testing import flagsaver

from experiments import hints as hints_lib
from experiments.configs import kepo
from kepo_jax.types import Example, Rollouts
from tests.conftest import ROOT
from tests.experiments.test_evaluate_medvqa import checkpoint  # noqa: F401, a fixture
from tests.training.runs import changed

PHANTOM = ROOT / "experiments" / "assets" / "phantom"


@pytest.fixture
def measure_hints(program):
  return program("experiments.measure_hints")


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
    with pytest.raises(ValueError, match="do not match: num_position_embeddings 64 and 144"):
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


class Voice:
  """A model that is wrong without a hint and right with one, which makes each token likelier by one nat in logits."""

  WORDS = ("<think>x</think>", "<answer>", "A", "B", "</answer>", "<hint>look</hint>")
  SAYS = {"think": (0, 1, 3, 4), "hint_and_answer": (0, 1, 2, 4), "hint_request": (5, 5, 5, 5)}

  def __init__(self, **says):
    self.says, self.processor, self.temperatures = self.SAYS | says, self, {}

  def decode(self, tokens, mask):
    return ["".join(self.WORDS[token] for token in row[kept]) for row, kept in zip(tokens, mask, strict=True)]

  def rollouts(self, examples, kind, settings, key, *, hints=None, progress=None):
    self.temperatures[kind] = settings.temperature
    tokens = np.broadcast_to(np.array(self.says[kind], np.int32), (len(examples), settings.samples, 4))
    return Rollouts(tokens=tokens, mask=np.ones(tokens.shape, bool), logps=np.zeros(tokens.shape, np.float32))

  def logps(self, examples, kind, tokens, *, temperature, hints=None, progress=None):
    return np.full(tokens.shape, (0.0 if hints else -1.0) / temperature, np.float32)


def test_completions_are_scored_at_the_temperature_that_they_were_sampled_at():
  temperatures = {"sampling__temperature": 0.5, "exploration__hint_temperature": 0.25, "supervised__temperature": 0.75}
  config = changed(kepo, **temperatures)
  student, teacher = Voice(), Voice(think=Voice.SAYS["hint_and_answer"])
  asked = Example(id="q", question="?", options=("a", "b"), answer="A", images=(), modality="MRI")
  *_, found = hints_lib.measured(config, student, teacher, [asked])
  assert found["prompts"] == 1 and found["accept_rate"][-1] == 1
  assert found["reliance"] == found["gain"] == found["letter_gain"] == 1 / 0.5
  assert student.temperatures == {"think": 0.5, "hint_and_answer": 0.5}
  assert teacher.temperatures == {"hint_request": 0.25, "think": 0.75}
  *_, none = hints_lib.measured(config, student, Voice(hint_request=Voice.SAYS["think"]), [asked])
  assert (none["parse_failure_rate"], none["candidates"], none["reliance"]) == (1, 0, None)  # no hint can be read
