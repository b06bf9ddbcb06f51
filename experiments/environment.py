"""What every entry point sets up: the compilation cache, quiet logs, errors in one line."""

import functools
import os
from collections.abc import Callable

import jax
from absl import flags, logging

from kepo_jax.data import splits


def prepare() -> None:
  """Quiets the libraries' logs, and keeps compiled programs so that a second start compiles nothing again."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(splits.cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def reporting_errors(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
  """`main` with the user's errors as one line; --verbosity=1 shows where they came from."""

  @functools.wraps(main)
  def run(argv: list[str]) -> None:
    try:
      main(argv)
    except (ValueError, OSError) as error:
      if logging.get_verbosity() > logging.INFO:
        raise
      raise SystemExit(f"error: {error}") from None

  return run
