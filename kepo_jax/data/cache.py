"""Where the project keeps what can be made again."""

import os
import pathlib


def cache_directory() -> pathlib.Path:
  """$XDG_CACHE_HOME/kepo_jax or ~/.cache/kepo_jax."""
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "kepo_jax"
