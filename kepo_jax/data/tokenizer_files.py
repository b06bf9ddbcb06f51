"""The tokenizer files of a checkpoint folder, read by transformers; no code of it is run, nothing is downloaded."""

import contextlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import AutoTokenizer

from kepo_jax.models.qwen3_vl.config import shown

FILLER = "\0no token "  # begins the content of entries that only number those behind them
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json")


def load(directory: pathlib.Path, rows: int) -> Any:
  """The transformers tokenizer of a folder.

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
  """The folder, or a copy of its tokenizer in which every id up to the largest has an entry.

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
  told = {token["content"]: int(number) for number, token in tokens.items()}
  told |= read_json(directory / "added_tokens.json")
  told |= {token["content"]: token["id"] for token in read_json(directory / "tokenizer.json").get("added_tokens", [])}
  for text, number in told.items():
    if vocabulary.get(text, number) != number:
      raise ValueError(
        f"the id of {shown(text)} is {shown(number)} in its file and {vocabulary[text]} once read: tokenizer.json has "
        f"another entry of this id, or none"
      )


def short(error: BaseException) -> str:
  """The first line of an error, escaped, and cut where it is long."""
  return repr((str(error).strip().splitlines() or [type(error).__name__])[0])[1:-1][:200]


def read_json(path: pathlib.Path) -> dict:
  """The JSON object of a file; an empty one where there is no file.

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
  """The chat template of a folder, from where transformers' AutoProcessor takes it first.

  Raises:
    ValueError: it is no text, or several templates without a default.
  """
  places = ("processor_config.json", "chat_template.json")
  found = {name: read_json(directory / name).get("chat_template") for name in places}
  found["tokenizer_config.json"] = tokenizer.chat_template  # with chat_template.jinja, which counts before it
  name, template = next(((name, text) for name, text in found.items() if text), ("", None))
  if isinstance(template, dict):
    template = template.get("default", template)
  if not isinstance(template, str | None):
    raise ValueError(f"{directory}/{name}: chat_template is neither a text nor has one named default.")
  return template
