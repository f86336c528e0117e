"""Sampling from a model on the parameters that are trained: every token of a text is computed once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prefalign_jax.generation.sampling import Parts, Sampling, adjust
from prefalign_jax.processes import fetch
from prefalign_jax.sharding import ROWS, groups_of, mesh_of
from prefalign_jax.types import Cached, LanguageModel, Params, UserError

CHUNK = 256  # slots of a prompt that are computed at once
SEGMENT = 64  # tokens between two looks at the text for stop strings


class Completion(NamedTuple):
    """What was drawn after a prompt.

    Attributes:
      tokens: [n] int32, the one that ended it included.
      logps: [n] float32, log-probability of each under the model's own softmax: of temperature 1, nothing cut off.
      ended: 'token', by a stop token; 'string', by the token that completed a stop string; 'length', by neither.
    """

    tokens: np.ndarray
    logps: np.ndarray
    ended: str

    @property
    def spoken(self) -> np.ndarray:
        """The tokens of the text: a stop token that ended it is no part of it, and not every tokenizer skips it."""
        return self.tokens[:-1] if self.ended == "token" else self.tokens


def text_of(one: Completion, decode: Callable[[np.ndarray], str], stop_strings: Sequence[str] = ()) -> str:
    """The text of a completion, up to the stop string that ended it.

    Args:
      one: the completion.
      decode: tokens -> text.
      stop_strings: those it was drawn with.
    """
    text = decode(one.spoken)
    return text[: min(at for at in map(text.find, stop_strings) if at >= 0)] if one.ended == "string" else text


class _Rows(NamedTuple):
    """What is known of the R texts of a batch before anything is drawn. All end at the same slot."""

    prompt: jax.Array  # [R, P] int32, padded on the left
    start: jax.Array  # [R] int32, slot of the first token
    limit: jax.Array  # [R] int32, tokens that a text may have at most
    number: jax.Array  # [R, 2] int32, of the prompt and of the sample of that prompt
    done: jax.Array  # [R] bool, True for filler


class _State(NamedTuple):
    """A batch between two tokens."""

    step: jax.Array  # [] int32, tokens drawn
    tokens: jax.Array  # [R, N] int32
    logps: jax.Array  # [R, N] float32
    lengths: jax.Array  # [R] int32
    done: jax.Array  # [R] bool
    seen: jax.Array  # [R, V] bool, the tokens of the text so far; [R, 0] without a repetition penalty
    cache: object


_OF_MEMBERS = _State(None, 0, 0, 0, 0, 0, 0)  # all draw the same number of tokens


class _Task(NamedTuple):
    """What the programs are compiled for."""

    model: LanguageModel
    parts: Parts
    new_tokens: int
    rows: NamedSharding | None
    members: bool  # weights, seeds and states of several models have a leading axis; the rows are the same for all

    def vmapped(self, function: Callable[..., _State]) -> Callable[..., _State]:
        """(weights, head, draw, state or nothing) -> state, of all members where there are some."""
        if not self.members:
            return function

        def of_all(weights, head, draw: _Draw, *state: _State) -> _State:
            axes = (0, 0, _Draw(None, None, 0), *(_OF_MEMBERS for _ in state))
            return jax.vmap(function, in_axes=axes, out_axes=_OF_MEMBERS)(weights, head, draw, *state)

        return of_all


class _Draw(NamedTuple):
    """The rest of what decides the draws."""

    numbers: dict[str, np.float32]
    stop: np.ndarray  # [stop tokens] int32
    seed: np.ndarray  # [] uint32, of members [K]


def sample(
    model: LanguageModel, params: Params, prompts: Sequence[np.ndarray], *, n: int = 1, **options
) -> list[list[Completion]]:
    """n samples of every prompt.

    Args:
      model, params, prompts, options: as `stream` takes them.
      n: samples a prompt.

    Returns:
      For each prompt its n samples.

    Example:
      >>> from prefalign_jax.models.decoder import DecoderConfig, make_decoder
      >>> model = make_decoder(DecoderConfig(32, 8, 16, 1, 1, 1, 8))
      >>> params, prompts = model.init(jax.random.key(0)), [np.array([1, 2]), np.array([3])]
      >>> found = sample(model, params, prompts, n=3, seed=0, max_new_tokens=4, stop_tokens=[0])
      >>> len(found), len(found[0]), found[0][0].tokens.size <= 4
      (2, 3, True)
    """
    completions = {(i, j): one for i, j, one in stream(model, params, prompts, n=n, **options)}
    return [[completions[i, j] for j in range(n)] for i in range(len(prompts))]


def sample_members(
    model: LanguageModel, params: Params, prompts: Sequence[np.ndarray], *, seeds: Sequence[int], n: int = 1, **options
) -> list[list[list[Completion]]]:
    """n samples of every prompt from each of K models at once: to rounding, what `sample` gives of each.

    Args:
      model, prompts, n, options: as `sample` takes them.
      params: of the models, with a leading axis [K].
      seeds: K of them.

    Returns:
      For each model, for each prompt its n samples.
    """
    completions = {(k, i, j): one for k, i, j, one in _stream(model, params, prompts, seed=seeds, n=n, **options)}
    return [[[completions[k, i, j] for j in range(n)] for i in range(len(prompts))] for k in range(len(seeds))]


def stream(
    model: LanguageModel, params: Params, prompts: Sequence[np.ndarray], **options
) -> Iterator[tuple[int, int, Completion]]:
    """Draws n samples of every prompt and gives them batch by batch, those of short prompts first.

    Token t of sample j of prompt i is drawn with noise of (seed, i, j, t) alone: what else is in its batch changes it
    only by rounding. Rows are dealt over the data-parallel devices of the mesh that the parameters lie on.

    The weights are held once more while it runs, layer by layer and in the type of the computation.

    Args:
      model: pure functions of params.
      params: nested dict.
      prompts: token ids, none of them empty.
      seed: of the draws.
      max_new_tokens: at most so many after each prompt.
      stop_tokens: ids that end a text, such as all that generation_config.json calls eos_token_id; may be empty.
      n: samples a prompt.
      sampling: how a token is drawn.
      stop_strings: a text ends with the token that completes one of them.
      decode: tokens -> text, for the stop strings.
      batch_size: rows computed together, rounded up to a multiple of the data-parallel devices.
      numbers: i of each prompt where it is not its place in `prompts`, as in a part of a longer list.

    Yields:
      (place of the prompt, number of the sample, `Completion`).

    Raises:
      UserError: the model is a reward model, an option is out of range, or prompt and response may be longer than the
        model was made for.
    """
    return (of_one for _, *of_one in _stream(model, params, prompts, **options))


def _stream(
    model: LanguageModel,
    params: Params,
    prompts: Sequence[np.ndarray],
    *,
    seed: int | Sequence[int],
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    n: int = 1,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop_strings: Sequence[str] = (),
    decode: Callable[[np.ndarray], str] | None = None,
    batch_size: int = 64,
    numbers: Sequence[int] | None = None,
) -> Iterator[tuple[int, int, int, Completion]]:
    """`stream`, and before the place of the prompt the number of the model: K of them where there are K seeds."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    members = np.ndim(seed) > 0
    _check(model, params, lengths, members, n=n, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if stop_strings and decode is None:
        raise UserError("stop_strings need a tokenizer's `decode`")
    if not len(prompts):
        return
    mesh = mesh_of(params)
    groups = groups_of(mesh) if mesh else 1
    size = -(-min(batch_size, len(prompts) * n) // groups) * groups
    task = _Task(model, sampling.parts, max_new_tokens, NamedSharding(mesh, P(ROWS)) if mesh else None, members)
    draw = _Draw(sampling.numbers, np.array(stop_tokens, np.int32), np.asarray(seed, np.uint32))
    numbers = range(len(prompts)) if numbers is None else numbers
    weights, head = _prepare(model, params, members)
    every = SEGMENT if stop_strings else max_new_tokens
    places = [(i, j) for i in np.argsort(lengths, kind="stable").tolist() for j in range(n)]
    for first in range(0, len(places), size):
        batch = places[first : first + size]
        rows = _lay_out([(prompts[i], numbers[i], j) for i, j in batch], size, max_new_tokens)
        if task.rows is not None:
            rows = jax.device_put(rows, task.rows)
        state = _begin(task, weights, head, rows, draw)
        cuts: dict[tuple[int, int], int] = {}
        for until in range(every, max_new_tokens + every, every):
            state = _continue(task, weights, head, rows, draw, state, min(until, max_new_tokens))
            arrays = fetch((state.tokens, state.logps, state.lengths, state.done))
            tokens, logps, ends, done = arrays if members else (x[None] for x in arrays)
            texts = [(k, row) for k in range(len(tokens)) for row in range(len(batch))]
            for at in texts if stop_strings else ():
                if at not in cuts and (cut := _first_stop(tokens[at][: ends[at]], stop_strings, decode)) is not None:
                    cuts[at] = cut
            done = done.copy()
            for at in cuts:
                done[at] = True
            if done.all():
                break
            state = state._replace(done=jax.device_put(done.reshape(state.done.shape), state.done.sharding))
        for at in texts:
            k, row = at
            end = cuts.get(at, ends[at])
            ended = "string" if at in cuts else "token" if tokens[at][end - 1] in draw.stop else "length"
            yield k, *batch[row], Completion(tokens[at][:end].copy(), logps[at][:end].copy(), ended)


def _check(
    model: LanguageModel, params: Params, lengths: np.ndarray, members: bool, *, max_new_tokens: int, **positive: int
) -> None:
    """That the model generates, and that prompts of these lengths and what is drawn after them fit it."""
    if jax.eval_shape(jax.vmap(model.head) if members else model.head, params).shape[-2] == 1:
        raise UserError("a reward model predicts no tokens; generate with a language model")
    for name, value in {"max_new_tokens": max_new_tokens, **positive}.items():
        if value < 1:
            raise UserError(f"{name}={value} is out of range; write at least 1")
    if not lengths.all():
        raise UserError(f"prompt {int(lengths.argmin())} is empty; the first token is predicted from its last")
    most = getattr(model.config, "max_position", None)
    if most is not None and lengths.max(initial=0) + max_new_tokens > most:
        room = most - lengths.max()
        raise UserError(
            f"prompts of {lengths.max()} tokens and {max_new_tokens} new ones exceed the model's {most} positions; "
            + (f"write max_new_tokens={room} or less" if room > 0 else "leave out longer prompts")
        )


def uncached(model: LanguageModel) -> Cached:
    """For a model that has only `hidden`: the cache is the tokens, and every new one a pass over all of them."""

    def extend(params, tokens, at, start, limit, cache):
        cache = jax.lax.dynamic_update_slice(cache, tokens, (0, at))
        slots = jnp.arange(cache.shape[1])[None, :]
        real = (slots >= start[:, None]) & (slots < at + tokens.shape[1])
        positions = jnp.where(real, slots - start[:, None], 0)
        hidden = model.hidden(params, cache, positions, real.astype(jnp.int32), jnp.zeros_like(cache))
        return jax.lax.dynamic_slice_in_dim(hidden, at, tokens.shape[1], axis=1), cache

    return Cached(
        prepare=lambda params: (params, model.head(params)),
        init=lambda rows, length: jnp.zeros((rows, length), jnp.int32),
        extend=extend,
    )


@functools.partial(jax.jit, static_argnames=("model", "members"))
def _prepare(model: LanguageModel, params: Params, members: bool = False):
    prepare = (model.cached or uncached(model)).prepare
    return (jax.vmap(prepare) if members else prepare)(params)


@functools.partial(jax.jit, static_argnames="task")
def _begin(task: _Task, weights, head, rows: _Rows, draw: _Draw) -> _State:
    """The prompts, and the first token after each."""

    def begin(weights, head, draw: _Draw) -> _State:
        cache, last = _read(task, weights, rows)
        count, width = rows.prompt.shape
        seen = jnp.zeros((count, head.shape[0] if task.parts.repetition_penalty else 0), bool)
        if task.parts.repetition_penalty:
            real = jnp.arange(width)[None, :] >= rows.start[:, None]
            seen = seen.at[jnp.arange(count)[:, None], rows.prompt].max(real)
        blank = jnp.zeros((count, task.new_tokens))
        lengths = jnp.zeros(count, jnp.int32)
        state = _State(jnp.int32(0), blank.astype(jnp.int32), blank, lengths, rows.done, seen, cache)
        return _draw(task, head, rows, draw, state, last)

    return task.vmapped(begin)(weights, head, draw)


def _read(task: _Task, weights, rows: _Rows) -> tuple[object, jax.Array]:
    """(the cache with the prompts in it, the hidden states [R, D] of their last tokens)."""
    count, width = rows.prompt.shape
    cached = task.model.cached or uncached(task.model)

    def extend(cache, at_and_tokens):
        at, tokens = at_and_tokens
        hidden, cache = cached.extend(weights, tokens, at, rows.start, rows.limit, cache)
        return cache, hidden[:, -1]

    cache = cached.init(count, width + task.new_tokens)
    if task.rows is not None:
        cache = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, _by_rows(task.rows, x.ndim)), cache)
    if width <= CHUNK or task.model.cached is None:
        return extend(cache, (jnp.int32(0), rows.prompt))
    chunks = rows.prompt.reshape(count, -1, CHUNK).swapaxes(0, 1)
    cache, hidden = jax.lax.scan(extend, cache, (CHUNK * jnp.arange(len(chunks)), chunks))
    return cache, hidden[-1]


