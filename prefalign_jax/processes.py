"""A run of several processes: how they find each other, what they agree on, what the first alone does, how all stop."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prefalign_jax.exits import LOST, STOPPED
from prefalign_jax.types import UserError, WriteError, one_line, printable

HEARTBEAT = 60  # seconds without a sign of life after which a process counts as dead
# Launchers that say by themselves how many processes there are, and in which variable; JAX asks them for the rest.
LAUNCHERS: dict[str, Callable[[Mapping[str, str]], int]] = {
    "SLURM": lambda env: int(env.get("SLURM_STEP_NUM_TASKS", 1)),
    "Open MPI": lambda env: int(env.get("OMPI_COMM_WORLD_SIZE", 1)),
    "TPU pods on GKE": lambda env: len(env.get("TPU_WORKER_HOSTNAMES", "").split(",")),
}
_FROM_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join_processes(
    coordinator: str | None = None,
    processes: str | None = None,
    process: int | None = None,
    heartbeat: int = HEARTBEAT,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Joins the other processes of a run, if there are others. Nothing of JAX may have been used before.

    What is not given is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Without these, the
    LAUNCHERS tell.

    Args:
      coordinator: HOST:PORT of process 0, which listens there.
      processes: how many there are; 'auto' asks JAX, which knows SLURM, Open MPI, Cloud TPU and Kubernetes.
      process: this one's number, from 0.
      heartbeat: seconds without a sign of life after which a process counts as dead, and the others stop.
      environment: variables.

    Raises:
      UserError: a part of the three is missing or out of range, or the others are not found.
    """
    names = ("--coordinator", "--processes", "--process")
    values = [
        environment.get(name) if value is None else str(value)
        for name, value in zip(_FROM_ENVIRONMENT, (coordinator, processes, process), strict=True)
    ]
    automatic = values[1] == "auto"
    if not any(values):
        automatic = any(count(environment) > 1 for count in LAUNCHERS.values())
        if not automatic:
            return
    options: dict[str, Any] = {}
    if not automatic:
        for name, variable, value in zip(names, _FROM_ENVIRONMENT, values, strict=True):
            if not value:
                raise UserError(f"{name} is missing: set {', '.join(names)}, or {variable}, or --processes=auto")
        if not re.fullmatch(r"\S+:\d+", values[0]):
            raise UserError(f"--coordinator={values[0]!r}: write HOST:PORT of process 0")
        if not (values[1].isdecimal() and values[2].isdecimal() and int(values[2]) < int(values[1])):
            raise UserError(
                f"--processes={values[1]} and --process={values[2]}: write their count, and a number below it"
            )
        address, count, number = values
        options = dict(coordinator_address=address, num_processes=int(count), process_id=int(number))
        options["cluster_detection_method"] = "deactivate"
    if heartbeat < 1:
        raise UserError(f"--heartbeat={heartbeat} must be at least 1 second")
    try:
        jax.distributed.initialize(**options, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=heartbeat)
    except (ValueError, RuntimeError) as error:
        reason = one_line(error)
        raise UserError(f"the processes of the run cannot be joined: {reason}") from None
    if jax.process_count() > 1:
        _say_why_it_aborts()


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
    os.write(2, f"error: {LOST}\n".encode())
    os._exit(STOPPED)


def _say_why_it_aborts() -> None:
    """JAX's runtime aborts a process once another is dead. Python cannot catch that, and the C library can."""
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(_aborted, ctypes.c_void_p))


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return "ipykernel" in sys.modules


def console() -> TextIO:
    """Where remarks and progress go: stderr; in a notebook stdout, since it shows stderr on red, as errors."""
    return sys.stdout if in_notebook() else sys.stderr


def note(text: str) -> None:
    """One line for the person watching, above a bar that is being drawn."""
    if is_first():
        tqdm.tqdm.write(printable(text), file=console())


def agreed(value: Any) -> Any:
    """The first process's value, in all of them.

    Args:
      value: of this process; of the first one, what JSON can say.
    """
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode() if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    room = np.zeros(-(-size // 4096) * 4096, np.uint8)  # few sizes, so that few programs are compiled
    room[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(room))[:size])


def gathered(value: Any) -> list[Any]:
    """The values of all processes in their order, in all of them.

    Args:
      value: of this process; what JSON can say.
    """
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    room = np.zeros(-(-max(sizes) // 4096) * 4096, np.uint8)
    room[: len(text)] = np.frombuffer(text, np.uint8)
    texts = multihost_utils.process_allgather(room)
    return [json.loads(bytes(text)[:size]) for text, size in zip(texts, sizes, strict=True)]


def check_alike(values: Mapping[str, Any]) -> None:
    """Stops all processes where they are not about to do the same: each would go its own way, or wait for ever.

    Args:
      values: what must be the same everywhere, by name; what JSON can say.

    Raises:
      UserError: a value differs; the line names the first that does, and is the same in all processes.
    """
    first, *others = gathered(dict(values))
    for number, other in enumerate(others, 1):
        for name in [*first, *(other.keys() - first.keys())]:
            if first.get(name) != other.get(name):
                raise UserError(
                    f"the processes of this run differ in {name}: {first.get(name)} in process 0, "
                    f"{other.get(name)} in process {number}; start all with the same options, files and code"
                )


def by_first(action: Callable[[], Any]) -> None:
    """Lets the first process do something while the others wait; a mistake that it finds is everyone's.

    Args:
      action: whose UserError is raised in all processes.
    """
    mistake = None
    if is_first():
        try:
            action()
        except UserError as error:
            mistake = error
    if (said := agreed(mistake and [mistake.status, str(mistake)])) is not None:
        raise mistake or (WriteError if said[0] == WriteError.status else UserError)(said[1])


def told_by_first(read: Callable[[], Any]) -> Any:
    """What the first process reads, in all of them: a file that it also writes may be half written to the others.

    Args:
      read: gives what JSON can say; its UserError is raised in all processes.
    """
    values: list[Any] = []
    by_first(lambda: values.append(read()))
    return agreed(values[0] if values else None)


def all_have(value: bool) -> bool:
    """Whether something is true in every process."""
    return all(gathered(value))


def fetch(tree: Any) -> Any:
    """Arrays as NumPy's, whole in every process wherever their parts lie.

    Args:
      tree: of jax.Array; all processes call with the same.
    """
    return jax.device_get(jax.tree.map(_replicated, tree))


def _replicated(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return x
    return jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, P()))(x)


def stop_requested(step: int) -> bool:
    """Whether SIGTERM came to any of several processes and this is the step after which all stop, the same for all.

    Args:
      step: counted on from call to call; every process must ask at every step.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets, so that the loop ends at a step and saves; a second Ctrl-C ends at once.

    Of several processes none may stop by itself: there JAX takes the SIGTERM, and `stop_requested` tells all.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals reach only the main thread
        return

    def handle(number: int, frame: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT), handle)
    if jax.process_count() > 1:
        handlers = {signal.SIGINT: lambda number, frame: os.kill(os.getpid(), signal.SIGTERM)}
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
