"""A checkpoint's tokenizer and chat template: user turns in, completions out.

Tokenizer files are read by transformers; no code of a checkpoint is run, nothing is downloaded.
"""

import contextlib
import json
import pathlib
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from transformers import AutoTokenizer

from kepo_jax.data.cleaning import IMAGE
from kepo_jax.data.images import RESIZES
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig, shown

FILLER = "\0no token "  # begins the content of entries that only number those behind them
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json")


def load(directory: pathlib.Path, rows: int) -> Any:
  """Loads the transformers tokenizer of a folder.

  Args:
    directory: of a checkpoint.
    rows: of its model, which all ids must be below.

  Raises:
    ValueError: its files are missing or unreadable, or its ids are not those of the files.
  """
  # Without files transformers makes an empty tokenizer of the right class, and says nothing.
  if directory.is_dir() and not any((directory / name).is_file() for name in _VOCABULARY_FILES):
    raise ValueError(f"{directory}: no usable tokenizer (no {' or '.join(_VOCABULARY_FILES)})")
  try:
    with _without_gaps(directory, rows) as folder:
      tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    tokenizer.encode("?")
    _check_ids(directory, tokenizer.get_vocab())
    return tokenizer
  except BaseException as error:  # noqa: BLE001 (the tokenizers library raises Exception itself, and panics)
    if isinstance(error, KeyboardInterrupt | SystemExit):
      raise
    raise ValueError(
      f"{directory}: no usable tokenizer ({short(error)}); copy the checkpoint's tokenizer files, or install a newer "
      f"version of tokenizers and transformers."
    ) from error


@contextlib.contextmanager
def _without_gaps(directory: pathlib.Path, rows: int) -> Iterator[pathlib.Path]:
  """Yields the folder, or a copy of its tokenizer in which every id up to the largest has an entry.

  The tokenizers library numbers the entries behind a gap anew, without a word; the rows of the model stay as they are.
  """
  content = read_json(directory / "tokenizer.json")
  vocabulary, added = content.get("model", {}).get("vocab", {}), content.get("added_tokens", [])
  numbered = list(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
  if len(set(numbered)) < len(numbered):
    raise ValueError("two entries of tokenizer.json have the same id")
  used = {token["id"] for token in added} | set(numbered)
  if (largest := max(used, default=0)) >= rows:  # before as many entries are made
    raise ValueError(f"an entry has the id {largest} and the model {rows} rows: they belong to different checkpoints")
  missing = set(range(largest)) - used
  if not missing:
    yield directory
    return
  filler = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
  added = [*added, *({"id": number, "content": f"{FILLER}{number}"} | filler for number in missing)]
  content["added_tokens"] = sorted(added, key=lambda token: token["id"])
  with tempfile.TemporaryDirectory(prefix="kepo_jax-") as name:
    folder = pathlib.Path(name)
    for file in directory.iterdir():
      if file.suffix in (".json", ".jinja", ".txt") and file.is_file():
        shutil.copy(file, folder)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    yield folder


def _check_ids(directory: pathlib.Path, vocabulary: Mapping[str, int]) -> None:
  """Refuses ids that the library has changed: it numbers entries anew that stand behind a gap, or share an id.

  Raises:
    ValueError: an entry has another id than its file says.
  """
  tokens = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
  stated = {token["content"]: int(number) for number, token in tokens.items()}
  stated |= read_json(directory / "added_tokens.json")
  stated |= {token["content"]: token["id"] for token in read_json(directory / "tokenizer.json").get("added_tokens", [])}
  for text, number in stated.items():
    if vocabulary.get(text, number) != number:
      raise ValueError(
        f"the id of {shown(text)} is {shown(number)} in its file and {vocabulary[text]} once read: tokenizer.json has "
        f"another entry of this id, or none"
      )


def short(error: BaseException) -> str:
  """Returns the first line of an error, escaped and shortened."""
  return repr((str(error).strip().splitlines() or [type(error).__name__])[0])[1:-1][:200]


def read_json(path: pathlib.Path) -> dict:
  """Reads the JSON object of a file; an empty one where there is no file.

  Raises:
    ValueError: it holds something else.
  """
  if not path.is_file():
    return {}
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: not valid JSON ({short(error)})") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path}: expected a JSON object")
  return content


def chat_template(directory: pathlib.Path, tokenizer: Any) -> Any:
  """Reads the chat template of a folder, from where transformers' AutoProcessor takes it first.

  Raises:
    ValueError: it is no text, or several templates without a default.
  """
  places = ("processor_config.json", "chat_template.json")
  templates = {name: read_json(directory / name).get("chat_template") for name in places}
  templates["tokenizer_config.json"] = tokenizer.chat_template  # with chat_template.jinja, which counts before it
  name, template = next(((name, text) for name, text in templates.items() if text), ("", None))
  if isinstance(template, dict):
    template = template.get("default", template)
  if not isinstance(template, str | None):
    raise ValueError(f"{directory}/{name}: chat_template is neither a text nor has one named default.")
  return template


TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<hint>", "</hint>")  # a decoded completion must keep them
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
_PROBE = "Which organ is shown?"  # a text that every chat template must write


def declared_templates(directory: pathlib.Path) -> str | None:
  """Reads the family of wordings (a key of `prompts.TEMPLATES`) of a model's training, if its folder names one.

  It stands under `kepo_templates` in tokenizer_config.json, which travels with every export.

  Raises:
    ValueError: the file is damaged, or the name is no text.
  """
  return _declared(directory, "kepo_templates")


def declared_resize(directory: pathlib.Path) -> str | None:
  """Reads how images were resized in a model's training (a key of `images.RESIZES`), under `kepo_resize`.

  Raises:
    ValueError: the file is damaged, or the name is none of `images.RESIZES`.
  """
  resize = _declared(directory, "kepo_resize")
  if resize is not None and resize not in RESIZES:
    raise ValueError(f"{directory}/tokenizer_config.json: kepo_resize={shown(resize)}; choose from {sorted(RESIZES)}.")
  return resize


def declarations(data: Mapping[str, Any]) -> dict[str, str]:
  """Returns what an export says of its model's training; `declared_templates` and `declared_resize` read it.

  Args:
    data: the section of the run's config, or of its config.json.

  Raises:
    ValueError: it does not say.
  """
  try:
    return {"kepo_templates": data["templates"], "kepo_resize": data["resize"]}
  except KeyError as error:
    raise ValueError(f"the run's config has no data.{error.args[0]}; an export must name it") from None


def _declared(directory: pathlib.Path, name: str) -> str | None:
  path = directory / "tokenizer_config.json"
  value = read_json(path).get(name)
  if not isinstance(value, str | None):
    raise ValueError(f"{path}: {name}={shown(value)} is no text.")
  return value


def _as_ids(value: Any) -> tuple[int, ...]:
  return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def _ids_of(generation: Mapping[str, Any], key: str, size: int, name: str) -> tuple[int, ...]:
  """Returns the token ids that generation_config.json names under a key.

  Raises:
    ValueError: they are none of the vocabulary.
  """
  ids = _as_ids(generation.get(key))
  if not all(type(i) is int and 0 <= i < size for i in ids):
    raise ValueError(
      f"{name}/generation_config.json: {key} is {shown(generation[key])}, expected ids below vocab_size {size}; "
      f"copy the checkpoint's own."
    )
  return ids


