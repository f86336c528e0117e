"""Another's Flax models join through `LanguageModel`: nothing of the package's decoder, its names or its rules."""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from conftest import longer
from prefalign_jax import checkpoint
from prefalign_jax.data.pipeline import make_pair_set
from prefalign_jax.evaluation.held_out import evaluate
from prefalign_jax.generation.generate import sample
from prefalign_jax.generation.sampling import Sampling
from prefalign_jax.logps import preference_logps
from prefalign_jax.losses import make_loss
from prefalign_jax.models.attention import attend, tree_mask
from prefalign_jax.reference import cache_key, compute, params_digest
from prefalign_jax.sharding import groups_of, make_mesh, param_shardings
from prefalign_jax.train_step import init_state, make_eval_step, make_train_step
from prefalign_jax.types import LanguageModel, UserError
from small import FULL, first, make_pairs, packed


@dataclasses.dataclass(frozen=True)
class Size:
    vocabulary: int = 64
    width: int = 16
    heads: int = 4
    blocks: int = 2
    max_position: int = 32


# A model in Flax NNX: a list of blocks, a head of its own as a [D, V] kernel.


class NnxBlock(nnx.Module):
    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(size.width, rngs=rngs)
        self.mix = nnx.Linear(size.width, 3 * size.width, rngs=rngs)
        self.out = nnx.Linear(size.width, size.width, use_bias=False, rngs=rngs)
        self.heads = size.heads

    def __call__(self, x, mask):
        qkv = self.mix(self.norm(x)).reshape(*x.shape[:2], 3 * self.heads, -1)
        return x + self.out(attend(*jnp.split(qkv, 3, axis=2), mask).reshape(x.shape))


class NnxModel(nnx.Module):
    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.words = nnx.Embed(size.vocabulary, size.width, rngs=rngs)
        self.places = nnx.Embed(size.max_position, size.width, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(size, rngs) for _ in range(size.blocks)])
        self.last = nnx.RMSNorm(size.width, rngs=rngs)
        self.unembed = nnx.Linear(size.width, size.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens, positions, segments, branches):
        x, mask = self.words(tokens) + self.places(positions), tree_mask(segments, branches)
        for block in self.blocks:
            x = block(x, mask)
        return self.last(x)


def nnx_model(size: Size) -> LanguageModel:
    graph, _ = nnx.split(nnx.eval_shape(lambda: NnxModel(size, nnx.Rngs(0))))
    return LanguageModel(
        config=size,
        init=lambda key: nnx.to_pure_dict(nnx.state(NnxModel(size, nnx.Rngs(key)))),
        hidden=lambda params, *rows: nnx.merge(graph, params)(*rows),
        head=lambda params: params["unembed"]["kernel"].T,
        rules=(
            (r"(words|places)/embedding", P("fsdp", "tensor")),
            (r"blocks/\d+/mix/kernel", P("fsdp", "tensor")),
            (r"blocks/\d+/mix/bias", P("tensor")),
            (r"blocks/\d+/out/kernel", P("tensor", "fsdp")),
            (r"(last|blocks/\d+/norm)/scale", P()),
            (r"unembed/kernel", P("fsdp", "tensor")),
        ),
    )


# A model in Flax Linen: one block, kernels of three and four axes, the embedding as head, and a cap on its logits.


class LinenModel(nn.Module):
    size: Size

    @nn.compact
    def __call__(self, tokens, positions, segments, branches):
        size, dim = self.size, self.size.width // self.size.heads
        table = self.param("position_table", nn.initializers.normal(1.0), (size.max_position, size.width))
        x = nn.Embed(size.vocabulary, size.width, name="wte")(tokens) + table[positions]
        qkv = nn.DenseGeneral((3, size.heads, dim), name="qkv")(nn.LayerNorm(name="ln_1")(x))
        seen = attend(*jnp.moveaxis(qkv, 2, 0), tree_mask(segments, branches))
        x = x + nn.DenseGeneral(size.width, axis=(-2, -1), name="proj")(seen)
        return nn.LayerNorm(name="ln_f", use_bias=False)(x)


def linen_model(size: Size) -> LanguageModel:
    module, blank = LinenModel(size), jnp.zeros((1, 1), jnp.int32)
    return LanguageModel(
        config=size,
        init=lambda key: module.init(key, *[blank] * 4)["params"],
        hidden=lambda params, *rows: module.apply({"params": params}, *rows),
        head=lambda params: params["wte"]["embedding"],
        softcap=3.0,
        rules=(
            (r"wte/embedding", P("tensor", "fsdp")),
            (r"position_table", P(None, "fsdp")),
            (r"qkv/kernel", P("fsdp", None, "tensor")),
            (r"qkv/bias", P(None, "tensor")),
            (r"proj/kernel", P("tensor", None, "fsdp")),
            (r"proj/bias|ln_\w/(scale|bias)", P()),
        ),
    )


