"""Breaks a copy of the program in known ways and sees a test fail each time.

  python -m tests.mutants [--only=TEXT] [--list]

Every mutation of `tests/mutations.py` is applied alone to a temporary copy of the repository, in which its test then
runs. A mutation is killed when that test fails; one that survives, or whose test does not pass without it, makes the
command fail.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from tests.mutations import MUTATIONS, Mutation

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIED = ("kepo_jax", "experiments", "tests", "setup.cfg", "pyproject.toml")
FAILED = 1  # pytest's exit code for "some tests failed"; 2 to 5 mean that it never came to that


def copy_repository(destination: pathlib.Path) -> None:
  """Copies what the tests need."""
  for name in COPIED:
    source = ROOT / name
    if source.is_dir():
      shutil.copytree(source, destination / name, ignore=shutil.ignore_patterns("__pycache__"))
    elif source.exists():
      shutil.copy(source, destination / name)


def pytest_code(repository: pathlib.Path, tests: list[str]) -> tuple[int, str]:
  """Exit code and output of pytest on some tests of a copy."""
  command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
  environment = os.environ | {"PYTHONPATH": str(repository)}
  done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
  return done.returncode, done.stdout + done.stderr


def mutated(repository: pathlib.Path, mutation: Mutation) -> str:
  """Applies a mutation to a copy; returns the text to put back.

  Raises:
    ValueError: the old text does not occur exactly once.
  """
  file = repository / mutation.file
  text = file.read_text()
  if text.count(mutation.old) != 1:
    raise ValueError(f"{mutation.name}: {mutation.old!r} occurs {text.count(mutation.old)} times in {mutation.file}")
  file.write_text(text.replace(mutation.old, mutation.new))
  return text


def survivors(mutations: list[Mutation]) -> list[str]:
  """Names of the mutations that no test saw, with a line printed for each mutation."""
  alive = []
  with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
    repository = pathlib.Path(folder)
    copy_repository(repository)
    code, output = pytest_code(repository, sorted({mutation.test for mutation in mutations}))
    if code:
      sys.exit(f"the named tests do not pass without a mutation:\n{output}")
    for mutation in mutations:
      start = time.monotonic()
      original = mutated(repository, mutation)
      code, output = pytest_code(repository, [mutation.test])
      (repository / mutation.file).write_text(original)
      # An error in a fixture is a program that does not run, which no test needs to guard against.
      killed = code == FAILED and "ERROR at setup" not in output
      verdict = "killed" if killed else f"SURVIVED (pytest exit code {code})"
      print(f"{verdict:10} {time.monotonic() - start:5.0f} s  {mutation.name}", flush=True)
      if not killed:
        alive.append(mutation.name)
        print(output if code else "", flush=True)
  return alive


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default="", help="only mutations whose name or file contains this text")
  parser.add_argument("--list", action="store_true", help="print the mutations and stop")
  arguments = parser.parse_args()
  chosen = [m for m in MUTATIONS if arguments.only in m.name or arguments.only in m.file]
  if arguments.list:
    print("\n".join(f"{m.file}: {m.name} -> {m.test}" for m in chosen))
    return
  alive = survivors(chosen)
  print(f"{len(chosen) - len(alive)} of {len(chosen)} mutations killed")
  if alive or not chosen:
    sys.exit(f"survived: {', '.join(alive) or 'nothing chosen'}")


if __name__ == "__main__":
  main()
