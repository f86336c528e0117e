"""Log-probabilities and implicit rewards as scores of responses."""

import dataclasses

import jax
import numpy as np
import pytest

from prefalign_jax.judges import likelihood, scoring
from prefalign_jax.judges.kinds import make_judge
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.hf_io import save_params
from prefalign_jax.types import UserError
from small import CONFIG as SMALL

CONFIG = dataclasses.replace(SMALL, vocab_size=384, max_position=128)
PROMPTS = ["The policy", "Is the sky blue?", [{"role": "user", "content": "Tea?"}], "x", "The policy"]
RESPONSES = [" should prefer", "Yes.", "Boil the water.", "word " * 200, " should prefer"]
TALK = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer):
    """{name: (directory, parameters)} of a policy and a reference."""
    out = {}
    for seed, name in enumerate(("policy", "reference")):
        directory = tmp_path_factory.mktemp("models") / name
        params = make_decoder(CONFIG).init(jax.random.key(seed))
        save_params(params, CONFIG, directory)
        tiny_tokenizer.save_pretrained(directory)
        out[name] = directory, params
    return out


@jax.jit
def row_logps(params, tokens):
    """[127] log-probability of each token of one row after the first: no packing, no padding within what is read."""
    model = make_decoder(CONFIG)
    ones, places = np.ones((1, 128), np.int32), np.arange(128)[None]
    hidden = model.hidden(params, tokens, places, ones, 0 * ones)
    logits = hidden[0] @ model.head(params).T
    return jax.numpy.take_along_axis(jax.nn.log_softmax(logits[:-1]), tokens[0, 1:, None], 1)[:, 0]


def ids_of(tokenizer, prompt, response):
    """(tokens of the whole, tokens of the prompt)."""
    if isinstance(prompt, str):
        return tokenizer(prompt + response).input_ids + [tokenizer.eos_token_id], len(tokenizer(prompt).input_ids)
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": response}], tokenize=False)
    asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(whole.rstrip("\n")).input_ids, len(tokenizer(asked).input_ids)


def expected(tokenizer, params, prompt, response):
    """(log-probability of the response and its end, number of its tokens)."""
    ids, begin = ids_of(tokenizer, prompt, response)
    tokens = np.zeros((1, 128), np.int32)
    tokens[0, : len(ids)] = ids
    return float(row_logps(params, tokens)[begin - 1 : len(ids) - 1].sum()), len(ids) - begin


@pytest.mark.parametrize("kind", ["logp", "dpo"])
def test_scores_are_those_of_each_text_alone(kind, models, tiny_tokenizer, tmp_path):
    (policy, params), (reference, other) = models.values()
    against = reference if kind == "dpo" else None
    for per_token in (False, True):
        score = likelihood.scorer(policy, against, per_token, tmp_path / "scores.jsonl", batch_size=2)
        values, reasons = score(PROMPTS, RESPONSES)
        assert np.isnan(values[3]) and reasons == ["", "", "", "too long for the model", ""]
        for i in (0, 1, 2, 4):
            logp, tokens = expected(tiny_tokenizer, params, PROMPTS[i], RESPONSES[i])
            if against:
                logp -= expected(tiny_tokenizer, other, PROMPTS[i], RESPONSES[i])[0]
            assert values[i] == pytest.approx(logp / tokens if per_token else logp, rel=1e-4, abs=1e-4)
    assert np.nanstd(values) > 0.01, "the scores are put to no test"


def test_in_a_conversation_what_the_assistant_writes_counts(models, tiny_tokenizer):
    """What the user says between two answers is read; the sum is that of both answers with their ends."""
    policy, params = models["policy"]
    score = likelihood.scorer(policy, None, False)
    prompt, first = PROMPTS[2], {"role": "assistant", "content": "Yes."}
    last = {"role": "assistant", "content": "So."}
    (value,), _ = score([prompt], [[*TALK, last]])
    parts = expected(tiny_tokenizer, params, prompt, "Yes.")[0]
    parts += expected(tiny_tokenizer, params, [*prompt, first, TALK[1]], "So.")[0]
    assert value == pytest.approx(parts, rel=1e-4)


