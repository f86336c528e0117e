import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from conftest import longer
from prefalign_jax.assemble import decoder_of
from prefalign_jax.config import defaults
from prefalign_jax.cost.collectives import collectives
from prefalign_jax.data.pipeline import batch_of, make_pair_set
from prefalign_jax.data.trees import Layout
from prefalign_jax.losses import make_loss
from prefalign_jax.models.decoder import Placement, make_decoder
from prefalign_jax.models.lora import Lora, init_adapters
from prefalign_jax.models.quantize import QUANTIZATIONS, quantize_params
from prefalign_jax.optim import make_optimizer
from prefalign_jax.sharding import (
    RULES,
    batch_shardings,
    born,
    deal_experts,
    groups_of,
    make_mesh,
    packing_of,
    param_shardings,
    place_batch,
    spread,
    state_shardings,
    what_stays_whole,
)
from prefalign_jax.train_step import init_state, make_train_step
from prefalign_jax.types import PairLogps, TrainState, UserError
from small import CONFIG, DELTA, make_pairs, make_params, packed

MESH = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
BIASES = dict(qkv_bias=True, output_bias=True, mlp_bias=True, head_bias=True)
EXPERTS = dict(num_experts=4, mlp_bias=True, sinks=True)
BIASED = make_decoder(dataclasses.replace(CONFIG, vocab_size=62, norm="layer", positions="learned", **BIASES))


def full_spec(sharding, ndim: int) -> tuple:
    """A spec with the None at its end written out: P('fsdp') of a matrix as ('fsdp', None)."""
    return (*sharding.spec, *[None] * (ndim - len(sharding.spec)))


def specs(shardings, params) -> dict[str, tuple]:
    flat = zip(jax.tree_util.tree_leaves_with_path(shardings), jax.tree.leaves(params), strict=True)
    return {"/".join(k.key for k in path): full_spec(sharding, leaf.ndim) for (path, sharding), leaf in flat}


# The mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": -1, "fsdp": 1, "tensor": 1}, (8, 1, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 1, 2)),
        ({"fsdp": 2, "context": 2, "tensor": 2}, (1, 2, 2, 2)),
        ({"tensor": -1}, (1, 1, 1, 8)),
        ({"data": None, "fsdp": 1}, (8, 1, 1, 1)),
        ({"data": None, "fsdp": 2, "tensor": 1}, (4, 2, 1, 1)),
        ({"data": None, "fsdp": -1, "tensor": 2}, (1, 4, 1, 2)),
    ],
)
def test_a_mesh_takes_all_devices(sizes, shape):
    mesh = make_mesh(sizes)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "context", "tensor"), shape, strict=True))
    assert len({device.id for device in mesh.devices.flat}) == jax.device_count() == 8
    assert groups_of(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    "sizes",
    [{"data": 4}, {"data": 16}, {"data": 3, "fsdp": -1}, {"data": -1, "fsdp": -1}, {"data": 0, "fsdp": -1}, {}]
    + [{"data": -8}, {"data": -2, "fsdp": -4}, {"data": 8, "fsdp": 0}, {"data": 16, "fsdp": -1}],
)
def test_a_mesh_that_does_not_fit_names_the_sizes_and_devices(sizes):
    with pytest.raises(UserError) as caught:
        make_mesh(sizes)
    assert str(sizes) in str(caught.value)
    assert "8" in str(caught.value)


def test_an_unknown_axis_is_named():
    with pytest.raises(UserError, match="mesh.model.*data, fsdp, context, tensor"):
        make_mesh({"data": 4, "model": 2})


# Parameters


def test_the_model_is_sharded_by_its_rules():
    """The vocabulary of 61 is divided by neither 2 nor 4, so it stays whole; every other axis fits."""
    params = make_params()
    qkv = (None, "fsdp", "tensor")
    turned = (None, "tensor", "fsdp")
    assert specs(param_shardings(MESH, params), params) == {
        "embed/embedding": (None, "fsdp"),
        "final_norm/scale": (None,),
        "head/kernel": (None, "fsdp"),
        **{f"layers/attention/{name}/kernel": qkv for name in "qkv"},
        "layers/attention/o/kernel": turned,
        "layers/attention_norm/scale": (None, None),
        **{f"layers/mlp/{name}/kernel": qkv for name in ("gate", "up")},
        "layers/mlp/down/kernel": turned,
        "layers/mlp_norm/scale": (None, None),
    }


