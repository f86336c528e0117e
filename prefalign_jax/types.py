"""Records that travel between the parts, and the shape letters every docstring uses.

B  pairs in a batch             R  packed rows            L  tokens in a row
P  pairs in a data set
G  groups of rows, one for each data-parallel shard (R is a multiple of G)
T  trained tokens in a group    N  any number of tokens
A  tiles of attention in a group                              K  responses to a prompt
D  width of the hidden states   V  vocabulary             M  micro-steps
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import numpy as np

if TYPE_CHECKING:
    import jax

Array = Union["jax.Array", np.ndarray]  # jax is not imported: what only says what is wrong must be quick
Params = Mapping[str, Any]  # nested dict of arrays

# The side of a trained token: to which log-probability of its pair it belongs.
CHOSEN, REJECTED, PROMPT, AFTER_CHOSEN, AFTER_REJECTED = range(5)
SIDES = 5
TILE = 64  # tokens along each side of a tile of attention; rows are multiples of it


class UserError(ValueError):
    """A mistake of the user's: one line that says what is wrong, where, and what to write instead.

    The command-line scripts print it without a traceback and exit with `status`.
    """

    status = 2


class WriteError(UserError):
    """A file could not be written, by no mistake in what was asked for: one line with its path and what to do."""

    status = 1


class Place(NamedTuple):
    """Where a row stands, for messages: 'FILE, row N'.

    Attributes:
      file: a file, or a data set of the hub; '' for what was read from nowhere.
      row: its number there, counted from 1; 0 names no row.

    Example:
      >>> print(Place("pairs.jsonl", 7))
      pairs.jsonl, row 7
    """

    file: str = ""
    row: int = 0

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}" if self.row else self.file


def one_line(error: BaseException) -> str:
    """The first line of another library's error, for a UserError; the next too where the first announces it.

    Example:
      >>> one_line(OSError("the file is broken:\\n  row 3\\n  row 4")), one_line(KeyboardInterrupt())
      ('the file is broken: row 3', 'KeyboardInterrupt')
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].rstrip().endswith(":") else 1])


