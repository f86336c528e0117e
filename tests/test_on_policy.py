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
from prefalign_jax.data.records import read_records
from prefalign_jax.evaluation.policy_samples import draw_samples, measure, reference_logps, scorer_of
from prefalign_jax.experiment import read
from prefalign_jax.intervals import bootstrap_mean
from prefalign_jax.jobs import JOBS, on_policy
from prefalign_jax.jobs.on_policy import make_pairs
from prefalign_jax.judges import endpoint, reward_model
from prefalign_jax.judges.judge import Scores, Verdict
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
    del made["made"]["content"]  # as an earlier version wrote it
    (tmp_path / "out" / "pairs.json").write_text(json.dumps(made))
    make_pairs(config, str(MODEL), tmp_path / "out", 0)
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
    means, scores = measure(drawn, fields, scorer_of("more_words"), *reference_logps((model, params), fields, [drawn]))
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
    means, _ = measure(stopped, fields, lambda prompts, texts: Scores(np.full(len(texts), np.nan), []))
    assert max(len(pair.chosen) for pair in stopped.pairs) <= 3 and means["samples/cut_off"] == 0.0
    for pair, text in zip(stopped.pairs, stopped.texts, strict=True):
        assert text == tokenizer.decode(pair.chosen[:-1], skip_special_tokens=True)
    assert means["samples/unscored"] == 20 and np.isnan(means["samples/reward"])
    fields.temperature = 0.5
    cooler = draw_some(QUESTIONS, fields, per_prompt=1, seed=3)
    assert reference_logps((model, params), fields, [cooler]) == [None]


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


@pytest.fixture
def drawn(monkeypatch):
    """Samples without a model: 'PATH says K to ROW', but for the last prompt's first two; what is asked is kept."""
    asked = []

    def draw(experiment, path, template, prompts, seed):
        asked.append((path, template, seed))
        count = experiment.config.on_policy.per_prompt
        texts = [[f"{path} says {k} to {one.where.row}" for k in range(count)] for one in prompts]
        texts[-1][:2] = ["SAME", " "]
        return texts, False

    monkeypatch.setattr(on_policy, "_draw", draw)
    return asked


def rows_of(directory):
    return [json.loads(line) for line in (directory / "pairs.jsonl").read_text().splitlines()]


OWN = {"samples.reward": None, "on_policy.pairing": "best_worst"}  # no reward is asked