def test_a_reward_models_score_is_split_by_its_width():
    model = make_decoder(dataclasses.replace(CONFIG, reward=True))
    params = model.init(jax.random.key(0))
    found = specs(param_shardings(MESH, params), params)
    assert found["score/kernel"] == (None, "fsdp")
    found["head/kernel"] = (None, "fsdp")
    del found["score/kernel"]
    assert found == specs(param_shardings(MESH, make_params()), make_params())


def test_a_bias_is_split_as_what_it_is_added_to():
    params = make_params(model=BIASED)
    found = specs(param_shardings(MESH, params), params)
    split, whole = (None, "tensor"), (None, None)
    assert {path: spec for path, spec in found.items() if path.endswith("bias") or "position" in path} == {
        **{f"layers/attention/{name}/bias": split for name in "qkv"},
        **{f"layers/mlp/{name}/bias": split for name in ("gate", "up")},
        **{f"layers/{name}/bias": whole for name in ("attention/o", "mlp/down", "attention_norm", "mlp_norm")},
        "final_norm/bias": (None,),
        "head/bias": ("tensor",),  # 62 tokens
        "position/embedding": (None, "fsdp"),
    }


def test_every_rule_is_of_use():
    others = ({"reward": True}, EXPERTS, DELTA)
    models = [BIASED] + [make_decoder(dataclasses.replace(CONFIG, **more)) for more in others]
    trees = [jax.eval_shape(model.init, jax.random.key(0)) for model in models]
    trees.append(jax.eval_shape(lambda params: init_adapters(jax.random.key(0), params, Lora(dora=True)), trees[0]))
    trees += [jax.eval_shape(lambda params, kind=k: quantize_params(params, kind), trees[0]) for k in QUANTIZATIONS]
    for tree in trees:
        param_shardings(MESH, tree)
    for left_out in RULES:
        with pytest.raises(UserError, match="no sharding rule"):
            for tree in trees:
                param_shardings(MESH, tree, [rule for rule in RULES if rule is not left_out])


def test_experts_are_dealt_whole():
    params = jax.eval_shape(make_decoder(dataclasses.replace(CONFIG, **EXPERTS)).init, jax.random.key(0))
    found = specs(param_shardings(MESH, params), params)
    assert found["layers/attention/sinks"] == (None, "tensor")
    assert {path: spec for path, spec in found.items() if "experts" in path} == {
        "layers/experts/router/bias": (None, None),
        **{f"layers/experts/{name}/bias": (None, "tensor", None) for name in ("gate", "up", "down")},
        "layers/experts/router/kernel": (None, "fsdp", None),
        **{f"layers/experts/{name}/kernel": (None, "tensor", "fsdp", None) for name in ("gate", "up")},
        "layers/experts/down/kernel": (None, "tensor", None, "fsdp"),
    }


def test_the_first_rule_that_matches_wins():
    params = {"a": {"b": jnp.ones((8, 8))}, "c": jnp.ones((8, 8))}
    rules = [("a/.*", P("fsdp")), (".*", P("tensor")), ("c", P("fsdp"))]
    assert specs(param_shardings(MESH, params, rules), params) == {"a/b": ("fsdp", None), "c": ("tensor", None)}


@pytest.mark.parametrize("pattern", ["a", "b/c", "a/b", "/b/"])
def test_a_rule_must_match_the_whole_path(pattern):
    with pytest.raises(UserError, match="'a/b/c'"):
        param_shardings(MESH, {"a": {"b": {"c": jnp.ones(4)}}}, [(pattern, P())])


def test_an_unmatched_parameter_is_named_with_its_shape():
    params = make_params()
    params["layers"]["router"] = {"weight": jnp.ones((2, 3))}
    with pytest.raises(UserError, match=r"'layers/router/weight' \(2, 3\)"):
        param_shardings(MESH, params)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((8, 8), ("fsdp", "tensor")), ((6, 8), (None, "tensor")), ((8, 7), ("fsdp", None)), ((6, 7), (None, None))],
)
def test_an_axis_that_does_not_divide_leaves_its_dimension_whole(shape, spec):
    leaf = {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}
    found = param_shardings(MESH, leaf, [("x", P("fsdp", "tensor"))])
    assert full_spec(found["x"], 2) == spec
    jax.device_put(np.ones(shape), found["x"])  # JAX refuses a sharding that does not divide


