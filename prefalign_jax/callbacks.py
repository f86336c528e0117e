"""Callbacks: functions of a caller's that a training run calls on its way, each of which may end it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prefalign_jax.processes import agreed

Metrics = Mapping[str, float]


class Callbacks(NamedTuple):
    """What a run calls, and when. A function that returns True ends the run, which is then evaluated and exported.

    Attributes:
      on_step: called with (step, metrics) for each line of metrics.jsonl, when it is written. The next step is already
        running then, and a run that is told to end does so after it.
      on_eval: called with (step, metrics) for each line of eval.jsonl, when it is written.
      on_save: called with (step, directory) for each checkpoint. The run waits until the checkpoint is on disk.

    Example:
      >>> callbacks = Callbacks(on_step=lambda step, metrics: metrics["loss"] < 0.1)
      >>> callbacks.told("on_step", 7, {"loss": 0.05}), callbacks.told("on_eval", 7, {"eval/loss": 0.6})
      (True, False)
    """

    on_step: Callable[[int, Metrics], bool | None] | None = None
    on_eval: Callable[[int, Metrics], bool | None] | None = None
    on_save: Callable[[int, Path], bool | None] | None = None

    def told(self, name: str, step: int, what: Any) -> bool:
        """Calls a function, if it is set, and says whether it ends the run: in all processes what the first is told."""
        function = getattr(self, name)
        return function is not None and agreed(bool(function(step, what)))
