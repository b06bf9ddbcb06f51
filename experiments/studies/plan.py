"""What is compared: the studies, their methods, pairs of models and seeds.

A study is a few lines: methods, each a config file and the fields in which it differs from it. Add one to STUDIES and
`python -m experiments.reproduce --study=NAME` runs it.
"""

import dataclasses
import importlib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from experiments import settings
from experiments.configs import grpo
from kepo_jax.config import Config

_NOTHING: Mapping[str, Any] = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Method:
  """One line of a table."""

  name: str  # in files and folders
  label: str  # in tables and figures
  config: str = ""  # file of configs/; empty: a model that is only evaluated
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # fields of the config
  measures: str = ""  # hint prompt under which the teacher's hints are measured, without training
  times: int = 1  # steps, as a multiple of those of the config
  kind: str = "evaluation"  # wording of the questions to a model that is only evaluated
  rate_of: str = ""  # method of the main study whose chosen learning rate it uses; empty: it has a grid of its own

  @property
  def trained(self) -> bool:
    """Says whether there is something to train."""
    return bool(self.config)


START, TEACHER = Method("start", "start"), Method("teacher", "teacher")
# What `sft` starts from, which is asked for the answer alone.
START_PLAIN = Method("start-no_think", "start, asked for the answer alone", kind="no_think")
UNTRAINED = tuple(method.name for method in (START, START_PLAIN, TEACHER))


@dataclasses.dataclass(frozen=True)
class Pair:
  """Who learns, and from whom: names of models of a benchmark."""

  student: str
  teacher: str

  def __str__(self) -> str:
    return f"{self.student}, {self.teacher}"


@dataclasses.dataclass(frozen=True)
class Study:
  """What is compared with what."""

  name: str
  title: str
  asks: str  # the question, in a sentence
  notes: str  # what a reader should know of its figures
  methods: Sequence[Method]
  references: Sequence[str]  # methods that the others are compared with
  others: Sequence[str] = ()  # methods that also run on the other pairs of a benchmark, at the rates of the first one
  hints: bool = False  # whether the hints themselves are measured

  def only(self, names: Iterable[str]) -> "Study":
    """Keeps only the named methods."""
    return dataclasses.replace(self, methods=[method for method in self.methods if method.name in set(names)])


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Questions and models; the first pair is the one that every study runs on."""

  name: str
  setting: str  # of experiments/settings.py
  models: Mapping[str, str]  # name -> folder or Hub id
  pairs: Sequence[Pair]
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # fields of every config
  unseen: Sequence[str] = ()  # modalities that no model has seen in its own training
  # Fingerprints of models and questions, where paths name them: of `runs.identity_of`.
  identity: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

  @property
  def rates(self) -> tuple[float, ...]:
    """Returns the grid of learning rates, the same for every method."""
    return settings.LEARNING_RATES[self.setting]


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run, or one model that is only evaluated."""

  method: Method
  pair: Pair
  learning_rate: float | None = None
  seed: int | None = None

  @property
  def name(self) -> str:
    """Names the cell for progress and messages: "kepo-tau1 (confused, weak) rate 0.0003 seed 2"."""
    rate = f" rate {self.learning_rate:g} seed {self.seed}" if self.method.trained else ""
    return f"{self.method.name} ({self.pair}){rate}"


# Of runs that take a minute: curves with more points, and no checkpoints but the last, since they are run again.
_SHORT = {"eval.every": 10, "checkpoint.every": 0, "checkpoint.keep": 1, "checkpoint.best": "none"}


def phantom(overrides: Mapping[str, Any] = _NOTHING) -> Benchmark:
  """Returns the embedded benchmark with four pairs, and fields of every config; no model has seen fundus pictures."""
  names = ("confused", "noisy", "weak", "strong")
  return Benchmark(
    name="phantom",
    setting="phantom",
    models={name: f"experiments/assets/phantom/{name}" for name in names},
    pairs=[Pair(student, teacher) for student in names[:2] for teacher in names[2:]],
    overrides={**_SHORT, **overrides},
    unseen=("Fundus",),
  )


def omnimedvqa(student: str, teacher: str, directory: str, overrides: Mapping[str, Any] = _NOTHING) -> Benchmark:
  """Returns the paper's benchmark, from a folder in a format of docs/data.md, and fields of every config."""
  return Benchmark(
    name="omnimedvqa",
    setting="medvqa",
    models={"student": student, "teacher": teacher},
    pairs=[Pair("student", "teacher")],
    overrides={"data.directory": directory, **overrides},
  )


def config_of(cell: Cell, benchmark: Benchmark) -> Config:
  """Builds the whole config of a cell that is trained."""
  module = importlib.import_module(f"experiments.configs.{cell.method.config}")
  return settings.typed(module.get_config(benchmark.setting)).replace(fields_of(cell, benchmark))


