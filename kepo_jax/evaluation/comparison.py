"""Two evaluations of the same questions, question by question."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kepo_jax.evaluation import accuracy, statistics

FIELDS = ("correct", "lenient_correct")
_SAME = ("modality", "question", "options", "answer")  # what makes two records with one id the same question
_SHOWN = 3  # ids in a message


def compared(
  first: Sequence[Mapping[str, Any]],
  second: Sequence[Mapping[str, Any]],
  *,
  train_modality: str = "MRI",
  field: str = "correct",
  seed: int = 0,
) -> dict[str, Any]:
  """Paired comparison of two evaluations of the same questions.

  The bootstrap draws pairs, those about one image together; McNemar's test counts questions that only one of the two
  got right, and takes them as independent. With several completions of a question its mean is compared, and there is
  no McNemar's test, which needs a right or wrong of each.

  Args:
    first: output records of `evaluate`.
    second: those of another model, in any order.
    train_modality: canonical name of the in-domain modality.
    field: "correct", or "lenient_correct".
    seed: of the bootstrap.

  Returns:
    JSON-able entries under `overall`, `in_domain` and each of `modalities`: count, number of images, both accuracies,
    their difference (second less first) with a paired bootstrap 95 % interval, how many questions gained and lost, and
    the exact p-value of McNemar's test, None with several completions; in `modalities` also `p_holm`, corrected after
    Holm for the number of modalities. `out_of_domain`: the unweighted mean difference over the other modalities with
    its interval. `other_images`: how many questions have other image files in the second.

  Raises:
    ValueError: the two do not hold the same questions; says how many and which.
  """
  questions = [{records[0]["id"]: records for records in accuracy.by_question(outputs)} for outputs in (first, second)]
  _check_same(*questions)
  order = list(questions[0])
  values = [accuracy.per_question([each[name] for name in order], field) for each in questions]
  single = all(len(each[order[0]]) == 1 for each in questions)
  names = [questions[0][name][0]["modality"] for name in order]
  groups = [accuracy.grouped(each, names) for each in values]
  asked = [[each[name] for name in order] for each in questions]
  told = asked[0] if accuracy.distinct_images(asked[0]) else asked[1]  # older records do not name their images
  images, shared = accuracy.image_counts(told, train_modality, brief=True), accuracy.clusters(told)
  members = accuracy.grouped(shared, names)
  rng = np.random.default_rng(seed)
  draws = {
    name: statistics.resampled_means(groups[1][name] - groups[0][name], rng, members[name]) for name in groups[0]
  }
  modalities = {
    name: _entry(groups[0][name], groups[1][name], draws[name], images["modalities"][name], single) for name in draws
  }
  drawn = statistics.resampled_means(values[1] - values[0], rng, shared)
  if single:
    corrected = statistics.holm({name: entry["p_value"] for name, entry in modalities.items()})
    modalities = {name: entry | {"p_holm": corrected[name]} for name, entry in modalities.items()}
  return {
    "train_modality": train_modality,
    "field": field,
    "samples": [len(each[order[0]]) for each in questions],
    "other_images": sum(_other_images(*pair) for pair in zip(*asked, strict=True)),
    "overall": _entry(values[0], values[1], drawn, images["overall"], single),
    "in_domain": modalities.get(train_modality),
    "out_of_domain": _mean(
      {name: entry for name, entry in modalities.items() if name != train_modality}, draws, images["out_of_domain"]
    ),
    "modalities": modalities,
  }


def _check_same(first: Mapping[str, Sequence[Mapping]], second: Mapping[str, Sequence[Mapping]]) -> None:
  if not first and not second:
    raise ValueError("there is no question in either evaluation; nothing can be compared.")
  alone = {"first": sorted(first.keys() - second.keys()), "second": sorted(second.keys() - first.keys())}
  if any(alone.values()):
    parts = [f"{len(ids)} only in the {which} ({_named(ids)})" for which, ids in alone.items() if ids]
    raise ValueError(f"the evaluations hold different questions: {', '.join(parts)}; ask both models the same.")
  for field in _SAME:
    other = [name for name in first if first[name][0].get(field) != second[name][0].get(field)]
    if other:
      raise ValueError(f"{len(other)} questions have another {field} in the second evaluation ({_named(other)}).")


def _named(ids: Sequence[str]) -> str:
  return ", ".join(ids[:_SHOWN]) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")


def _other_images(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> bool:
  return all("images" in records[0] for records in (first, second)) and first[0]["images"] != second[0]["images"]


def _entry(first: np.ndarray, second: np.ndarray, draws: np.ndarray, images: int, single: bool) -> dict[str, Any]:
  gained, lost = int((second > first).sum()), int((first > second).sum())
  low, high = statistics.percentile_interval(draws)
  return {
    "count": len(first),
    "images": images,
    "first": float(first.mean()),
    "second": float(second.mean()),
    "difference": float((second - first).mean()),
    "low": low,
    "high": high,
    "gained": gained,
    "lost": lost,
    "p_value": statistics.mcnemar(gained, lost) if single else None,
  }


def _mean(
  modalities: Mapping[str, Mapping[str, Any]], draws: Mapping[str, np.ndarray], images: int
) -> dict[str, Any] | None:
  if not modalities:
    return None
  low, high = statistics.percentile_interval(np.mean([draws[name] for name in modalities], axis=0))
  return {
    "count": sum(entry["count"] for entry in modalities.values()),
    "images": images,
    **{
      name: float(np.mean([entry[name] for entry in modalities.values()])) for name in ("first", "second", "difference")
    },
    "low": low,
    "high": high,
    "modalities": list(modalities),
  }
