"""Searches: which values are tried, what is stopped early, and that a killed search goes on as if it had not been."""

import io
import json
import sys

import pytest

from prefalign_jax import commands
from prefalign_jax.analysis import search as module
from prefalign_jax.analysis.programs import Point
from prefalign_jax.analysis.runs import find_runs, read_mark
from prefalign_jax.analysis.search import Range, read_ranges, read_search, run_search
from prefalign_jax.analysis.sweep import names_of
from prefalign_jax.config import defaults
from prefalign_jax.processes import STOPPED

# Stands for the training script: four evaluations, best where beta is 0.1; 0.01 s apart.
FAKE = """
import json, math, os, pathlib, signal, sys, time
options = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
workdir, beta = pathlib.Path(options["workdir"]), float(options["config.loss.beta"])
(workdir.parent / "starts.txt").open("a").write(workdir.name + "\\n")
signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
if options.get("config.seed") == "13":
    sys.exit("error: out of luck")
(workdir / "config.json").write_text(json.dumps({"steps": 4, "loss": {"beta": beta}}))
done = len((workdir / "eval.jsonl").read_text().splitlines()) if (workdir / "eval.jsonl").exists() else 0
for step in range(done, 5):
    time.sleep(0.01)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step + 1, "loss": 1.0, "step_time": 0.1}) + "\\n")
    with (workdir / "eval.jsonl").open("a") as file:
        value = -abs(math.log10(beta / 0.1)) + 0.01 * step
        file.write(json.dumps({"step": step, "eval/accuracy": value if step else 0.0}) + "\\n")
"""
ARGUMENTS = "dpo:model=m,data=d", []


def point(config, common, listed):
    """As `make_points`, without the quarter of a second that reading the experiment takes."""
    (overrides,) = listed
    words = [f"--config.{field}={value}" for field, value in overrides.items()]
    return [Point(names_of(listed)[0], overrides, words, {"job": "train", **overrides})]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "make_points", point)
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return [sys.executable, "-S", str(path)]


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna")


def beta_search(**changes):
    fields = dict(ranges=["loss.beta=0.001..10,log"], choices={}, metric="eval/accuracy", mode="max") | changes
    return read_search(*ARGUMENTS, **fields)


def go(search, workdir, fake, trials, **options):
    return run_search(search, workdir, fake, trials, stream=io.StringIO(), poll=0.01, **options)


def trials_of(optuna, workdir):
    backend = optuna.storages.journal.JournalFileBackend(str(workdir / module.JOURNAL))
    storage = optuna.storages.JournalStorage(backend)
    return [(t.params, t.state.name, t.value) for t in optuna.load_study(study_name=None, storage=storage).trials]


def test_ranges_are_read_by_the_types_of_their_fields():
    ranges = read_ranges(["loss.beta=0.01..1,log", "warmup_steps=0..20", "learning_rate=0..1"], defaults())
    assert ranges["loss.beta"] == Range(0.01, 1.0, True, False)
    assert ranges["warmup_steps"] == Range(0, 20, False, True)
    assert ranges["learning_rate"] == Range(0.0, 1.0, False, False)


