"""Early stopping: a run ends once an evaluation metric has not improved for some evaluations in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

PATIENCE = 3  # evaluations, where the config leaves it unset


class EarlyStopping(NamedTuple):
    """When a run ends early. It is a function of what was measured, so a resumed run ends where it would have ended.

    Attributes:
      metric: name of an evaluation metric.
      mode: whether the least (min) or the most (max) of it is best.
      patience: evaluations in a row without improvement after which the run ends.
      min_delta: what counts as an improvement is more than this.
    """

    metric: str
    mode: str
    patience: int
    min_delta: float

    def waited(self, values: Sequence[float]) -> int:
        """Evaluations since the last improvement. The first evaluation is one; later ones are by more than min_delta.

        Args:
          values: of the metric, one for each evaluation.

        Example:
          >>> stopping = EarlyStopping("eval/loss", "min", patience=2, min_delta=0.01)
          >>> stopping.waited([0.7, 0.6, 0.595, 0.594]), stopping.waited([0.7, 0.6, 0.5])
          (2, 0)
        """
        sign = 1 if self.mode == "max" else -1
        best, since = None, 0
        for value in values:
            improved = best is None or sign * (value - best) > self.min_delta
            best, since = (value, 0) if improved else (best, since + 1)
        return since

    def ends(self, evaluations: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a run ends with the last of its evaluations, rows of eval.jsonl."""
        return self.waited([x for row in evaluations if (x := row.get(self.metric)) is not None]) >= self.patience


def stopping_of(fields: Mapping[str, Any]) -> EarlyStopping | None:
    """The early stopping of a run, None for none.

    Args:
      fields: of its config, resolved, with dotted names.
    """
    if not fields.get("early_stopping.metric"):
        return None
    metric, patience, min_delta = (fields[f"early_stopping.{name}"] for name in ("metric", "patience", "min_delta"))
    return EarlyStopping(metric, fields["checkpoint.best_mode"], patience, min_delta)
