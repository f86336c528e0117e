import csv
import fcntl
import io
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from conftest import FAST_TO_COMPILE, longer
from prefalign_jax import processes
from prefalign_jax.analysis import sweep
from prefalign_jax.analysis.sweep import Point, names_of, progress_of, read_grid, read_points, results, run_sweep
from prefalign_jax.files import locked
from prefalign_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
TRL = pathlib.Path(__file__).parent / "goldens" / "trl"
STEPS = 8

# Stands for the training script: a step is a line in work.txt, which is also its checkpoint.
FAKE = """
import json, os, pathlib, signal, sys, time
options = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
workdir, pause = pathlib.Path(options["workdir"]), float(options.get("pause", 0.01))
def log(name, text):
    with (workdir / name).open("a") as file:
        file.write(text + "\\n")
log("starts.txt", str(time.monotonic()))
log("device.txt", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
signal.signal(signal.SIGTERM, lambda *_: (log("ends.txt", str(time.monotonic())), os._exit(143)))
if "fail" in options and not (workdir / "mended").exists():
    print("working on it")
    if options["fail"] == "Killed":
        sys.exit("Killed")
    sys.exit("error: " + options["fail"] + "\\nand more")
(workdir / "part").write_text(json.dumps({"steps": 8, "batch_size": 4, "seed": 0}))
(workdir / "part").replace(workdir / "config.json")  # whole or not there, as a run writes it
work = workdir / "work.txt"
for step in range(len(work.read_text().split()) if work.exists() else 0, 8):
    time.sleep(pause)
    log("metrics.jsonl", json.dumps({"step": step + 1, "loss": 1.0 / (step + 1), "step_time": 0.5,
                                     "trained_tokens_per_second": 20.0}))
    log("work.txt", str(step))
if not (workdir / "eval.jsonl").exists():
    log("eval.jsonl", json.dumps({"step": 0, "eval/loss": 0.7}) + "\\n" + json.dumps({"step": 8, "eval/loss": 0.5}))
log("ends.txt", str(time.monotonic()))
"""


@pytest.fixture
def fake(tmp_path):
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return [sys.executable, "-S", str(path)]


def points_of(count, *arguments, **config):
    return [Point(f"p{n}", {"seed": n}, list(arguments), {"seed": n, **config}) for n in range(count)]


def go(points, workdir, command, **options):
    return run_sweep(points, workdir, command, poll=0.01, stream=io.StringIO(), **options)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def starts(workdir, points):
    return [len(lines(workdir / point.name / "starts.txt")) for point in points]


def assert_worked_once(workdir, points):
    """Every step of every point was taken exactly once and in order: nothing lost, twice, or by two at a time."""
    for point in points:
        assert lines(workdir / point.name / "work.txt") == [str(n) for n in range(STEPS)], point.name


# Running


def test_every_point_is_run_once_and_never_again(tmp_path, fake, capsys):
    points, workdir = points_of(3), tmp_path / "sweep"
    assert go(points, workdir, fake, jobs=2) == 0
    assert_worked_once(workdir, points)
    assert "3 of 3 points done, 0 failed" in capsys.readouterr().err
    assert go(points, workdir, ["no such program"]) == 0  # nothing is left to start
    assert starts(workdir, points) == [1, 1, 1]


def test_no_more_run_at_a_time_than_jobs_and_no_fewer(tmp_path, fake):
    points, workdir = points_of(5, "--pause=0.03"), tmp_path / "sweep"
    assert go(points, workdir, fake, jobs=2) == 0
    events = [
        (float(line), change)
        for point in points
        for name, change in (("starts", 1), ("ends", -1))
        for line in lines(workdir / point.name / f"{name}.txt")
    ]
    assert max(itertools.accumulate(change for _, change in sorted(events))) == 2


