"""What every entry point sets up: the compilation cache, quiet logs, errors in one line."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator

import jax
from absl import flags, logging

from kepo_jax import storage


def prepare() -> None:
  """Quiets the libraries' logs, and keeps compiled programs so that a second start compiles nothing again."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(storage.cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def define_process_flags() -> None:
  """Flags of a run over several processes."""
  flags.DEFINE_string("coordinator", "", "HOST:PORT of the first of several processes; all need access to --workdir.")
  flags.DEFINE_integer("processes", 1, "Number of processes, with --coordinator.", lower_bound=1)
  flags.DEFINE_integer("process_id", 0, "Which of them this is, from 0, with --coordinator.", lower_bound=0)


def join_processes() -> None:
  """Joins the processes of --coordinator, if it is given; before anything else asks jax for its devices.

  Raises:
    ValueError: the flags do not fit together.
  """
  coordinator, count, own = flags.FLAGS.coordinator, flags.FLAGS.processes, flags.FLAGS.process_id
  if not coordinator and (count, own) != (1, 0):
    raise ValueError("--processes and --process_id need --coordinator=HOST:PORT of the first process.")
  if own >= count:
    raise ValueError(f"--process_id={own} is none of the {count} of --processes; they count from 0.")
  if coordinator:
    jax.distributed.initialize(coordinator, count, own)


@contextlib.contextmanager
def config_errors() -> Iterator[None]:
  """An unknown field of --config, or a value of another type, as one line; fields are looked up as flags are made."""
  try:
    yield
  except (AttributeError, KeyError, TypeError, flags.Error) as error:
    given = " ".join(argument for argument in sys.argv[1:] if argument.startswith("--"))
    said = str(error).rpartition("\nValueError: ")[2]  # what a config refuses comes inside a traceback
    reason = " ".join(said.replace("\\n", " ").replace("\\'", "'").split()).strip('" ')
    raise SystemExit(
      f"error: {reason} (in {given}); experiments/configs/grpo.py lists every field of --config with its unit."
    ) from None


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser under `config_errors`."""
  with config_errors():
    return flags.FLAGS(argv)


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
