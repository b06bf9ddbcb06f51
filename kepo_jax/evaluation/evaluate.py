"""Questions to a model, and what is read from its completions."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kepo_jax import multihost, rewards, sharding
from kepo_jax.data import images
from kepo_jax.data.batching import Lookahead
from kepo_jax.data.processor import Processor
from kepo_jax.evaluation.accuracy import summarised
from kepo_jax.types import Example, Prompts, Rollouts

CONTROLS = ("none", "blank", "text")


def shown_prompts(
  processor: Processor,
  examples: Sequence[Example],
  kind: str,
  control: str = "none",
  *,
  hints: Sequence[str] | None = None,
) -> Prompts:
  """Makes host prompts of the questions; a control takes the pictures away.

  Args:
    processor: of the model.
    examples: P questions.
    kind: wording, as in `data.prompts.prompt_text`; the same under every control.
    control: "none"; "blank": every picture becomes one of the same size in the mean colour of the normalisation, which
      is mid grey for Qwen3-VL; "text": no picture, and no image tokens.
    hints: one per question, for the hinted kinds.

  Raises:
    ValueError: an unknown control, or a prompt that cannot be made.
  """
  if control not in CONTROLS:
    raise ValueError(f"control {control!r} is unknown; use one of {CONTROLS}.")
  if control == "text":
    examples = [dataclasses.replace(example, images=()) for example in examples]
  prompts = processor.prompts(examples, kind, hints=hints)
  if control == "blank":
    return _grey(prompts)
  return prompts


def _grey(prompts: Any) -> Prompts:
  # Patches are normalised, so that zero is the mean colour.
  return prompts.replace(vision=prompts.vision.replace(patches=np.zeros_like(prompts.vision.patches)))


def evaluate(
  sample: Callable[[Prompts], Rollouts],
  processor: Processor,
  examples: Sequence[Example],
  *,
  batch_size: int,
  train_modality: str = "MRI",
  kind: str = "evaluation",
  control: str = "none",
  earlier: Sequence[Mapping[str, Any]] = (),
  progress: Callable[[int, int], None] | None = None,
  on_output: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
  """Asks every question once, for one completion or several, and counts.

  Args:
    sample: host prompts of exactly `batch_size` rows -> Rollouts [P, G, T], for which it need not wait: the next batch
      is asked before these are read. The last batch is filled with repeated questions, which are not counted.
    processor: of the model.
    examples: questions, at least one.
    batch_size: P.
    train_modality: canonical name of the in-domain modality.
    kind: wording, "evaluation" or "no_think".
    control: see `shown_prompts`.
    earlier: records of the first questions, from an evaluation that was interrupted; these are not asked again.
    progress: receives (questions done, questions in all) after each batch, and before the first if some are done.
    on_output: receives one JSON-able record per completion: identity, completion, what was read from it. `images` has
      the first 16 hexadecimal digits of the SHA-256 of each image file, also under a control.

  Returns:
    the metrics of `summarised`.

  Raises:
    ValueError: there is nothing to evaluate, an image cannot be read, or a prompt cannot be made.
    OSError: another process could not read its images.
  """
  if not examples:
    raise ValueError("no question to evaluate; check the data directory and the split.")
  outputs: list[dict[str, Any]] = [dict(output) for output in earlier]
  done = len({output["id"] for output in outputs})
  starts = range(done, len(examples), batch_size)

  def prepared(index: int) -> tuple[Sequence[Example], Prompts]:
    batch = list(examples[starts[index] : starts[index] + batch_size])
    filled = batch + batch[:1] * (batch_size - len(batch))
    return batch, shown_prompts(processor, filled, kind, control)

  if progress and done:
    progress(done, len(examples))

  def read(index: int, batch: Sequence[Example], rollouts: Rollouts) -> None:
    tokens, mask = (sharding.to_host(array) for array in (rollouts.tokens, rollouts.mask))

    def records(row: int, numbers: Sequence[int]) -> list[dict[str, Any]]:
      texts = processor.decode(tokens[row, numbers], mask[row, numbers])
      said = [tokens[row, number][mask[row, number]] for number in numbers]
      rows = zip(numbers, texts, said, strict=True)
      return [_output(batch[row], number, text, ids, processor.end_ids, kind) for number, text, ids in rows]

    for output in multihost.gather_from_owners(tokens.shape[:2], len(batch), records).flat:
      outputs.append(output)
      if on_output:
        on_output(output)
    if progress:
      progress(starts[index] + len(batch), len(examples))

  batches, asked = Lookahead(prepared, stop=len(starts)), None
  for index in range(len(starts)):
    try:
      # Hosts decode images of their own: where one cannot, all of them read what was answered before, and end.
      batch, prompts = multihost.run_on_all(functools.partial(batches, index))
      rollouts = sample(prompts)
    finally:  # the device answers this batch meanwhile; where it cannot be asked, the answers before it still count
      if asked:
        read(*asked)
    asked = (index, batch, rollouts)
  if asked:
    read(*asked)
  return summarised(outputs, train_modality=train_modality)


def _output(
  example: Example, number: int, text: str, tokens: np.ndarray, end_ids: Iterable[int], kind: str
) -> dict[str, Any]:
  well_formed = rewards.answer_format if kind == "no_think" else rewards.strict_format
  parsed, lenient = rewards.answer_letter(text), rewards.lenient_letter(text, example)
  return {
    "id": example.id,
    "sample": number,
    "dataset": example.dataset,
    "modality": example.modality,
    "question_type": example.question_type,
    "question": example.question,
    "options": list(example.options),
    "answer": example.answer,
    "images": [images.fingerprint(path)[:16] for path in example.images],
    "completion": text,
    "parsed": parsed,
    "correct": parsed == example.answer,
    "lenient": lenient,
    "lenient_correct": lenient == example.answer,
    "format": bool(well_formed(text)),
    "tokens": len(tokens),
    "truncated": not len(tokens) or int(tokens[-1]) not in set(end_ids),
  }