def test_each_device_has_one_run_at_a_time(tmp_path, fake, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    points, workdir = points_of(6, "--pause=0.02"), tmp_path / "sweep"
    assert go(points, workdir, fake, devices=["3", "5"]) == 0
    spans = []
    for point in points:
        device, start, end = (lines(workdir / point.name / f"{name}.txt")[0] for name in ("device", "starts", "ends"))
        spans.append((device, float(start), float(end)))
    spans.sort()
    assert {device for device, *_ in spans} == {"3", "5"}
    for (one, _, end), (other, start, _) in itertools.pairwise(spans):
        assert one != other or end < start
    assert go(points_of(1), tmp_path / "all", fake) == 0
    assert lines(tmp_path / "all" / "p0" / "device.txt") == [""]
    with pytest.raises(UserError, match="--devices=1,1 must name each device once"):
        go(points, workdir, fake, devices=["1", "1"])


def test_a_failed_point_says_why_stops_no_other_and_is_tried_again(tmp_path, fake, capsys):
    points, workdir = points_of(3), tmp_path / "sweep"
    points[1].arguments.append("--fail=the cat has it")
    assert go(points, workdir, fake) == 1
    err = capsys.readouterr().err
    assert f"p1 failed: the cat has it ({workdir / 'p1' / 'log.txt'})" in err
    assert "2 of 3 points done, 1 failed" in err
    (workdir / "p1" / "mended").touch()
    assert go(points, workdir, fake) == 0
    assert starts(workdir, points) == [1, 2, 1]
    assert_worked_once(workdir, points)


def test_the_error_is_of_this_start_not_of_an_earlier_one(tmp_path, fake, capsys):
    (point,) = points = points_of(1, "--fail=first")
    assert go(points, tmp_path / "sweep", fake) == 1
    point.arguments[0] = "--fail=Killed"
    assert go(points, tmp_path / "sweep", fake) == 1
    assert "p0 failed: Killed (" in capsys.readouterr().err


def test_told_to_stop_it_tells_the_runs_and_goes_on_later(tmp_path, fake, capsys):
    points, workdir = points_of(3, "--pause=0.1"), tmp_path / "sweep"

    def stop():
        while not lines(workdir / "p1" / "work.txt"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert go(points, workdir, fake, jobs=2) == processes.STOPPED
    thread.join()
    assert starts(workdir, points) == [1, 1, 0]
    assert all(lines(workdir / name / "ends.txt") for name in ("p0", "p1"))  # they were told, and saved
    assert all(len(lines(workdir / name / "work.txt")) < STEPS for name in ("p0", "p1"))
    assert capsys.readouterr().err.endswith("stopped; the same command goes on from there\n")
    assert go(points, workdir, fake, jobs=2) == 0
    assert_worked_once(workdir, points)


KILLED = """
import pathlib, sys
import jax
from prefalign_jax.analysis.sweep import read_points
from test_sweep import points_of, go
read_points("experiments/quickstart.py")
assert not jax._src.xla_bridge.backends_are_initialized()  # the runs need the accelerator's memory
go(points_of(6, "--pause=0.06"), pathlib.Path(sys.argv[1]), sys.argv[2:], jobs=2)
"""


def test_killed_at_any_moment_nothing_is_lost_and_nothing_is_done_twice(tmp_path, fake):
    """SIGKILL leaves its runs behind: the next sweep waits for them instead of starting a second beside each."""
    points, workdir = points_of(6, "--pause=0.06"), tmp_path / "sweep"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen([sys.executable, "-c", KILLED, str(workdir), *fake], env=env, cwd=ROOT) as process:
        try:
            while not lines(workdir / "p0" / "work.txt"):
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(np.random.default_rng().uniform(0, 1.4))
        finally:
            process.kill()
    before = starts(workdir, points)
    done = [
        json.loads((workdir / f"p{n}" / "point.json").read_text())["done"] if s else None for n, s in enumerate(before)
    ]
    assert go(points, workdir, fake, jobs=2) == 0
    assert_worked_once(workdir, points)
    after = starts(workdir, points)
    assert [a for a, mark in zip(after, done, strict=True) if mark] == [1] * sum(map(bool, done))
    assert max(after) <= 2 and [row["state"] for row in results(points, workdir)] == ["done"] * 6


def test_a_run_that_outlived_its_sweep_is_waited_for(tmp_path, fake):
    points, workdir = points_of(1), tmp_path / "sweep"
    (workdir / "p0").mkdir(parents=True)
    with (workdir / "p0" / sweep.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        seen = []
        timer = threading.Timer(0.3, lambda: (seen.extend(starts(workdir, points)), fcntl.flock(lock, fcntl.LOCK_UN)))
        timer.start()
        assert go(points, workdir, fake) == 0
    assert seen == [0] and starts(workdir, points) == [1]


def test_two_sweeps_in_one_directory_are_refused(tmp_path, fake):
    with locked(tmp_path / "sweep"), pytest.raises(UserError, match="another run is writing there"):
        go(points_of(1), tmp_path / "sweep", fake)


def test_a_point_that_was_another_is_refused(tmp_path, fake):
    workdir = tmp_path / "sweep"
    assert go(points_of(2, **{"loss.beta": 0.1}), workdir, fake) == 0
    with pytest.raises(UserError, match=re.escape("p0 was made with loss.beta=0.1, not 0.3; set it back")):
        go(points_of(2, **{"loss.beta": 0.3}), workdir, fake)
    assert go(points_of(3, **{"loss.beta": 0.1}), workdir, fake) == 0  # more points are no change
    assert starts(workdir, points_of(3)) == [1, 1, 1]


def test_points_that_left_the_sweep_are_mentioned(tmp_path, fake, capsys):
    go(points_of(3), tmp_path, fake)
    assert go(points_of(1), tmp_path, fake) == 0
    assert "2 other point(s)" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "results.json").read_text())) == 1


