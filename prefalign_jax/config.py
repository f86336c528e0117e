"""The fields of an experiment, their defaults, and the checks that one place makes of all of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from prefalign_jax.data.cleaning import CLEANING, BoundStep, cleaning_steps
from prefalign_jax.data.mixture import sources_of
from prefalign_jax.data.pairing import LABELS, PAIRINGS
from prefalign_jax.losses import LOSSES, BoundLoss, hyper_of, make_loss
from prefalign_jax.optim import SCHEDULES, make_optimizer
from prefalign_jax.options import choose, did_you_mean, flatten, read_as
from prefalign_jax.types import UserError

LEAKS = ("drop", "report")
UNITS = ("steps", "examples", "epochs")  # of a duration
DTYPES = ("float32", "bfloat16")
CHOICES = {
    "dtype": DTYPES,
    "export.dtype": DTYPES,
    "too_long": ("drop", "truncate_prompt", "truncate_response"),
    "reference.kind": ("copy", "cached", "moving", "none"),
    "data.layout": ("tree", "ordinary"),
    "checkpoint.best_mode": ("min", "max"),
    "model.remat": ("none", "dots", "full"),
    "model.attention": ("tiles", "cudnn"),
    "schedule": tuple(SCHEDULES),
    "model.param_dtype": (*DTYPES, "stored"),
    "matmul_precision": ("highest", "high", "default"),
    "job": ("train", "sft_first", "pairs", "rounds", "quickstart"),
    "on_policy.pairing": tuple(PAIRINGS),
    "on_policy.labels": LABELS,
}
POSITIVE = ("batch_size", "micro_steps", "max_length", "log_steps", "steps", "epochs", "examples")
POSITIVE += ("eval_steps", "save_steps", "grad_clip", "checkpoint.keep", "vocabulary_chunk")
POSITIVE += (
    "model.pad_vocabulary",
    "lora.rank",
    "lora.alpha",
    "samples.limit",
    "samples.per_prompt",
    "samples.max_new_tokens",
    "on_policy.limit",
    "on_policy.per_prompt",
    "on_policy.rounds",
    "on_policy.sharpness",
    "data.limit",
    "data.eval_limit",
    "data.row_length",
    "reference.mixup",
    "reference.every",
)
QUANTIZED = ("int8", "nf4")
MOVING = {"mixup": 0.6, "every": 512}  # TRL's defaults for a moving reference


def defaults(loss: str = "dpo") -> ConfigDict:
    """Every field of an experiment, with a meaning or unit; an experiment file overrides what it is about.

    Args:
      loss: a key of losses.LOSSES; it decides whether a reference is kept.

    Returns:
      A locked ConfigDict: assigning to a field it does not have is an error.
    """
    maybe = config_dict.placeholder
    c = ConfigDict()
    c.seed = 0  # initialisation, order of the data, sampling

    # Length of the run: the first one set of steps, examples and epochs; one epoch if none is.
    c.steps = maybe(int)
    c.examples = maybe(int)
    c.epochs = maybe(float)
    c.batch_size = 16  # pairs in an update
    c.micro_steps = 1  # parts that a batch is computed in; the update is the same
    c.max_length = 1024  # tokens of prompt + longer response
    c.too_long = "drop"  # what happens to longer pairs: drop, truncate_prompt, truncate_response

    c.learning_rate = 1e-6
    c.schedule = "linear"  # constant, linear, cosine, inverse_sqrt; each after a linear warm-up
    c.warmup_steps = 0
    c.warmup_epochs = maybe(float)  # instead of warmup_steps
    c.warmup_examples = maybe(int)  # instead of warmup_steps
    c.grad_clip = maybe(float)  # global norm of the gradient; None for no clipping
    c.grad_clip = 1.0
    c.optimizer = ConfigDict({"name": "adamw"})  # adamw, rmsprop, sgd; what is None keeps the optimizer's default
    c.optimizer.update({key: maybe(float) for key in ("b1", "b2", "eps", "weight_decay", "decay", "momentum")})

    # A hyper-parameter that is None keeps the loss's default; one that the loss does not have must stay None.
    c.loss = ConfigDict({"name": loss})
    for name in LOSSES:
        c.loss.update({key: maybe(type(value)) for key, value in hyper_of(name).items() if key not in c.loss})

    c.reference = ConfigDict()
    needs_reference = "reference" in make_loss(loss).needs
    # copy: frozen, in the step; cached: computed once; moving: TR-DPO's, follows the policy; none
    c.reference.kind = "copy" if needs_reference else "none"
    c.reference.path = maybe(str)  # another model than model.path
    c.reference.cache_dir = maybe(str)  # for kind=cached; None is WORKDIR/reference
    c.reference.mixup = maybe(float)  # for kind=moving: reference <- mixup policy + (1 - mixup) reference; None is 0.6
    c.reference.every = maybe(int)  # for kind=moving: steps between moves; None is 512

    c.model = ConfigDict()
    c.model.path = maybe(str)  # Hugging Face directory or hub name
    c.model.random_init = False  # take only the shape and the tokenizer from model.path
    # Of what is trained, and of its moments: float32; bfloat16, which loses updates below 2^-9 of a weight; stored, the
    # type in the file, and float32 for what is in none. A frozen base under adapters always keeps its stored type.
    c.model.param_dtype = "float32"
    # For bfloat16: round updated weights up or down at random, right on average, and keep float32 moments.
    c.model.stochastic_rounding = False
    c.model.quantize = maybe(str)  # int8 or nf4: the frozen kernels under adapters (lora.rank)
    c.model.pad_vocabulary = 1  # rows of embedding and head to a multiple of this, without probability, for sharding
    c.model.router_weight = 0.0  # of a mixture of experts' auxiliary loss in the objective; 0.001 to 0.02
    c.model.dropout = 0.0  # of embeddings and residual branches, in training passes; config.json's is not read
    c.model.attention_dropout = 0.0  # of attention weights, in training passes
    c.model.attention = "tiles"  # tiles: in XLA, without what is empty; cudnn: text by text, NVIDIA's kernel, bfloat16
    c.model.remat = "none"  # what the backward pass keeps of a layer: none (everything), dots, full (only its input)
    # Low-rank adapters; with a rank, only they are trained, and the model without them is the reference.
    c.lora = ConfigDict({"rank": maybe(int), "alpha": maybe(float), "targets": maybe(str)})
    # Instead of a rank: adapters in PEFT's format to go on from; the model with them as they are is the reference.
    c.lora.path = maybe(str)
    c.lora.rank_stabilised = maybe(bool)  # alpha / sqrt(rank) instead of alpha / rank
    c.lora.dora = maybe(bool)  # train the lengths of the kernels' columns too
    c.lora.dropout = maybe(float)  # of the adapters' inputs, in training passes
    c.dtype = "float32"  # activations and matrix products; losses and log-softmax are float32 always
    c.matmul_precision = "highest"  # of float32 products on GPUs and TPUs: highest, high, default (TF32 or less)
    c.vocabulary_chunk = 8192  # columns of logits in memory at once
    # Devices along each axis, -1 takes the rest: of rows, of rows and weights, of weights, of the tokens of rows.
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "context": 1})

    c.data = ConfigDict()
    c.data.path = maybe(str)  # JSONL (or .gz), Parquet, a directory of them, a saved dataset, or a hub name
    c.data.split = "train"  # of a hub dataset
    c.data.limit = maybe(int)  # records to read
    c.data.format = maybe(str)  # of its rows, a key of data/formats.py; None tells each row's from its fields
    # Instead of a path: several sources, each a dict with a path and other fields of data/mixture.py's `Source`.
    c.data.mix = maybe(tuple)
    # Training pairs whose prompt is held out: drop, or report; None drops them, but for eval_path without mix.
    c.data.leaks = maybe(str)
    c.data.eval_path = maybe(str)  # held-out data
    c.data.eval_split = "test"
    c.data.eval_limit = maybe(int)
    c.data.eval_fraction = 0.0  # without eval_path: part of the training prompts that is held out
    c.data.flip_labels = 0.0  # part of the training pairs whose responses are swapped, to study noise in the labels
    # Steps of data/cleaning.py by name, in this order, separated by commas: 'exact_duplicates,role_markers'. They clean
    # the training data; an option that is None keeps the step's default.
    c.data.clean = maybe(str)
    c.data.cleaning = ConfigDict()
    for name, step in CLEANING.items():
        if step.options:
            c.data.cleaning[name] = ConfigDict({key: maybe(type(value)) for key, value in step.options.items()})
    c.data.cache_dir = maybe(str)  # of tokenized data; None is ~/.cache/prefalign_jax/tokens, '' keeps none
    c.data.shuffle = True
    # Deal shuffled pairs to batches so that all hold about as many tokens, which saves padding; None does as shuffle.
    c.data.balance = maybe(bool)
    c.data.chat_template = maybe(str)  # chatml, zephyr, a .jinja file; None takes the tokenizer's own
    c.data.ascii_quotes = False  # curly quotes and dashes to ASCII, for vocabularies that lack them
    c.data.keep_end = False  # train on what the template writes after the end-of-turn token, as TRL's DPO does
    c.data.layout = "tree"  # tree: the prompt once; ordinary: a copy of it for each side
    c.data.row_length = maybe(int)  # tokens in a packed row; None gives each device one row, as long as it takes

    # Samples drawn at every evaluation, of prompts in a file of rows with a `prompt`.
    c.samples = ConfigDict({"prompts": maybe(str), "limit": maybe(int), "per_prompt": 1, "max_new_tokens": 64})
    c.samples.reward = maybe(str)  # what they are worth: a name in judges/rewards.py, or model:DIR, a reward model
    c.samples.reference = maybe(str)  # KL is measured to this model; None is the one that the run starts from
    c.samples.update({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0})
    # For the jobs `pairs`, which draws preference data from the policy, and `rounds`, which trains on it again and
    # again; the samples are drawn as `samples` says.
    c.on_policy = ConfigDict({"prompts": maybe(str), "limit": maybe(int), "per_prompt": 4, "rounds": 1})
    c.on_policy.pairing = "best_worst"  # best_worst, or all pairs of a prompt's responses
    c.on_policy.min_gap = 0.0  # pairs whose rewards are less apart are left out
    c.on_policy.labels = "true"  # true: the higher reward is chosen; bradley_terry: more likely
    c.on_policy.sharpness = 1.0  # of bradley_terry's labels: sigmoid(sharpness * difference of rewards)

    c.log_steps = 10
    c.profile_steps = maybe(str)  # FIRST:LAST, these steps are traced to WORKDIR/profile, for XProf and Perfetto
    c.eval_steps = maybe(int)  # None evaluates at the start and at the end
    c.save_steps = maybe(int)  # None saves at the end, and when the run is told to stop
    c.checkpoint = ConfigDict()
    c.checkpoint.keep = 2  # latest checkpoints kept
    c.checkpoint.best_metric = maybe(str)  # such as eval/loss: the best by it is kept as well
    c.checkpoint.best_mode = "min"  # min or max
    c.export = ConfigDict({"enabled": True, "dtype": "float32"})
    c.export.push_to = maybe(str)  # NAME/MODEL on the Hugging Face hub, made private if it is new; HF_TOKEN must be set
    c.tensorboard = True  # event files too, where tensorboardX is installed
    # train; sft_first: fine-tuning on the chosen responses before it; pairs: preference data of the policy's own, see
    # on_policy; rounds: trainings on such data; quickstart: the embedded demonstration
    c.job = "train"
    c.sft = ConfigDict({"epochs": maybe(float), "learning_rate": maybe(float)})  # of the first stage of sft_first
    return c.lock()


def parse_arg(arg: str, **fields: Any) -> ConfigDict:
    """Parses what follows the colon of --config=file.py:arg, typed by the defaults given.

    Args:
      arg: 'a=1,b=two'; a bare word sets the first field.
      **fields: names and defaults; None stands for a string that may be missing, a tuple for its members, of which the
        first is the default.

    Returns:
      A ConfigDict of the fields.

    Raises:
      UserError: an unknown name, or a value of the wrong type.

    Example:
      >>> dict(parse_arg("orpo,steps=5", loss="dpo", steps=0))
      {'loss': 'orpo', 'steps': 5}
    """
    choices = {name: value for name, value in fields.items() if isinstance(value, tuple)}
    fields |= {name: value[0] for name, value in choices.items()}
    out = dict(fields)
    for part in filter(None, re.split(r",(?![^()]*\))", arg or "")):  # a loss may have commas in brackets
        name, equals, text = part.partition("=")
        if not name.isidentifier() or not equals:
            name, text = next(iter(fields)), part
        if name not in fields:
            raise UserError(
                f"config argument {name!r} is unknown; {did_you_mean(name, fields)}it takes {', '.join(fields)}"
            )
        if name in choices:
            choose(name, text, dict.fromkeys(choices[name]))
        try:
            out[name] = read_as(text, fields[name])
        except ValueError:
            kind = type(fields[name]).__name__
            raise UserError(f"config argument {name}={text!r} is not of type {kind}") from None
    return ConfigDict(out)


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not None, without the name."""
    return {key: value for key, value in fields.items() if value is not None and key != "name"}


