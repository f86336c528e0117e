import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import longer
from prefalign_jax.data.trees import Layout
from prefalign_jax.generation import generate
from prefalign_jax.generation.generate import sample, sample_members, stream
from prefalign_jax.generation.sampling import Sampling
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.lora import Lora, init_adapters
from prefalign_jax.models.quantize import quantize_params
from prefalign_jax.models.rope import RopeScaling
from prefalign_jax.sharding import make_mesh, param_shardings
from prefalign_jax.types import Pair, UserError
from small import CONFIG, DELTA, MODEL, first, hidden_of, logps_of, make_params, packed

PARAMS = make_params(0)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(1, CONFIG.vocab_size, length).astype(np.int32) for length in (3, 7, 1, 5)]
GREEDY = Sampling(temperature=0.0)
draw = functools.partial(sample, MODEL, PARAMS, max_new_tokens=8, stop_tokens=[])


@functools.partial(jax.jit, static_argnames="model")
def _logps(model, params, tokens, length):
    places = jnp.arange(20)[None]
    segments = (places < length).astype(jnp.int32)  # padding is kept out by its segment, not by causality
    hidden = model.hidden(params, tokens[None], places, segments, jnp.zeros_like(places))[0]
    logits = hidden @ model.head(params).T
    if model.softcap is not None:
        logits = model.softcap * jnp.tanh(logits / model.softcap)
    return jax.nn.log_softmax(logits)


def full_logps(text: np.ndarray, model=MODEL, params=PARAMS) -> np.ndarray:
    """[tokens, V]: what a pass over the whole text gives to the token after each."""
    tokens = np.zeros(20, np.int32)
    tokens[: len(text)] = text
    return np.asarray(_logps(model, params, tokens, len(text)))[: len(text)]


def greedy(prompt: np.ndarray, stop: int = -1, steps: int = 8, model=MODEL, params=PARAMS) -> list[int]:
    """The plain loop: one prompt, one token at a time."""
    text = list(prompt)
    while len(text) < len(prompt) + steps and stop not in text[len(prompt) :]:
        text.append(int(full_logps(np.array(text), model, params)[-1].argmax()))
    return text[len(prompt) :]


def lists(found):
    return [[one.tokens.tolist() for one in row] for row in found]


def firsts(found):
    return [row[0].tokens.tolist() for row in found]


# Every way in which the decoder computes.

VARIANTS = {
    "windows, local rotation": dict(windows=(0, 3), local_rope_theta=100.0, rope_scaling=RopeScaling("linear", 2.0)),
    "gemma 2": dict(
        residual="sandwich",
        norm="rms_unit",
        attention_softcap=2.0,
        logit_softcap=3.0,
        embedding_scale=4.0,
        windows=(3, 0),
        activation="gelu_tanh",
        tie_embeddings=True,
    ),
    "phi 2": dict(
        residual="parallel_shared",
        norm="layer",
        rope_fraction=0.5,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
        gated=False,
        activation="gelu_tanh",
        vocab_padding=3,
    ),
    "neox": dict(residual="parallel", norm="layer", gated=False, activation="gelu", rope_fraction=0.25),
    "opt": dict(positions="learned", position_offset=2, norm="layer", gated=False, activation="relu", max_position=20),
    "experts": dict(num_experts=4, experts_per_token=2, qk_norm="head", rope_layers=(True, False)),
    "olmo 2, granite, glm, ministral 3": dict(
        residual="post",
        qk_norm="width",
        vocab_padding=3,
        residual_scale=0.5,
        logit_divisor=0.7,
        rope_interleaved=True,
        rope_fraction=0.5,
        rope_scaling=RopeScaling("linear", 1.0, original_max_position=3),
        query_growth=0.5,
    ),
    "gpt-oss": dict(num_experts=4, mlp_bias=True, qkv_bias=True, sinks=True, windows=(3, 0), swiglu_limit=0.5),
    "qwen 3.5": dict(norm="rms_unit", qk_norm="head", rope_fraction=0.25, **DELTA),
}


def variant(name: str):
    """(model, parameters)"""
    model = make_decoder(dataclasses.replace(CONFIG, **VARIANTS[name]))
    return model, make_params(1, model)


def check_against_full_passes(model, params, prompts=PROMPTS, **options):
    found = sample(model, params, prompts, seed=0, max_new_tokens=8, stop_tokens=[], **options)
    for prompt, (one,) in zip(prompts, found, strict=True):
        text = np.concatenate([prompt, one.tokens])
        expected = full_logps(text, model, params)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(one.logps, expected[np.arange(8), one.tokens], atol=2e-5)
        assert one.tokens.max() < model.config.vocab_size
        if options.get("sampling") == GREEDY:
            np.testing.assert_array_equal(one.tokens, expected.argmax(-1))
    return found


