"""Sizes of a Qwen3-VL, as frozen records with the field names of Hugging Face's config.json."""

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from etils import epath

_RELATIVES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl_moe")
# Far above any model, and small enough that a damaged file cannot fill the memory before it meets the weights.
_MOST, _MOST_LAYERS = 2**24, 1_000
_LONGEST = 80  # characters that an error quotes
_QUOTE = reprlib.Repr()
_QUOTE.maxstring = _QUOTE.maxother = _QUOTE.maxlong = _LONGEST
_QUOTE.maxlevel = 2


def shown(value: Any) -> str:
  """Quotes what stands in a foreign file: in one line, escaped, and at most 80 characters."""
  text = _QUOTE.repr(value)
  return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Sizes of the vision tower."""

  depth: int  # blocks
  hidden_size: int  # width of a patch row
  intermediate_size: int  # width of the MLP
  num_heads: int
  out_hidden_size: int  # width of a merged image token, the text width
  num_position_embeddings: int  # rows of the square position table
  deepstack_visual_indexes: tuple[int, ...]  # blocks, from 0, whose output is DeepStack
  in_channels: int = 3
  patch_size: int = 16  # pixels
  temporal_patch_size: int = 2  # frames
  spatial_merge_size: int = 2  # patches per side of a merged token
  rope_theta: float = 10_000.0

  @property
  def head_dim(self) -> int:
    """Width of one attention head."""
    return self.hidden_size // self.num_heads

  @property
  def patch_width(self) -> int:
    """Numbers in one flattened patch: channels x frames x height x width."""
    return self.in_channels * self.temporal_patch_size * self.patch_size**2

  @property
  def merge_area(self) -> int:
    """Patch rows that become one image token."""
    return self.spatial_merge_size**2

  @property
  def table_side(self) -> int:
    """Rows, and columns, of the square position table."""
    return round(self.num_position_embeddings**0.5)


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Sizes of the text decoder."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rope_theta: float
  mrope_section: tuple[int, ...] = (24, 20, 20)  # frequencies of the temporal, height and width axes
  rms_norm_eps: float = 1e-6
  attention_bias: bool = False


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank matrices that are trained in the place of the weights."""

  rank: int
  alpha: float  # the product of the matrices is scaled by alpha / rank
  targets: tuple[str, ...]  # projections of every decoder layer, of `lora.TARGETS`


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig:
  """Sizes and special tokens of a Qwen3-VL, and what of a run no checkpoint knows: attention and LoRA."""

  text: TextConfig
  vision: VisionConfig
  tie_word_embeddings: bool = False
  image_token_id: int = 151655
  video_token_id: int = 151656
  vision_start_token_id: int = 151652
  vision_end_token_id: int = 151653
  attention: str = "auto"  # auto, plain or fused; see attention.kernel_for
  lora: LoraConfig | None = None  # of a run; no checkpoint folder has it

  def __post_init__(self):
    _check(self)

  @classmethod
  def from_dict(cls, record: Mapping[str, Any], name: str = "config.json") -> "Qwen3VLConfig":
    """Returns the config of a parsed config.json, of the published schema or of the one that transformers 5 writes.

    Args:
      record: the parsed file.
      name: how errors call the file.

    Raises:
      ValueError: another architecture, a missing field, or an option that is not supported.
    """
    if not isinstance(record, Mapping):
      raise ValueError(f"{name} holds a {type(record).__name__}, expected a JSON object")
    _check_architecture(record, name)
    text = _section(record, "text_config", name)
    vision = _section(record, "vision_config", name)
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    top = {"tie_word_embeddings": record.get("tie_word_embeddings", text.get("tie_word_embeddings", False))}
    top |= {token: record[token] for token in tokens if token in record}
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    top = {key: _checked(key, value, kinds[key], name) for key, value in top.items()}
    sizes = _text_config(text, name), _vision_config(vision, name)
    try:
      config = cls(*sizes, **top)
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from None
    if beyond := [token for token in tokens if getattr(config, token) >= config.text.vocab_size]:
      raise ValueError(f"{name}: {', '.join(beyond)} not below vocab_size {config.text.vocab_size}")
    return config

  @classmethod
  def from_directory(cls, path: str | epath.PathLike) -> "Qwen3VLConfig":
    """Returns the config in `path`/config.json.

    Raises:
      ValueError: no such file, no JSON, or as `from_dict`.
    """
    file = epath.Path(path) / "config.json"
    if not file.is_file():
      raise ValueError(f"{file} does not exist; expected a Hugging Face folder of a Qwen3-VL")
    try:
      record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{file} is not JSON: {shown(str(error))}") from error
    return cls.from_dict(record, str(file))


