"""Following a run: sinks, progress, warnings, curves, tables and pages."""

from kepo_jax.reporting.reporter import RunReporter, write_report

__all__ = ["RunReporter", "write_report"]
