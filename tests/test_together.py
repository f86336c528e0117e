"""Runs as members of one program: each directory is as of the run alone; killed and resumed, bit for bit."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from prefalign_jax import together, trackers, train
from prefalign_jax.config import defaults
from prefalign_jax.members import FAILED
from prefalign_jax.together import train_together
from prefalign_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
TRL = ROOT / "tests" / "goldens" / "trl"
POINTS = [
    {"seed": 0, "loss.beta": 0.1, "learning_rate": 3e-4},
    {"seed": 1, "loss.beta": 0.5, "learning_rate": 1e-4, "data.flip_labels": 0.2, "warmup_steps": 2},
]
pytestmark = pytest.mark.usefixtures("light_runs")


def config_of(**fields):
    c = defaults("dpo")
    c.model.path, c.data.path = str(TRL), str(TRL / "pairs.jsonl")
    c.update(dict(batch_size=4, steps=6, max_length=128, log_steps=1, eval_steps=2, save_steps=2, tensorboard=False))
    c.data.eval_fraction, c.data.eval_seed, c.data.eval_limit = 0.3, 0, 8
    c.samples.update(dict(prompts=str(TRL / "pairs.jsonl"), limit=3, max_new_tokens=8, reward="more_words"))
    c.update_from_flattened_dict(fields)
    return c


@pytest.fixture(autouse=True, scope="module")
def one_device():
    made = train.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, together):
            patch.setattr(module, "make_mesh", lambda sizes: made(sizes, jax.devices()[:1]))
        yield


def points_of(directory, points=POINTS, **fields):
    return [(config_of(**{**point, **fields}), directory / f"p{number}") for number, point in enumerate(points)]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("together")
    assert train_together(points_of(directory)) is False
    return directory


@pytest.mark.everything
def test_each_directory_is_as_of_the_run_alone(undisturbed, tmp_path):
    for number, point in enumerate(POINTS):
        ours, theirs = undisturbed / f"p{number}", tmp_path / f"p{number}"
        train.train(config_of(**point), theirs)
        files = [{str(file.relative_to(d)) for file in d.rglob("*") if file.is_file()} for d in (ours, theirs)]
        assert {name for name in files[0] ^ files[1] if not name.startswith("checkpoints/")} == set()
        assert {p.name for p in (ours / "checkpoints").iterdir()} == {
            p.name for p in (theirs / "checkpoints").iterdir()
        }
        for name in ("config.json", "datasheet.json"):
            assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text())
        for name in ("metrics.jsonl", "eval.jsonl"):
            for one, other in zip(rows(ours / name), rows(theirs / name), strict=True):
                assert one.keys() == other.keys() and one["step"] == other["step"]
                for key in one:
                    if key in ("loss", "grad_norm", "learning_rate") or key.startswith(("eval/", "samples/")):
                        np.testing.assert_allclose(one[key], other[key], rtol=1e-5, atol=1e-5, err_msg=key)
        for name in sorted(files[0]):
            if name.startswith("samples/"):
                assert rows(ours / name) == rows(theirs / name)
        one, other = (load_file(d / "export" / "model.safetensors") for d in (ours, theirs))
        for name in one:
            np.testing.assert_allclose(one[name], other[name], atol=1e-4, rtol=0)


def assert_same(one, other, numbers=(0, 1)):
    for number in numbers:
        for name in ("loss", "grad_norm"):
            columns = [[row[name] for row in rows(d / f"p{number}" / "metrics.jsonl")] for d in (one, other)]
            assert columns[0] == columns[1]
        assert rows(one / f"p{number}" / "eval.jsonl") == rows(other / f"p{number}" / "eval.jsonl")
        a, b = (load_file(d / f"p{number}" / "export" / "model.safetensors") for d in (one, other))
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


class Cut(BaseException):
    """What no part of a run catches."""


def cut(monkeypatch, at, points):
    """Ends a program when the metrics of a step are read, while the next one runs."""

    class Log(together.Log):
        def flush(self):
            if self.waiting and self.waiting[0] == at:
                raise Cut
            super().flush()

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(together, "Log", Log)
        train_together(points)


@pytest.mark.everything
def test_cut_off_it_goes_on_bit_for_bit_from_what_all_have(undisturbed, tmp_path, monkeypatch, capfd):
    cut(monkeypatch, 5, points_of(tmp_path))
    shutil.rmtree(tmp_path / "p1" / "checkpoints" / "4")  # as if it had not been written yet
    assert train_together(points_of(tmp_path)) is False
    assert "resumed at step 2" in capfd.readouterr().err
    assert_same(tmp_path, undisturbed)
    assert train_together(points_of(tmp_path)) is False  # there is nothing left to do
    assert_same(tmp_path, undisturbed)


@pytest.mark.everything
def test_one_that_diverges_is_stopped_and_the_others_are_what_they_were(undisturbed, tmp_path, monkeypatch, capfd):
    points = [POINTS[0], {**POINTS[1], "learning_rate": 1e38}]
    cut(monkeypatch, 5, points_of(tmp_path, points))
    failed = json.loads((tmp_path / "p1" / FAILED).read_text())
    assert failed["step"] <= 4 and "diverged at step" in failed["error"]
    assert "the others go on" in capfd.readouterr().err
    assert train_together(points_of(tmp_path, points)) is False
    assert "resumed at step 4" in capfd.readouterr().err
    assert_same(tmp_path, undisturbed, [0])
    assert rows(tmp_path / "p1" / "metrics.jsonl")[-1]["step"] == failed["step"]
    assert not (tmp_path / "p1" / "export").exists()


@pytest.mark.everything
def test_one_that_cannot_be_evaluated_stops_no_other(undisturbed, tmp_path, monkeypatch):
    evaluated = train.Run.evaluated

    def fails(self, step, means):
        if self.workdir.name == "p1" and step == 4:
            raise UserError("this metric has no number")
        return evaluated(self, step, means)

    monkeypatch.setattr(train.Run, "evaluated", fails)
    assert train_together(points_of(tmp_path)) is False
    assert json.loads((tmp_path / "p1" / FAILED).read_text()) == {"step": 4, "error": "this metric has no number"}
    assert_same(tmp_path, undisturbed, [0])


@pytest.mark.everything
def test_told_to_stop_it_saves_all_and_goes_on_and_so_does_each_alone(undisturbed, tmp_path, monkeypatch):
    class Log(together.Log):
        def flush(self):
            if self.waiting and self.waiting[0] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            super().flush()

    with monkeypatch.context() as patch:
        patch.setattr(together, "Log", Log)
        assert train_together(points_of(tmp_path)) is True
    assert [max(int(p.name) for p in (tmp_path / f"p{n}" / "checkpoints").iterdir()) for n in (0, 1)] == [3, 3]
    shutil.copytree(tmp_path, tmp_path / "alone")
    assert train_together(points_of(tmp_path)) is False
    assert_same(tmp_path, undisturbed)
    result = train.train(config_of(**POINTS[1]), tmp_path / "alone" / "p1")
    wanted = load_file(tmp_path / "p1" / "export" / "model.safetensors")
    ours = load_file(tmp_path / "alone" / "p1" / "export" / "model.safetensors")
    assert result.step == 6
    for name, value in wanted.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-4, rtol=0)


@pytest.mark.everything
def test_adapters_of_all_members_lie_over_one_base(tmp_path):
    fields = {"lora.rank": 2, "steps": 2, "save_steps": None, "eval_steps": None, "warmup_steps": 0}
    points = [{"seed": 0, "learning_rate": 1e-2}, {"seed": 3, "learning_rate": 2e-2}]
    train_together(points_of(tmp_path, points, **fields))
    train.train(config_of(**points[1], **fields), tmp_path / "alone")
    for one, other in zip(*(rows(tmp_path / d / "eval.jsonl") for d in ("p1", "alone")), strict=True):
        np.testing.assert_allclose(one["eval/loss"], other["eval/loss"], rtol=1e-5)
    one, other = (load_file(next((tmp_path / d).rglob("adapter_model.safetensors"))) for d in ("p1", "alone"))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5)


class Tracker:
    """In memory: the directory's name -> (its rows, whether it failed)."""

    runs = {}
    where = "in memory"

    def __init__(self, about, run):
        self.id = about.name
        self.rows = []

    def log(self, step, numbers):
        self.rows.append({"step": step, **numbers})

    def finish(self, failed):
        self.runs[self.id] = self.rows, failed


