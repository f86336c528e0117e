import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefalign_jax.generate import sample
from small import CONFIG, MODEL, make_params

PARAMS = make_params(0)
NEVER = CONFIG.vocab_size  # no token has this id
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(1, CONFIG.vocab_size, length).astype(np.int32) for length in (3, 7, 1, 5)]
draw = functools.partial(sample, MODEL, PARAMS, max_new_tokens=8)


@jax.jit
def _next_logits(tokens, length):
    places = jnp.arange(20)[None]
    segments = (places < length).astype(jnp.int32)  # padding is kept out by its segment, not by causality
    hidden = MODEL.hidden(PARAMS, tokens[None], places, segments, jnp.zeros_like(places))
    return MODEL.head(PARAMS) @ hidden[0, length - 1]


def next_logits(prompt: np.ndarray) -> np.ndarray:
    tokens = np.zeros(20, np.int32)
    tokens[: len(prompt)] = prompt
    return np.asarray(_next_logits(tokens, len(prompt)))


def greedy(prompt: np.ndarray, eos: int = NEVER, steps: int = 8) -> list[int]:
    """The plain loop: one prompt, one token at a time."""
    text = list(prompt)
    while len(text) < len(prompt) + steps and eos not in text[len(prompt) :]:
        text.append(int(next_logits(np.array(text)).argmax()))
    return text[len(prompt) :]


def as_lists(rows):
    return [row.tolist() for row in rows]


def test_greedy_is_the_plain_loop_over_ragged_prompts():
    found = as_lists(draw(PROMPTS, seed=0, eos=NEVER, temperature=0.0))
    assert found == [greedy(prompt) for prompt in PROMPTS]
    assert len({tuple(row) for row in found}) == len(PROMPTS), "all prompts are continued alike"


def test_a_response_ends_with_eos_and_the_others_go_on():
    free = [greedy(prompt) for prompt in PROMPTS]
    eos = free[0][2]
    found = as_lists(draw(PROMPTS, seed=0, eos=eos, temperature=0.0))
    assert found == [greedy(prompt, eos) for prompt in PROMPTS]
    assert found[0][-1] == eos
    assert len(found[0]) < 8
    assert {len(row) for row in found} != {len(found[0])}, "no row goes on"


def test_a_prompt_that_holds_eos_is_continued():
    eos = int(PROMPTS[1][-1])
    assert len(draw(PROMPTS, seed=0, eos=eos, temperature=0.0)[1]) >= 1


def test_greedy_does_not_depend_on_the_rest_of_the_batch():
    before = as_lists(draw(PROMPTS, seed=0, eos=NEVER, temperature=0.0))
    others = [PROMPTS[1][::-1], PROMPTS[3], PROMPTS[0], PROMPTS[2] + 1]
    after = as_lists(draw(others, seed=3, eos=NEVER, temperature=0.0))
    assert (after[1], after[2]) == (before[3], before[0])


def test_a_seed_gives_its_samples_and_another_seed_others():
    once, again, other = (as_lists(draw(PROMPTS, seed=seed, eos=NEVER)) for seed in (1, 1, 2))
    assert once == again
    assert once != other


def test_every_step_draws_anew():
    """Where all tokens are as likely, the draws of eight steps would all agree if they shared their noise."""
    for row in draw(PROMPTS, seed=0, eos=NEVER, temperature=1e6):
        assert len(set(row.tolist())) > 4


def test_nearly_no_temperature_is_greedy():
    cold = as_lists(draw(PROMPTS, seed=0, eos=NEVER, temperature=1e-5))
    assert cold == as_lists(draw(PROMPTS, seed=0, eos=NEVER, temperature=0.0))


def test_new_tokens_are_all_that_is_returned():
    for row in draw(PROMPTS, seed=4, eos=NEVER):
        assert row.shape == (8,)
        assert row.dtype == np.int32
        assert (row >= 0).all() and (row < CONFIG.vocab_size).all()  # noqa: PT018


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_the_first_token_is_drawn_from_the_softmax(temperature):
    count = 4000
    rows = sample(
        MODEL, PARAMS, [PROMPTS[0]] * count, seed=0, max_new_tokens=1, eos=NEVER, temperature=temperature
    )  # fmt: skip
    found = np.bincount(np.concatenate(rows), minlength=CONFIG.vocab_size)
    expected = count * np.asarray(jax.nn.softmax(next_logits(PROMPTS[0]) / temperature))
    common = expected >= 5
    found, expected = ([*x[common], x[~common].sum()] for x in (found, expected))
    statistic = sum((f - e) ** 2 / max(e, 1.0) for f, e in zip(found, expected, strict=True))
    freedom = len(found) - 1
    assert freedom > 3
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)