@pytest.mark.parametrize("name", [longer(name) if name in ("phi", "experts") else name for name in VARIANTS])
def test_cached_steps_are_full_passes_over_ragged_prompts(name):
    model, params = variant(name)
    assert model.cached is not None
    check_against_full_passes(model, params)


@pytest.mark.everything
def test_adapters_quantized_kernels_and_a_narrow_type():
    lora = Lora(rank=2, dora=True)
    model = make_decoder(CONFIG, lora=lora)
    base = quantize_params(PARAMS, "int8")
    adapters = jax.tree.map(lambda x: x + 0.1, init_adapters(jax.random.key(0), base, lora))
    check_against_full_passes(model, model.join(base, adapters), sampling=GREEDY)
    narrow = make_decoder(CONFIG, dtype="bfloat16")
    cache = narrow.cached.init(2, 8)
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}
    ours = sample(narrow, PARAMS, PROMPTS, seed=0, max_new_tokens=4, stop_tokens=[])
    for prompt, (one,) in zip(PROMPTS, ours, strict=True):
        logps = full_logps(np.concatenate([prompt, one.tokens]))[len(prompt) - 1 : -1]
        np.testing.assert_allclose(one.logps, logps[np.arange(4), one.tokens], atol=0.3)


def test_longrope_asks_how_long_a_text_may_get_and_not_how_much_room_it_has():
    """Texts that may go beyond the original context are turned as beyond from their first token on, the others not."""
    factors = dict(short_factor=(1.0, 1.0, 1.0, 1.0), long_factor=(8.0, 0.5, 6.0, 9.0))
    longrope = RopeScaling("longrope", 1.0, original_max_position=12, **factors)
    model, short, long = (
        make_decoder(dataclasses.replace(CONFIG, rope_scaling=scaling))
        for scaling in (
            longrope,
            dataclasses.replace(longrope, long_factor=factors["short_factor"]),
            dataclasses.replace(longrope, short_factor=factors["long_factor"]),
        )
    )
    found = firsts(sample(model, PARAMS, PROMPTS, seed=0, max_new_tokens=8, stop_tokens=[], sampling=GREEDY))
    beyond = [len(prompt) + 8 > 12 for prompt in PROMPTS]
    assert set(beyond) == {True, False}
    assert found == [greedy(p, model=long if b else short) for p, b in zip(PROMPTS, beyond, strict=True)]


def test_long_prompts_are_read_in_chunks(monkeypatch):
    whole = draw(PROMPTS, seed=0)
    monkeypatch.setattr(generate, "CHUNK", 2)
    generate._begin.clear_cache()
    chunked = draw(PROMPTS, seed=0)
    generate._begin.clear_cache()
    assert lists(whole) == lists(chunked)
    for a, b in zip(whole, chunked, strict=True):
        np.testing.assert_allclose(a[0].logps, b[0].logps, atol=1e-5)


def test_a_model_without_a_cache_gives_the_same():
    plain = MODEL._replace(cached=None)
    for sampling in (GREEDY, Sampling()):
        found = sample(plain, PARAMS, PROMPTS, seed=0, max_new_tokens=8, stop_tokens=[], sampling=sampling)
        assert lists(found) == lists(draw(PROMPTS, seed=0, sampling=sampling))


def test_greedy_is_the_plain_loop():
    found = firsts(draw(PROMPTS, seed=0, sampling=GREEDY))
    assert found == [greedy(prompt) for prompt in PROMPTS]
    assert len({tuple(row) for row in found}) == len(PROMPTS), "all prompts are continued alike"


def test_logps_are_those_of_training_whatever_was_drawn_from():
    """Under the plain softmax, as `preference_logps` sums them: that is what a KL divergence from samples needs."""
    strange = Sampling(temperature=2.0, top_k=20, top_p=0.9, repetition_penalty=1.5)
    found = draw(PROMPTS, seed=0, sampling=strange)
    pairs = [Pair(p, one.tokens, np.zeros(0, np.int32)) for p, (one,) in zip(PROMPTS, found, strict=True)]
    logps = logps_of(MODEL, PARAMS, first(packed(pairs, layout=Layout(rejected=False)))).chosen
    np.testing.assert_allclose([one.logps.sum() for (one,) in found], logps, rtol=1e-5)


