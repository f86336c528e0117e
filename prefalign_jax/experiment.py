"""A config, read once: what it says, what follows from it alone, and the checks that one place makes of it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optax
from ml_collections import ConfigDict, FrozenConfigDict

from prefalign_jax.config import defaults
from prefalign_jax.data.chat import TOO_LONG
from prefalign_jax.data.cleaning import BoundStep, cleaning_steps
from prefalign_jax.data.memory import MemoryRows, RowsOrPath, as_source
from prefalign_jax.data.mixture import Source, sources_of
from prefalign_jax.data.pairing import LABELS, PAIRINGS, WHICH_PAIRS, check_pairs
from prefalign_jax.data.records import TRAIN_ON
from prefalign_jax.data.template import CHAT_FIELDS, ChatOptions, chat_options, template_kwargs
from prefalign_jax.data.token_weights import contrasted
from prefalign_jax.data.trees import Layout
from prefalign_jax.early_stopping import PATIENCE, EarlyStopping, stopping_of
from prefalign_jax.files import read_json
from prefalign_jax.losses import BoundLoss, make_loss, ties_as_trl
from prefalign_jax.metrics import better
from prefalign_jax.models import quantize
from prefalign_jax.models.decoder import ATTENTION, REMAT
from prefalign_jax.models.hf_io import DTYPES as STORED
from prefalign_jax.optim import SCHEDULES, check_schedule, make_optimizer, make_schedule, steps_of
from prefalign_jax.options import DTYPES, choose, flatten, given, hyper_parameters, split_names
from prefalign_jax.processes import agreed
from prefalign_jax.trackers import TENSORBOARD, TRACKERS
from prefalign_jax.types import UserError, one_line

LENGTH = 1024  # tokens of a pair, where the config leaves max_length unset and the model has as many positions
LARGEST = 2**31  # of whole numbers; steps and sizes are counted in 32 bits
SMALLEST, MOST = 2.0**-126, 3.4e38  # of numbers that float32 tells from 0 and from infinity
UNITS = ("steps", "examples", "epochs")  # of a duration
MOVING = {"mixup": 0.6, "every": 512}  # TRL's defaults for a moving reference
# What each job reads: data to train on, or prompts to sample from. The quickstart makes its own.
JOBS = {"train": "data", "sft_first": "data", "pairs": "prompts", "rounds": "prompts", "quickstart": "nothing"}
LEAKS = ("drop", "report")
# What a loss may need that depends on which two responses are compared, so that pairs cannot share their tokens.
UNSHARED = frozenset({"shared", "sampled", "after", "group"})
# What a field may be, beside None where that is its default.
CHOICES: dict[str, Sequence[str] | Mapping[str, Any]] = {
    "dtype": DTYPES,
    "export.dtype": (*STORED, "stored"),
    "too_long": TOO_LONG,
    "reference.kind": ("copy", "cached", "moving", "none"),
    "data.layout": ("tree", "ordinary"),
    "data.leaks": LEAKS,
    "data.train_on": TRAIN_ON,
    "data.mean_over": ("comparisons", "prompts"),
    "checkpoint.best_mode": ("min", "max"),
    "accuracy_ties": ("half", "trl"),
    "model.remat": REMAT,
    "model.attention": ATTENTION,
    "model.param_dtype": (*DTYPES, "stored"),
    "model.quantize": quantize.QUANTIZATIONS,
    "schedule": SCHEDULES,
    "matmul_precision": ("highest", "high", "default"),
    "job": JOBS,
    "on_policy.pairing": PAIRINGS,
    "on_policy.labels": LABELS,
}
POSITIVE = (
    *("batch_size", "micro_steps", "max_length", "log_steps", "eval_steps", "save_steps", "grad_clip"),
    *("checkpoint.keep", "vocabulary_chunk", "model.pad_vocabulary", "lora.rank", "lora.alpha"),
    *("samples.limit", "samples.per_prompt", "samples.max_new_tokens", "early_stopping.patience"),
    *("on_policy.limit", "on_policy.per_prompt", "on_policy.rounds", "on_policy.sharpness"),
    *("data.limit", "data.eval_limit", "data.row_length", "reference.mixup", "reference.every"),
    *("sft.epochs", "sft.learning_rate"),
)
BELOW_1 = ("data.eval_fraction", "data.flip_labels", "model.dropout", "model.attention_dropout", "lora.dropout")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config and what follows from it alone; `read` makes it, once a run.

    Attributes:
      config: the fields as they are used, hyper-parameters filled in.
      plain: the same as JSON values, for config.json and checkpoints. Lists of dicts (data.mix) and names with dots
        (hyper-parameters of a mixture of losses) are in it alone.
      loss: with its hyper-parameters.
      sources: what is read: to train on, held out, and test sets.
      cleaning: steps of the training data's cleaning.
      profiled: the steps that are traced.
    """

    config: FrozenConfigDict
    plain: dict[str, Any]
    loss: BoundLoss
    sources: tuple[Source, ...]
    cleaning: tuple[BoundStep, ...]
    profiled: range

    @property
    def fields(self) -> dict[str, Any]:
        """Dotted name -> value."""
        return flatten(self.plain)

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained, and not the model's own weights."""
        return bool(self.config.lora.rank or self.config.lora.path)

    @property
    def training(self) -> dict[str, str]:
        """How weights are updated, and which of them are the result, in words."""
        plain = self.plain

        def written(name: str, options: Mapping[str, Any]) -> str:
            listed = ", ".join(f"{key}={value}" for key, value in given(options).items())
            return f"{name}({listed})" if listed else name

        out = {"optimizer": written(plain["optimizer"]["name"], plain["optimizer"])}
        out["learning rate"] = f"{plain['learning_rate']:g}, {written(plain['schedule'], plain['schedule_options'])}"
        if plain["optimizer"]["name"] == "schedule_free_adamw":
            out["weights"] = "the optimizer's average"
        elif self.averaged:
            kept = "" if plain["ema"]["evaluate"] else " is kept, the last weights are the result"
            out["weights"] = f"moving average with decay {plain['ema']['decay']}{kept}"
        return out

    @property
    def averaged(self) -> bool:
        """Whether a moving average of the weights is kept."""
        return self.config.ema.decay is not None

    @property
    def held_out(self) -> bool:
        """Whether it has held-out data."""
        return bool(self.sources_for("eval") or self.config.data.eval_fraction)

    @property
    def early_stopping(self) -> EarlyStopping | None:
        """When it ends before its last step; None for never."""
        return stopping_of(self.fields)

    @property
    def mixed(self) -> bool:
        """Whether its sources are those of data.mix."""
        return self.plain["data"]["mix"] is not None

    @property
    def layout(self) -> Layout:
        """What of a pair the loss has laid out."""
        parts = {name: name in self.loss.needs for name in ("rejected", "prompt", "after", "group")}
        return Layout(tree=self.config.data.layout == "tree", rewards="reward" in self.loss.needs, **parts)

    @property
    def record_kind(self) -> dict[str, Any]:
        """Which records it takes, as options of `data.records.read_records`."""
        data = self.config.data
        return {**self.loss.record_kind, "train_on": data.train_on, "pairs": data.pairs}

    def loss_with(self, **hyper: Any) -> BoundLoss:
        """The loss with some of its hyper-parameters replaced, by numbers that may be traced."""
        return _bound(self.config, **hyper) if hyper else self.loss

    @property
    def group(self) -> bool | None:
        """Whether pairs with the same prompt come together, see `pipeline.make_pair_set`."""
        group = self.config.data.group
        unasked = group is None and self.loss.kind != "pairs"  # single responses come in any order
        return False if unasked or UNSHARED & self.loss.needs else group

    @property
    def chat(self) -> ChatOptions:
        """What the chat template is told, and what it may leave out."""
        data = self.plain["data"]
        return chat_options(**{name: data[name] for name in CHAT_FIELDS})

    @property
    def contrast(self) -> dict[str, float]:
        """How two models weight tokens: options of `data.token_weights.contrasted`."""
        known = hyper_parameters(contrasted)
        return known | {name: value for name, value in given(self.config.token_weights).items() if name in known}

    def dated(self, workdir: Path) -> Experiment:
        """The experiment with a date, for templates that print one: the day that the run in a directory began."""
        data = self.plain["data"]
        if data["date"] is not None:
            return self
        known = read_json(workdir / "config.json", "an object", missing={})
        day = agreed((known.get("data") or {}).get("date") or datetime.date.today().isoformat())
        plain = {**self.plain, "data": {**data, "date": day}}
        return dataclasses.replace(self, plain=plain, config=_frozen(plain))

    def sources_for(self, use: str) -> list[Source]:
        """The sources of one use: train, eval or test."""
        return [source for source in self.sources if source.use == use]

    def total_steps(self, pairs: int) -> int:
        """Steps of the run.

        Args:
          pairs: in an epoch.

        Raises:
          UserError: something is to happen at later steps.
        """
        total, reference = self._duration("", pairs), self.config.reference
        if self.profiled and self.profiled[-1] > total:
            raise UserError(f"profile_steps={self.config.profile_steps!r} ends after the {total} steps of the run")
        if reference.kind == "moving" and reference.every >= total:
            raise UserError(
                f"reference.every={reference.every} is not reached in a run of {total} steps; write a smaller one"
            )
        return total

    def warmup_steps(self, pairs: int) -> int:
        """Steps over which the learning rate rises.

        Args:
          pairs: in an epoch.
        """
        if self.config.warmup_ratio:
            return steps_of(self.config.warmup_ratio, self.total_steps(pairs))
        return self._duration("warmup_", pairs)

    def learning_rate(self, pairs: int) -> optax.Schedule:
        """step -> learning rate.

        Args:
          pairs: in an epoch.

        Raises:
          UserError: the warm-up is longer than the run.
        """
        length = self.warmup_steps(pairs), self.total_steps(pairs)
        return make_schedule(
            self.config.schedule, self.config.learning_rate, *length, **given(self.config.schedule_options)
        )

    def _duration(self, prefix: str, pairs: int) -> int:
        steps, examples, epochs = (self.config[prefix + unit] for unit in UNITS)
        if steps or not (examples or epochs):
            return steps or 0
        length = (examples or epochs * pairs) / self.config.batch_size
        if not length < LARGEST:
            raise UserError(f"{prefix}epochs={epochs} of {pairs} pairs is out of range; write a smaller number")
        return max(1, (examples or round(epochs * pairs)) // self.config.batch_size)

    def fitted(self, positions: int) -> Experiment:
        """The experiment with a max_length, for a model of so many positions.

        Raises:
          UserError: max_length is above them.
        """
        length = self.config.max_length
        if length is None:
            length = min(LENGTH, positions)
        if length > positions:
            at_most = f"write --config.max_length={positions}, or less"
            raise UserError(f"max_length={length} exceeds the model's {positions} positions; {at_most}")
        plain = {**self.plain, "max_length": length}
        return dataclasses.replace(self, plain=plain, config=_frozen(plain))


def read(
    config: ConfigDict, *, complete: bool = True, data: RowsOrPath | None = None, eval_data: RowsOrPath | None = None
) -> Experiment:
    """Reads a config: checks what can be checked without data or devices, and binds what it names.

    Args:
      config: with the fields of `config.defaults`; it stays as it is.
      complete: it must name a model and data too.
      data: in place of data.path a path, a hub name, a list of dicts or a datasets.Dataset.
      eval_data: the same in place of data.eval_path.

    Returns:
      The `Experiment`.

    Raises:
      UserError: naming the field, its value and what it takes.
    """
    loss = _bound(config)
    cleaning = cleaning_steps(config.data.clean, config.data.cleaning, loss.kind)
    plain = _plain(config, loss, cleaning)
    given_rows = _given_rows(config, data=data, eval_data=eval_data)
    plain["data"] |= {name: str(rows) for name, rows in given_rows.items()}
    sources = [
        source._replace(path=given_rows.get("eval_path" if source.use == "eval" else "path", source.path))
        for source in sources_of(plain["data"])
    ]
    profiled = _profiled(config.profile_steps)
    experiment = Experiment(_frozen(plain), plain, loss, tuple(sources), tuple(cleaning), profiled)
    for check in CHECKS:
        check(experiment)
    if complete:
        _check_inputs(experiment)
    return experiment


def _bound(config: ConfigDict | FrozenConfigDict, **hyper: Any) -> BoundLoss:
    """The loss of a config; `hyper` replaces hyper-parameters."""
    loss = make_loss(config.loss.name, **{**given(config.loss), **hyper})
    return ties_as_trl(loss) if config.accuracy_ties == "trl" else loss


def _given_rows(config: ConfigDict, **arguments: RowsOrPath | None) -> dict[str, str | MemoryRows]:
    """What a caller gives in place of fields: {data field: a path or rows in memory}."""
    rows = {}
    for name, value in arguments.items():
        if value is None:
            continue
        field = {"data": "path", "eval_data": "eval_path"}[name]
        taken = next((one for one in (field, "mix") if config.data[one] is not None), None)
        if taken:
            raise UserError(f"{name}= and data.{taken}={config.data[taken]!r} are both given; leave one of them out")
        rows[field] = as_source(value, name)
    return rows


def from_json(fields: Mapping[str, Any]) -> Experiment:
    """The experiment of a run, from its config.json.

    Args:
      fields: what the file holds.

    Raises:
      UserError: it is not a run's.
    """
    fields = {name: value for name, value in fields.items() if name != "history"}
    try:
        config = defaults(fields["loss"]["name"])
        with config.unlocked():
            config.update({**fields, "examples": None, "epochs": None})  # `steps` is the length that they gave
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"config.json is no run's: {one_line(error)}") from error
    return read(config, complete=False)


