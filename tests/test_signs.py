"""Signs: a made-up run that shows each, one that stays just short of it, and what a real run says of itself."""

import json
import pathlib
import re

import numpy as np
import pytest

from fake_runs import leave_run
from prefalign_jax.analysis import signs
from prefalign_jax.analysis.compare_page import write_page
from prefalign_jax.analysis.runs import Run, find_runs, read_run
from prefalign_jax.analysis.signs import SIGNS, signs_of
from prefalign_jax.config import defaults
from prefalign_jax.evaluation.held_out import moved_columns, summary
from prefalign_jax.losses import LOSSES, make_loss
from prefalign_jax.train import Run as TrainingRun
from prefalign_jax.train import train
from prefalign_jax.types import PairLogps

ROOT = pathlib.Path(__file__).parents[1]
TRL = ROOT / "tests" / "goldens" / "trl"
DPO = {"loss.name": "dpo", "loss.beta": 0.1, "reference.kind": "copy"}


def run_of(train=(), held_out=(), datasheet=None, **config) -> Run:
    config = {"steps": 200, "batch_size": 20, "learning_rate": 5e-7, **DPO, **config}
    return Run("r", pathlib.Path("r"), config, list(train), list(held_out), datasheet=datasheet or {})


def held_out(*rows, step=100):
    """Rows of eval.jsonl, `step` apart, from fields without their 'eval/'."""
    return [
        {"step": number * step} | {name if "/" in name[:8] else f"eval/{name}": value for name, value in row.items()}
        for number, row in enumerate(rows)
    ]


def moved(fell, change, **others):
    return {"displacement/fell": fell, "displacement/change": change} | others


def evaluated(*rows, **options):
    return held_out(*({f"eval/{name}": value for name, value in row.items()} for row in rows), **options)


def sampled(name, mean, half):
    return {f"samples/{name}": mean, f"samples/{name}_low": mean - half, f"samples/{name}_high": mean + half}


def trained(accuracy, losses=(0.69, 0.3), margins=(1.0, 2.0), count=10):
    """Rows of metrics.jsonl with margins and losses that go from the first to the second."""
    ramp = np.linspace(0, 1, count)
    return [
        {"step": 1 + 10 * n, "loss": losses[0] + x * (losses[1] - losses[0]), "rewards/accuracies": accuracy}
        | {"rewards/margins": margins[0] + x * (margins[1] - margins[0]), "rewards/chosen": 0.0}
        for n, x in enumerate(ramp)
    ]


def sheet(part="training", before=1000, training=None, **dropped):
    dropped = {name.replace("_", " "): n for name, n in dropped.items()}
    stage = {"name": "tokenize", "before": before, "after": before - sum(dropped.values()), "dropped": dropped}
    about = {"count": 1000, **(training or {})}
    return {"stages": {"training": [], "held out": [], part: [stage]}, "training": about, "max_length": 512} | {
        "too_long": "truncate_response"
    }


