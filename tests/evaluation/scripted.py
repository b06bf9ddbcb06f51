"""Questions, and a processor and a model in one whose answers are known."""

import json

import numpy as np

from kepo_jax.types import Example, Rollouts

END = 1
COMPLETIONS = (
  "<think>a</think><answer>A</answer>",
  "<think>a</think><answer>A.</answer>",  # unparsed, right to a forgiving reader
  "<answer>B</answer>",
  "nö idea",  # and no end token
)


def says(number):
  return COMPLETIONS[number % 4]


def examples(count=12, **changes):
  """Questions whose answer is A, four of each modality in turn."""
  same = {"question": "?", "options": ("x", "y"), "answer": "A", "images": (), "dataset": "d"} | changes
  modalities, kinds = ("MRI", "CT", "OCT"), ("Lesion Grading", "")
  return [
    Example(id=f"q{n}", modality=modalities[n // 4 % 3], question_type=kinds[n % 2], **same) for n in range(count)
  ]


def output(name="t1", *, correct=True, **fields):
  """A record of outputs.jsonl."""
  return {"id": name, "sample": 0, "dataset": "", "modality": "CT", "question_type": "Lesion Grading",
          "question": "How many?", "options": ["one", "two"], "answer": "A", "images": ["0" * 16],
          "completion": "said", "parsed": "A" if correct else None, "correct": correct, "lenient": "A",
          "lenient_correct": True, "format": True, "tokens": 3, "truncated": False, "files": []} | fields  # fmt: skip


def json_lines(records):
  return "".join(json.dumps(record) + "\n" for record in records)


class Scripted:
  """Tokens are code points, the prompt of a question is its number; completion g of question n is `says(n + g)`."""

  end_ids = (END,)

  def __init__(self, samples=1, *, kind="evaluation", dies_after=None):
    self.samples, self.kind, self.dies_after = samples, kind, dies_after
    self.batches = []  # numbers of the questions that were asked together

  @property
  def questions(self):
    return [number for batch in self.batches for number in batch]

  def prompts(self, shown, kind, hints=None):
    assert kind == self.kind
    return [int(example.id[1:]) for example in shown]

  def decode(self, tokens, mask):
    return ["".join(map(chr, row[keep])).replace(chr(END), "") for row, keep in zip(tokens, mask, strict=True)]

  def __call__(self, numbers):
    if self.dies_after is not None and len(self.questions) >= self.dies_after:
      raise KeyboardInterrupt
    self.batches.append(numbers)
    tokens = np.zeros((len(numbers), self.samples, 40), np.int32)
    for p, number in enumerate(numbers):
      for g in range(self.samples):
        ids = [*map(ord, says(number + g)), *([] if (number + g) % 4 == 3 else [END])]
        tokens[p, g, : len(ids)] = ids
    return Rollouts(tokens=tokens, logps=np.zeros(tokens.shape, np.float32), mask=tokens > 0)