def _plain(config: ConfigDict, loss: BoundLoss, cleaning: Sequence[BoundStep]) -> dict[str, Any]:
    """The config as JSON values, with what the loss, the cleaning, the optimizer and the reference will use."""
    plain = config.to_dict()
    if all(plain[unit] is None for unit in UNITS):
        plain["epochs"] = 1.0
    if plain["data"]["mix"] is not None:
        mix = json.dumps(plain["data"]["mix"], default=lambda x: dict(x) if isinstance(x, ConfigDict) else str(x))
        plain["data"]["mix"] = json.loads(mix)  # as config.json gives it back
    plain["loss"] = {"name": loss.name, **loss.hyper}
    plain["data"]["cleaning"] |= {step.name: step.options for step in cleaning if step.options}
    if config.reference.kind == "moving":
        plain["reference"] |= {**MOVING, **given(config.reference)}
    if config.ema.decay is not None:
        plain["ema"] |= {"evaluate": True, **given(config.ema)}
    plain["optimizer"] = {"name": plain["optimizer"]["name"], **given(plain["optimizer"])}
    plain["data"]["chat_template_kwargs"] = dict(template_kwargs(plain["data"]["chat_template_kwargs"])) or None
    _fill_in_the_best(plain)
    return plain


def _fill_in_the_best(plain: dict[str, Any]) -> None:
    """What follows from the metric of early stopping, or of the best checkpoint, where nothing else is set."""
    stopping, checkpoint, export = plain["early_stopping"], plain["checkpoint"], plain["export"]
    if stopping["metric"]:
        stopping |= {"patience": PATIENCE, "min_delta": 0.0, **given(stopping)}
    checkpoint["best_metric"] = checkpoint["best_metric"] or stopping["metric"]
    if checkpoint["best_mode"] is None:
        checkpoint["best_mode"] = better(checkpoint["best_metric"]) if checkpoint["best_metric"] else "min"
    if export["checkpoint"] is None:
        export["checkpoint"] = "best" if stopping["metric"] else "last"


