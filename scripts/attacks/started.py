"""Starts commands of this checkout in a second: each is a fork of a process that has imported all that they need.

That process starts no backend of JAX, so a fork of it is as a fresh process is. A run of a sweep is a process of its
own too: what the sweep starts in place of it asks the first process for a fork, and stands for that until it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SERVER = "ATTACKED_RUNS_ARE_STARTED_BY"  # environment: path of the socket
FILES = 16  # that a run may inherit


def import_all() -> None:
    """Imports what the commands need, and reads a tokenizer once."""
    import matplotlib.figure  # noqa: F401
    import tensorboardX  # noqa: F401
    from targets import MODEL

    import prefalign_jax.analysis.sweep
    import prefalign_jax.commands.generate
    import prefalign_jax.commands.judge
    import prefalign_jax.commands.sweep
    import prefalign_jax.commands.train
    import prefalign_jax.generation.sample_to_file
    import prefalign_jax.jobs
    import prefalign_jax.judges.judge_files  # noqa: F401
    from prefalign_jax.data.chat import load_tokenizer

    load_tokenizer(str(MODEL), None)


class Command:
    """A command that runs.

    Args:
      words: the name of the command and its options.
    """

    def __init__(self, words: Sequence[str]):
        self.output, end = os.pipe()  # no file, for which the system may have a limit
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 2**20)
        os.set_blocking(self.output, False)
        self.process = multiprocessing.get_context("fork").Process(target=_become, args=(words, end))
        self.process.start()
        os.close(end)

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit status once it has ended; None if it runs on after so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode

    def kill(self) -> None:
        """SIGKILL, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def said(self) -> str:
        """What it has said, once; to be called when it has ended."""
        parts = []
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.output, 2**16):
                parts.append(part)
        os.close(self.output)
        return b"".join(parts).decode(errors="replace")


def _become(words: Sequence[str], output: int) -> None:
    """In the new process: runs a command and ends with its status."""
    os.setsid()
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    from prefalign_jax.commands import main, sweep

    if SERVER in os.environ:
        stand_in = [sys.executable, "-I", "-S", __file__]
        sweep.TRAIN, sweep.TOGETHER = [*stand_in, "train"], [*stand_in, "together"]
    sys.exit(main(words))


class Server:
    """A process that starts the runs of sweeps, for as long as it is open."""

    def __init__(self, path: Path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.bind(str(path))
        self.socket.listen()
        os.environ[SERVER] = str(path)
        self.process = multiprocessing.get_context("fork").Process(target=self._serve)
        self.process.start()

    def _serve(self) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries those that end
        while True:
            asked, _ = self.socket.accept()
            if os.fork() == 0:
                self.socket.close()
                _run_of_sweep(asked)
            asked.close()

    def runs(self) -> list[int]:
        """Process ids of the runs that live."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children]

    def kill_runs(self) -> None:
        """SIGKILL to all runs, at once; returns when they are gone."""
        for run in self.runs():
            with contextlib.suppress(ProcessLookupError):
                os.kill(run, signal.SIGKILL)
        while self.runs():
            time.sleep(0.01)

    def close(self) -> None:
        """Ends the process and what it has started."""
        self.kill_runs()
        self.process.kill()
        self.process.join()
        del os.environ[SERVER]


def _run_of_sweep(asked: socket.socket) -> None:
    """In a new process: is the run that is asked for, with the files of who asks; tells its exit status."""
    from prefalign_jax.commands import main

    text, files, _, _ = socket.recv_fds(asked, 2**20, FILES)
    directory, *words = text.decode().split("\0")
    os.setsid()
    os.chdir(directory)
    for number in (1, 2):
        os.dup2(files[number], number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    status = 1
    try:
        status = main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        asked.send(str(status).encode())
        os._exit(status)


def stand_for(words: Sequence[str]) -> int:
    """Is a run to the sweep that started it: asks the server for a fork, and ends as that does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(os.environ[SERVER])
        inherited = [int(name) for name in os.listdir("/proc/self/fd") if int(name) != server.fileno()]
        files = [number for number in sorted(inherited) if os.path.exists(f"/proc/self/fd/{number}")]
        socket.send_fds(server, ["\0".join([os.getcwd(), *words]).encode()], files)
        return int(server.recv(64) or -signal.SIGKILL)


if __name__ == "__main__":
    status = stand_for(sys.argv[1:])
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)