START = moved(0.0, 0.0)
STILL = {"loss": 0.693, "logps/chosen": -100.0, "logps/rejected": -90.0}
# sign -> (runs that show it, and no other sign), (runs that show none, each short of it in one thing)
CASES = {
    "displacement": (
        [
            run_of(held_out=evaluated(START, moved(0.82, -12.3))),
            run_of(held_out=evaluated({"logps/chosen": -100}, {"logps/chosen": -102, "rewards/margins": 1.0})),
        ],
        [
            run_of(held_out=evaluated(START, moved(0.82, -0.9))),
            run_of(held_out=evaluated(START, moved(0.4, -12.3))),  # a tail
            run_of(held_out=evaluated(START, moved(0.2, 3.0))),
            run_of(held_out=evaluated({"logps/chosen": -100}, {"logps/chosen": -100.5, "rewards/margins": 1.0})),
            run_of(held_out=evaluated({"logps/chosen": -100}, {"logps/chosen": -120})),  # fine-tuning: no margins
        ],
    ),
    "length": (
        [
            run_of(held_out=held_out(sampled("length", 40, 3), sampled("length", 61, 4))),
            run_of(held_out=held_out(sampled("length", 40, 3), sampled("length", 20, 4))),
        ],
        [
            run_of(held_out=held_out(sampled("length", 40, 15), sampled("length", 61, 15))),  # chance
            run_of(held_out=held_out(sampled("length", 40, 0.1), sampled("length", 49, 0.1))),
            run_of(held_out=held_out(sampled("length", 40, 3))),
            run_of(held_out=held_out(sampled("length", 40, 3), sampled("length", 61, 4)), **{"loss.name": "sft"}),
        ],
    ),
    "kl": (
        [run_of(held_out=held_out(sampled("kl", 0, 0), sampled("kl", 14.2, 2)))],
        [
            run_of(held_out=held_out(sampled("kl", 0, 0), sampled("kl", 11, 2))),
            run_of(held_out=held_out(sampled("kl", 0, 0), sampled("kl", 3.6, 0.3))),
            run_of(held_out=held_out(sampled("kl", 0, 0), sampled("kl", 14.2, 2)), **{"reference.kind": "none"}),
        ],
    ),
    "saturation": (
        [
            run_of(trained(1.0)),
            run_of([{"step": 1, "loss": 0.69}, *trained(0.9, losses=(0.03, 0.02))], evaluated({"loss": 0.69})),
        ],
        [
            run_of(trained(0.98)),
            run_of(trained(1.0, margins=(2.0, 1.9))),  # they do not grow
            run_of(trained(1.0, count=9)),
            run_of(trained(1.0), batch_size=4),  # 20 pairs may all be right by chance
            run_of(trained(0.98, losses=(0.69, -3.0))),  # a loss without a floor at 0
        ],
    ),
    "idle": (
        [
            run_of(held_out=evaluated(STILL, {**STILL, "loss": 0.69})),
            run_of(trained(0.5, losses=(0.69, 0.689), margins=(0.0, 0.001)), steps=91),
        ],
        [
            run_of(held_out=evaluated(STILL, {**STILL, "loss": 0.68})),
            run_of(held_out=evaluated(STILL, {**STILL, "logps/chosen": -98.0})),
            run_of(held_out=evaluated(STILL, {**STILL}, step=99)),  # before half of it
            run_of(held_out=evaluated(STILL, {**STILL}, step=19), steps=19),
            run_of(trained(0.5, losses=(0.69, 0.6), margins=(0.0, 0.1)), steps=91),
            run_of(trained(0.5, losses=(2.69, 2.689), margins=(0.4, 0.5)), steps=91),  # batches differ
        ],
    ),
    "ties": (
        [
            run_of(datasheet=sheet(identical_responses=30, tie=20)),
            run_of(datasheet=sheet(identical_after_truncation=50)),
            run_of(held_out=evaluated(START, moved(0.1, 1.0, ties=0.06))),
        ],
        [
            run_of(datasheet=sheet(identical_responses=30, tie=19, empty_response=500)),
            run_of(held_out=evaluated(START, moved(0.1, 1.0, ties=0.04))),
            run_of(held_out=evaluated(moved(0.0, 0.0, ties=0.06), moved(0.1, 1.0))),  # no longer
        ],
    ),
    "noise": (
        [
            run_of(
                trained(0.95, losses=(0.69, 0.1), margins=(0.0, 2.0)),
                evaluated({"loss": 0.69}, {"loss": 0.7, "rewards/accuracies": 0.58, "rewards/accuracies_high": 0.62}),
            ),
            run_of(
                held_out=evaluated(START, moved(0, 1.0, **{"rewards/accuracies": 0.4, "rewards/accuracies_high": 0.45}))
            ),
            run_of(datasheet=sheet(contradictory=50)),
        ],
        [
            run_of(trained(0.95), evaluated({}, {"rewards/accuracies": 0.75, "rewards/accuracies_high": 0.8})),
            run_of(trained(0.95), evaluated({}, {"rewards/accuracies": 0.6, "rewards/accuracies_high": 0.97})),  # few
            run_of(trained(0.85), evaluated({}, {"rewards/accuracies": 0.5, "rewards/accuracies_high": 0.55})),
            run_of(  # by signs alone
                trained(0.95, losses=(0.69, 0.6), margins=(0.0, 0.1)),
                evaluated({}, {"rewards/accuracies": 0.58, "rewards/accuracies_high": 0.62}),
            ),
            # Equal rewards count nothing with accuracy_ties=trl.
            run_of(held_out=evaluated({**START, "rewards/accuracies": 0.0, "rewards/accuracies_high": 0.01})),
            # Without a reference an accuracy below one half may be of longer responses.
            run_of(held_out=evaluated({}, {"rewards/accuracies": 0.4, "rewards/accuracies_high": 0.45})),
            run_of(datasheet=sheet(contradictory=49)),
        ],
    ),
    "reference": (
        [
            run_of(held_out=evaluated(moved(0.4, 0.5))),
            run_of(held_out=evaluated(moved(1.0, -7.0), moved(0.4, 1.0)), **{"reference.path": "other"}),
            run_of([{"step": 1, "loss": 0.6, "rewards/chosen": -0.5}]),  # no held-out data: 5 nats at beta 0.1
        ],
        [
            run_of(held_out=evaluated(moved(0.5, -0.05))),  # rounding
            run_of(held_out=evaluated(START, moved(0.4, 0.5))),
            run_of([{"step": 1, "loss": 0.6, "rewards/chosen": -0.5}], **{"model.dropout": 0.1}),
            run_of([{"step": 1, "loss": 0.6, "rewards/chosen": -0.5}], **{"reference.kind": "none"}),
            run_of([{"step": 11, "loss": 0.6, "rewards/chosen": -0.5}]),
        ],
    ),
    "truncation": (
        [
            run_of(datasheet=sheet(too_long=50)),
            run_of(datasheet=sheet("held out", too_long=50)),
            run_of(datasheet=sheet(training={"cut": 50})),
        ],
        [run_of(datasheet=sheet(too_long=49)), run_of(datasheet=sheet(training={"cut": 49})), run_of()],
    ),
}


