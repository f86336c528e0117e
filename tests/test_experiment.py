"""A config read once: what it refuses, what it binds, and the experiments that come along."""

import importlib.util
import json
import math
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from prefalign_jax import experiment as module
from prefalign_jax.config import defaults
from prefalign_jax.experiment import CHOICES, read
from prefalign_jax.jobs import JOBS
from prefalign_jax.losses import LOSSES
from prefalign_jax.options import given
from prefalign_jax.types import UserError

EXPERIMENTS = sorted((pathlib.Path(__file__).parents[1] / "experiments").glob("*.py"))


def ready(loss: str = "dpo", **changes) -> ConfigDict:
    """An experiment that validates, with changes by dotted name ('model.path' as model__path)."""
    c = defaults(loss)
    changes = {"model__path": "model", "data__path": "data", **changes}
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return c


def complaint(config: ConfigDict) -> str:
    with pytest.raises(UserError) as caught:
        read(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is refused


@pytest.mark.parametrize("loss", LOSSES)
def test_the_defaults_of_every_loss_are_valid(loss):
    experiment = read(ready(loss))
    assert experiment.loss.name == experiment.config.loss.name == loss
    assert (experiment.config.reference.kind == "none") == ("reference" not in experiment.loss.needs)


@pytest.mark.parametrize("loss", ["DPO", "dppo", ""])
def test_an_unknown_loss_is_refused_at_once(loss):
    with pytest.raises(UserError, match=f"loss.*{loss!r}"):
        defaults(loss)
    assert repr(loss) in complaint(ready("dpo", loss__name=loss))


@pytest.mark.parametrize(
    "name", ["dtype", "model.param_dtype", "export.dtype", "too_long", "reference.kind", "data.layout"]
    + ["checkpoint.best_mode"]
)  # fmt: skip
@pytest.mark.parametrize("value", ["float23", "none_of_these", ""])
def test_an_unknown_choice_names_its_field(name, value):
    said = complaint(ready(**{name: value}))
    assert said.startswith(f"{name}={value!r}")


def test_a_mistyped_choice_names_the_nearest_and_all():
    said = complaint(ready(dtype="bfloat61"))
    assert "did you mean 'bfloat16'" in said
    assert "float32" in said


@pytest.mark.parametrize(
    "name",
    ["batch_size", "micro_steps", "max_length", "log_steps", "steps", "epochs", "examples", "eval_steps", "save_steps"]
    + ["grad_clip", "checkpoint.keep", "vocabulary_chunk"],
)
@pytest.mark.parametrize("value", [0, -2])
def test_what_must_be_positive_is_named(name, value):
    kind = float if name in ("epochs", "grad_clip") else int
    assert complaint(ready(**{name: kind(value)})).startswith(f"{name}=")


def test_nan_is_not_positive():
    assert "grad_clip" in complaint(ready(grad_clip=math.nan))


STOPPING = dict(early_stopping__metric="eval/loss", eval_steps=5, data__eval_fraction=0.1)


def test_early_stopping_keeps_and_exports_the_best_by_its_metric():
    config = read(ready(**STOPPING)).config
    assert (config.checkpoint.best_metric, config.checkpoint.best_mode) == ("eval/loss", "min")
    assert (config.export.checkpoint, config.early_stopping.patience) == ("best", 3)
    assert read(ready(**STOPPING, export__checkpoint="last")).config.export.checkpoint == "last"
    config = read(ready(**STOPPING | dict(early_stopping__metric="eval/rewards/accuracies"))).config
    assert config.checkpoint.best_mode == "max" and read(ready()).config.export.checkpoint == "last"


@pytest.mark.parametrize(
    ("loss", "changes", "named"),
    [
        ("dpo", dict(batch_size=6, micro_steps=4), ["batch_size=6", "micro_steps=4"]),
        ("dpo", dict(data__eval_fraction=1.0), ["data.eval_fraction=1.0"]),
        ("dpo", dict(data__eval_fraction=-0.1), ["data.eval_fraction=-0.1"]),
        ("dpo", dict(data__eval_fraction=math.nan), ["data.eval_fraction=nan"]),
        ("dpo", dict(data__eval_fraction=0.1, data__eval_path="x"), ["data.eval_fraction", "data.eval_path"]),
        ("dpo", dict(reference__kind="none"), ["'dpo'", "reference.kind"]),
        ("ipo", dict(reference__kind="none"), ["'ipo'", "reference.kind"]),
        ("dpo", dict(loss__reference_free=True), ["'dpo'", "reference.kind"]),
        ("orpo", dict(reference__kind="copy"), ["'orpo'", "reference.kind"]),
        ("sft", dict(reference__kind="cached"), ["'sft'", "reference.kind"]),
        ("orpo", dict(reference__path="x"), ["reference.path", "reference.kind"]),
        ("dpo", dict(reference__cache_dir="x"), ["reference.cache_dir", "'copy'"]),
        ("orpo", dict(reference__cache_dir="x"), ["reference.cache_dir", "'none'"]),
        ("dpo", dict(checkpoint__best_metric="eval/loss"), ["checkpoint.best_metric", "data.eval_path"]),
        ("dpo", dict(checkpoint__best_metric="eval/x", data__eval_fraction=0.1), ["'eval/x'", "checkpoint.best_mode"]),
        ("dpo", dict(early_stopping__patience=2), ["early_stopping.patience=2", "early_stopping.metric"]),
        ("dpo", STOPPING | dict(eval_steps=None), ["early_stopping.metric='eval/loss'", "eval_steps"]),
        ("dpo", STOPPING | dict(early_stopping__min_delta=-0.1), ["early_stopping.min_delta=-0.1"]),
        ("dpo", STOPPING | dict(early_stopping__patience=0), ["early_stopping.patience=0"]),
        ("dpo", STOPPING | dict(checkpoint__best_metric="eval/x"), ["checkpoint.best_metric='eval/x'", "'eval/loss'"]),
        ("dpo", dict(log_to="tensorboard", tensorboard=False), ["log_to='tensorboard'", "tensorboard=False"]),
        ("dpo", dict(model__path=""), ["model.path", "--config.model.path"]),
        ("dpo", dict(data__path=""), ["data.path", "--config.data.path"]),
    ],
)
def test_a_contradiction_names_its_fields(loss, changes, named):
    said = complaint(ready(loss, **changes))
    assert [name for name in named if name not in said] == []


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        ("dpo", dict(batch_size=6, micro_steps=3)),
        ("dpo", dict(data__eval_fraction=0.5)),
        ("dpo", dict(data__eval_path="x")),
        ("dpo", dict(loss__reference_free=True, reference__kind="none")),
        ("dpo", dict(reference__kind="cached", reference__cache_dir="x", reference__path="y")),
        ("dpo", dict(checkpoint__best_metric="eval/loss", data__eval_fraction=0.1)),
        ("dpo", dict(grad_clip=None, steps=1, epochs=0.0)),
        ("dpo", dict(job="quickstart", model__path=None, data__path=None)),
    ],
)
def test_what_does_not_contradict_is_taken(loss, changes):
    read(ready(loss, **changes))