def _check_architecture(record: Mapping[str, Any], name: str) -> None:
  model_type = record.get("model_type")
  if model_type == "qwen3_vl":
    return
  relative = " (a relative that is not supported)" if str(model_type) in _RELATIVES else ""
  raise ValueError(
    f"{name}: model_type is {shown(model_type)}{relative}; supported is 'qwen3_vl', the dense Qwen3-VL "
    f"(2B, 4B, 8B, 32B or any other size)."
  )


def _section(record: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
  section = record.get(key)
  if not isinstance(section, Mapping):
    raise ValueError(f"{name}: {key} is missing")
  return section


def _optional_section(section: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
  value = section.get(key)
  if not isinstance(value, Mapping | None):
    raise ValueError(f"{name}: {key} is {shown(value)}, expected a JSON object")
  return dict(value or {})


def _known_fields(record_type: type, section: Mapping[str, Any], name: str) -> dict[str, Any]:
  """Returns the fields of `record_type` that are in `section`; those without a default must be there."""
  fields = dataclasses.fields(record_type)
  missing = [f.name for f in fields if f.default is dataclasses.MISSING and section.get(f.name) is None]
  if missing:
    raise ValueError(f"{name}: missing {', '.join(missing)}")
  return {f.name: _checked(f.name, section[f.name], f.type, name) for f in fields if section.get(f.name) is not None}


def _checked(key: str, value: Any, field_type: Any, name: str) -> Any:
  """Returns a value of a config.json, of the type of its field and of a size that a model can have.

  Raises:
    ValueError: it is not.
  """
  if field_type is bool:
    fits, expected = isinstance(value, bool), "true or false"
  elif field_type is float:
    fits, expected = type(value) in (int, float) and 0 < value < math.inf, "a positive number"
  elif field_type is int and key.endswith("_id"):
    fits, expected = type(value) is int and value >= 0, "a token id"
  elif field_type is int:
    most = _MOST_LAYERS if key in ("depth", "num_hidden_layers") else _MOST
    fits, expected = type(value) is int and 0 < value <= most, f"a number from 1 to {most:,}"
  else:
    fits = isinstance(value, list | tuple) and all(type(item) is int and 0 <= item <= _MOST for item in value)
    expected = "a list of numbers"
  if not fits:
    raise ValueError(f"{name}: {key} is {shown(value)}, expected {expected}")
  return tuple(value) if isinstance(value, list) else value


def _refuse_unless(value: Any, expected: Any, what: str, name: str) -> None:
  if value != expected:
    raise ValueError(f"{name}: {what} is {shown(value)}, supported is {shown(expected)}")


def _text_config(section: Mapping[str, Any], name: str) -> TextConfig:
  name = f"{name}: text_config"
  # Published checkpoints have rope_theta beside rope_scaling; transformers 5 writes rope_parameters, and of both it
  # reads rope_scaling.
  rope = _optional_section(section, "rope_scaling", name) or _optional_section(section, "rope_parameters", name)
  _refuse_unless(section.get("hidden_act", "silu"), "silu", "hidden_act", name)
  _refuse_unless(rope.get("rope_type", rope.get("type", "default")), "default", "rope_type", name)
  _refuse_unless(rope.get("mrope_interleaved", True), True, "mrope_interleaved", name)
  values = dict(section)
  values.setdefault("num_key_value_heads", section.get("num_attention_heads"))
  values["rope_theta"] = rope.get("rope_theta", section.get("rope_theta"))
  values["mrope_section"] = rope.get("mrope_section")
  return TextConfig(**_known_fields(TextConfig, values, name))


def _vision_config(section: Mapping[str, Any], name: str) -> VisionConfig:
  name = f"{name}: vision_config"
  _refuse_unless(section.get("hidden_act", "gelu_pytorch_tanh"), "gelu_pytorch_tanh", "hidden_act", name)
  rope = _optional_section(section, "rope_parameters", name)
  values = dict(section)
  values["rope_theta"] = rope.get("rope_theta", section.get("rope_theta"))
  for key in ("patch_size", "temporal_patch_size"):
    # transformers allows a list where the published files have a number.
    if isinstance(values.get(key), list | tuple) and values[key]:
      _refuse_unless(values[key], [values[key][0]] * len(values[key]), key, name)
      values[key] = values[key][0]
  return VisionConfig(**_known_fields(VisionConfig, values, name))


def _check(config: Qwen3VLConfig) -> None:
  """Refuses sizes that contradict each other, with all contradictions in one error."""
  text, vision = config.text, config.vision
  deepstack = vision.deepstack_visual_indexes
  rules = {
    "num_attention_heads is no multiple of num_key_value_heads": text.num_attention_heads % text.num_key_value_heads,
    "mrope_section does not hold three numbers that sum to head_dim / 2": len(text.mrope_section) != 3
    or sum(text.mrope_section) * 2 != text.head_dim,
    "vision hidden_size is no multiple of num_heads": vision.hidden_size % vision.num_heads,
    "vision head size is no multiple of 4": vision.head_dim % 4,
    "num_position_embeddings is no square": vision.table_side**2 != vision.num_position_embeddings,
    "vision out_hidden_size differs from the text hidden_size": vision.out_hidden_size != text.hidden_size,
    "deepstack_visual_indexes are not ascending block numbers": list(deepstack) != sorted(set(deepstack))
    or any(not 0 <= layer < vision.depth for layer in deepstack),
    "there are fewer decoder layers than deepstack_visual_indexes": text.num_hidden_layers < len(deepstack),
  }
  broken = [rule for rule, violated in rules.items() if violated]
  if broken:
    raise ValueError("; ".join(broken))


def _size(hidden: int, mlp: int, layers: int, heads: int, tied: bool, large_tower: bool) -> Qwen3VLConfig:
  tower = (27, 1152, 4304, (8, 16, 24)) if large_tower else (24, 1024, 4096, (5, 11, 17))
  depth, vision_hidden, vision_mlp, deepstack = tower
  return Qwen3VLConfig(
    text=TextConfig(
      vocab_size=151936,
      hidden_size=hidden,
      intermediate_size=mlp,
      num_hidden_layers=layers,
      num_attention_heads=heads,
      num_key_value_heads=8,
      head_dim=128,
      rope_theta=5_000_000.0,
    ),
    vision=VisionConfig(
      depth=depth,
      hidden_size=vision_hidden,
      intermediate_size=vision_mlp,
      num_heads=16,
      out_hidden_size=hidden,
      num_position_embeddings=2304,
      deepstack_visual_indexes=deepstack,
    ),
    tie_word_embeddings=tied,
  )


SIZES = {
  "Qwen3-VL-2B": _size(2048, 6144, 28, 16, tied=True, large_tower=False),
  "Qwen3-VL-4B": _size(2560, 9728, 36, 32, tied=True, large_tower=False),
  "Qwen3-VL-8B": _size(4096, 12288, 36, 32, tied=False, large_tower=True),
  "Qwen3-VL-32B": _size(5120, 25600, 64, 64, tied=False, large_tower=True),
}
