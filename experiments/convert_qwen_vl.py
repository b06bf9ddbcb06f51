"""Converts a Qwen3-VL between a Hugging Face folder and a sharded Orbax copy.

  python -m experiments.convert_qwen_vl SRC DST --to=orbax
  python -m experiments.convert_qwen_vl SRC DST --to=hf --dtype=float32

SRC is a Hugging Face folder, a Hub id or a folder with an Orbax copy; DST must be new, empty or an earlier export.
Both may be remote, such as gs://bucket/model.
Either folder holds the tokenizer, chat template and processor files of SRC, and both are read by `load_pretrained`.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath

from experiments import environment
from kepo_jax import sharding, storage
from kepo_jax.models.qwen3_vl import checkpoint, side_files
from kepo_jax.reporting import progress

_TO = flags.DEFINE_enum("to", "orbax", ["orbax", "hf"], "What to write: orbax or hf.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Dtype of the written weights.")


def main(argv: list[str]) -> None:
  if len(argv) != 3:
    raise ValueError("give a source and a destination: SRC DST --to=orbax|hf")
  _, source, destination = argv
  dtype = jnp.dtype(_DTYPE.value)
  mesh = sharding.make_mesh(fsdp=jax.device_count())
  storage.check_bucket(destination)
  side_files.check_replaceable(epath.Path(destination))
  with contextlib.closing(progress.Display()) as display:
    copying = functools.partial(display.progress, "copying the source, bytes")
    folder = checkpoint.resolved_folder(source, progress=copying)
  config, params = checkpoint.load_pretrained(folder, dtype, mesh)
  # A folder without config.json is no model.
  with storage.written_locally(destination, last="config.json") as local:
    if _TO.value == "orbax":
      checkpoint.save_orbax(local, config, params, source=folder)
    else:
      checkpoint.save_pretrained(local, config, params, source=folder, dtype=dtype)
  print(f"wrote {destination}")


def run() -> None:
  """Starts the command."""
  environment.run(main, arguments=True)


if __name__ == "__main__":
  run()
