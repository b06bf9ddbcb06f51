"""What the phantom models are taught: drawn pictures, and dialogues with findings, a conclusion and a letter.

A `Beliefs` record holds everything in which a model departs from the truth. The misconceptions are planted: they exist
so that a student has prompts on which no rollout can succeed, which is what hinted exploration is for.

A `Pool` holds pictures with several dialogues each. The dialogues about one picture are completions of one prompt that
ends with the picture, so the vision tower and the prompt's keys run once for all of them: the same sequences as a
prompt per dialogue, at about half the cost.
"""

import dataclasses

import numpy as np
from tokenizers import Tokenizer

from kepo_jax.data import prompts
from kepo_jax.data.phantom import drawing, questions, scenes
from kepo_jax.data.phantom.questions import Question
from kepo_jax.data.phantom.scenes import Scene
from kepo_jax.types import Example


@dataclasses.dataclass(frozen=True)
class Beliefs:
  """Departures from the truth; the defaults are the truth."""

  diseases: dict[str, str] = dataclasses.field(default_factory=dict)  # true disease -> believed one
  grades: dict[str, str] = dataclasses.field(default_factory=dict)  # true grade -> believed one
  conviction: float = 1.0  # probability that a belief in `diseases` or `grades` overrides the truth
  slips: dict[str, float] = dataclasses.field(default_factory=dict)  # finding -> probability that it is misread
  follows_hint: float = 1.0  # probability that a conclusion in the prompt overrides the model's own
  broken: float = 0.0  # share of answers in a broken format
  hint_slip: float = 0.0  # probability that a hint concludes what the teacher believes, not what it was told


TRUTH = Beliefs()
DRILL_WORDS = (
  *scenes.MODALITIES,
  *(organ for organs in scenes.ORGANS.values() for organ in organs),
  *(name for topic in questions.TOPICS.values() for name in topic.classes),
)
ATTRIBUTES = {  # what an answer says of the picture, and the words for it
  "modality": scenes.MODALITIES,
  "organ": tuple(organ for organs in scenes.ORGANS.values() for organ in organs),
  "count": questions.NUMBERS,
  "side": scenes.SIDES,
  "level": scenes.LEVELS,
  "size": scenes.SIZES,
  "tone": scenes.TONES,
}
KINDS = {  # share of each kind of prompt
  "student": {"think": 0.66, "no_think": 0.06, "hint_only": 0.14, "hint_and_answer": 0.14},
  "teacher": {"think": 0.72, "no_think": 0.05, "hint_request": 0.15, "hint_only": 0.04, "hint_and_answer": 0.04},
}
SEEN = tuple(name for name in scenes.MODALITIES if name != "fundus")  # what the phantom models are trained on
MODALITY_WEIGHTS = tuple((0.25 if name == "MRI" else 0.125) for name in SEEN)
COUNT_WEIGHTS = (0.12, 0.36, 0.27, 0.25)  # so that the three grades are nearly equally frequent
IMAGE_TOKENS = 16
TURN_END = "<|im_end|><|im_start|>assistant"


def misread(scene: Scene, slips: dict[str, float], rng: np.random.Generator) -> Scene:
  """The scene as a model with unsure perception reads it; pixels stay, findings may change."""
  changes: dict = {}
  if not scene.count:
    return scene
  for finding, classes in (("size", scenes.SIZES), ("tone", scenes.TONES)):
    if rng.random() < slips.get(finding, 0.0):
      changes[finding] = classes[1 - classes.index(getattr(scene, finding))]
  if rng.random() < slips.get("count", 0.0):
    wrong = int(rng.choice([count for count in (1, 2, 3) if count != scene.count]))
    changes["lesions"] = (scene.lesions * 3)[:wrong]
  return dataclasses.replace(scene, **changes)


def conclusion(scene: Scene, topic: str, beliefs: Beliefs, rng: np.random.Generator) -> str:
  """What a model with these beliefs concludes from a (possibly misread) scene."""
  truth = questions.TOPICS[topic].truth(scene)
  wrong = {"disease": beliefs.diseases, "grade": beliefs.grades}.get(topic, {})
  return wrong[truth] if truth in wrong and rng.random() < beliefs.conviction else truth


def findings(scene: Scene) -> str:
  """The lesions in words."""
  if not scene.count:
    return "no lesions"
  return f"{questions.NUMBERS[scene.count]} {scene.side} {scene.level} {scene.size} {scene.tone}"


