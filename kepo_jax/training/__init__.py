"""The training of a student: `train` is the whole job as a function."""

from kepo_jax.training.loop import Result, train

__all__ = ["Result", "train"]
