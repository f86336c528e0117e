import math

import numpy as np
import pytest

from prefalign_jax.analysis.quantities import first_loss, marks, unit_of
from prefalign_jax.analysis.runs import Run
from prefalign_jax.pages.charts import MOST_POINTS, Curve, Panel, chart_data


def run_of(fields, **first):
    row = {"step": 1, "loss": math.log(2) + 2e-7, "rewards/margins": 0.0, **first}
    return Run("r", None, {f"loss.{name}": value for name, value in fields.items()}, [row], [])


DPO, ORPO = run_of({"name": "dpo", "beta": 0.1}), run_of({"name": "orpo"}, **{"rewards/margins": 0.2})


@pytest.mark.parametrize(
    ("metric", "runs", "unit"),
    [
        ("eval/logps/chosen", [DPO], "nats per response"),
        ("logps/rejected", [ORPO], "nats per token"),
        ("logps/chosen", [DPO, ORPO], "nats, as each loss takes them"),
        ("logps/chosen", [run_of({"name": "a loss of their own"})], "nats"),
        ("tokens_per_second", [DPO], "tokens per second"),
        ("samples/kl", [DPO], "nats per response"),
        ("something_else", [DPO], ""),
    ],
)
def test_units_are_those_of_the_loss(metric, runs, unit):
    assert unit_of(metric, runs) == unit


def test_losses_are_read_against_where_they_begin():
    assert [mark.label for mark in marks("eval/loss", [DPO, DPO, ORPO])] == ["log 2 = 0.693: policy = reference"]
    assert marks("loss", [ORPO]) == [] and first_loss(ORPO) is None
    assert [mark.value for mark in marks("loss", [run_of({"name": "ipo"}, loss=25.000004), DPO])] == [0.6931, 25.0]
    assert first_loss(run_of({"name": "dpo"}, step=11)) is None  # its first rows are not there
    assert marks("loss", [run_of({"name": "dpo"}, loss=float(n)) for n in range(9)]) == []


def test_long_curves_are_thinned_and_that_is_said():
    x = np.arange(2.5 * MOST_POINTS)
    values = np.where(x == 3, np.nan, x / 3)
    panel = Panel("t", "u", [], False, [[Curve(x, values), None], None], ["caption", ""])
    (drawn,) = chart_data(["a", "b"], {"step": "steps", "seconds": "s"}, [panel])["panels"]
    (xs, mean, low, high), nothing = drawn["curves"][0]
    assert (
        len(xs) == len(mean) <= MOST_POINTS
        and xs[:3] == [0, 3, 6]
        and mean[1] is None
        and low is high is nothing is None
    )
    assert drawn["captions"] == ["caption; one point in 3 is drawn", ""] and drawn["curves"][1] is None
