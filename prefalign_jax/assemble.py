"""The models of a run on its mesh: the policy, what it is compared with, and the data packed for them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from prefalign_jax import checkpoint
from prefalign_jax.data.chat import load_tokenizer
from prefalign_jax.data.pairs import digest_of
from prefalign_jax.data.pipeline import PairSet, make_pair_set, tokens_shared
from prefalign_jax.experiment import Experiment
from prefalign_jax.load_data import Data
from prefalign_jax.models.decoder import DecoderConfig, Placement, cast, make_decoder
from prefalign_jax.models.dropout import Dropout
from prefalign_jax.models.hf_io import load_config, resolve
from prefalign_jax.models.loading import load_decoder
from prefalign_jax.models.lora import Lora, full_parameters, init_adapters, join
from prefalign_jax.models.peft_io import load_adapters
from prefalign_jax.optim import in_float32, make_optimizer
from prefalign_jax.options import given
from prefalign_jax.processes import note
from prefalign_jax.progress import Progress
from prefalign_jax.reference import cache_key, cached, compute, mover, params_digest
from prefalign_jax.sharding import (
    born,
    deal_experts,
    deal_texts,
    packing_of,
    param_shardings,
    spread,
    what_stays_whole,
)
from prefalign_jax.train_step import make_train_step
from prefalign_jax.types import LanguageModel, Pair, PairLogps, Params, UserError


class Assembled(NamedTuple):
    """What a run begins with.

    Attributes:
      model: pure functions of the parameters.
      params: what is trained, at the first step: the model's parameters, or adapters.
      reference: what the train state keeps beside them: a frozen copy, or under adapters the base; None for neither.
      lora: the adapters that are trained; None for none.
      started: (model, parameters) that samples are compared with; None where the state keeps them or none are drawn.
      training, held_out: the pairs, packed; with the reference's log-probabilities where they are cached.
      digests: of what the run reads besides its config, by what it is.
    """

    model: LanguageModel
    params: Params
    reference: Params | None
    lora: Lora | None
    started: tuple[LanguageModel, Params] | None
    training: PairSet
    held_out: PairSet | None
    digests: dict[str, str]


def assemble(experiment: Experiment, data: Data, tokenizer: Any, mesh: jax.sharding.Mesh, workdir: Path) -> Assembled:
    """Loads policy and reference, starts the adapters, and packs the pairs.

    Args:
      experiment: fitted to its model.
      data: the pairs.
      tokenizer: of the policy.
      mesh: where everything lies.
      workdir: of the run; cached log-probabilities are in its `reference` unless the config names another place.

    Returns:
      The `Assembled`. Its params share no buffers with the rest, since the step donates them.

    Raises:
      UserError: files are missing or do not fit, or an option does not apply to this model.
    """
    config, tokens, reward = experiment.config, len(tokenizer), "reward" in experiment.loss.needs
    loaded, lora = adapters_of(config, reward, tokens)
    model, base = load_model(config, config.model.path, mesh, tokens, config.model.random_init, reward, lora)
    if config.model.router_weight and model.routed is None:
        raise UserError(
            f"model.router_weight={config.model.router_weight} applies to mixtures of experts; this is none"
        )
    for sentence in what_stays_whole(mesh, base, model.rules):
        note(sentence)
    digests = {"training pairs": digest_of(data.training), "weights in model.path": params_digest(base)}
    if data.held_out:
        digests[checkpoint.HELD_OUT] = digest_of(data.held_out)
    compared = base  # what the loss compares the policy with
    if config.reference.path:
        other, compared = load_model(config, config.reference.path, mesh, tokens)
        _check_alike(config.reference.path, other, model, tokenizer, data)
        digests["weights in reference.path"] = params_digest(compared)
    if loaded:
        loaded = {**full_parameters(base, lora, drawn_dtype(config)), **loaded}
        loaded = jax.device_put(loaded, param_shardings(mesh, loaded))
        digests["adapters in lora.path"] = params_digest(loaded)
        compared = join(base, loaded)

    training, held_out = pair_sets(experiment, data, model, mesh)
    if config.reference.kind == "cached":
        weights = digests.get("weights in reference.path", digests["weights in model.path"])
        if loaded:  # the reference has them, at this scale
            weights += f" {digests['adapters in lora.path']} {lora}"
        directory = Path(config.reference.cache_dir or workdir / "reference")
        training, held_out = (
            one and with_reference(one, model, compared, weights, experiment, mesh, directory)
            for one in (training, held_out)
        )
    started, kept, params = _started(experiment, model, base, mesh, tokens), _kept(experiment, base, compared), base
    if lora:
        params = jax.tree.map(jnp.copy, loaded) or new_adapters(experiment, lora, kept, mesh)
    return Assembled(model, params, kept, lora, started, training, held_out, digests)


def new_adapters(experiment: Experiment, lora: Lora, base: Params, mesh: jax.sharding.Mesh) -> Params:
    """Adapters at the first step, drawn by the experiment's seed."""
    config = experiment.config
    make = functools.partial(init_adapters, jax.random.key(config.seed), lora=lora, dtype=drawn_dtype(config))
    return born(mesh, make, base)