# Hyper-parameters of the loss


def test_none_keeps_the_default_of_the_loss():
    assert read(ready("dpo")).loss.hyper == dict(beta=0.1, label_smoothing=0.0, reference_free=False)
    assert read(ready("dpo", loss__beta=0.3)).loss.hyper == dict(beta=0.3, label_smoothing=0.0, reference_free=False)


def test_zero_and_false_are_values():
    assert given(dict(name="x", a=0.0, b=False, c=None, d="")) == dict(a=0.0, b=False, d="")
    assert read(ready("orpo", loss__lam=0.0)).loss.hyper["lam"] == 0.0


@pytest.mark.parametrize(
    ("loss", "name", "value"),
    [("dpo", "lam", 0.1), ("orpo", "beta", 0.1), ("ipo", "beta", 0.1), ("hinge", "tau", 1.0)]
    + [("sft", "nll_over", "chosen"), ("sft", "label_smoothing", 0.0), ("orpo", "reference_free", False)],
)
def test_a_hyper_parameter_of_another_loss_is_refused(loss, name, value):
    said = complaint(ready(loss, **{f"loss.{name}": value}))
    assert repr(loss) in said
    assert repr(name) in said


@pytest.mark.parametrize(
    ("loss", "name", "value"),
    [("dpo", "beta", 0.0), ("dpo", "label_smoothing", 0.5), ("orpo", "lam", -1.0), ("sft", "mean", "batches")],
)
def test_a_hyper_parameter_out_of_range_is_refused(loss, name, value):
    said = complaint(ready(loss, **{f"loss.{name}": value}))
    assert f"{name}={value!r}" in said


