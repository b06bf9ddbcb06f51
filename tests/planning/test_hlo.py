import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from kepo_jax.planning import compile as compiler
from kepo_jax.planning import hlo

SIZE = 64
MATRIX = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
PRODUCT = 2.0 * SIZE**3  # FLOP


def text_of(function, *arguments):
  return jax.jit(function).lower(*arguments).compile().as_text()


def chain(x, turns):
  return jax.lax.fori_loop(0, turns, lambda _, x: jnp.tanh(x @ x), x)


def test_a_loop_counts_as_often_as_it_turns():
  few, more, most = (hlo.cost(text_of(functools.partial(chain, turns=turns), MATRIX)) for turns in (2, 8, 14))
  assert (few.flops, more.flops, most.flops) == (2 * PRODUCT, 8 * PRODUCT, 14 * PRODUCT)
  assert most.moved - more.moved == more.moved - few.moved >= 6 * 3 * 4 * SIZE**2


def test_a_scan_and_its_gradient_by_hand():
  def layers(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.einsum("...i,oi->...o", jax.nn.silu(x), w), None), x, stack)[0].sum()

  arguments = jax.ShapeDtypeStruct((3, 8, SIZE), jnp.float32), jax.ShapeDtypeStruct((5, SIZE, SIZE), jnp.float32)
  # Forwards, and backwards to the inputs and to the weights, in 5 layers of 24 rows.
  assert hlo.cost(text_of(jax.grad(layers, (0, 1)), *arguments)).flops == 3 * 5 * 2 * 24 * SIZE**2


def test_loops_that_depend_on_data_turn_as_often_as_they_are_said_to():
  def until(x):
    def both(x):
      return jax.lax.while_loop(lambda x: (x.sum() < 100) & (x[0, 0] > 0), lambda x: x @ x, x)

    return jax.lax.fori_loop(0, 3, lambda _, x: x @ x, both(both(x)) + both(x * 2))

  text = text_of(until, MATRIX)
  total, turn = hlo.costs(text, turns=(5, 7, 11))
  assert total.flops == (5 + 7 + 11 + 3) * PRODUCT and turn.flops == PRODUCT
  assert hlo.cost(text, turns=(6, 7, 11)).kernels - total.kernels > 0
  with pytest.raises(ValueError, match="3 loops turn as often as their data say, and `turns` has 1 numbers"):
    hlo.cost(text, turns=(5,))


def test_what_is_fused_is_read_and_written_once():
  wide = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
  cost = hlo.cost(text_of(lambda x, y: jnp.sin(x) * y + jnp.cos(x), wide, wide))
  assert cost.moved == 3 * 4 * 1024**2 and cost.flops == 0


def test_a_slice_costs_what_it_reads_and_an_update_in_place_what_it_writes():
  stack = jax.ShapeDtypeStruct((100, 256), jnp.float32)

  def turns(stack):
    return jax.lax.fori_loop(0, 100, lambda i, s: s.at[i].set(jnp.sin(s[99 - i])), stack)

  row = 4 * 256
  cost = hlo.cost(text_of(turns, stack))
  assert cost.moved < 100 * 8 * row  # reading the stack in every turn would be 100 times as much


def collectives(mesh, function, spec, shape, out):
  placed = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))
  return jax.jit(function, out_shardings=jax.NamedSharding(mesh, out)).lower(placed).compile().as_text()


def test_collectives_by_hand(mesh_of):
  mesh = mesh_of(data=4, fsdp=2)
  size = 4 * 256 * 64
  gathered = collectives(mesh, lambda x: x, P("data"), (256, 64), P())
  assert hlo.cost(gathered).sent == {"all-gather": size * 3 / 4}
  reduced = collectives(mesh_of(data=8), lambda x: x.sum(0), P("data"), (256, 64, 64), P())
  size = 4 * 64 * 64
  whole, cut = hlo.cost(reduced), hlo.cost(reduced, slices=2, slice_devices=4)
  assert whole.sent == {"all-reduce": 2 * size * 7 / 8} and whole.crossed == {}
  # Reduced inside each slice of 4; a quarter of the result then goes between the two.
  assert cut.sent == {"all-reduce": 2 * size * 3 / 4} and cut.crossed == {"all-reduce": 2 * (size / 4) * 1 / 2}