def _frozen(plain: Mapping[str, Any]) -> FrozenConfigDict:
    def without_the_rest(group: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: without_the_rest(value) if isinstance(value, Mapping) else value
            for key, value in group.items()
            if "." not in key
            and not (isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value))
        }

    return FrozenConfigDict(without_the_rest(plain))


def _profiled(text: str | None) -> range:
    """The steps that 'FIRST:LAST' names."""
    if text is None:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"profile_steps={text!r}: write FIRST:LAST, two steps counted from 1, as 10:15")
    return range(first, last + 1)


# Checks, each of one subject; the first that fails is the one the user reads.


def _check_choices(experiment: Experiment) -> None:
    fields, unset = experiment.fields, ("data.leaks", "model.quantize", "checkpoint.best_mode")
    for name, choices in CHOICES.items():
        if not (fields[name] is None and name in unset):
            choose(name, fields[name], dict.fromkeys(choices))


def _check_ranges(experiment: Experiment) -> None:
    fields = experiment.fields
    for name, value in fields.items():
        if name != "seed" and type(value) is int and abs(value) >= LARGEST:
            raise UserError(f"{name}={value} is out of range; write a number below {LARGEST:,}")
        if type(value) is float and value and math.isfinite(value) and not SMALLEST <= abs(value) <= MOST:
            raise UserError(f"{name}={value} is out of range; float32 holds {SMALLEST:.2g} to {MOST:.2g}, and 0")
    for name in POSITIVE:
        if fields[name] is not None and not fields[name] > 0:
            raise UserError(f"{name}={fields[name]!r} must be positive")
    for name in BELOW_1:
        if not 0 <= (fields[name] or 0) < 1:
            raise UserError(f"{name}={fields[name]} must lie in [0, 1)")
    if fields["seed"] < 0:
        raise UserError(f"seed={fields['seed']} must be at least 0")
    if (fields["reference.mixup"] or 0) > 1:
        raise UserError(f"reference.mixup={fields['reference.mixup']} must lie in (0, 1]")


