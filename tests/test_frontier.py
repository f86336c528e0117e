"""Reward against divergence, from what runs left."""

import json
from pathlib import Path

import numpy as np
import pytest

from prefalign_jax.analysis.frontier import best_of_points, draw_frontier, points_of, reward_within
from prefalign_jax.analysis.runs import Run
from prefalign_jax.generation.best_of_n import kl_bound
from prefalign_jax.intervals import t_interval
from prefalign_jax.types import UserError


def run(loss, beta, seed, values):
    rows = [{"step": step, "samples/kl": kl, "samples/reward": reward} for step, (kl, reward) in enumerate(values)]
    config = {"loss.name": loss, "loss.beta": beta, "seed": seed, "loss.tau": None}
    return Run(f"{loss}{beta}{seed}", Path("x"), config, [], [{"step": 9, "eval/loss": 1.0}, *rows])


RUNS = [
    run("dpo", 0.1, 0, [(0.0, 1.0), (1.0, 3.0)]),
    run("dpo", 0.1, 1, [(0.0, 2.0), (3.0, 5.0)]),
    run("dpo", 5.0, 0, [(0.0, 1.0), (0.4, 9.0)]),
    run("ipo", 0.1, 0, [(0.0, 1.0), (0.7, 0.5)]),
]


def test_seeds_are_averaged_and_strengths_kept_apart():
    points = {(p.method, p.strength, p.step): p for p in points_of(RUNS)}
    assert points["dpo", "beta=0.1", 0][3:] == (0.0, 1.5, 2)
    assert points["dpo", "beta=0.1", 1][3:] == (2.0, 4.0, 2)
    assert points["dpo", "beta=5.0", 1].seeds == 1 and len(points) == 6
    with pytest.raises(UserError, match="no run measured samples/reward"):
        points_of([RUNS[0]._replace(held_out=[{"step": 0}])])


def test_the_best_reward_within_a_divergence():
    points = points_of(RUNS)
    found = reward_within(RUNS, (0.1, 0.5, 2.0, 10.0))
    assert [mean for mean, *_ in found["dpo"]] == [1.5, (9 + 2) / 2, (9 + 2) / 2, (9 + 5) / 2]
    np.testing.assert_allclose(found["dpo"][3], t_interval(np.array([9.0, 5.0])))
    assert [mean for mean, *_ in found["ipo"]] == [1.0] * 4 and np.isnan(found["ipo"][0].low)
    gaps = reward_within(RUNS, (0.1, 10.0), minus="dpo")
    assert list(gaps) == ["ipo"] and [mean for mean, *_ in gaps["ipo"]] == [1.0 - 1.0, 1.0 - 9.0]  # seed 0 alone
    axes = draw_frontier(points, [(1, 0.0, 1.0), (2, 0.2, 1.5)]).axes[0]
    steps = axes.lines[0].get_ydata()
    assert (steps[1:] >= steps[:-1]).all() and steps[-1] == 9.0
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dpo", "ipo", "best of 1 to 2 (KL bound)"]


def test_the_best_of_n_from_the_pairs_of_a_prompt(tmp_path):
    scores = {"a": 1.0, "b": 2.0, "c": 6.0}
    rows = [
        {"prompt_number": 0, "chosen": x, "rejected": y, "score_chosen": scores[x], "score_rejected": scores[y]}
        for x, y in (("a", "b"), ("c", "a"), ("b", "c"))
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (one, two, three) = best_of_points(tmp_path / "pairs.jsonl")
    assert one == (1, 0.0, 3.0) and two == (2, kl_bound(2), pytest.approx((2 + 6 + 6) / 3)) and three[2] == 6.0
