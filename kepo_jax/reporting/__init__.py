"""Following a run: sinks, progress, warnings, curves and tables."""

from kepo_jax.reporting.reporter import RunReporter, write_report

__all__ = ["RunReporter", "write_report"]