def test_a_text_is_computed_once_in_any_judge_and_any_run(models, tmp_path, monkeypatch):
    (policy, _), (reference, _) = models.values()
    cache, computed, batches = tmp_path / "scores.jsonl", [], scoring.eval_batches

    def counted(data):
        computed.append(len(data.pairs))
        return batches(data)

    monkeypatch.setattr(scoring, "eval_batches", counted)
    texts = ["a", "b", "a"], ["x", "y", "x"]
    sums = likelihood.scorer(policy, None, False, cache)(*texts).values
    assert computed == [2] and sums[0] == sums[2]
    likelihood.scorer(policy, None, True, cache)(*texts)
    assert computed == [2]
    ratios = likelihood.scorer(policy, reference, False, cache)(*texts).values
    assert computed == [2, 2]
    np.testing.assert_array_equal(likelihood.scorer(policy, reference, False, cache)(*texts).values, ratios)
    assert computed == [2, 2]
    assert not np.array_equal(likelihood.scorer(reference, None, False, cache)(*texts).values, sums)


def test_scores_are_kept_by_what_a_shape_has_beside_its_defaults(models, tmp_path, monkeypatch):
    path = models["policy"][0]
    keys = [
        scoring.scoring_model(path, tmp_path, reward=False, batch_size=1, dtype=d).key for d in ("float32", "bfloat16")
    ]
    assert keys[0] != keys[1]
    plain = likelihood.scorer(path, None, False, tmp_path / "scores.jsonl")(["a"], ["x"]).values

    def later(shape):  # the same shape in a version with one more field
        kind = dataclasses.make_dataclass("Later", [("field", int, 0)], bases=(type(shape),), frozen=True)
        return kind(**dataclasses.asdict(shape))

    loaded = scoring.load

    def load(*args, **options):
        policy = loaded(*args, **options)
        return policy._replace(model=policy.model._replace(config=later(policy.model.config)))

    monkeypatch.setattr(scoring, "load", load)
    monkeypatch.setattr(scoring, "eval_batches", lambda data: pytest.fail("computed again"))
    np.testing.assert_array_equal(
        likelihood.scorer(path, None, False, tmp_path / "scores.jsonl")(["a"], ["x"]).values, plain
    )


def test_every_field_of_a_shape_that_is_not_its_default_tells_it_from_others():
    other = {str: "x", int: 3, float: 0.5, bool: True, tuple: (1,), type(None): 0.25}
    for field in dataclasses.fields(SMALL):
        value = getattr(SMALL, field.name)
        changed = dataclasses.replace(SMALL, **{field.name: not value if value is True else other[type(value)]})
        assert changed.told != SMALL.told, field.name


def test_a_policy_that_is_its_reference_has_no_reward(models):
    policy = models["policy"][0]
    values, _ = likelihood.scorer(policy, policy, False)(["a", "b"], ["x", "y"])
    assert values.tolist() == [0, 0]


def test_models_that_do_not_fit_are_refused(models, tmp_path, tiny_tokenizer):
    (policy, _), (reference, params) = models.values()
    save_params(params, CONFIG, tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(text.replace('"!"', '"swapped"'))
    with pytest.raises(UserError, match="other: token .* is 'swapped', and another in the policy's tokenizer"):
        likelihood.scorer(policy, tmp_path / "other", False)
    for spec in ("dpo:a", "dpo:a,", "mean_dpo:,b"):
        with pytest.raises(UserError, match="write dpo:POLICY,REFERENCE"):
            make_judge(spec, [], tmp_path)
    reward = dataclasses.replace(CONFIG, reward=True)
    save_params(make_decoder(reward).init(jax.random.key(0)), reward, tmp_path / "reward")
    with pytest.raises(UserError, match="is a reward model, not a language model; its judge is model:DIR"):
        make_judge(f"logp:{tmp_path / 'reward'}", [], tmp_path)
