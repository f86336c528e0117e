"""Jobs of several stages: each stage is what its own command would do."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from prefalign_jax import jobs, processes
from prefalign_jax.experiment import read
from prefalign_jax.jobs import JOBS
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