def loss_of(config: ConfigDict) -> BoundLoss:
    """The loss that a config names, its hyper-parameters filled in and checked."""
    return make_loss(config.loss.name, **given(config.loss))


def kind_of(loss: BoundLoss) -> str:
    """What a loss is trained on: pairs, unpaired or supervised data."""
    return "unpaired" if "label" in loss.needs else "pairs" if "rejected" in loss.needs else "supervised"


def cleaning_of(config: ConfigDict) -> list[BoundStep]:
    """The steps of cleaning that a config names, with their options, checked against the data that its loss takes."""
    return cleaning_steps(config.data.clean, config.data.cleaning, kind_of(loss_of(config)))


def validate(config: ConfigDict, *, complete: bool = True) -> None:
    """Checks what can be checked without data or devices.

    Args:
      config: with the fields of `defaults`.
      complete: it must name a model and data too.

    Raises:
      UserError: naming the field, its value and what it takes.
    """
    loss = loss_of(config)
    flat = flatten(config.to_dict())
    for name, choices in CHOICES.items():
        choose(name, flat[name], dict.fromkeys(choices))
    for name in POSITIVE:
        if flat[name] is not None and not flat[name] > 0:
            raise UserError(f"{name}={flat[name]!r} must be positive")
    if config.seed < 0:
        raise UserError(f"seed={config.seed} must be at least 0")
    make_optimizer(resolved(config)["optimizer"], 0.0, config.grad_clip)  # names what is wrong with it
    if not 0 <= config.learning_rate < math.inf:
        raise UserError(f"learning_rate={config.learning_rate} must be a number >= 0")
    for unit in UNITS:
        if (config[f"warmup_{unit}"] or 0) < 0:
            raise UserError(f"warmup_{unit}={config[f'warmup_{unit}']} must be at least 0")
    warmups = [f"warmup_{unit}" for unit in UNITS if config[f"warmup_{unit}"]]
    if len(warmups) > 1:
        raise UserError(f"{' and '.join(warmups)} are both set; set one (warmup_steps=0 unsets it)")
    if config.batch_size % config.micro_steps:
        raise UserError(f"batch_size={config.batch_size} is not a multiple of micro_steps={config.micro_steps}")
    if not 0 <= config.data.eval_fraction < 1:
        raise UserError(f"data.eval_fraction={config.data.eval_fraction} must lie in [0, 1)")
    if config.data.balance and not config.data.shuffle:
        raise UserError("data.balance=True deals pairs anew and data.shuffle=False keeps their order; set one of them")
    if config.model.stochastic_rounding and (
        config.model.param_dtype != "bfloat16" or config.lora.rank or config.lora.path
    ):
        raise UserError("model.stochastic_rounding is for model.param_dtype=bfloat16 of weights that are trained")
    profiled(config)
    uses = {source.use for source in sources_of(config.data)}
    if config.data.leaks is not None:
        choose("data.leaks", config.data.leaks, dict.fromkeys(LEAKS))
        if not ({"eval", "test"} & uses or config.data.eval_fraction):
            raise UserError(f"data.leaks={config.data.leaks!r} is set without held-out data")
    for step in cleaning_of(config):
        if step.options.get("held_out_too") and not ("eval" in uses or config.data.eval_fraction):
            raise UserError(f"data.cleaning.{step.name}.held_out_too is set without held-out data")
    if not 0 <= config.data.flip_labels < 1:
        raise UserError(f"data.flip_labels={config.data.flip_labels} must lie in [0, 1)")
    if config.data.flip_labels and ("rejected" not in loss.needs or {"label", "margin"} & loss.needs):
        raise UserError(f"data.flip_labels applies to pairs without scores; loss {loss.name!r} reads others")
    if "eval" in uses and config.data.eval_fraction:
        one = "data.eval_path" if config.data.eval_path else "data.mix (use='eval')"
        raise UserError(f"{one} and data.eval_fraction both name the held-out data; set one")
    needs_reference, kind = "reference" in loss.needs, config.reference.kind
    if config.lora.rank or config.lora.path:
        for name, clash in (("reference.kind", kind == "moving"), ("reference.path", config.reference.path)):
            if clash:
                raise UserError(
                    f"{name}={flat[name]!r} and adapters (lora.rank, lora.path) exclude each other: the reference is "
                    "the base model, with what lora.path adds to it"
                )
    if config.model.quantize is not None:
        choose("model.quantize", config.model.quantize, dict.fromkeys(QUANTIZED))
        if not (config.lora.rank or config.lora.path):
            raise UserError(f"model.quantize={config.model.quantize!r} is for frozen weights; set lora.rank")
    for name in ("model.dropout", "model.attention_dropout", "lora.dropout"):
        if not 0 <= (flat[name] or 0) < 1:
            raise UserError(f"{name}={flat[name]} must lie in [0, 1)")
    for name in ("rank", "alpha", "targets", "rank_stabilised", "dora", "dropout"):
        if config.lora[name] is None or (name == "dropout" and config.lora.path):
            continue
        if config.lora.path:
            raise UserError(f"lora.{name} is what the adapters in lora.path say; leave it unset")
        if not config.lora.rank:
            raise UserError(f"lora.{name} is set without lora.rank, and there are no adapters")
    if needs_reference and kind == "none":
        raise UserError(f"loss {loss.name!r} needs a reference; set reference.kind to copy, cached or moving")
    if "token_kl" in loss.needs and kind == "cached":
        raise UserError(f"loss {loss.name!r} compares whole distributions; set reference.kind to copy or moving")
    if {"after", "reward"} & loss.needs and config.too_long == "truncate_response":
        raise UserError(
            f"loss {loss.name!r} with these options reads the end of responses; too_long=truncate_response cuts it off"
        )
    if "after" in loss.needs and config.data.keep_end:
        raise UserError(
            f"loss {loss.name!r} with these options takes a response's last token for its end; set data.keep_end=False"
        )
    if not needs_reference and kind != "none":
        raise UserError(f"loss {loss.name!r} uses no reference; set reference.kind=none (it is {kind!r})")
    if kind == "none" and config.reference.path:
        raise UserError("reference.path is set but reference.kind=none keeps no reference; set copy or cached")
    if kind != "cached" and config.reference.cache_dir:
        raise UserError(f"reference.cache_dir applies to reference.kind=cached, not {kind!r}")
    for name in MOVING:
        if kind != "moving" and config.reference[name] is not None:
            raise UserError(f"reference.{name} applies to reference.kind=moving, not {kind!r}")
    if (config.reference.mixup or 0) > 1:
        raise UserError(f"reference.mixup={config.reference.mixup} must lie in (0, 1]")
    if (config.on_policy.prompts is not None) != (config.job in ("pairs", "rounds")):
        raise UserError(
            f"on_policy.prompts={config.on_policy.prompts!r} and job={config.job!r} do not fit: pairs and rounds need "
            "a file of prompts, others take none"
        )
    if config.on_policy.prompts and not config.samples.reward:
        raise UserError(f"job={config.job!r} needs samples.reward, to tell which response is better")
    if config.job in ("pairs", "rounds") and (config.data.path or config.data.mix):
        raise UserError(f"data.path={config.data.path!r} is not read: job={config.job!r} makes its own data")
    if not config.export.enabled and (config.job == "sft_first" or config.on_policy.rounds > 1):
        raise UserError(f"export.enabled=False, and job={config.job!r} goes on from the exported model; leave it on")
    for name in ("limit", "reward", "reference"):
        if config.samples[name] and not (config.samples.prompts or (name == "reward" and config.on_policy.prompts)):
            raise UserError(f"samples.{name} is set without samples.prompts, and nothing is sampled")
    for name, value in config.sft.items():
        if (value is not None) != (config.job == "sft_first"):
            raise UserError(f"sft.{name}={value} and job={config.job!r} do not fit: sft_first needs it, others do not")
        if value is not None and not value > 0:
            raise UserError(f"sft.{name}={value!r} must be positive")
    if config.job in ("train", "sft_first") and not ("eval" in uses or config.data.eval_fraction):
        for name in ("checkpoint.best_metric", "eval_steps", "data.eval_limit"):
            if flat[name] and not (config.samples.prompts and name != "data.eval_limit"):
                raise UserError(f"{name} is set without held-out data; set data.eval_path or data.eval_fraction")
    if complete and config.job in ("pairs", "rounds") and not config.model.path:
        raise UserError("model.path is not set; write a Hugging Face directory or a hub name: --config.model.path=...")
    if complete and config.job in ("train", "sft_first"):
        for name, what in (("model.path", "a Hugging Face directory"), ("data.path", "a file, a directory")):
            if not flat[name] and not (name == "data.path" and config.data.mix):
                raise UserError(
                    f"{name} is not set; write {what} or a hub name: --config=FILE.py:{name.split('.')[0]}=... "
                    f"or --config.{name}=..."
                )