class Outsider(NamedTuple):
    model: LanguageModel
    pieces: dict[str, tuple[int, ...]]  # what one device of fsdp 4 x tensor 2 holds of each parameter
    without: str  # a parameter with a rule of its own


OUTSIDERS = {
    "nnx": Outsider(
        nnx_model(Size()),
        {
            "words/embedding": (16, 8),
            "places/embedding": (8, 8),
            **{
                f"blocks/{block}/{name}": shape
                for block in (0, 1)
                for name, shape in {
                    "mix/kernel": (4, 24),
                    "mix/bias": (24,),
                    "out/kernel": (8, 4),
                    "norm/scale": (16,),
                }.items()
            },
            "last/scale": (16,),
            "unembed/kernel": (4, 32),
        },
        "unembed/kernel",
    ),
    "linen": Outsider(
        linen_model(Size(blocks=1)),
        {
            "wte/embedding": (32, 4),
            "position_table": (32, 4),
            "qkv/kernel": (4, 3, 2, 4),
            "qkv/bias": (3, 2, 4),
            "proj/kernel": (2, 4, 4),
            **dict.fromkeys(("proj/bias", "ln_1/scale", "ln_1/bias", "ln_f/scale"), (16,)),
        },
        "position_table",
    ),
}
MESHES = {"data 8": {"data": 8}, "fsdp 4, tensor 2": {"data": 1, "fsdp": 4, "tensor": 2}}
PAIRS = make_pairs(8, vocabulary=64)
OPTIMIZER = optax.adamw(1e-2)
STEPS = 10
each_outsider = pytest.mark.parametrize("outsider", OUTSIDERS)


@functools.cache
def params_of(outsider: str):
    """Parameters large enough, norms and biases included, that every part of the model matters."""
    rng = np.random.default_rng(0)
    params = jax.device_get(jax.jit(OUTSIDERS[outsider].model.init)(jax.random.key(0)))
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype), params)


@functools.cache
def step_of(outsider: str, loss: str, mesh: str):
    return make_train_step(OUTSIDERS[outsider].model, make_loss(loss), OPTIMIZER, make_mesh(MESHES[mesh]))


def start(outsider: str, loss: str, mesh: str):
    """A state at step 0; the reference, where the loss needs one, is a copy of the parameters."""
    model, over = OUTSIDERS[outsider].model, make_mesh(MESHES[mesh])
    shardings = param_shardings(over, params_of(outsider), model.rules)
    params, reference = (jax.device_put(jax.tree.map(np.copy, params_of(outsider)), shardings) for _ in range(2))
    return init_state(params, OPTIMIZER, over, reference if loss == "dpo" else None, rules=model.rules)