UNREAD = ("init_std", "max_position", "vocab_padding")  # fields of a shape that change nothing of what is computed


def _check_alike(path: str, other: LanguageModel, model: LanguageModel, tokenizer: Any, data: Data) -> None:
    """Refuses a reference that computes in another way than the policy, or whose tokens mean other texts."""
    for field in dataclasses.fields(model.config):
        theirs, ours = getattr(other.config, field.name), getattr(model.config, field.name)
        if theirs != ours and field.name not in UNREAD:
            raise UserError(
                f"reference.path={path!r} has {field.name}={theirs!r} where model.path has {ours!r}; they must match"
            )
    check_tokenizer("reference.path", path, tokenizer, data.training)


def check_tokenizer(field: str, path: str, tokenizer: Any, pairs: Sequence[Pair]) -> None:
    """Refuses a model whose tokens mean other texts than the policy's.

    Args:
      field: of the config, that names the model.
      path: of the model.
      tokenizer: of the policy.
      pairs: a few of them are read by both.
    """
    try:
        other = load_tokenizer(path)
    except UserError:
        note(f"{field}={path!r} has no tokenizer, so that nobody can tell whether its tokens are the same")
        return
    for pair in itertools.islice(pairs, 16):
        text = tokenizer.decode(np.concatenate([pair.prompt, pair.chosen]), skip_special_tokens=True)
        ids = [one(text, add_special_tokens=False).input_ids for one in (tokenizer, other)]
        if ids[0] != ids[1]:
            raise UserError(
                f"{field}={path!r} has another tokenizer than model.path: it reads {pair.where} as other tokens"
            )


def _kept(experiment: Experiment, base: Params, compared: Params) -> Params | None:
    """What the train state keeps of the reference; nothing where its log-probabilities are cached."""
    kind = experiment.config.reference.kind
    if experiment.adapted:  # the base, without which there is no policy either
        return compared
    if kind in ("cached", "none"):
        return None
    if compared is base:
        compared = jax.tree.map(jnp.copy, base)  # the step donates the policy's buffers
    # Half the memory in bfloat16, the same log-probabilities.
    return cast(compared, experiment.config.dtype) if kind == "copy" else compared


def _started(
    experiment: Experiment, model: LanguageModel, base: Params, mesh: jax.sharding.Mesh, tokens: int
) -> tuple[LanguageModel, Params] | None:
    """Where the run begins, for samples to be compared with, unless the state keeps just that as its reference."""
    config = experiment.config
    if not config.samples.prompts:
        return None
    if config.samples.reference:
        return load_model(config, config.samples.reference, mesh, tokens)
    kept = experiment.adapted or (config.reference.kind == "copy" and not config.reference.path)
    return None if kept else (model, jax.tree.map(jnp.copy, base))