@functools.partial(jax.jit, static_argnames="task", donate_argnames="state")
def _continue(task: _Task, weights, head, rows: _Rows, draw: _Draw, state: _State, until) -> _State:
    """Token after token until so many are drawn or all rows are done."""
    cached = task.model.cached or uncached(task.model)

    def one(weights, head, draw: _Draw, state: _State) -> _State:
        token = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        at = rows.prompt.shape[1] + state.step - 1
        hidden, cache = cached.extend(weights, token, at, rows.start, rows.limit, state.cache)
        return _draw(task, head, rows, draw, state._replace(cache=cache), hidden[:, -1])

    step = functools.partial(task.vmapped(one), weights, head, draw)
    return jax.lax.while_loop(lambda state: (state.step < until) & ~state.done.all(), step, state)


def _draw(task: _Task, head, rows: _Rows, draw: _Draw, state: _State, hidden: jax.Array) -> _State:
    """The next token of each row, from the hidden states [R, D] of the last ones."""
    softcap, step = task.model.softcap, state.step
    logits = jnp.einsum("rd,vd->rv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    adjusted = adjust(logits, state.seen, task.parts, draw.numbers)
    if task.parts.greedy:
        token = adjusted.argmax(-1)
    else:
        key = jax.random.key(draw.seed)

        def draw_one(number, logits):
            own = functools.reduce(jax.random.fold_in, (number[0], number[1], step), key)
            return jax.random.categorical(own, logits)

        token = jax.vmap(draw_one)(rows.number, adjusted)
    token = jnp.where(state.done, 0, token.astype(jnp.int32))
    logp = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    tokens, logps = (
        jax.lax.dynamic_update_slice(old, new[:, None], (0, step))
        for old, new in ((state.tokens, token), (state.logps, logp))
    )
    seen = state.seen
    if task.parts.repetition_penalty:
        seen = seen.at[jnp.arange(token.size), token].set(True)
    lengths = jnp.where(state.done, state.lengths, step + 1)
    done = state.done | (token[:, None] == draw.stop[None, :]).any(-1)
    return _State(step + 1, tokens, logps, lengths, done, seen, state.cache)


def _lay_out(texts: Sequence[tuple[np.ndarray, int, int]], size: int, new_tokens: int) -> _Rows:
    """(prompt, its number, the sample's number) of each row -> the rows, filled up to `size`."""
    longest = max(len(prompt) for prompt, _, _ in texts)
    # Few widths, so that few programs are compiled.
    width = -(-longest // CHUNK) * CHUNK if longest > CHUNK else max(16, 1 << (longest - 1).bit_length())
    rows = _Rows(
        np.zeros((size, width), np.int32),
        np.full(size, width - 1, np.int32),
        np.full(size, 1 + new_tokens, np.int32),
        np.zeros((size, 2), np.int32),
        np.arange(size) >= len(texts),
    )
    for row, (prompt, number, sample) in enumerate(texts):
        rows.prompt[row, width - len(prompt) :] = prompt
        rows.start[row], rows.limit[row] = width - len(prompt), len(prompt) + new_tokens
        rows.number[row] = number, sample
    return rows


def _first_stop(tokens: np.ndarray, strings: Sequence[str], decode: Callable[[np.ndarray], str]) -> int | None:
    """How many tokens it takes until the text holds one of the strings."""

    def stopped(count: int) -> bool:
        text = decode(tokens[:count])
        return any(string in text for string in strings)

    return next(filter(stopped, range(1, len(tokens) + 1))) if stopped(len(tokens)) else None


def _by_rows(rows: NamedSharding, axes: int) -> NamedSharding:
    return NamedSharding(rows.mesh, P(ROWS, *[P.UNCONSTRAINED] * (axes - 1)))
