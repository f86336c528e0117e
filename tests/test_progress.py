import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios

import jax
import jax.numpy as jnp
import pytest
from jax._src import monitoring

from prefalign_jax import processes, progress
from prefalign_jax.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def states(self):
        """What was shown, one after the other; a bar writes each over the last."""
        return [line.strip() for line in re.split("[\r\n]", self.getvalue()) if line.strip()]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(autouse=True)
def nobody_listens_afterwards():
    before = listeners()
    yield
    assert listeners() == before


def listeners():
    return len(monitoring.get_scalar_listeners()), len(monitoring.get_event_duration_listeners())


def test_in_a_log_it_is_a_line_now_and_then(clock):
    stream = io.StringIO()
    with Progress(100, every=30.0, stream=stream) as shown:
        for step in range(1, 101):
            clock[0] += 1.0
            shown.update(step, {"loss": 0.693147})
    assert stream.getvalue().splitlines() == [
        "step 1/100 (1%), loss 0.6931 | 1.00step/s | 01:39 left",
        "step 31/100 (31%), loss 0.6931 | 1.00step/s | 01:09 left",
        "step 61/100 (61%), loss 0.6931 | 1.00step/s | 00:39 left",
        "step 91/100 (91%), loss 0.6931 | 1.00step/s | 00:09 left",
        "step 100/100 (100%), loss 0.6931 | 1.00step/s | 00:00 left",
    ]


def test_on_a_terminal_it_is_one_line(clock):
    stream = Terminal()
    shown = Progress(8000, "held-out pair", stream=stream)
    for step in (2000, 4000, 6000):
        clock[0] += 0.05 if step == 4000 else 1.0
        shown.update(step, {"loss": 1.0})
    shown.close()
    shown.close()
    assert stream.getvalue().count("\n") == 1 and stream.getvalue().endswith("\n")
    states = [state for state in stream.states() if "loss" in state]
    assert all(re.match(r"held-out pair: +\d+%\|.*\| [\d,]+/8,000 \[00:0\d<", state) for state in states)
    assert not any("4,000/8,000" in state for state in states), "it came too soon"
    assert "6,000/8,000" in states[-1] and "pair/s, loss 1]" in states[-1]


@pytest.mark.parametrize("columns", [60, 0])  # a terminal may not know its width
def test_a_line_is_not_longer_than_the_terminal_is_wide(columns, monkeypatch):
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(follower, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress(4) as shown:
            shown.update(4, {"a_name_of_a_metric_that_is_long": 1.0, "another_one": 2.0, "and_one_more": 3.0})
        text = os.read(leader, 10_000).decode()
        while not text.endswith("\n"):
            text += os.read(leader, 10_000).decode()
    os.close(leader)
    line = re.split("[\r\n]+", text.strip())[-1]
    assert "4/4" in line and len(line.rstrip()) <= (columns or 80) - 1


def test_nothing_is_shown_before_there_is_something(clock):
    for stream in (io.StringIO(), Terminal()):
        Progress(8, stream=stream).close()
        assert stream.getvalue() == ""


def test_a_resumed_run_counts_only_its_own_steps(clock):
    stream = io.StringIO()
    with Progress(1000, start=900, every=0.0, stream=stream) as shown:
        shown.update(900)
        clock[0] += 10.0
        shown.update(910)
    assert stream.getvalue().splitlines() == [
        "step 900/1,000 (90%)",
        "step 910/1,000 (91%) | 1.00step/s | 01:30 left",
    ]


def test_towards_nobody_knows_what_it_is_a_count(clock):
    stream, terminal = io.StringIO(), Terminal()
    for where in (stream, terminal):
        with Progress(None, "training record", every=0.0, stream=where) as shown:
            for count in (0, 20_000):
                shown.update(count)
                clock[0] += 10.0
                shown.update(count)
    assert stream.getvalue().splitlines()[-1] == "training record 20,000 | 1000.00record/s"
    assert terminal.states()[-1].startswith("training record: 20,000 [00:20,")


def test_more_than_was_expected_is_all_there_is(clock):
    stream = io.StringIO()
    with Progress(2, stream=stream) as shown:
        shown.update(3)
    assert stream.getvalue() == "step 3/3 (100%)\n"


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_compiling_is_said_and_not_counted(clock, kind):
    stream = kind()

    @jax.jit
    def inner(x):
        clock[0] += 20.0  # seconds of tracing
        return x + 1

    @jax.jit
    def step(x):
        clock[0] += 100.0
        return inner(x) * 2

    x = jnp.zeros(3)
    with Progress(4, every=0.0, stream=stream) as shown:
        for number in range(1, 4):
            step(x)
            clock[0] += 1.0
            shown.update(number)
        step(x[:2])  # another program
        clock[0] += 1.0
        shown.update(4)
    text = stream.getvalue()
    assert "compiling" in re.split("[\r\n]+", text.strip())[kind is Terminal]  # a bar begins empty
    assert "1/4 (25%) | 1.00step/s | 00:03 left" in text or "1/4 [00:01<00:03, " in text
    assert "4/4 (100%) | 1.00step/s | 00:00 left" in text or "4/4 [00:04<00:00, " in text
    assert "compiling" not in re.split("[\r\n]+", text.strip())[-1]


def test_a_log_is_not_told_of_every_program(clock):
    stream = io.StringIO()
    with Progress(4, stream=stream):
        for size in range(2, 6):
            jax.jit(lambda x: x * 3)(jnp.zeros(size))
    assert stream.getvalue() == "step 0/4 (0%), compiling\n"


def test_a_failure_ends_it(clock):
    with pytest.raises(ZeroDivisionError), Progress(4, stream=Terminal()):
        jax.jit(lambda x: 1 // 0)(jnp.zeros(2))


def test_only_the_first_process_shows_it(clock, monkeypatch):
    monkeypatch.setattr(progress, "is_first", lambda: False)
    stream = Terminal()
    with Progress(1, stream=stream) as shown:
        jax.jit(lambda x: x * 5)(jnp.zeros(2))
        shown.update(1)
    assert stream.getvalue() == ""


def test_a_note_stands_above_the_bar(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(4, every=0.0) as shown:
        shown.update(1)
        processes.note("exported")
        shown.update(4)
    lines = stream.getvalue().split("\n")
    assert [line.split("\r")[-1] for line in lines[:1]] == ["exported"]
    assert "4/4" in lines[1] and lines[2:] == [""]


def test_in_a_notebook_remarks_and_the_bar_are_on_stdout(clock, monkeypatch, capsys):
    """A notebook shows stderr on red."""
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    with Progress(4) as shown:
        shown.update(1)
        processes.note("exported")
        clock[0] += 1.0
        shown.update(4)
    out, err = capsys.readouterr()
    assert "1/4" in out and "exported" in out and "4/4" in out
    assert err == ""
