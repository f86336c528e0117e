"""A limit on the time of what others wrote: regular expressions and templates of a downloaded model may have no end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

SECONDS = 5.0  # for what takes milliseconds


@contextlib.contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Ends what takes longer. Python gives signals to its main thread alone, so in other threads there is no limit.

    A limit inside another one stops the clock of the outer one.

    Args:
      seconds: of wall clock.

    Raises:
      TimeoutError: the time is over.

    Example:
      >>> with time_limit(0.01):
      ...     while True:
      ...         pass
      Traceback (most recent call last):
      TimeoutError: it takes more than 0.01 seconds
    """

    def over(number: int, frame: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, over)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)
