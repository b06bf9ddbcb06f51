"""Measures what sharing prompts and never holding all logits are worth, against the forms that do neither.

  python -m experiments.benchmark.forms                # a minute on two CPU cores; nothing large is run
  python -m experiments.benchmark.forms --json=FILE

1. Memory of the loss and its gradients: temporaries of the compiled program, in chunks and with all logits at once,
   for Qwen3-VL-2B taught by 32B, 64 completions of 1,024 tokens.
2. Time of both at a size where both fit, in turns.
3. FLOPs of the update of Qwen3-VL-2B, a group sharing its prompt and every rollout with a copy of its own: 144 image
   tokens, 150 of text, 300 new ones, 8 rollouts.
"""

import functools
import json
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments import environment, settings
from experiments.benchmark import floors, peaks
from experiments.benchmark import step as benchmark_step
from experiments.configs import kepo
from kepo_jax import storage
from kepo_jax.config import Config
from kepo_jax.models import scoring
from kepo_jax.models.qwen3_vl import model
from kepo_jax.objectives import losses
from kepo_jax.planning.compile import special_tokens
from kepo_jax.reporting import progress
from kepo_jax.training import setup, update
from kepo_jax.training.update import Target
from kepo_jax.types import Experience

_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed turns.", lower_bound=1)
_JSON = flags.DEFINE_string("json", "", "File for the figures.")

CHUNK = Config().objective.chunk


def main(_: list[str]) -> None:
  """Measures and prints."""
  environment.prepare()
  console = progress.terminal(width=120)
  result: dict[str, dict[str, Any]] = {"memory": loss_memory()}
  console.print(
    "temporaries of the loss, 64 x 1,024 tokens, vocabulary 151,936: "
    f"{result['memory']['dense'] / 1e9:.1f} GB dense, {result['memory']['chunked'] / 1e9:.2f} GB in chunks: "
    f"{result['memory']['dense'] / result['memory']['chunked']:.0f} x less"
  )
  result["time"] = loss_time(_REPEATS.value)
  console.print(
    "loss and gradients, 64 x 64 tokens, vocabulary 32,000, medians: "
    f"{result['time']['dense']:.2f} s dense, {result['time']['chunked']:.2f} s in chunks: "
    f"{result['time']['chunked'] / result['time']['dense']:.2f} x"
  )
  result["flops"] = update_flops()
  console.print(
    "update of a group of 8, 144 + 150 + 300 tokens: "
    f"{result['flops']['replicated'] / 1e12:.1f} TFLOP replicated, {result['flops']['shared'] / 1e12:.1f} shared: "
    f"{result['flops']['shared'] / result['flops']['replicated']:.3f} x"
  )
  if _JSON.value:
    storage.write_text(_JSON.value, json.dumps(result, indent=2) + "\n")


