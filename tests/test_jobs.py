"""Jobs of several stages: each stage is what its own command would do."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from prefalign_jax import jobs, processes
from prefalign_jax.experiment import read
from prefalign_jax.jobs import JOBS, on_policy
from prefalign_jax.train import train
from prefalign_jax.types import UserError
from test_train import TRL, column, config_of

FIELDS = {"job": "sft_first", "sft.epochs": 0.2, "sft.learning_rate": 1e-3, "steps": 2, "learning_rate": 1e-3}


@pytest.mark.everything
def test_sft_then_dpo_is_the_two_runs_one_after_the_other(light_runs, tmp_path):
    assert JOBS["sft_first"](config_of(**FIELDS), tmp_path / "job") == 0
    train(config_of("sft", **{"epochs": 0.2, "steps": None, "learning_rate": 1e-3}), tmp_path / "sft")
    path = str(tmp_path / "sft" / "export")
    train(config_of(**{"steps": 2, "learning_rate": 1e-3, "model.path": path}), tmp_path / "dpo")
    for ours, alone in (("sft", "sft"), ("aligned", "dpo")):
        np.testing.assert_array_equal(column(tmp_path / "job" / ours), column(tmp_path / alone))
    assert column(tmp_path / "job" / "aligned")[0] == pytest.approx(np.log(2), abs=1e-5)
    weights = load_file(tmp_path / "job" / "aligned" / "export" / "model.safetensors")
    assert any(np.any(weights[name] != value) for name, value in load_file(TRL / "model.safetensors").items())
    assert json.loads((tmp_path / "job" / "sft" / "config.json").read_text())["loss"]["name"] == "sft"


def test_a_stopped_first_stage_stops_the_job(tmp_path, monkeypatch):
    calls = []

    class Stopped:
        stopped = True

    monkeypatch.setattr(jobs, "train", lambda config, workdir: calls.append(workdir) or Stopped())
    assert JOBS["sft_first"](config_of(**FIELDS), tmp_path) == processes.STOPPED
    assert calls == [tmp_path / "sft"]


@pytest.mark.parametrize(
    "metric, first",
    [("eval/rewards/accuracies", None), ("eval/rewards/margins", None), ("eval/loss", "eval/loss"),
     ("samples/reward", "samples/reward")],
)  # fmt: skip
def test_the_first_stage_is_chosen_by_what_it_measures_and_pushes_nothing(metric, first, tmp_path, monkeypatch, capsys):
    configs = []

    class Done:
        stopped = False

    monkeypatch.setattr(jobs, "train", lambda config, workdir: configs.append(config) or Done())
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    evaluated = {"data.eval_fraction": 0.2, "eval_steps": 1, "export.push_to": "me/model"}
    if first != metric:
        evaluated["export.checkpoint"] = "best"
    if metric.startswith("samples/"):
        evaluated |= {"samples.prompts": "p.jsonl", "samples.reward": "length"}
    for name in ("early_stopping.metric", "checkpoint.best_metric"):
        configs.clear()
        assert JOBS["sft_first"](config_of(**FIELDS, **evaluated, **{name: metric}), tmp_path) == 0
        fields = [read(config).fields for config in configs]
        assert [one["checkpoint.best_metric"] for one in fields] == [first, metric]
        assert [one["export.push_to"] for one in fields] == [None, "me/model"]
        assert (f"does not measure {metric}" in capsys.readouterr().err) is (first != metric)
        assert first == metric or fields[0]["export.checkpoint"] == "last"


def test_the_last_of_several_rounds_alone_is_pushed(tmp_path, monkeypatch):
    configs = []

    class Done:
        stopped = False

    def made(config, path, directory, seed):
        directory.mkdir(parents=True)
        (directory / on_policy.MADE).write_text("{}")
        return directory / on_policy.PAIRS

    monkeypatch.setattr(on_policy, "make_pairs", made)
    monkeypatch.setattr(on_policy, "train", lambda config, workdir: configs.append(config) or Done())
    fields = {"job": "rounds", "data.path": None, "on_policy.prompts": "p.jsonl", "on_policy.rounds": 3}
    assert (
        JOBS["rounds"](config_of(**fields, **{"samples.reward": "length", "export.push_to": "me/model"}), tmp_path) == 0
    )
    assert [config.export.push_to for config in configs] == [None, None, "me/model"]


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"sft.epochs": 1.0}, "sft.epochs=1.0 and job='train' do not fit"),
        ({"job": "sft_first"}, "sft.epochs=None and job='sft_first' do not fit"),
        ({**FIELDS, "sft.learning_rate": -1.0}, "sft.learning_rate=-1.0 must be positive"),
    ],
)
def test_the_first_stages_fields_are_for_that_job_alone(fields, says):
    with pytest.raises(UserError, match=says):
        read(config_of(**fields))
