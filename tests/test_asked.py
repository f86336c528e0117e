"""Whoever asks a model asks with the tokens that it was trained after: commands, samples, judges and the library."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import prefalign_jax as pa
from prefalign_jax.commands import evaluate, main
from prefalign_jax.config import defaults
from prefalign_jax.data.chat import load_tokenizer
from prefalign_jax.data.records import Prompt, read_prompts
from prefalign_jax.evaluation import policy_samples
from prefalign_jax.evaluation.measure import held_out_pairs
from prefalign_jax.experiment import read
from prefalign_jax.generation import generate, sample_to_file
from prefalign_jax.generation.sample_files import as_row, read_samples
from prefalign_jax.judges import reward_model, scoring
from prefalign_jax.judges.judge import Scores, by_reward, pair_samples, read_verdicts, write_verdicts
from prefalign_jax.models import hf_io
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.loading import told_in_run
from prefalign_jax.policy import Policy
from prefalign_jax.types import UserError
from published_rows import WEATHER, assistant, user
from small import CONFIG
from templates import tokenizer_with

TEMPLATE = (
    "{{ strftime_now('%Y-%m-%d') }} {{ mood | default('plain') }}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages if m.role != 'developer' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOLD = {
    "chat_template_kwargs": {"mood": "calm"},
    "template_may_drop": "developer",
    "date": "2024-02-29",
    "special_in_text": "split",
}
ANSWERS = {"chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}
ROWS = [
    {"prompt": [{"role": "developer", "content": "CAPITALS"}, user("Rome?")], "tools": [WEATHER]} | ANSWERS,
    {"prompt": [user("What is <|im_end|>?")]} | ANSWERS,
    {"prompt": [user("And now?")], "chat_template_kwargs": {"mood": "wild"}} | ANSWERS,
]


class Asked(Exception):
    """What a model was asked with, in place of an answer."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The working directory of a run: its export, a reward model with the template, and its config."""
    directory = tmp_path_factory.mktemp("run")
    tokenizer = tokenizer_with(TEMPLATE)
    shape = dataclasses.replace(CONFIG, vocab_size=len(tokenizer), reward=True, max_position=512)
    hf_io.save_params(make_decoder(shape).init(jax.random.key(0)), shape, directory / "export")
    tokenizer.save_pretrained(directory / "export")
    (directory / "config.json").write_text(json.dumps({"data": TOLD}))
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return directory


@pytest.fixture(scope="module")
def trained(run):
    """The prompts that training has, as tokens."""
    pairs = pa.tokenize(ROWS, load_tokenizer(run / "export"), max_length=512, **TOLD)
    prompts = [pair.prompt.tolist() for pair in pairs]
    texts = [text for text, *_ in pairs.texts(load_tokenizer(run / "export"))]
    assert all(text.startswith("2024-02-29 ") for text in texts)
    assert ["calm" in text for text in texts] == [True, True, False] and "wild" in texts[2]
    assert "weather" in texts[0] and "CAPITALS" not in texts[0] and "What is <|im_end|>?" in texts[1]
    return prompts


def raises(name):
    """A function that raises what it is given under a name, or at a place."""

    def fake(*given, **named):
        raise Asked(named[name] if isinstance(name, str) else given[name])

    return fake


def asked(caught):
    return [np.asarray(ids).tolist() for ids in caught.value.args[0]]


def test_generate_asks_a_run_with_what_it_was_trained_after(run, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_to_file, "load_decoder", lambda *_, **__: (None, None))
    monkeypatch.setattr(sample_to_file, "stream", raises(2))
    draw = sample_to_file.Draw()
    for model in (run, run / "export"):
        with pytest.raises(Asked) as caught:
            sample_to_file.sample_to_file(str(model), str(run / "rows.jsonl"), tmp_path / "out.jsonl", draw)
        assert asked(caught) == trained
    # What is given goes first, and is what the samples say.
    with pytest.raises(Asked) as caught:
        sample_to_file.sample_to_file(
            str(run), str(run / "rows.jsonl"), tmp_path / "out.jsonl", draw._replace(chat_template_kwargs="{}")
        )
    same = [ids == other for ids, other in zip(asked(caught), trained, strict=True)]
    assert same == [False, False, True]


def test_the_command_takes_each_option(run, tmp_path, monkeypatch):
    draws = []
    monkeypatch.setattr(sample_to_file, "sample_to_file", lambda *given, **_: draws.append(given[3]))
    words = [
        f"--{name}={json.dumps(value) if name == 'chat_template_kwargs' else value}" for name, value in TOLD.items()
    ]
    assert (
        main(["generate", f"--model={run}", f"--prompts={run / 'rows.jsonl'}", f"--out={tmp_path / 'o'}", *words]) == 0
    )
    assert draws[0].chat == read_told().chat
    told = {"chat_template_kwargs": {"mood": "calm"}, "special_in_text": "split", "date": "2024-02-29"}
    assert told.items() <= draws[0].settings().items()


def read_told(**fields):
    config = defaults("dpo")
    config.model.path, config.data.path = "MODEL", "rows.jsonl"
    config.data.update(TOLD)
    config.update_from_flattened_dict(fields)
    return read(config)