def train(outsider: str, loss: str, mesh: str, state, steps: int):
    batch = packed(PAIRS, groups=groups_of(make_mesh(MESHES[mesh])))
    losses = []
    for _ in range(steps):
        state, metrics = step_of(outsider, loss, mesh)(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


def by_path(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


@functools.partial(jax.jit, static_argnums=0)
def _next_token_logps(model: LanguageModel, params, tokens):
    """[rows, 24, V]; a row is one text, and what pads it comes after it."""
    zeros = jnp.zeros_like(tokens)
    hidden = model.hidden(params, tokens, jnp.broadcast_to(jnp.arange(24), tokens.shape), zeros, zeros)
    logits = jnp.einsum("rld,vd->rlv", hidden, model.head(params))
    return jax.nn.log_softmax(model.softcap * jnp.tanh(logits / model.softcap) if model.softcap else logits)


def next_token_logps(outsider: str, texts) -> np.ndarray:
    """[rows, 24, V], each text in a row by itself; always sixteen rows, so that it compiles once."""
    rows = np.zeros((16, 24), np.int32)
    for row, text in zip(rows, texts, strict=False):
        row[: len(text)] = text
    return np.asarray(_next_token_logps(OUTSIDERS[outsider].model, params_of(outsider), rows))


def one_by_one(outsider: str) -> np.ndarray:
    """[pairs, 2] log-probabilities of PAIRS' responses by the shifted formula."""
    texts = [(pair.prompt, response) for pair in PAIRS for response in (pair.chosen, pair.rejected)]
    logps = next_token_logps(outsider, map(np.concatenate, texts))
    sums = [
        sum(row[len(prompt) - 1 + i, token] for i, token in enumerate(response))
        for row, (prompt, response) in zip(logps, texts, strict=True)
    ]
    return np.reshape(sums, (-1, 2))


@each_outsider
def test_packed_tree_rows_are_one_sequence_at_a_time(outsider):
    model, params = OUTSIDERS[outsider].model, params_of(outsider)
    batch = first(packed(PAIRS, layout=FULL))
    assert batch.segments.max() > 1 and set(np.unique(batch.branches)) == {0, 1, 2}
    got = jax.jit(functools.partial(preference_logps, model))(params, batch)
    np.testing.assert_allclose(np.stack([got.chosen, got.rejected], 1), one_by_one(outsider), rtol=2e-5, atol=2e-5)


@functools.cache
def run(outsider: str, loss: str, mesh: str):
    """(state after ten steps, their losses)."""
    return train(outsider, loss, mesh, start(outsider, loss, mesh), STEPS)


@pytest.mark.parametrize(
    ("outsider", "loss"), [("nnx", "dpo"), longer("linen", "dpo"), longer("linen", "orpo"), longer("nnx", "orpo")]
)
def test_ten_steps_lower_the_loss_alike_on_both_meshes(outsider, loss):
    state, losses = run(outsider, loss, "data 8")
    assert int(state.step) == STEPS and losses[-1] < min(0.7 * losses[0], *losses[:-1])
    if loss == "dpo":
        np.testing.assert_allclose(losses[0], np.log(2), atol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.reference), params_of(outsider))
    np.testing.assert_allclose(run(outsider, loss, "fsdp 4, tensor 2")[1], losses, rtol=1e-4)


@each_outsider
def test_parameters_reference_and_moments_stay_where_the_rules_put_them(outsider):
    state, _ = run(outsider, "dpo", "fsdp 4, tensor 2")
    for tree in (state.params, state.reference, state.opt_state[0].mu, state.opt_state[0].nu):
        shapes = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in by_path(tree).items()}
        assert shapes == OUTSIDERS[outsider].pieces


@each_outsider
def test_a_parameter_without_a_rule_is_refused_by_name(outsider):
    model, params, without = OUTSIDERS[outsider].model, params_of(outsider), OUTSIDERS[outsider].without
    fewer = tuple(rule for rule in model.rules if without not in rule[0])
    assert len(fewer) == len(model.rules) - 1
    with pytest.raises(UserError, match=f"no sharding rule matches parameter '{without}'"):
        init_state(params, OPTIMIZER, make_mesh({"data": -1}), rules=fewer)


@each_outsider
def test_a_checkpoint_comes_back_and_goes_on_bit_for_bit(outsider, tmp_path):
    where = (outsider, "dpo", "fsdp 4, tensor 2")
    state, _ = train(*where, start(*where), 3)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state, {}, {})
    saved = jax.device_get((state.params, state.opt_state))
    wanted = train(*where, state, 2)[1]
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        back = checkpoint.restore(checkpoints, start(*where), {}, {})
    assert int(back.step) == 3
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((back.params, back.opt_state)), saved)
    assert train(*where, back, 2)[1] == wanted


@each_outsider
def test_cached_reference_evaluation_and_samples(outsider):
    model, params, loss = OUTSIDERS[outsider].model, params_of(outsider), make_loss("dpo")
    data = make_pair_set(PAIRS, 8)
    cached = compute(model, params, data)
    np.testing.assert_allclose(np.stack(cached[:2], 1), one_by_one(outsider), rtol=2e-5, atol=2e-5)
    columns = evaluate(make_eval_step(model, loss), loss, params, None, data._replace(reference=cached))
    np.testing.assert_allclose(columns["loss"], np.full(8, np.log(2)), atol=1e-6)
    again = {"nnx": nnx_model, "linen": linen_model}[outsider](dataclasses.replace(model.config))
    keys = {cache_key(m, params_digest(params), PAIRS, "float32") for m in (model, again)}
    assert len(keys) == 1

    prompts = [pair.prompt for pair in PAIRS[:3]]
    greedy = dict(seed=0, stop_tokens=[], sampling=Sampling(temperature=0.0))
    found = [one.tokens for (one,) in sample(model, params, prompts, max_new_tokens=3, **greedy)]
    likeliest = next_token_logps(outsider, map(np.concatenate, zip(prompts, found, strict=True))).argmax(-1)
    for prompt, new, best in zip(prompts, found, likeliest, strict=False):
        np.testing.assert_array_equal(new, best[len(prompt) - 1 : len(prompt) + 2])
    with pytest.raises(UserError, match="32 positions"):
        sample(model, params, prompts, max_new_tokens=32, **greedy)
