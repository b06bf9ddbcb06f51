import io
import json

from rich.console import Console

from experiments.configs import kepo
from kepo_jax import reporting, types
from kepo_jax.models.qwen3_vl.config import SIZES
from kepo_jax.reporting import progress
from tests.reporting.cases import rollout, run_plan
from tests.reporting.test_curves import evaluation
from tests.training.runs import changed


def make_plan(workdir):
  models = {"student": SIZES["Qwen3-VL-2B"], "teacher": SIZES["Qwen3-VL-8B"]}
  return run_plan(changed(kepo, train__steps=4), workdir=str(workdir), models=models)


def report(step):
  metrics = {"reward/mean": step / 7, "reward/accuracy": 0.5, "reward/format": 0.0, "cliff_rate": 0.25}
  timing = {"seconds/step": 0.1, "tokens_per_second/step": 99.0}
  return types.StepReport(step=step, metrics=metrics, timing=timing, samples=(rollout(step),))


def follow(workdir):
  """Plays a run of four steps to a reporter; returns what was shown."""
  output = io.StringIO()
  reporter = reporting.RunReporter(console=Console(file=output, width=110))
  reporter.progress("loading", 1, 1)
  reporter.start(make_plan(workdir))
  for step in range(1, 5):
    reporter.step(report(step))
    if step % 2 == 0:
      reporter.evaluation(step, "validation", evaluation(0.25 + step / 8))
  assert reporter.position().keys() in ({"metrics.jsonl", "timing.jsonl", "samples.jsonl"}, set())
  reporter.evaluation(4, "after", evaluation(0.7))
  reporter.finish()
  return output.getvalue()


def test_a_plan_that_does_not_fit_is_told_before_the_first_step(monkeypatch):
  monkeypatch.setattr(progress, "device_bytes", lambda: 5_000_000_000)
  for peak, warns in ((6e9, True), (4e9, False)):
    output = io.StringIO()
    plan = {"student": 3e9, "teacher": 1e9, "update": 2e9, "hints": 1.0, "peak": peak}
    reporter = reporting.RunReporter(memory=lambda _, plan=plan: plan, console=Console(file=output, width=300))
    reporter.start(make_plan(""))
    assert ("it will not fit. Raise batch.micro_batches" in output.getvalue()) == warns
    assert progress.largest_parts(reporter.memory) == "student 3 GB, update 2 GB, teacher 1 GB"


def test_a_run_leaves_its_figures_samples_and_report(tmp_path):
  (tmp_path / "evaluation.json").write_text(json.dumps({"before": evaluation(0.4), "after": evaluation(0.7)}))
  shown = follow(tmp_path)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4]
  of_validation = {"validation/in_domain": 0.5, "validation/out_of_domain": 0.4, "validation/overall": 0.5}
  assert lines[2] == {"step": 2} | of_validation
  assert "seconds/step" not in (tmp_path / "metrics.jsonl").read_text()
  for name in ("timing.jsonl", "samples.jsonl"):
    assert len((tmp_path / name).read_text().splitlines()) == 4, name
  assert {path.name for path in (tmp_path / "report").iterdir()} == {
    "index.html", "curves.png", "modalities.png", "question_types.png", "accuracy.md",
  }  # fmt: skip
  assert list((tmp_path / "tensorboard").glob("events*"))
  assert shown.count("How many?") == 1  # the samples of the first step alone
  assert "step 4/4" in shown and "70.0 [65.0, 75.0]" in shown


def test_only_the_first_host_shows_and_writes(tmp_path, monkeypatch):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  assert follow(tmp_path) == ""
  assert list(tmp_path.iterdir()) == []


def test_warnings_reach_the_terminal_once(said):
  output = io.StringIO()
  reporter = reporting.RunReporter(console=Console(file=output, width=300))
  reporter.start(make_plan(""))
  for step in range(1, 31):
    reporter.step(report(step))  # format is 0 throughout
  assert output.getvalue().count("#format-at-zero") == 1
  assert "#format-at-zero" not in said.text  # the display and the log share standard error