def _problem(rows: tuple[int, int, int], vocabulary: int, widths: tuple[int, int], dtype: Any) -> tuple[Any, ...]:
  """Shapes of (hidden, head, inputs, teacher's hidden and head)."""

  def shape(*size: int, kind: Any = dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(size, kind)

  token_inputs = jax.eval_shape(
    lambda: losses.token_inputs(
      tokens=jnp.zeros(rows, jnp.int32),
      mask=jnp.ones(rows, bool),
      advantages=jnp.zeros(rows[:2], jnp.float32),
      gate=jnp.ones(rows[:2], bool),
    )
  )
  student, teacher = widths
  return (
    shape(*rows, student),
    shape(vocabulary, student),
    token_inputs,
    ((shape(*rows, teacher), shape(vocabulary, teacher)),),
  )


def _losses(vocabulary: int, rows: tuple[int, int, int]) -> dict[str, Any]:
  """Loss and gradients of hidden states and head, in both forms."""
  token_loss = losses.KepoTokenLoss(allowed=jnp.ones(vocabulary, bool))

  def dense(hidden, head, token_inputs, others):
    def logits(hidden, head):
      return jnp.einsum("pgtd,vd->pgtv", hidden, head, preferred_element_type=jnp.float32)

    return token_loss(logits(hidden, head), tuple(logits(*other) for other in others), token_inputs)

  def chunked(hidden, head, token_inputs, others):
    chunk = scoring.chunk_of(CHUNK, *rows[:2])
    return scoring.chunked_loss(token_loss, hidden, head, token_inputs, others, chunk=chunk)

  forms = {"dense": dense, "chunked": chunked}
  return {name: jax.jit(jax.value_and_grad(form, (0, 1), has_aux=True)) for name, form in forms.items()}


def loss_memory(
  rows: tuple[int, int, int] = (8, 8, 1024), vocabulary: int = 151_936, widths: tuple[int, int] = (2048, 5120)
) -> dict[str, int]:
  """Bytes of temporaries that XLA plans for the loss and its gradients, by form; nothing is run."""
  arguments = _problem(rows, vocabulary, widths, jnp.bfloat16)
  return {
    name: form.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    for name, form in _losses(vocabulary, rows).items()
  }


def loss_time(repeats: int) -> dict[str, float]:
  """Median seconds of both forms, taken in turns."""
  rows, vocabulary = (8, 8, 64), 32_000
  shapes = _problem(rows, vocabulary, (512, 512), jnp.float32)
  arguments = jax.tree.map(lambda x: jnp.full(x.shape, 0.1 if x.dtype == jnp.float32 else 1, x.dtype), shapes)
  forms = _losses(vocabulary, rows)
  taken: dict[str, list[float]] = {name: [] for name in forms}
  for turn in range(repeats + 1):
    for name, form in forms.items():
      seconds = peaks.seconds(form, *arguments)
      if turn:  # the first one compiles
        taken[name].append(seconds)
  return {name: statistics.median(seconds) for name, seconds in taken.items()}


def update_flops(
  sizes: benchmark_step.Sizes = benchmark_step.Sizes(144, 150, 300), rollouts: int = 8, size: str = "Qwen3-VL-2B"
) -> dict[str, float]:
  """FLOPs of the gradients of one group that shares its prompt, and of rows with a prompt each."""
  student = benchmark_step.model_sizes(size)
  config = settings.typed(kepo.get_config())
  token_loss = setup.token_loss(config, special_tokens(student))
  update_settings = update.UpdateSettings(compute_dtype=jnp.bfloat16, chunk=CHUNK)
  params = model.abstract_params(student)
  make, gradients = (
    function(student, token_loss, update_settings) for function in (update.make_inputs, update.make_gradients)
  )

  def count(prompts: int, each: int) -> float:
    rows = (prompts, each, sizes.new_tokens)
    experience = jax.eval_shape(
      functools.partial(_experience, rows), benchmark_step.made_up_prompts(student, prompts, sizes)
    )
    made = jax.eval_shape(make, params, jnp.int32(0), experience)
    head = model.head_weight(student, params)
    hidden = jax.ShapeDtypeStruct((*rows, student.text.hidden_size), jnp.bfloat16)
    targets = (Target(hidden=hidden, head=jax.ShapeDtypeStruct(head.shape, jnp.bfloat16)),)
    return floors.count_flops(gradients, params, experience, made, targets)

  return {"shared": count(1, rollouts), "replicated": count(rollouts, 1)}


def _experience(rows: tuple[int, int, int], prompts: Any) -> Experience:
  flags_of_rows = {name: jnp.ones(rows[:2], bool) for name in ("gate", "injected", "supervised", "kept")}
  return Experience(
    prompts=prompts,
    tokens=jnp.zeros(rows, jnp.int32),
    mask=jnp.ones(rows, bool),
    logps=jnp.zeros(rows, jnp.float32),
    advantages=jnp.zeros(rows[:2], jnp.float32),
    **flags_of_rows,
  )


if __name__ == "__main__":
  environment.run(main)
