"""Known ways to break the program, each with a test that must fail. `make mutants` runs them.

A mutation is one textual change in one file. Add one for every trap that a new part guards against: the old text
must occur exactly once in its file, and the named test must be fast.
"""

import dataclasses

from tests.objectives import mutations as objectives
from tests.training import mutations as training


@dataclasses.dataclass(frozen=True)
class Mutation:
  """One change, and the test that sees it."""

  name: str
  file: str
  old: str
  new: str
  test: str


_QWEN = "kepo_jax/models/qwen3_vl"
_TESTS = "tests/models/qwen3_vl"
_TOWER = f"{_TESTS}/test_golden.py::test_tower_after_every_block[images]"
_IMAGES = f"{_TESTS}/test_golden.py::test_image_tokens[images]"
_DEEPSTACK = f"{_TESTS}/test_golden.py::test_deepstack_features[images]"
_DECODER = f"{_TESTS}/test_golden.py::test_decoder_after_every_layer[images]"
_BIASED = f"{_TESTS}/test_golden.py::test_decoder_after_every_layer[text_untied]"
_CHUNKED = "tests/models/test_scoring.py::test_chunked_equals_dense"
_LORA = f"{_TESTS}/test_lora.py::"
_AXES = f"{_TESTS}/test_text.py::test_frequencies_are_interleaved"
_PROCESSES = "kepo_jax/processes.py"
_SEVERAL = "tests/test_processes.py::"
_PODS = "tests/planning/test_pods.py::"
_FUSED = f"{_TESTS}/test_attention.py::test_a_fused_kernel_equals_the_plain_form"


def _deepstack_dropped(number: int) -> Mutation:
  return Mutation(
    f"DeepStack feature {number} not added",
    f"{_QWEN}/text.py",
    "jnp.where(number < taps, added",
    f"jnp.where((number < taps) & (number != {number}), added",
    _DECODER,
  )


