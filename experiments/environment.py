"""What every entry point sets up: the compilation cache, quiet logs, errors in one line."""

import contextlib
import functools
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator

import jax
from absl import app, flags, logging

from experiments import clusters
from kepo_jax import sharding, storage, training

CONFIGS = pathlib.Path(__file__).parent / "configs"


def prepare() -> None:
  """Quiets the libraries' logs, and keeps compiled programs so that a second start compiles nothing again."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(storage.cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def device_mesh(fsdp: int, tensor: int) -> jax.sharding.Mesh:
  """All devices: --fsdp and --tensor as asked for, data with the rest.

  Raises:
    ValueError: the devices do not divide.
  """
  if jax.device_count() % (fsdp * tensor):
    raise ValueError(f"--fsdp={fsdp} x --tensor={tensor} does not divide {jax.device_count()} devices.")
  return sharding.make_mesh(data=-1, fsdp=fsdp, tensor=tensor)


def define_process_flags() -> None:
  """Flags of a run over several processes."""
  flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "off"],
    "auto joins the other processes where a TPU pod, SLURM, Open MPI or Kubernetes started several; off never does.",
  )
  flags.DEFINE_string("coordinator", "", "HOST:PORT of the first of several processes; all need access to --workdir.")
  flags.DEFINE_integer("processes", 1, "Number of processes, with --coordinator.", lower_bound=1)
  flags.DEFINE_integer("process_id", 0, "Which of them this is, from 0, with --coordinator.", lower_bound=0)


def join_processes() -> bool:
  """Joins the other processes of a run, if there are any; before anything else asks jax for its devices.

  The flags say which they are, or what started this process does (`clusters.announced`). A lone process opens no port
  and waits for nobody.

  Returns:
    whether this process is one of several.

  Raises:
    ValueError: the flags do not fit together, or the others cannot be found.
  """
  coordinator, count, own = flags.FLAGS.coordinator, flags.FLAGS.processes, flags.FLAGS.process_id
  if not coordinator and (count, own) != (1, 0):
    raise ValueError("--processes and --process_id need --coordinator=HOST:PORT of the first process.")
  if own >= count:
    raise ValueError(f"--process_id={own} is none of the {count} of --processes; they count from 0.")
  if flags.FLAGS.distributed == "off":
    if coordinator:
      raise ValueError("--distributed=off and --coordinator contradict each other; leave one of them out.")
    return False
  if coordinator:
    # Only what the flags say: SLURM's number of a task would hide all but one of the devices.
    jax.distributed.initialize(coordinator, count, own, cluster_detection_method="deactivate")
    return count > 1
  if not (told_by := clusters.announced()):
    return False
  try:
    jax.distributed.initialize()
  except (RuntimeError, ValueError, OSError) as error:
    raise ValueError(
      f"{told_by} started several processes, which cannot be joined: {error} Pass --coordinator=HOST:PORT, "
      "--processes and --process_id, or --distributed=off to run this one alone."
    ) from error
  logging.info("process %d of %d, joined as %s says", jax.process_index(), jax.process_count(), told_by)
  return True


@contextlib.contextmanager
def flag_errors() -> Iterator[None]:
  """Turns what is wrong with the flags into one line; the file of --config is run as flags are made, or parsed."""
  try:
    yield
  except Exception as error:  # noqa: BLE001 (a config file may raise anything)
    given = [argument for argument in sys.argv[1:] if argument.startswith("--")]
    reason, way_out = _fault_of_config(error), "--help lists the flags"
    if reason:
      way_out = "docs/data.md has an example of a config file"
    else:
      reason = _plain(str(error))
      if missing := re.search(r"Flag --(\w+) must have a value", reason):
        reason = f"--{missing[1]} is missing: {flags.FLAGS[missing[1]].help.rstrip('.')}"
      if any(argument.startswith("--config") for argument in given):
        reason += f" (in {' '.join(given)})"
        way_out = "kepo_jax/config.py lists every field of --config with its unit"
      if isinstance(error, OSError):
        names = sorted(path.stem for path in CONFIGS.glob("[a-z]*.py"))
        way_out = f"--config takes a file, or one of {', '.join(names)}"
    raise SystemExit(f"error: {reason}; {way_out}.") from None


def _fault_of_config(error: Exception) -> str:
  """Which line of the file of --config fails, and how; "" where it is no such failure."""
  if isinstance(error, SyntaxError):
    return f"{error.filename}, line {error.lineno}: {error.msg}"
  said = str(error)
  if "Unexpected None value for flag config" in said:
    return "get_config of the file of --config returns nothing; end it with `return config`"
  if "Error whilst parsing config file" in said and "\nValueError: " not in said:  # it holds the whole traceback
    places = re.findall(r'File "([^"]+)", line (\d+), in get_config', said)
    what = _plain(re.split(r"\n(?=\w*Error: )", said)[-1])
    return f"{places[-1][0]}, line {places[-1][1]}: {what}" if places else what
  frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name in ("get_config", "<module>")]
  own = [frame for frame in frames if pathlib.Path(frame.filename).resolve() != pathlib.Path(sys.argv[0]).resolve()]
  if own and not isinstance(error, OSError | ValueError | flags.Error):
    return f"{own[-1].filename}, line {own[-1].lineno}: {type(error).__name__}: {_plain(said)}"
  if "has no attribute 'get_config'" in said:
    return "the file of --config has no function get_config"
  return ""


def _plain(said: str) -> str:
  """What a library says of a flag, in one line and without the words of Python."""
  said = said.rpartition("\nValueError: ")[2]  # what a config refuses comes inside a traceback
  said = " ".join(said.replace("\\n", " ").replace("\\'", "'").split()).strip('" ')
  said = re.sub(
    r"'+(\w+)' Did you mean \"(\w+)\" instead of \"\w+\"\?'*", r"there is no field \1; did you mean \2?", said
  )
  said = re.sub(r"invalid literal for int\(\) with base 10: ('.*?')", r"\1 is no whole number", said)
  return re.sub(r"could not convert string to float: ('.*?')", r"\1 is no number", said)


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser under `flag_errors`; --config=NAME stands for experiments/configs/NAME.py."""
  with flag_errors():
    joined = re.sub(r"\0--config\0(?!-)", "\0--config=", "\0".join(argv)).split("\0")  # also `--config NAME`
    return flags.FLAGS([_with_config_path(argument) for argument in joined])


