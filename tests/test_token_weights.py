"""Weights of tokens by their place and by two models: closed forms, sums and gradients, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from prefalign_jax.config import defaults
from prefalign_jax.data.pairs import concatenate, digest_of, from_list
from prefalign_jax.data.pipeline import mismatched
from prefalign_jax.data.token_weights import contrasted, decayed, trained_tokens
from prefalign_jax.experiment import read
from prefalign_jax.logps import target_logps
from prefalign_jax.losses import make_loss
from prefalign_jax.types import SIDES, Pair, UserError
from small import MODEL, first, logps_of, make_pairs, make_params, packed

PAIRS = make_pairs(6)
RATIOS = np.random.default_rng(1).normal(size=trained_tokens(from_list(PAIRS)).sum()).astype(np.float32)


def test_decay_is_a_power_of_the_place_among_trained_tokens():
    masks = np.float32([0, 1, 0, 2, 1]), None
    masked = dataclasses.replace(PAIRS[0], chosen=np.arange(5), rejected=np.arange(3), token_weights=masks)
    group = dataclasses.replace(PAIRS[0], others=(np.arange(4), np.arange(2)), scores=(4.0, 3.0, 2.0, 1.0))
    pairs = concatenate([from_list(PAIRS[:3]), from_list([masked, group])])
    out = decayed(pairs, 0.9)
    assert out.buffers is pairs.buffers  # no copies
    for before, after in zip(pairs, out, strict=True):
        for number, ids in enumerate(before.responses):
            given = np.ones(len(ids)) if before.weights(number) is None else before.weights(number)
            expected = given * 0.9 ** np.array([np.count_nonzero(given[:t]) for t in range(len(ids))])
            np.testing.assert_allclose(after.weights(number), expected, rtol=1e-6)
    np.testing.assert_allclose(out[3].weights(0), [0, 1, 0, 2 * 0.9, 0.81], rtol=1e-6)
    assert out.weighted and len({digest_of(pairs), digest_of(out), digest_of(decayed(pairs, 0.8))}) == 3


def test_no_decay_changes_nothing():
    pairs = from_list(PAIRS)
    assert decayed(pairs, 1.0) is pairs
    assert len(decayed(from_list([]), 0.5)) == 0


def test_a_completion_that_several_examples_share_decays_once():
    pairs = from_list([dataclasses.replace(pair, rejected=np.zeros(0, np.int32)) for pair in PAIRS])
    for some in (mismatched(decayed(pairs, 0.5), 64), decayed(mismatched(pairs, 64), 0.5)):
        for pair in some:
            for number, ids in enumerate(pair.responses):
                np.testing.assert_allclose(pair.weights(number), 0.5 ** np.arange(len(ids)))


def test_two_models_weigh_chosen_and_rejected_the_other_way_round():
    one = Pair(np.int32([1]), np.int32([2, 3, 4]), np.int32([5, 6]), weight=2.0, margin=0.5)
    masks = None, np.float32([1, 0, 3])
    other = dataclasses.replace(one, chosen=one.rejected, rejected=one.chosen, token_weights=masks)
    pairs = dataclasses.replace(from_list([one, other]), dropped={"too long": 3})
    ratios = np.float32([0.2, -9, 9, 0.1, 0.3, *[0.1, 0.3, 0.2, 9]])  # of the masked token there is none
    out = contrasted(pairs, ratios, k=2.0, mu=0.5)
    expected = [[0.1, -0.25, 0.75], [-0.05, -0.15]], [[0.05, 0.15], [-0.1, -np.inf, np.log(3) - 0.75]]
    for before, after, logs in zip(pairs, out, expected, strict=True):
        for number, values in enumerate(logs):
            np.testing.assert_allclose(after.weights(number), 2 * np.exp(values), rtol=1e-6)
            np.testing.assert_array_equal(after.responses[number], before.responses[number])
    assert (out[0].weight, out[0].margin, out.dropped) == (2.0, 0.5, {"too long": 3})
    assert digest_of(out) == digest_of(list(out)) != digest_of(pairs)
    with pytest.raises(ValueError, match="8 ratios for 9 trained tokens"):
        contrasted(pairs, ratios[1:])


def test_models_that_agree_change_nothing():
    pairs = from_list(PAIRS)
    out = contrasted(pairs, np.zeros_like(RATIOS))
    assert digest_of(out) == digest_of(pairs) and not out.weighted


@pytest.mark.parametrize(
    "weigh", [lambda pairs: decayed(pairs, 0.7), lambda pairs: contrasted(pairs, RATIOS)], ids=["decay", "models"]
)
def test_dpo_of_weighted_sums_equals_the_direct_formula_in_value_and_gradient(weigh):
    params, reference = make_params(0), make_params(1)
    weighted, loss = weigh(from_list(PAIRS)), make_loss("dpo", beta=0.5)
    batch = first(packed(weighted, groups=2))

    @jax.jit
    def together(params):
        return loss(logps_of(MODEL, params, batch), logps_of(MODEL, reference, batch))[0].sum()

    # The log-ratios of single tokens, where tests/test_logps.py finds them equal to those of one response at a time.
    plain = first(packed(PAIRS))
    pick = np.zeros((len(PAIRS), 2, plain.slot.size), np.float32)
    for number, pair in enumerate(weighted):
        for side in range(2):
            pick[number, side, plain.slot[0] == SIDES * number + side] = pair.weights(side)

    @jax.jit
    def apart(params):
        ratios = (target_logps(MODEL, params, plain) - target_logps(MODEL, reference, plain))[0]
        sums = pick @ ratios
        return -jax.nn.log_sigmoid(0.5 * (sums[:, 0] - sums[:, 1])).sum()

    (ours, slope), (theirs, wanted) = (jax.value_and_grad(one)(params) for one in (together, apart))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), slope, wanted)


def test_as_many_first_tokens_are_shared_however_much_each_counts():
    plain, weighted = (
        logps_of(MODEL, make_params(), first(packed(pairs)), {"shared"})
        for pairs in (from_list(PAIRS), contrasted(from_list(PAIRS), np.zeros_like(RATIOS), k=2.0))
    )
    for one, other in zip(plain.shared, weighted.shared, strict=True):
        np.testing.assert_allclose(2 * one, other, rtol=1e-5)


@pytest.mark.parametrize(
    "loss, fields, says",
    [
        ("dpo", {"decay": 0.0}, r"token_weights.decay=0.0 must lie in \(0, 1\]"),
        ("dpo", {"decay": 1.5}, "token_weights.decay=1.5 must lie"),
        ("sft", {"decay": 0.9}, "loss 'sft' is none"),
        ("bradley_terry", {"decay": 0.9}, "loss 'bradley_terry' is none"),
        ("dpo", {"positive": "a"}, "token_weights.positive='a' is for weights by two models"),
        ("dpo", {"mu": 2.0}, "token_weights.mu=2.0 is for weights by two models"),
        ("kto", {"positive": "a", "negative": "b"}, "loss 'kto' is trained on others"),
        ("sft", {"positive": "a", "negative": "b"}, "loss 'sft' is trained on others"),
        ("dpo", {"positive": "a", "negative": "b", "k": 0.0}, "token_weights.k=0.0 must be a positive number"),
        ("dpo", {"positive": "a", "negative": "b", "low": 2.0}, "low=2.0 and token_weights.high=1.5 are no range"),
    ],
)
def test_what_makes_no_sense_is_refused(loss, fields, says):
    config = defaults(loss)
    config.token_weights.update(fields)
    with pytest.raises(UserError, match=says):
        read(config, complete=False)