def profiled(config: ConfigDict) -> range:
    """The steps that are traced.

    Raises:
      UserError: profile_steps cannot be read.
    """
    if config.profile_steps is None:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", config.profile_steps)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"profile_steps={config.profile_steps!r}: write FIRST:LAST, two steps counted from 1, as 10:15")
    return range(first, last + 1)


def duration(config: ConfigDict, name: str, pairs: int) -> int | None:
    """A length of time in steps, from the first of NAME_steps, NAME_examples and NAME_epochs that is set.

    Args:
      config: the experiment.
      name: 'warmup', or '' for the run itself.
      pairs: in an epoch.

    Returns:
      Steps, or None if no field is set.
    """
    prefix = f"{name}_" if name else ""
    steps, examples, epochs = (config.get(prefix + unit) for unit in UNITS)
    if steps or not (examples or epochs):
        return steps
    return max(1, (examples or round(epochs * pairs)) // config.batch_size)


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The config as a plain dict, with the hyper-parameters that the loss, the optimizer and the reference will use."""
    plain = config.to_dict()
    if plain["data"]["mix"] is not None:
        mix = json.dumps(plain["data"]["mix"], default=lambda x: dict(x) if isinstance(x, ConfigDict) else str(x))
        plain["data"]["mix"] = json.loads(mix)  # as config.json gives it back
    loss = loss_of(config)
    plain["loss"] = {"name": loss.name, **loss.hyper}
    for step in cleaning_of(config):
        if step.options:
            plain["data"]["cleaning"][step.name] = step.options
    if config.reference.kind == "moving":
        plain["reference"] |= {**MOVING, **given(config.reference)}
    plain["optimizer"] = {"name": plain["optimizer"]["name"], **given(plain["optimizer"])}
    return plain