def _check_durations(experiment: Experiment) -> None:
    config = experiment.config
    lengths = {unit: config[unit] for unit in UNITS if config[unit] is not None}
    for unit, value in lengths.items():
        if not value >= 0 or not any(lengths.values()):  # 0 unsets one where another is set
            raise UserError(f"{unit}={value!r} must be positive")
    _only_one("", experiment)
    for unit in UNITS:
        if (config[f"warmup_{unit}"] or 0) < 0:
            raise UserError(f"warmup_{unit}={config[f'warmup_{unit}']} must be at least 0")
    if not 0 <= (config.warmup_ratio or 0) <= 1:
        raise UserError(f"warmup_ratio={config.warmup_ratio} must lie in [0, 1]")
    _only_one("warmup_", experiment)


def _only_one(prefix: str, experiment: Experiment) -> None:
    names = [prefix + unit for unit in (*UNITS, "ratio") if experiment.config.get(prefix + unit)]
    if len(names) > 1:
        listed = " and ".join(f"{name}={experiment.config[name]}" for name in names)
        raise UserError(f"{listed} are set together; set one (--config.{names[-1]}=0 unsets it)")


def _check_optimization(experiment: Experiment) -> None:
    config = experiment.config
    make_optimizer(experiment.plain["optimizer"], 0.0, config.grad_clip)  # names what is wrong with it
    check_schedule(config.schedule, given(config.schedule_options))
    if not 0 <= config.learning_rate < math.inf:
        raise UserError(f"learning_rate={config.learning_rate} must be a number >= 0")
    if config.batch_size % config.micro_steps:
        raise UserError(f"batch_size={config.batch_size} is not a multiple of micro_steps={config.micro_steps}")
    if config.model.stochastic_rounding and (config.model.param_dtype != "bfloat16" or experiment.adapted):
        raise UserError("model.stochastic_rounding is for model.param_dtype=bfloat16 of weights that are trained")


