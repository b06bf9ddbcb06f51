import io

from rich.console import Console

from kepo_jax.reporting.progress import Display, figures_line, terminal

METRICS = {"reward/mean": 1.5, "reward/accuracy": 0.75, "cliff_rate": 0.25, "gate/frac": 0.5,
           "hint/accept_rate@1": 0.2, "hint/accept_rate@10": 0.6, "hint/accept_rate@2": 0.4}  # fmt: skip
TIMING = {"tokens_per_second/step": 12345.6}


def display(**console):
  output = io.StringIO()
  ticks = iter(range(10_000))
  return Display(Console(file=output, width=120, **console), clock=lambda: float(next(ticks))), output


def test_the_figures_of_a_step():
  expected = "reward 1.50  accuracy 0.75  cliff 0.25  gate 0.50  hints accepted 0.60  12,346 tokens/s"
  assert figures_line(METRICS, TIMING) == expected
  assert figures_line({"supervised/nll": 0.69315, "lr": 1e-4}, TIMING) == "nll 0.693  12,346 tokens/s"


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
  terminal().print(name)
  assert capsys.readouterr().out.strip() == name
  output = io.StringIO()
  Display(Console(file=output, width=99)).show(name)  # a caller's, which reads markup
  assert output.getvalue().strip() == name