def fields_of(cell: Cell, benchmark: Benchmark) -> dict[str, Any]:
  """Collects the fields of a cell's config that differ from its file."""
  plain = plain_config(benchmark)
  steps = cell.method.times * plain.train.steps
  return {
    "seed": cell.seed,
    "model.student": benchmark.models[cell.pair.student],
    "model.teacher": benchmark.models[cell.pair.teacher],
    "optimizer.learning_rate": cell.learning_rate,
    "eval.before": False,  # the same weights for every run: the method "start" stands for them
    **benchmark.overrides,
    **cell.method.overrides,
    "train.steps": steps,
    "eval.every": max(
      every for every in range(1, plain.eval.every + 1) if steps % every == 0
    ),  # the last step included
  }


def parent_config(benchmark: Benchmark) -> Config:
  """Loads grpo.py in the setting of a benchmark."""
  return settings.typed(grpo.get_config(benchmark.setting))


def plain_config(benchmark: Benchmark) -> Config:
  """Loads the parent of every config of a benchmark: what does not depend on the method."""
  return parent_config(benchmark).replace(benchmark.overrides)


def grid(study: Study, benchmark: Benchmark, seeds: int) -> Iterator[Cell]:
  """Yields the runs that choose the learning rate of each method with a grid, on the first pair."""
  wanted = {m.name: m for m in study.methods if m.trained and not m.rate_of}
  wanted |= {m.rate_of: MAIN_METHODS[m.rate_of] for m in study.methods if m.rate_of}
  for method in wanted.values():
    for rate in benchmark.rates:
      for seed in GRID_SEEDS[:seeds]:
        yield Cell(method, benchmark.pairs[0], rate, seed)


def measured(study: Study, benchmark: Benchmark) -> Iterator[Cell]:
  """Yields the measurements of hints that a study needs: under both hint prompts, for every pair."""
  for pair in benchmark.pairs if study.hints else ():
    for prompt in HINT_PROMPTS:
      yield Cell(Method(f"hints-{prompt}", prompt, measures=prompt), pair)


def finals(study: Study, benchmark: Benchmark, seeds: int, rates: Mapping[str, float]) -> Iterator[Cell]:
  """Yields the runs that count; models that are only evaluated come last.

  Args:
    study: of the table.
    benchmark: of the questions.
    seeds: runs of each method.
    rates: method -> its learning rate; a method without one is left out.
  """
  for pair in benchmark.pairs if study.others else benchmark.pairs[:1]:
    chosen = [m for m in study.methods if pair == benchmark.pairs[0] or m.name in study.others]
    for method in sorted(chosen, key=lambda m: not m.trained):
      if not method.trained:
        yield Cell(method, pair)
      elif rate := rates.get(method.rate_of or method.name):
        for seed in range(seeds):
          yield Cell(method, pair, rate, seed)


HINT_PROMPTS = ("hint_and_answer", "hint_only")
# Seeds of the runs that choose a learning rate. They are not among those that count: what was chosen for being the best
# of several would look better than it is.
GRID_SEEDS = (100, 101)
# Raise it when defaults or algorithms change the results of runs. A run is identified by what differs from the
# defaults, so nothing else would notice; tests/experiments/studies/test_plan.py checks the defaults.
REVISION = 1

_MAIN = (
  START,
  START_PLAIN,
  TEACHER,
  Method("sft", "SFT, gold answers", "sft"),
  Method("sft_teacher", "SFT, teacher's answers", "sft_teacher"),
  Method("grpo", "GRPO", "grpo"),
  Method("grpo-long", "GRPO, twice the steps", "grpo", times=2, rate_of="grpo"),
  Method("rloo", "RLOO", "rloo"),
  Method("gkd-0", "GKD, 0 % on-policy", "gkd", {"batch.on_policy_fraction": 0.0}),
  Method("gkd-0.5", "GKD, 50 % on-policy", "gkd", {"batch.on_policy_fraction": 0.5}),
  Method("gkd-1", "GKD, on-policy", "gkd"),
  Method("kepo_ke-tau0", "KEPO without hints, τ = 0", "kepo_ke", {"objective.gate_threshold": 0.0}),
  Method("kepo_ke-tau1", "KEPO without hints, τ = 1", "kepo_ke"),
  Method("kepo-tau0", "KEPO, τ = 0", "kepo", {"objective.gate_threshold": 0.0}),
  Method("kepo-tau1", "KEPO, τ = 1", "kepo"),
)
MAIN_METHODS = {method.name: method for method in _MAIN}


def _variant(
  name: str, label: str, overrides: Mapping[str, Any], *, config: str = "kepo", rate_of: str | None = None
) -> Method:
  """Returns KEPO with other fields, by default at the rate that it has in the main study; "" for a grid of its own."""
  like = "kepo_ke-tau1" if config == "kepo_ke" else "kepo-tau1"
  return Method(name, label, config, overrides, rate_of=like if rate_of is None else rate_of)