# Durations


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        (dict(), 2),
        (dict(steps=7), 7),
        (dict(examples=19), 4),
        (dict(epochs=1.5), 3),
        (dict(epochs=0.01), 1),
        (dict(examples=3), 1),
        (dict(steps=7, examples=0, epochs=0.0), 7),
        (dict(steps=0, epochs=1.5), 3),
    ],
)
def test_the_length_of_a_run_is_the_field_set_or_one_epoch(fields, steps):
    """Four pairs a batch, ten an epoch."""
    assert read(ready(batch_size=4, **fields)).total_steps(10) == steps


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(steps=7, epochs=1.5), "steps=7 and epochs=1.5 are set together; set one (--config.epochs=0 unsets it)"),
        (dict(steps=7, examples=19, epochs=1.5), "steps=7 and examples=19 and epochs=1.5 are set together"),
        (dict(examples=19, epochs=0.5), "examples=19 and epochs=0.5 are set together"),
        (dict(warmup_steps=3, warmup_epochs=0.5), "warmup_steps=3 and warmup_epochs=0.5 are set together"),
        (dict(warmup_steps=3, warmup_ratio=0.5), "warmup_steps=3 and warmup_ratio=0.5 are set together"),
        (dict(steps=0, epochs=0.0), "steps=0 must be positive"),
    ],
)
def test_two_lengths_are_an_error(fields, says):
    assert complaint(ready(**fields)).startswith(says)


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        (dict(), 0),
        (dict(warmup_steps=3), 3),
        (dict(warmup_examples=9), 2),
        (dict(warmup_epochs=2.0), 5),
        (dict(warmup_ratio=0.07), 7),
        (dict(warmup_ratio=0.101), 11),
    ],
)
def test_the_warm_up_has_its_own_fields(fields, steps):
    assert read(ready(batch_size=4, steps=100, **fields)).warmup_steps(10) == steps


def test_an_epoch_is_its_examples():
    for epochs in (0.5, 1.0, 2.5):
        by_epochs, by_examples = (
            read(ready(batch_size=8, **length)).total_steps(96)
            for length in (dict(epochs=epochs), dict(examples=int(96 * epochs)))
        )
        assert by_epochs == by_examples == 12 * epochs


def test_max_length_is_what_the_model_takes_if_nothing_is_said():
    assert read(ready()).config.max_length is None
    for positions, length in ((512, 512), (1024, 1024), (8192, 1024)):
        fitted = read(ready()).fitted(positions)
        assert fitted.config.max_length == fitted.plain["max_length"] == length
    assert read(ready(max_length=96)).fitted(128).config.max_length == 96
    with pytest.raises(
        UserError, match="max_length=129 exceeds the model's 128 positions; write --config.max_length=128"
    ):
        read(ready(max_length=129)).fitted(128)


