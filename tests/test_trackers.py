"""A tracker gets what the run's own files have, each step once, whatever the run or the tracker goes through."""

import contextlib
import json
import struct
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


def run(workdir, *, start=0, stop=4, value=1.0, changed=False, failed=False, names=("fake", "other"), params=PARAMS):
    """A part of a run: evaluations at even steps, a line at every step, in its files and in its trackers."""
    rows = {name: metrics.whole_rows(workdir / f"{name}.jsonl") for name in ("metrics", "eval")}
    opened = open_trackers(names, About(workdir, params), rows, start, changed)
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


# The real clients, without a network: what is in their files


def by_step(pairs):
    """{step: {name: number}} of (step, {name: number})."""
    out = {}
    for step, numbers in pairs:
        out.setdefault(step, {}).update(numbers)
    return out


def records(path):
    """The records of a .wandb file: in blocks of 32 KiB, in parts of a checksum, a length and a kind each."""
    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        left = 2**15 - at % 2**15
        if left < 7:  # no part begins here
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def in_wandb(workdir):
    from wandb.proto.wandb_internal_pb2 import Record

    def values_of(items):
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    rows, params = [], {}
    for path in sorted(workdir.glob("wandb/offline-run-*/run-*.wandb")):
        assert path.stem == f"run-{json.loads((workdir / KEPT).read_text())['wandb']}"
        assert SECRET.encode() not in path.read_bytes()
        for record in map(Record.FromString, records(path)):
            values = values_of(record.history.item)
            rows += [(values["_step"], {name: x for name, x in values.items() if name[0] != "_"})] if values else []
            params |= values_of([*record.config.update, *record.run.config.update])
    return rows, params


def in_trackio(workdir):
    import sqlite3

    with contextlib.closing(sqlite3.connect(workdir / "trackio" / f"{trackers.PROJECT}.db")) as database:
        found = database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
        ((run, params),) = database.execute("SELECT run_id, config FROM configs").fetchall()
    assert {row[0] for row in found} == {run} == {json.loads((workdir / KEPT).read_text())["trackio"]}
    return [(step, json.loads(text)) for _, step, text in found], json.loads(params)


def in_mlflow(workdir):
    from mlflow import MlflowClient

    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name(trackers.PROJECT).experiment_id])
    assert found.info.run_id == json.loads((workdir / KEPT).read_text())["mlflow"] and found.info.status == "FINISHED"
    assert found.info.run_name == workdir.name and found.data.tags["group"] == workdir.parent.name
    points = [p for name in found.data.metrics for p in client.get_metric_history(found.info.run_id, name)]
    return [(point.step, {point.key: point.value}) for point in points], found.data.params


CLIENTS = {"wandb": in_wandb, "trackio": in_trackio, "mlflow": in_mlflow}
SECRET = "nobody-should-see-this"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CLIENTS)
def test_the_files_of_a_real_client_have_every_metric_once_after_a_kill(name, tmp_path, monkeypatch):
    workdir = tmp_path / "runs" / "mine"
    workdir.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prefalign", f"--config.data.path=https://me:{SECRET}@there.org"])
    for variable, value in {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(workdir / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }.items():
        monkeypatch.setenv(variable, value)
    pytest.importorskip(name)  # trackio reads its variable then
    params = {**PARAMS, "data.path": f"https://me:{SECRET}@there.org", **{f"field {n}": n for n in range(150)}}
    for start, stop in ((0, 4), (2, 7)):  # killed after step 4 with a checkpoint of step 2
        run(workdir, start=start, stop=stop, names=[name], params=params)
    rows, told = CLIENTS[name](workdir)
    assert by_step(rows) == by_step(files(workdir))
    assert sum(map(len, (numbers for _, numbers in rows))) == sum(map(len, by_step(files(workdir)).values()))
    assert {"loss.name", "loss.beta", "field 149"} <= told.keys() and "grad_clip" not in told
    assert told["data.path"] == "https://there.org" and float(told["loss.beta"]) == 0.1
    assert SECRET not in "".join(str(value) for value in told.values())
