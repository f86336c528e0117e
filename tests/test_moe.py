import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from conftest import longer
from prefalign_jax.cost.collectives import collectives
from prefalign_jax.cost.flops import count_flops
from prefalign_jax.models.moe import Routing, balance, clamped_swiglu, experts, route, routing, swiglu
from prefalign_jax.sharding import deal_experts, make_mesh

RNG = np.random.default_rng(0)
N, D, F, E = 11, 6, 5, 4
X = RNG.normal(size=(N, D)).astype(np.float32)
GATE, UP = RNG.normal(size=(2, E, D, F)).astype(np.float32)
DOWN = RNG.normal(size=(E, F, D)).astype(np.float32)
LOGITS = RNG.normal(size=(N, E)).astype(np.float32)


BIASES = (*RNG.normal(size=(2, E, F)).astype(np.float32), RNG.normal(size=(E, D)).astype(np.float32))
CLAMPED = functools.partial(clamped_swiglu, limit=1.5, alpha=1.702)


def one_by_one(x, gate, up, down, weights, biases, chosen, act):
    """Every token through each of its experts."""
    rows, (of_gate, of_up, of_down) = [], biases or jnp.zeros((3, E, 1))
    for token, ws, es in zip(x, weights, chosen, strict=True):
        read = [act(token @ gate[e] + of_gate[e], token @ up[e] + of_up[e]) for e in es]
        rows.append(sum(w * (one @ down[e] + of_down[e]) for w, e, one in zip(ws, es, read, strict=True)))
    return jnp.stack(rows)


def test_the_clamped_gate_by_hand():
    gate, up = np.array([-9.0, -1.0, 0.5, 3.0]), np.array([-9.0, -1.0, 0.5, 3.0])
    low, high = np.minimum(gate, 2.0), np.clip(up, -2.0, 2.0)
    np.testing.assert_allclose(
        clamped_swiglu(gate, up, limit=2.0, alpha=1.702), low / (1 + np.exp(-1.702 * low)) * (high + 1), rtol=1e-5
    )


@pytest.mark.parametrize(("k", "act", "biases"), [longer(1, swiglu, None), (2, swiglu, None), (2, CLAMPED, BIASES)])
def test_sorted_groups_are_every_token_through_its_experts_in_value_and_gradient(k, act, biases):
    weights, chosen, _ = route(LOGITS, k, renormalise=True)
    cotangent = RNG.normal(size=X.shape).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_pulled(function, *args):
        value, pull = jax.vjp(lambda *a: function(*a, chosen=chosen, act=act), *args)
        return value, jax.tree.leaves(pull(cotangent))

    args = (X, GATE, UP, DOWN, weights, biases)
    value, pulled = value_and_pulled(lambda *a, **more: experts(*a[:-1], biases=a[-1], **more), *args)
    wanted, wanted_pulled = value_and_pulled(one_by_one, *args)
    np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4)
    assert len(pulled) == (5 if biases is None else 8)
    for got, right in zip(pulled, wanted_pulled, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-3, atol=1e-3)


def test_no_token_is_dropped_though_all_want_one_expert():
    logits = np.zeros((N, E), np.float32)
    logits[:, 2] = 10
    weights, chosen, _ = route(logits, 1, renormalise=True)
    found = experts(X, GATE, UP, DOWN, weights, chosen)
    np.testing.assert_allclose(found, (jax.nn.silu(X @ GATE[2]) * (X @ UP[2])) @ DOWN[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("renormalise", [False, True])
def test_the_weights_are_the_routers_probabilities(renormalise):
    weights, chosen, probabilities = route(LOGITS, 2, renormalise=renormalise)
    picked = np.take_along_axis(np.asarray(probabilities), np.asarray(chosen), 1)
    assert (np.sort(picked, 1) == np.sort(np.asarray(probabilities), 1)[:, -2:]).all()
    np.testing.assert_allclose(weights, picked / picked.sum(1, keepdims=True) if renormalise else picked, rtol=1e-6)


def test_balance_is_least_where_all_experts_are_used_alike():
    even = Routing(jnp.full((3, E), 2 / E), jnp.full((3, E), 1 / E))
    np.testing.assert_allclose(balance(even), 2.0)
    skewed = jnp.array([[1.0, 1.0, 0.0, 0.0]] * 3)
    assert balance(Routing(skewed, skewed / 2)) == pytest.approx(4.0)


def test_padding_has_no_part_in_the_balance():
    _, chosen, probabilities = route(LOGITS, 2, renormalise=True)
    active = np.arange(N) < 7
    found = routing(chosen, probabilities, active)
    wanted = routing(chosen[:7], probabilities[:7], np.ones(7, bool))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)
    np.testing.assert_allclose(found.share.sum(), 2.0, rtol=1e-6)
    np.testing.assert_allclose(found.probability.sum(), 1.0, rtol=1e-6)


@pytest.mark.everything
def test_the_router_learns_through_its_weights():
    def f(logits):
        weights, chosen, _ = route(logits, 2, renormalise=True)
        return experts(X, GATE, UP, DOWN, weights, chosen)

    with jax.enable_x64(True):
        args = tuple(jnp.asarray(a, jnp.float64) for a in (X, GATE, UP, DOWN))
        _, chosen, _ = route(LOGITS, 2, renormalise=True)
        weights = jnp.asarray(RNG.uniform(size=(N, 2)))
        check_grads(lambda w, x: experts(x, *args[1:], w, chosen), (weights, args[0]), order=1, modes=("rev",))
    assert np.any(jax.grad(lambda x: f(x).sum())(LOGITS))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_balance_of_a_model_is_transformers_auxiliary_loss(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from prefalign_jax.models.decoder import make_decoder
    from prefalign_jax.models.hf_io import load_config, load_params

    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_local_experts=5)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, output_router_logits=True)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(**shape, **heads)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 61, (2, 20))
    zeros = np.zeros((2, 20), np.int32)
    found = make_decoder(config).routed(load_params(tmp_path, config), tokens, zeros + np.arange(20), zeros + 1, zeros)[
        1
    ]
    np.testing.assert_allclose(found, theirs(torch.tensor(tokens)).aux_loss.item(), rtol=1e-5)


@pytest.mark.parametrize("biases", [longer(None), BIASES], ids=["plain", "biases"])
def test_experts_dealt_whole_over_devices_are_those_on_one(biases):
    """In value and gradient; what is exchanged is the sum over the experts, and never a kernel over tensor."""
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    x = RNG.normal(size=(12, D)).astype(np.float32)
    logits = RNG.normal(size=(12, E)).astype(np.float32)
    weights, chosen, _ = route(logits, 2, renormalise=True)
    cotangent = RNG.normal(size=x.shape).astype(np.float32)

    def pulled(deal):
        def function(*args):
            value, pull = jax.vjp(lambda *a: deal(experts, *a[:-1], chosen, a[-1]), *args)
            return value, pull(cotangent)

        return jax.jit(function)

    args = (x, GATE, UP, DOWN, weights, biases)
    dealt = pulled(deal_experts(mesh))
    where = [P("fsdp"), *[P("tensor")] * 3, P("fsdp"), P("tensor")]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(args, where, strict=True)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        dealt(*placed),
        pulled(lambda function, *a: function(*a))(*args),
    )
    sent = collectives(dealt.lower(*placed).compile().as_text(), 8)
    assert {one.kind for one in sent if len(one.group) > 2 or one.group[1] == 1} == {"all-reduce"}
    # What is counted is of the pass forward and back, as of one device.
    assert count_flops(dealt, *args) == count_flops(pulled(lambda function, *a: function(*a)), *args)
