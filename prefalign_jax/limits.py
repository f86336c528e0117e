"""A limit on the time of what others wrote: regular expressions and templates of a downloaded model may have no end."""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SECONDS = 5.0  # for what takes milliseconds
_TICK = 1e-3
_CHOICES = 8  # 'this or that' in a regular expression that is matched outside the main thread


@contextlib.contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[Callable[[], None]]:
    """Ends what takes longer. Outside the main thread it ends Python code alone, see `check_pattern`.

    What it gives starts the clock anew, for the next of many short things. A limit inside another one stops the clock
    of the outer one, in the main thread.

    Args:
      seconds: of the thread's processor time: a process that was stopped, or starved by others, is not at fault.

    Raises:
      TimeoutError: the time is over.

    Example:
      >>> with time_limit(0.01):
      ...     while True:
      ...         pass
      Traceback (most recent call last):
      TimeoutError: it takes more than 0.01 seconds
    """
    message = f"it takes more than {seconds:g} seconds"
    if threading.current_thread() is not threading.main_thread():
        with _other_threads_limit(seconds, message) as start_anew:
            yield start_anew
        return

    until = [0.0]  # of processor time; the alarm, of wall clock, comes no later than this may be reached

    def start_anew() -> float:
        until[0] = time.thread_time() + seconds
        return signal.setitimer(signal.ITIMER_REAL, seconds)[0]

    def over(number: int, frame: Any) -> None:
        if (more := until[0] - time.thread_time()) > 0:
            signal.setitimer(signal.ITIMER_REAL, max(more, _TICK))
        else:
            raise TimeoutError(message)

    before = signal.signal(signal.SIGALRM, over)
    left = start_anew()
    try:
        yield start_anew
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


@contextlib.contextmanager
def _other_threads_limit(seconds: float, message: str) -> Iterator[Callable[[], None]]:
    """Signals reach only the main thread: another thread watches the clock and raises the exception in this one."""
    thread, lock, state = ctypes.c_ulong(threading.get_ident()), threading.Lock(), {"ended": False, "over": False}
    raise_in, ended, until = ctypes.pythonapi.PyThreadState_SetAsyncExc, threading.Event(), [0.0]

    clock = _clock_of(thread.value)

    def start_anew() -> None:
        until[0] = clock() + seconds

    def watch() -> None:
        while not ended.is_set() and (left := until[0] - clock()) > 0:
            ended.wait(max(left, _TICK))
        if ended.is_set():
            return
        with lock:
            if not state["ended"]:
                state["over"] = True
                raise_in(thread, ctypes.py_object(TimeoutError))

    start_anew()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield start_anew
    except TimeoutError:
        if not state["over"]:
            raise
    finally:
        ended.set()
        with lock:
            state["ended"] = True
            if state["over"]:
                raise_in(thread, None)  # which may not have been raised yet
        watcher.join()  # it asks for the time of this thread, which must not have ended
    if state["over"]:
        raise TimeoutError(message)


def _clock_of(thread: int) -> Callable[[], float]:
    """The processor time of a thread that runs; of wall clock, where the system does not tell."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    clock = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(clock)


def check_pattern(pattern: str) -> None:
    """Refuses a regular expression that nothing could end: outside the main thread, one of many ways to match.

    Python's matching neither looks at other threads nor lets them run.

    Args:
      pattern: the regular expression.

    Raises:
      TimeoutError: it repeats something and more, or has many choices.
    """
    if threading.current_thread() is threading.main_thread():
        return
    repeats, choices = len(re.findall(r"[*+{]", pattern)), len(re.findall(r"[?|]", pattern))
    if repeats + choices > 1 and (repeats or choices > _CHOICES):
        raise TimeoutError(f"{pattern!r:.40} may take too long, which only the main thread can end; call from there")
