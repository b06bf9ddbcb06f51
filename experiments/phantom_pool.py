"""Pools of drawn training data: pictures as uint8, several dialogues about each picture as token ids.

The dialogues about one picture are completions of one prompt that ends with the picture, so the vision tower and the
prompt's keys run once for all of them: the same sequences as a prompt per dialogue, at about half the cost.
"""

import dataclasses

import numpy as np
from tokenizers import Tokenizer

from experiments import phantom_corpus
from experiments.phantom_corpus import Beliefs
from kepo_jax.data.phantom import drawing, questions, scenes
from kepo_jax.data.phantom.scenes import Scene

SEEN = tuple(name for name in scenes.MODALITIES if name != "fundus")  # what the phantom models are trained on
MODALITY_WEIGHTS = tuple((0.25 if name == "MRI" else 0.125) for name in SEEN)
COUNT_WEIGHTS = (0.12, 0.36, 0.27, 0.25)  # so that the three grades are nearly equally frequent
IMAGE_TOKENS = 16
TURN_END = "<|im_end|><|im_start|>assistant"


@dataclasses.dataclass(frozen=True)
class Pool:
  """N pictures with G dialogues each; T tokens from behind the picture to the end, W tokens of an answer."""

  images: np.ndarray  # uint8[N, 64, 64, 3]
  tokens: np.ndarray  # int32[N, G, T], zero-padded
  answer_index: np.ndarray  # int32[N, G, W], where in T the answer's tokens are
  weights: np.ndarray  # float32[N, G, W], weight of each answer token in the loss, 0 for padding
  kinds: np.ndarray  # int8[N, G, W]: 0 other, 1 conclusion, 2 letter, 3 letter said again


def prefix_text() -> str:
  """The prompt up to and including the picture."""
  return "<|im_start|>user<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>"


def draw_training_scene(rng: np.random.Generator) -> Scene:
  """A scene of a modality that belongs to the pretraining."""
  return scenes.draw_scene(
    rng, SEEN[rng.choice(len(SEEN), p=MODALITY_WEIGHTS)], count=int(rng.choice(4, p=COUNT_WEIGHTS))
  )


def draw_topic(scene: Scene, rng: np.random.Generator) -> str:
  """A topic that the scene can be asked about, in the benchmark's shares."""
  names = [name for name, topic in questions.TOPICS.items() if scene.count or not topic.needs_lesions]
  shares = np.array([questions.TOPICS[name].share for name in names])
  return names[rng.choice(len(names), p=shares / shares.sum())]


def _dialogues(scene: Scene, group: int, drills: int, kinds: dict, beliefs: Beliefs, rng) -> list[tuple[str, str]]:
  """`group` dialogues about one scene, of which `drills` practise the look-up alone."""
  turns = []
  for i in range(group):
    question = questions.ask(draw_topic(scene, rng), scene, rng)
    if i < drills:
      turns.append(phantom_corpus.lookup_drill(rng))
      continue
    kind = list(kinds)[rng.choice(len(kinds), p=list(kinds.values()))]
    turns.append(phantom_corpus.dialogue(scene, question, kind, beliefs, rng))
  return turns


def _chunk(job: tuple) -> tuple[np.ndarray, list]:
  seed, index, size, group, drills, kinds, beliefs = job
  rng = np.random.default_rng((seed, index))
  drawn = [draw_training_scene(rng) for _ in range(size)]
  texts = [turn for scene in drawn for turn in _dialogues(scene, group, drills, kinds, beliefs, rng)]
  return np.stack([drawing.draw(scene) for scene in drawn]), texts


def make_pool(
  tokenizer: Tokenizer, *, seed: int, size: int, group: int, drills: int, kinds: dict[str, float], beliefs: Beliefs
) -> Pool:
  """A pool from a seed; the same on every call. `size` counts pictures and is a multiple of 500."""
  jobs = [(seed, i, 500, group, drills, kinds, beliefs) for i in range(size // 500)]
  images, texts = zip(*map(_chunk, jobs), strict=True)
  return _tokenised(tokenizer, np.concatenate(images), [turn for chunk in texts for turn in chunk], group)


def _tokenised(tokenizer: Tokenizer, images: np.ndarray, texts: list[tuple[str, str]], group: int) -> Pool:
  users = tokenizer.encode_batch([user + TURN_END for user, _ in texts])
  answers = tokenizer.encode_batch([answer + "<|im_end|>" for _, answer in texts])
  length = -(-max(len(u.ids) + len(a.ids) for u, a in zip(users, answers, strict=True)) // 4) * 4
  width = max(len(a.ids) for a in answers)
  rows = len(texts)
  tokens = np.zeros((rows, length), np.int32)
  index, kinds = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int8)
  weights = np.zeros((rows, width), np.float32)
  for row, (user, answer) in enumerate(zip(users, answers, strict=True)):
    start, count = len(user.ids), len(answer.ids)
    tokens[row, : start + count] = user.ids + answer.ids
    index[row, :count] = np.arange(start, start + count)
    kinds[row, :count], weights[row, :count] = _token_kinds(answer.tokens)
  shape = (len(images), group)
  return Pool(*[images], *[array.reshape(*shape, -1) for array in (tokens, index, weights, kinds)])


def _token_kinds(pieces: list[str]) -> tuple[list[int], list[float]]:
  """Kind and loss weight of each answer token: findings count most, tags least."""
  drill = pieces.count("<think>") > 1
  last_comma = max((i for i, piece in enumerate(pieces) if piece == ","), default=-2)
  kinds, weights = [], []
  for i, piece in enumerate(pieces):
    letter = len(piece) == 2 and piece[1] in "ABCD"
    # Said a second time, or in place of a tag: a weight of its own there would make broken formats likelier than drawn.
    late = letter and pieces[0] == "<think>" and pieces[i - 1] in ("<answer>", "</think>")
    kind = 3 if late else 2 if letter else 1 if i == last_comma + 1 else 0
    tag = piece.startswith("<") or piece == ","
    kinds.append(kind)
    weights.append(1.5 if kind in (1, 2) else 0.2 if late or (tag and not drill) else 0.0 if drill else 3.0)
  return kinds, weights


def patches(images: np.ndarray) -> np.ndarray:
  """float32[N, 64, 384] rows of 64 x 64 pictures, as `ImageProcessor` makes them (a test compares).

  Rows are in merge-block order; a row is flattened channel, time, y, x, with the still picture twice in time.
  """
  scaled = (images.astype(np.float32) / 255 - 0.5) / 0.5
  blocks = scaled.reshape(
    len(images), 4, 2, 8, 4, 2, 8, 3
  )  # N, (row block, row, y), (column block, column, x), channel
  rows = blocks.transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(len(images), 64, 3, 1, 8, 8)
  return np.repeat(rows, 2, axis=3).reshape(len(images), 64, 384)