def test_an_axis_that_divides_nothing_is_told_with_what_stays_whole():
    params = {"a": np.zeros((12, 10), np.float32), "b": np.zeros((2**14, 15), np.float32), "c": np.zeros(7)}
    rules = (("a|b", P("fsdp", "tensor")), ("c", P()))
    mesh = {tensor: make_mesh({"fsdp": -1, "tensor": tensor}, jax.devices()[:4]) for tensor in (1, 2, 4)}
    assert what_stays_whole(mesh[1], params, rules) == []
    (said,) = what_stays_whole(mesh[2], params, rules)
    kept = 4 * 15 * 2**14 / 2**30
    assert said == (
        f"mesh.tensor=2 does not divide 1 of 2 parameters, such as b [16384, 15]; {kept:.2g} GiB stay whole on a device"
    )
    (said,) = what_stays_whole(mesh[4], params, rules)
    assert said.startswith("mesh.tensor=4 does not divide any parameter; 0.00092 GiB stay")


# The state


@pytest.fixture(scope="module")
def placed():
    """(state, shardings): AdamW with clipping, parameters and moments on eight devices."""
    params = make_params()
    optimizer = make_optimizer({"name": "adamw", "weight_decay": 0.1}, lambda step: 1e-3, 1.0)
    params = jax.device_put(params, param_shardings(MESH, params))
    state = init_state(params, optimizer, MESH, jax.tree.map(jnp.copy, params))
    return state, state_shardings(MESH, state)


def moments(opt_state):
    """Every subtree of the optimizer's state that has the parameters' structure."""
    structure = jax.tree.structure(make_params())
    same = lambda x: jax.tree.structure(x) == structure  # noqa: E731
    return [part for part in jax.tree.leaves(opt_state, is_leaf=same) if same(part)]


def test_both_moments_of_adam_lie_where_their_parameters_do(placed):
    state, shardings = placed
    assert len(moments(state.opt_state)) == 2
    for tree in moments(state.opt_state):
        for moment, parameter in zip(jax.tree.leaves(tree), jax.tree.leaves(state.params), strict=True):
            assert moment.shape == parameter.shape
            assert moment.sharding.is_equivalent_to(parameter.sharding, moment.ndim)
    assert [tree == shardings.params for tree in moments(shardings.opt_state)] == [True, True]


def test_a_device_holds_an_eighth_of_a_kernel_and_of_its_moments(placed):
    state, _ = placed
    for tree in (state.params, state.reference, *moments(state.opt_state)):
        kernel = tree["layers"]["mlp"]["down"]["kernel"]
        assert kernel.shape == (2, 32, 16)
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 16, 4)}
        assert len({str(shard.index) for shard in kernel.addressable_shards}) == 8


def test_what_is_no_moment_is_replicated(placed):
    state, shardings = placed
    others = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0]
    assert len(others) >= 1
    assert all(leaf.sharding.is_fully_replicated for leaf in [*others, state.step])
    assert shardings.step.is_fully_replicated


def test_the_reference_lies_where_the_policy_does(placed):
    state, shardings = placed
    assert isinstance(shardings, TrainState)
    assert shardings.reference == shardings.params
    for frozen, policy in zip(jax.tree.leaves(state.reference), jax.tree.leaves(state.params), strict=True):
        assert frozen.sharding.is_equivalent_to(policy.sharding, policy.ndim)


def spec_at(shardings, *names):
    """The specs of the arrays of an optimizer's state on whose way the names lie, in order."""
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    return [sharding.spec for path, sharding in leaves if all(name in jax.tree_util.keystr(path) for name in names)]


@pytest.mark.parametrize("name", ["lion", "adafactor", "muon", "schedule_free_adamw"])
def test_every_optimizers_state_lies_as_the_parameters_do(name):
    own = {"factor_from": 8} if name == "adafactor" else {}
    params = make_params()
    optimizer = make_optimizer({"name": name, **own}, 1e-3)
    state = TrainState(0, params, jax.eval_shape(optimizer.init, params), ema=params)
    shardings = state_shardings(MESH, state)
    assert jax.tree.structure(shardings.opt_state) == jax.tree.structure(state.opt_state)
    assert shardings.ema == shardings.params
    down, embedding = P(None, "tensor", "fsdp"), P(None, "fsdp")
    if name == "adafactor":
        assert spec_at(shardings.opt_state, "down", "v_row") == [P(None, "fsdp")]  # [2, 32, 16], a mean over the 32
        assert spec_at(shardings.opt_state, "down", "v_col") == [P(None, "tensor")]
        assert spec_at(shardings.opt_state, "embed", "v_row") == [P("fsdp")]  # over the 61 rows, which are most
        assert spec_at(shardings.opt_state, "embed", "v_col") == [P(None)]
        assert spec_at(shardings.opt_state, "final_norm", "v'") == spec_at(shardings.params, "final_norm", "v'")
    else:
        once, twice = {"lion": (1, 1), "muon": (1, 2), "schedule_free_adamw": (2, 2)}[name]
        assert spec_at(shardings.opt_state, "down", "kernel") == [down] * once
        assert spec_at(shardings.opt_state, "embed") == [embedding] * twice
    large = [leaf for leaf in jax.tree.leaves(shardings.opt_state) if not leaf.is_fully_replicated]
    assert len(large) >= len([leaf for leaf in jax.tree.leaves(shardings.params) if not leaf.is_fully_replicated])