def printable(text: str) -> str:
    """A text in one line, without what would steer a terminal: control characters and the like become '?'.

    Example:
      >>> printable("naïve \\x1b[2J and\\nmore")
      'naïve ?[2J and more'
    """
    return "".join(x if x.isprintable() else " " if x.isspace() else "?" for x in text)


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """One tokenized preference pair; the roles are known here and never re-derived.

    An unpaired example is kept in the same record: `chosen` is its completion, whatever its label, and `rejected` the
    completion of another prompt where the loss wants one.

    Attributes:
      prompt: [N] int32, never empty: the first token of a response is predicted from the last of the prompt.
      chosen: [N] int32, the preferred response, its end-of-sequence token included.
      rejected: [N] int32, the other response; empty for supervised data.
      weight: how much the pair counts in every mean.
      margin: by how much the chosen response is better; NaN where the data do not say.
      label: of an unpaired example, whether its completion is desirable.
      where: the row that it was made of.
      others: of a group the further responses, [N] int32 each.
      scores: of a group one number for each of `responses`, more is better; () for a pair.
      token_weights: for each of `responses` [N] float32, by how much each of its tokens counts; 0 for one that is read
        and not trained, such as what a tool says. None where each counts once, () where that goes for all.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    weight: float = 1.0
    margin: float = math.nan
    label: bool = True
    where: Place = Place()
    others: tuple[np.ndarray, ...] = ()
    scores: tuple[float, ...] = ()
    token_weights: tuple[np.ndarray | None, ...] = ()

    @property
    def responses(self) -> tuple[np.ndarray, ...]:
        """All of them, the chosen one first; the rejected one may be empty."""
        return self.chosen, self.rejected, *self.others

    def weights(self, number: int) -> np.ndarray | None:
        """Of the tokens of one of `responses`."""
        return self.token_weights[number] if self.token_weights else None


class Sequences(NamedTuple):
    """The texts of a batch one by one, a prompt with one response each, as kernels for padded sequences take them.

    Attributes:
      index: [G, N, S] int32, the tokens of each in order, as positions in the group's R/G * L; -1 is padding.
      place: [G, R/G * L, K] int32, of each token where `index` has it, counted through N * S: in the text of each of
        the K responses that its prompt has at most; -1 for none.
    """

    index: Array
    place: Array


class PreferenceBatch(NamedTuple):
    """Exactly B pairs, or groups of at most K responses, in packed rows.

    Token i sees j <= i of its segment whose branch is 0 or its own.

    The targets are no shift of the tokens, because the first token of BOTH responses is predicted from the last
    prompt token; each trained token therefore names its source position, its target and its place in the batch.
    """

    tokens: Array  # [R, L] int32
    segments: Array  # [R, L] int32; 0 is padding
    branches: Array  # [R, L] int32; 0 the prompt, shared by all, then each response's own
    positions: Array  # [R, L] int32, counted from the start of the prompt on each branch
    source: Array  # [G, T] int32, position in the R/G * L tokens of the group whose hidden state predicts the target
    target: Array  # [G, T] int32
    slot: Array  # [G, T] int32, SIDES * pair + side, of groups (2 K + 1) * group + side; one past the last is filler
    tiles: Array  # [G, A, 2] int32, (query block, key block) of TILE tokens of the group that are not empty
    weight: Array  # [B] float32; 0 marks a filler pair
    margin: Array  # [B] float32, by how much the chosen response is better; 0 where the data do not say
    label: Array  # [B] float32, 1 for a desirable completion, 0 for an undesirable one
    index: Array  # [B] int32, the pair's number in its data set; -1 marks filler
    mean_tokens: Array  # [2] float32, weighted mean number of trained (prompt, chosen) tokens a pair, global batch
    reference: PairLogps | None = None  # cached reference log-probabilities
    sequences: Sequences | None = None  # where the model attends by them
    token_weight: Array | None = None  # [G, T] float32, by how much each trained token counts; None: each counts once
    slots: Array | None = None  # [B, SIDES] int32, the slots that each pair reads; None: its own
    scores: Array | None = None  # [B, K] float32, of groups; NaN for a response that is not there


class Responses(NamedTuple):
    """The K responses of each of B groups; a group with fewer has filler, of which `present` is 0."""

    logps: Array  # [B, K] float32, summed over the response
    tokens: Array  # [B, K] float32
    scores: Array  # [B, K] float32, more is better; 0 for filler
    present: Array  # [B, K] float32, 1 or 0


class Sides(NamedTuple):
    """One number for each response of B pairs."""

    chosen: Array  # [B] float32
    rejected: Array  # [B] float32


class PairLogps(NamedTuple):
    """Log-probabilities of B pairs under one model, and whatever else a loss declares that it needs.

    `mean_tokens` is over the whole global batch, whatever share of it is at hand: dividing by it turns a sum over a
    pair's tokens into its part of a mean over the batch's tokens. The fields after it are None unless the loss needs
    them; see losses.NEEDS. For unpaired data `chosen` is the completion and `rejected` one of another prompt; for a
    reward model both are rewards.
    """

    chosen: Array  # [B] float32, summed over the response
    rejected: Array  # [B] float32
    chosen_tokens: Array  # [B] float32
    rejected_tokens: Array  # [B] float32
    prompt: Array | None = None  # [B] float32, summed over the prompt's tokens after the first
    prompt_tokens: Array | None = None  # [B] float32
    mean_tokens: Array | None = None  # [2] float32: (prompt, chosen)
    weight: Array | None = None  # [B] float32, 0 for filler
    margin: Array | None = None  # [B] float32, the data's score gap
    label: Array | None = None  # [B] float32, 1 desirable, 0 undesirable
    shared: Sides | None = None  # log-probabilities summed over as many first tokens as the shorter response has
    sampled: Sides | None = None  # the same, summed over as many tokens drawn at random
    token_kl: Sides | None = None  # sum over the response's tokens of KL(reference || policy), in nats
    sum_squares: Sides | None = None  # sum over the response's tokens of log sum_v p_v^2; no gradient
    after: Sides | None = None  # log-probability of one more end-of-sequence token after the response
    text: Array | None = None  # [B] float32, prompt and chosen without their end-of-sequence tokens
    text_tokens: Array | None = None  # [B] float32
    responses: Responses | None = None  # all of a group; `chosen` and `rejected` are its first two
    running: Mapping[str, Array] | None = None  # what the loss carries from step to step, [] float32 each
    router: Array | None = None  # [B] float32, a mixture of experts' auxiliary loss over the pairs at hand, repeated


class TrainState(NamedTuple):
    """Everything an update reads and writes.

    `reference` is the frozen or moving copy, None where none is kept on the device; `running` is what the loss carries
    from step to step, None for most; `ema` is the moving average of the parameters, None where none is asked for.
    """

    step: Array  # [] int32
    params: Params
    opt_state: Any
    reference: Params | None = None
    running: Mapping[str, Array] | None = None
    ema: Params | None = None


class Cached(NamedTuple):
    """How a model continues texts without computing again what came before.

    The texts of R rows end at the same slot, so each begins at a slot of its own, and new tokens all go to one place.

    Attributes:
      prepare: params -> (weights, head [V, D]): what every token reads, in the type of the computation.
      init: (rows, length) -> cache, a tree of arrays whose first axis is rows, for texts in slots 0 to length - 1.
      extend: (weights, tokens [R, T], at [], start [R], limit [R], cache) -> (hidden [R, T, D] after the final norm,
        cache). The tokens lie in slots at ... at + T - 1. `start` is the first slot of a row's text: what lies before
        is padding, and its hidden states mean nothing. No text will have more than `limit` tokens.
    """

    prepare: Callable[[Params], tuple[Any, jax.Array]]
    init: Callable[[int, int], Any]
    extend: Callable[..., tuple[jax.Array, Any]]


class LanguageModel(NamedTuple):
    """What the rest of the package knows of a model: pure functions of its parameters.

    Attributes:
      config: the model's own configuration record: hashable, with a repr that says everything about it. If it has a
        `max_position`, generation keeps to it.
      init: key -> params.
      hidden: (params, tokens [R, L], positions [R, L], segments [R, L], branches [R, L]) -> hidden [R, L, D] after the
        final norm.
      head: params -> [V, D] output embedding; of a reward model [1, D].
      softcap: c; logits x become c tanh(x / c), None leaves them.
      join: of a model with adapters, (frozen base, adapters) -> what the other functions take. The parameters that are
        trained are the adapters then, and the reference is the base.
      rules: (regex over a parameter's path, PartitionSpec), first match wins; None takes sharding.RULES, the decoder's.
      routed: of a mixture of experts, as `hidden`, with the router's auxiliary loss [] beside it.
      drops: `hidden` and `routed` take `key=` in training passes and drop what is drawn from it. Without one, as in
        reference passes, evaluation and generation, nothing is dropped.
      attends: by what `hidden` and `routed` know who sees whom: 'tiles' or 'sequences', a field of the batch that they
        take under that name, or None for `segments` and `branches` alone.
      dropping: a `Dropout`, whose rates may be traced -> the same model with it; None where the rates are fixed.
      cached: for generation; without it every token is a pass over the whole text.
    """

    config: Any
    init: Callable[[jax.Array], Params]
    hidden: Callable[..., jax.Array]
    head: Callable[[Params], jax.Array]
    softcap: float | None = None
    routed: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    rules: tuple[tuple[str, Any], ...] | None = None
    join: Callable[[Params, Params], Params] | None = None
    drops: bool = False
    attends: str | None = None
    dropping: Callable[[Any], LanguageModel] | None = None
    cached: Cached | None = None