def test_responses_of_the_data_are_put_over_the_policys_own(drawn, tmp_path):
    path = tmp_path / "rows.jsonl"
    user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    rows = [{"prompt": "A", "completion": "good"}, {"prompt": "B", "chosen": "better", "rejected": "worse"}]
    rows += [{"messages": [user, assistant, user, assistant]}, {"prompt": "C", "completion": "SAME"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(str(path), "pairs", **OWN, **{"on_policy.against": "data", "on_policy.limit": 4})
    make_pairs(config, "m", tmp_path / "out", 7)
    made = rows_of(tmp_path / "out")
    assert drawn == [("m", None, 7)]
    assert [(row["chosen"], row["rejected"]) for row in made[:6]] == [
        (text, f"m says {k} to {n}") for n, text in ((1, "good"), (2, "better")) for k in range(3)
    ]
    assert made[6]["prompt"] == [user, assistant, user] and made[6]["chosen"] == [assistant]
    assert made[6]["rejected"] == [{"role": "assistant", "content": "m says 0 to 3"}]
    assert (made[9]["chosen"], made[9]["rejected"], len(made)) == ("SAME", "m says 2 to 4", 10)
    about = json.loads((tmp_path / "out" / "pairs.json").read_text())
    assert about["left_out"] == {"identical responses": 1, "empty response": 1}
    records, dropped = read_records(tmp_path / "out" / "pairs.jsonl")
    assert len(records) == 10 and not dropped
    path.write_text(path.read_text().replace("better", "best"))
    with pytest.raises(UserError, match="pairs.jsonl was made with content='.*', not"):
        make_pairs(config, "m", tmp_path / "out", 7)


def test_one_models_samples_are_put_over_anothers(prompts, drawn, tmp_path):
    config = config_of(prompts, "pairs", **OWN, **{"on_policy.policies": "a,b", "model.path": None})
    config.data.chat_template = "chatml"
    assert JOBS["pairs"](config, tmp_path / "out") == 0
    assert [one[:2] for one in drawn] == [("a", None), ("b", None)]  # each by its own template
    assert drawn[0][2] == 0 != drawn[1][2]
    made = rows_of(tmp_path / "out")
    assert len(made) == 3 * 3 + 1  # SAME and the empty one are left out
    for row in made:
        where = row["prompt_number"] + 1
        k = row["chosen"].split()[2]
        assert (row["chosen"], row["rejected"]) == (f"a says {k} to {where}", f"b says {k} to {where}")
        assert (row["model"], row["rejected_model"]) == ("a", "b") and "score_chosen" not in row
    config.on_policy.policies = "b,a"
    with pytest.raises(UserError, match="was made with policies='a,b', not 'b,a'"):
        make_pairs(config, "", tmp_path / "out", 0)


def judge_of(asked):
    """An endpoint that prefers later samples, and refuses the second prompt's first one."""

    def endpoint(url, cache, *, model="", template=""):
        asked.append((url, cache, model, template))

        def judge(comparisons):
            return [
                Verdict(c, None, "refused") if "0 to 2" in c.first else Verdict(c, float(c.first > c.second))
                for c in comparisons
            ]

        return judge

    return endpoint


def test_a_judge_of_two_scores_samples_by_their_wins(prompts, drawn, tmp_path, monkeypatch, capfd):
    asked = []
    monkeypatch.setattr(endpoint, "endpoint", judge_of(asked))
    fields = {"samples.reward": None, "on_policy.judge": "endpoint:http://x/v1"}
    config = config_of(prompts, "pairs", **fields, **{"on_policy.judge_options": "model=big,template=A, or B?"})
    make_pairs(config, "m", tmp_path, 0)
    assert asked == [("http://x/v1", tmp_path / "replies.jsonl", "big", "A, or B?")]
    made = rows_of(tmp_path)
    numbers = [row["prompt_number"] for row in made]
    assert numbers == sorted(numbers) and numbers.count(0) == 3  # all pairs of a prompt lie side by side
    scores = {row[side]: row[f"score_{side}"] for row in made for side in ("chosen", "rejected")}
    assert [scores[f"m says {k} to 1"] for k in range(3)] == [0.0, 0.5, 1.0]
    assert [scores[f"m says {k} to 2"] for k in (1, 2)] == [0.0, 1.0] and "m says 0 to 2" not in scores
    assert {row["reward"] for row in made} == {"endpoint:http://x/v1"}
    assert "2 responses have no reward and are in no pair (refused: 1, empty response: 1)" in capfd.readouterr().err
    config.on_policy.judge_options = "model=small"
    with pytest.raises(UserError, match="was made with judge_options='model=big,template=A, or B.', not 'model=small'"):
        make_pairs(config, "m", tmp_path, 0)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"judge": "endpoint:http://x/v1"}, "endpoint: no model named"),
        ({"judge": "endpoint:http://x/v1", "judge_options": "model=a,tries=3"}, "no hyper-parameter 'tries'.*retries"),
        (
            {"judge": "endpoint:http://x/v1", "judge_options": "model"},
            "on_policy.judge_options=model: write NAME=VALUE",
        ),
        ({"judge": f"model:{MODEL}"}, "is a language model, not a reward model"),
        ({"judge": "reward:kindnes"}, "reward='kindnes' is unknown; did you mean 'kindness'"),
        ({"judge": "human:x.jsonl"}, "on_policy.judge=human:x.jsonl: nobody has judged what is to be drawn"),
        ({"judge": "endpoints:x"}, "on_policy.judge='endpoints' is unknown; did you mean 'endpoint'"),
        ({"judge": "model"}, "on_policy.judge=model: write model: and a name"),
    ],
)
def test_what_is_wrong_with_a_judge_is_said_before_anything_is_drawn(fields, says, prompts, drawn, tmp_path):
    config = config_of(prompts, "pairs", **{"samples.reward": None})
    config.on_policy.update(fields)
    with pytest.raises(UserError, match=says):
        make_pairs(config, "m", tmp_path, 0)
    assert not drawn


def test_a_reward_models_scores_are_kept(prompts, drawn, tmp_path, monkeypatch):
    kept = []

    def scorer(path, cache, *, dtype="float32"):
        kept.append((path, cache, dtype))
        return lambda prompts, texts: Scores(np.arange(len(texts), dtype=float), [""] * len(texts))

    monkeypatch.setattr(reward_model, "scorer", scorer)
    fields = {"on_policy.judge": "model:dir", "on_policy.judge_options": "dtype=bfloat16", "samples.reward": None}
    make_pairs(config_of(prompts, "pairs", **fields), "m", tmp_path / "a", 0)
    make_pairs(config_of(prompts, "pairs", **{"samples.reward": "model:dir"}), "m", tmp_path / "b", 0)
    assert kept == [("dir", tmp_path / n / "scores.jsonl", t) for n, t in (("a", "bfloat16"), ("b", "float32"))]
    assert [row["chosen"] for row in rows_of(tmp_path / "a")] == [row["chosen"] for row in rows_of(tmp_path / "b")]