def test_a_collective_inside_a_loop_counts_in_every_turn(mesh_of):
  mesh = mesh_of(data=8)
  cut, whole = (jax.NamedSharding(mesh, spec) for spec in (P("data"), P()))

  def turn(_, x):
    x = jax.lax.with_sharding_constraint(x, whole)
    return jax.lax.with_sharding_constraint(jnp.tanh(x @ x), cut)

  text = collectives(mesh, lambda x: jax.lax.fori_loop(0, 6, turn, x), P("data"), (SIZE, SIZE), P("data"))
  assert sum(hlo.cost(text).sent.values()) == pytest.approx(6 * 4 * SIZE**2 * 7 / 8)


def test_groups_in_every_spelling():
  for written, expected in {
    "replica_groups={{0,2},{1,3}}": ((0, 2), (1, 3)),
    "replica_groups=[2,2]<=[4]": ((0, 1), (2, 3)),
    "replica_groups=[2,2]<=[2,2]T(1,0)": ((0, 2), (1, 3)),
    "replica_groups=mesh['a'=2,'b'=2] {'a'}": ((0, 2), (1, 3)),
    "replica_groups=mesh['a'=2,'b'=2] {'a','b'}": ((0, 1, 2, 3),),
    "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}": ((0, 2), (1, 3)),
    "source_target_pairs={{0,1},{1,2}}": ((0, 1), (1, 2)),
  }.items():
    assert hlo._groups(f"channel_id=1, {written}, use_global_device_ids=true") == expected, written


@pytest.mark.parametrize(("size", "out", "window", "taps"), [
  (8, 6, "size=3", 18),
  (9, 4, "size=3 stride=2 pad=1_0", 11),
  (9, 4, "size=3 stride=2", 12),
  (3, 5, "size=3 pad=1_1 lhs_dilate=2", 7),
])  # fmt: skip
def test_taps_in_padding_and_between_dilated_places_are_no_work(size, out, window, taps):
  text = f"""ENTRY %main (x: f32[2,{size},5], w: f32[3,5,7]) -> f32[2,{out},7] {{
  %x = f32[2,{size},5]{{2,1,0}} parameter(0)
  %w = f32[3,5,7]{{2,1,0}} parameter(1)
  ROOT %y = f32[2,{out},7]{{2,1,0}} convolution(%x, %w), window={{{window}}}, dim_labels=b0f_0io->b0f
}}
"""
  assert hlo.cost(text).flops == 2 * taps * 2 * 5 * 7


def test_what_goes_between_slices_by_hand():
  sent = """ENTRY %main (x: f32[256,64]) -> f32[256,64] {
  %x = f32[256,64]{0,1:T(8,128)} parameter(0)
  %after = token[] after-all()
  %send.1 = (f32[256,64]{0,1:T(8,128)}, u32[], token[]) send(%x, %after), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.2 = (f32[256,64]{0,1:T(8,128)}, u32[], token[]) send(%x, %after), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_GATHER"}
}
"""  # noqa: E501
  cost, size = hlo.cost(sent, slices=4, slice_devices=8), 4 * 256 * 64
  assert cost.sent == {} and cost.crossed == {"all-reduce": 2 * size * 3 / 4, "all-gather": size * 3}
  exchange = hlo.Collective("all-to-all", 8e9, group=8, slices=2)  # a part of 1 GB for each of 8 devices
  assert (exchange.sent, exchange.crossed) == (3e9, 4e9)
  for kind in ("collective-permute", "one-to-one"):
    assert hlo.Collective(kind, 1e9, 2, 2).crossed == 1e9 and hlo.Collective(kind, 1e9, 2, 2).sent == 0


def test_of_branches_without_products_the_one_that_sends_counts():
  text = """%quiet (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}
%sends (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} all-reduce(%q), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
}
ENTRY %main (i: s32[], a: f32[8]) -> f32[8] {
  %i = s32[] parameter(0)
  %a = f32[8]{0} parameter(1)
  ROOT %out = f32[8]{0} conditional(%i, %a, %a), branch_computations={%quiet, %sends}
}
"""
  assert hlo.cost(text).sent == {"all-reduce": 2 * 4 * 8 * 3 / 4}


