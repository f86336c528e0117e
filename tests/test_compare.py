import json
import math

import numpy as np
import pytest
import scipy.stats

from fake_runs import FINALS, leave_ablation, leave_run
from prefalign_jax.analysis.compare import (
    band,
    comparable,
    final,
    group_runs,
    mixed,
    over_seeds,
    paired,
    points,
    reached_by_all,
    value_at,
)
from prefalign_jax.analysis.runs import find_runs
from prefalign_jax.types import UserError

FIRST, SECOND = (np.array(values) for values in FINALS.values())


@pytest.fixture
def runs(tmp_path):
    return find_runs([leave_ablation(tmp_path / "runs")])


def last_loss(run):
    return final(run, "eval/loss")


# Groups


def test_runs_that_differ_only_in_their_seeds_are_a_group(runs):
    groups = group_runs(runs)
    assert [(group.label, group.fields, len(group.runs)) for group in groups] == [
        ("beta=0.1", {"loss.beta": 0.1}, 3),
        ("beta=0.3", {"loss.beta": 0.3}, 3),
    ]
    assert [mixed(group) for group in groups] == [[], []]


@pytest.mark.parametrize("moved", [False, True])
def test_seeds_that_began_from_a_stage_of_their_own_are_a_group(tmp_path, moved):
    """SFT, then DPO: each seed's DPO has the path of its own SFT model, which is no other setting."""
    sweep = tmp_path / "sweep"
    for method in ("sft_dpo", "dpo"):
        for seed in range(2):
            point = sweep / f"method={method}-seed={seed}"
            (point / "sft" / "export").mkdir(parents=True)
            path = str(point / "sft" / "export") if method == "sft_dpo" else "base"
            leave_run(point / "aligned", seed=seed, model={"path": path})
            mark = {"overrides": {"config": f"method={method}", "seed": seed}, "done": {"run": "aligned"}}
            (point / "point.json").write_text(json.dumps(mark))
    if moved:
        sweep = sweep.rename(tmp_path / "elsewhere")
    groups = group_runs(find_runs([sweep]))
    assert [(group.label, len(group.runs), mixed(group)) for group in groups] == [("dpo", 2, []), ("sft_dpo", 2, [])]
    assert groups[1].fields == {"model.path": "sft/export"}


def test_labels_say_no_more_than_tells_groups_apart(tmp_path):
    for number, (name, hyper, rate) in enumerate((("dpo", "beta", 1.0), ("orpo", "lam", 2.0), ("dpo", "beta", 2.0))):
        leave_run(tmp_path / str(number), loss={"name": name, hyper: 0.1}, learning_rate=rate)
    labels = [group.label for group in group_runs(find_runs([tmp_path]))]
    assert len(set(labels)) == 3 and labels[1].startswith("orpo") and labels[0].startswith("dpo")
    assert all("batch_size" not in label and "seed" not in label for label in labels)


def test_groups_by_what_is_asked_for_and_says_what_else_differs_within(runs):
    (group,) = group_runs(runs, ["loss.name"])
    assert group.label == "dpo" and len(group.runs) == 6 and mixed(group) == ["loss.beta"]
    assert paired(group, group, last_loss) is None  # every seed twice
    with pytest.raises(UserError, match="no field 'loss.bta'; did you mean 'loss.beta'?"):
        group_runs(runs, ["loss.bta"])


def test_runs_without_a_config_are_not_thrown_together(tmp_path):
    leave_run(tmp_path / "a")
    (leave_run(tmp_path / "b") / "config.json").unlink()
    with pytest.raises(UserError, match=r"b has no config\.json"):
        group_runs(find_runs([tmp_path]))


# Over seeds


def test_means_and_paired_differences_are_students(runs):
    first, second = group_runs(runs)
    alone, gap = over_seeds(first, last_loss), paired(first, second, last_loss)
    assert alone.seeds == gap.seeds == 3
    for of, values in ((alone, FIRST), (gap, SECOND - FIRST)):
        expected = scipy.stats.t.interval(0.95, 2, values.mean(), scipy.stats.sem(values))
        np.testing.assert_allclose(of.interval, [values.mean(), *expected], rtol=1e-9)
    assert gap.interval.high < 0


def test_pairs_are_of_the_same_seed_whatever_the_order_and_lone_seeds_are_left_out(runs):
    first, second = group_runs(runs)
    turned = second._replace(runs=second.runs[::-1])
    assert paired(first, turned, last_loss) == paired(first, second, last_loss)
    fewer = second._replace(runs=second.runs[1:])
    np.testing.assert_allclose(paired(first, fewer, last_loss).interval.mean, (SECOND - FIRST)[1:].mean())
    assert paired(first, fewer, last_loss).seeds == 2


def test_a_metric_that_a_run_lacks_is_left_out_of_the_count(runs):
    first, _ = group_runs(runs)
    for row in first.runs[0].held_out:
        row["eval/loss"] = None
    assert over_seeds(first, last_loss).seeds == 2
    assert over_seeds(first, lambda run: final(run, "nothing")).seeds == 0


# Curves


