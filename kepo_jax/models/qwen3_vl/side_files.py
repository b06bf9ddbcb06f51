"""What a checkpoint folder holds besides weights: config.json, the model card, and the files of its source."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from etils import epath

from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig, shown

_WRITTEN_HERE = ("config.json", "README.md")
_NOT_CARRIED = ("adapter_config.json",)  # its weights stay behind as well
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
_CODE_SUFFIXES = (".py", ".pyc", ".so", ".pkl", ".pickle")  # nothing here runs them, and an export hands none on

_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- kepo
---

# {name}

A Qwen3-VL of {count} parameters, exported by kepo_jax{origin}. Weights are stored as {dtype}.

```python
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

model = Qwen3VLForConditionalGeneration.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

{licence}
"""


def config_record(config: Qwen3VLConfig) -> dict[str, Any]:
  """Returns a config.json in the schema of the published checkpoints."""
  text, vision = dataclasses.asdict(config.text), dataclasses.asdict(config.vision)
  rope = {"rope_type": "default", "mrope_section": list(text.pop("mrope_section")), "mrope_interleaved": True}
  vision["deepstack_visual_indexes"] = list(vision["deepstack_visual_indexes"])
  vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision.pop("rope_theta")}
  top = {
    f.name: getattr(config, f.name)
    for f in dataclasses.fields(config)
    if f.name not in ("text", "vision", "attention", "lora")
  }
  return {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    **top,
    "text_config": {"model_type": "qwen3_vl_text", "hidden_act": "silu", "rope_scaling": rope, **text},
    "vision_config": {"model_type": "qwen3_vl_vision", "hidden_act": "gelu_pytorch_tanh", **vision},
  }


def _with_dtype(record: dict[str, Any], dtype: str) -> dict[str, Any]:
  """Sets the dtype everywhere in a record of config.json, and adds it if it is missing."""
  record = {
    key: _with_dtype(value, dtype) if key in ("text_config", "vision_config") and _states_dtype(value) else value
    for key, value in record.items()
  }
  key = "torch_dtype" if "torch_dtype" in record else "dtype"
  return record | {key: dtype}


def _states_dtype(record: dict[str, Any]) -> bool:
  return "dtype" in record or "torch_dtype" in record


def is_side_file(file: pathlib.Path) -> bool:
  """Returns true for tokenizer, template, processor and generation files; false for weights, code, config and card."""
  return (
    file.is_file()
    and not file.name.startswith(".")
    and file.name not in _WRITTEN_HERE + _NOT_CARRIED
    and not file.name.endswith(_WEIGHT_SUFFIXES + _CODE_SUFFIXES)
  )


def write(
  directory: pathlib.Path,
  config: Qwen3VLConfig,
  source: pathlib.Path | None,
  *,
  name: str,
  origin: str,
  dtype: str,
  count: int,
  declared: Mapping[str, str] | None = None,
) -> None:
  """Writes config.json and the model card, and copies the side files of `source` verbatim but for code and `declared`.

  Args:
    directory: an existing folder.
    config: sizes.
    source: the folder the model came from, whose config.json is kept but for the dtype.
    name: of the model, for the card.
    origin: name of the source as it was asked for; a download lies in a folder named after a commit.
    dtype: of the stored weights, for example "bfloat16".
    count: parameters.
    declared: what tokenizer_config.json says besides, for example {"kepo_resize": "native"}; its own fields stay.

  Raises:
    ValueError: tokenizer_config.json is no JSON object.
  """
  record = config_record(config) if source is None else json.loads((source / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(_with_dtype(record, dtype), indent=2) + "\n")
  card = _CARD.format(
    name=name,
    count=f"{count:,}",
    dtype=dtype,
    origin=f" from {origin}" if source else "",
    licence=f"The licence of {origin} applies." if source else "",
  )
  (directory / "README.md").write_text(card.rstrip() + "\n")
  for file in sorted(source.iterdir()) if source else ():
    if is_side_file(file):
      shutil.copyfile(file, directory / file.name)
  if declared:
    _declare(directory / "tokenizer_config.json", declared)


def _declare(path: pathlib.Path, declared: Mapping[str, str]) -> None:
  """Adds fields to a JSON file, which is made if there is none."""
  try:
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path.name} of the source is not valid JSON ({shown(str(error))})") from error
  if not isinstance(record, dict):
    raise ValueError(f"{path.name} of the source is no JSON object")
  path.write_text(json.dumps(record | dict(declared), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def replace(partial: pathlib.Path, directory: pathlib.Path) -> None:
  """Puts a finished folder in the place of an earlier export, or of nothing.

  The earlier one is renamed, not emptied: after a kill `directory` is the old model or the new one, each whole, or
  between two renames missing until `settle` puts the old one back.
  """
  check_replaceable(directory)
  aside = _aside(directory)
  if directory.exists():
    directory.rename(aside)
  partial.rename(directory)
  if aside.exists():
    aside.rename(partial)  # deleted under this name, so that what lies under the other one is always whole
    shutil.rmtree(partial, ignore_errors=True)  # the new model stands; `settle` tries again


def settle(partial: pathlib.Path, directory: pathlib.Path) -> None:
  """Ends a `replace` that was killed: without a new folder the old one comes back; what is left over is deleted.

  Raises:
    OSError: a folder cannot be renamed.
  """
  shutil.rmtree(partial, ignore_errors=True)
  aside = _aside(directory)
  if aside.exists():
    aside.rename(partial if directory.exists() else directory)
    shutil.rmtree(partial, ignore_errors=True)


def _aside(directory: pathlib.Path) -> pathlib.Path:
  """Returns the path of an earlier export while the new one replaces it."""
  return directory.with_name(f".{directory.name}.replaced")


def check_replaceable(directory: pathlib.Path | epath.Path) -> None:
  """Refuses to write over anything but an empty folder or an earlier export.

  Raises:
    ValueError: the folder holds other things.
  """
  if not directory.exists():
    return
  card = directory / "README.md"
  if not directory.is_dir() or any(directory.iterdir()) and not (card.exists() and "kepo_jax" in card.read_text()):
    raise ValueError(f"{directory} exists and is no earlier export; choose an empty or a new folder")