# As the compiler of a TPU writes a product with a batch axis, and one whose weight is cut over 8 chips: its parts go
# round, beside the products of those that are there. Each of two turns takes two steps, and an asynchronous gather goes
# on in all of them.
WINDOWED = """HloModule jit_f, is_scheduled=true

%part (param_0: bf16[16,64], param_1: s32[]) -> bf16[16,2,8] {
  %param_0 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %constant.1 = bf16[]{:T(256)} constant(-inf)
  %bitcast.1 = bf16[16,1,64]{2,0,1:T(8,128)(2,1)} bitcast(%param_0)
  %pad.1 = bf16[16,2,64]{2,0,1:T(8,128)(2,1)} pad(%bitcast.1, %constant.1), padding=0_0x0_1x0_0
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  ROOT %dynamic-slice.1 = bf16[16,2,8]{2,0,1:T(8,128)(2,1)} dynamic-slice(%pad.1, %param_1, %param_1, %param_1), dynamic_slice_sizes={16,2,8}
}
%product (param_0: bf16[16,64], param_1: s32[], param_2: bf16[32,2,8], param_3: bf16[8,4]) -> (bf16[16,32,1], bf16[64,4]) {
  %param_0 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  %fusion.1 = bf16[16,2,8]{2,0,1:T(8,128)(2,1)} fusion(%param_0, %param_1), kind=kLoop, calls=%part
  %param_2 = bf16[32,2,8]{2,0,1:T(8,128)(2,1)S(1)} parameter(2)
  %convolution.1 = bf16[16,32,1]{1,0,2:T(8,128)(2,1)S(1)} convolution(%fusion.1, %param_2), window={size=2}, dim_labels=b0f_o0i->bf0
  %param_3 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(3)
  %all-gather.2 = bf16[64,4]{1,0:T(8,128)(2,1)} all-gather(%param_3), channel_id=9, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %tuple.1 = (bf16[16,32,1]{1,0,2:T(8,128)(2,1)S(1)}, bf16[64,4]{1,0:T(8,128)(2,1)}) tuple(%convolution.1, %all-gather.2)
}
%start (param_0: bf16[8,4]) -> (bf16[8,4], bf16[64,4], u32[]) {
  %param_0 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[64,4]{1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=9, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %custom-call.1 = (bf16[8,4]{1,0}, bf16[64,4]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}
%body (carried: (bf16[16,64], bf16[32,2,8], u32[], bf16[8,4])) -> (bf16[16,64], bf16[32,2,8], u32[], bf16[8,4]) {
  %carried = (bf16[16,64]{1,0}, bf16[32,2,8]{2,0,1:S(1)}, u32[], bf16[8,4]{1,0}) parameter(0)
  %x = bf16[16,64]{1,0:T(8,128)(2,1)} get-tuple-element(%carried), index=0
  %w = bf16[32,2,8]{2,0,1:T(8,128)(2,1)S(1)} get-tuple-element(%carried), index=1
  %i = u32[]{:T(128)} get-tuple-element(%carried), index=2
  %moving = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%carried), index=3
  %first = (bf16[16,32,1]{1,0,2:T(8,128)(2,1)S(1)}, bf16[64,4]{1,0:T(8,128)(2,1)}) fusion(%x, %i, %w, %moving), kind=kOutput, calls=%product
  %w.1 = bf16[32,2,8]{2,0,1:T(8,128)(2,1)S(1)} collective-permute(%w), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}
  %second = (bf16[16,32,1]{1,0,2:T(8,128)(2,1)S(1)}, bf16[64,4]{1,0:T(8,128)(2,1)}) fusion(%x, %i, %w.1, %moving), kind=kOutput, calls=%product
  %w.2 = bf16[32,2,8]{2,0,1:T(8,128)(2,1)S(1)} collective-permute(%w.1), channel_id=4, source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}
  %one = u32[]{:T(128)} constant(1)
  %i.1 = u32[]{:T(128)} add(%i, %one)
  %i.2 = u32[]{:T(128)} add(%one, %i.1)
  ROOT %tuple.2 = (bf16[16,64]{1,0}, bf16[32,2,8]{2,0,1:S(1)}, u32[], bf16[8,4]{1,0}) tuple(%x, %w.2, %i.2, %moving)
}
%condition (carried: (bf16[16,64], bf16[32,2,8], u32[], bf16[8,4])) -> pred[] {
  %carried.1 = (bf16[16,64]{1,0}, bf16[32,2,8]{2,0,1:S(1)}, u32[], bf16[8,4]{1,0}) parameter(0)
  %i.3 = u32[]{:T(128)} get-tuple-element(%carried.1), index=2
  %four = u32[]{:T(128)} constant(4)
  ROOT %compare.1 = pred[]{:T(512)} compare(%i.3, %four), direction=LT
}
ENTRY %main (x: bf16[16,64], w: bf16[32,2,8], b: bf16[8,4], c: bf16[4,8,16]) -> bf16[16,64] {
  %x.1 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %w.3 = bf16[32,2,8]{2,0,1:T(8,128)(2,1)S(1)} parameter(1)
  %b = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(2)
  %c = bf16[4,8,16]{2,1,0:T(8,128)(2,1)} parameter(3)
  %batched = bf16[4,8,8]{2,1,0:T(8,128)(2,1)S(1)} convolution(%c, %c), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
  %started = (bf16[8,4]{1,0}, bf16[64,4]{1,0}, u32[]{:S(2)}) fusion(%b), kind=kCustom, calls=%start
  %zero = u32[]{:T(128)} constant(0)
  %tuple.3 = (bf16[16,64]{1,0}, bf16[32,2,8]{2,0,1:S(1)}, u32[], bf16[8,4]{1,0}) tuple(%x.1, %w.3, %zero, %b)
  %while.1 = (bf16[16,64]{1,0}, bf16[32,2,8]{2,0,1:S(1)}, u32[], bf16[8,4]{1,0}) while(%tuple.3), condition=%condition, body=%body
  ROOT %out = bf16[16,64]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=0
}
"""  # noqa: E501