def _check_averages(experiment: Experiment) -> None:
    config, ema = experiment.config, experiment.config.ema
    if ema.decay is None:
        if ema.evaluate is not None:
            raise UserError(f"ema.evaluate={ema.evaluate} is set without ema.decay, and no average is kept")
    elif not 0 < ema.decay < 1:
        raise UserError(f"ema.decay={ema.decay} must lie in (0, 1)")
    if config.optimizer.name != "schedule_free_adamw":
        return
    said = "optimizer.name='schedule_free_adamw' evaluates an average of its own"
    if ema.decay is not None:
        raise UserError(f"{said}; unset ema.decay={ema.decay}")
    if config.reference.kind == "moving":
        raise UserError(f"{said}, and reference.kind='moving' would follow other weights; set copy or cached")
    if config.schedule != "constant":
        raise UserError(f"{said} in place of a falling rate; set schedule='constant' (it is {config.schedule!r})")
    if config.model.param_dtype != "float32" and not (experiment.adapted and config.model.param_dtype == "stored"):
        raise UserError(
            f"{said}, which model.param_dtype={config.model.param_dtype!r} would round away; set it to float32"
        )


def _check_data(experiment: Experiment) -> None:
    data, loss = experiment.config.data, experiment.loss
    if data.balance and not data.shuffle:
        raise UserError("data.balance=True deals pairs anew and data.shuffle=False keeps their order; set one of them")
    if data.group and not experiment.group:
        reads = "reads of a response what depends on the other"
        reads = "reads whole groups, which have their prompt once anyway" if "group" in loss.needs else reads
        raise UserError(f"data.group=True: loss {loss.name!r} {reads}; unset it")
    if data.mean_over == "prompts" and "group" in loss.needs:
        raise UserError(f"data.mean_over='prompts' is for comparisons; loss {loss.name!r} is of whole prompts anyway")
    if data.leaks is not None and not (experiment.held_out or experiment.sources_for("test")):
        raise UserError(f"data.leaks={data.leaks!r} is set without held-out data")
    check_pairs("data.pairs", data.pairs)
    if data.pairs != WHICH_PAIRS[0] and (loss.kind != "pairs" or loss.record_kind.get("groups")):
        read = "whole groups" if loss.kind == "pairs" else f"{loss.kind} data"
        raise UserError(f"data.pairs={data.pairs!r} applies to losses of pairs; loss {loss.name!r} reads {read}")
    for step in experiment.cleaning:
        if step.options.get("held_out_too") and not experiment.held_out:
            raise UserError(f"data.cleaning.{step.name}.held_out_too is set without held-out data")
    if data.flip_labels and ("rejected" not in loss.needs or {"label", "margin", "group"} & loss.needs):
        raise UserError(f"data.flip_labels applies to pairs without scores; loss {loss.name!r} reads others")
    if experiment.sources_for("eval") and data.eval_fraction:
        one = "data.eval_path" if data.eval_path else "data.mix (use='eval')"
        raise UserError(f"{one} and data.eval_fraction both name the held-out data; set one")