def test_bands_are_the_interval_of_three_seeds_and_the_range_of_two(runs):
    group, _ = group_runs(runs)
    of = band(group, "eval/loss")
    np.testing.assert_array_equal(of.x, np.arange(0, 21, 2))
    values = 1 + (FIRST[:, None] - 1) * of.x / 20
    half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(values)
    np.testing.assert_allclose(
        [of.mean, of.low, of.high], values.mean(0) + np.array([0 * half, -half, half]), atol=1e-9
    )
    assert of.kind == "95% interval over 3 seeds"
    two = band(group._replace(runs=group.runs[:2]), "eval/loss")
    np.testing.assert_allclose([two.low, two.high], [values[:2].min(0), values[:2].max(0)])
    assert two.kind == "both runs" and band(group._replace(runs=group.runs[:1]), "eval/loss").kind == "one run"
    assert band(group, "nothing") is None and band(group, "eval/loss", "nothing") is None


def test_x_may_be_what_was_spent(runs):
    first, second = (group.runs[0] for group in group_runs(runs))
    for run, cost in ((first, 1.0), (second, 2.0)):
        np.testing.assert_allclose(points(run, "eval/loss", "seconds")[0], cost * np.arange(0, 21, 2))
        np.testing.assert_allclose(points(run, "loss", "trained_tokens")[0], 100 * cost * points(run, "loss")[0])


def test_bands_reach_as_far_as_every_run_does(tmp_path):
    leave_run(tmp_path / "a", steps=20)
    leave_run(tmp_path / "b", steps=10, seed=1)
    (group,) = group_runs(find_runs([tmp_path]), ["loss.name"])
    assert band(group, "eval/loss").x[-1] == 10 and mixed(group) == ["steps"]


# Equal compute


def test_at_equal_compute_the_dearer_run_counts_where_it_had_spent_as_much(runs):
    x = reached_by_all(runs, "seconds")
    assert x == 20.0  # what the cheaper ones take
    first, second = (group.runs[0] for group in group_runs(runs))
    assert value_at(first, "eval/loss", "seconds", x) == pytest.approx(0.5)
    assert value_at(second, "eval/loss", "seconds", x) == pytest.approx(1 - 0.6 / 2)  # half-way through
    assert value_at(second, "eval/loss", "seconds", 21.0) == pytest.approx(1 - 0.6 * 10.5 / 20)  # on the line
    assert math.isnan(reached_by_all(runs, "flops"))


def test_no_value_is_made_up_far_from_an_evaluation_or_beyond_the_last(runs):
    run = runs[0]
    assert math.isnan(value_at(run, "eval/loss", "step", 3.0))  # 2 and 4 are far apart, seen from 3
    assert math.isfinite(value_at(run, "eval/loss", "step", 9.0)) and math.isfinite(
        value_at(run, "eval/loss", "step", 4)
    )
    assert math.isnan(value_at(run, "eval/loss", "step", 21.0))
    del run.held_out[1:-1]
    assert math.isnan(value_at(run, "eval/loss", "step", 19.0)) and value_at(run, "eval/loss", "step", 20.0) == 0.5


@pytest.mark.parametrize(
    ("other", "alike"),
    [
        ({"name": "dpo", "beta": 0.1}, {"eval/loss", "eval/logps/chosen", "eval/rewards/accuracies", "grad_norm"}),
        ({"name": "dpo", "beta": 0.3}, {"eval/logps/chosen", "eval/rewards/accuracies", "grad_norm"}),
        ({"name": "dpo", "beta": 0.1, "per_token": True}, {"eval/rewards/accuracies"}),
        ({"name": "orpo", "beta": 0.1}, {"eval/rewards/accuracies"}),
    ],
    ids=["same", "another beta", "another option", "another loss"],
)
def test_what_a_loss_defines_for_itself_is_not_compared(other, alike, tmp_path):
    leave_run(tmp_path / "a", loss={"name": "dpo", "beta": 0.1, "per_token": False} if "per_token" in other else None)
    leave_run(tmp_path / "b", loss=other, learning_rate=1.0)
    groups = group_runs(find_runs([tmp_path]))
    names = ("eval/loss", "eval/logps/chosen", "eval/rewards/accuracies", "grad_norm")
    assert {name for name in names if comparable(groups, name)} == alike


# Names of groups


def test_runs_of_several_sweeps_get_short_names_that_tell_what_varies(tmp_path):
    path = "/a/very/long/way/to/" + "x" * 60
    for number, loss in enumerate(
        ({"name": "dpo", "beta": 0.1}, {"name": "orpo", "lam": 0.5}, {"name": "orpo", "lam": 1})
    ):
        fields = dict(batch_size=4 + number, data={"path": f"{path}/{number}.jsonl"}, epochs=1.0, steps=20 + number)
        leave_run(tmp_path / str(number), loss=loss, **fields)
    assert [group.label for group in group_runs(find_runs([tmp_path]))] == ["dpo", "orpo, lam=0.5", "orpo, lam=1"]


def test_long_values_are_cut_and_still_told_apart(tmp_path):
    for number in range(3):
        leave_run(tmp_path / str(number), note="n" * 200 + str(number), data={"path": f"/way/{number}/pairs.jsonl"})
    by_note = [group.label for group in group_runs(find_runs([tmp_path]), ["note"])]
    assert len(set(by_note)) == 3 and max(map(len, by_note)) < 75
    labels = [group.label for group in group_runs(find_runs([tmp_path]), ["data.path"])]
    assert labels == [f"data.path=/way/{number}/pairs.jsonl" for number in range(3)]
