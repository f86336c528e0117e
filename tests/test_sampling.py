import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefalign_jax.generation.sampling import Sampling, adjust, min_p, repetition_penalty, top_k, top_p
from prefalign_jax.types import UserError

LOGITS = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32) * 3
SEEN = np.random.default_rng(1).random((6, 40)) < 0.3


def kept(logits):
    return np.isfinite(np.asarray(logits))


@pytest.mark.parametrize("k", [1, 7, 40, 1000])
def test_top_k_keeps_the_k_largest_and_their_values(k):
    out = np.asarray(top_k(LOGITS, k))
    assert (kept(out).sum(-1) == min(k, 40)).all()
    np.testing.assert_array_equal(out[kept(out)], LOGITS[kept(out)])
    for row, logits in zip(kept(out), LOGITS, strict=True):
        assert logits[row].min() >= logits[~row].max(initial=-np.inf)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_fewest_tokens_that_reach_p(p):
    probabilities = np.asarray(jax.nn.softmax(LOGITS))
    for row, chances in zip(kept(top_p(LOGITS, p)), probabilities, strict=True):
        inside = np.sort(chances[row])
        assert inside.sum() >= p - 1e-6
        assert inside[1:].sum() < p
        assert inside[0] >= chances[~row].max(initial=0)


@pytest.mark.parametrize("p", [0.01, 0.2, 0.99])
def test_min_p_keeps_what_is_likely_enough(p):
    probabilities = np.asarray(jax.nn.softmax(LOGITS))
    np.testing.assert_array_equal(kept(min_p(LOGITS, p)), probabilities >= p * probabilities.max(-1, keepdims=True))


def test_a_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    out = np.asarray(repetition_penalty(LOGITS, SEEN, 1.5))
    assert (out[SEEN] < LOGITS[SEEN]).all()
    np.testing.assert_array_equal(out[~SEEN], LOGITS[~SEEN])
    np.testing.assert_allclose(repetition_penalty(out, SEEN, 1 / 1.5), LOGITS, rtol=1e-6)


def test_the_likeliest_token_is_never_cut():
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(min_p=0.999)):
        out = adjust(jnp.asarray(LOGITS), None, sampling.parts, sampling.numbers)
        np.testing.assert_array_equal(kept(out), LOGITS == LOGITS.max(-1, keepdims=True))


def test_the_defaults_leave_the_logits_and_sort_nothing():
    sampling = Sampling(temperature=0.7)
    program = jax.jit(lambda x: adjust(x, None, sampling.parts, sampling.numbers))
    np.testing.assert_allclose(program(LOGITS), LOGITS / 0.7, rtol=1e-6)
    text = program.lower(LOGITS).as_text()
    assert "sort" not in text and "top_k" not in text
    sampling = Sampling(top_p=0.5)
    assert "sort" in jax.jit(lambda x: adjust(x, None, sampling.parts, sampling.numbers)).lower(LOGITS).as_text()


def test_other_numbers_are_no_other_program():
    pairs = [(Sampling(temperature=0.5, top_p=0.9), Sampling(temperature=2.0, top_p=0.1))]
    pairs.append((Sampling(min_p=0.1, repetition_penalty=1.1), Sampling(min_p=0.2, repetition_penalty=3.0)))
    for one, other in pairs:
        assert one.parts == other.parts
        assert one.numbers != other.numbers


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(temperature=-1.0), "temperature=-1.0 is out of range; write 0 or more"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_k=1.5), "top_k=1.5"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.1), "top_p=1.1"),
        (dict(min_p=1.0), "min_p=1.0"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0"),
        (dict(temperature=0.0, top_p=0.9), "top_p has no effect at temperature 0"),
        (dict(temperature=0.0, top_k=5), "top_k has no effect"),
    ],
)
def test_mistakes_are_named(wrong, says):
    with pytest.raises(UserError, match=says):
        Sampling(**wrong)
    assert Sampling(temperature=0.0, repetition_penalty=1.2).parts.greedy
    assert {field.name for field in dataclasses.fields(Sampling)} == set(Sampling().numbers) | {"top_k"}


@pytest.mark.parity
@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.6),
        dict(top_k=5),
        dict(top_p=0.8),
        dict(min_p=0.05),
        dict(repetition_penalty=1.7),
        dict(temperature=1.5, top_k=9, top_p=0.9, min_p=0.1, repetition_penalty=1.3),
    ],
    ids=lambda options: "+".join(options),
)
def test_the_same_tokens_as_transformers(options):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    made = {
        "repetition_penalty": theirs.RepetitionPenaltyLogitsProcessor,
        "temperature": theirs.TemperatureLogitsWarper,
        "top_k": theirs.TopKLogitsWarper,
        "top_p": theirs.TopPLogitsWarper,
        "min_p": theirs.MinPLogitsWarper,
    }
    out = torch.from_numpy(LOGITS.copy())
    ids = torch.from_numpy(np.array([np.resize(np.flatnonzero(row), 20) for row in SEEN]))
    seen = np.zeros_like(SEEN)
    np.put_along_axis(seen, ids.numpy(), True, axis=1)
    for name, make in made.items():
        if name in options:
            out = make(options[name])(ids, out)
    sampling = Sampling(**options)
    ours = adjust(jnp.asarray(LOGITS), jnp.asarray(seen), sampling.parts, sampling.numbers)
    np.testing.assert_array_equal(kept(ours), np.isfinite(out.numpy()))
    np.testing.assert_allclose(np.asarray(ours)[kept(ours)], out.numpy()[kept(ours)], rtol=1e-5)
