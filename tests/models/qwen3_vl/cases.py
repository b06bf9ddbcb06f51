"""Tiny Qwen3-VL models and prompts, shared by the tests of this folder; no torch in here."""

import copy
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from kepo_jax.models.qwen3_vl import checkpoint, model, positions
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.types import Prompts, VisionInputs

# A prompt is a sequence of text lengths and image grids (rows, columns) in patches.
Layout = tuple[int | tuple[int, int], ...]

PAD = 0
TINY = {
  "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "tie_word_embeddings": True,
  "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93,
  "text_config": {
    "model_type": "qwen3_vl_text", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "max_position_embeddings": 4096,
    "rope_theta": 100.0,
    "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
  },
  "vision_config": {
    "model_type": "qwen3_vl", "depth": 4, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2,
    "in_channels": 3, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 32,
    "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1, 2], "hidden_act": "gelu_pytorch_tanh",
  },
}  # fmt: skip


def config_record(text: dict[str, Any] = {}, vision: dict[str, Any] = {}, **top: Any) -> dict[str, Any]:  # noqa: B006
  """The parsed config.json of a tiny model, with changes; None removes a field."""
  record = copy.deepcopy(TINY | top)
  for section, changes in (("text_config", text), ("vision_config", vision)):
    changed = record[section] | copy.deepcopy(changes)
    record[section] = {name: value for name, value in changed.items() if value is not None}
  record["vision_config"]["out_hidden_size"] = record["text_config"].get("hidden_size")
  return record


def redrawn(params: Any, seed: int) -> Any:
  """Parameters under which errors show: matrices 1/sqrt(fan in), biases 0.3, norms in (0.5, 1.5), position table 1.

  With the usual initial weights (biases 0, norms 1, matrices 0.02) a swapped GELU changes logits by 1e-6.
  """
  rng = np.random.RandomState(seed)  # a stream that no release of NumPy changes

  def draw(path, leaf):
    names = [part.key for part in path]
    if names[-1] == "bias":
      values = 0.3 * rng.standard_normal(leaf.shape)
    elif any("norm" in name for name in names):
      values = rng.uniform(0.5, 1.5, leaf.shape)
    elif "pos_embed" in names:
      values = rng.standard_normal(leaf.shape)
    else:
      values = rng.standard_normal(leaf.shape) * leaf.shape[-1] ** -0.5
    return values.astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, params)