def pair_sets(
    experiment: Experiment, data: Data, model: LanguageModel, mesh: jax.sharding.Mesh
) -> tuple[PairSet, PairSet | None]:
    """(training, held out or None): pairs that know how to make batches for this model and mesh."""
    config = experiment.config
    packing = dict(layout=experiment.layout, row_length=config.data.row_length, attends=model.attends)
    packing |= packing_of(mesh) | dict(group=experiment.group)
    training = make_pair_set(data.training, config.batch_size, micro_steps=config.micro_steps, **packing)
    if training.sharing is not None:
        prompts, (one_by_one, together) = len(np.unique(training.sharing.prompt)), tokens_shared(training)
        saved = f"{1 - together / one_by_one:.0%} of the tokens are saved"
        note(f"pairs with the same prompt come together: {len(training.pairs)} of {prompts} prompts; {saved}")
    share = config.batch_size // config.micro_steps
    return training, make_pair_set(data.held_out, share, **packing) if data.held_out else None


def with_reference(
    data: PairSet,
    model: LanguageModel,
    params: Params,
    weights: str,
    experiment: Experiment,
    mesh: jax.sharding.Mesh,
    directory: Path,
) -> PairSet:
    """The set with the reference's log-probabilities, from the cache or computed now; `weights` digests the params."""
    config, needs = experiment.config, experiment.loss.needs
    numbers = f"{config.dtype} {config.matmul_precision}"
    path = directory / f"{cache_key(model, weights, data.pairs, numbers, needs)}.npz"

    def make() -> PairLogps:
        share = data.batch_size // data.micro_steps
        layout = data.layout._replace(prompt=False, after=False)
        packing = packing_of(mesh) | dict(row_length=config.data.row_length, attends=model.attends)
        packing["group"] = data.sharing is not None
        plain = make_pair_set(data.pairs, share, layout=layout, **packing)
        with Progress(len(data.pairs), "reference pair") as progress:
            options = dict(mesh=mesh, chunk=config.vocabulary_chunk, progress=progress.update, needs=needs)
            return compute(model, params, plain, **options)

    return data._replace(reference=cached(path, make))


def adapters_of(config: ConfigDict, reward: bool, tokens: int) -> tuple[Params | None, Lora | None]:
    """(adapters to go on from or None, what adapters are trained or None).

    Tokens that the vocabulary did not have would keep rows that nothing trains, so embedding and head are trained in
    full then, as PEFT's modules_to_save are.

    Args:
      config: its fields `lora` and `model.path`.
      reward: a reward model is trained, whose score is trained in full.
      tokens: len(tokenizer).
    """
    if not (config.lora.path or config.lora.rank):
        return None, None
    shape = dataclasses.replace(load_config(resolve(config.model.path)), reward=reward)
    full = {"score"} if reward else set()
    known = shape.vocab_size
    if config.data.chat_template:  # a base may have spare rows, which a template's new tokens take without growing it
        known = min(known, len(load_tokenizer(config.model.path)))
    if tokens > known:
        shape = dataclasses.replace(shape, vocab_size=max(tokens, shape.vocab_size))
        full |= {"embed", shape.head_path.partition("/")[0]}
    adapters = None
    if config.lora.path:
        adapters, lora = load_adapters(config.lora.path, shape)
        lora = dataclasses.replace(lora, dropout=config.lora.dropout or 0.0)
    else:
        lora = Lora(**given(config.lora))
    lora = dataclasses.replace(lora, full=tuple(sorted({*full, *lora.full})))
    if "embed" in lora.full:
        note("trained in full beside the adapters: " + ", ".join(lora.full))
    return adapters, lora


def drawn_dtype(config: ConfigDict) -> str:
    """The type of parameters that no file holds."""
    return "float32" if config.model.param_dtype == "stored" else config.model.param_dtype


# Kernels of attention -> what their devices are called in their kind, and in words.
DEVICES = {"cudnn": ("NVIDIA", "an NVIDIA GPU"), "splash": ("TPU", "a TPU")}