# Where a text ends.


def test_a_response_ends_with_any_of_the_stop_tokens_and_the_others_go_on():
    free = [greedy(prompt) for prompt in PROMPTS]
    stops = (free[0][2], free[1][4])
    found = sample(MODEL, PARAMS, PROMPTS, seed=0, max_new_tokens=8, stop_tokens=stops, sampling=GREEDY)
    for (one,), row in zip(found, free, strict=True):
        end = next((k + 1 for k, token in enumerate(row) if token in stops), 8)
        assert one.tokens.tolist() == row[:end]
        assert one.logps.shape == (end,)
        assert one.ended == ("token" if row[end - 1] in stops else "length")
    assert {len(one.tokens) for (one,) in found} > {8}, "all rows end alike"


def test_a_prompt_that_holds_a_stop_token_is_continued():
    stop = int(PROMPTS[1][-1])
    found = sample(MODEL, PARAMS, PROMPTS, seed=0, max_new_tokens=8, stop_tokens=[stop])
    assert len(found[1][0].tokens) >= 1


@pytest.mark.parametrize("segment", [1, 3, 64])
def test_a_stop_string_cuts_after_the_token_that_completes_it(segment, monkeypatch):
    monkeypatch.setattr(generate, "SEGMENT", segment)
    free = firsts(draw(PROMPTS, seed=0, sampling=GREEDY))

    def decode(tokens):  # two characters a token, so that a string may span tokens
        return "".join(f"{token:02d}" for token in tokens)

    whole = decode(free[0])
    string = whole[3:6]  # ends within the third token
    found = draw(PROMPTS, seed=0, sampling=GREEDY, stop_strings=[string, "never"], decode=decode)
    for (one,), row in zip(found, free, strict=True):
        at = decode(row).find(string)
        end = 8 if at < 0 else (at + 3 + 1) // 2
        assert one.tokens.tolist() == row[:end]
        assert one.logps.shape == (end,)
        assert one.ended == ("length" if at < 0 else "string")
    assert found[0][0].tokens.size == (whole.find(string) + 4) // 2 < 8


def test_rows_that_a_string_ended_are_not_computed_on(monkeypatch):
    monkeypatch.setattr(generate, "SEGMENT", 2)
    steps = []
    real = generate._continue
    monkeypatch.setattr(generate, "_continue", lambda *a: steps.append(a[-1]) or real(*a))
    found = draw(PROMPTS, seed=0, stop_strings=["x"], decode=lambda tokens: "x" * (len(tokens) > 2))
    assert (steps, {len(one.tokens) for (one,) in found}) == ([2, 4], {3})


# The draws.


def test_n_samples_differ_and_come_again():
    once, again, other = (lists(draw(PROMPTS, seed=seed, n=3)) for seed in (1, 1, 2))
    assert once == again
    assert once != other
    for row in once:
        assert len({tuple(one) for one in row}) == 3


def test_a_draw_does_not_depend_on_its_batch():
    """Nor on how many samples or prompts are drawn, or on which part of a list is."""
    whole = lists(draw(PROMPTS, seed=5, n=3))
    for size in (1, 5):
        assert lists(draw(PROMPTS, seed=5, n=3, batch_size=size)) == whole
    assert lists(draw(PROMPTS, seed=5, n=2)) == [row[:2] for row in whole]
    assert lists(draw(PROMPTS[2:], seed=5, n=3, numbers=[2, 3])) == whole[2:]
    assert lists(draw(PROMPTS[2:], seed=5, n=3)) != whole[2:]


def test_every_prompt_and_step_draws_anew():
    """Where all tokens are as likely, equal noise would give equal tokens."""
    found = draw([PROMPTS[0]] * 3, seed=0, n=2, sampling=Sampling(temperature=1e6))
    rows = [tuple(one.tokens.tolist()) for row in found for one in row]
    assert len(set(rows)) == 6
    assert all(len(set(row)) > 4 for row in rows)


def test_results_come_in_the_order_of_the_prompts_and_short_prompts_first_in_a_stream():
    options = dict(seed=0, max_new_tokens=2, stop_tokens=[], sampling=GREEDY)
    order = [i for i, _, _ in stream(MODEL, PARAMS, PROMPTS, batch_size=1, **options)]
    assert order == [2, 0, 3, 1]
    found = sample(MODEL, PARAMS, PROMPTS, batch_size=3, **options)
    assert firsts(found) == [greedy(prompt, steps=2) for prompt in PROMPTS]


