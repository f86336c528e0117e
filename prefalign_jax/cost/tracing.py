"""Some steps of a run as XProf and Perfetto show them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from prefalign_jax.processes import note


class Tracer:
    """Traces some steps of a training loop; to be entered around the loop.

    Args:
      steps: which, in a row.
      start: steps that an earlier run has done.
      directory: gets the traces.
    """

    def __init__(self, steps: range, start: int, directory: Path):
        if steps and steps[0] <= start:
            note(f"profile_steps={steps[0]}:{steps[-1]}: passed already, nothing is traced")
            steps = range(0)
        self.steps, self.directory = steps, directory
        self.tracing = contextlib.ExitStack()

    def __enter__(self) -> Tracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tracing.close()

    def before(self, step: int, state: Any) -> None:
        """Begins at the first of the steps, once what came before has left the devices."""
        if step in self.steps[:1]:
            jax.block_until_ready(state)
            self.tracing.enter_context(jax.profiler.trace(self.directory, create_perfetto_trace=True))

    def after(self, step: int, state: Any) -> None:
        """Ends after the last of the steps, once it is computed."""
        if step in self.steps[-1:]:
            jax.block_until_ready(state)
            self.tracing.close()
            note(f"steps {self.steps[0]} to {self.steps[-1]} traced in {self.directory}")