def decoder_of(
    config: ConfigDict, shape: DecoderConfig, mesh: jax.sharding.Mesh, lora: Lora | None = None
) -> LanguageModel:
    """The decoder of this shape, computed on a mesh as a config says; `lora` is of the adapters that it is to take."""
    options = dict(dtype=config.dtype, param_dtype=drawn_dtype(config), remat=config.model.remat, lora=lora)
    attention = config.model.attention
    if shape.delta_layers and mesh.shape["context"] > 1:
        raise UserError(
            f"mesh.context={mesh.shape['context']}: gated delta rules take whole rows; write mesh.context=1"
        )
    if attention in DEVICES:
        kind, words = DEVICES[attention]
        device = jax.devices()[0].device_kind
        if kind not in device:
            raise UserError(f"model.attention={attention!r} needs {words}, and this is {device}; write 'tiles'")
        if mesh.shape["context"] > 1:
            raise UserError(f"model.attention={attention!r} takes whole rows; write 'tiles', or mesh.context=1")
        if shape.num_kv_heads % mesh.shape["tensor"]:
            raise UserError(
                f"model.attention={attention!r} takes whole heads: mesh.tensor must divide the model's "
                f"{shape.num_kv_heads} for keys and values, and {mesh.shape['tensor']} does not; or write 'tiles'"
            )
    options |= dict(attention=attention, placement=Placement(spread(mesh), deal_experts(mesh), deal_texts(mesh)))
    return make_decoder(shape, **options, dropout=Dropout(config.model.dropout, config.model.attention_dropout))


def load_model(
    config: ConfigDict,
    path: str,
    mesh: jax.sharding.Mesh,
    tokens: int,
    random_init: bool = False,
    reward: bool = False,
    lora: Lora | None = None,
) -> tuple[LanguageModel, Params]:
    """A model and its parameters on their shardings, the embeddings grown where the tokenizer has more tokens.

    Args:
      config: its model fields, dtype and seed.
      path: Hugging Face directory, hub name or GGUF file.
      mesh: the mesh.
      tokens: len(tokenizer).
      random_init: take only the shape from `path` and draw the parameters.
      reward: a reward head in place of the output embedding.
      lora: of the adapters that the model is to take; its parameters are frozen then, and keep the type of their file.

    Returns:
      (model, params), without adapters; the kernels quantized if the config says so.

    Raises:
      UserError: files are missing or do not fit.
    """
    return load_decoder(
        path,
        make=functools.partial(decoder_of, config, mesh=mesh, lora=lora),
        place=functools.partial(param_shardings, mesh),
        reward=reward,
        tokens=tokens,
        multiple=config.model.pad_vocabulary,
        dtype="stored" if lora and not random_init else config.model.param_dtype,
        quantize=config.model.quantize,
        drawn=jax.random.key(config.seed) if random_init else None,
    )


def optimizer_of(
    experiment: Experiment, schedule: optax.Schedule, **hyper: float | jax.Array
) -> optax.GradientTransformation:
    """The optimizer of an experiment, gradient clipping included; `hyper` replaces hyper-parameters of the config."""
    optimizer = make_optimizer({**experiment.plain["optimizer"], **hyper}, schedule, experiment.config.grad_clip)
    return in_float32(optimizer) if experiment.config.model.stochastic_rounding else optimizer


def update_options(experiment: Experiment) -> dict[str, Any]:
    """What an update is told beside model, loss, optimizer and what these follow from; see `make_update`."""
    config, moving = experiment.config, None
    if config.reference.kind == "moving":
        moving = mover(config.reference.mixup, config.reference.every)
    return dict(
        chunk=config.vocabulary_chunk,
        move_reference=moving,
        router_weight=config.model.router_weight,
        stochastic_rounding=config.model.stochastic_rounding,
        ema_decay=config.ema.decay,
    )


def step_of(
    experiment: Experiment, model: LanguageModel, mesh: jax.sharding.Mesh, schedule: optax.Schedule
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """(optimizer, train step) of an experiment."""
    optimizer = optimizer_of(experiment, schedule)
    options = dict(schedule=schedule, seed=experiment.config.seed, **update_options(experiment))
    return optimizer, make_train_step(model, experiment.loss, optimizer, mesh, **options)
