"""The training of a student: `train` is the whole job as a function."""

from kepo_jax.training.signals import EXIT_CODE, Interrupted, Interruption
from kepo_jax.training.train import OutOfMemory, Result, is_out_of_memory, train

__all__ = ["EXIT_CODE", "Interrupted", "Interruption", "OutOfMemory", "Result", "is_out_of_memory", "train"]
