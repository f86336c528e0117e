"""The package as a library: from rows to pairs, from pairs to log-probabilities, from prompts to texts.

`prefalign_jax` itself offers these functions; docs/library.md shows them together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from prefalign_jax.cli.trl_names import instead
from prefalign_jax.config import defaults
from prefalign_jax.data.chat import tokenize_prompts
from prefalign_jax.data.counts import TRAINING, added, listed
from prefalign_jax.data.memory import MemoryRows, RowsOrPath, as_source
from prefalign_jax.data.pairs import Pairs, as_pairs
from prefalign_jax.data.pipeline import eval_batches, make_pair_set, mismatched
from prefalign_jax.data.records import Text
from prefalign_jax.data.remarks import lines
from prefalign_jax.data.template import CHAT_FIELDS, chat_options
from prefalign_jax.data.trees import Layout
from prefalign_jax.experiment import read
from prefalign_jax.generation import generate
from prefalign_jax.generation.sampling import Sampling
from prefalign_jax.load_data import say_left_out, tokenized_sources
from prefalign_jax.logps import policy_and_reference_logps, preference_logps
from prefalign_jax.losses import NEEDS, BoundLoss, make_loss
from prefalign_jax.models.endings import split_stops, stop_ids
from prefalign_jax.options import choose, did_you_mean, flatten
from prefalign_jax.policy import Policy
from prefalign_jax.processes import note
from prefalign_jax.sharding import mesh_of, packing_of, place_batch
from prefalign_jax.types import LanguageModel, Pair, PairLogps, Params, PreferenceBatch, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# What `tokenize` takes of a config's `data`, and where the user finds some of the rest.
OPTIONS: tuple[str, ...] = ("split", "limit", "format", "columns", "map_fn", "ignore", "clean", "cleaning", "pairs")
OPTIONS += ("flip_labels", "ascii_quotes", "train_on", "keep_end", "mask_format", "cache_dir")
OPTIONS += CHAT_FIELDS
ELSEWHERE = {
    "path": "it is the first argument",
    "chat_template": "write load_tokenizer(path, chat_template=...)",
    "eval_fraction": "hold out with train, or take pairs[:n] and pairs[n:]",
    "mix": "mix with train, or join the rows first",
    "seed": "it is for training",
}
AT_ONCE = 16  # pairs in a batch where no gradient is taken


def experiment(loss: str = "dpo", **fields: Any) -> ConfigDict:
    """A config: every field of an experiment, with its default where none is given.

    Args:
      loss: a key of losses.LOSSES, or a weighted sum of some.
      **fields: name -> value. A name with dots is given as part of a dict: `**{"data.path": "pairs.jsonl"}`. A group of
        fields takes a dict of its own: `data={"path": "pairs.jsonl"}`.

    Returns:
      The config, for `train`; `config.py` has the meaning of each field.

    Raises:
      UserError: a field is unknown, or a value is of another type.

    Example:
      >>> config = experiment("orpo", steps=100, **{"loss.lam": 0.2})
      >>> config.loss.name, config.loss.lam, config.reference.kind
      ('orpo', 0.2, 'none')
      >>> experiment(learningrate=1e-6)
      Traceback (most recent call last):
      prefalign_jax.types.UserError: experiment: no field 'learningrate'; did you mean 'learning_rate'?
    """
    config = defaults(loss)
    for name, value in fields.items():
        _set(config, name, value)
    return config


def _set(config: ConfigDict, name: str, value: Any) -> None:
    """Gives a field, with dots into groups, its value."""
    known = flatten(config.to_dict())
    if isinstance(value, Mapping) and any(one.startswith(f"{name}.") for one in known):
        for key, part in value.items():
            _set(config, f"{name}.{key}", part)
        return
    if name not in known:
        theirs = instead(name, str(value)).replace("--config.", "")
        same = [one for one in known if one.rpartition(".")[2] == name.rpartition(".")[2]]
        hint = theirs or (f"did you mean {same[0]!r}?" if same else did_you_mean(name, known).strip())
        raise UserError(f"experiment: no field {name!r}; {hint or 'prefalign_jax/config.py lists them'}")
    *groups, field = name.split(".")
    group = functools.reduce(lambda inner, part: inner[part], groups, config)
    value = str(value) if isinstance(value, Path) else value.item() if isinstance(value, np.generic) else value
    try:
        group[field] = value
    except TypeError:
        kind = group.get_type(field).__name__
        raise UserError(f"experiment: {name}={value!r} is not of type {kind}") from None


def tokenize(
    data: RowsOrPath,
    tokenizer: Tokenizer,
    *,
    loss: str | BoundLoss = "dpo",
    max_length: int = 1024,
    too_long: str = "drop",
    **data_options: Any,
) -> Pairs:
    """Tokenizes rows into pairs, as training does.

    Args:
      data: a path, a hub name, a list of dicts, or a datasets.Dataset, in any format of docs/data.md.
      tokenizer: a Hugging Face tokenizer; messages go through its chat template.
      loss: what the pairs are for: a key of losses.LOSSES, a weighted sum, or what `losses.make_loss` gives. It decides
        what is wanted of a row: both responses, a score gap, one response, or a completion with a label.
      max_length: tokens of prompt + longer response.
      too_long: what becomes of longer pairs: drop, truncate_prompt, truncate_response.
      **data_options: fields of a config's `data` that are about reading, OPTIONS.

    Returns:
      The pairs in the order of the rows; `dropped` says how many rows gave none, by reason.

    Raises:
      UserError: an option does not apply, a row is malformed, or no pair is left.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise UserError(f"tokenize: max_length={max_length!r} must be a number of tokens, 2 or more")
    if not hasattr(tokenizer, "eos_token_id"):
        hint = "policy.tokenizer" if isinstance(tokenizer, Policy) else "load_tokenizer(path)"
        raise UserError(f"tokenize: expected a tokenizer, this is a {type(tokenizer).__name__}; write {hint}")
    loss = loss if isinstance(loss, BoundLoss) else make_loss(loss)
    for option in data_options:
        if option not in OPTIONS:
            hint = ELSEWHERE.get(option) or did_you_mean(option, OPTIONS).strip() or f"it takes {', '.join(OPTIONS)}"
            raise UserError(f"tokenize: no option {option!r}; {hint}")
    source = as_source(data)
    if isinstance(source, MemoryRows):
        data_options = {"cache_dir": "", **data_options}  # they are at hand
        if "split" in data_options:
            raise UserError("tokenize: split applies to a directory or a hub name, and these rows are in memory")
    config = experiment(loss.name, max_length=max_length, too_long=too_long, data=data_options)
    how = dataclasses.replace(read(config, complete=False, data=source), loss=loss)
    pairs, counts = tokenized_sources(how.sources, tokenizer, how, TRAINING)
    say_left_out(how.sources)
    if remarks := counts.remarks():
        note(f"{source}: {len(pairs)} {loss.unit}{remarks}")
    for line in lines(counts.noticed, how.chat.split_special):
        note(line)
    dropped = dict(added([*counts.lost[TRAINING], *(step.dropped for step in counts.cleaning)]))
    if not pairs:
        raise UserError(f"{source}: no {loss.unit} left, dropped {listed(dropped)}; max_length is {max_length}")
    if "mismatched" in loss.needs:
        pairs = mismatched(pairs, max_length)
    return dataclasses.replace(pairs, dropped=dropped, needs=loss.needs)