def _tau(signal: str, threshold: float, *, swapped: bool = False) -> Method:
  """Returns a gate at the rate of KEPO with that threshold, or, swapped, with the other one."""
  fields = {"objective.gate_signal": signal, "objective.gate_threshold": threshold}
  rate_of = "kepo-tau1" if bool(threshold) != swapped else "kepo-tau0"
  name, label = f"{signal}-{threshold:g}", f"{signal}, τ = {threshold:g}"
  if swapped:
    name, label = f"{name}-swapped", f"{label}, rate of τ = {1 - threshold:g}"
  return _variant(name, label, fields, rate_of=rate_of)


def _rounds(count: int) -> Method:
  # One candidate a round: with two, the default, nearly every prompt is helped by the first hint.
  fields = {"exploration.rounds": count, "exploration.candidates": 1}
  return _variant(f"rounds-{count}", f"B = {count}", fields)


_NEGATIVE, _ALL = {"objective.gate_mode": "negative"}, {"objective.gate_threshold": 0.0}
STUDIES: Mapping[str, Study] = {
  study.name: study
  for study in (
    Study(
      "main",
      "A fair comparison",
      "Which method helps most outside the modality it was trained on, at the same grid, budget and seeds?",
      "SFT on gold answers is trained and tested with a prompt that asks for the answer alone, so it is compared with "
      "the start under that prompt; the phantom's models cannot look up a letter without reasoning. Methods on other "
      "pairs of student and teacher have the learning rates that were chosen on the first pair.",
      _MAIN,
      references=("grpo", "gkd-1", "kepo-tau1"),
      others=("start", "teacher", "grpo", "gkd-1", "kepo-tau1"),
    ),
    Study(
      "tau",
      "The threshold of the gate",
      "How good must a rollout be to be distilled?",
      "Accuracy is 0 or 1, for which thresholds of .5 and 1 are the same gate: only the mean of accuracy and format "
      "has three. At a threshold of 0 both signals let everything through. Thresholds of 0 and 1 have rates of their "
      "own from the main study; two lines have the rate of the other one, for comparisons at equal rates.",
      (
        START,
        *(_tau("accuracy", tau) for tau in (0.0, 1.0)),
        *(_tau("accuracy", tau, swapped=True) for tau in (0.0, 1.0)),
        *(_tau("mean", tau) for tau in (0.0, 0.5, 1.0)),
      ),
      references=("accuracy-1",),
    ),
    Study(
      "budget",
      "The budget of exploration",
      "How many rounds of hints does a failed prompt need?",
      "One candidate per round, so that there is something to gain from further rounds: with two, the default of KEPO, "
      "nearly every prompt of the phantom is helped by its first hint.",
      (START, *map(_rounds, (0, 1, 2, 5, 10))),
      references=("rounds-5",),
    ),
    Study(
      "hints",
      "What a hint is worth",
      "Do hints that tell more lead to more rollouts worth learning from, and to better students?",
      "Quality is measured on the untrained student: gain is how much likelier a hint makes right answers that the "
      "teacher wrote without it, reliance how much likelier it makes the candidates that were accepted under it.",
      (
        START,
        _variant("hint_and_answer", "hint and answer, new each round", {}),
        _variant("hint_only", "hint alone, new each round", {"exploration.hint_prompt": "hint_only"}),
        _variant("once", "hint and answer, once", {"exploration.hints": "once"}),
        _variant("undistilled", "hints without distillation", {"objective.distill_weight": 0.0}),
      ),
      references=("hint_and_answer",),
      hints=True,
    ),
    Study(
      "gate",
      "The direction of the gate",
      "Should a teacher correct what went wrong, or refine what went right?",
      "Every direction has the learning rate that its own grid chose.",
      (
        START,
        _variant("positive", "right rollouts", {}),
        _variant("negative", "wrong rollouts", _NEGATIVE, rate_of=""),
        _variant("all", "all rollouts", _ALL, rate_of="kepo-tau0"),
        _variant("positive-unhinted", "right rollouts, no hints", {}, config="kepo_ke"),
        _variant("negative-unhinted", "wrong rollouts, no hints", _NEGATIVE, config="kepo_ke", rate_of=""),
        _variant("all-unhinted", "all rollouts, no hints", _ALL, config="kepo_ke", rate_of="kepo_ke-tau0"),
      ),
      references=("positive", "positive-unhinted"),
    ),
  )
}


def reserved(study: Study) -> set[str]:
  """Returns the fields that a study sets itself, which --set must not change for all of its runs."""
  methods = [*study.methods, *_MAIN]
  own = {"seed", "model.student", "model.teacher", "optimizer.learning_rate", "eval.before"}
  return own | {name for method in methods for name in method.overrides}