@pytest.mark.parametrize("name", SIGNS)
def test_a_run_shows_a_sign_and_no_other(name):
    for run in CASES[name][0]:
        assert list(signs_of(run)) == [name]
    for run in CASES[name][1]:
        assert signs_of(run) == {}


def test_what_is_said_is_plain():
    for name, (runs, _) in CASES.items():
        for run in runs:
            text = SIGNS[name](run)
            assert "nan" not in text and "None" not in text and text.endswith("."), text
            assert all(len(sentence.split()) <= 36 for sentence in re.split(r"[.:;] ", text)), text


def test_the_counts_and_distances_are_said():
    counted = sheet("held out", before=600, too_long=20)
    run = CASES["displacement"][0][0]._replace(datasheet=counted)
    assert signs_of(run)["displacement"].startswith(
        "82% of 580 held-out chosen responses are less likely than under the reference; the mean change is -12.3 nats."
    )
    assert "50%" not in signs_of(run_of(datasheet=sheet(too_long=50)))["truncation"]
    assert "5% (50 of 1,000)" in signs_of(run_of(datasheet=sheet(too_long=50)))["truncation"]
    assert "longer one in 62%" in SIGNS["length"](
        CASES["length"][0][0]._replace(datasheet=sheet(training={"length_bias": {"longer_wins": 0.62}}))
    )
    assert "5e-06" in SIGNS["idle"](CASES["idle"][0][0])
    assert "adapters" in SIGNS["idle"](run_of(held_out=CASES["idle"][0][0].held_out, **{"lora.rank": 8}))


def test_advice_names_what_there_is():
    words = " ".join(SIGNS[name](run) for name, (runs, _) in CASES.items() for run in runs)
    fields = set(re.findall(r"\b((?:loss|model|reference|data)\.\w+)", words))
    assert fields <= {"loss.name", "loss.beta", "loss.label_smoothing", "reference.path"}
    lists = re.findall(r"loss\.name=((?:\w+, )*\w+(?: or \w+)?)", words)
    names = {name for one in lists for name in re.split(", | or ", one)} - {"loss"}
    assert names >= {"rpo", "dpop", "ln_dpo", "simpo", "ipo", "robust_dpo"} and names <= LOSSES.keys()
    for loss in LOSSES:
        run = run_of(held_out=evaluated(START, moved(0.9, -5.0)), **{"loss.name": loss})
        named = re.search(r"loss\.name='(.+?)'", signs_of(run)["displacement"])
        if named and "reward" not in make_loss(loss).needs:
            make_loss(named[1])  # a sum that can be made


