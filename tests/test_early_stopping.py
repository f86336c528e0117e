"""A run ends once a metric has not improved, at a step that is a function of what was measured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefalign_jax.early_stopping import EarlyStopping, stopping_of

VALUES = st.lists(st.floats(-2, 2), min_size=1, max_size=12)


def end_of(stopping, values):
    """The evaluation at which a run ends, None if it goes through."""
    rows = [{"step": 5 * n, "eval/x": value} for n, value in enumerate(values)]
    return next((n for n in range(len(rows)) if stopping.ends(rows[: n + 1])), None)


@pytest.mark.parametrize(
    ("mode", "min_delta", "values", "end"),
    [
        ("min", 0.0, [0.7, 0.6, 0.5, 0.4], None),
        ("min", 0.0, [0.7, 0.6, 0.6, 0.6], 3),  # as good is no improvement
        ("min", 0.0, [0.7, 0.8, 0.69, 0.8, 0.8, 0.1], 4),
        ("max", 0.0, [0.7, 0.8, 0.69, 0.9, 0.8, 0.85], 5),
        ("max", 0.1, [0.5, 0.55, 0.58, 0.9], 2),  # small steps do not add up to less than the last improvement
        ("max", 0.1, [0.5, 0.55, 0.65, 0.7, 0.7], 4),
    ],
)
def test_a_run_ends_after_two_evaluations_without_improvement(mode, min_delta, values, end):
    assert end_of(EarlyStopping("eval/x", mode, 2, min_delta), values) == end


@given(VALUES, st.integers(1, 4), st.floats(0, 1))
def test_the_most_of_a_metric_is_the_least_of_its_negative(values, patience, min_delta):
    least, most = (EarlyStopping("eval/x", mode, patience, min_delta) for mode in ("min", "max"))
    assert end_of(least, values) == end_of(most, [-value for value in values])


@given(VALUES, st.integers(1, 4), st.floats(0, 1))
def test_the_last_improvement_is_patience_evaluations_before_the_end(values, patience, min_delta):
    end = end_of(EarlyStopping("eval/x", "min", patience, min_delta), values)
    if end is not None:
        assert min(values[: end - patience + 1]) - min(values[end - patience + 1 : end + 1]) <= min_delta + 1e-9


def test_rows_without_the_metric_say_nothing():
    stopping = EarlyStopping("eval/x", "min", 1, 0.0)
    assert not stopping.ends([{"step": 0, "eval/x": 1.0}, {"step": 5, "samples/length": 3.0}])
    assert not stopping.ends([{"step": 0, "eval/x": 1.0}, {"step": 5, "eval/x": None}])  # it was not finite


def test_what_a_config_says():
    assert stopping_of({"early_stopping.metric": None}) is None and stopping_of({}) is None
    fields = {"early_stopping.metric": "eval/loss", "early_stopping.patience": 3, "early_stopping.min_delta": 0.0}
    assert stopping_of({**fields, "checkpoint.best_mode": "min"}) == EarlyStopping("eval/loss", "min", 3, 0.0)