def test_products_of_a_tpu_by_hand():
  cost = hlo.cost(WINDOWED)
  assert cost.flops == 2 * 16 * 32 * 64 + 2 * 4 * 8 * 8 * 16  # the first in 4 steps with 2 parts of 8 each
  assert cost.sent == {
    "collective-permute": 4 * (2 * 32 * 2 * 8),
    "all-gather": 2 * 64 * 4 * 7 / 8,  # goes on in both turns, and is sent once
  }
  # Each step reads a part of x, and nothing of its padding; the own part of the gathered weights is read once, and all
  # of them are written; c is read twice. What lies in the chip's own memory moves nothing. Counters on top.
  moved = 4 * (2 * 16 * 8) + 2 * 8 * 4 + 2 * 64 * 4 + 2 * (2 * 4 * 8 * 16)
  assert cost.moved == pytest.approx(moved, abs=100)
  later = hlo.cost(WINDOWED.replace("%zero = u32[]{:T(128)} constant(0)", "%zero = u32[]{:T(128)} constant(2)"))
  assert cost.flops - later.flops == 2 * 16 * 32 * 64 / 2  # one turn less
  # A loop whose step is not seen is not guessed.
  with pytest.raises(ValueError, match="1 loops turn as often as their data say"):
    hlo.cost(WINDOWED.replace("add(%one, %i.1)", "multiply(%one, %i.1)"))


@pytest.mark.tpu
def test_a_product_costs_the_same_whole_and_in_parts():
  place = compiler.topology("v5e:2x4")
  mesh, (rows, width, outputs) = place.mesh(1, 8, 1), (8192, 1024, 4096)

  def placed(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, P(*spec)))

  product = jax.jit(lambda x, w: jnp.einsum("rd,fd->rf", x, w), out_shardings=jax.NamedSharding(mesh, P("fsdp")))
  lowered = product.lower(placed((rows, width), "fsdp"), placed((outputs, width), None, "fsdp"))
  # MiB of a product's operands from which on the compiler overlaps their gathers with the product.
  parts, whole = (
    hlo.cost(lowered.compile(compiler_options={"xla_jf_spmd_threshold_for_windowed_einsum_mib": size}).as_text())
    for size in (0, 100_000)
  )
  assert parts.flops == whole.flops == 2 * rows * width * outputs / 8
  weight = 2 * width * outputs
  assert whole.sent == {"all-gather": weight * 7 / 8}
  assert parts.sent == {"collective-permute": weight * 9 / 8}  # a step and its first part more than a ring needs