def _check_chat(experiment: Experiment) -> None:
    experiment.chat  # noqa: B018 (it names what is wrong)


def _check_adapters(experiment: Experiment) -> None:
    config, fields = experiment.config, experiment.fields
    if experiment.adapted:
        for name, clash in (
            ("reference.kind", config.reference.kind == "moving"),
            ("reference.path", config.reference.path),
        ):
            if clash:
                raise UserError(
                    f"{name}={fields[name]!r} and adapters (lora.rank, lora.path) exclude each other: the reference is "
                    "the base model, with what lora.path adds to it"
                )
    elif config.model.quantize is not None:
        raise UserError(f"model.quantize={config.model.quantize!r} is for frozen weights; set lora.rank")
    for name in ("rank", "alpha", "targets", "rank_stabilised", "dora", "dropout"):
        if config.lora[name] is None or (name == "dropout" and config.lora.path):
            continue
        if config.lora.path:
            raise UserError(f"lora.{name} is what the adapters in lora.path say; leave it unset")
        if not config.lora.rank:
            raise UserError(f"lora.{name} is set without lora.rank, and there are no adapters")


def _check_export(experiment: Experiment) -> None:
    config = experiment.config
    which = config.export.checkpoint
    if which not in ("last", "best") and not which.isdecimal():
        raise UserError(f"export.checkpoint={which!r}: write last, best, or the number of a step")
    if which == "best" and not config.checkpoint.best_metric:
        raise UserError("export.checkpoint='best' needs checkpoint.best_metric, such as eval/loss")


def _check_the_best(experiment: Experiment) -> None:
    stopping, checkpoint = experiment.config.early_stopping, experiment.config.checkpoint
    if stopping.metric is None:
        for name in ("patience", "min_delta"):
            if stopping[name] is not None:
                raise UserError(f"early_stopping.{name}={stopping[name]} is set without early_stopping.metric")
    else:
        if checkpoint.best_metric != stopping.metric:
            both = f"checkpoint.best_metric={checkpoint.best_metric!r} and early_stopping.metric={stopping.metric!r}"
            raise UserError(f"{both} differ; set the second alone, or write the same")
        if not experiment.config.eval_steps:
            raise UserError(
                f"early_stopping.metric={stopping.metric!r} needs eval_steps, the updates between evaluations"
            )
        if not 0 <= stopping.min_delta < math.inf:
            raise UserError(f"early_stopping.min_delta={stopping.min_delta} must be a number >= 0")
    if checkpoint.best_mode is None:
        raise UserError(
            f"whether the least or the most of {checkpoint.best_metric!r} is best is not known; set "
            "checkpoint.best_mode to min or max"
        )


