import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefalign_jax.data.trees import Layout
from prefalign_jax.logps import preference_logps
from prefalign_jax.losses.reward import bradley_terry
from prefalign_jax.models.decoder import REMAT, Placement, cast, make_decoder
from prefalign_jax.models.dropout import Dropout
from prefalign_jax.models.rope import RopeScaling
from prefalign_jax.sharding import deal_texts, groups_of, make_mesh, place_batch
from prefalign_jax.types import Pair, UserError
from small import CONFIG, MODEL, first, hidden_of, logps_of, make_pairs, make_params, packed

TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 10))
POSITIONS = np.arange(10)[None]
ONES, ZEROS = np.ones_like(TOKENS), np.zeros_like(TOKENS)
REWARD = make_decoder(dataclasses.replace(CONFIG, reward=True))


def hidden(tokens, positions=POSITIONS, segments=ONES, branches=ZEROS, model=MODEL, params=None):
    params = make_params() if params is None else params
    return np.asarray(hidden_of(model, params, tokens, positions, segments, branches))


def changed(before, after):
    """Positions at which any feature differs."""
    return np.flatnonzero((before != after).any(-1)[0]).tolist()


def test_causality():
    before = hidden(TOKENS)
    for t in (0, 4, 9):
        after = TOKENS.copy()
        after[0, t] = (after[0, t] + 1) % CONFIG.vocab_size
        assert changed(before, hidden(after)) == list(range(t, 10))


def test_segments_and_sibling_branches_are_isolated():
    segments = np.array([[1, 1, 1, 1, 1, 1, 1, 2, 2, 2]])
    branches = np.array([[0, 0, 1, 1, 2, 2, 2, 0, 1, 2]])
    positions = np.array([[0, 1, 2, 3, 2, 3, 4, 0, 1, 1]])
    before = hidden(TOKENS, positions, segments, branches)
    for t, seen_by in ((0, [0, 1, 2, 3, 4, 5, 6]), (2, [2, 3]), (5, [5, 6]), (7, [7, 8, 9]), (8, [8])):
        after = TOKENS.copy()
        after[0, t] = (after[0, t] + 1) % CONFIG.vocab_size
        assert changed(before, hidden(after, positions, segments, branches)) == seen_by


def test_only_relative_positions_matter():
    np.testing.assert_allclose(hidden(TOKENS), hidden(TOKENS, POSITIONS + 7), atol=2e-4)
    assert np.abs(hidden(TOKENS) - hidden(TOKENS, POSITIONS * 2)).max() > 1e-2


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_rematerialisation_changes_no_gradient(remat):
    params = make_params()

    def loss(params, model):
        return jnp.square(model.hidden(params, TOKENS, POSITIONS, ONES, ZEROS)[:, -1]).sum()

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    plain, again = grad(params, MODEL), grad(params, make_decoder(CONFIG, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)


def test_bfloat16_activations_over_float32_parameters():
    model = make_decoder(CONFIG, dtype="bfloat16")
    out = hidden_of(model, make_params(), TOKENS, POSITIONS, ONES, ZEROS)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), hidden(TOKENS), atol=0.3)


