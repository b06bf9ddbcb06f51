"""Questions in batches, on a model made by hand; how answers are read is tested with real models elsewhere."""

import numpy as np
import pytest

from kepo_jax.evaluation import asking
from kepo_jax.types import Example, Rollouts


class Processor:
  """Whatever is asked, the answer is A."""

  end_ids = (1,)

  def prompts(self, examples, kind, hints=None):
    return list(examples)

  def decode(self, tokens, mask):
    return ["<think>x</think><answer>A</answer>" for _ in tokens]


def sample(prompts):
  tokens = np.ones((len(prompts), 1, 2), np.int32)
  return Rollouts(tokens=tokens, mask=np.ones(tokens.shape, bool), logps=np.zeros(tokens.shape, np.float32))


EXAMPLES = [
  Example(id=f"q{n}", question="?", options=("a", "b"), answer="AB"[n % 2], images=(), modality="MRI") for n in range(5)
]


def test_every_question_is_asked_once():
  outputs = []
  result = asking.evaluate(sample, Processor(), EXAMPLES, batch_size=2, on_output=outputs.append)
  assert [output["id"] for output in outputs] == [f"q{n}" for n in range(5)]
  assert result["overall"]["correct"] == 3 and result["overall"]["count"] == 5


def test_where_another_host_cannot_prepare_a_batch_all_read_the_one_before_and_end(monkeypatch):
  asked = []

  def together(work):
    asked.append(work())
    if len(asked) == 2:
      raise OSError("another process of this run has failed; its log says why.")
    return asked[-1]

  monkeypatch.setattr(asking.processes, "together", together)
  outputs = []
  with pytest.raises(OSError, match="another process"):
    asking.evaluate(sample, Processor(), EXAMPLES, batch_size=2, on_output=outputs.append)
  assert [output["id"] for output in outputs] == ["q0", "q1"]
