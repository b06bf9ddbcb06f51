"""Whether the questions of a run can be asked, before anything large is loaded."""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
from absl import logging

from kepo_jax import processes
from kepo_jax.config import Config
from kepo_jax.data import inspection, rules
from kepo_jax.data.rules import Rejected, Summary
from kepo_jax.types import Example

# What changes how many questions a split has, or needs.
WAYS_OUT = {
  "train": "lower batch.prompts, raise data.train_items, or bring more questions of data.train_modality",
  "validation": "raise data.validation_items, or set eval.every=0",
  "test": "raise data.test_items, or set eval.test=False",
}


def check_questions(questions: Mapping[str, Sequence[Example]], config: Config) -> None:
  """Refuses splits that the config cannot use, and records that no reward could judge.

  Raises:
    ValueError: which split is missing or too small, or which record is wrong and how.
  """
  needed = {"train": config.batch.prompts, "validation": config.eval.every > 0, "test": config.eval.test}
  for split, least in needed.items():
    found = len(questions.get(split, ()))
    if found < least:
      raise ValueError(f"the {split} split has {found} questions and needs {int(least)} or more: {WAYS_OUT[split]}.")
  for split, examples in questions.items():
    for example in examples:
      letters = [chr(ord("A") + i) for i in range(len(example.options))]
      if example.answer not in letters:
        raise ValueError(
          f"{split} question {example.id}: answer {example.answer!r} is not the letter of one of its "
          f"{len(letters)} options ({', '.join(letters)})."
        )
    repeated = [each for each, count in collections.Counter(example.id for example in examples).items() if count > 1]
    if repeated:
      raise ValueError(
        f"{split} has {len(repeated)} ids more than once, {repeated[0]!r} among them; an id names one question."
      )


def with_readable_images(
  questions: Mapping[str, Sequence[Example]],
  *,
  lenient: bool,
  progress: Callable[[int, int], None],
  refusals: Callable[[str, Sequence[Example]], Mapping[str, Rejected]] = lambda split, examples: {},
  report: Callable[[Summary], None] = lambda summary: None,
) -> dict[str, list[Example]]:
  """Decodes every image once and measures every question, so that none stops a run in its middle.

  Of several processes each looks at a share of them, and all go by what any of them has found.

  Args:
    questions: split -> questions, the same on every process.
    lenient: leave out, and count, questions whose image cannot be read or for which there is no room.
    progress: called with the number of images done and of all that this process decodes, for each split.
    refusals: (split, questions with readable images) -> id -> why there is no room for it, as `limits.refusals` tells.
    report: called with what was left out of each split.

  Returns:
    split -> questions that can be asked.

  Raises:
    ValueError: a question cannot be asked, unless lenient; names it, the file, sizes, and the way out.
    OSError: another process of the run has failed.
  """
  kept = {}
  for split, examples in questions.items():
    summary = Summary(root=f"{split} questions of the run", format="checked", records=len(examples))
    readable, _ = inspection.open_images(examples, summary, decode=True, progress=progress, divided=processes.divided)
    refused = _refused(readable, functools.partial(refusals, split))
    for example_id, (rule, reason) in refused.items():
      summary.count(rule, f"question {example_id}: {reason}")
    kept[split] = [example for example in readable if example.id not in refused]
    summary.kept = len(kept[split])
    report(summary)
    if summary.rules and not lenient:
      raise ValueError(
        f"{split} {next(iter(summary.first.values()))} ({rules.counted(summary.rules)}); "
        "mend the data, or set data.lenient to leave them out."
      )
    if summary.rules:
      logging.warning("%d questions left out: %s", summary.dropped, summary.text())
  return kept


def _refused(
  examples: Sequence[Example], refusals: Callable[[Sequence[Example]], Mapping[str, Rejected]]
) -> dict[str, tuple[str, str]]:
  """Id -> rule and reason of the questions that are refused, each looked at by one process; on every process."""
  count, number = jax.process_count(), jax.process_index()

  def mine() -> list[tuple[str, str, str]]:
    refused = refusals(examples[number::count])
    return [(example_id, rejected.rule, str(rejected)) for example_id, rejected in refused.items()]

  return {example_id: (rule, reason) for part in processes.gathered(mine) for example_id, rule, reason in part}


def prompt_kinds(config: Config, split: str) -> dict[str, int]:
  """Wordings in which a run asks the questions of a split, each with the most tokens that a hint adds to it.

  A hint is at most `exploration.hint_tokens` tokens long, and its tags, which the student is not shown, are among them:
  they leave some room for a text that is cut into other tokens when it is read than when it was written.
  """
  if split != "train":
    return {config.eval.prompt: 0}
  hinted = {"hint_request": 0, config.exploration.hint_prompt: config.exploration.hint_tokens}
  return {config.data.prompt: 0} | (hinted if config.explores else {})