OWN_AVERAGE = "optimizer.name='schedule_free_adamw' evaluates an average of its own"
SCHEDULE_FREE = dict(optimizer__name="schedule_free_adamw", schedule="constant")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(learning_rate=1e39), "learning_rate=1e+39 is out of range; float32 holds 1.2e-38 to 3.4e+38, and 0"),
        (dict(loss__beta=1e300), "loss.beta=1e+300 is out of range"),
        (dict(loss__beta=1e-50), "loss.beta=1e-50 is out of range"),
        (dict(optimizer__weight_decay=1e39), "optimizer.weight_decay=1e+39 is out of range"),
        (dict(grad_clip=1e-45), "grad_clip=1e-45 is out of range"),
        (dict(epochs=1e-320), "epochs=1e-320 is out of range"),
        (dict(warmup_ratio=1.5), "warmup_ratio=1.5 must lie in [0, 1]"),
        (dict(optimizer__momentum=0.9), "optimizer 'adamw' has no hyper-parameter 'momentum'"),
        (dict(optimizer__name="lion", optimizer__eps=1e-8), "optimizer 'lion' has no hyper-parameter 'eps'"),
        (dict(schedule_options__power=2.0), "schedule 'linear' has no hyper-parameter 'power'"),
        (dict(schedule="wsd", schedule_options__decay_ratio=0.0), "schedule 'wsd': decay_ratio=0.0 is out of range"),
        (dict(ema__decay=1.0), "ema.decay=1.0 must lie in (0, 1)"),
        (dict(ema__evaluate=False), "ema.evaluate=False is set without ema.decay"),
        (dict(SCHEDULE_FREE, ema__decay=0.9), f"{OWN_AVERAGE}; unset ema.decay=0.9"),
        (dict(SCHEDULE_FREE, reference__kind="moving"), f"{OWN_AVERAGE}, and reference.kind='moving' would follow oth"),
        (dict(SCHEDULE_FREE, schedule="linear"), f"{OWN_AVERAGE} in place of a falling rate; set schedule='constant'"),
        (dict(SCHEDULE_FREE, model__param_dtype="bfloat16"), f"{OWN_AVERAGE}, which model.param_dtype='bfloat16' wou"),
    ],
)
def test_what_an_optimizer_a_schedule_or_an_average_does_not_take_is_refused(fields, says):
    assert complaint(ready(**fields)).startswith(says)


def test_training_is_told_in_words():
    assert read(ready()).training == {"optimizer": "adamw", "learning rate": "1e-06, linear"}
    fields = dict(optimizer__name="muon", optimizer__momentum=0.9, schedule="wsd", schedule_options__floor=0.1)
    assert read(ready(**fields, ema__decay=0.99)).training == {
        "optimizer": "muon(momentum=0.9)",
        "learning rate": "1e-06, wsd(floor=0.1)",
        "weights": "moving average with decay 0.99",
    }
    assert read(ready(**SCHEDULE_FREE)).training["weights"] == "the optimizer's average"


# What it is read as


def test_what_will_be_used_is_filled_in():
    experiment = read(ready("ipo", loss__tau=0.5, optimizer__b2=0.95))
    plain = experiment.plain
    assert plain["loss"] == dict(name="ipo", tau=0.5, per_token=False)
    assert plain["optimizer"] == dict(name="adamw", b2=0.95)
    assert plain["seed"] == 0
    assert plain["data"]["path"] == "data"
    assert plain["steps"] is None
    assert json.loads(json.dumps(plain)) == experiment.config.to_dict() == plain
    moving = read(ready(reference__kind="moving", reference__every=3)).config.reference
    assert (moving.mixup, moving.every) == (0.6, 3)


def test_reading_changes_nothing_and_what_is_read_stays():
    c = ready("dpo")
    before = c.to_json()
    experiment = read(c)
    assert c.to_json() == before
    c.seed, c.loss.beta = 7, 0.5
    assert (experiment.config.seed, experiment.config.loss.beta) == (0, 0.1)
    with pytest.raises(AttributeError):
        experiment.config.seed = 7
    with pytest.raises(AttributeError):
        experiment.loss = None


def test_a_list_of_dicts_is_in_the_plain_dict_alone():
    c = ready(data__path=None, data__mix=({"path": "a"}, {"path": "b", "use": "eval"}))
    with c.unlocked():
        c.mine = {"table": [{"x": 1}], "numbers": [1, 2]}
    experiment = read(c)
    assert experiment.plain["data"]["mix"] == [{"path": "a"}, {"path": "b", "use": "eval"}]
    assert experiment.config.mine.to_dict() == {"numbers": (1, 2)}
    assert [source.path for source in experiment.sources_for("eval")] == ["b"] and experiment.held_out


