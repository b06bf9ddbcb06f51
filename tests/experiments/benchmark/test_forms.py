import pytest

from experiments.benchmark import forms


@pytest.mark.slow
def test_a_shared_prompt_saves_what_its_tokens_say():
  found = forms.update_flops()
  ratio = found["shared"] / found["replicated"]
  # 144 + 150 + 8 x 300 tokens instead of 8 x 594 are 0.568 of the decoder; the tower is 1/8, the head the same.
  assert 0.5 < ratio < 0.6


def test_chunks_do_not_grow_with_the_tokens():
  few, many = (forms.loss_memory((2, 8, length), 20_000, (64, 64)) for length in (256, 1024))
  assert many["dense"] > 3.5 * few["dense"]
  # Hidden states and one number per token grow, logits do not.
  assert many["chunked"] - few["chunked"] < 0.1 * (many["dense"] - few["dense"])
  assert many["chunked"] < many["dense"] / 5