def test_types_and_shapes():
    for (one,) in draw(PROMPTS, seed=4):
        assert (one.tokens.shape, one.tokens.dtype, one.logps.dtype) == ((8,), np.int32, np.float32)
        assert (one.tokens >= 0).all() and (one.tokens < CONFIG.vocab_size).all()  # noqa: PT018


@pytest.mark.parametrize(
    "sampling",
    [
        longer(Sampling(0.7)),
        Sampling(),
        longer(Sampling(3.0, top_k=12)),
        Sampling(top_p=0.8),
        longer(Sampling(min_p=0.1)),
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_distribution(sampling):
    """The softmax, soft-capped first and cut as told: chi-square at 4 standard deviations."""
    model = make_decoder(dataclasses.replace(CONFIG, logit_softcap=3.0))
    count, prompt = 4000, PROMPTS[0]
    options = dict(seed=0, max_new_tokens=1, stop_tokens=[], batch_size=count, sampling=sampling)
    (rows,) = sample(model, PARAMS, [prompt], n=count, **options)
    found = np.bincount([one.tokens[0] for one in rows], minlength=CONFIG.vocab_size)
    logps = full_logps(prompt, model)[-1].astype(np.float64)
    chances = np.exp(logps / sampling.temperature)
    order = np.argsort(-chances)
    chances /= chances.sum()
    if sampling.top_k:
        chances[order[sampling.top_k :]] = 0
    if sampling.top_p < 1:
        chances[order[np.cumsum(chances[order]) - chances[order] >= sampling.top_p]] = 0
    chances[chances < sampling.min_p * chances.max()] = 0
    expected = count * chances / chances.sum()
    assert found[expected == 0].sum() == 0
    common = expected >= 5
    found, expected = ([*x[common], x[~common].sum()] for x in (found, expected))
    statistic = sum((f - e) ** 2 / max(e, 1.0) for f, e in zip(found, expected, strict=True))
    freedom = len(found) - 1
    assert freedom > 3
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_the_penalty_sees_prompt_and_response():
    """So strong a one that no token comes twice."""
    free = draw(PROMPTS, seed=0, sampling=GREEDY)
    assert any(len(set(one.tokens)) < 8 for (one,) in free)
    for prompt, (one,) in zip(
        PROMPTS, draw(PROMPTS, seed=0, sampling=Sampling(0.0, repetition_penalty=1e6)), strict=True
    ):
        assert len({*one.tokens, *prompt}) == 8 + len(set(prompt))


def test_the_penalty_sees_nothing_else():
    """All tokens would be as likely, but for seen ones of negative logit, which are as good as forbidden."""
    prompts = PROMPTS[:1] + PROMPTS[2:3]
    flat = Sampling(temperature=1e6, repetition_penalty=1e10)
    found = sample(
        MODEL, PARAMS, prompts, n=900, seed=0, max_new_tokens=1, stop_tokens=[], sampling=flat, batch_size=1800
    )
    logits = [np.asarray(_logits(prompt)) for prompt in prompts]
    assert min(row[0] for row in logits) < 0, "padding is token 0: it must matter whether that was seen"
    for prompt, row, drawn in zip(prompts, logits, found, strict=True):
        allowed = {token for token in range(CONFIG.vocab_size) if row[token] > 0 or token not in prompt}
        assert {int(one.tokens[0]) for one in drawn} == allowed


def _logits(prompt):
    ids, places = prompt[None], np.arange(len(prompt))[None]
    return hidden_of(MODEL, PARAMS, ids, places, np.ones_like(ids), np.zeros_like(ids))[0, -1] @ MODEL.head(PARAMS).T


def test_another_temperature_compiles_nothing():
    draw(PROMPTS, seed=0, sampling=Sampling(temperature=0.9, top_p=0.5))
    sizes = [f._cache_size() for f in (generate._begin, generate._continue)]
    draw(PROMPTS, seed=1, sampling=Sampling(temperature=0.8, top_p=0.6))
    assert [f._cache_size() for f in (generate._begin, generate._continue)] == sizes


# Members.


@pytest.mark.parametrize("how", [{}, {"stop_strings": (" 1",), "decode": lambda ids: "".join(f" {i}" for i in ids)}])
def test_several_models_draw_at_once_what_each_draws_alone(how):
    params, seeds = [make_params(seed) for seed in (0, 1, 2)], [3, 1, 4]
    options = dict(n=2, max_new_tokens=8, stop_tokens=[3, 5, 11], sampling=Sampling(repetition_penalty=1.5), **how)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *params)
    together = sample_members(MODEL, stacked, PROMPTS, seeds=seeds, batch_size=3, **options)
    ends = set()
    for one, own, seed in zip(together, params, seeds, strict=True):
        alone = sample(MODEL, own, PROMPTS, seed=seed, **options)
        assert lists(one) == lists(alone)
        for a, b in zip(sum(one, []), sum(alone, []), strict=True):
            np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)
            assert a.ended == b.ended
            ends.add(a.ended)
    assert ends >= {"token", "length"} and ("string" in ends) == bool(how)
    assert lists(together[0]) != lists(together[1])


