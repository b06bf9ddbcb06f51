"""Groups of rollouts made by hand: two prompts of three rollouts, up to four tokens long."""

import time

import numpy as np

from kepo_jax import exploration, rewards
from kepo_jax.training.rollouts import Groups
from kepo_jax.types import Example

P, G, T = 2, 3, 4
END, PAD = 9, 0
SCORER = rewards.Scorer({"accuracy": (rewards.accuracy, 1.0), "format": (rewards.strict_format, 0.5)})
RIGHT = "<think> a</think><answer>B</answer>"  # accurate and well formed
WRONG = "<think> a</think><answer>A</answer>"  # well formed alone
BARE = "B"  # accurate alone
NOTHING = "no idea"


def example(name, answer="B"):
  return Example(
    id=f"set/{name}", question=f"What is {name}?", options=("one", "two"), answer=answer, images=(f"{name}.png",),
    modality="MRI", question_type="Counting", dataset="set",
  )  # fmt: skip


def groups(texts, lengths, *, name="q", ended=True):
  """Groups whose rollouts say `texts` [P][G] and have `lengths` [P][G]; tokens count upwards from the first.

  Lengths count the end token, which rows have where `ended`; `name` begins the ids of the questions.
  """
  lengths = np.array(lengths)
  shape = (*lengths.shape, T)
  mask = np.arange(T) < lengths[..., None]
  tokens = np.where(mask, 10 + np.arange(np.prod(shape)).reshape(shape), PAD).astype(np.int32)
  last = mask & (np.arange(T) == lengths[..., None] - 1) & np.broadcast_to(ended, lengths.shape)[..., None]
  examples = [example(f"{name}{p}") for p in range(len(texts))]
  return Groups(
    examples=examples, tokens=np.where(last, END, tokens).astype(np.int32), mask=mask,
    logps=np.where(mask, -0.5, 0).astype(np.float32), texts=np.array(texts, object).reshape(lengths.shape),
    scores=SCORER(texts, examples), injected=np.zeros(lengths.shape, bool), supervised=np.zeros(lengths.shape, bool),
    hints=np.full(lengths.shape, "", object),
  )  # fmt: skip


def mixed():
  """Prompt 0: one right, one wrong in the right format, one bare; prompt 1: nothing right, one row cut off."""
  texts = [[RIGHT, WRONG, BARE], [NOTHING, WRONG, WRONG]]
  return groups(texts, [[4, 3, 1], [4, 2, 3]], ended=[[True, True, True], [False, True, True]])


def candidate(text=RIGHT, hint="look left", fill=50):
  """An accepted candidate of two tokens."""
  mask = np.arange(T) < 2
  return exploration.Candidate(
    tokens=np.where(mask, [fill, END, 0, 0], PAD).astype(np.int32), logps=np.where(mask, -2.0, 0).astype(np.float32),
    mask=mask, text=text, hint=hint, accurate=True, well_formed=True,
    scores={name: float(values[0, 0]) for name, values in SCORER([[text]], [example("x")]).items()}, attempt=1,
  )  # fmt: skip


def until(condition):
  """Waits for what another thread does."""
  deadline = time.monotonic() + 300
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert condition()