def test_tied_head_is_the_embedding():
    model = make_decoder(dataclasses.replace(CONFIG, tie_embeddings=True))
    params = model.init(jax.random.key(0))
    assert "head" not in params
    assert model.head(params) is params["embed"]["embedding"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_has_a_score_in_place_of_its_head(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    plain = make_decoder(config, param_dtype="bfloat16").init(jax.random.key(3))
    model = make_decoder(dataclasses.replace(config, reward=True), param_dtype="bfloat16")
    params = model.init(jax.random.key(3))
    assert params.keys() == plain.keys() - {"head"} | {"score"}
    assert model.head(params) is params["score"]["kernel"]
    assert (params["score"]["kernel"].shape, params["score"]["kernel"].dtype) == ((1, CONFIG.hidden_size), jnp.bfloat16)
    np.testing.assert_array_equal(params["embed"]["embedding"], plain["embed"]["embedding"])


def test_a_fresh_reward_model_rewards_nothing_and_learns():
    params = REWARD.init(jax.random.key(0))
    batch = first(packed(make_pairs(5), layout=Layout(rewards=True)))

    def loss(params):
        rewards = preference_logps(REWARD, params, batch, needs={"reward"})
        losses, _ = bradley_terry(rewards)
        return losses.sum(), (losses, rewards)

    grads, (losses, rewards) = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_array_equal([*rewards.chosen, *rewards.rejected], np.zeros(10))
    np.testing.assert_array_equal(losses, np.full(5, np.float32(math.log(2))))
    assert np.abs(grads["score"]["kernel"]).max() > 1e-2


@pytest.mark.parametrize("layout", [Layout(rewards=True), Layout(tree=False, rewards=True)], ids=["tree", "ordinary"])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_reward_is_read_at_the_last_token_of_each_response(layout, groups):
    """Packed, in either layout and with filler, as if the prompt and the response were alone."""
    params = make_params(model=REWARD)
    one = np.array([7], np.int32)
    pairs = [*make_pairs(5), Pair(one, one + 1, one + 2)]
    batch = first(packed(pairs, batch_size=8, groups=groups, layout=layout))
    rewards = logps_of(REWARD, params, batch, needs={"reward"})

    def alone(prompt, response):
        text = np.concatenate([prompt, response])
        tokens, places = np.pad(text, (0, 25 - text.size))[None], np.arange(25)[None]  # one length: one program
        out = hidden(tokens, places, (places < text.size).astype(int), 0 * places, REWARD, params)
        return out[0, text.size - 1] @ np.asarray(params["score"]["kernel"][0])

    for side in ("chosen", "rejected"):
        expected = [alone(pair.prompt, getattr(pair, side)) for pair in pairs]
        assert np.std(expected) > 0.3  # or any token would do
        np.testing.assert_allclose(getattr(rewards, side), [*expected, 0, 0], atol=1e-5)
        np.testing.assert_array_equal(getattr(rewards, f"{side}_tokens"), [1] * 6 + [0] * 2)


def test_every_parameter_matters():
    params = make_params()
    first_feature = lambda p: (MODEL.hidden(p, TOKENS, POSITIONS, ONES, ZEROS)[..., 0] @ np.ones(10)).sum()  # noqa: E731
    grads = jax.jit(jax.grad(first_feature))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        if "head" not in str(path):
            assert np.abs(grad).max() > 0, path


def test_compiling_takes_no_longer_for_more_layers():
    """The layers are one scanned body: the program's size does not depend on their number."""

    def size(layers):
        model = make_decoder(dataclasses.replace(CONFIG, num_layers=layers))
        params = jax.eval_shape(model.init, jax.random.key(0))
        return len(jax.jit(model.hidden).lower(params, TOKENS, POSITIONS, ONES, ZEROS).as_text())

    assert size(12) < 1.1 * size(2)


def test_cudnns_attention_gives_the_log_probabilities_of_tiles(monkeypatch):
    """With XLA's form of the kernel in place of cuDNN's."""
    kernel = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, kernel.__name__, lambda *x, **more: kernel(*x, **more | {"implementation": "xla"}))
    params, pairs, found = make_params(), make_pairs(8, longest=60), []
    for attention, field in (("tiles", "tiles"), ("cudnn", "sequences")):
        model = make_decoder(CONFIG, dtype="bfloat16", attention=attention)
        assert model.attends == field
        found.append(logps_of(model, params, first(packed(pairs, attends=field))))
    for name in ("chosen", "rejected"):
        np.testing.assert_allclose(*(getattr(one, name) for one in found), rtol=2e-2)


@pytest.mark.everything
def test_splash_gives_the_log_probabilities_and_gradients_of_tiles():
    """In Pallas's interpreter, which it runs in wherever there is no TPU; with all that it can do, on four devices."""
    config = dataclasses.replace(CONFIG, windows=(0, 9), attention_softcap=3.0, query_scale=0.4, sinks=True)
    mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    params, pairs, results = make_params(0, make_decoder(config)), make_pairs(8, longest=60), []
    for attention, field in (("tiles", "tiles"), ("splash", "sequences")):
        model = make_decoder(config, attention=attention, placement=Placement(texts=deal_texts(mesh)))
        assert model.attends == field
        batch = place_batch(mesh, packed(pairs, attends=field, groups=groups_of(mesh)))

        @jax.jit
        def slopes(params, batch, model=model):
            logps = preference_logps(model, params, jax.tree.map(lambda x: x[0], batch))
            return logps.chosen.sum() - logps.rejected.sum(), logps

        (_, logps), gradient = jax.value_and_grad(slopes, has_aux=True)(params, batch)
        results.append((logps.chosen, logps.rejected, gradient))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(one).max())


def test_splash_drops_no_weights_and_says_so():
    with pytest.raises(UserError, match="attention='splash' is not for dropout of attention weights; write 'tiles'"):
        make_decoder(CONFIG, attention="splash", dropout=Dropout(attention=0.1))


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ({}, {"dtype": "float32"}, "dtype=float32"),
        ({"attention_softcap": 50.0}, {}, "soft-capped"),
        ({"windows": (0, 5)}, {}, "sliding windows"),
        ({"sinks": True}, {}, "attention sinks"),
        ({}, {"dropout": Dropout(attention=0.1)}, "dropout"),
        ({"head_dim": 12}, {}, "heads of 12"),
    ],
    ids=str,
)
def test_what_cudnn_cannot_compute_is_refused(shape, options, says):
    config, options = dataclasses.replace(CONFIG, **shape), {"dtype": "bfloat16", **options}
    with pytest.raises(UserError, match=f"attention='cudnn' is not for .*{says}"):
        make_decoder(config, attention="cudnn", **options)


def test_matrices_in_the_type_of_the_computation_give_the_same():
    """What lets a frozen copy be kept in half the memory."""
    model, batch = make_decoder(CONFIG, dtype="bfloat16"), first(packed(make_pairs(3)))
    params = make_params()
    small = cast(params, "bfloat16")
    assert small["layers"]["attention"]["q"]["kernel"].dtype == jnp.bfloat16
    assert small["final_norm"]["scale"].dtype == jnp.float32
    np.testing.assert_array_equal(logps_of(model, params, batch).chosen, logps_of(model, small, batch).chosen)


def test_unknown_remat_is_named():
    with pytest.raises(UserError, match="none, dots, full"):
        make_decoder(CONFIG, remat="some")


def test_scaled_rotation_is_used():
    model = make_decoder(dataclasses.replace(CONFIG, rope_scaling=RopeScaling("linear", 2.0)))
    np.testing.assert_allclose(hidden(TOKENS, POSITIONS * 2, model=model), hidden(TOKENS), atol=1e-5)