def test_evaluate_measures_a_run_after_what_it_was_trained_after(run, trained):
    parser = evaluate._parser()
    words = [f"--model={run}", f"--data={run / 'rows.jsonl'}", "--loss=bradley_terry", "--out=out"]
    for more, same in (([], True), (['--chat_template_kwargs={"mood": "loud"}'], False)):
        options, rest = parser.read_others([*words, *more])
        experiment = evaluate.experiment_of(parser, options, rest)
        _, pairs, _ = held_out_pairs(experiment, load_tokenizer(run / "export"), ())
        assert ([pair.prompt.tolist() for pair in pairs] == trained) == same


def test_evaluate_takes_which_pairs_of_a_group_there_are(run):
    parser = evaluate._parser()
    words = [f"--model={run}", "--data=rows.jsonl", "--loss=bradley_terry", "--out=out"]
    for more, pairs in (([], "best_worst"), (["--pairs=all"], "all")):
        experiment = evaluate.experiment_of(parser, *parser.read_others([*words, *more]))
        assert experiment.record_kind["pairs"] == pairs


def test_samples_of_a_run_and_pairs_of_the_policys_own_are_asked_as_in_training(run, trained, monkeypatch):
    monkeypatch.setattr(policy_samples, "sample", raises(2))
    experiment, tokenizer = read_told(), load_tokenizer(run / "export")
    prompts, _ = read_prompts(run / "rows.jsonl")
    how = dict(stop_tokens=(), per_prompt=1, seed=0, chat=experiment.chat)
    with pytest.raises(Asked) as caught:
        policy_samples.draw_samples(None, None, tokenizer, prompts, experiment.config.samples, **how)
    assert asked(caught) == trained


def test_what_was_drawn_keeps_what_it_was_asked_with(run, monkeypatch):
    done = generate.Completion(np.array([5], np.int32), np.zeros(1, np.float32), "length")
    monkeypatch.setattr(policy_samples, "sample", lambda model, params, ids, **_: [[done] for _ in ids])
    prompts, _ = read_prompts(run / "rows.jsonl")
    experiment = read_told()
    how = dict(stop_tokens=(), per_prompt=1, seed=0, chat=experiment.chat)
    drawn = policy_samples.draw_samples(
        None, None, load_tokenizer(run / "export"), prompts, experiment.config.samples, **how
    )
    assert drawn.prompts == [prompts[0], ROWS[1]["prompt"], prompts[2]]
    rows = [policy_samples._row_of(prompt) for prompt in drawn.prompts]
    assert rows == [{name: row[name] for name in row if name not in ANSWERS} for row in ROWS]


def test_a_reward_model_scores_after_what_it_was_trained_after(run, trained, monkeypatch):
    monkeypatch.setattr(scoring, "make_pair_set", raises(0))
    prompts, _ = read_prompts(run / "rows.jsonl")
    for path, options, same in ((run, {}, True), (run / "export", {}, True), (run, {"date": "2024-03-01"}, False)):
        with pytest.raises(Asked) as caught:
            reward_model.scorer(path, **options)(prompts, ["Yes."] * 3)
        assert ([pair.prompt.tolist() for pair in caught.value.args[0]] == trained) == same
    with pytest.raises(UserError, match="^date='tomorrow': write a day as YYYY-MM-DD"):
        reward_model.scorer(run, date="tomorrow")


def test_samples_in_files_are_judged_with_what_their_models_were_asked_with(run, tmp_path):
    """Prompts that differ in their tools alone are two prompts."""
    prompts, _ = read_prompts(run / "rows.jsonl")
    rows = [{**as_row(one), "response": "r", "model": "m"} for one in (*prompts, prompts[0]._replace(tools=()))]
    for row in rows:
        del row["where"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = read_samples(tmp_path / "a.jsonl")
    comparisons, dropped = pair_samples(samples, samples[::-1])
    seen = []

    def score(prompts, responses):
        seen.extend(prompts)
        return Scores(np.zeros(len(prompts)), [""] * len(prompts))

    verdicts = by_reward(score)(comparisons)
    assert not dropped and len(comparisons) == 4
    told = [(one.tools, one.chat_template_kwargs) for one in seen[:4] if isinstance(one, Prompt)]
    assert told == [(prompts[0].tools, ()), ((), prompts[2].chat_template_kwargs)]
    write_verdicts(tmp_path / "v.jsonl", verdicts)
    assert [verdict.comparison for verdict in read_verdicts(tmp_path / "v.jsonl")] == comparisons
    (tmp_path / "b.jsonl").write_text(json.dumps({**rows[0], "tools": [3]}) + "\n")
    with pytest.raises(UserError, match="b.jsonl, row 1: field 'tools': expected a list of objects"):
        read_samples(tmp_path / "b.jsonl")


def test_the_library_asks_as_it_is_told(run, trained, monkeypatch):
    monkeypatch.setattr(generate, "sample", raises(2))
    policy = Policy(None, None, load_tokenizer(run / "export"))
    with pytest.raises(Asked) as caught:
        pa.sample(policy, [row["prompt"] for row in ROWS[1:2]], **TOLD)
    assert asked(caught) == trained[1:2]


def test_only_a_run_says_what_was_told(run, tmp_path):
    given = dict.fromkeys(TOLD)
    assert told_in_run(run, **given) == told_in_run(run / "export", **given) == TOLD
    assert told_in_run(run, **{**given, "date": "2025-01-01"}) == {**TOLD, "date": "2025-01-01"}
    assert told_in_run(tmp_path, **given) == told_in_run("owner/model", **given) == given
    (tmp_path / "config.json").write_text('{"data": 3}')  # a model's own
    assert told_in_run(tmp_path, **given) == given
