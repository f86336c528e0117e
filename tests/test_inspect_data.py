"""The whole inspection and the data part of a run, on a small file with one of everything."""

import json
import pathlib
import re

import numpy as np
import pytest

from prefalign_jax import commands
from prefalign_jax.config import defaults
from prefalign_jax.data.chat import load_tokenizer
from prefalign_jax.data.counts import new_counts
from prefalign_jax.data.records import read_records, split_by_prompt
from prefalign_jax.experiment import read
from prefalign_jax.inspection import inspect_data
from prefalign_jax.jobs import JOBS
from prefalign_jax.load_data import load_pairs, source_records

ROOT = pathlib.Path(__file__).parents[1]
MODEL = ROOT / "tests/goldens/trl"


def rows():
    """40 good pairs of 20 prompts, and for each cleaning step some that it drops."""
    good = [
        {
            "prompt": f"Question {i // 2}?",
            "chosen": f" It is {i}, of course.",
            "rejected": f" No {i} idea.",
        }
        for i in range(40)
    ]
    return [
        *[{**row, "score_chosen": 2.0 + i, "score_rejected": 1.0} for i, row in enumerate(good)],
        {**good[3], "score_chosen": 5.0, "score_rejected": 1.0},  # a duplicate
        {"prompt": "a?", "chosen": "Yes. Human: no", "rejected": "b", "score_chosen": 2.0, "score_rejected": 1.0},
        {"prompt": "b?", "chosen": "Yes b", "rejected": "No b", "score_chosen": 1.0, "score_rejected": 1.0},  # a tie
        {"prompt": "c?", "chosen": "cafÃ© c", "rejected": "No c", "score_chosen": 2.0, "score_rejected": 1.0},
        {"prompt": "d?", "chosen": "", "rejected": "No d", "score_chosen": 2.0, "score_rejected": 1.0},  # empty
        {"prompt": "e?", "chosen": "w " * 300, "rejected": "No e", "score_chosen": 2.0, "score_rejected": 1.0},  # long
    ]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


def config_of(data, loss="dpo", **fields):
    c = defaults(loss)
    c.model.path, c.data.path, c.data.cache_dir = str(MODEL), str(data), ""
    c.batch_size, c.max_length = 4, 256
    c.update_from_flattened_dict(fields)
    return c


def loaded(config):
    return load_pairs(read(config), load_tokenizer(config.model.path))


def records_of(config):
    """(training records, held-out records, cleaning stages by name)"""
    experiment = read(config)
    sources = experiment.sources_for("train")
    counts = new_counts(len(sources))
    records = list(source_records(sources, experiment, counts, experiment.cleaning))
    parts = [[record for record in records if record.held_out == held_out] for held_out in (False, True)]
    return *parts, {stage.name: stage.dropped for stage in counts.cleaning}


def test_a_run_says_what_cleaning_dropped(data, capsys):
    found = loaded(config_of(data, **{"data.clean": "encoding,exact_duplicates,role_markers,ties"}))
    assert capsys.readouterr().err == (
        "training data: 41 pairs; dropped 1 empty response, 1 too long, 1 exact duplicate, "
        "1 role marker in a response, 1 tied scores; changed 1 wrong encoding\n"
    )
    stages = found.stages["training"]
    assert [stage.name for stage in stages] == [
        "read", "encoding", "exact_duplicates", "role_markers", "ties", "tokenize",
    ]  # fmt: skip
    for stage, after in zip(stages, [*stages[1:], None], strict=True):
        assert stage.before == stage.after + sum(stage.dropped.values())
        assert after is None or after.before == stage.after
    # The scores were read for a step: the loss, which does not ask for them, gets the pairs that it would get.
    assert all(np.isnan(pair.margin) for pair in found.training)


def test_the_cache_knows_how_the_records_were_cleaned(data, tmp_path):
    cache = {"data.cache_dir": str(tmp_path / "cache")}
    twice = [loaded(config_of(data, **cache, **{"data.clean": "exact_duplicates,near_duplicates"})) for _ in range(2)]
    assert twice[0].stages == twice[1].stages and len(twice[0].training) == len(twice[1].training)
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1
    other = loaded(config_of(data, **cache, **{"data.clean": "exact_duplicates"}))
    looser = {"data.clean": "exact_duplicates,near_duplicates", "data.cleaning.near_duplicates.threshold": 0.1}
    looser["data.cleaning.near_duplicates.words"] = 1
    assert len(loaded(config_of(data, **cache, **looser)).training) < len(other.training)
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 3


def test_held_out_records_are_neither_cleaned_nor_changed_by_cleaning(data):
    plain = config_of(data, **{"data.eval_fraction": 0.4})
    cleaned = config_of(data, **{"data.eval_fraction": 0.4, "data.clean": "encoding,exact_duplicates,lengths"})
    cleaned.data.cleaning.lengths.least_words = 4
    (training, held_out, _), (fewer, same, _) = map(records_of, (plain, cleaned))
    assert [record._replace(held_out=False) for record in held_out] == split_by_prompt(read_records(data)[0], 0.4, 0)[1]
    assert held_out == same
    assert len(fewer) < len(training)


def test_training_prompts_that_are_held_out_are_found(data, tmp_path):
    held_out = tmp_path / "test.jsonl"
    held_out.write_text(json.dumps(rows()[0]) + "\n")
    fields = {"data.clean": "contamination", "data.cleaning.contamination.held_out_too": True}
    *_, dropped = records_of(config_of(data, **fields, **{"data.eval_path": str(held_out)}))
    assert dropped == {"contamination": {"in a held-out prompt": 2}}
    fields = {"data.clean": "contamination", "data.cleaning.contamination.benchmarks": str(held_out)}
    found = loaded(config_of(data, **fields))
    assert found.stages["training"][1].dropped == {"in benchmark test.jsonl": 2}
    assert [(one.role, one.name) for one in found.read_from] == [("training", str(data)), ("benchmark", str(held_out))]