def test_means_of_a_square_matrix_lie_as_the_axis_that_is_left():
    rules = [("layers/w/kernel", P(None, "fsdp", "tensor"))]
    params = {"layers": {"w": {"kernel": jnp.ones([2, 8, 8])}}}
    optimizer = make_optimizer({"name": "adafactor", "factor_from": 4}, 1e-3)
    shardings = state_shardings(MESH, TrainState(0, params, jax.eval_shape(optimizer.init, params)), rules)
    assert spec_at(shardings.opt_state, "v_row") == [P(None, "fsdp")]
    assert spec_at(shardings.opt_state, "v_col") == [P(None, "tensor")]
    moved = jax.tree.map(lambda x: x.at[:, 3, :].set(5.0), params)  # a large row is seen in the means of rows alone
    _, state = jax.jit(lambda: optimizer.update(moved, optimizer.init(params), params))()
    rows, columns = (getattr(state[0]["layers"]["w"]["kernel"][0], name) for name in ("v_row", "v_col"))
    assert rows[0, 3] > 5 * rows[0, 0] and columns[0, 3] == columns[0, 0]


@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
def test_a_state_without_a_reference_and_other_optimizers(name):
    params = make_params()
    optimizer = make_optimizer({"name": name}, 1e-3)
    state = TrainState(0, params, jax.eval_shape(optimizer.init, params))
    shardings = state_shardings(MESH, state)
    assert shardings.reference is None
    assert jax.tree.structure(shardings.opt_state) == jax.tree.structure(state.opt_state)
    assert [tree == shardings.params for tree in moments(shardings.opt_state)] == [True] * {"sgd": 0, "rmsprop": 1}[
        name
    ]


# Batches