# Devices.


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}], ids=str)
def test_many_devices_draw_what_one_does(sizes, monkeypatch):
    mesh = make_mesh({"data": 1} | sizes)
    params = jax.device_put(PARAMS, param_shardings(mesh, PARAMS))
    caches = []
    real = generate._begin
    monkeypatch.setattr(generate, "_begin", lambda *a: caches.append(real(*a)) or jax.tree.map(jnp.copy, caches[-1]))
    found = sample(MODEL, params, PROMPTS, seed=0, max_new_tokens=8, stop_tokens=[], n=2)
    alone = draw(PROMPTS, seed=0, n=2)
    assert lists(found) == lists(alone)
    for a, b in zip(found, alone, strict=True):
        np.testing.assert_allclose(a[0].logps, b[0].logps, atol=1e-5)
    heads = CONFIG.num_kv_heads // sizes.get("tensor", 1)
    k, _ = caches[0].cache[0]
    groups = 8 // sizes.get("tensor", 1)
    assert k.shape[0] == 8
    assert k.sharding.shard_shape(k.shape) == (8 // groups, k.shape[1], heads, CONFIG.head_dim)
    weights, _ = generate._prepare(MODEL, params)
    kernel = weights.layers[0].mlp.up.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape) == (16 // sizes["fsdp"], 32 // sizes.get("tensor", 1))


# Mistakes.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0 is out of range"),
        (dict(n=0), "n=0"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(stop_strings=["a"]), "need a tokenizer"),
        (dict(max_new_tokens=2048), "exceed the model's 2048 positions; write max_new_tokens=20[0-4][0-9] or less"),
        (dict(prompts=[PROMPTS[0], PROMPTS[0][:0]]), "prompt 1 is empty"),
    ],
)
def test_mistakes_are_named(options, says):
    with pytest.raises(UserError, match=says):
        sample(MODEL, PARAMS, **{"prompts": PROMPTS, "seed": 0, "max_new_tokens": 8, "stop_tokens": [], **options})


def test_a_reward_model_predicts_no_tokens():
    model = make_decoder(dataclasses.replace(CONFIG, reward=True))
    with pytest.raises(UserError, match="reward model"):
        sample(model, make_params(0, model), PROMPTS, seed=0, max_new_tokens=1, stop_tokens=[])


def test_no_prompts_no_samples():
    assert draw([], seed=0) == []


# transformers.


@pytest.mark.parity
@pytest.mark.parametrize(
    "case",
    ["llama llama3", "gemma2"]
    + [longer(case) for case in ("gpt_neox", "opt", "qwen3_moe", "gpt_oss", "phi", "gemma3_text", "qwen3_5_text")],
)
def test_greedy_is_transformers_generate_token_for_token(case, tmp_path):
    torch = pytest.importorskip("torch")
    from prefalign_jax.models import hf_io
    from test_families_parity import load_theirs, write_theirs

    write_theirs(case, tmp_path)
    theirs = load_theirs(tmp_path)
    theirs.generation_config.eos_token_id = None
    config = hf_io.load_config(tmp_path)
    params = hf_io.load_params(tmp_path, config)
    lengths, longest = (9, 3, 6), 9
    prompts = [np.random.default_rng(i).integers(3, 61, n).astype(np.int32) for i, n in enumerate(lengths)]
    ids, mask = np.zeros((3, longest), np.int64), np.zeros((3, longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    options = dict(attention_mask=torch.from_numpy(mask), do_sample=False, pad_token_id=0)
    expected = theirs.generate(torch.from_numpy(ids), max_new_tokens=16, **options)[:, longest:]
    found = firsts(
        sample(make_decoder(config), params, prompts, seed=0, max_new_tokens=16, stop_tokens=[], sampling=GREEDY)
    )
    assert found == expected.tolist()
    assert len({token for row in found for token in row}) > 3, "a model that repeats itself shows nothing"