def logps(
    policy: Policy, pairs: Pairs | Sequence[Pair], *, needs: Iterable[str] = (), reference: Policy | None = None
) -> PairLogps:
    """Log-probabilities of pairs under a policy, as losses take them.

    It can be differentiated in `policy.params`, and stand inside jax.jit with `policy.params` as its argument. Where
    these are traced all pairs are one batch, so the memory limits how many there can be; else there are several.

    Args:
      policy: a model and its parameters; of a reward model the result has rewards in place of log-probabilities.
      pairs: from `tokenize`.
      needs: what else a loss reads, keys of losses.NEEDS, as in `losses.make_loss(NAME).needs`.
      reference: for 'token_kl', which compares whole distributions: the policy that this one is compared with.

    Returns:
      `PairLogps`, [P] float32 each, in the order of `pairs`. What the pairs do not hold is None.

    Raises:
      UserError: this is no policy, the pairs are not of its tokenizer or longer than its positions, or a need is
        unknown or cannot be filled.
    """
    _check(policy, "logps")
    if isinstance(needs, str):
        raise UserError(f"logps: needs={needs!r} is a string; write needs={{{needs!r}}}")
    needs = frozenset(needs)
    for need in sorted(needs):
        choose("logps: needs", need, NEEDS)
    pairs = _pairs(pairs)
    model, params = policy.model, policy.params
    layout = _layout(policy, pairs, needs)
    if ("token_kl" in needs) != (reference is not None):
        raise UserError("logps: needs={'token_kl'} and reference=POLICY go together; write both or neither")
    if reference is not None and reference.model.config != model.config:
        raise UserError("logps: policy and reference have different shapes, so their distributions cannot be compared")
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params))
    mesh = None if traced else mesh_of(params)
    packing = packing_of(mesh) if mesh else {}
    size = len(pairs) if traced else min(AT_ONCE, len(pairs))
    data = make_pair_set(pairs, size, layout=layout, attends=model.attends, **packing)
    parts = []
    for batch in eval_batches(data):
        with _exact():
            frozen = reference.params if reference else None
            out = _batch_logps(model, params, frozen, place_batch(mesh, batch), needs)
        parts.append(out._replace(mean_tokens=None))
    joined = jax.tree.map(lambda *columns: jnp.concatenate(columns)[: len(pairs)], *parts)
    scored = not np.isnan(pairs.margin).any()
    labelled = pairs.needs is None or "label" in pairs.needs
    return joined._replace(
        mean_tokens=jnp.asarray(batch.mean_tokens[0]),
        margin=joined.margin if scored else None,
        label=joined.label if labelled else None,
        **({} if layout.rejected else {"rejected": None, "rejected_tokens": None}),
        **({} if layout.prompt else {"prompt": None, "prompt_tokens": None}),
    )


