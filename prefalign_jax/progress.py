"""How far something has come: tqdm's bar on terminals and in notebooks, a line now and then in a log."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from typing import Self, TextIO

import jax.monitoring
import tqdm

from prefalign_jax.processes import console, in_notebook, is_first

# JAX reports the beginning of each as a scalar and its end as a duration; one may lie within another.
_COMPILING = {
    f"/jax/core/compile/{name}_duration" for name in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
}
_OFTEN = 0.1  # seconds between two states of a bar


class Progress:
    """Shows how far something has come: share, latest metrics, rate, time left.

    While JAX compiles it says so, and its clock stands still: rate and time left are of what comes after. Of several
    processes only the first shows anything, and nothing is shown before the first update or compilation.

    Args:
      total: units in all; None if nobody knows, then no share and no time left is shown.
      unit: what is counted.
      start: units that an earlier run has done, which do not count for the rate.
      every: seconds between lines where stderr is neither a terminal nor a notebook.
      stream: None is stderr, and in a notebook stdout.

    Example:
      >>> import sys
      >>> with Progress(10_000, "step", stream=sys.stdout) as progress:
      ...     progress.update(0, {"loss": 0.693147})
      step 0/10,000 (0%), loss 0.6931
    """

    def __init__(
        self,
        total: int | None,
        unit: str = "step",
        *,
        start: int = 0,
        every: float = 30.0,
        stream: TextIO | None = None,
    ):
        self.total, self.unit, self.start = total, unit, start
        self.done, self.said = start, ""
        self.stream = stream or console()
        self.live = self.stream.isatty() or in_notebook()
        self.every = _OFTEN if self.live else every
        self.began = time.monotonic()
        self.compiled = 0.0  # seconds
        self.depth = 0  # of compilations within compilations
        self.shown = self.told = -math.inf  # when a state was shown, and when in a log that it compiles
        self.bar: tqdm.tqdm | None = None
        self.open = is_first()
        if self.open:
            jax.monitoring.register_scalar_listener(self._begins)
            jax.monitoring.register_event_duration_secs_listener(self._ends)

    def update(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        """Shows the state if it is time to.

        Args:
          done: units done, those before `start` among them.
          metrics: name -> number, shown with four significant digits.
        """
        self.done, self.said = done, ", ".join(f"{name} {value:.4g}" for name, value in (metrics or {}).items())
        if self.total is not None:
            self.total = max(self.total, done)
        now = time.monotonic()
        if self.open and (now - self.shown >= self.every or done == self.total):
            self.shown = now
            self._show(now)

    def close(self) -> None:
        """Leaves the last state standing, so that what is printed next has its own line."""
        if self.open:
            self.open = False
            jax.monitoring.unregister_scalar_listener(self._begins)
            jax.monitoring.unregister_event_duration_listener(self._ends)
        if self.bar is not None:
            self._show(time.monotonic())
            self.bar.close()
            self.bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _begins(self, event: str, value: float, **_: object) -> None:
        if event not in _COMPILING:
            return
        self.depth += 1
        if self.depth == 1:
            self.since = now = time.monotonic()
            if self.live or now - self.told >= self.every:
                self.told = now
                self._show(now, "compiling")

    def _ends(self, event: str, seconds: float, **_: object) -> None:
        if event not in _COMPILING:
            return
        self.depth -= 1
        if self.depth == 0:
            now = time.monotonic()
            self.compiled += now - self.since
            if self.live:
                self._show(now)

    def _show(self, now: float, instead: str = "") -> None:
        elapsed, unit = now - self.began - self.compiled, self.unit.split()[-1]
        said, rated = instead or self.said, self.done > self.start and elapsed > 0
        known = self.total is not None
        if self.live:
            if self.bar is None:
                shape = "{n:,} [{elapsed}"
                if known:
                    shape = "{percentage:3.0f}%|{bar}| {n:,}/{total:,} [{elapsed}<{remaining}"
                self.bar = tqdm.tqdm(
                    desc=self.unit,
                    total=self.total,
                    initial=self.start,
                    unit=unit,
                    bar_format=f"{{desc}}: {shape}, {{rate_fmt}}{{postfix}}]",
                    ncols=_columns(self.stream),
                    nrows=24,  # what a terminal that does not know its height says would hide the bar
                    file=self.stream,
                )
            self.bar.ncols = _columns(self.stream)
            self.bar.n, self.bar.total, self.bar.last_print_t = self.done, self.total, time.time()
            self.bar.start_t = self.bar.last_print_t - elapsed
            self.bar.set_postfix_str(said)
            return
        shape = "{desc} {n:,}" + "/{total:,} ({percentage:.0f}%)" * known + "{postfix}"
        shape += (" | {rate_fmt}" + " | {remaining} left" * known) * rated
        about = dict(prefix=self.unit, unit=unit, postfix=said, initial=self.start, bar_format=shape)
        line = tqdm.tqdm.format_meter(self.done, self.total, elapsed, **about)
        self.stream.write(" ".join(line.split()) + "\n")
        self.stream.flush()


def _columns(stream: TextIO) -> int | None:
    """The width that a line has, None without a terminal; a terminal that does not know its own has the usual one."""
    try:
        return (os.get_terminal_size(stream.fileno()).columns or 80) - 1
    except (AttributeError, OSError, ValueError):
        return None
