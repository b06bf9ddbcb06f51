"""Arithmetic of a program, counted from its jaxpr: products only, loops as often as they run."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.interpreters import partial_eval


def count(function: Callable[..., Any], *arguments: Any) -> float:
  """FLOP of the matrix products of a function: 2 per multiplication and addition.

  What XLA's own cost analysis cannot say, since it counts the body of a loop once. Elementwise work is left out, and
  so is what a fused kernel does inside: count the plain form of an attention. What no result depends on does not count,
  as the compiler leaves it out: the gradient of a frozen head, which the loss adds up in its loop.

  Args:
    function: traced, not run.
    arguments: arrays or jax.ShapeDtypeStruct.

  Raises:
    ValueError: there is a loop whose number of turns depends on data, such as that of a sampler.
  """
  jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
  used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _work(used)


def _work(jaxpr: Any) -> float:
  return sum(map(_equation, jaxpr.eqns))


def _equation(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    return _product(equation)
  if name == "while":
    raise ValueError("a while loop runs as often as its data say; count what is inside it.")
  inner = [_work(body) for body in _bodies(params)]
  if name == "cond":
    return max(inner)
  return sum(inner) * (params["length"] if name == "scan" else 1)


def _product(equation: Any) -> float:
  (contracting, _), _ = equation.params["dimension_numbers"]
  left, out = equation.invars[0].aval, equation.outvars[0].aval
  return 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracting)


def _bodies(value: Any) -> Iterator[Any]:
  """The jaxprs among the parameters of an equation, however deep."""
  if hasattr(value, "eqns"):
    yield value
  elif hasattr(value, "jaxpr"):  # closed over its constants
    yield from _bodies(value.jaxpr)
  elif isinstance(value, dict):
    for each in value.values():
      yield from _bodies(each)
  elif isinstance(value, tuple | list):
    for each in value:
      yield from _bodies(each)