@functools.partial(jax.jit, static_argnames=("model", "needs"))
def _batch_logps(
    model: LanguageModel, params: Params, frozen: Params | None, batch: PreferenceBatch, needs: Set[str]
) -> PairLogps:
    batch = jax.tree.map(lambda x: x[0], batch)
    if frozen is None:
        return preference_logps(model, params, batch, needs=needs)
    return policy_and_reference_logps(model, params, frozen, batch, needs=needs)[0]


def _layout(policy: Policy, pairs: Pairs, needs: Set[str]) -> Layout:
    """What is laid out of the pairs; that the policy can read them is checked here."""
    rewards = jax.eval_shape(policy.model.head, policy.params).shape[0] == 1
    if "reward" in needs and not rewards:
        raise UserError("logps: needs={'reward'} takes a reward model, and the policy is a language model")
    rejected = pairs.length[:, 2]
    if "rejected" in needs and not rejected.all():
        raise UserError("logps: needs={'rejected'}, and these pairs have no rejected response; tokenize for that loss")
    lengths = pairs.length[:, 0] + pairs.length[:, 1:].max(1)
    most = getattr(policy.model.config, "max_position", None)
    if most is not None and lengths.max() > most:
        pair = pairs[int(lengths.argmax())]
        raise UserError(
            f"{pair.where}: its {lengths.max()} tokens exceed the model's {most} positions; "
            f"write tokenize(..., max_length={most})"
        )
    rows = getattr(policy.model.config, "vocab_size", None)
    largest = max(int(buffer.max()) for buffer in pairs.buffers if buffer.size)
    if rows is not None and largest >= rows:
        raise UserError(f"logps: token {largest} is beyond the model's {rows}; tokenize with policy.tokenizer")
    prompt = bool({"prompt", "after"} & needs)
    parts = dict(prompt=prompt, after="after" in needs, group="group" in needs)
    return Layout(rejected=bool(rejected.all()), rewards=rewards, **parts)


def _pairs(pairs: Any) -> Pairs:
    if not isinstance(pairs, Sequence) or not all(isinstance(pair, Pair) for pair in pairs[:1]):
        raise UserError(f"logps: expected pairs, as tokenize gives them, this is a {type(pairs).__name__}")
    if not pairs:
        raise UserError("logps: there is no pair")
    return as_pairs(pairs)


def _check(policy: Any, what: str) -> None:
    if not isinstance(policy, Policy):
        raise UserError(f"{what}: expected a Policy, as prefalign_jax.load gives it, this is a {type(policy).__name__}")


def _exact() -> contextlib.AbstractContextManager:
    """Float32 products in float32, as in training, unless the user has set another precision."""
    chosen = jax.config.jax_default_matmul_precision is not None
    return contextlib.nullcontext() if chosen else jax.default_matmul_precision("highest")


def sample(
    policy: Policy,
    prompts: Sequence[Text],
    *,
    n: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 64,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    template_may_drop: str | None = None,
    date: str | None = None,
    special_in_text: str = "keep",
) -> list[list[str]]:
    """Draws responses.

    Args:
      policy: a language model with its tokenizer.
      prompts: strings are plain text; lists of messages go through the tokenizer's chat template.
      n: responses to each prompt.
      temperature: of the softmax; 0 takes the likeliest token.
      top_k, top_p, min_p, repetition_penalty: see `generation.sampling.Sampling`; the defaults change nothing.
      max_new_tokens: tokens of a response at most.
      stop: texts that end a response and are no part of it.
      seed: random seed. Response j to prompt i depends on the seed, i and j alone.
      batch_size: responses drawn together.
      chat_template_kwargs, template_may_drop, date, special_in_text: as in a config's `data`; write what the policy was
        trained with.

    Returns:
      For each prompt its n texts, without special tokens.

    Raises:
      UserError: an option is out of range, a prompt is malformed, or prompt and response may exceed the model's
        positions.
    """
    _check(policy, "sample")
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise UserError(f"sample: expected a list of prompts, this is a {type(prompts).__name__}; write [prompt]")
    for number, prompt in enumerate(prompts, 1):
        messages = isinstance(prompt, list) and all({"role", "content"} <= {*message} for message in prompt)
        if not (isinstance(prompt, str) or messages):
            raise UserError(f"sample: prompt {number} is neither a string nor a list of messages with role and content")
    if isinstance(stop, str) or not all(stop):
        raise UserError(f"sample: stop={stop!r} must be a list of texts, none of them empty")
    model, params, tokenizer = policy
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    stop_tokens, stop_strings = split_stops(stop, tokenizer)
    chat = chat_options(chat_template_kwargs, template_may_drop, date, special_in_text, where="")
    drawn = generate.sample(
        model,
        params,
        tokenize_prompts(prompts, tokenizer, chat),
        n=n,
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop_tokens=(*stop_ids(tokenizer.name_or_path, tokenizer), *stop_tokens),
        sampling=sampling,
        stop_strings=stop_strings,
        decode=decode,
        batch_size=batch_size,
    )
    return [[generate.text_of(one, decode, stop_strings) for one in several] for several in drawn]