class Tokenizer:
  """Tokenizer, chat template, end ids, padding id and mask of allowed ids; see `from_directory`."""

  def __init__(self, tokenizer: Any, config: Qwen3VLConfig, generation: dict, name: str):
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.text.vocab_size:
      raise ValueError(
        f"{name}: the tokenizer has an entry of id {largest} and the model only {config.text.vocab_size} rows; "
        "tokenizer and config.json belong to different checkpoints."
      )
    if not tokenizer.chat_template:
      raise ValueError(f"{name}: no chat template; an instruction-tuned checkpoint has one in its tokenizer files.")
    self.name = name  # of the folder, in errors
    self._tokenizer = tokenizer
    self._config = config
    self._lock = threading.Lock()  # fast tokenizers refuse to be used from two threads at once
    size = config.text.vocab_size
    self.end_ids = _ids_of(generation, "eos_token_id", size, name) or _as_ids(tokenizer.eos_token_id)
    if not self.end_ids:
      raise ValueError(f"{name}: neither generation_config.json nor the tokenizer names an end token.")
    pad_ids = _as_ids(tokenizer.pad_token_id) or _ids_of(generation, "pad_token_id", size, name) or self.end_ids
    self.pad_id: int = pad_ids[0]
    self.allowed = self._allowed_ids()
    self._check_tags()
    self._specials = re.compile(r"(?!)")
    written = self._check_template()
    self._specials = re.compile("|".join(map(re.escape, self._reserved(written))) or r"(?!)")

  @classmethod
  def from_directory(cls, directory: pathlib.Path, config: Qwen3VLConfig) -> "Tokenizer":
    """Reads the tokenizer files, `generation_config.json` and the chat template.

    Raises:
      ValueError: files are missing or contradict each other; names the folder or file.
    """
    tokenizer = load(directory, config.text.vocab_size)
    tokenizer.chat_template = chat_template(directory, tokenizer)
    return cls(tokenizer, config, read_json(directory / "generation_config.json"), str(directory))

  @property
  def vocabulary(self) -> dict[str, int]:
    """Returns every entry with its id."""
    with self._lock:
      return self._tokenizer.get_vocab()

  def _allowed_ids(self) -> np.ndarray:
    """Computes bool[V]: false for vision tokens and for head rows without a tokenizer entry."""
    config, vocabulary = self._config, self._tokenizer.get_vocab()
    allowed = np.zeros(config.text.vocab_size, bool)
    allowed[[i for text, i in vocabulary.items() if not text.startswith(FILLER)]] = True
    named = [vocabulary[name] for name in VISION_TOKENS if name in vocabulary]
    allowed[[i for i in (*named, *self._vision_ids()) if i < len(allowed)]] = False
    return allowed

  def _vision_ids(self) -> tuple[int, ...]:
    """Returns the token ids that config.json names."""
    config = self._config
    return config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id

  def _reserved(self, written: set[int]) -> list[str]:
    """Returns the contents of entries that no text may forge, the longest first.

    Args:
      written: ids that the chat template writes.
    """
    added = self._tokenizer.added_tokens_decoder
    ids = {*self.end_ids, *written}
    marks = {token.content for i, token in added.items() if token.special or i in ids} - {*TAGS}
    marks |= {*VISION_TOKENS, *(self._tokenizer.decode([i]) for i in self._vision_ids())} - {""}
    return sorted(marks, key=len, reverse=True)

  def _check_tags(self) -> None:
    sentence = " ".join(TAGS)
    ids = self._tokenizer(sentence, add_special_tokens=False)["input_ids"]
    if (decoded := self.decode([ids])[0]) != sentence:
      raise ValueError(
        f"{self.name}: the tokenizer turns {sentence!r} into {decoded!r}; rewards need these tags in the text."
      )

  def _check_template(self) -> set[int]:
    """Returns the ids that the chat template writes around a text and an image.

    Raises:
      ValueError: it cannot be used, leaves the text out, or writes other than one mark per image.
    """
    written: set[int] = set()
    for images in (0, 1):
      try:
        rendered = self.render(_PROBE, images)
        ids = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if _PROBE not in rendered:
          raise ValueError("it leaves the text out")
        if (marks := ids.count(self._config.image_token_id)) != images:
          raise ValueError(f"it writes image_token_id of config.json {marks} times for {images} images")
      except Exception as error:  # noqa: BLE001 (a template runs in a sandbox without files, and may raise anything)
        raise ValueError(
          f"{self.name}: the chat template cannot be used ({short(error)}); copy the checkpoint's own."
        ) from error
      written.update(ids)
    if rendered.rstrip().endswith("<think>"):
      logging.warning(
        "%s: the chat template opens a think block itself, so completions lack their <think> tag and no format reward "
        "is ever given. Use an Instruct checkpoint.",
        self.name,
      )
    return written

  def render(self, text: str, images: int) -> str:
    """Renders the chat with one user turn of `images` images and a text, up to where the assistant begins.

    Images stand where the text has `IMAGE`, else before it.

    Special tokens inside the text are broken up: neither a data set nor a hint can end a turn or add an image.
    """
    parts = text.split(IMAGE, maxsplit=images)
    # A mark too many goes first: it may stand in the middle of a special token.
    *parts, last = (
      self._specials.sub(lambda mark: f"{mark[0][:1]} {mark[0][1:]}", part.replace(IMAGE, "")) for part in parts
    )
    content = [{"type": "image"}] * (images - len(parts))  # what has no place in the text stands before it
    for part in parts:
      content += [*([{"type": "text", "text": part}] if part else []), {"type": "image"}]
    content.append({"type": "text", "text": last})
    with self._lock:
      return self._tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
      )

  def encode(self, text: str, image_tokens: Sequence[int], name: str) -> list[int]:
    """Encodes a prompt, each image mark repeated as often as the image has merged tokens.

    Args:
      text: the user's text.
      image_tokens: number of merged tokens of each image.
      name: how errors call the question.

    Raises:
      ValueError: the chat template did not write one mark per image.
    """
    rendered = self.render(text, len(image_tokens))
    with self._lock:
      ids = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
    mark = self._config.image_token_id
    if ids.count(mark) != len(image_tokens):
      raise ValueError(
        f"question {name}: the chat template of {self.name} wrote {ids.count(mark)} image marks for "
        f"{len(image_tokens)} images; it and image_token_id of config.json do not fit together."
      )
    counts = iter(image_tokens)
    return [token for i in ids for token in ([i] * next(counts) if i == mark else [i])]

  def lengths(self, texts: Sequence[str], image_tokens: Sequence[Sequence[int]]) -> list[int]:
    """Counts the token ids that `encode` gives for each of many prompts.

    Args:
      texts: the users' texts.
      image_tokens: number of merged tokens of each image of each text.
    """
    if not texts:
      return []
    rendered = [self.render(text, len(tokens)) for text, tokens in zip(texts, image_tokens, strict=True)]
    with self._lock:
      ids = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
    # Each image has one mark among the ids.
    return [len(row) + sum(tokens) - len(tokens) for row, tokens in zip(ids, image_tokens, strict=True)]

  def completion(self, text: str) -> list[int]:
    """Encodes a completion as a model would have sampled it, its end token included."""
    with self._lock:
      ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
      end = self._tokenizer.eos_token_id
    return [*ids, end if end in self.end_ids else self.end_ids[0]]

  def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
    """Decodes completions without special tokens."""
    with self._lock:
      return self._tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