def _with_config_path(argument: str) -> str:
  """The argument, with the file of a config that is given by its name.

  Raises:
    OSError: --config names neither a file nor a config.
  """
  given = re.fullmatch(r"--config=([^:]*)((?::.*)?)", argument)
  if not given or pathlib.Path(given[1]).is_file():
    return argument
  path = CONFIGS / f"{given[1]}.py"
  if not given[1] or not path.is_file():
    raise FileNotFoundError(f"there is no config {given[1]!r}")
  return f"--config={path}{given[2]}"


def reporting_errors(main: Callable[[list[str]], None], *, arguments: bool = False) -> Callable[[list[str]], None]:
  """`main` with the user's errors as one line; --verbosity=1 shows where they came from.

  Args:
    main: of the command line.
    arguments: whether it takes words that are no flags; else they are refused.
  """

  @functools.wraps(main)
  def reported(argv: list[str]) -> None:
    try:
      if len(argv) > 1 and not arguments:
        raise ValueError(f"{argv[1]} is no flag; flags begin with --, fields with --config, as --config.train.steps=4.")
      main(argv)
    except (ValueError, OSError) as error:
      if logging.get_verbosity() > logging.INFO:
        raise
      raise SystemExit(f"error: {error}") from None
    except flags.Error as error:
      raise SystemExit(f"error: {_fault_of_config(error) or _plain(str(error))}.") from None
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
      if not training.is_out_of_memory(error) or logging.get_verbosity() > logging.INFO:
        raise
      raise SystemExit("error: out of memory; lower the batch, or spread the model over more devices.") from None

  return reported


def run(main: Callable[[list[str]], None], *, arguments: bool = False) -> None:
  """Starts an entry point, see `reporting_errors`."""
  module = sys.modules[main.__module__]
  if module is not sys.modules["__main__"]:  # a console script: --help shows the flags and the text of the module
    for flag in flags.FLAGS.get_key_flags_for_module(module.__name__):
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    sys.modules["__main__"].__doc__ = module.__doc__
  app.run(reporting_errors(main, arguments=arguments), flags_parser=parse_flags)
