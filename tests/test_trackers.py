"""A tracker gets what the run's own files have, each step once, whatever the run or the tracker goes through."""

import json
import sys

import pytest

from prefalign_jax import metrics, trackers
from prefalign_jax.trackers import KEPT, About, check_installed, open_trackers
from prefalign_jax.types import UserError

PARAMS = {"loss.name": "dpo", "loss.beta": 0.1, "grad_clip": None, "data.path": "https://me:pass@there.org/pairs.jsonl"}


class Fake:
    """A tracker in memory: {id: {"params": ..., "rows": [(step, numbers)], "ended": ...}}."""

    runs = {}
    broken = ()  # what fails: an id, "begin" or "log"

    def __init__(self, about, run):
        if "begin" in self.broken or run in self.broken:
            raise ConnectionError("https://me:pass@there.org does not answer")
        self.id = run or f"run {len(self.runs) + 1}"
        self.where = "in memory"
        self.runs.setdefault(self.id, {"rows": []})["params"] = about.params

    def log(self, step, numbers):
        if "log" in self.broken:
            raise ConnectionError("no route to host")
        self.runs[self.id]["rows"].append((step, numbers))

    def finish(self, failed):
        self.runs[self.id]["ended"] = failed


@pytest.fixture
def fake(monkeypatch):
    """A tracker `fake` beside one that never fails, `other`."""
    kinds = {name: type(name, (Fake,), {"runs": {}}) for name in ("fake", "other")}
    monkeypatch.setattr(trackers, "TRACKERS", kinds)
    return kinds["fake"]


def run(workdir, *, start=0, stop=4, value=1.0, changed=False, failed=False):
    """A part of a run: evaluations at even steps, a line at every step, in its files and in its trackers."""
    rows = {name: metrics.whole_rows(workdir / f"{name}.jsonl") for name in ("metrics", "eval")}
    opened = open_trackers(["fake", "other"], About(workdir, PARAMS), rows, start, changed)
    train, held_out = (metrics.open_writer(workdir, n, resume_step=start, trackers=opened) for n in ("metrics", "eval"))
    if start == 0:
        held_out.write(0, {"eval/loss": value})
    for step in range(start + 1, stop + 1):
        train.write(step, {"loss": value * step, "grad_norm": float("nan"), "tokens": 7})
        if step % 2 == 0:
            held_out.write(step, {"eval/loss": value * step})
    train.close()
    held_out.close()
    opened.close(failed)


def files(workdir):
    """What the files of a run have, in order of the steps: [(step, numbers)]."""
    lines = [line for name in ("metrics", "eval") for line in (workdir / f"{name}.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in lines]
    pairs = [(row.pop("step"), {name: x for name, x in row.items() if x is not None}) for row in rows]
    return sorted(pairs, key=lambda pair: pair[0])


def test_every_metric_of_the_files_is_sent_once_in_order_with_the_config(fake, tmp_path):
    run(tmp_path)
    ((name, told),) = fake.runs.items()
    assert told["rows"] == files(tmp_path) and not told["ended"]
    assert told["params"] == {"loss.name": "dpo", "loss.beta": 0.1, "data.path": "https://there.org/pairs.jsonl"}
    assert json.loads((tmp_path / KEPT).read_text()) == {"fake": name, "other": "run 1"}


@pytest.mark.parametrize("stopped", [2, 4], ids=["stopped", "killed after its checkpoint"])
def test_a_resumed_run_goes_on_in_the_same_run_and_sends_no_step_twice(fake, tmp_path, stopped):
    run(tmp_path, stop=stopped, failed=True)
    assert fake.runs["run 1"]["ended"]
    run(tmp_path, start=2, stop=6)
    ((_, told),) = fake.runs.items()
    assert told["rows"] == files(tmp_path) and [step for step, _ in told["rows"]] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_with_other_values_the_run_goes_on_unless_steps_are_done_again(fake, tmp_path):
    run(tmp_path, stop=2)
    run(tmp_path, start=2, stop=4, value=2.0, changed=True)
    assert [*fake.runs] == ["run 1"] and fake.runs["run 1"]["rows"] == files(tmp_path)
    run(tmp_path, start=2, stop=4, value=3.0, changed=True)
    assert [*fake.runs] == ["run 1", "run 2"] and fake.runs["run 2"]["rows"] == files(tmp_path)
    run(tmp_path, value=4.0)  # from the start, as nothing was saved
    assert [*fake.runs] == ["run 1", "run 2", "run 3"] and fake.runs["run 3"]["rows"] == files(tmp_path)


def test_a_tracker_that_fails_is_told_of_once_and_catches_up_in_another_run(fake, tmp_path, capfd):
    fake.broken = ("log",)
    run(tmp_path)
    said = [line for line in capfd.readouterr().err.splitlines() if "no route to host" in line]
    assert said == [f"fake: no route to host; {trackers.WITHOUT}"]
    assert json.loads((tmp_path / KEPT).read_text()) == {"other": "run 1"}
    fake.broken = ()
    run(tmp_path, start=4, stop=6)
    assert fake.runs["run 2"]["rows"] == files(tmp_path)
    (tmp_path / KEPT).unlink()
    rows = {name: metrics.whole_rows(tmp_path / f"{name}.jsonl") for name in ("metrics", "eval")}
    opened = open_trackers(["fake"], About(tmp_path, PARAMS), rows, 6)
    opened.write("eval", 6, rows["eval"][-1])  # as a complete run does, which makes its last evaluation again
    opened.close()
    assert fake.runs["run 3"]["rows"] == files(tmp_path)
    other = trackers.TRACKERS["other"].runs
    assert [*other] == ["run 1"] and other["run 1"]["rows"] == files(tmp_path)


def test_a_tracker_that_cannot_begin_stops_a_run_at_its_start_alone(fake, tmp_path, capfd):
    run(tmp_path, stop=2)
    fake.broken = ("begin",)
    with pytest.raises(UserError, match="log_to=fake: https://there.org does not answer; .*leave it out"):
        run(tmp_path)
    run(tmp_path, start=2)
    said = capfd.readouterr().err
    assert "fake: it cannot go on with run run 1" in said and f"does not answer; {trackers.WITHOUT}" in said
    fake.broken = ("run 1",)  # which somebody has deleted
    run(tmp_path, start=4, stop=6)
    assert fake.runs["run 2"]["rows"] == files(tmp_path)


def test_a_client_that_is_not_there_is_said(monkeypatch):
    for name in ("wandb", "trackio", "mlflow", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("wandb", "trackio", "mlflow", "tensorboard"):
        with pytest.raises(UserError, match=rf"log_to={name}.* not installed: pip install 'prefalign_jax\[{name}\]'"):
            check_installed([name])