@pytest.mark.everything
def test_members_that_end_early_or_diverge_are_left_alone_and_averages_are_as_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "memory", Tracker)
    monkeypatch.setattr(together, "check_installed", lambda names: None)
    fields = {"early_stopping.metric": "eval/loss", "early_stopping.patience": 1, "early_stopping.min_delta": 1e-3}
    fields |= {"ema.decay": 0.5, "log_to": "memory", "warmup_steps": 0}
    points = [{"learning_rate": rate, "seed": 1} for rate in (1e-6, 3e-4, 1e38)]
    train_together(points_of(tmp_path, points, **fields))
    evaluated = [{row["step"]: row for row in rows(tmp_path / f"p{n}" / "eval.jsonl")} for n in range(3)]
    assert [max(steps) for steps in evaluated[:2]] == [2, 6]  # one ends early, the other does not

    def sampled(n):
        files = (tmp_path / f"p{n}" / "samples").iterdir()
        return {int(file.stem): file.read_bytes() for file in files}

    before = [sampled(n) for n in range(3)]
    assert [sorted(files) for files in before] == [sorted(steps) for steps in evaluated]
    for n in range(3):
        sent, failed = Tracker.runs[f"p{n}"]
        assert failed == (n == 2)
        assert [row for row in sent if "eval/loss" in row] == [*evaluated[n].values()]
    alone = train.train(config_of(**points[1], **fields | {"log_to": None}), tmp_path / "alone")
    for name, value in alone.after.items():
        assert evaluated[1][6][name] == pytest.approx(value, rel=1e-4, abs=1e-4)
    train_together(points_of(tmp_path, points, **fields))  # what has ended is evaluated again at its own step
    assert [row["step"] for row in rows(tmp_path / "p0" / "eval.jsonl")] == [0, 2]
    assert [sampled(n) for n in range(3)] == before


def test_runs_that_differ_in_more_than_numbers_are_refused(tmp_path):
    for fields in ({"batch_size": 8}, {"loss.reference_free": True, "reference.kind": "none"}, {"lora.rank": 2}):
        with pytest.raises(UserError, match="cannot be members of one program"):
            train_together(points_of(tmp_path, [{}, fields]))


KILLED = """
import pathlib, sys
sys.path.insert(0, "tests")
import test_together as t  # which asks for eight devices, where a program takes one
made = t.train.make_mesh
t.together.make_mesh = lambda sizes: made(sizes, t.jax.devices()[:1])
t.train_together(t.points_of(pathlib.Path(sys.argv[1])))
"""


@pytest.mark.everything
@pytest.mark.parametrize("share", [0.7])
def test_killed_at_any_moment_it_goes_on_bit_for_bit(share, tmp_path):
    command = [sys.executable, "-c", KILLED]
    options = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, **options)
    took = time.monotonic() - began
    with subprocess.Popen([*command, str(tmp_path / "killed")], **options) as process:
        time.sleep(share * took)
        process.kill()
    subprocess.run([*command, str(tmp_path / "killed")], check=True, **options)
    assert_same(tmp_path / "killed", tmp_path / "whole")
