"""`benchmark.py gpu`: what it measures, in which order, within which minutes, and that a cut loses no row."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmark import BENCHMARKS
from benchmarks import gpu
from benchmarks.measuring import run
from prefalign_jax.cost.flops import count_flops
from prefalign_jax.exits import status_of
from prefalign_jax.types import UserError
from small import CONFIG, MODEL

ROOT = pathlib.Path(__file__).parents[1]
SETTING = gpu.Setting(True, "cpu", "20+12x2")
NAMES = [row.name for row in gpu.rows_of(SETTING, "python", pathlib.Path("keep"))]


class Machine:
    """In place of the processes that measure: each takes so many seconds of a clock that stands still otherwise."""

    def __init__(self, seconds=10.0):
        self.now, self.seconds, self.ran, self.ends = 0.0, seconds, [], {}

    def monotonic(self):
        return self.now

    def side(self, python, script, spec, device, *, seconds, cache):
        name = f"{script} {spec.get('loss', '')} {spec.get('attention', '')}".strip()
        if name in self.ends:
            raise self.ends[name]
        if seconds < self.seconds:
            raise subprocess.TimeoutExpired(script, seconds)
        self.now += self.seconds
        self.ran.append(name)
        pace = {"trl_side.py": 4.0, "our_side.py": 2.0}.get(script, 1.0)
        counts = {key: [6e14] * 3 for key in ("useful_flops", "tokens", "positions", "trained", "wait_seconds")}
        counts |= {"programs": 1, "compile_seconds": 1.0} if script == "our_side.py" else {}
        return {
            "device": "NVIDIA H200",
            "seconds": [9.0, pace, pace],
            "alone": [9.0, 1.0, 1.0],
            "cpu": [9.0, 3.0, 3.0],
            "alone, cpu": [9.0, 2.0, 2.0],
            "cpu_seconds": [1.0] * 3,
            "losses": [0.7] * 3,
            "chosen_logps": -50.0,
            "peak_bytes": 2**30,
            "alone, peak_bytes": 2**29,
            "matmul_flops": 6e14,
            **(counts if script == "our_side.py" else {}),
        }

    def answer_of(self, command, device, *, seconds, cache):
        self.now += self.seconds / 2  # two of them are a row
        self.ran.append("decoding")
        return {"seconds": [1.0, 1.0, 1.0], "first": 2.0}


@pytest.fixture
def machine(monkeypatch):
    one = Machine()
    monkeypatch.setattr(gpu, "side", one.side)
    monkeypatch.setattr(gpu, "answer_of", one.answer_of)
    monkeypatch.setattr(gpu, "not_installed", lambda python: [])
    monkeypatch.setattr(gpu.time, "monotonic", one.monotonic)
    return one


def measure(out, minutes=60.0, **options):
    return gpu.gpu(small=True, device="cpu", lengths="20+12x2", minutes=minutes, out=str(out), **options)


def records_in(out):
    return {one["row"]: one for one in map(json.loads, (out / "rows.jsonl").read_text().splitlines())}


def statuses(out):
    return {name: one["status"] for name, one in records_in(out).items()}


def test_all_rows_most_valuable_first(machine, tmp_path, capsys):
    words = ["gpu", "--small", "--device=cpu", "--lengths=20+12x2", f"--out={tmp_path}"]
    assert status_of(lambda: run(BENCHMARKS, words)) == 0
    assert list(records_in(tmp_path)) == NAMES and {*statuses(tmp_path).values()} == {"measured"}
    first = ["jax_device.py", "our_side.py dpo tiles", "our_side.py dpo cudnn", "trl_side.py dpo tiles"]
    assert machine.ran[:4] == first and machine.ran.count("trl_side.py orpo tiles") == gpu.ROUNDS
    figures = records_in(tmp_path)["DPO, tiles"]["figures"]
    # 6e14 operations in 2 s, of 989e12 a second.
    assert figures["MFU, prompts once"] == pytest.approx(3e14 / 989e12)
    assert figures["share of this machine's matmul rate"] == pytest.approx(0.5)
    assert records_in(tmp_path)["2 members of tiny"]["figures"]["times as fast as one after the other"] == 2.0
    assert records_in(tmp_path)["2 members of tiny"]["figures"]["processor seconds a member, alone = 1"] == 0.75
    page = (tmp_path / "rows.md").read_text()
    assert (
        "# On NVIDIA H200" in page and "| DPO, tiles, beside TRL | 2.00, 2.00, 2.00 | 2.00 | 1.00 | 0.0e+00 |" in page
    )
    assert "not started" not in page and "tokens/s, 2 rows 8" in capsys.readouterr().out


@pytest.mark.parametrize(("at", "script"), [(2, "our_side.py dpo cudnn"), (8, "members_side.py")])
def test_a_cut_loses_no_more_than_the_row_under_way(machine, tmp_path, at, script):
    machine.ends = {script: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path)
    assert statuses(tmp_path) == dict.fromkeys(NAMES[:at], "measured")
    (tmp_path / ".rows.jsonl.0123abcd.part").write_text('{"row": "DPO')  # what a kill leaves
    machine.ends = {}
    for _ in range(2):
        measure(tmp_path)
        assert list(records_in(tmp_path)) == NAMES and not list(tmp_path.glob(".*part"))
        assert len(machine.ran) == len(NAMES) + 1  # decoding is two processes; none ran twice


def test_no_row_is_begun_for_which_the_minutes_are_short(machine, tmp_path):
    machine.seconds = 20.0
    measure(tmp_path, minutes=1.005)
    assert list(statuses(tmp_path).values()) == ["measured"] * 3 + ["not started"] * (len(NAMES) - 3)
    assert records_in(tmp_path)["DPO, TRL"]["why"] == "0 s were left, about 1 are needed"
    measure(tmp_path, minutes=1.5)  # whose fifth row is cut
    assert list(statuses(tmp_path).values())[3:8] == ["measured"] * 4 + ["cut"]
    assert "the minutes were over" in (tmp_path / "rows.md").read_text()
    measure(tmp_path)
    assert {*statuses(tmp_path).values()} == {"measured"}
    full = gpu.rows_of(SETTING._replace(small=False), "python", tmp_path)
    assert sum(row.seconds for row in full[:10]) <= 720  # each thing once, in 12 minutes


def test_what_failed_is_told_and_tried_again_last(machine, tmp_path):
    machine.ends = {"our_side.py dpo cudnn": UserError("our_side.py ended with status 1: out of memory")}
    measure(tmp_path)
    assert statuses(tmp_path)["DPO, cuDNN"] == "failed" and "out of memory" in (tmp_path / "rows.md").read_text()
    measure(tmp_path, minutes=0.01)
    assert statuses(tmp_path)["DPO, cuDNN"] == "failed"  # which says more than that it was not started
    machine.ends, machine.ran = {}, []
    measure(tmp_path)
    assert (
        machine.ran == ["our_side.py dpo cudnn"]
        and "| DPO, cuDNN, beside tiles | 1.00 |" in (tmp_path / "rows.md").read_text()
    )


def test_trl_that_computes_something_else_is_not_compared(machine, tmp_path, monkeypatch):
    side = machine.side

    def other(python, script, spec, device, **limits):
        return side(python, script, spec, device, **limits) | (
            {"chosen_logps": -60.0} if script == "trl_side.py" else {}
        )

    monkeypatch.setattr(gpu, "side", other)
    measure(tmp_path)
    assert statuses(tmp_path)["ORPO, TRL"] == "failed" and "beside TRL" not in (tmp_path / "rows.md").read_text()


def test_without_trl_its_rows_and_the_repetitions_beside_it_are_skipped(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "not_installed", lambda python: ["trl"])
    measure(tmp_path)
    skipped = [name for name, status in statuses(tmp_path).items() if status == "skipped"]
    assert skipped == [name for name in NAMES if "TRL" in name or "round" in name]
    assert "lacks trl; name another by --python" in records_in(tmp_path)["DPO, TRL"]["why"]


def test_what_trls_interpreter_lacks(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    assert gpu.not_installed(str(bare)) == ["torch", "trl"]
    with pytest.raises(UserError, match="does not run"):
        gpu.not_installed(str(tmp_path / "none"))


def test_a_machine_without_the_device_is_told_at_once(machine, tmp_path):
    machine.ends = {"jax_device.py": UserError("jax_device.py ended with status 1: no CUDA")}
    with pytest.raises(UserError, match="nothing can be measured with --device=cpu: .* no CUDA"):
        measure(tmp_path)
    assert machine.ran == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"minutes": 0.0}, "--minutes=0 must be positive"),
        ({"small": False}, "--device=cpu is for --small"),
        ({"device": "tpu"}, "--device='tpu' is unknown"),
        ({"lengths": "30+12x2"}, "holds rows of .*20\\+12x2"),
    ],
    ids=str,
)
def test_mistakes(machine, tmp_path, options, says):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"row": "x", "status": "cut", "setting": SETTING._asdict()}) + "\n")
    with pytest.raises(UserError, match=says):
        gpu.gpu(**dict(small=True, device="cpu", lengths="20+12x2", out=str(tmp_path)) | options)


def test_open_instructs_count_is_that_of_dense_products_and_its_softmax():
    texts, length, c = 6, 7, CONFIG
    tokens = jnp.zeros((1, length), jnp.int32)
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    forward = count_flops(MODEL.hidden, params, *[tokens] * 4) + 2 * length * c.hidden_size * c.vocab_size
    forward += c.num_layers * length * (4 * c.num_heads * length + c.intermediate_size)
    lengths = np.array([5, 9, 7, 7, 8, 6])  # of the mean 7
    assert gpu.as_open_instruct(c, lengths) == 3 * texts * forward


@pytest.mark.everything
def test_the_whole_way_on_a_cpu_killed_and_gone_on_with(tmp_path):
    bare, out = tmp_path / "bare", tmp_path / "out"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    words = ["gpu", "--small", "--device=cpu", "--lengths=20+12x2", f"--python={bare}", f"--out={out}", "--minutes=30"]
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *words]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as first:
        while not (out / "rows.jsonl").exists() or len(records_in(out)) < 2:
            assert first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
    kept = records_in(out)
    assert [one["status"] for one in kept.values()][:2] == ["measured"] * 2
    time.sleep(0.5)
    left = [p for p in pathlib.Path("/proc").glob("[0-9]*") if str(out).encode() in _command_of(p)]
    assert not left  # the process that measured ended with the one that started it
    assert subprocess.run(command, capture_output=True, env=os.environ).returncode == 0
    done = records_in(out)
    assert all(done[name] == record for name, record in kept.items())
    names = {word: [name for name, one in done.items() if one["status"] == word] for word in statuses(out).values()}
    assert names.keys() == {"measured", "failed", "skipped"}
    assert names["failed"] == ["DPO, cuDNN"] and "cuDNN" in done["DPO, cuDNN"]["why"]
    assert all("TRL" in name or "round" in name for name in names["skipped"])
    assert done["2 members of tiny"]["figures"]["alone, s a step"] > 0
    assert done["decoding, tiny"]["figures"]["tokens/s, 2 rows"] > 0


def _command_of(process):
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