def _check_trackers(experiment: Experiment) -> None:
    config = experiment.config
    for name in split_names(config.log_to):
        choose("log_to", name, dict.fromkeys((TENSORBOARD, *TRACKERS)))
    if TENSORBOARD in split_names(config.log_to) and not config.tensorboard:
        raise UserError(f"log_to={config.log_to!r} and tensorboard=False contradict each other; leave one of them out")


def _check_reference(experiment: Experiment) -> None:
    loss, reference = experiment.loss, experiment.config.reference
    needed, kind = "reference" in loss.needs, reference.kind
    if needed and kind == "none":
        raise UserError(f"loss {loss.name!r} needs a reference; set reference.kind to copy, cached or moving")
    if not needed and kind != "none":
        raise UserError(f"loss {loss.name!r} uses no reference; set reference.kind=none (it is {kind!r})")
    if "token_kl" in loss.needs and kind == "cached":
        raise UserError(f"loss {loss.name!r} compares whole distributions; set reference.kind to copy or moving")
    if kind == "none" and reference.path:
        raise UserError("reference.path is set but reference.kind=none keeps no reference; set copy or cached")
    if kind != "cached" and reference.cache_dir:
        raise UserError(f"reference.cache_dir applies to reference.kind=cached, not {kind!r}")
    for name in MOVING:
        if kind != "moving" and reference[name] is not None:
            raise UserError(f"reference.{name} applies to reference.kind=moving, not {kind!r}")


def _check_token_weights(experiment: Experiment) -> None:
    loss, fields = experiment.loss, experiment.config.token_weights
    if fields.decay is not None:
        if not 0 < fields.decay <= 1:
            raise UserError(f"token_weights.decay={fields.decay} must lie in (0, 1]")
        if loss.kind == "supervised" or "reward" in loss.needs:
            raise UserError(
                f"token_weights.decay={fields.decay} is for losses of preferences between log-probabilities; "
                f"loss {loss.name!r} is none"
            )
    models = [name for name in ("positive", "negative") if fields[name]]
    for name, value in fields.items():
        if value is not None and name != "decay" and len(models) < 2:
            raise UserError(
                f"token_weights.{name}={value!r} is for weights by two models; "
                "set token_weights.positive and token_weights.negative"
            )
    if not models:
        return
    if loss.kind != "pairs" or {"reward", "group"} & loss.needs:
        raise UserError(f"token_weights.positive and .negative weight pairs; loss {loss.name!r} is trained on others")
    k, mu, low, high = (experiment.contrast[name] for name in ("k", "mu", "low", "high"))
    if not (0 < k < math.inf and math.isfinite(mu)):
        raise UserError(f"token_weights.k={k} must be a positive number, and token_weights.mu={mu} a number")
    if not -math.inf < low <= high < math.inf:
        raise UserError(f"token_weights.low={low} and token_weights.high={high} are no range to clamp ratios to")


def _check_ends_of_responses(experiment: Experiment) -> None:
    loss, config = experiment.loss, experiment.config
    if {"after", "reward"} & loss.needs and config.too_long == "truncate_response":
        raise UserError(
            f"loss {loss.name!r} with these options reads the end of responses; too_long=truncate_response cuts it off"
        )
    if "after" in loss.needs and config.data.keep_end:
        raise UserError(
            f"loss {loss.name!r} with these options takes a response's last token for its end; set data.keep_end=False"
        )


def _check_job(experiment: Experiment) -> None:
    config = experiment.config
    samples_prompts = JOBS[config.job] == "prompts"
    if (config.on_policy.prompts is not None) != samples_prompts:
        raise UserError(
            f"on_policy.prompts={config.on_policy.prompts!r} and job={config.job!r} do not fit: pairs and rounds need "
            "a file of prompts, others take none"
        )
    _check_on_policy(experiment)
    if samples_prompts and experiment.sources_for("train"):
        raise UserError(f"data.path={config.data.path!r} is not read: job={config.job!r} makes its own data")
    if not config.export.enabled and (config.job == "sft_first" or config.on_policy.rounds > 1):
        raise UserError(f"export.enabled=False, and job={config.job!r} goes on from the exported model; leave it on")
    for name, value in config.sft.items():
        if (value is not None) != (config.job == "sft_first"):
            raise UserError(f"sft.{name}={value} and job={config.job!r} do not fit: sft_first needs it, others do not")