@pytest.mark.usefixtures("optuna")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--range=loss.beta=1..0.1", "write FIELD=LOW..HIGH"),
        ("--range=loss.beta=0.1", "write FIELD=LOW..HIGH"),
        ("--range=loss.beta=0.1..inf", "write FIELD=LOW..HIGH"),
        ("--range=loss.beta=0.1..1,exp", "write FIELD=LOW..HIGH"),
        ("--range=warmup_steps=0.5..2", "whole numbers"),
        ("--range=loss.beta=0..1,log", "zero has no logarithm"),
        ("--range=loss.beta=0.1..1 --range=loss.beta=0.1..2", "twice"),
        ("--range=loss.beta=0.1..1 --grid=loss.beta=1,2", "both vary loss.beta"),
        ("--range=loss.label_smoothing=0..0.7", "label_smoothing=0.7"),
        ("--range=loss.betta=0.1..1", "loss.beta"),
        ("--range=loss.beta=0.1..1 --config.loss.beta=1", "--config.loss.beta on the command line"),
        ("--grid=loss.name=dpo,doo", "'doo' is unknown"),
        ("", "something to vary"),
        ("--range=loss.beta=0.1..1 --metric=eval/logps/chosen", "set --mode"),
        ("--range=loss.beta=0.1..1 --seeds=2", "--seeds does not fit"),
        ("--range=loss.beta=0.1..1 --trials=0", "at least 1"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(words, says, capsys, tmp_path):
    first = f"sweep --config=dpo:model=m,data=d --workdir={tmp_path} --search=optuna --metric=eval/loss --trials=2"
    assert commands.main([*first.split(), *words.split()]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said


@pytest.mark.parametrize(
    ("words", "says"),
    [("--trials=3", "--trials is a search's"), ("--search=optunna --trials=3", "did you mean 'optuna'")],
)
def test_what_is_a_searchs_alone_is_refused_elsewhere(words, says, capsys, tmp_path):
    first = ["sweep", "--config=dpo:model=m,data=d", f"--workdir={tmp_path}", "--grid=loss.beta=1,2"]
    assert commands.main([*first, *words.split()]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.usefixtures("optuna")
@pytest.mark.parametrize(("metric", "mode"), [("eval/loss", "min"), ("eval/rewards/accuracies", "max")])
def test_what_is_best_follows_from_the_metric_as_it_does_for_checkpoints(metric, mode):
    assert beta_search(metric=metric, mode=None).mode == mode


def test_without_optuna_the_line_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    first = f"sweep --config=dpo:model=m,data=d --workdir={tmp_path} --search=optuna --metric=eval/loss --trials=2"
    assert commands.main([*first.split(), "--range=loss.beta=0.1..1"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'prefalign_jax[search]'" in said and said.count("\n") == 1


def test_a_search_finds_what_is_best_and_says_what_it_stopped_early(optuna, tmp_path, fake, capsys):
    workdir = tmp_path / "search"
    assert go(beta_search(), workdir, fake, 12) == 0
    trials = trials_of(optuna, workdir)
    assert len(trials) == 12
    rows = json.loads((workdir / "results.json").read_text())
    best = max((row for row in rows if row["state"] == "done"), key=lambda row: row["eval/accuracy"])
    assert 0.03 < best["loss.beta"] < 0.3
    assert f"best: eval/accuracy {best['eval/accuracy']:.4g}, {workdir / best['name']}" in capsys.readouterr().err
    pruned = [row["name"] for row in rows if row["state"] == "pruned"]
    assert len(pruned) == sum(state == "PRUNED" for _, state, _ in trials) > 0
    for name in pruned:  # its directory says so, and its log has no more evaluations than it needed
        assert read_mark(workdir / name)["done"]["pruned"] >= 1
    assert {run.name for run in find_runs([workdir])} == {row["name"] for row in rows}
    # The same command has nothing left to do, and one with more trials goes on.
    starts = (workdir / "starts.txt").read_text()
    assert go(beta_search(), workdir, fake, 12) == 0 and (workdir / "starts.txt").read_text() == starts
    assert go(beta_search(), workdir, fake, 13) == 0 and trials_of(optuna, workdir)[:12] == trials


def test_a_killed_search_makes_the_trials_of_one_that_nothing_stopped(optuna, tmp_path, fake, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert go(beta_search(), whole, fake, 8) == 0
    told = [0]  # evaluations
    look = module._Trial.look

    def fail(self):
        before = len(self.reported)
        look(self)
        told[0] += len(self.reported) - before
        if len(self.reported) > before and told[0] % 4 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(module._Trial, "look", fail)
    calls = 0
    while True:
        calls += 1
        try:
            assert go(beta_search(), killed, fake, 8) == 0
            break
        except KeyboardInterrupt:
            pass
    assert calls > 2, told
    assert trials_of(optuna, killed) == trials_of(optuna, whole)
    rows = [json.loads((workdir / "results.json").read_text()) for workdir in (whole, killed)]
    first, second = ({row["name"]: row["state"] for row in one} for one in rows)
    assert first == second


def test_another_search_in_the_same_directory_is_refused(optuna, tmp_path, fake, capsys):
    assert go(beta_search(), tmp_path / "w", fake, 1) == 0
    with pytest.raises(module.UserError, match="has a search with metric='eval/accuracy', not 'eval/loss'"):
        go(beta_search(metric="eval/loss"), tmp_path / "w", fake, 1)


def test_values_to_choose_from_and_a_metric_that_is_not_there(optuna, tmp_path, fake):
    search = beta_search(ranges=[], choices={"loss.beta": [0.1, 1.0]}, metric="eval/acuracy")
    with pytest.raises(module.UserError, match="eval/acuracy is no column of eval.jsonl; it has eval/accuracy"):
        go(search, tmp_path / "w", fake, 2)
    search = beta_search(ranges=[], choices={"loss.beta": [0.1, 1.0]}, mode="min", prune=False)
    assert go(search, tmp_path / "v", fake, 6, jobs=2) == 0
    assert {params["loss.beta"] for params, *_ in trials_of(optuna, tmp_path / "v")} <= {0.1, 1.0}
    assert len((tmp_path / "v" / "starts.txt").read_text().split()) <= 6


def test_a_trial_that_fails_stops_no_other(optuna, tmp_path, fake):
    search = beta_search(choices={"seed": [13, 14]})
    assert go(search, tmp_path / "w", fake, 6) == 1
    states = [state for _, state, _ in trials_of(optuna, tmp_path / "w")]
    assert len(states) == 6 and "FAIL" in states and "COMPLETE" in states


def test_told_to_stop_it_stops_and_goes_on(optuna, tmp_path, fake, monkeypatch):
    stop = module.stop_signal

    class Told:
        def __init__(self, event):
            self.event, self.waits = event, 0

        def is_set(self):
            return self.event.is_set()

        def wait(self, seconds):
            self.waits += 1
            if self.waits == 5:
                self.event.set()
            return self.event.wait(seconds)

    import contextlib

    @contextlib.contextmanager
    def soon():
        with stop() as event:
            yield Told(event)

    monkeypatch.setattr(module, "stop_signal", soon)
    assert go(beta_search(), tmp_path / "w", fake, 3) == STOPPED
    assert [state for _, state, _ in trials_of(optuna, tmp_path / "w")][-1] == "RUNNING"
    monkeypatch.setattr(module, "stop_signal", stop)
    assert go(beta_search(), tmp_path / "w", fake, 3) == 0
    assert [state for _, state, _ in trials_of(optuna, tmp_path / "w")] == ["COMPLETE"] * 3
