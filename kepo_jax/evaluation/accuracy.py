"""From output records to metrics: accuracy per modality, question type and data set, chance beside it, pass@k."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kepo_jax.evaluation import statistics

Record = Mapping[str, Any]
# Section of the result -> field of the record.
SECTIONS = {"modalities": "modality", "question_types": "question_type", "datasets": "dataset"}


def by_question(outputs: Sequence[Record]) -> list[list[Record]]:
  """The records of each question together, in order of first appearance.

  Raises:
    ValueError: questions with different numbers of records; names one.
  """
  found: dict[str, list[Record]] = {}
  for output in outputs:
    found.setdefault(output["id"], []).append(output)
  questions = list(found.values())
  for records in questions:
    if len(records) != len(questions[0]):
      raise ValueError(
        f"question {records[0]['id']} has {len(records)} completions and {questions[0][0]['id']} "
        f"{len(questions[0])}; an evaluation has the same number of each."
      )
  return questions


def per_question(questions: Sequence[Sequence[Record]], field: str) -> np.ndarray:
  """float64[n]: the share of each question's records whose field is true."""
  return np.array([np.mean([bool(record[field]) for record in records]) for records in questions])


def clusters(questions: Sequence[Sequence[Record]]) -> np.ndarray:
  """int64[n]: questions with the same number share an image, directly or through others; one without any is alone."""
  parent: dict[str | int, str | int] = {}

  def leader(name: str | int) -> str | int:
    while parent.setdefault(name, name) != name:
      parent[name] = parent[parent[name]]
      name = parent[name]
    return name

  for number, records in enumerate(questions):
    for image in records[0].get("images", ()):
      parent[leader(image)] = leader(number)
  leaders = [leader(number) for number in range(len(questions))]
  numbers = {name: number for number, name in enumerate(dict.fromkeys(leaders))}
  return np.array([numbers[name] for name in leaders], np.int64)


def distinct_images(questions: Sequence[Sequence[Record]]) -> int:
  """Images that some questions are about; 0 where their records do not tell."""
  return len({image for records in questions for image in records[0].get("images", ())})


def image_counts(questions: Sequence[Sequence[Record]], train_modality: str, *, brief: bool = False) -> dict[str, Any]:
  """Numbers of different images in a block like those of `summarised`; `brief` leaves out types and data sets."""

  def under(field: str) -> dict[str, int]:
    found = {records[0][field] for records in questions} - {""}
    return {name: distinct_images([q for q in questions if q[0][field] == name]) for name in sorted(found)}

  sections = {section: under(SECTIONS[section]) for section in (["modalities"] if brief else SECTIONS)}
  others = [q for q in questions if q[0]["modality"] not in ("", train_modality)]
  return {
    "overall": distinct_images(questions),
    "in_domain": sections["modalities"].get(train_modality),
    "out_of_domain": distinct_images(others),
    **sections,
  }


def grouped(values: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
  """The values under each name, sorted by name; the empty name is left out."""
  return {name: values[[each == name for each in names]] for name in sorted({*names} - {""})}


def summarised(outputs: Sequence[Record], *, train_modality: str = "MRI") -> dict[str, Any]:
  """The metrics of an evaluation from its output records.

  Args:
    outputs: at least one record of `evaluate`; as many for each question.
    train_modality: canonical name of the in-domain modality.

  Returns:
    JSON-able metrics. A block holds `overall`, `in_domain`, `modalities`, `question_types`, `datasets` (entries of
    `share`; of `mean_share` with several completions per question) and `out_of_domain` (of `mean_over_groups`: each
    modality counts the same). The result is the block of the strict parser and, under `lenient`, that of the
    forgiving one; under `chance` what guessing scores on these questions, with the bounds of 95 % of guessers. With
    several completions per question, accuracy is their mean, and `pass_at_k` has, for k = 1, 2, 4, .., a block
    without question types and data sets. Besides: `images`, a block of the numbers of different images, `samples` per
    question, the shares `unparsed`, `truncated` and `format` of all completions, the first two per modality in `rates`,
    and the mean `completion_length` in tokens. A bootstrap draws the questions about one image together.

  Raises:
    ValueError: questions with different numbers of records.
  """
  questions = by_question(outputs)
  samples = len(questions[0])
  names = {section: [records[0][field] for records in questions] for section, field in SECTIONS.items()}
  shared = clusters(questions)
  members = {section: grouped(shared, each) for section, each in names.items()}

  def block(values: np.ndarray, entry: Callable, mean: Callable, *, brief: bool = False) -> dict:
    groups = {section: grouped(values, names[section]) for section in (["modalities"] if brief else SECTIONS)}
    sections = {
      section: {name: entry(found, members[section][name]) for name, found in each.items()}
      for section, each in groups.items()
    }
    others = [name for name in groups["modalities"] if name != train_modality]
    return {
      "overall": entry(values, shared),
      "in_domain": sections["modalities"].get(train_modality),
      "out_of_domain": mean(*({name: part["modalities"][name] for name in others} for part in (groups, members))),
      **sections,
    }

  entry = statistics.mean_share if samples > 1 else _counted
  guesses = np.array([1 / len(records[0]["options"]) for records in questions])
  result = {
    "train_modality": train_modality,
    "samples": samples,
    **block(per_question(questions, "correct"), entry, statistics.mean_over_groups),
    "lenient": block(per_question(questions, "lenient_correct"), entry, statistics.mean_over_groups),
    "chance": block(guesses, _guessed, _guessed_mean),
    "images": image_counts(questions, train_modality),
  }
  if samples > 1:
    right = [sum(bool(record["correct"]) for record in records) for records in questions]
    result["pass_at_k"] = {
      str(k): block(
        np.array([statistics.pass_at_k(samples, count, k) for count in right]),
        statistics.mean_share,
        statistics.mean_over_groups,
        brief=True,
      )
      for k in (1 << i for i in range(samples.bit_length()))
    }
  modalities = [output["modality"] for output in outputs]
  flags = {
    "unparsed": np.array([output["parsed"] is None for output in outputs]),
    "truncated": np.array([bool(output["truncated"]) for output in outputs]),
    "format": np.array([bool(output["format"]) for output in outputs]),
  }
  parts = {name: grouped(flags[name], modalities) for name in ("unparsed", "truncated")}
  return result | {
    "rates": {name: {rate: float(part[name].mean()) for rate, part in parts.items()} for name in parts["unparsed"]},
    **{name: float(values.mean()) for name, values in flags.items()},
    "completion_length": sum(output["tokens"] for output in outputs) / len(outputs),
  }


def _counted(values: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
  del clusters  # Wilson's interval is that of questions
  return statistics.share(int(values.sum()), len(values))


def _guessed(values: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
  del clusters  # guesses at two questions are independent, whatever their images
  mean, low, high = statistics.guessing({"": values})
  return {"count": len(values), "accuracy": mean, "low": low, "high": high}


def _guessed_mean(groups: Mapping[str, np.ndarray], clusters: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
  del clusters
  if not groups:
    return None
  mean, low, high = statistics.guessing(groups)
  count = sum(len(values) for values in groups.values())
  return {"mean": mean, "low": low, "high": high, "count": count, "modalities": list(groups)}