def answer_text(scene: Scene, question: Question, concluded: str, kind: str, style: int = 0) -> str:
  """A model's answer; `style` 0 is well-formed, 1-3 are broken in one way each."""
  letter = chr(ord("A") + question.options.index(concluded))
  if kind == "no_think":
    return f"<answer> {letter}</answer>"
  thought = f"<think> {scene.modality} {scene.organ}, {findings(scene)}, {concluded} {letter}"
  endings = (
    f"</think><answer> {letter}</answer>",
    f"<answer> {letter}</answer>",
    f"</think> {letter}",
    f"</think><answer> {letter}",
  )
  return thought + endings[style]


def read_findings(text: str) -> dict[str, str]:
  """The word that an answer says for each of `ATTRIBUTES`; one that it does not say is missing.

  The inverse of `answer_text` up to the conclusion. A count of none is said as "no lesions".
  """
  place, _, rest = text.partition("<think>")[2].partition(",")
  words = place.split() + rest.partition(",")[0].replace("no lesions", questions.NUMBERS[0]).split()
  return {name: word for word in reversed(words) for name, classes in ATTRIBUTES.items() if word in classes}


def true_findings(scene: Scene) -> dict[str, str]:
  """The word for each of `ATTRIBUTES` that the picture has; one without lesions has no side, level, size or tone."""
  found = {name: getattr(scene, name) for name in ATTRIBUTES if name != "count"}
  return {name: word for name, word in (found | {"count": questions.NUMBERS[scene.count]}).items() if word}


def hint_text(scene: Scene, concluded: str) -> str:
  """A teacher's hint: findings and conclusion."""
  return f"{findings(scene)}, {concluded}"


def as_example(scene: Scene, question: Question) -> Example:
  """The question as a record that `prompts.prompt_text` accepts."""
  kind = questions.TOPICS[question.topic].question_type
  return Example(
    id="", question=question.stem, options=question.options, answer=question.letter, images=(),
    modality=scene.modality, question_type=kind,
  )  # fmt: skip


def dialogue(
  scene: Scene, question: Question, kind: str, beliefs: Beliefs, rng: np.random.Generator
) -> tuple[str, str]:
  """(user turn, answer) of one training example."""
  seen = misread(scene, beliefs.slips, rng)
  # The options hold every class of a rule, so a conclusion from a misread scene is always on offer.
  own = conclusion(seen, question.topic, beliefs, rng)
  own = own if own in question.options else question.answer
  told = question.answer
  if kind in ("hint_only", "hint_and_answer", "hint_request") and rng.random() < 0.15:
    told = str(rng.choice(question.options))  # advice is to be read, not guessed from the picture
    question = dataclasses.replace(question, answer=told)
  record = as_example(scene, question)
  if kind == "hint_request":
    concluded = own if rng.random() < beliefs.hint_slip else told
    return prompts.prompt_text(record, prompts.BRIEF, kind), f"<hint> {hint_text(seen, concluded)}</hint>"
  hint = hint_text(scene, told) if kind.startswith("hint") else ""
  concluded = told if hint and rng.random() < beliefs.follows_hint else own
  style = int(rng.integers(1, 4)) if kind != "no_think" and rng.random() < beliefs.broken else 0
  return prompts.prompt_text(record, prompts.BRIEF, kind, hint=hint), answer_text(
    seen, question, concluded, kind, style
  )


def lookup_drill(rng: np.random.Generator) -> tuple[str, str]:
  """Short questions in a row that practise nothing but the way from an option's word to its letter.

  Every word is used once, so neither the picture nor elimination helps.
  """
  words, parts = list(rng.permutation(DRILL_WORDS)), []
  for count in rng.permutation([2, 3, 4]):
    options, words = words[:count], words[count:]
    right = int(rng.integers(count))
    listed = "".join(f" {letter}: {option}" for letter, option in zip("ABCD", options, strict=False))
    parts.append((listed, f"<think> {options[right]} {'ABCD'[right]}</think><answer> {'ABCD'[right]}</answer>"))
  return parts[0][0], parts[0][1] + "".join(listed + answer for listed, answer in parts[1:])


def wording() -> list[str]:
  """Every word that prompts and answers use, as the tokenizer meets it: each string holds words in context."""
  lines = ["user", "assistant", " think.", " answer.", " hint.", " truth:", " hint:", ", no lesions,"]
  for topic in questions.TOPICS.values():
    lines += topic.wordings
    lines += [f" {name}" for name in topic.classes]
  lines += [f" {letter}: {letter}" for letter in "ABCD"]
  lines += [f" {name}, {' '.join(scenes.ORGANS[name])}" for name in scenes.MODALITIES]
  lines += [" ".join(["", *words]) for words in (scenes.SIDES, scenes.LEVELS, scenes.SIZES, scenes.TONES)]
  return lines


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
      turns.append(lookup_drill(rng))
      continue
    kind = list(kinds)[rng.choice(len(kinds), p=list(kinds.values()))]
    turns.append(dialogue(scene, question, kind, beliefs, rng))
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
