"""What programs send, read from their text: closed forms, and the forms that XLA writes."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prefalign_jax.cost.collectives import collectives
from prefalign_jax.sharding import make_mesh

PROGRAM = """
%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %all-gather.1 = f32[8,4]{1,0} all-gather(%x), replica_groups=GROUPS, dimensions={0}, metadata={op_name="in the loop"}
}
%outer (p: (s32[])) -> (s32[]) {
  %while.2 = (s32[], f32[8,4]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %while.1 = (s32[]) while(%t), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %all-reduce.1 = (bf16[8,4]{1,0}, /*index=1*/pred[16]) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}, to_apply=%add
  %start = (f32[2]{0}, f32[8]{0}) all-gather-start(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %done = f32[8]{0} all-gather-done(%start)
  %permute = f32[6]{0} collective-permute(%a), source_target_pairs={{0,0},{1,2},{2,1}}
  %alone = f32[6]{0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add
}
"""


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,4},{1,5}}", (0, 4)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2] {'b'}", (0, 1)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", (0, 1)),
    ],
)
def test_loops_count_and_groups_are_read(groups, first):
    gather, reduce, start, permute = collectives(PROGRAM.replace("GROUPS", groups), 8)
    assert (gather.kind, gather.shapes, gather.size, gather.where) == ("all-gather", ((8, 4),), 128, "in the loop")
    assert (gather.times, gather.in_loop, gather.group) == (15, True, first)
    assert gather.sent == 128 * (len(first) - 1) / len(first)
    assert (reduce.shapes, reduce.size, reduce.group, reduce.times) == (((8, 4), (16,)), 64 + 16, (0, 1), 1)
    assert reduce.sent == 80 and not reduce.in_loop
    assert (start.kind, start.shapes, start.size) == ("all-gather", ((8,),), 32)
    assert (permute.group, permute.sent) == ((1, 2), 24)


def test_a_loop_of_unknown_length_has_no_count():
    text = PROGRAM.replace("GROUPS", "[2,4]<=[8]").replace('{"n":"5"}', '{"m":"5"}')
    assert collectives(text, 8)[0].times is None


def test_a_compiled_loop_gathers_a_weight_each_time_and_reduces_once():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    x, kernels = jax.ShapeDtypeStruct((16, 32), jnp.float32), jax.ShapeDtypeStruct((5, 32, 32), jnp.float32)
    where = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P(None, "fsdp"))

    @functools.partial(jax.jit, in_shardings=where)
    def total(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0].sum()

    found = collectives(total.lower(x, kernels).compile().as_text(), 8)
    assert [(one.kind, one.shapes, one.times, one.in_loop, len(one.group)) for one in found] == [
        ("all-gather", ((32, 32),), 5, True, 4),
        ("all-reduce", ((),), 1, False, 8),
    ]
