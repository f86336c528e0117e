"""What of direct alignment matters, from made-up runs whose effects are known."""

import importlib.util
import math
import pathlib

import numpy as np
import pytest

from prefalign_jax.analysis.direct_alignment import (
    METRICS,
    PAIRWISE,
    answers,
    at_best,
    draw,
    point_of,
    said,
    table_of,
    values_of,
    values_since,
)
from prefalign_jax.analysis.runs import Run, read_run
from prefalign_jax.experiment import read
from prefalign_jax.intervals import Interval
from prefalign_jax.losses import LOSSES
from prefalign_jax.train import train
from prefalign_jax.types import UserError
from test_train import TRL, config_of

EXPERIMENT = pathlib.Path(__file__).parents[1] / "experiments" / "papers" / "direct_alignment.py"
spec = importlib.util.spec_from_file_location("direct_alignment", EXPERIMENT)
experiment = importlib.util.module_from_spec(spec)
spec.loader.exec_module(experiment)

SEEDS = (0, 1, 2, 3)


def run(method, share, strength, seed, value, flops=100.0):
    """A run that rises to its value in a line, at `flops` in all."""
    rows = [{"step": step, METRICS[0]: value * step / 4, "eval/loss": 1.0} for step in range(5)]
    train = [{"step": step, "flops": flops / 4, "step_time": 1.0} for step in range(1, 5)]
    overrides = {"config": f"method={method},share={share}", "loss.beta": strength, "seed": seed}
    return Run("x", pathlib.Path("x"), {"seed": seed}, train, rows, overrides)


def value_of(method, share, strength, seed):
    """SFT adds 1, comparing within a pair 2, the middle strength 4; a seed moves all its runs alike."""
    noise = 0.01 * np.random.default_rng([seed, int(10 * share), len(method), int(strength)]).normal()
    return 10 + share + 2 * (method in PAIRWISE) + 4 * (strength == 2) + 5 * seed + noise


RUNS = [
    run(method, share, strength, seed, value_of(method, share, strength, seed))
    for method in ("dpo", "ipo", "nca", "kto")
    for share in (0.0, 1.0)
    for strength in (1.0, 2.0, 3.0)
    for seed in SEEDS
]


def test_effects_are_found_and_what_is_no_effect_is_not():
    values = values_of(RUNS, METRICS[0])
    lines = {line.partition(":")[0]: line for line in answers(values)}
    assert len(values) == 24 and "the seeds tell it from zero" in lines["SFT first, dpo"]
    overall = lines["SFT first, mean over methods"].partition(": ")[2]
    assert float(overall.split()[0]) == pytest.approx(1, abs=0.02) and "the seeds tell" in overall
    for words in ("in one stage", "after SFT"):
        line = lines[f"Pairwise minus pointwise, {words}, means over methods"]
        assert float(line.partition(": ")[2].split()[0]) == pytest.approx(2, abs=0.02) and "the seeds tell" in line
        # The best strength is the middle one for all: choosing it for each changes nothing.
        assert "do not tell" in lines[f"Spread between methods, {words}"]
    assert "pointwise" in table_of(values) and len(table_of(values).splitlines()) == 6
    assert len(draw(values, METRICS[0]).axes[0].containers) == 4


def test_the_best_strength_is_chosen_by_the_other_seeds():
    """A lucky value of the worse strength is not taken for it."""
    runs = [run("dpo", 0.0, 1.0, seed, value) for seed, value in enumerate([9.0, 0.0, 0.0])]
    runs += [run("dpo", 0.0, 2.0, seed, 5.0) for seed in range(3)]
    assert at_best(values_of(runs, METRICS[0]), "dpo", 0.0) == {0: 5.0, 1: 5.0, 2: 5.0}
    assert at_best(values_of(runs, METRICS[0]), "ipo", 0.0) == {}


def test_at_equal_compute_sft_is_paid_for():
    """Whoever pays half of the budget for SFT is read half-way, and who costs more than the cheapest before its end."""
    runs = [run("dpo", 0.0, 1.0, 0, 8.0), run("dpo", 1.0, 1.0, 0, 8.0), run("ipo", 0.0, 1.0, 0, 8.0, flops=200.0)]
    values = values_of(runs, METRICS[0], {1.0: 50.0})
    assert [by_seed[0] for by_seed in values.values()] == pytest.approx([8.0, 4.0, 4.0])


@pytest.mark.everything
def test_of_a_run_whose_reference_is_where_it_began_the_common_scale_is_its_own(tmp_path):
    """Summed it is DPO's accuracy of that run, and per token that of DPO of means."""
    runs = []
    for loss in ("dpo", "ln_dpo"):
        fields = {"data.eval_path": str(TRL / "pairs.jsonl"), "data.eval_limit": 60, "export.enabled": False}
        train(config_of(loss, steps=2, accuracy_ties="half", **fields), tmp_path / loss)
        mine = read_run(tmp_path / loss, loss)
        runs.append(mine._replace(overrides={"config": f"method={loss},share=0.0", "loss.beta": 0.1}))
    summed, means = values_since(runs, str(TRL)).values()
    own = [mine.held_out[-1]["eval/rewards/accuracies"] for mine in runs]
    assert [summed["dpo", 0.0, 0.1][0], means["ln_dpo", 0.0, 0.1][0]] == pytest.approx(own)
    assert summed != means


def test_another_sweep_is_refused():
    with pytest.raises(UserError, match="no point of experiments/papers/direct_alignment.py"):
        point_of(RUNS[0]._replace(overrides={"seed": 1}))


def test_the_experiment_says_what_the_analysis_reads(tmp_path):
    """Every point is one of the analysis's, of a loss that is known, and its two stages differ as the paper's do."""
    points = list(experiment.sweep())
    assert {name for name, (_, pairwise, *_) in experiment.METHODS.items() if pairwise} == set(PAIRWISE)
    assert len(points) == 8 * (2 * 3 + 2) * experiment.SEEDS
    for point in points[:: experiment.SEEDS]:
        made = experiment.get_config(f"{point['config']},model=base,sft=there")
        made.update_from_flattened_dict({name: value for name, value in point.items() if name != "config"})
        known = point_of(RUNS[0]._replace(overrides=point))
        loss = read(made, complete=False).plain["loss"]
        assert loss["name"] in LOSSES
        assert made.model.path == (f"there/{known.share}/export" if known.share else "base")
        assert loss.get("sft_weight") in (
            (None,) if loss["name"] not in ("orpo_beta", "asft") else (float(not known.share),)
        )
    for share in experiment.SHARES[1:]:
        made = read(experiment.get_config(f"method=sft,share={share},model=base"), complete=False)
        assert [source.fraction for source in made.sources] == [share]
        assert made.config.export.enabled


def test_a_difference_that_nobody_measured_is_not_one_that_the_seeds_do_not_tell():
    assert said("SFT first", Interval(math.nan, math.nan, math.nan)) == "SFT first: no seed has both."
    assert said("SFT first", Interval(0.1, math.nan, math.nan)).endswith("the seeds do not tell it from zero.")
