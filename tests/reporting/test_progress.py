import io

from rich.console import Console

from experiments.configs import gkd, grpo, sft_teacher
from kepo_jax.reporting import progress
from tests.reporting.cases import rollout, run_plan
from tests.training.runs import changed

METRICS = {"reward/mean": 1.5, "reward/accuracy": 0.75, "cliff_rate": 0.25, "gate/frac": 0.5,
           "hint/accept_rate@1": 0.2, "hint/accept_rate@10": 0.6, "hint/accept_rate@2": 0.4}  # fmt: skip
TIMING = {"tokens_per_second/step": 12345.6}


def start_lines(parent, start_step=0, memory=None, **changes):
  """Name -> text of the rows of the start panel; changes of the config of `parent` as `section__field=value`."""
  output, plan = io.StringIO(), run_plan(changed(parent, **changes), start_step=start_step)
  Console(file=output, width=300).print(progress.start_panel(plan, {}, memory))
  rows = [line.strip("│ \n") for line in output.getvalue().splitlines()[1:-1]]
  return {name: text.strip() for name, _, text in (row.partition("  ") for row in rows)}


def test_the_start_panel():
  lines = start_lines(grpo)
  assert lines["mesh"].endswith("(data 2, fsdp 4, tensor 1)") and lines["questions"] == "train 600, test 2,400"
  assert lines["reward"] == "med_r1: accuracy x 1, format x 1" and lines["exploration"] == "none"
  # A weight of rollouts that there are not is not shown.
  assert start_lines(sft_teacher, objective__policy_weight=1.0)["objective"] == "likelihood x 1"
  assert "62% of them by the teacher" in start_lines(gkd, batch__on_policy_fraction=0.375)["batch"]
  lines = start_lines(grpo, start_step=20, memory={"student": 3e9, "teacher": 0, "peak": 4.26e9})
  assert lines["steps"] == "80, from step 20; learning rate 0.0003"
  assert lines["memory"] == "about 4.26 GB per device at most (estimate: student 3 GB)"


def test_numbers_for_people():
  assert [progress.human_bytes(x) for x in (0, 999, 1500, 2e12)] == ["0 B", "999 B", "1.5 kB", "2 TB"]
  assert [progress.human_count(x) for x in (12, 842_000, 2.13e9, 33e9)] == ["12", "842 K", "2.13 B", "33 B"]
  assert [progress.human_time(x) for x in (4.4, 185, 7620)] == ["4 s", "3 min 05 s", "2 h 07 min"]


def test_rollouts_are_shown_with_their_question_once():
  output = io.StringIO()
  hint = {"kind": "hint", "step": 1, "id": "a", "text": "<hint> look left </hint>"}
  tried = {"kind": "candidate", "step": 1, "id": "a", "completion": "tried"}
  first, second = rollout(), rollout(completion="[bold]y", accuracy=1.0, gate=True, injected=True)
  samples = [hint, tried, first, hint, second, rollout(name="b", question="Where?"), first, first]
  Console(file=output, width=100).print(progress.samples_panel(samples, step=1))
  text = output.getvalue()
  assert text.count("How many?") == 2 and text.count("Where?") == 1  # four shown, the first again after "b"
  assert "accuracy 1 format 1 distilled injected" in text and "look left" not in text and "tried" not in text
  assert "[bold]y" in text  # completions are text, not markup


def display(**console):
  output = io.StringIO()
  ticks = iter(range(10_000))
  return progress.Display(Console(file=output, width=120, **console), clock=lambda: float(next(ticks))), output


def test_plain_lines_come_about_every_twentieth_of_the_run():
  shown, output = display()
  shown.begin(80)
  for step in range(1, 81):
    shown.step(step, METRICS, TIMING)
  lines = output.getvalue().splitlines()
  assert [line.split()[1] for line in lines] == ["1/80"] + [f"{step}/80" for step in range(4, 81, 4)]
  assert lines[1].endswith("1 min 16 s left")  # 76 steps of one second


def test_other_work_is_reported_by_quarters_and_stops_the_clock_of_the_steps():
  shown, output = display()
  shown.begin(100)
  shown.step(1, {}, {})
  for done in range(0, 101, 5):
    shown.progress("evaluation", done, 100)
  shown.step(2, {}, {})
  lines = output.getvalue().splitlines()
  assert [line.split()[1] for line in lines[1:]] == ["25/100", "50/100", "75/100", "100/100"]
  shown.step(5, {}, {})
  assert "1 min 35 s left" in output.getvalue()  # still one second per step


def test_a_terminal_gets_a_live_bar_and_ci_plain_lines(monkeypatch):
  monkeypatch.setenv("CI", "true")
  shown, output = display(force_terminal=True)
  shown.begin(1)
  shown.step(1, METRICS, TIMING)
  assert "step 1/1" in output.getvalue() and "\x1b[?25l" not in output.getvalue()
  monkeypatch.delenv("CI", raising=False)
  shown, output = display(force_terminal=True)
  shown.begin(10)
  shown.step(1, METRICS, TIMING)
  shown.warn("something is odd")
  shown.close()
  text = output.getvalue()
  assert "1/10" in text and "accuracy 0.75" in text and "something is odd" in text
  assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_names_are_shown_as_they_are_on_every_console(capsys):
  name = "runs/[/v2]/lr:x:[b]1"
  progress.terminal().print(name)
  assert capsys.readouterr().out.strip() == name
  output = io.StringIO()
  progress.Display(Console(file=output, width=99)).show(name)  # a caller's, which reads markup
  assert output.getvalue().strip() == name
