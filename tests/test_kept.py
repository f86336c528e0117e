"""What a run keeps: checkpoints that can be exported, and a history of what changed when it was resumed."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from conftest import longer
from prefalign_jax import checkpoint
from prefalign_jax.callbacks import Callbacks
from prefalign_jax.kept import export_kept, load_kept
from prefalign_jax.train import train
from prefalign_jax.types import UserError
from test_train import TRL, column, config_of, rows

FIELDS = {"steps": 4, "eval_steps": 2, "save_steps": 2, "data.eval_fraction": 0.2}
FIELDS |= {
    "checkpoint.best_metric": "eval/logps/chosen",
    "checkpoint.best_mode": "min",
    "checkpoint.keep": 3,
    "data.limit": 24,
}
pytestmark = pytest.mark.usefixtures("light_runs")


@pytest.fixture(scope="module")
def finished(light_runs, tmp_path_factory):
    """A run of 4 steps whose checkpoints of steps 2 and 4 are kept."""
    workdir = tmp_path_factory.mktemp("finished") / "tiny"
    train(config_of(**FIELDS), workdir)
    return workdir


def checkpoint_config(workdir, step):
    config = load_kept(workdir, step).experiment.config
    return config.learning_rate, config.micro_steps, config.steps


def exported(directory):
    return load_file(directory / "model.safetensors")


@pytest.mark.everything
def test_any_kept_checkpoint_is_exported(finished, tmp_path):
    last = exported(finished / "export")
    again = exported(export_kept(finished, "last", tmp_path / "last"))
    earlier = exported(export_kept(finished, "2", tmp_path / "two"))
    for name, value in last.items():
        np.testing.assert_array_equal(again[name], value)
    assert any(np.any(earlier[name] != value) for name, value in last.items())
    values = {row["step"]: row["eval/logps/chosen"] for row in rows(finished / "eval.jsonl") if row["step"]}
    best = exported(export_kept(finished, "best", tmp_path / "best"))
    wanted = earlier if min(values, key=values.get) == 2 else last
    np.testing.assert_array_equal(best["model.embed_tokens.weight"], wanted["model.embed_tokens.weight"])
    assert (tmp_path / "two" / "README.md").read_text().split("\n# ")[1].startswith("tiny")


@pytest.mark.parametrize(
    ("which", "says"), [("3", "there is no checkpoint '3'; .* has 2, 4"), ("first", "there is no checkpoint 'first'")]
)
def test_what_is_not_kept_is_not_exported(which, says, finished):
    with pytest.raises(UserError, match=says):
        export_kept(finished, which)


def test_a_run_exports_the_checkpoint_that_it_is_told_to(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    train(config_of(**FIELDS, **{"export.checkpoint": "2"}), tmp_path / "run")
    found, wanted = exported(tmp_path / "run" / "export"), exported(export_kept(finished, "2", tmp_path / "two"))
    np.testing.assert_array_equal(found["lm_head.weight"], wanted["lm_head.weight"])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"steps": 3, "learning_rate": 5e-4}, "and 3 are asked for"),
        ({"learning_rate": 5e-4, "schedule": "cosine"}, "and no step is left for another learning_rate, schedule"),
    ],
)
def test_a_finished_run_is_left_as_it_is_where_what_is_asked_for_cannot_be(fields, says, finished, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    result = train(config_of(**{**FIELDS, **fields}), finished)
    assert (result.step, result.stopped) == (4, False)
    said = capsys.readouterr().err
    assert f"trained to step 4 already, {says}" in said and said.endswith("it is left as it is\n")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.everything
def test_the_best_is_best_of_all_evaluations_however_a_run_was_stopped(tmp_path, capfd):
    def stop(step, metrics):
        if step == 1:  # step 2, at which an evaluation is due, is running by then
            os.kill(os.getpid(), signal.SIGTERM)

    # The first checkpoint is the best by far, and the start is better still.
    fields = FIELDS | {"checkpoint.best_mode": "max", "learning_rate": 0.3, "export.checkpoint": "best"}
    assert train(config_of(**fields), tmp_path, callbacks=Callbacks(on_step=stop)).stopped
    with pytest.raises(UserError, match="its evaluations had data.eval_limit=None, not 2, .* compares all of them"):
        train(config_of(**fields, **{"data.eval_limit": 2}), tmp_path)
    train(config_of(**fields), tmp_path)
    values = {row["step"]: row["eval/logps/chosen"] for row in rows(tmp_path / "eval.jsonl")}
    assert values[0] > values[2] > values[4]
    assert (
        "the checkpoint of step 2 is exported: eval/logps/chosen was best before the first step"
        in capfd.readouterr().err
    )
    found, wanted = exported(tmp_path / "export"), exported(export_kept(tmp_path, "2"))
    np.testing.assert_array_equal(found["lm_head.weight"], wanted["lm_head.weight"])
    assert f"{values[2]:.6g}" in (tmp_path / "export" / "README.md").read_text()


@pytest.mark.everything
def test_what_changes_when_a_run_goes_on_is_said_and_kept(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    train(config_of(**{**FIELDS, "steps": 6, "learning_rate": 5e-4, "micro_steps": 2}), workdir)
    said = capsys.readouterr().err
    assert "resumed with other values: " in said
    assert all(words in said for words in ("steps 4 -> 6", "learning_rate 0.001 -> 0.0005", "micro_steps 1 -> 2"))
    wanted = [{"step": 4, "changed": {"learning_rate": [1e-3, 5e-4], "micro_steps": [1, 2], "steps": [4, 6]}}]
    assert rows(workdir / "history.jsonl") == json.loads((workdir / "config.json").read_text())["history"] == wanted
    assert "| 4 | learning_rate | 0.001 | 0.0005 |" in (workdir / "export" / "README.md").read_text()
    assert column(workdir)[:4] == column(finished)
    again = config_of(**{**FIELDS, "steps": 7, "learning_rate": 5e-4, "micro_steps": 2, "export.enabled": False})
    train(again, workdir)
    wanted.append({"step": 6, "changed": {"steps": [6, 7]}})
    assert rows(workdir / "history.jsonl") == wanted
    card = (export_kept(workdir, "last", tmp_path / "last") / "README.md").read_text()
    assert "| 6 | steps | 6 | 7 |" in card and "| 4 | steps | 4 | 6 |" in card
    told = {step: checkpoint_config(workdir, step) for step in ("4", "6", "7")}
    assert told == {"4": (1e-3, 1, 4), "6": (5e-4, 2, 6), "7": (5e-4, 2, 7)}  # as it was when each was saved
    with pytest.raises(UserError, match="trained with data.shuffle=False, not True"):
        train(config_of(**{**FIELDS, "data.shuffle": True}), workdir)


@pytest.mark.parametrize(("steps", "says"), [longer(1, "is 0 in the only step"), (2, "rises to the end of the run")])
def test_a_warm_up_as_long_as_the_run_is_told(steps, says, tmp_path, capsys):
    fields = {"steps": steps, "warmup_steps": steps, "data.limit": 8, "export.enabled": False}
    train(config_of(**fields), tmp_path)
    assert f"the learning rate {says}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("datasheet.json", "{}", "datasheet.json: it is no datasheet"),
        ("datasheet.json", '{"training": 5, "read": 5}', "datasheet.json: it is no datasheet"),
        ("config.json", '{"loss": {"name": "dpo"}, "model": 5}', "config.json is no run's"),
    ],
)
def test_a_runs_files_of_another_form_are_one_line(file, text, says, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / file).write_text(text)
    with pytest.raises(UserError, match=says):
        export_kept(tmp_path / "run", "last")


@pytest.mark.parametrize("changed", ['{"steps": 5}', '{"steps": [1, 2, 3]}', "[]"])
def test_a_history_of_another_form_is_one_line(changed, tmp_path):
    (tmp_path / "history.jsonl").write_text(f'{{"step": 2, "changed": {changed}}}\n')
    with pytest.raises(UserError, match="history.jsonl, row 1, field 'changed'.*: expected"):
        checkpoint.read_changes(tmp_path, 9)


def test_time_saves_soon_and_then_at_most_ten_minutes_apart(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    timer, saved = checkpoint.Timer(None), []
    for now[0] in np.arange(100.0, 4000.0):
        if timer.due(True):
            timer.saved()
            saved.append(now[0] - 100)
    assert saved[:3] == [10, 30, 70] and max(np.diff(saved)) == 600
    assert not checkpoint.Timer(5).due(True)


def other_base(directory, permute=False, **config):
    shutil.copytree(TRL, directory)
    fields = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(fields))
    if permute:
        fields = json.loads((directory / "tokenizer.json").read_text())
        vocabulary = fields["model"]["vocab"]  # the special tokens, the first three, stay
        fields["model"]["vocab"] = {text: i if i < 3 else 3 + (i - 2) % 509 for text, i in vocabulary.items()}
        (directory / "tokenizer.json").write_text(json.dumps(fields))
    return str(directory)


def test_a_reference_is_compared_by_what_it_computes(tmp_path):
    fields = {"steps": 1, "data.limit": 8, "export.enabled": False}
    train(
        config_of(**fields, **{"reference.path": other_base(tmp_path / "a", initializer_range=0.5)}), tmp_path / "run"
    )
    assert abs(column(tmp_path / "run")[0] - np.log(2)) < 1e-6
    with pytest.raises(UserError, match="another tokenizer than model.path"):
        train(config_of(**fields, **{"reference.path": other_base(tmp_path / "b", permute=True)}), tmp_path / "other")
    with pytest.raises(UserError, match="eps=0.1 where model.path has"):
        train(config_of(**fields, **{"reference.path": other_base(tmp_path / "c", rms_norm_eps=0.1)}), tmp_path / "new")