def test_the_jobs_are_those_that_can_be_run():
    assert CHOICES["job"].keys() == JOBS.keys()


def test_the_loss_is_bound_once(monkeypatch):
    made = []
    make = module.make_loss
    monkeypatch.setattr(module, "make_loss", lambda *args, **hyper: made.append(args) or make(*args, **hyper))
    read(ready("dpo", data__clean="exact_duplicates", reference__kind="moving")).fitted(1024)
    assert made == [("dpo",)]


# experiments


def experiment(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_experiments():
    assert {"dpo", "orpo", "sft", "quickstart"} <= {path.stem for path in EXPERIMENTS}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_loads_validates_and_shows_its_own_command(path):
    module = experiment(path)
    assert f"experiments/{path.name}" in module.__doc__
    c = module.get_config()
    assert c.is_locked
    if c.job == "train":
        if c.model.path is None:
            assert "model.path" in complaint(c)
            assert "model.path" in complaint(module.get_config("data=d"))
        else:
            assert "data.path" in complaint(c)
        c = module.get_config("model=m,data=d")
        assert (c.model.path, c.data.path) == ("m", "d")
    read(c)
    with pytest.raises(UserError, match="'no_such_argument'"):
        module.get_config("no_such_argument=1")


@pytest.mark.parametrize(
    ("name", "arg", "expected"),
    [
        ("dpo", "ipo,model=m,data=d", {"loss.name": "ipo", "reference.kind": "copy"}),
        ("dpo", "loss=orpo,model=m,data=d", {"loss.name": "orpo", "reference.kind": "none"}),
        ("quickstart", "orpo", {"loss.name": "orpo", "loss.lam": 1.0, "reference.kind": "none"}),
        ("quickstart", "", {"loss.name": "dpo", "job": "quickstart"}),
        ("orpo", "model=m,data=d", {"loss.name": "orpo", "reference.kind": "none"}),
        ("sft", "model=m,data=d", {"loss.name": "sft", "reference.kind": "none"}),
        ("dpo_hh_rlhf", "small,model=m", {"data.ascii_quotes": True, "data.path": "Anthropic/hh-rlhf"}),
        ("dpo_hh_rlhf", "model=m,data=a/b:c,eval_fraction=0.1", {"data.path": "a/b:c", "data.eval_fraction": 0.1}),
        ("orpo_hh_rlhf", "small,model=m", {"loss.name": "orpo", "data.ascii_quotes": True}),
    ],
)
def test_what_follows_the_colon_reaches_the_experiment(name, arg, expected):
    c = experiment(EXPERIMENTS[0].with_name(f"{name}.py")).get_config(arg)
    read(c)
    found = c
    for key, value in expected.items():
        found = c
        for part in key.split("."):
            found = found[part]
        assert found == value, key


def test_the_quickstarts_figures_are_the_readmes():
    seen = experiment(EXPERIMENTS[0].with_name("quickstart.py")).__doc__.partition("Seen on 2 CPU cores:")[2]
    figures = re.findall(r"[+\d][\d.]*\d", seen)
    readme = (EXPERIMENTS[0].parents[1] / "README.md").read_text(encoding="utf-8")
    assert len(figures) == 7 and [figure for figure in figures if figure not in readme] == []


@pytest.mark.parametrize("name", ["dpo_hh_rlhf", "orpo_hh_rlhf"])
def test_a_mistyped_size_is_refused(name):
    """It would else train a small model at a large one's rate."""
    with pytest.raises(UserError, match="'smal'"):
        read(experiment(EXPERIMENTS[0].with_name(f"{name}.py")).get_config("smal,model=m,data=d"))


@pytest.mark.parametrize(
    ("loss", "unset"), [("dpo", None), ("orpo", None), ("sft", False), ("kto", False), ("simpo", None)]
)
def test_pairs_may_come_together_by_default_and_single_responses_do_not(loss, unset):
    """What a quickstart's fine-tuning gives depends on the order of its rows."""
    config = defaults(loss)
    assert read(config, complete=False).group is unset
    config.data.group = True
    assert read(config, complete=False).group is True
