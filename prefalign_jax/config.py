"""The fields of an experiment and their defaults; `experiment.read` checks them."""

from __future__ import annotations

import re
from typing import Any

from ml_collections import ConfigDict, config_dict

from prefalign_jax.data.cleaning import CLEANING
from prefalign_jax.losses import LOSSES, hyper_of, make_loss
from prefalign_jax.options import choose, did_you_mean, read_as
from prefalign_jax.types import UserError


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
    c.max_length = maybe(int)  # tokens of prompt + longer response; None is 1024, or as many as the model has positions
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
    # What rows call things, with dots into objects: {"prompt": "info.post"}, or prompt=info.post,chosen=good as text.
    c.data.columns = maybe(object)
    c.data.map_fn = maybe(str)  # module:function, from a row to a row, a list of rows, or None to leave it out
    c.data.ignore = maybe(str)  # fields with a meaning that are to be left out, with commas; message.FIELD: of messages
    # Instead of a path: several sources, each a dict with a path and other fields of data/mixture.py's `Source`.
    c.data.mix = maybe(tuple)
    # Training pairs whose prompt is held out: drop, or report; None drops them, but for eval_path without mix.
    c.data.leaks = maybe(str)
    c.data.eval_path = maybe(str)  # held-out data
    c.data.eval_split = "test"
    c.data.eval_limit = maybe(int)
    c.data.eval_fraction = 0.0  # without eval_path: part of the training prompts that is held out
    c.data.eval_seed = maybe(int)  # draws the held-out prompts; None takes the run's seed
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
    c.data.chat_template_kwargs = maybe(object)  # variables of the template: {"enable_thinking": False}, or its JSON
    c.data.template_may_drop = maybe(str)  # parts that the template may leave out, with commas: reasoning,system
    c.data.date = maybe(str)  # YYYY-MM-DD, for templates that print the date; None is the day that the run begins
    c.data.special_in_text = "keep"  # special tokens that a row's text spells: keep as tokens, or split into text
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

    c.accuracy_ties = "half"  # What equal rewards add to rewards/accuracies: half a pair (half), or nothing (trl).
    c.log_steps = 10
    c.profile_steps = maybe(str)  # FIRST:LAST, these steps are traced to WORKDIR/profile, for XProf and Perfetto
    c.eval_steps = maybe(int)  # None evaluates at the start and at the end
    c.save_steps = maybe(
        int
    )  # Steps between checkpoints. None saves with each evaluation, and by time within 10 minutes.
    c.checkpoint = ConfigDict()
    c.checkpoint.keep = 2  # latest checkpoints kept
    c.checkpoint.best_metric = maybe(str)  # such as eval/loss: the best by it is kept as well
    c.checkpoint.best_mode = "min"  # min or max
    c.export = ConfigDict({"enabled": True})
    c.export.dtype = "stored"  # Type of the exported weights: float32, bfloat16, float16, or stored, as in model.path.
    c.export.checkpoint = "last"  # Which kept checkpoint is exported: last, best (checkpoint.best_metric), or a step.
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
                f"config argument {name!r} is unknown; {did_you_mean(name, fields)}it takes {', '.join(fields)}; "
                "fields are set by --config.FIELD=VALUE"
            )
        if name in choices:
            choose(name, text, dict.fromkeys(choices[name]))
        try:
            out[name] = read_as(text, fields[name])
        except ValueError:
            kind = type(fields[name]).__name__
            raise UserError(f"config argument {name}={text!r} is not of type {kind}") from None
    return ConfigDict(out)
