"""KEPO (arXiv 2602.00400) in JAX: reinforcement learning with gated distillation and hinted exploration."""
