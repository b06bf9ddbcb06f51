import pytest

from tests.training.conftest import allowed, tiny_config, tiny_params


def entry_point(name):
  """A fixture of the module `experiments.NAME`, as if it were alone in its process."""
  return pytest.fixture(lambda program: program(f"experiments.{name}"), name=name)


PROGRAMS = ("build_tfds", "compare_medvqa", "inspect_medvqa", "measure_hints", "plan")
build_tfds, compare_medvqa, inspect_medvqa, measure_hints, plan = map(entry_point, PROGRAMS)
__all__ = ["allowed", "tiny_config", "tiny_params"]  # fixtures
