"""Updates against PyTorch's algorithms written out in numpy, rates against closed forms, and what decays."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from conftest import longer
from prefalign_jax import averages, optim
from prefalign_jax.types import TrainState, UserError


def tree(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "layers": {"norm": {"scale": (2, 8)}, "q": {"kernel": (2, 8, 8), "bias": (2, 8)}},
        "final": {"offset": (8,)},
    }
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: type(s) is tuple
    )


def run(tx, params, grads):
    """The parameters after one jitted update for each gradient tree."""

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for grad in grads:
        params, state = step(params, state, grad)
    return params


def torch_adamw(p, grads, rates, decay, b1=0.9, b2=0.999, eps=1e-8):
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), 1):
        p = p - rate * decay * p
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


def torch_rmsprop(p, grads, rates, decay=0.99, eps=1e-8):
    v = np.zeros_like(p)
    for g, rate in zip(grads, rates, strict=True):
        v = decay * v + (1 - decay) * g * g
        p = p - rate * g / (np.sqrt(v) + eps)
    return p


def torch_sgd(p, grads, rates, momentum=0.9):
    u = np.zeros_like(p)
    for g, rate in zip(grads, rates, strict=True):
        u = momentum * u + g
        p = p - rate * u
    return p


def leaves64(tree):
    return {jax.tree_util.keystr(k): np.float64(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("scale", [1.0, 1e-7])  # at 1e-7 the place of eps decides the update
@pytest.mark.parametrize(
    ("config", "reference"),
    [
        ({"name": "adamw"}, lambda p, g, r, decays: torch_adamw(p, g, r, 0.0)),
        ({"name": "adamw", "weight_decay": 0.1}, lambda p, g, r, decays: torch_adamw(p, g, r, 0.1 * decays)),
        (
            {"name": "adamw", "b2": 0.95, "eps": 1e-6},
            lambda p, g, r, decays: torch_adamw(p, g, r, 0.0, b2=0.95, eps=1e-6),
        ),
        ({"name": "rmsprop"}, lambda p, g, r, decays: torch_rmsprop(p, g, r)),
        ({"name": "rmsprop", "decay": 0.9}, lambda p, g, r, decays: torch_rmsprop(p, g, r, 0.9)),
        ({"name": "sgd", "momentum": 0.9}, lambda p, g, r, decays: torch_sgd(p, g, r)),
        ({"name": "sgd"}, lambda p, g, r, decays: torch_sgd(p, g, r, 0.0)),
    ],
)
def test_five_updates_are_pytorchs(config, reference, scale):
    schedule = optim.make_schedule("linear", 0.1, 2, 7)
    rates = [0.0, 0.05, 0.1, 0.08, 0.06]
    params = tree()
    grads = [jax.tree.map(lambda x: scale * x, tree(seed)) for seed in range(1, 6)]
    got = leaves64(run(optim.make_optimizer(config, schedule), params, grads))
    columns = [leaves64(g) for g in grads]
    for name, start in leaves64(params).items():
        want = reference(start, [c[name] for c in columns], rates, float("kernel" in name))
        np.testing.assert_allclose(got[name] - start, want - start, rtol=2e-4, atol=2e-6, err_msg=name)
        if config["name"] != "sgd":
            assert np.abs(want - start).min() > 1e-4  # the tolerance would not hide a missing update


def test_clipping_scales_the_whole_tree_by_one_number():
    params, grads = tree(), tree(1)
    norm = float(np.sqrt(sum((g**2).sum() for g in leaves64(grads).values())))
    for limit in (0.5 * norm, 2.0 * norm, None):
        tx = optim.make_optimizer({"name": "sgd"}, 1.0, grad_clip=limit)
        moved = jax.tree.map(lambda a, b: a - b, params, run(tx, params, [grads]))
        factor = min(1.0, (limit or math.inf) / norm)
        for name, g in leaves64(grads).items():
            np.testing.assert_allclose(leaves64(moved)[name], factor * g, rtol=1e-5, atol=1e-6)


def test_gradient_of_zero_moves_nothing():
    params = tree()
    zeros = jax.tree.map(jnp.zeros_like, params)
    for name in optim.OPTIMIZERS:
        after = run(optim.make_optimizer({"name": name}, 1.0, grad_clip=1.0), params, [zeros])
        if name == "schedule_free_adamw":  # computes its average anew from what is trained, with one rounding
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-7), params, after)
        else:
            jax.tree.map(np.testing.assert_array_equal, params, after)


def test_decay_mask_leaves_out_scales_biases_and_vectors():
    assert optim.decay_mask(tree()) == {
        "layers": {"norm": {"scale": False}, "q": {"kernel": True, "bias": False}},
        "final": {"offset": False},
    }


def test_a_mask_of_ones_own_replaces_the_default():
    tx = optim.make_optimizer(
        {"name": "adamw", "weight_decay": 0.5}, 1.0, decay_mask=lambda p: jax.tree.map(lambda x: x.ndim == 1, p)
    )
    params = tree()
    after = run(tx, params, [jax.tree.map(jnp.zeros_like, params)])
    np.testing.assert_allclose(after["final"]["offset"], 0.5 * params["final"]["offset"])
    np.testing.assert_array_equal(after["layers"]["q"]["kernel"], params["layers"]["q"]["kernel"])


@pytest.mark.parametrize(
    "config", [{"name": "adamw", "weight_decay": 0.1}, {"name": "rmsprop"}, {"name": "sgd", "momentum": 0.9}]
)
def test_moments_take_the_shardings_of_their_parameters(config):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    tx = optim.make_optimizer(config, optim.make_schedule("cosine", 1e-3, 0, 5), grad_clip=1.0)
    split = jax.tree.map(lambda x: NamedSharding(mesh, P(*[None] * (x.ndim - 1), "fsdp")), tree())
    params = jax.device_put(tree(), split)
    everywhere = NamedSharding(mesh, P())
    shapes = jax.eval_shape(tx.init, params)
    shardings = optax.tree.map_params(tx, lambda _, s: s, shapes, split, transform_non_params=lambda _: everywhere)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert len(moments) % len(jax.tree.leaves(params)) == 0 and moments
    assert all(not leaf.sharding.is_fully_replicated for leaf in moments)


# Rates at steps 0, 1, ..., by the formulas in transformers' optimization.py.
@pytest.mark.parametrize(
    ("name", "hyper", "warmup", "total", "want"),
    [
        ("constant", {}, 0, 3, [1, 1, 1, 1, 1]),
        ("constant", {}, 2, 3, [0, 0.5, 1, 1, 1]),
        ("linear", {}, 0, 4, [1, 0.75, 0.5, 0.25, 0, 0]),
        ("linear", {}, 2, 6, [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("linear", {}, 4, 4, [0, 0.25, 0.5, 0.75, 0]),
        ("cosine", {}, 0, 4, [0.5 + 0.5 * math.cos(math.pi * i / 4) for i in range(5)] + [0]),
        ("cosine", {}, 2, 6, [0, 0.5] + [0.5 + 0.5 * math.cos(math.pi * i / 4) for i in range(5)] + [0]),
        ("linear", {"floor": 0.2}, 0, 4, [1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ("cosine", {"floor": 0.2}, 2, 6, [0, 0.5] + [0.6 + 0.4 * math.cos(math.pi * i / 4) for i in range(5)] + [0.2]),
        ("polynomial", {}, 1, 5, [0, 1, 9 / 16, 4 / 16, 1 / 16, 0, 0]),
        (
            "polynomial",
            {"power": 0.5, "floor": 0.1},
            0,
            4,
            [0.1 + 0.9 * math.sqrt(1 - i / 4) for i in range(5)] + [0.1],
        ),
        ("wsd", {}, 1, 10, [0, *[1] * 9, 0, 0]),
        ("wsd", {"decay_ratio": 0.4}, 2, 10, [0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("wsd", {"decay_ratio": 0.4, "floor": 0.2}, 0, 10, [*[1] * 7, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (
            "wsd",
            {"decay_ratio": 1.0, "decay_shape": "sqrt"},
            0,
            4,
            [1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0],
        ),
        ("wsd", {"decay_ratio": 0.5, "decay_shape": "cosine"}, 0, 4, [1, 1, 1, 0.5, 0, 0]),
        ("inverse_sqrt", {}, 4, 100, [0, 0.25, 0.5, 0.75, 1, 2 / math.sqrt(5), 2 / math.sqrt(6)]),
        ("inverse_sqrt", {}, 0, 100, [1, 100 / math.sqrt(10_001)]),
        ("inverse_sqrt", {"timescale": 1}, 4, 100, [0, 0.25, 0.5, 0.75, 1, 1 / math.sqrt(2), 1 / math.sqrt(3)]),
    ],
)
def test_rates(name, hyper, warmup, total, want):
    schedule = optim.make_schedule(name, 3e-4, warmup, total, **hyper)
    got = jax.jit(jax.vmap(schedule))(jnp.arange(len(want)))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 3e-4 * np.array(want), rtol=1e-6, atol=1e-11)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["constant_with_warmup", "linear", "cosine", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_rates_are_transformers_own(name, warmup):
    torch = pytest.importorskip("torch")
    import transformers

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    want = []
    for _ in range(10):
        want.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    schedule = optim.make_schedule(name.removesuffix("_with_warmup"), 0.3, warmup, 10)
    np.testing.assert_allclose([float(schedule(i)) for i in range(10)], want, rtol=1e-6, atol=1e-8)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_updates_are_pytorchs_own(name):
    torch = pytest.importorskip("torch")
    start, grads = tree()["layers"]["q"]["kernel"], [tree(s)["layers"]["q"]["kernel"] for s in range(1, 6)]
    weight = torch.tensor(np.asarray(start), requires_grad=True)
    settings = {"adamw": (torch.optim.AdamW, {"weight_decay": 0.1}), "rmsprop": (torch.optim.RMSprop, {})}
    make, hyper = settings[name]
    optimizer = make([weight], lr=0.01, **hyper)
    for grad in grads:
        weight.grad = torch.tensor(np.asarray(grad))
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
    tx = optim.make_optimizer({"name": name, **hyper}, 0.01, grad_clip=1.0)
    got = run(tx, {"kernel": start}, [{"kernel": g} for g in grads])["kernel"]
    np.testing.assert_allclose(got, weight.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: optim.make_optimizer({"name": "adam"}, 1.0), "did you mean 'adamw'.*adamw, rmsprop, sgd"),
        (lambda: optim.make_optimizer({}, 1.0), "optimizer.name=None is unknown"),
        (
            lambda: optim.make_optimizer({"name": "adamw", "weight_decy": 0.1}, 1.0),
            "did you mean 'weight_decay'.*it has b1, b2",
        ),
        (
            lambda: optim.make_optimizer({"name": "rmsprop", "weight_decay": 0.1}, 1.0),
            "no hyper-parameter 'weight_decay'",
        ),
        (
            lambda: optim.make_optimizer({"name": "adamw", "b2": 1.0}, 1.0),
            r"b2=1.0 is out of range; write a number in \[0, 1\)",
        ),
        (lambda: optim.make_optimizer({"name": "sgd"}, 1.0, grad_clip=0.0), "grad_clip=0.0"),
        (lambda: optim.make_optimizer({"name": "lion", "eps": 1e-8}, 1.0), "'lion' has no hyper-parameter 'eps'"),
        (
            lambda: optim.make_optimizer({"name": "adafactor", "b2": 0.9}, 1.0),
            "no hyper-parameter 'b2'; it has decay_po",
        ),
        (lambda: optim.make_optimizer({"name": "schedule_free_adamw", "b1": 0.0}, 1.0), r"b1=0 .* in \(0, 1\)"),
        (lambda: optim.make_schedule("cosine", 1.0, 0, 9, power=2.0), "'cosine' has no hyper-parameter 'power'"),
        (lambda: optim.make_schedule("cosine", 1.0, 0, 9, floor=1.0), r"floor=1.0 is out of range"),
        (lambda: optim.make_schedule("wsd", 1.0, 0, 9, decay_shape="line"), "write one of linear, cosine, sqrt"),
        (lambda: optim.make_schedule("wsd", 1.0, 9, 10, decay_ratio=0.2), "do not fit into 10 steps"),
        (lambda: optim.make_schedule("cosin", 1.0, 0, 9), "did you mean 'cosine'"),
        (lambda: optim.make_schedule("constant", 1.0, 0, 9, timescale=3), "it has none"),
        (lambda: optim.make_schedule("inverse_sqrt", 1.0, 0, 9, timescal=3), "did you mean 'timescale'"),
        (lambda: optim.make_schedule("linear", math.nan, 0, 9), "learning_rate=nan"),
        (lambda: optim.make_schedule("linear", 1.0, 0.1, 9), "warmup_steps=0.1 .* whole number"),
        (lambda: optim.make_schedule("linear", 1.0, 10, 9), "warmup_steps=10 exceeds the 9 steps"),
        (lambda: optim.make_schedule("linear", 1.0, 0, 0), "total_steps=0"),
    ],
)
def test_mistakes_are_named(call, says):
    with pytest.raises(UserError, match=says):
        call()


# bfloat16 parameters


def test_stochastic_rounding_is_right_on_average_and_never_further_than_the_next_number():
    x = jnp.asarray(np.random.default_rng(0).normal(size=500), jnp.float32)
    drawn = jax.vmap(lambda key: optim.stochastic_round(x, key))(jax.random.split(jax.random.key(0), 2000))
    assert drawn.dtype == jnp.bfloat16
    drawn = np.asarray(drawn, np.float64)
    gap = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)  # between bfloat16 numbers around x
    assert (np.abs(drawn - np.float64(x)) < gap).all()
    assert (np.abs(drawn.mean(0) - x) < 5 * gap / 2 / np.sqrt(2000)).all()
    exact = jnp.float32([0.0, -0.0, 1.5, -3.0, jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(optim.stochastic_round(exact, jax.random.key(1)).astype(jnp.float32), exact)
    assert np.isnan(optim.stochastic_round(jnp.float32(jnp.nan), jax.random.key(1)))


def test_updates_far_below_a_weights_precision_add_up():
    """1000 updates of a 40th of the gap between bfloat16 numbers: rounded to the nearest, none is left."""
    params = {"w": jnp.ones(400, jnp.bfloat16), "b": jnp.zeros(3, jnp.float32)}
    update = {"w": jnp.full(400, 2.0**-7 / 40), "b": jnp.ones(3)}

    def many(rounds):
        def step(params, key):
            return optim.apply_updates(params, update, key if rounds else None), None

        return jax.jit(lambda: jax.lax.scan(step, params, jax.random.split(jax.random.key(0), 1000))[0])()

    nearest, stochastic = many(False), many(True)
    np.testing.assert_array_equal(nearest["w"].astype(jnp.float32), 1.0)
    np.testing.assert_allclose(stochastic["w"].astype(jnp.float32).mean(), 1 + 1000 * 2.0**-7 / 40, rtol=0.01)
    assert stochastic["w"].dtype == jnp.bfloat16 and stochastic["b"].dtype == jnp.float32
    np.testing.assert_array_equal(stochastic["b"], 1000.0)


def test_moments_of_bfloat16_parameters_can_be_float32():
    tx = optim.in_float32(optim.make_optimizer({"name": "adamw"}, 1e-2))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree())
    state = tx.init(params)
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype("float32")}
    updates, _ = tx.update(params, state, params)
    exact = optim.make_optimizer({"name": "adamw"}, 1e-2)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    wanted, _ = exact.update(wide, exact.init(wide), wide)
    jax.tree.map(np.testing.assert_array_equal, updates, wanted)


# Optimizers that know layers: stacked kernels are so many matrices, each by itself

SHAPES = {
    "layers": {
        "norm": {"scale": (2, 6)},
        "q": {"kernel": (2, 6, 10), "bias": (2, 10)},
        "down": {"kernel": (2, 10, 6)},
        "experts": {"up": {"kernel": (2, 3, 6, 4), "bias": (2, 3, 4)}},
        "attention": {"sinks": (2, 5)},
        "delta": {"taps": (2, 5, 1, 4)},
    },
    "embed": {"embedding": (7, 6)},
    "final_norm": {"scale": (6,)},
}
VECTORS = "scale|bias|sinks|taps"


def stack(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), SHAPES, is_leaf=lambda s: type(s) is tuple
    )


def numpy_lion(p, grads, rates, decay, b1=0.9, b2=0.99):
    m = np.zeros_like(p)
    for g, rate in zip(grads, rates, strict=True):
        p = p - rate * (np.sign(b1 * m + (1 - b1) * g) + decay * p)
        m = b2 * m + (1 - b2) * g
    return p


def numpy_adafactor(p, grads, rates, decay, factor_from=5, clip=1.0, parameter_scale=False):
    rows = columns = v = 0.0
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), 1):
        keep, square = 1 - t**-0.8, g * g + 1e-30
        if p.ndim == 2 and min(p.shape) >= factor_from:
            rows = keep * rows + (1 - keep) * square.mean(1)
            columns = keep * columns + (1 - keep) * square.mean(0)
            estimate = np.outer(rows, columns) / rows.mean()
        else:
            estimate = v = keep * v + (1 - keep) * square
        u = g / np.sqrt(estimate)
        u = u / max(1, np.sqrt((u * u).mean()) / clip)
        u = u * max(np.sqrt((p * p).mean()), 1e-3) if parameter_scale else u
        p = p - rate * (u + decay * p)
    return p


def numpy_muon(p, grads, rates, decay, momentum=0.95, rms=0.2):
    """Newton-Schulz's iteration is an odd polynomial of a matrix: it changes singular values and nothing else."""
    m = np.zeros_like(p)
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), 1):
        m = momentum * m + (1 - momentum) * g
        ahead = momentum * m / (1 - momentum ** (t + 1)) + (1 - momentum) * g / (1 - momentum**t)
        left, values, right = np.linalg.svd(ahead, full_matrices=False)
        values = values / np.linalg.norm(values)
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        rows, columns = p.shape
        scale = rms * np.sqrt(max(rows, columns)) if rms else np.sqrt(max(1, columns / rows))
        p = p - rate * (scale * (left * values) @ right + decay * p)
    return p


