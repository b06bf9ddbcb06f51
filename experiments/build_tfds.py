"""Builds the TensorFlow Datasets form of the data, without TensorFlow.

  python -m experiments.build_tfds --data_dir=DIR --manual_dir=OmniMedVQA
  python -m experiments.build_tfds --data_dir=DIR --config_name=phantom

The printed folder can be trained on: --config.data.directory=FOLDER. What is there already is not built again; delete
the folder to do so. Numbers other than the defaults, --access and --lenient make a config of their own, named after
them; the phantom is already split and has no use for them. --images_root, --access and --lenient are those of
`experiments.inspect_medvqa`; with --lenient other questions take the place of those whose images cannot be read.
"""

import contextlib
import functools
import sys

from absl import flags

from experiments import environment
from experiments.configs import grpo
from kepo_jax import storage
from kepo_jax.data.tfds import building
from kepo_jax.data.tfds.omnimedvqa import omnimedvqa_dataset_builder as builder
from kepo_jax.reporting import progress

DATA = grpo.get_config().data  # how training cuts its data, unless flags say otherwise

_DATA_DIR = flags.DEFINE_string("data_dir", None, "TFDS data directory to write below.", required=True)
_CONFIG_NAME = flags.DEFINE_enum("config_name", builder.NAME, [builder.NAME, builder.PHANTOM], "What to build.")
_MANUAL_DIR = flags.DEFINE_string("manual_dir", None, "Folder of the unpacked OmniMedVQA download.")
_TRAIN_MODALITY = flags.DEFINE_string("train_modality", DATA.train_modality, "Modality of the training questions.")
_TRAIN_ITEMS = flags.DEFINE_integer("train_items", DATA.train_items, "Training questions.", lower_bound=0)
_VALIDATION_ITEMS = flags.DEFINE_integer(
  "validation_items", DATA.validation_items, "Validation questions of each modality.", lower_bound=0
)
_TEST_ITEMS = flags.DEFINE_integer("test_items", DATA.test_items, "Test questions of each modality.", lower_bound=0)
_SPLIT_SEED = flags.DEFINE_integer("split_seed", DATA.split_seed, "Another seed, another split.")
_IMAGES_ROOT = flags.DEFINE_string("images_root", None, "Folder that image paths start from; by default the download.")
_ACCESS = flags.DEFINE_string("access", "Open-access", "Folder below QA_information.")
_LENIENT = flags.DEFINE_bool("lenient", False, "Drop and count unusable records instead of stopping at them.")


def main(argv: list[str]) -> None:
  """Builds what the flags name and prints where it is."""
  del argv
  environment.prepare()
  config = builder.PHANTOM
  if _CONFIG_NAME.value == builder.NAME:
    config = builder.split_config(
      train_modality=_TRAIN_MODALITY.value,
      train_items=_TRAIN_ITEMS.value,
      validation_items=_VALIDATION_ITEMS.value,
      test_items=_TEST_ITEMS.value,
      split_seed=_SPLIT_SEED.value,
      access=_ACCESS.value,
      lenient=_LENIENT.value,
    )
  # TFDS prints what it does; standard output is for the result.
  with contextlib.closing(progress.Display()) as display, contextlib.redirect_stdout(sys.stderr):
    copying = functools.partial(display.progress, "copying the download, bytes")
    manual, images = (
      path and storage.staged(path, progress=copying) for path in (_MANUAL_DIR.value, _IMAGES_ROOT.value)
    )
    built = building.build(
      _DATA_DIR.value,
      manual_dir=manual,
      config=config,
      images_root=images,
      progress=lambda done, total: display.progress("writing questions", done, total),
    )
  print(built.text())


def run() -> None:
  """Starts the command."""
  environment.run(main)


if __name__ == "__main__":
  run()
