"""How a program ends: its exit statuses, and one line for a mistake of the user's."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from prefalign_jax.types import UserError, WriteError, one_line, printable

INTERRUPTED = 130
PIPE_CLOSED = 141  # SIGPIPE's
STOPPED = 143  # what a shell reports of a process that SIGTERM ended: launchers restart it
LOST = (
    "another process of this run stopped (its own output says why); start all of them again with the same command: "
    "the run goes on from its last checkpoint"
)
_OF_A_PEER = re.compile(r"gloo|nccl|coordination|heartbeat|connection (reset|refused|closed)", re.IGNORECASE)


def status_of(run: Callable[[], int | None]) -> int:
    """The exit status of what `run` does: its own, or that of a UserError, which is printed as one line.

    One of several processes does not come back from a failure: it would wait for the others, which wait for it.
    """
    try:
        status = run() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # what reads the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except UserError as error:
        status, text = error.status, f"error: {printable(str(error))}"
    except KeyboardInterrupt:
        status, text = INTERRUPTED, "interrupted"
    except Exception as error:
        if _joined() and lost_peer(error):
            status, text = STOPPED, f"error: {LOST}"
        elif isinstance(error, OSError | MemoryError):  # in a place where nobody thought of it
            status, text = WriteError.status, f"error: {printable(one_line(error))}"
        elif not _joined():
            raise
        else:
            status, text = 1, traceback.format_exc()
    print(text, file=sys.stderr, flush=True)
    if _joined():
        _leave(status)
    return status


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    return _OF_A_PEER.search(str(error)) is not None


def _joined() -> bool:
    """Whether this is one of several processes; only a program that has imported jax can be."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _leave(status: int) -> NoReturn:
    """Ends this process whatever the others do; after the heartbeat's time they end too."""
    sys.stdout.flush()
    if status != STOPPED:
        with contextlib.suppress(Exception):  # waits for those that found the same mistake
            sys.modules["jax"].distributed.shutdown()
    os._exit(status)
