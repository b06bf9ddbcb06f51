"""The working directory of a run."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from kepo_jax.data import splits
from kepo_jax.data.rules import Summary
from kepo_jax.training.checkpoints import Checkpoints
from kepo_jax.types import Example


class RunFiles:
  """config.json, evaluation.json, checkpoints/ and model/ of one run; writes nothing when workdir is ""."""

  def __init__(self, workdir: epath.PathLike, config: Any, *, resume: bool):
    """Looks whether the folder can be used; nothing is written before the block is entered.

    Args:
      workdir: the folder, or "".
      config: of the run; stored as config.json, and compared with it on resume.
      resume: continue what the folder holds.

    Raises:
      ValueError: the folder holds another run, or nothing to resume, or a run of another config.
    """
    self.workdir = str(workdir)
    self.evaluations: dict[str, Any] = {}
    self._config = config
    self._resume = resume
    self._checkpoints: Checkpoints | None = None
    if "://" in self.workdir:
      raise ValueError(f"workdir {self.workdir} is remote, which is not supported; use a local or mounted folder.")
    if resume:
      self._check_resume()
    elif self.workdir:
      self._check_fresh()

  def __enter__(self) -> "RunFiles":
    if self.workdir:
      root, checkpoint = epath.Path(self.workdir), self._config.checkpoint
      if not self._resume:
        root.mkdir(parents=True, exist_ok=True)
        (root / "config.json").write_text(self._config.to_json(indent=2) + "\n")
      self._checkpoints = Checkpoints(root / "checkpoints", every=checkpoint.every, keep=checkpoint.keep)
    return self

  def __exit__(self, *_: Any) -> None:
    if self._checkpoints:
      self._checkpoints.close()

  def _check_fresh(self) -> None:
    root = epath.Path(self.workdir)
    if root.exists() and any(root.iterdir()):
      raise ValueError(
        f"{root} is not empty; pass --resume to continue the run in it, or another --workdir for a new one."
      )

  def _check_resume(self) -> None:
    if not self.workdir:
      raise ValueError("resume needs a workdir; pass --workdir=DIR of the run to continue.")
    root = epath.Path(self.workdir)
    stored = root / "config.json"
    if not stored.exists():
      raise ValueError(f"{root} holds no run to resume (no config.json); start without --resume.")
    before, now = _flat(json.loads(stored.read_text())), _flat(json.loads(self._config.to_json()))
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
      changes = ", ".join(f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in changed)
      raise ValueError(f"the config differs from that of the run in {root} ({changes}); resume with the same config.")
    evaluations = root / "evaluation.json"
    if evaluations.exists():
      self.evaluations = json.loads(evaluations.read_text())

  def restore(self, like: Any) -> Any:
    """The newest checkpoint on the shardings of `like`; evaluations after it are forgotten."""
    state = self._checkpoints.restore(like) if self._checkpoints else like
    step = int(state.step)
    self.evaluations.pop("after", None)
    if not step:
      self.evaluations.clear()
    self.evaluations["validation"] = [e for e in self.evaluations.get("validation", []) if e["step"] <= step]
    return state

  def record_questions(self, questions: Mapping[str, Sequence[Example]], *, rule: str) -> None:
    """Writes questions.json: which questions the run has, by part, and hashes of what they are.

    Args:
      questions: part -> questions.
      rule: in words how they were chosen.

    Raises:
      ValueError: the run that is resumed had others, or some of them have changed; names the first.
    """
    if self.workdir:
      parts = {name: list(questions.get(name, ())) for name in splits.SPLITS}
      path = epath.Path(self.workdir) / "questions.json"
      splits.write_ids(splits.Split(**parts), path, rule=rule, seed=self._config.data.split_seed)

  def record_summaries(self, summaries: Mapping[str, Sequence[Summary]]) -> None:
    """Writes data_summary.json: by which rules the data of the run were repaired and questions dropped.

    Args:
      summaries: "reading" and "checking" -> what was found in it.
    """
    if self.workdir:
      record = {name: [summary.to_dict() for summary in found] for name, found in summaries.items()}
      (epath.Path(self.workdir) / "data_summary.json").write_text(json.dumps(record, indent=2) + "\n")

  def record(self, name: str, result: dict[str, Any]) -> None:
    """Adds an evaluation ("before", "validation" or "after") to evaluation.json."""
    if name == "validation":
      self.evaluations.setdefault(name, []).append(result)
    else:
      self.evaluations[name] = result
    if self.workdir:
      path = epath.Path(self.workdir) / "evaluation.json"
      path.write_text(json.dumps(self.evaluations, indent=2) + "\n")

  def save(self, step: int, state: Any, *, last: bool) -> None:
    """Checkpoints the state if its turn has come."""
    if self._checkpoints:
      self._checkpoints.save(step, state, last=last)

  def export(self, write: Callable[[epath.Path], None]) -> None:
    """Calls `write` with the path of model/ unless there is no workdir."""
    if self.workdir:
      write(epath.Path(self.workdir) / "model")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": 1}} -> {"a.b": 1}."""
  if not isinstance(tree, dict):
    return {prefix: tree}
  items = [_flat(value, f"{prefix}.{name}" if prefix else name) for name, value in tree.items()]
  return {name: value for item in items for name, value in item.items()}
