import itertools
import json

import pytest
from PIL import Image

from experiments.configs import kepo
from kepo_jax import evaluation, reporting
from kepo_jax.reporting import pages, reporter, run_page
from tests.evaluation.scripted import json_lines, output
from tests.reporting.cases import HOSTILE, Document, rollout
from tests.training.runs import changed


def outputs(right):
  """Twelve test questions of two modalities, of which the first ones are answered right."""
  texts = itertools.cycle(HOSTILE)
  return [output(f"t{n}", correct=n < right, modality=("MRI", "CT")[n % 2], completion=next(texts)) for n in range(12)]


def make_run(root, *, steps=4, done=4):
  """The folder of a run of two questions a step, one of them helped by a hint."""
  config = changed(kepo, train__steps=steps)
  root.mkdir(parents=True)
  (root / "config.json").write_text(config.to_json())
  Image.new("L", (6, 6), 90).save(root / "image.png")
  shown = {"images": [str(root / "image.png")]}
  records = [
    record
    for step in range(1, done + 1)
    for record in (
      rollout(step, "easy", 0, accuracy=1.0, gate=True, **shown), rollout(step, "easy", 1, accuracy=0.0, **shown),
      rollout(step, "hard", 0, accuracy=0.0), rollout(step, "hard", 1, accuracy=1.0, injected=True, hint="look left"),
    )
  ]  # fmt: skip
  (root / "samples.jsonl").write_text(json_lines(records))
  metrics = [{"step": step, "reward/accuracy": 0.5, "cliff_rate": 0.5, "loss": 0.1} for step in range(1, done + 1)]
  (root / "metrics.jsonl").write_text(json_lines(metrics))
  before, after = (evaluation.summarised(outputs(right)) for right in (3, 9))
  (root / "outputs").mkdir()
  (root / "outputs" / "before.jsonl").write_text(json_lines(outputs(3)))
  stored = {"before": before, "validation": [after | {"step": 2}]}
  if done == steps:
    stored["after"] = after
    (root / "outputs" / "after.jsonl").write_text(json_lines(outputs(9)))
  (root / "evaluation.json").write_text(json.dumps(stored))
  return root


@pytest.fixture
def undrawn(monkeypatch):
  """Figures that are not drawn, which takes most of the time of a page."""

  def block(figure, **fields):
    return pages.FigureBlock(image=b"<svg/>", media="image/svg+xml", **fields)

  monkeypatch.setattr(pages, "figure_block", block)
  monkeypatch.setattr(reporter, "_write_figures", lambda root, report: {"before": {}})


def page_of(root):
  return Document(pages.rendered(run_page.run_page(root)))


def test_a_finished_run_has_everything(tmp_path):
  root = make_run(tmp_path / "first")
  reporting.write_report(root)
  document = Document((root / "report" / "index.html").read_text(encoding="utf-8"))
  assert document.inside("h1") == ["Run first"] and "4 steps" in document.inside("p")
  assert document.inside("h2") == ["Plan", "Accuracy", "Training", "Questions"]
  # Of MRI's questions 0, 2, .. 10 right are 0 and 2 before, 0, 2, .. 8 after.
  assert document.inside("dd")[0] == "33.3 → 83.3\u00a0%" and "6 questions" in document.inside("dd")[1]
  assert "83.3 [43.6, 97.0]" in document.inside("td") and len(document.all("img")) == 4
  data = document.data()
  assert len(data["samples"]) == 8 + 12 and len(data["images"]) == 1
  outcomes = {record["id"]: record["outcome"] for record in data["samples"]}
  assert outcomes["hard"] == "all wrong (cliff)" and outcomes["easy"] == "mixed"
  assert [outcomes[f"t{n}"] for n in (0, 5, 11)] == ["right → right", "wrong → right", "wrong → wrong"]
  assert (root / "report" / "index.html").read_bytes() == pages.rendered(run_page.run_page(root)).encode()


def test_what_is_missing_is_left_out(tmp_path, undrawn):
  headings = ["Plan", "Accuracy", "Training", "Questions"]
  for missing, left_out in {
    "config.json": "Plan", "evaluation.json": "Accuracy", "metrics.jsonl": "Training", "samples.jsonl": "",
    "outputs/before.jsonl": "", "outputs/after.jsonl": "", "image.png": "",
  }.items():  # fmt: skip
    root = make_run(tmp_path / missing)
    (root / missing).unlink()
    document = page_of(root)
    assert document.inside("h2") == [heading for heading in headings if heading != left_out], missing
    assert document.data()["samples"], missing
  (root / "config.json").write_text('{"train": {"steps": 4}, "seed": 0}')  # of another version
  assert page_of(root).inside("h2") == headings[1:]
  (tmp_path / "empty").mkdir()
  assert page_of(tmp_path / "empty").inside("h2") == []


def test_a_page_that_cannot_be_made_costs_nothing_else(tmp_path, undrawn, said):
  for name, text in (
    ("samples.jsonl", "no JSON\n{}\n"),
    ("outputs/after.jsonl", '{"id": 3, "correct": true}\n'),
    ("config.json", '{"train": 5}'),
  ):
    root = make_run(tmp_path / name)
    (root / name).write_text(text)
    said.clear()
    with said.at_level("WARNING"):
      assert reporting.write_report(root) == {"before": {}}, text
    assert "report/index.html could not be made" in said.text and not any((root / "report").iterdir()), text


def test_warnings_are_found_again():
  healthy = [{"step": step, "reward/format": 0.5, "loss": 0.1} for step in range(1, 31)]
  assert run_page.warnings_of(healthy) == []
  (message,) = run_page.warnings_of([*healthy, {"step": 31, "loss": None}])  # null is what is not finite
  assert "#divergence" in message
  shares = (0.01, 0.03, 0.05)
  falling = [{"step": 31, "validation/in_domain": x, "validation/out_of_domain": 0.6 - x} for x in shares]
  (message,) = run_page.warnings_of([*healthy, *falling])
  assert "#forgetting" in message


def test_an_unfinished_run_shows_how_far_it_is_and_warnings_on_top(tmp_path, undrawn):
  root = make_run(tmp_path / "run", steps=40, done=3)
  assert "3 of 40 steps" in page_of(root).inside("p")
  (root / "metrics.jsonl").write_text(json_lines({"step": n, "reward/format": 0.0} for n in range(1, 21)))
  assert page_of(root).inside("h2")[0] == "Warnings"