MUTATIONS = (
  _deepstack_dropped(0),
  _deepstack_dropped(1),
  _deepstack_dropped(2),
  Mutation(
    "DeepStack added one layer late",
    f"{_QWEN}/text.py",
    "jnp.minimum(number, taps - 1)",
    "jnp.clip(number - 1, 0, taps - 1)",
    _DECODER,
  ),
  Mutation(
    "DeepStack tapped one block late",
    f"{_QWEN}/vision.py",
    "slots[list(taps)] = np.arange(len(taps))",
    "slots[[(tap + 1) % config.depth for tap in taps]] = np.arange(len(taps))",
    _DEEPSTACK,
  ),
  Mutation(
    "DeepStack features in reverse order",
    f"{_QWEN}/vision.py",
    "slots[list(taps)] = np.arange(len(taps))",
    "slots[list(taps)] = np.arange(len(taps))[::-1]",
    _DEEPSTACK,
  ),
  Mutation("exact GELU in the blocks", f"{_QWEN}/vision.py", "approximate=True", "approximate=False", _TOWER),
  Mutation("tanh GELU in the mergers", f"{_QWEN}/vision.py", "approximate=False", "approximate=True", _IMAGES),
  Mutation(
    "last merger normalises after grouping",
    f"{_QWEN}/vision.py",
    "else self.norm(x).reshape(grouped)",
    """else (
      jax.nn.standardize(x.reshape(grouped)) * jnp.tile(self.norm.weight[...], self.merge_area)[None, None]
      + jnp.tile(self.norm.bias[...], self.merge_area)[None, None]
    )""",
    _IMAGES,
  ),
  Mutation(
    "DeepStack mergers normalise before grouping",
    f"{_QWEN}/vision.py",
    "x = self.norm(x.reshape(grouped)) if",
    """x = (
      jax.nn.standardize(x).reshape(grouped) * self.norm.weight[...][None, None] + self.norm.bias[...][None, None]
    ) if""",
    _DEEPSTACK,
  ),
  Mutation(
    "products of attention kept",
    f"{_QWEN}/layers.py",
    "jax.checkpoint_policies.dots_with_no_batch_dims_saveable",
    "jax.checkpoint_policies.dots_saveable",
    f"{_TESTS}/test_remat.py::test_products_of_attention_are_not_kept",
  ),
  Mutation(
    "products of widening projections not kept",
    f"{_QWEN}/layers.py",
    "(widened.fun(x, weight), (x, weight))",
    "(widened(x, weight), (x, weight))",
    f"{_TESTS}/test_remat.py::test_the_product_of_a_widening_projection_is_kept",
  ),
  Mutation("no height section", f"{_QWEN}/text.py", "for k in (1, 2):", "for k in (2,):", _AXES),
  Mutation("no width section", f"{_QWEN}/text.py", "for k in (1, 2):", "for k in (1,):", _AXES),
  Mutation(
    "temporal section without its tail",
    f"{_QWEN}/text.py",
    "(frequency < 3 * config.mrope_section[k])",
    "(frequency < config.head_dim)",
    _AXES,
  ),
  Mutation(
    "height and width sections exchanged", f"{_QWEN}/text.py", "frequency % 3 == k)", "frequency % 3 == 3 - k)", _AXES
  ),
  Mutation(
    "query and key norms exchanged",
    f"{_QWEN}/text.py",
    "query = self.q_norm(self.q_proj(x).reshape(*rows, self.kv_heads, self.shared_by, -1))\n    key = self.k_norm(",
    "query = self.k_norm(self.q_proj(x).reshape(*rows, self.kv_heads, self.shared_by, -1))\n    key = self.q_norm(",
    _DECODER,
  ),
  Mutation(
    "query heads dealt to key heads in turn",
    f"{_QWEN}/text.py",
    "self.q_proj(x).reshape(*rows, self.kv_heads, self.shared_by, -1))",
    "self.q_proj(x).reshape(*rows, self.shared_by, self.kv_heads, -1).swapaxes(3, 4))",
    _DECODER,
  ),
  Mutation(
    "row and column exchanged in the tower's rotary embedding",
    f"{_QWEN}/vision.py",
    "coordinates.astype(jnp.float32)[..., None]",
    "coordinates[..., ::-1].astype(jnp.float32)[..., None]",
    _TOWER,
  ),
  Mutation("attention across images", f"{_QWEN}/attention.py", "segments[:, :, None] ==", "-1 <= 0 *", _TOWER),
  Mutation("rotation in the other direction", f"{_QWEN}/layers.py", "second * sine,", "second * -sine,", _DECODER),
  Mutation(
    "biases dropped",
    f"{_QWEN}/layers.py",
    "return (y.astype(jnp.float32) + bias)",
    "return (y.astype(jnp.float32) + 0 * bias)",
    _BIASED,
  ),
  Mutation(
    "position table transposed",
    f"{_QWEN}/positions.py",
    "row_lines[:, :, None] * side + column_lines[:, None, :]",
    "row_lines[:, :, None] + column_lines[:, None, :] * side",
    f"{_TESTS}/test_positions.py::test_interpolation_equals_a_slow_loop",
  ),
  Mutation(
    "position table sampled at patch centres",
    f"{_QWEN}/positions.py",
    "np.float32(side - 1) / np.float32(max(size - 1, 1))",
    "np.float32(side) / np.float32(size)",
    f"{_TESTS}/test_positions.py::test_interpolation_equals_a_slow_loop",
  ),
  Mutation(
    "text continues after the height of an image",
    f"{_QWEN}/positions.py",
    "position + max(rows, columns)",
    "position + rows",
    f"{_TESTS}/test_positions.py::test_worked_example",
  ),
  Mutation(
    "rows in raster order",
    f"{_QWEN}/positions.py",
    "blocks.transpose(0, 2, 1, 3, 4)",
    "blocks",
    f"{_TESTS}/test_positions.py::test_rows_come_in_merge_blocks",
  ),
  Mutation(
    "completions start one position late",
    f"{_QWEN}/model.py",
    "prefix.next_position[:, None] + jnp.arange",
    "prefix.next_position[:, None] + 1 + jnp.arange",
    f"{_TESTS}/test_model.py::test_decoding_token_by_token_equals_the_whole",
  ),
  Mutation(
    "an unwritten slot of the cache is read",
    f"{_QWEN}/text.py",
    "slots < length",
    "slots <= length",
    f"{_TESTS}/test_model.py::test_decoding_token_by_token_equals_the_whole",
  ),
  Mutation(
    "splash lets completions see the pads of their prompt",
    f"{_QWEN}/splash.py",
    "seen = jnp.repeat(mask.astype(jnp.int32)",
    "seen = jnp.repeat(jnp.ones_like(mask, jnp.int32)",
    f"{_FUSED}[splash-completions]",
  ),
  Mutation(
    "splash's completions look one token ahead",
    f"{_QWEN}/splash.py",
    "offset=before)",
    "offset=before + 1)",
    f"{_FUSED}[splash-completions]",
  ),
  Mutation(
    "splash's padding joins the first image",
    f"{_QWEN}/splash.py",
    "segments = _padded(segments, padded, 1, fill=-1)",
    "segments = _padded(segments, padded, 1, fill=0)",
    f"{_FUSED}[splash-images]",
  ),
  Mutation(
    "cuDNN's completions stand one token late",
    f"{_QWEN}/cudnn.py",
    "starts = jnp.repeat(mask.sum(axis=-1, dtype=jnp.int32), rollouts)",
    "starts = jnp.repeat(mask.sum(axis=-1, dtype=jnp.int32) + 1, rollouts)",
    f"{_FUSED}[cudnn-completions]",
  ),
  Mutation(
    "cuDNN attends across images",
    f"{_QWEN}/cudnn.py",
    "segments[:, None, :, None] ==",
    "-1 <= 0 *",
    f"{_FUSED}[cudnn-images]",
  ),
  Mutation(
    "padding of prompts is seen by completions",
    f"{_QWEN}/text.py",
    "return mask[:, None, None, None, None, :]",
    "return mask[:, None, None, None, None, :] | True",
    f"{_TESTS}/test_model.py::test_padding_and_what_it_holds_change_nothing",
  ),
  Mutation(
    "unknown tensors ignored",
    f"{_QWEN}/conversion.py",
    '"unknown": unknown,',
    '"unknown": [],',
    f"{_TESTS}/test_conversion.py::test_one_error_lists_everything_that_does_not_fit",
  ),
  *(
    Mutation(name, f"kepo_jax/objectives/{module}.py", old, new, f"tests/objectives/{test}")
    for module, name, test, old, new in objectives.MUTATIONS
  ),
  *(
    Mutation(name, f"kepo_jax/training/{module}.py", old, new, f"tests/training/{test}")
    for module, name, test, old, new in training.MUTATIONS
  ),
  Mutation(
    "cotangent of the chunked loss dropped",
    "kepo_jax/models/scoring.py",
    "lambda x: (x * scale).astype(x.dtype)",
    "lambda x: x",
    _CHUNKED,
  ),
  Mutation(
    "head gradient of the last chunk only",
    "kepo_jax/models/scoring.py",
    "d_head + _head_gradient(d_logits, hidden, shards)",
    "_head_gradient(d_logits, hidden, shards)",
    _CHUNKED,
  ),
  Mutation(
    "tokens reversed when chunks are joined",
    "kepo_jax/models/scoring.py",
    "x = jnp.moveaxis(x, 0, 2)\n",
    "x = jnp.moveaxis(x, 0, 2)[:, :, ::-1]\n",
    _CHUNKED,
  ),
  Mutation(
    "one key for all rollouts of a group",
    "kepo_jax/sampling.py",
    "jax.random.fold_in(jax.random.fold_in(key, row), g)",
    "jax.random.fold_in(key, row)",
    "tests/test_sampling.py::test_rows_of_a_group_differ",
  ),
  Mutation(
    "log-probability after top-p",
    "kepo_jax/sampling.py",
    "return token, distributions.select_token(logps, token)",
    "return token, distributions.select_token(jax.nn.log_softmax(_kept(logps, top_p, top_k)), token)",
    "tests/test_sampling.py::test_frequencies",
  ),
  Mutation(
    "the end token left out of the mask",
    "kepo_jax/sampling.py",
    "mask=~state.ended)",
    "mask=~state.ended & (token != end_ids[0]))",
    "tests/test_sampling.py::test_masks_end_with_the_end_token",
  ),
  Mutation(
    "merged weights without alpha / r",
    f"{_QWEN}/lora.py",
    "+ scale * product",
    "+ product",
    f"{_LORA}test_merging_by_hand",
  ),
  Mutation(
    "LoRA that changes the model before it is trained",
    f"{_QWEN}/lora.py",
    "if path[-1].key == B:",
    "if not path:",
    f"{_LORA}test_the_first_forward_is_that_of_the_base_to_the_bit[float32]",
  ),
  Mutation(
    "one draw for all projections",
    f"{_QWEN}/lora.py",
    "jax.random.fold_in(key, next(numbered))",
    "key",
    f"{_LORA}test_the_start_depends_on_the_seed",
  ),
  Mutation(
    "A sharded as the output of its weight",
    f"{_QWEN}/lora.py",
    "{A: (inputs, None), B: (None, outputs)}",
    "{A: (outputs, None), B: (None, inputs)}",
    f"{_LORA}test_the_matrices_are_sharded_as_their_weight",
  ),
  Mutation(
    "tokens decoded without the matrices",
    f"{_QWEN}/model.py",
    "if config.lora is not None:\n    raise",
    "if False:\n    raise",
    f"{_LORA}test_tokens_are_decoded_from_merged_weights",
  ),
  Mutation(
    "the adapter in the layout of the tree",
    f"{_QWEN}/adapters.py",
    "np.asarray(value, np.float32).T)",
    "np.asarray(value, np.float32))",
    f"{_TESTS}/test_adapters.py::test_the_tensors_of_the_adapter",
  ),
  Mutation(
    "every host scores every rollout",
    _PROCESSES,
    "[:prompts] == jax.process_index()",
    "[:prompts] >= 0",
    f"{_SEVERAL}test_each_rollout_is_scored_by_the_lowest_process_that_holds_it",
  ),
  Mutation(
    "the first host scores every rollout",
    "kepo_jax/sharding.py",
    'batch_sharding(mesh, shape, ("prompt", "rollout")).devices_indices_map(shape)',
    "replicated(mesh).devices_indices_map(shape)",
    f"{_SEVERAL}test_each_rollout_is_scored_by_the_lowest_process_that_holds_it",
  ),
  Mutation(
    "the prompts of a host by data alone",
    "kepo_jax/sharding.py",
    'batch_sharding(mesh, shape, ("prompt", "rollout")).devices_indices_map(shape)',
    'batch_sharding(mesh, shape, ("prompt",)).devices_indices_map(shape)',
    f"{_SEVERAL}test_each_rollout_is_scored_by_the_lowest_process_that_holds_it",
  ),
  Mutation(
    "a teacher whose weights are gathered for every token",
    "kepo_jax/training/programs.py",
    'name="the teacher\'s sampler", stationary=True',
    'name="the teacher\'s sampler", stationary=False',
    f"{_PODS}test_no_weight_of_a_teacher_is_gathered_for_a_token[cut]",
  ),
  Mutation(
    "width of what meets a weight left whole",
    "kepo_jax/sharding.py",
    'STAYING_RULES = WEIGHT_RULES["train"] | {"prompt": "data"}',
    'STAYING_RULES = ACTIVATION_RULES | {"prompt": "data"}',
    "tests/test_sharding.py::test_where_activations_lie_beside_weights_that_stay",
  ),
  Mutation(
    "rows of what meets a weight over fsdp as well",
    "kepo_jax/sharding.py",
    '| {"prompt": "data"}',
    '| {"prompt": ("data", "fsdp")}',
    "tests/test_sharding.py::test_where_activations_lie_beside_weights_that_stay",
  ),
  Mutation(
    "padding read as a prompt",
    _PROCESSES,
    "sharding.row_holders(*shape)[:prompts]",
    "sharding.row_holders(*shape)",
    f"{_SEVERAL}test_a_lone_process_reads_every_rollout_but_not_the_padding",
  ),
  Mutation(
    "messages cut after the first part",
    _PROCESSES,
    "range(0, int(sizes.max()), CHUNK)",
    "range(0, CHUNK, CHUNK)",
    f"{_SEVERAL}test_values_of_any_size_are_gathered_by_the_same_programs",
  ),
  Mutation(
    "messages as long as the longest text",
    _PROCESSES,
    "parts = [_everywhere(data, start) for start in range(0, int(sizes.max()), CHUNK)]",
    "parts = [multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - len(data))))]",
    f"{_SEVERAL}test_values_of_any_size_are_gathered_by_the_same_programs",
  ),
  Mutation(
    "an error elsewhere goes unnoticed",
    _PROCESSES,
    "if data is None or (sizes < 0).any():",
    "if data is None:",
    f"{_SEVERAL}test_an_error_on_one_process_ends_all",
  ),
  Mutation(
    "every process looks at every image",
    _PROCESSES,
    "list(work(items[number::count]))",
    "list(work(items))",
    f"{_SEVERAL}test_what_is_shared_out_comes_back_in_its_order",
  ),
  Mutation(
    "a full disk leaves the others in a gather",
    f"{_QWEN}/conversion.py",
    "      for name in left:",
    "      for name in ():",
    f"{_SEVERAL}test_an_export_for_which_there_is_no_room_ends_all_and_leaves_nobody_behind",
  ),
  Mutation(
    "processes with questions in another order",
    "kepo_jax/training/agreement.py",
    "    for e in examples\n",
    "    for e in sorted(examples, key=lambda e: e.id)\n",
    "tests/training/test_agreement.py::test_as_many_questions_which_are_not_the_same[order]",
  ),
  Mutation(
    "every machine joins what SLURM started",
    "experiments/clusters.py",
    '_count(environ, "SLURM_NTASKS") > 1',
    '_count(environ, "SLURM_NTASKS") >= 1',
    "tests/experiments/test_clusters.py::test_what_announces_several_processes",
  ),
)