@pytest.mark.parametrize("cached", [False, True])
def test_rows_are_dealt_and_pairs_are_everywhere(cached):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    batch = packed(make_pairs(8), groups=groups_of(mesh))
    if cached:
        batch = batch._replace(reference=PairLogps(*np.ones((4, 1, 8), np.float32)))
    placed = jax.device_put(batch, batch_shardings(mesh, batch))
    for name in ("tokens", "segments", "branches", "positions", "source", "target", "slot"):
        array = getattr(placed, name)
        shards = {shard.data.shape for shard in array.addressable_shards}
        assert shards == {(1, array.shape[1] // 4, *array.shape[2:])}, name
    rest = [placed.weight, placed.index, placed.mean_tokens, *jax.tree.leaves(placed.reference)]
    assert len(rest) == (7 if cached else 3)
    assert all(array.sharding.is_fully_replicated for array in rest)


def test_a_group_and_its_rows_are_on_the_same_devices():
    """`source` counts within the rows of its group, so both must lie together."""
    batch = packed(make_pairs(8), groups=4)
    placed = jax.device_put(batch, batch_shardings(MESH, batch))
    rows = batch.tokens.shape[1] // 4

    def held(array):
        return {shard.device.id: shard.index[1].indices(array.shape[1])[:2] for shard in array.addressable_shards}

    groups = held(placed.source)
    assert len(set(groups.values())) == 4
    assert held(placed.tokens) == {device: (start * rows, stop * rows) for device, (start, stop) in groups.items()}


# Programs: what ten steps on eight devices compute, and what they send.

PROGRAM = dataclasses.replace(CONFIG, vocab_size=96, num_layers=3)
MESHES = {
    "one": {},
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 4 x context 2": {"fsdp": 4, "context": 2},
}
# TRL's runs are on the other meshes, DPO's on data 8 and ORPO's on fsdp 4 x tensor 2 (tests/test_train.py). DPO is on
# each mesh, and each mesh but one has another loss as well.
PROGRAMS = [("dpo", "data 2 x fsdp 2 x tensor 2")]
PROGRAMS += [longer("dpo", mesh) for mesh in list(MESHES)[1:] if ("dpo", mesh) not in PROGRAMS]
PROGRAMS += [longer("orpo", mesh) for mesh in ("fsdp 8", "fsdp 4 x context 2")]
PROGRAMS += [longer("kto", mesh) for mesh in ("data 8", "fsdp 4 x tensor 2")]
PROGRAMS += [longer(f"dpo of {name}", "fsdp 4 x tensor 2") for name in ("experts", "delta rules")]


@functools.cache
def ten_steps(name: str, mesh: str):
    """(losses, parameters after, how far each moved at least, the program, the mesh) of ten AdamW steps."""
    mesh = make_mesh(MESHES[mesh], jax.devices()[: 1 if mesh == "one" else 8])
    name, _, parts = name.partition(" of ")
    more = {"": {}, "experts": EXPERTS, "delta rules": DELTA | {"num_layers": 4, "delta_layers": (True, False) * 2}}
    shape = dataclasses.replace(PROGRAM, **more[parts])
    if parts == "delta rules":  # a head that reads next to nothing would magnify every rounding
        shape = dataclasses.replace(shape, norm_eps=0.03)
    loss, model = make_loss(name), make_decoder(shape, placement=Placement(spread(mesh), deal_experts(mesh)))
    # With a smaller eps, Adam makes steps of one size of gradients that are rounding alone.
    optimizer = make_optimizer({"name": "adamw", "eps": 1e-3}, lambda step: 2e-3, 1.0)

    def place(seed):
        params = make_params(seed, model)
        return jax.device_put(params, param_shardings(mesh, params))

    state = init_state(place(0), optimizer, mesh, place(1) if "reference" in loss.needs else None, loss.running)
    pairs = make_pairs(80, vocabulary=96, longest=20)
    pairs = [dataclasses.replace(pair, label=number % 3 > 0) for number, pair in enumerate(pairs)]
    data = make_pair_set(pairs, 8, **packing_of(mesh), layout=Layout(prompt="prompt" in loss.needs))
    data = data._replace(shapes=data.shapes[-1:])
    batches = [place_batch(mesh, batch_of(data, np.arange(8 * n, 8 * n + 8))) for n in range(10)]
    step = make_train_step(model, loss, optimizer, mesh, chunk=32).lower(state, batches[0]).compile()
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    after = jax.device_get(state.params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after, make_params(0, model))
    return np.array(losses), after, min(jax.tree.leaves(moved)), step, mesh


@pytest.mark.parametrize(("loss", "mesh"), PROGRAMS)
def test_ten_steps_on_eight_devices_are_those_on_one(loss, mesh):
    losses, params, moved, _, _ = ten_steps(loss, mesh)
    wanted, wanted_params, *_ = ten_steps(loss, "one")
    assert moved > 1e-3  # a hundred times the bar
    np.testing.assert_allclose(losses, wanted, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, wanted_params)


@pytest.mark.parametrize(("loss", "mesh"), PROGRAMS)
def test_no_parameter_is_gathered_whole_but_a_layers_in_its_turn(loss, mesh):
    _, params, _, step, mesh = ten_steps(loss, mesh)
    shapes = {shape for leaf in jax.tree.leaves(params) for shape in (leaf.shape, leaf.shape[1:])}
    shapes = {shape for shape in shapes if len(shape) > 1}
    found = collectives(step.as_text(), 8)
    gathered = [one for one in found if one.kind == "all-gather"]
    assert not [one for one in gathered if not one.in_loop and shapes & {shape[-2:] for shape in one.shapes}]
    if mesh.shape["fsdp"] > 1:  # layer by layer
        assert [one for one in gathered if one.in_loop and one.times == PROGRAM.num_layers]


def test_a_gated_delta_rule_takes_whole_rows():
    shape = dataclasses.replace(CONFIG, **DELTA)
    with pytest.raises(UserError, match="mesh.context=2: gated delta rules take whole rows; write mesh.context=1"):
        decoder_of(defaults("dpo"), shape, make_mesh({"fsdp": 4, "context": 2}))


def test_parameters_are_born_in_parts():
    model = make_decoder(dataclasses.replace(PROGRAM, hidden_size=64, intermediate_size=256))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    mesh = make_mesh({"fsdp": 8})
    init = jax.jit(model.init, out_shardings=param_shardings(mesh, shapes)).lower(jax.random.key(0)).compile()
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    assert init.memory_analysis().temp_size_in_bytes < largest
    params = born(mesh, model.init, jax.random.key(0))
    whole = jax.jit(model.init)(jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, whole)
    assert params["head"]["kernel"].addressable_shards[0].data.shape == (96, 8)