def test_the_first_stage_of_two_leaves_out_the_steps_that_need_pairs(data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("prefalign_jax.jobs.train", lambda config, workdir: seen.append(config) or _Stopped())
    c = config_of(data, job="sft_first", **{"data.clean": "score_gap,exact_duplicates", "sft.epochs": 1.0})
    c.sft.learning_rate, c.data.cleaning.score_gap.least = 1e-3, 1.0
    JOBS["sft_first"](c, tmp_path)
    assert seen[0].data.clean == "exact_duplicates"
    assert len(records_of(seen[0])[0]) == 44


class _Stopped:
    stopped = True


@pytest.mark.usefixtures("launch_leaves_no_trace")
def test_the_command_shows_what_would_be_trained(data, tmp_path, capsys):
    argv = ["inspect", f"--config=dpo:model={MODEL},data={data}", f"--workdir={tmp_path}/out"]
    argv += ["--config.max_length=256", "--config.batch_size=4", "--config.data.clean=exact_duplicates"]
    argv += ["--config.data.cache_dir=", "--config.too_long=truncate_response"]
    assert commands.main(argv) == 0
    out, err = capsys.readouterr()
    assert "Length bias" in out and "training: exact_duplicates" in out
    report = json.loads((tmp_path / "out" / "data.json").read_text())
    assert report["stages"]["training"][1]["dropped"] == {"exact duplicate": 1}
    assert report["truncation"]["too_long"] == report["truncation"]["cut_response"] == 1
    assert report["cleaning_would_drop"]["exact_duplicates"] == {"exact duplicate": 0}
    assert report["cleaning_would_drop"]["role_markers"] == {"role marker in a response": 1}
    assert report["scores"]["score_chosen"]["most"] == 41.0
    assert report["prompts"]["records_of_an_earlier_prompt"] == 20
    page = (tmp_path / "out" / "data.html").read_text()
    assert page.count("<figure>") == 5 and page.count("<article ") == 24 + 5 * 3
    assert page.count("does not end with EOS") > 0, "the response that was cut"
    assert "39 pairs" in err


def test_scores_are_the_numbers_that_a_loss_could_read(tmp_path):
    values = [1, 2.5, "3", 10**400, "1" + "0" * 400, 1e300, True, None, "high", [1]]
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b", "score_chosen": x} for n, x in enumerate(values)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = defaults("dpo")
    config.data.path, config.model.path = str(tmp_path / "rows.jsonl"), "unread"
    scores = inspect_data.scores_of(config, read(config).sources_for("train"))
    np.testing.assert_array_equal(scores["score_chosen"], [1, 2.5, 3])


def test_completions_with_labels_are_shown_too(data, tmp_path, monkeypatch):
    monkeypatch.setattr(inspect_data, "pictures", lambda *_: {})
    report = inspect_data.inspect(config_of(data, "kto", batch_size=8), tmp_path / "out")
    assert "length_bias" not in report
    page = (tmp_path / "out" / "data.html").read_text()
    assert "; desirable" in page and "; undesirable" in page
    assert page.count("tokens, none trained") == 2 * page.count("<article "), "the prompt, and another's completion"


def test_what_a_mixture_does_not_train_on_is_not_shown(data, tmp_path, monkeypatch):
    monkeypatch.setattr(inspect_data, "pictures", lambda *_: {})
    other = tmp_path / "other.jsonl"
    few = [{"prompt": f"Other {i}?", "chosen": f" Yes {i}.", "rejected": f" No {i}."} for i in range(8)]
    other.write_text("".join(json.dumps(row) + "\n" for row in few))
    c = config_of(data)
    c.data.path, c.data.mix = None, ({"path": str(data), "weight": 0.5}, {"path": str(other), "weight": 0.5})
    report = inspect_data.inspect(c, tmp_path / "out")
    assert [one["pairs"] for one in report["mixture"]] == [8, 8]
    stages = report["stages"]["training"]
    assert [stage["name"] for stage in stages] == ["read", "tokenize", "weights"] and stages[-1]["after"] == 16
    # What is too long was lost to max_length, the rest to the weights.
    assert (report["truncation"]["pairs"], report["truncation"]["dropped"]) == (17, 1)
    assert sum(report["turns"].values()) == 17


def test_groups_are_shown_with_all_their_responses(tmp_path):
    path = tmp_path / "groups.jsonl"
    texts = [" yes", " no", " perhaps so", " a very long story indeed"]
    each = [{"prompt": f"Question {i}?", "responses": [f"{text} {i}" for text in texts]} for i in range(12)]
    path.write_text("".join(json.dumps({**row, "scores": [2, 1, 4, 3]}) + "\n" for row in each))
    config = config_of(path, "plackett_luce", **{"data.clean": "same_responses"})
    report = inspect_data.inspect(config, tmp_path / "groups")
    assert report["stages"]["training"][-1]["after"] == 12
    # The best is the longest but one, the worst the shortest.
    assert report["length_bias"]["characters"]["longer"] == 12
    page = (tmp_path / "groups" / "data.html").read_text()
    written = re.sub("<[^>]*>", "", page).replace("·", " ")
    assert all(f"{text} 0" in written for text in texts)
    every = inspect_data.inspect(config_of(path, **{"data.pairs": "all"}), tmp_path / "pairs")
    assert every["stages"]["training"][-1]["after"] == 72