def _check_on_policy(experiment: Experiment) -> None:
    """That one thing tells which response is better, and that what is set is read."""
    config, how, loss = experiment.config, experiment.config.on_policy, experiment.loss
    if how.prompts is None:
        for name in ("against", "policies", "judge", "judge_options"):
            if how[name] is not None:
                raise UserError(f"on_policy.{name}={how[name]!r} is set without on_policy.prompts; nothing is drawn")
        return
    telling = [name for name in ("against", "policies", "judge") if how[name] is not None]
    if len(telling) > 1:
        names = " and ".join(f"on_policy.{name}" for name in telling)
        raise UserError(f"{names} each tell which response is better; set one of them")
    if not telling and not config.samples.reward:
        raise UserError(
            f"job={config.job!r} needs samples.reward or on_policy.judge, to tell which response is better "
            "(or on_policy.against, or on_policy.policies)"
        )
    if telling and config.samples.reward and not config.samples.prompts:
        raise UserError(
            f"samples.reward={config.samples.reward!r} is not read: on_policy.{telling[0]} tells what is better"
        )
    if how.judge_options and not how.judge:
        raise UserError(f"on_policy.judge_options={how.judge_options!r} is set without on_policy.judge")
    if how.against not in (None, "data"):
        raise UserError(f"on_policy.against={how.against!r} is unknown; write data, for the responses of the rows")
    if how.policies is not None and len(set(split_names(how.policies))) != 2:
        raise UserError(f"on_policy.policies={how.policies!r}: write two different models, BETTER,WORSE")
    groups, scored = loss.record_kind.get("groups"), not (how.against or how.policies)
    if groups and not scored:
        raise UserError(f"on_policy.{telling[0]} makes pairs, and loss {loss.name!r} is trained on groups")
    for name, unset in (("pairing", "best_worst"), ("min_gap", 0.0), ("labels", "true"), ("sharpness", 1.0)):
        if how[name] != unset and (groups or not scored):
            why = f"loss {loss.name!r} is trained on all" if groups else f"on_policy.{telling[0]} has none"
            raise UserError(f"on_policy.{name}={how[name]!r} chooses among scored responses, and {why}; leave it out")


def _check_evaluation(experiment: Experiment) -> None:
    config, fields = experiment.config, experiment.fields
    for name in ("limit", "reward", "reference"):
        if config.samples[name] and not (config.samples.prompts or (name == "reward" and config.on_policy.prompts)):
            raise UserError(f"samples.{name} is set without samples.prompts, and nothing is sampled")
    if JOBS[config.job] == "data" and not experiment.held_out:
        for name in ("early_stopping.metric", "checkpoint.best_metric", "eval_steps", "data.eval_limit"):
            if fields[name] and not (config.samples.prompts and name != "data.eval_limit"):
                raise UserError(f"{name} is set without held-out data; set data.eval_path or data.eval_fraction")


CHECKS: tuple[Callable[[Experiment], None], ...] = (
    _check_choices,
    _check_ranges,
    _check_durations,
    _check_optimization,
    _check_averages,
    _check_data,
    _check_chat,
    _check_adapters,
    _check_export,
    _check_the_best,
    _check_trackers,
    _check_reference,
    _check_token_weights,
    _check_ends_of_responses,
    _check_job,
    _check_evaluation,
)


def _check_inputs(experiment: Experiment) -> None:
    """That the model and the data are named that the job reads."""
    config = experiment.config
    reads = JOBS[config.job]
    if reads == "prompts" and not config.model.path and not (config.job == "pairs" and config.on_policy.policies):
        raise UserError("model.path is not set; write a Hugging Face directory or a hub name: --config.model.path=...")
    missing = {
        "model.path": not config.model.path and "a Hugging Face directory",
        "data.path": not experiment.sources_for("train") and "a file, a directory",
    }
    for name, what in missing.items():
        if reads == "data" and what:
            raise UserError(
                f"{name} is not set; write {what} or a hub name: --config=FILE.py:{name.split('.')[0]}=... "
                f"or --config.{name}=..."
            )
