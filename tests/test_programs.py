"""Which points of a sweep are one program; and that program's life in a sweep, with a stand-in for the training."""

import io
import json
import math
import os
import pathlib
import signal
import sys
import threading
import time

import pytest

from prefalign_jax import processes
from prefalign_jax.analysis.programs import MOST, Point, programs_of, room_for
from prefalign_jax.analysis.runs import read_mark
from prefalign_jax.analysis.sweep import _mark, run_sweep
from prefalign_jax.config import defaults
from prefalign_jax.experiment import read
from prefalign_jax.files import write_json
from prefalign_jax.members import FAILED
from prefalign_jax.types import UserError

TRL = pathlib.Path(__file__).parent / "goldens" / "trl"
FIELDS = {**read(defaults("dpo"), complete=False).fields, "model.path": str(TRL)}

# Stands for both commands: a line in work.txt for each start, and what a run leaves for the results.
FAKE = """
import json, os, pathlib, signal, sys, time
option, _, value = sys.argv[-1].partition("=")
runs = [{"arguments": sys.argv, "workdir": value}]
if option == "--runs":
    runs = json.loads(pathlib.Path(value).read_text())
signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
for run in runs:
    workdir = pathlib.Path(run["workdir"])
    with (workdir / "work.txt").open("a") as file:
        file.write(f"{len(runs)}\\n")
    if "--slow" in run["arguments"]:
        time.sleep(60)
    if "--diverge" in run["arguments"] and len(runs) > 1:
        (workdir / "failed.json").write_text(json.dumps({"step": 3, "error": "diverged at step 3"}))
        continue
    (workdir / "config.json").write_text(json.dumps({"steps": 1, "batch_size": 4}))
    (workdir / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5, "step_time": 1.0}) + "\\n")
"""


@pytest.fixture
def fake(tmp_path):
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return [sys.executable, "-S", str(path)]


def point_of(name, *arguments, **fields):
    fields = {key.replace("__", "."): value for key, value in fields.items()}
    return Point(name, fields, list(arguments), {**FIELDS, **fields})


def points_of(count, *arguments):
    return [point_of(f"p{n}", *arguments, seed=n) for n in range(count)]


def go(points, workdir, fake, together=8, **options):
    return run_sweep(points, workdir, fake, program=fake, together=together, poll=0.01, stream=io.StringIO(), **options)


def starts(workdir, points):
    """How many were in each program that a point was started in."""
    files = [workdir / point.name / "work.txt" for point in points]
    return [[int(line) for line in file.read_text().split()] if file.exists() else [] for file in files]


def names(programs):
    return [[point.name for point in some] for some in programs]


def test_what_differs_in_numbers_alone_is_one_program(tmp_path):
    points = [
        point_of("a", seed=0, loss__beta=0.1),
        point_of("b", batch_size=8),
        point_of("c", seed=1, learning_rate=1.0),
        point_of("d", job="sft_first"),
        point_of("e", seed=2, loss__beta=0.5),
        point_of("f", job="sft_first", seed=1),
    ]
    assert names(programs_of(points, tmp_path, 8)) == [["a", "c", "e"], ["b"], ["d"], ["f"]]
    assert names(programs_of(points, tmp_path, 2)) == [["a"], ["c", "e"], ["b"], ["d"], ["f"]]
    assert names(programs_of(points, tmp_path, 1)) == [[name] for name in "abcdef"]
    with pytest.raises(UserError, match="--together=0"):
        programs_of(points, tmp_path, 0)


def test_programs_are_halved_until_every_device_has_one(tmp_path):
    points = [*points_of(6), point_of("b", batch_size=8)]
    for devices in range(9):
        programs = names(programs_of(points, tmp_path, 8, devices=devices))
        assert sum(programs, []) == [point.name for point in points]
        assert len(programs) == min(max(devices, 2), 7)
        sizes = [len(some) for some in programs[:-1]]
        assert max(sizes) <= 2 * min(sizes) + 1
    begun = ["p0", "p1", "p2"]
    for name in begun:
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "point.json", _mark(points[int(name[1])], None, begun))
    assert names(programs_of(points, tmp_path, 8, devices=9))[0] == begun


def test_a_point_goes_on_as_it_began(tmp_path):
    points = points_of(5)
    for point, together in ((points[0], None), (points[1], ["p1", "p3"]), (points[3], ["p1", "p3"])):
        (tmp_path / point.name).mkdir()
        write_json(tmp_path / point.name / "point.json", _mark(point, None, together))
    assert names(programs_of(points, tmp_path, 8)) == [["p0"], ["p1", "p3"], ["p2", "p4"]]


def test_a_program_has_as_many_members_as_memory_has_room_for(tmp_path):
    small = {**FIELDS, "max_length": 128, "batch_size": 4}
    assert room_for(small, math.inf) == sys.maxsize and room_for(small, 1.0) == 1
    some = room_for(small, 300e6)
    assert 1 < some < MOST and room_for({**small, "batch_size": 16}, 300e6) < some
    assert room_for({**small, "lora.rank": 2}, 300e6) >= some
    assert room_for({**small, "model.path": "/nowhere"}, 1e12) == 1
    shape = json.loads((TRL / "config.json").read_text()) | {"architectures": ["MixtralForCausalLM"]}
    shape |= {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert room_for({**small, "model.path": str(tmp_path)}, math.inf) == 1


def test_members_are_run_once_and_have_results_of_their_own(tmp_path, fake, capsys):
    points, workdir = [*points_of(3), point_of("other", batch_size=8)], tmp_path / "sweep"
    assert go(points, workdir, fake, jobs=2) == 0
    assert starts(workdir, points) == [[3], [3], [3], [1]]
    assert "4 points in 2 programs, of 3, 1" in capsys.readouterr().err
    assert [row["state"] for row in json.loads((workdir / "results.json").read_text())] == ["done"] * 4
    assert "p0" in (workdir / "p2" / "log.txt").read_text()
    assert go(points, workdir, ["no such program"]) == 0
    assert go(points, tmp_path / "alone", fake, together=1) == 0
    assert starts(tmp_path / "alone", points) == [[1]] * 4


def test_a_member_that_diverges_fails_alone_and_is_tried_again_alone(tmp_path, fake, capsys):
    points, workdir = points_of(3), tmp_path / "sweep"
    points[1].arguments.append("--diverge")
    assert go(points, workdir, fake) == 1
    err = capsys.readouterr().err
    assert "p1 failed: diverged at step 3" in err and "2 of 3 points done, 1 failed" in err
    assert not (workdir / "p1" / FAILED).exists()
    assert go(points, workdir, fake) == 0
    assert starts(workdir, points) == [[3], [3, 1], [3]]


def test_told_to_stop_all_members_stop_and_go_on_together(tmp_path, fake):
    points, workdir = points_of(2), tmp_path / "sweep"
    points[1].arguments.append("--slow")

    def stop():
        while starts(workdir, points)[1] == []:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert go(points, workdir, fake) == processes.STOPPED
    thread.join()
    assert [read_mark(workdir / point.name)["together"] for point in points] == [["p0", "p1"]] * 2
    points[1].arguments.remove("--slow")
    more = [*points, point_of("p2", seed=2)]
    assert go(more, workdir, fake) == 0
    assert starts(workdir, more) == [[2, 2], [2, 2], [1]]