def test_the_page_of_signs_names_all_and_their_thresholds():
    page = (ROOT / "docs" / "signs.md").read_text(encoding="utf-8")
    assert re.findall(r"^## `(\w+)`", page, re.M) == list(SIGNS)
    for number in (
        "1 nat",
        "1%",
        "0.1 nats",
        "a quarter",
        "10 nats",
        "0.99",
        "5%",
        "100 pairs",
        "0.9",
        "0.25",
        "20 steps",
    ):
        assert number in page, number
    values = (signs.FALL, signs.RATIO, signs.APART, signs.DRIFT, signs.FAR, signs.RIGHT, signs.FLOOR, signs.SEEN)
    assert values == (1, 0.01, 0.1, 1.25, 10, 0.99, 0.05, 100)  # what the page says
    assert (signs.KNOWN, signs.GAP, signs.HALF, signs.SHARE, signs.TRIED) == (0.9, 0.25, 0.5, 0.05, 20)
    n = 60_000
    assert np.log(n) - (n - 1) / n == pytest.approx(signs.FAR, abs=0.01)


# What evaluations count


def test_what_moved_and_what_is_tied():
    policy = PairLogps(np.array([-3.0, -5.0, -4.0]), np.array([-3.0, -6.0, -1.0]), np.ones(3), np.ones(3))
    frozen = PairLogps(np.array([-4.0, -3.0, -4.0]), policy.rejected, np.ones(3), np.ones(3))
    columns = moved_columns(make_loss("dpo"), policy, frozen)
    assert summary(columns | {"weight": np.array([1.0, 1.0, 2.0])}) == pytest.approx(
        {"eval/displacement/change": -0.25, "eval/displacement/fell": 0.25, "eval/ties": 0.25}
    )
    assert moved_columns(make_loss("simpo"), policy._replace(rejected=policy.chosen + 1), None) == {}
    unpaired = policy._replace(label=np.array([1.0, 0.0, 0.0]))
    assert summary(moved_columns(make_loss("kto"), unpaired, frozen) | {"weight": np.ones(3)}) == {
        "eval/displacement/change": 1.0,
        "eval/displacement/fell": 0.0,
    }


# A run, and its page


@pytest.mark.usefixtures("light_runs")
@pytest.mark.everything
def test_a_run_says_a_thing_when_it_first_holds_and_again_at_its_end(tmp_path, capsys):
    config = defaults("dpo")
    config.model.path, config.data.path = str(TRL), str(TRL / "pairs.jsonl")
    config.data.eval_path = config.data.path
    config.update(dict(batch_size=4, steps=4, eval_steps=1, max_length=38, learning_rate=0.3, tensorboard=False))
    config.export.enabled = False
    train(config, tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    of_data = [number for number, line in enumerate(lines) if line.startswith("truncation: ")]
    of_training = [number for number, line in enumerate(lines) if line.startswith("displacement: ")]
    assert len(of_data) == len(of_training) == 2 and of_data[0] < of_training[0] < of_training[1] < of_data[1]
    run = read_run(tmp_path / "run", "run")
    assert {"displacement", "truncation"} <= signs_of(run).keys()
    rows = run.held_out
    assert rows[0]["eval/displacement/fell"] == 0 == rows[0]["eval/displacement/change"]
    for row in rows:
        assert row["eval/displacement/change"] == pytest.approx(row["eval/rewards/chosen"] / 0.1, abs=1e-4)


def test_a_remark_costs_nobody_a_run(tmp_path, capsys, monkeypatch):
    def broken(run):
        raise ZeroDivisionError("oh")

    monkeypatch.setitem(SIGNS, "kl", broken)
    run = type("Run", (), {"workdir": leave_run(tmp_path / "run"), "said": set()})()
    TrainingRun.say_signs(run)
    assert "nothing is said of the run: oh" in capsys.readouterr().err


def test_the_page_shows_signs_of_one_run_and_counts_those_of_several(tmp_path):
    leave_run(tmp_path / "quiet", seed=0)
    write_page(find_runs([tmp_path / "quiet"]), tmp_path / "page.html", title="t")
    assert "Worth a look" not in (tmp_path / "page.html").read_text()
    for seed in (0, 1):
        leave_run(tmp_path / "runs" / f"{seed}", seed=seed)
    (tmp_path / "runs" / "1" / "datasheet.json").write_text(json.dumps(sheet(too_long=120)))
    write_page(find_runs([tmp_path / "runs" / "1"]), tmp_path / "page.html", title="t")
    text = (tmp_path / "page.html").read_text()
    assert "12% (120 of 1,000) of the training records" in text and "<summary>1: truncation" not in text
    write_page(find_runs([tmp_path / "runs"]), tmp_path / "page.html", title="t")
    text = (tmp_path / "page.html").read_text()
    assert "1 of 2" in text and "<summary>1: truncation</summary>" in text