@pytest.mark.parametrize(
    "fields",
    [{"on_policy.against": "data"}, {"on_policy.policies": "a,b"}, {"on_policy.judge": "reward:more_words"}],
    ids=["against data", "two models", "judge"],
)
def test_rounds_work_with_each(fields, drawn, tmp_path, monkeypatch):
    path, trained = tmp_path / "rows.jsonl", []
    path.write_text("".join(json.dumps({"prompt": text, "completion": "good"}) + "\n" for text in QUESTIONS))

    def train(config, workdir):
        read(config)
        trained.append((config.model.path, config.data.path))
        return SimpleNamespace(stopped=False)

    monkeypatch.setattr(on_policy, "train", train)
    monkeypatch.setitem(REWARDS, "more_words", lambda prompt, text: float(text.split()[2]) if "to" in text else 0.0)
    config = config_of(str(path), "rounds", **OWN, **fields, **{"on_policy.rounds": 2})
    assert on_policy.run_rounds(config, tmp_path / "out") == 0
    models = [str(MODEL), str(tmp_path / "out" / "round-1" / "train" / "export")]
    assert trained == [(models[n], str(tmp_path / "out" / f"round-{n + 1}" / "pairs.jsonl")) for n in range(2)]
    assert [path for path, _, _ in drawn] == (["a", "b"] * 2 if "on_policy.policies" in fields else models)
    assert len({seed for _, _, seed in drawn}) == len(drawn)
    assert all(rows_of(tmp_path / "out" / f"round-{n}") for n in (1, 2))


def test_a_loss_of_groups_gets_each_prompts_samples_in_one_row(prompts, drawn, tmp_path, monkeypatch):
    monkeypatch.setitem(REWARDS, "more_words", lambda prompt, text: float(len(text)))
    groups = {"loss.name": "plackett_luce", "on_policy.pairing": "best_worst"}
    make_pairs(config_of(prompts, "pairs", **groups), "m", tmp_path, 0)
    made = rows_of(tmp_path)
    assert [row["prompt"] for row in made] == QUESTIONS[3:]  # samples that are equally long are ties
    assert (made[0]["responses"], made[0]["scores"]) == (["SAME", "m says 2 to 4"], [4.0, 13.0])
    (record,), _ = read_records(tmp_path / "pairs.jsonl", groups=True)
    assert (record.responses, record.scores) == (("m says 2 to 4", "SAME"), (13.0, 4.0))
    with pytest.raises(UserError, match="pairing='all' chooses among scored responses, and loss 'plackett_luce' is"):
        read(config_of(prompts, "pairs", **{**groups, "on_policy.pairing": "all"}), complete=False)
    with pytest.raises(UserError, match="on_policy.against makes pairs, and loss 'plackett_luce' is trained on groups"):
        read(config_of(prompts, "pairs", **groups, **{"on_policy.against": "data", "samples.reward": None}))


@pytest.mark.parametrize(
    "fields, says",
    [
        ({**OWN, "on_policy.against": "date"}, "on_policy.against='date' is unknown; write data"),
        ({**OWN, "on_policy.policies": "a"}, "on_policy.policies='a': write two different models, BETTER,WORSE"),
        ({**OWN, "on_policy.policies": "a,a"}, "on_policy.policies='a,a': write two different models"),
        ({**OWN, "on_policy.policies": "a,b", "on_policy.against": "data"}, "on_policy.against and on_policy.policies"),
        ({"on_policy.against": "data"}, "samples.reward='more_words' is not read: on_policy.against"),
        ({**OWN, "on_policy.against": "data", "on_policy.pairing": "all"}, "pairing='all' chooses.*against has none"),
        ({**OWN, "on_policy.against": "data", "on_policy.min_gap": 1.0}, "min_gap=1.0 chooses"),
        ({"on_policy.judge_options": "model=a"}, "judge_options='model=a' is set without on_policy.judge"),
        (
            {"job": "train", "data.path": "x", "on_policy.prompts": None, "on_policy.judge": "x"},
            "judge='x' is set",
        ),
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
