"""Pages of one HTML file each, which need no network: blocks, questions of a run, rendering."""

from kepo_jax.reporting.pages.blocks import (
  Answer,
  AnswerGroup,
  Block,
  BrowserBlock,
  Fact,
  FigureBlock,
  Page,
  Sample,
  Section,
  TableBlock,
  TextBlock,
)
from kepo_jax.reporting.pages.figures import figure_block
from kepo_jax.reporting.pages.questions import evaluated_samples, training_samples
from kepo_jax.reporting.pages.rendering import rendered

__all__ = [
  "Answer",
  "AnswerGroup",
  "Block",
  "BrowserBlock",
  "Fact",
  "FigureBlock",
  "Page",
  "Sample",
  "Section",
  "TableBlock",
  "TextBlock",
  "figure_block",
  "rendered",
  "evaluated_samples",
  "training_samples",
]