def test_a_product_of_a_library_by_hand():
  text = """ENTRY %main (a: bf16[4,64,32], b: bf16[4,64,16]) -> bf16[4,32,16] {
  %a = bf16[4,64,32]{2,1,0} parameter(0)
  %b = bf16[4,64,16]{2,1,0} parameter(1)
  %product = (bf16[4,32,16]{2,1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"operation_queue_id":"0","gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]},"epilogue":"DEFAULT"}}
  ROOT %out = bf16[4,32,16]{2,1,0} get-tuple-element(%product), index=0
}
"""  # noqa: E501
  cost = hlo.cost(text)
  assert cost.flops == 2 * 4 * 32 * 16 * 64 and cost.kernels == 1
  assert cost.moved == 2 * 4 * (64 * 32 + 64 * 16 + 32 * 16)  # not the workspace


def test_a_collective_without_groups_is_one_of_all_devices():
  for header in ("num_partitions=8", "replica_count=2, num_partitions=4"):
    text = f"""HloModule jit_f, is_scheduled=true, {header}
ENTRY %main (a: f32[64]) -> f32[64] {{
  %a = f32[64]{{0}} parameter(0)
  ROOT %sum = f32[64]{{0}} all-reduce(%a), channel_id=1, replica_groups={{}}, to_apply=%add
}}
"""
    assert hlo.cost(text).sent == {"all-reduce": 2 * 4 * 64 * 7 / 8}, header
    assert (hlo.cost(text).exchanges, hlo.cost(text).kernels) == (1, 0)
  part = text.replace("ROOT %sum = f32[64]{0} all-reduce", "ROOT %sum = f32[16]{0} reduce-scatter")
  part = part.replace("replica_groups={}", "replica_groups=[2,4]<=[8]")
  assert hlo.cost(part).sent == {"reduce-scatter": 4 * 64 * 3 / 4} and hlo.cost(part).moved == 4 * (64 + 16)


# As the compiler of a TPU writes sums of gradients, several at once: of the first two, a device keeps its part.
SUMS = """HloModule jit_f, is_scheduled=true

%all-reduce-scatter.8.clone.1 (input_0: bf16[64,32], input_1: bf16[16,64]) -> (bf16[8,32], bf16[16,8]) {
  %input_0 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %input_1 = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %all-reduce.1 = (bf16[64,32]{1,0:T(8,128)(2,1)}, bf16[16,64]{1,0:T(8,128)(2,1)}) all-reduce(%input_0, %input_1), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %whole.1 = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%all-reduce.1), index=0
  %whole.2 = bf16[16,64]{1,0:T(8,128)(2,1)} get-tuple-element(%all-reduce.1), index=1
  %at = s32[] constant(0)
  %part.1 = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%whole.1, %at, %at), dynamic_slice_sizes={8,32}
  %part.2 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%whole.2, %at, %at), dynamic_slice_sizes={16,8}
  ROOT %tuple.1 = (bf16[8,32]{1,0:T(8,128)(2,1)S(1)}, bf16[16,8]{1,0:T(8,128)(2,1)S(1)}) tuple(%part.1, %part.2)
}
ENTRY %main (a: bf16[64,32], b: bf16[16,64], c: f32[4]) -> (bf16[8,32], bf16[16,8]) {
  %a = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %c = f32[4]{0:T(128)} parameter(2)
  %all-reduce.2 = (f32[4]{0:T(128)}, f32[4]{0:T(128)}) all-reduce-start(%c, %c), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %all-gather.1 = ((f32[4]{0:T(128)}, f32[4]{0:T(128)}), (f32[32]{0:T(128)}, f32[32]{0:T(128)})) all-gather-start(%c, %c), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %fusion.1 = (bf16[8,32]{1,0:T(8,128)(2,1)S(1)}, bf16[16,8]{1,0:T(8,128)(2,1)S(1)}) fusion(%a, %b), kind=kCustom, calls=%all-reduce-scatter.8.clone.1
}
"""  # noqa: E501


def test_several_arrays_in_one_collective_by_hand():
  cost = hlo.cost(SUMS)
  # The sums that are scattered come from the chip's own memory: an eighth of each is written. The others lie in HBM.
  assert cost.moved == 2 * (64 * 32 + 16 * 64) / 8 + 2 * (4 * 4 + 4 * 4) + 2 * (4 * 4 + 4 * 32)
  assert cost.sent == {
    "reduce-scatter": 2 * (64 * 32 + 16 * 64) * 7 / 8,
    "all-reduce": 2 * (2 * 4 * 4) * 7 / 8,  # on the same channel, and another one
    "all-gather": (2 * 4 * 32) * 7 / 8,
  }