def numpy_schedule_free(y, grads, rates, decay, b1=0.9, b2=0.999, eps=1e-8):
    """As the authors' own code has it, which never computes the average x but at the end."""
    z, v, total, highest = y, 0.0, 0.0, 0.0
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), 1):
        v = b2 * v + (1 - b2) * g * g
        step = g / (np.sqrt(v / (1 - b2**t)) + eps) + decay * y
        highest = max(highest, rate)
        total += highest**2
        share = highest**2 / total if total else 0.0
        y = (1 - share) * y + share * z + rate * (b1 * (1 - share) - 1) * step
        z = z - rate * step
    return (y - (1 - b1) * z) / b1


def by_tensor(reference, path, p, grads, *args):
    """The reference of every vector or matrix of a stack by itself."""
    axes = 3 if "taps" in path else 1 if re.search(VECTORS, path) else 2
    depth = p.ndim - axes if "layers" in path else 0
    out = np.empty_like(p)
    for index in np.ndindex(p.shape[:depth]):
        out[index] = reference(p[index], [g[index] for g in grads], *args)
    return out


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        ({"name": "lion"}, numpy_lion),
        longer({"name": "lion", "b1": 0.8, "b2": 0.5}, functools.partial(numpy_lion, b1=0.8, b2=0.5)),
        ({"name": "adafactor", "factor_from": 5}, numpy_adafactor),
        longer({"name": "adafactor"}, functools.partial(numpy_adafactor, factor_from=128)),
        longer(
            {"name": "adafactor", "factor_from": 5, "parameter_scale": True, "clip_rms": 0.5},
            functools.partial(numpy_adafactor, clip=0.5, parameter_scale=True),
        ),
        ({"name": "muon"}, numpy_muon),
        longer(
            {"name": "muon", "momentum": 0.8, "update_rms": 0.0}, functools.partial(numpy_muon, momentum=0.8, rms=0)
        ),
        ({"name": "schedule_free_adamw"}, numpy_schedule_free),
        longer({"name": "schedule_free_adamw", "b1": 0.95}, functools.partial(numpy_schedule_free, b1=0.95)),
    ],
    ids=lambda x: ",".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_six_updates_are_those_of_each_layer_by_itself(config, reference):
    schedule, rates = optim.make_schedule("constant", 0.1, 2, 9), [0.0, 0.05, 0.1, 0.1, 0.1, 0.1]
    tx = optim.make_optimizer({**config, "weight_decay": 0.1}, schedule)
    params, grads = stack(), [stack(seed) for seed in range(1, 7)]

    @jax.jit
    def step(state, grad):
        updates, opt_state = tx.update(grad, state.opt_state, state.params)
        return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    state = TrainState(0, params, jax.jit(tx.init)(params))
    got = leaves64(averages.evaluated(functools.reduce(step, grads, state)).params)
    columns = [leaves64(g) for g in grads]
    for name, start in leaves64(params).items():
        decay = 0.0 if re.search(VECTORS, name) else 0.1
        own = reference
        if config["name"] == "muon" and ("embed" in name or not decay):
            own = torch_adamw
        want = by_tensor(own, name, start, [c[name] for c in columns], rates, decay)
        np.testing.assert_allclose(got[name], want, rtol=2e-4, atol=2e-5, err_msg=name)
        assert np.abs(want - start).max() > 1e-2  # the tolerance would not hide a missing update


def test_muon_makes_the_singular_values_of_every_layer_nearly_equal():
    params, grads = stack(), stack(1)
    grads["layers"]["q"]["kernel"] *= jnp.array([1.0, 1e-3])[:, None, None]  # together the second would vanish
    tx = optim.make_optimizer({"name": "muon", "update_rms": 0.0}, 1.0)
    update = jax.jit(lambda: tx.update(grads, tx.init(params), params)[0]["layers"]["q"]["kernel"])()
    values = np.linalg.svd(np.asarray(update) / np.sqrt(10 / 6), compute_uv=False)
    assert values.shape == (2, 6) and values.min() > 0.6 and values.max() < 1.25


def test_muon_refuses_parameters_without_layers():
    with pytest.raises(UserError, match="matrices below 'layers', and these parameters have none"):
        optim.make_optimizer({"name": "muon"}, 0.1).init({"dense": {"kernel": jnp.ones([3, 4])}})
