"""Data of the policy's own: where it comes from, that it is made once, and rounds of it."""

import datetime
import functools
import json
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest

from prefalign_jax import processes
from prefalign_jax.config import defaults
from prefalign_jax.data.chat import CHAT_TEMPLATES, load_tokenizer
from prefalign_jax.evaluation.policy_samples import draw_samples, measure, scorer_of
from prefalign_jax.experiment import read
from prefalign_jax.intervals import bootstrap_mean
from prefalign_jax.jobs import JOBS, on_policy
from prefalign_jax.jobs.on_policy import make_pairs
from prefalign_jax.judges.judge import Scores
from prefalign_jax.judges.rewards import REWARDS
from prefalign_jax.metrics import read_metrics
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.hf_io import load_config, load_params
from prefalign_jax.types import UserError

MODEL = pathlib.Path(__file__).parent / "goldens" / "trl"
QUESTIONS = ["The cat sat", "A dog ran", "In the house", "We saw it"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    return str(path)


def config_of(prompts, kind, **fields):
    c = defaults("dpo")
    fields = {
        "job": kind,
        "model.path": str(MODEL),
        "max_length": 64,
        "batch_size": 2,
        "samples.reward": "more_words",
        "samples.max_new_tokens": 8,
        "on_policy.prompts": prompts,
        "on_policy.pairing": "all",
        "on_policy.per_prompt": 3,
        "tensorboard": False,
        "learning_rate": 1e-3,
        **fields,
    }
    c.update_from_flattened_dict(fields)
    return c


def test_pairs_say_where_they_come_from_and_are_made_once(prompts, tmp_path):
    config = config_of(prompts, "pairs")
    assert JOBS["pairs"](config, tmp_path / "out") == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in rows} <= set(QUESTIONS) and rows
    for row in rows:
        assert row["score_chosen"] == REWARDS["more_words"](row["prompt"], row["chosen"]) > row["score_rejected"]
        assert (row["model"], row["reward"], row["seed"]) == (str(MODEL), "more_words", 0)
        assert QUESTIONS[row["prompt_number"]] == row["prompt"]
    made = json.loads((tmp_path / "out" / "pairs.json").read_text())
    assert made["pairs"] == len(rows) and len(rows) + sum(made["left_out"].values()) == 3 * len(QUESTIONS)
    before = (tmp_path / "out" / "pairs.jsonl").stat().st_mtime_ns
    make_pairs(config, str(MODEL), tmp_path / "out", 0)
    assert (tmp_path / "out" / "pairs.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="was made with seed=0, not 1"):
        make_pairs(config, str(MODEL), tmp_path / "out", 1)


@pytest.mark.everything
def test_rounds_train_on_what_the_last_model_drew(prompts, light_runs, tmp_path):
    config = config_of(
        prompts,
        "rounds",
        **{"on_policy.rounds": 2, "samples.prompts": prompts, "samples.per_prompt": 2, "steps": 3},
    )
    assert JOBS["rounds"](config, tmp_path) == 0
    first, second = (json.loads((tmp_path / f"round-{n}" / "pairs.json").read_text())["made"] for n in (1, 2))
    assert first["model"] == str(MODEL) and second["model"] == str(tmp_path / "round-1" / "train" / "export")
    rows = read_metrics(tmp_path / "round-1" / "train" / "eval.jsonl")
    assert [row["step"] for row in rows] == [0, 3]
    assert rows[0]["samples/kl"] == pytest.approx(0, abs=1e-4) and abs(rows[1]["samples/kl"]) > 1e-3
    later = read_metrics(tmp_path / "round-2" / "train" / "eval.jsonl")
    assert later[0]["samples/kl"] == pytest.approx(rows[1]["samples/kl"], abs=1e-4)  # to where the first began
    assert later[0]["samples/reward"] == rows[1]["samples/reward"]  # the same model, prompts and seed
    drawn = (tmp_path / "round-2" / "train" / "samples" / "3.jsonl").read_text().splitlines()
    assert len(drawn) == 2 * len(QUESTIONS) and json.loads(drawn[0])["step"] == 3
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("pairs.jsonl")}
    with config.unlocked():
        config.on_policy.rounds = 1
    assert JOBS["rounds"](config, tmp_path) == 0  # all is there, and how many rounds there are made no pair another
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("pairs.jsonl")}


