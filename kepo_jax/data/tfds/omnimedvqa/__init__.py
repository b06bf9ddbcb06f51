"""The TFDS data set `omnimedvqa`; importing this package registers it."""

from kepo_jax.data.tfds.omnimedvqa.omnimedvqa_dataset_builder import Builder

__all__ = ["Builder"]
