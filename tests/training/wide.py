"""The phantom's models with eight heads and eight key-value heads: the same functions, for any mesh of eight.

A query head is doubled and its columns of the output halved; a key-value head is repeated for each head that reads it.
Both are exact in floating point. MLP, width, vision and vocabulary of these models divide by eight as they are.
"""

import json
import shutil

import jax.numpy as jnp
from safetensors import flax as safetensors

from tests.training.runs import ASSETS

HEADS = 8


def widened(name, folder):
  """A folder with the model `name` of the assets, its heads spread; returns it."""
  shutil.copytree(ASSETS / name, folder)
  described = json.loads((folder / "config.json").read_text())
  text = described["text_config"]
  heads, groups, size = (text[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
  text |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
  (folder / "config.json").write_text(json.dumps(described))
  tensors = safetensors.load_file(folder / "model.safetensors")
  source = {"q_proj": heads, "k_proj": groups, "v_proj": groups}
  for name, tensor in tensors.items():
    part = name.split(".")[-2]
    if ".self_attn." in name and part in source:
      rows = tensor.reshape(source[part], size, -1)
      tensors[name] = jnp.repeat(rows, HEADS // source[part], axis=0).reshape(HEADS * size, -1)
    elif ".self_attn.o_proj" in name:
      columns = tensor.reshape(-1, heads, size)
      tensors[name] = jnp.repeat(columns, HEADS // heads, axis=1).reshape(len(tensor), HEADS * size) * (heads / HEADS)
  safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  return folder