def test_what_is_measured_is_what_was_drawn():
    tokenizer, shape = load_tokenizer(MODEL), load_config(MODEL)
    model, params = make_decoder(shape), load_params(MODEL, shape)
    fields = config_of("x", "pairs").samples
    draw_some = functools.partial(draw_samples, model, params, tokenizer, stop_tokens=[tokenizer.eos_token_id])
    drawn = draw_some(QUESTIONS, fields, per_prompt=5, seed=3)
    means, scores = measure(drawn, fields, scorer_of("more_words"), (model, params))
    assert means["samples/kl"] == pytest.approx(0, abs=1e-4)
    np.testing.assert_array_equal(scores, [REWARDS["more_words"]("", text) for text in drawn.texts])
    interval = bootstrap_mean(scores, clusters=drawn.numbers)
    assert (means["samples/reward"], means["samples/reward_low"]) == pytest.approx(interval[:2])
    assert not any(text.endswith(tokenizer.eos_token) for text in drawn.texts)
    assert drawn.numbers.tolist() == sorted(drawn.numbers.tolist()) and len(drawn.texts) == 20
    # A part of the list draws what the whole draws there.
    part = draw_some(QUESTIONS[2:], fields, per_prompt=5, seed=3, first=2)
    assert part.texts == drawn.texts[10:]
    # Of stop tokens, be they several, a text keeps none, and what they end was not cut off.
    ends = sorted({int(pair.chosen[2]) for pair in drawn.pairs})
    stopped = draw_some(QUESTIONS, fields, per_prompt=5, seed=3, stop_tokens=ends)
    means, _ = measure(stopped, fields, lambda prompts, texts: Scores(np.full(len(texts), np.nan), []), (model, params))
    assert max(len(pair.chosen) for pair in stopped.pairs) <= 3 and means["samples/cut_off"] == 0.0
    for pair, text in zip(stopped.pairs, stopped.texts, strict=True):
        assert text == tokenizer.decode(pair.chosen[:-1], skip_special_tokens=True)
    assert means["samples/unscored"] == 20 and np.isnan(means["samples/reward"])
    fields.temperature = 0.5
    cooler = draw_some(QUESTIONS, fields, per_prompt=1, seed=3)
    assert "samples/kl" not in measure(cooler, fields, None, (model, params))[0]


def test_a_stopped_stage_stops_the_job(prompts, tmp_path, monkeypatch):
    import prefalign_jax.jobs.on_policy as on_policy

    class Stopped:
        stopped = True

    monkeypatch.setattr(on_policy, "train", lambda config, workdir: Stopped())
    assert JOBS["rounds"](config_of(prompts, "rounds"), tmp_path) == processes.STOPPED
    assert not (tmp_path / "round-2").exists()


def test_a_round_trains_with_the_date_that_it_was_drawn_with(tmp_path, monkeypatch):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": text}]}) + "\n" for text in QUESTIONS))
    config = config_of(str(path), "rounds", **{"on_policy.rounds": 1})
    config.data.chat_template = "{{ strftime_now('%Y') }}" + CHAT_TEMPLATES["chatml"].jinja
    trained = []

    def train(config, workdir):
        trained.append(config.data.date)
        return SimpleNamespace(stopped=True)

    monkeypatch.setattr(on_policy, "train", train)
    on_policy.run_rounds(config, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "round-1" / "pairs.json").read_text())
    made["date"] = "2024-02-29"  # the rest of the round comes another day
    (tmp_path / "out" / "round-1" / "pairs.json").write_text(json.dumps(made))
    on_policy.run_rounds(config, tmp_path / "out")
    assert trained == [datetime.date.today().isoformat(), "2024-02-29"] and config.data.date is None


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"on_policy.prompts": None}, "on_policy.prompts=None and job='pairs' do not fit"),
        ({"samples.reward": None}, "job='pairs' needs samples.reward"),
        ({"data.path": "x"}, "data.path='x' is not read"),
        ({"job": "train", "data.path": "x"}, "on_policy.prompts='p' and job='train' do not fit"),
        ({"samples.limit": 3}, "samples.limit is set without samples.prompts"),
        ({"model.path": None}, "model.path is not set"),
        ({"job": "rounds", "on_policy.rounds": 2, "export.enabled": False}, "export.enabled=False, and job='rounds'"),
    ],
)
def test_options_that_do_not_fit(fields, says):
    with pytest.raises(UserError, match=says):
        read(config_of("p", "pairs", **fields))