def prompt_tokens(config: Qwen3VLConfig, layout: Layout, rng: np.random.RandomState) -> tuple[list[int], list]:
  """Token ids and patch grids of one prompt."""
  tokens, grids = [], []
  for part in layout:
    if isinstance(part, int):
      tokens += rng.randint(1, config.image_token_id, part).tolist()
      continue
    rows, columns = part
    grids.append((1, rows, columns))
    image = [config.image_token_id] * (rows * columns // config.vision.merge_area)
    tokens += [config.vision_start_token_id, *image, config.vision_end_token_id]
  return tokens, grids


def _padded(rows: list[np.ndarray], length: int, value: float) -> np.ndarray:
  pads = [[(0, length - len(row))] + [(0, 0)] * (row.ndim - 1) for row in rows]
  return np.stack([np.pad(row, pad, constant_values=value) for row, pad in zip(rows, pads, strict=True)])


def make_prompts(config, layouts, seed=0, extra=(0, 0)) -> tuple[Prompts, list[list[int]], list[list]]:
  """Prompts of random tokens and patches, with token ids and grids of each; `extra` pads tokens and patch rows."""
  rng = np.random.RandomState(seed)  # a stream that no release of NumPy changes
  tokens, grids = zip(*(prompt_tokens(config, layout, rng) for layout in layouts), strict=True)
  ids = [positions.prompt_positions(t, g, config) for t, g in zip(tokens, grids, strict=True)]
  tables = [positions.vision_tables(g, config) for g in grids]
  length = max(len(t) for t in tokens) + extra[0]
  rows = max(len(table[0]) for table in tables)
  rows = rows and rows + extra[1]
  patches = [rng.standard_normal((len(table[0]), config.vision.patch_width)).astype(np.float32) for table in tables]
  segments, coordinates, index, weight = (list(column) for column in zip(*tables, strict=True))
  prompts = Prompts(
    tokens=_padded([np.asarray(t, np.int32) for t in tokens], length, PAD),
    mask=_padded([np.ones(len(t), bool) for t in tokens], length, False),
    positions=_padded([p.T for p, _, _ in ids], length, 0).transpose(0, 2, 1),
    next_position=np.asarray([n for _, n, _ in ids], np.int32),
    image_slot=_padded([s for _, _, s in ids], length, -1),
    row=np.arange(len(tokens), dtype=np.uint32),
    vision=VisionInputs(
      patches=_padded(patches, rows, 0.0),
      segments=_padded(segments, rows, -1),
      coordinates=_padded(coordinates, rows, 0),
      table_index=_padded(index, rows, 0),
      table_weight=_padded(weight, rows, 0.0),
    ),
  )
  return prompts, list(tokens), list(grids)


@dataclasses.dataclass(frozen=True)
class Case:
  """One model and one batch of prompts; each guards against a trap."""

  name: str
  record: dict[str, Any]
  layouts: tuple[Layout, ...]
  extra: tuple[int, int] = (0, 0)  # padding of tokens and of patch rows beyond the longest prompt

  @property
  def config(self) -> Qwen3VLConfig:
    return Qwen3VLConfig.from_dict(self.record)

  @property
  def stored(self) -> pathlib.Path:
    """What transformers made of a case of `GOLDEN`."""
    return pathlib.Path(__file__).parent / "golden" / f"{self.name}.npz"

  def params(self) -> Any:
    """Parameters under which errors show."""
    return redrawn(model.abstract_params(self.config), seed=20)

  def prompts(self) -> tuple[Prompts, list[list[int]], list[list]]:
    return make_prompts(self.config, list(self.layouts), extra=self.extra)

  def completions(self, rollouts: int = 2, length: int = 6) -> np.ndarray:
    """int32[P, G, T]: random completions."""
    return np.random.RandomState(3).randint(1, 90, (len(self.layouts), rollouts, length)).astype(np.int32)


_SHIPPED_ROPE = {"rope_theta": 5_000_000.0}
_SQUARE = {"num_position_embeddings": 49}
_ONE_IMAGE = ((3, (4, 4), 4), (5, (4, 4), 2))


def _sections(*sections: int, **text: Any) -> dict[str, Any]:
  rope = {"rope_type": "default", "mrope_section": list(sections), "mrope_interleaved": True}
  return {"rope_scaling": rope, **text}


# Two layers and two blocks, with prompts of every kind.
SMALL = Qwen3VLConfig.from_dict(
  config_record(text={"num_hidden_layers": 2}, vision={"depth": 2, "deepstack_visual_indexes": [0, 1]})
)
SMALL_PROMPTS = [(3, (4, 4), 2), (2, (4, 2), 1, (2, 4), 1), (6,), (1, (2, 6), 1)]


def as_tensors(config: Qwen3VLConfig, tree: Any) -> dict[str, np.ndarray]:
  """A tree like the parameters as tensors with the names and shapes of the checkpoint."""
  tensor = checkpoint._tensor_source(checkpoint._leaves(config), tree, np.dtype(np.float32))
  return {name: tensor(name) for leaf in checkpoint._leaves(config).values() for name in leaf.names}


# Stored as golden vectors: every trap in as few models as possible, so that few programs are compiled.
GOLDEN = (
  Case(
    "images",
    config_record(text=_sections(3, 2, 3), vision={"depth": 5, "deepstack_visual_indexes": [0, 2, 3], **_SQUARE}),
    ((3, (4, 6), 2, (6, 2), 2), (2, (2, 8), 3), (5,)),
    extra=(2, 4),
  ),
  Case(
    "text_untied",
    config_record(
      text={"num_attention_heads": 6, "num_key_value_heads": 2, "attention_bias": True, **_SHIPPED_ROPE},
      tie_word_embeddings=False,
    ),
    ((7,), (4,)),
  ),
)
# Further traps, compared with transformers live.
CASES = (
  Case(
    "several_images",  # in a prompt, none, not square, and padding; uneven sections; taps spread over a deeper tower
    config_record(
      text=_sections(2, 3, 3, **_SHIPPED_ROPE),
      vision={"depth": 6, "deepstack_visual_indexes": [1, 3, 4], **_SQUARE},
    ),
    ((3, (4, 6), 2, (6, 2), 4), (1, (10, 4), 5), (9,)),
    extra=(3, 8),
  ),
  Case(
    "untied_with_biases",
    config_record(
      text={"num_hidden_layers": 6, "num_key_value_heads": 1, "attention_bias": True},
      vision={"deepstack_visual_indexes": [0]},
      tie_word_embeddings=False,
    ),
    _ONE_IMAGE,
  ),
  Case(
    "query_wider_than_hidden",
    config_record(text={"num_attention_heads": 6}, vision={"deepstack_visual_indexes": [1, 2, 3]}),
    _ONE_IMAGE,
  ),
  Case(
    "shipped_heads_and_new_schema",  # as transformers 5 writes it; the old rope_theta beside it means nothing
    config_record(
      text={"head_dim": 128, "rope_theta": 7.0, "rope_scaling": None}
      | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [24, 20, 20]}},
      vision={"model_type": "qwen3_vl_vision", "hidden_size": 144},
    ),
    ((2, (6, 6), 3),),
  ),
)


def summary(gradient: np.ndarray) -> np.ndarray:
  """float64[2]: the norm of an array, and its projection on a fixed random direction."""
  direction = np.random.RandomState(gradient.size).standard_normal(gradient.size)
  flat = np.asarray(gradient, np.float64).ravel()
  return np.array([np.linalg.norm(flat), flat @ direction])