def test_jobs_must_be_positive(tmp_path, fake):
    with pytest.raises(UserError, match="--jobs=0"):
        go(points_of(1), tmp_path, fake, jobs=0)


# What is collected and shown


def test_results_are_a_row_a_point_from_its_files(tmp_path, fake):
    points = points_of(2)
    points[1].arguments.append("--fail=no")
    assert go(points, tmp_path, fake) == 1
    with (tmp_path / "results.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["name"], first["state"], first["seed"]) == ("p0", "done", "0")
    assert [float(first[name]) for name in ("steps", "seconds", "pairs", "trained_tokens")] == [8, 4.0, 32, 80.0]
    assert (first["eval/loss"], first["first/eval/loss"]) == ("0.5", "0.7")
    assert (second["state"], second["eval/loss"], second["steps"]) == ("unfinished", "", "")
    listed = json.loads((tmp_path / "results.json").read_text())
    assert listed[0]["eval/loss"] == 0.5 and listed[1] == {"name": "p1", "state": "unfinished", "seed": 1}
    assert not list(tmp_path.glob("*.tmp"))


def test_progress_is_read_from_the_stage_that_is_written_to(tmp_path):
    for number, (stage, row) in enumerate((("sft", {"step": 9}), ("dpo", {"step": 3, "loss": 0.5, "step_time": 2.0}))):
        (tmp_path / stage).mkdir()
        file = tmp_path / stage / "metrics.jsonl"
        file.write_text(json.dumps(row) + '\n{"step": 4, "lo')  # a line that is being written
        os.utime(file, (number, number))
        (tmp_path / stage / "config.json").write_text('{"steps": 10}')
    assert progress_of(tmp_path, "p", "running") == ("p", "running (dpo)", "3/10", "0.5000", "0:00:14")
    assert progress_of(tmp_path / "new", "p", "waiting") == ("p", "waiting", "", "", "")


def test_on_a_terminal_the_table_is_rewritten_in_place(tmp_path, fake, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    monkeypatch.setenv("LINES", "40")
    assert run_sweep(points_of(2), tmp_path, fake, poll=0.01, stream=stream) == 0
    text = stream.getvalue()
    assert text.count("\x1b[3A") == text.count("point ") - 1 > 1
    last = re.sub(r"\x1b\[\d*[A-Z]", "", text.split("\x1b[3A")[-1]).replace("\r", "").splitlines()
    assert [line.split() for line in last] == [
        ["point", "state", "step", "loss", "left"],
        ["p0", "done", "8/8", "0.1250"],
        ["p1", "done", "8/8", "0.1250"],
    ]


# Names


def test_names_are_short_safe_and_distinct():
    long = {"data.path": "x" * 200, "seed": 1}
    listed = [
        {"data.path": "a/b c"},
        {"data.path": "a/b_c"},
        long,
        {"loss.name": "../.."},
        {"seed": 1},
        {"optimizer.name": "sgd"},
    ]
    listed += [{"loss.name": "0.8*dpo + sft(mean='batch')"}, {"lora.dropout": 0.1, "model.dropout": 0.2}]
    listed += [{"data.shuffle": True}, {"data.shuffle": "TRUE"}]
    names = names_of(listed)
    assert len({name.casefold() for name in names}) == len(listed)
    assert all(re.fullmatch(r"[A-Za-z0-9+=_][A-Za-z0-9.+=_-]*", name) and len(name) <= 89 for name in names)
    assert names[4:6] == ["seed=1", "optimizer=sgd"]
    assert names[7] == "lora.dropout=0.1-model.dropout=0.2"
    assert names_of(listed[::-1]) == names[::-1]


def test_two_points_that_are_the_same_are_refused():
    with pytest.raises(UserError, match="points 1 and 3 are the same"):
        names_of([{"seed": 0}, {"seed": 1}, {"seed": 0}])


# Experiment files

BODY = """
from prefalign_jax import config


def get_config(arg=""):
    arg = config.parse_arg(arg, loss="dpo", data="d")
    c = config.defaults(arg.loss)
    c.model.path, c.data.path = "m", arg.data
    return c
"""


@pytest.fixture
def experiment(tmp_path, launch_leaves_no_trace):
    def write(text, body=BODY):
        path = tmp_path / "experiment.py"
        path.write_text(f"{body}\n\n{text}\n")
        return str(path)

    return write


def test_points_are_read_with_arguments_and_overrides_for_all(experiment):
    listed = "[{'config': 'loss=orpo', 'seed': 1}, {'loss.beta': 0.3, 'data.shuffle': False}]"
    file = experiment(f"def sweep():\n    yield from {listed}")
    first, second = read_points(f"{file}:data=e", ["--config.steps=7"])
    assert first.arguments == [f"--config={file}:data=e,loss=orpo", "--config.steps=7", "--config.seed=1"]
    assert first.name == "loss=orpo-seed=1" and first.config["loss.name"] == "orpo" and first.config["data.path"] == "e"
    assert second.arguments[2:] == ["--config.loss.beta=0.3", "--config.data.shuffle=false"]
    assert (second.config["loss.beta"], second.config["data.shuffle"], second.config["steps"]) == (0.3, False, 7)


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        ("[]", "sweep() gives no point"),
        ("[3]", "sweep(), point 1: expected a dict of overrides, found int"),
        ("[{'seed': 0}, {'seed': None}]", "sweep(), point 2: seed=None; write a string"),
        ("[{'seed=1 --x': 0}]", "is no field; write a dotted name"),
        ("[{'sed': 0}]", "point 1 (sed=0): the config has no field 'sed'; did you mean 'seed'?"),
        ("[{'loss.lam': 1.0}]", "loss 'dpo' has no hyper-parameter 'lam'"),
        ("[{'seed': -1}]", "seed=-1 must be at least 0"),
        ("1 / 0", "experiment.py, line 13: ZeroDivisionError: division by zero"),
        ("[{'batch_size': 5}]", "--config.batch_size on the command line sets what the sweep varies"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(experiment, listed, says):
    with pytest.raises(UserError) as error:
        read_points(experiment(f"def sweep():\n    return {listed}"), ["--config.batch_size=4"])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_is_wrong_for_all_points_is_no_points_fault(experiment):
    with pytest.raises(UserError, match="^the config has no field 'bta'"):
        read_points(experiment("def sweep():\n    return [{'seed': 0}]"), ["--config.bta=5"])
    with pytest.raises(UserError, match="it has no sweep()"):
        read_points(experiment(""))


def test_a_grid_is_every_combination_with_a_sweep_or_without(experiment):
    grid = read_grid(["loss.beta=0.05,0.5", "data.shuffle=true"], seeds=2)
    points = read_points(experiment(""), ["--config.steps=3"], grid)
    values = [(p.config["loss.beta"], p.config["data.shuffle"], p.config["seed"], p.config["steps"]) for p in points]
    assert values == [(beta, True, seed, 3) for beta in (0.05, 0.5) for seed in (0, 1)]
    assert points[0].name == "beta=0.05-shuffle=true-seed=0"
    listed = "[{'loss.name': 'ipo', 'loss.tau': 0.1}, {'learning_rate': 2e-6}]"
    both = read_points(experiment(f"def sweep():\n    return {listed}"), (), read_grid([], seeds=2))
    assert [(p.config["loss.name"], p.config["seed"]) for p in both] == [("ipo", 0), ("ipo", 1), ("dpo", 0), ("dpo", 1)]
    written = read_points(experiment("def sweep():\n    return [{'seed': 0}, {'seed': 1}]"))
    by_grid = read_points(experiment(""), (), read_grid([], seeds=2))
    assert [p[:3] for p in written] == [p[:3] for p in by_grid]  # the same directories


@pytest.mark.parametrize(
    ("words", "seeds", "says"),
    [
        (["loss.beta"], None, "write FIELD=VALUE,VALUE"),
        (["loss.beta=0.1,"], None, "write FIELD=VALUE,VALUE"),
        (["seed=1"], 2, "both name seeds"),
        (["loss.beta=1", "loss.beta=2"], None, "twice"),
        (["loss.bta=1"], None, "no field 'loss.bta'; did you mean 'loss.beta'"),
        (["loss.beta=0.1,0.1"], None, "are the same"),
        (["loss.beta=high"], None, "beta"),
        (["batch_size=2"], None, "--config.batch_size on the command line sets what the sweep varies"),
        ([], 0, "--seeds=0 must be at least 1"),
    ],
)
def test_a_mistaken_grid_is_one_line(experiment, words, seeds, says):
    with pytest.raises(UserError) as error:
        read_points(experiment(""), ["--config.batch_size=4"], read_grid(words, seeds))
    assert says in str(error.value) and "\n" not in str(error.value)


SWEEPS = [path for path in sorted((ROOT / "experiments").rglob("*.py")) if "def sweep" in path.read_text()]


LARGE = ("direct_alignment",)  # hundreds of points


@pytest.mark.parametrize(
    "file", [longer(path, id=path.stem) if path.stem in LARGE else pytest.param(path, id=path.stem) for path in SWEEPS]
)
def test_the_sweeps_of_the_experiments_are_sound(file, launch_leaves_no_trace):
    text = file.read_text()
    given = [f"{name}=m" for name in ("model", "data") if f"{name}=None" in text]
    points = read_points(":".join([str(file), *filter(None, [",".join(given)])]))
    assert len({point.name for point in points}) == len(points) > 1


# The script


def launch(*arguments):
    return subprocess.run(
        [sys.executable, "scripts/sweep.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": FAST_TO_COMPILE, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )


TWO = """
import importlib.util

spec = importlib.util.spec_from_file_location("experiment", "experiments/dpo_vs_orpo.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
get_config = module.get_config


def sweep():
    return module.sweep()[::3]
"""


@pytest.mark.everything
def test_dpo_against_orpo_from_one_command_to_a_page(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    workdir = tmp_path / "sweep"
    usual = [f"--config={tmp_path / 'two.py'}:model={TRL},data={TRL / 'pairs.jsonl'}", f"--workdir={workdir}"]
    usual += [f"--config.{word}" for word in ("steps=2", "batch_size=4", "max_length=256", "warmup_steps=0")]
    usual += ["--config.learning_rate=1e-3", "--config.log_steps=1", "--jobs=2"]
    shown = launch("--dry_run", *usual)
    assert shown.returncode == 0 and len(shown.stdout.splitlines()) == 2 and not workdir.exists()
    out = launch(*usual)
    assert out.returncode == 0, out.stderr
    first, second = json.loads((workdir / "results.json").read_text())
    assert (first["name"], second["name"]) == ("loss=dpo-seed=0", "loss=orpo-seed=0")
    assert first["first/eval/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["eval/loss"] < first["first/eval/loss"] - 0.01
    assert first["steps"] == second["steps"] == 2 and second["flops"] < first["flops"]  # no reference
    logs = {path: path.stat().st_mtime_ns for path in workdir.glob("*/log.txt")}
    again = launch(*usual)
    assert again.returncode == 0 and "2 of 2 points done" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in workdir.glob("*/log.txt")} == logs
    command = [sys.executable, "scripts/report.py", str(workdir)]
    page = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert page.returncode == 0, page.stderr
    assert "2 runs, 2 groups, seed 0" in (workdir / "report.html").read_text()
    for wrong in ("--config.loss.beta=0.3", "--jbos=3", "stray"):
        mistake = launch(*usual, wrong)
        assert mistake.returncode == 2 and mistake.stderr.startswith("error: ") and mistake.stderr.count("\n") == 1
