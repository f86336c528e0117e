"""Records that travel between the parts, and the shape letters every docstring uses.

B  pairs in a batch             R  packed rows            L  tokens in a row
G  groups of rows, one for each data-parallel shard (R is a multiple of G)
T  trained tokens in a group    N  any number of tokens
D  width of the hidden states   V  vocabulary             M  micro-steps
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = Mapping[str, Any]  # nested dict of arrays

# The side of a trained token: to which log-probability of its pair it belongs.
CHOSEN, REJECTED, PROMPT = 0, 1, 2


class UserError(ValueError):
    """A mistake of the user's: one line that says what is wrong, where, and what to write instead.

    The command-line scripts print it without a traceback and exit with status 2.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """One tokenized preference pair; the roles are known here and never re-derived.

    Attributes:
      prompt: [N] int32, never empty: the first token of a response is predicted from the last of the prompt.
      chosen: [N] int32, the preferred response, its end-of-sequence token included.
      rejected: [N] int32, the other response; empty for supervised data.
      weight: how much the pair counts in every mean.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    weight: float = 1.0


class PreferenceBatch(NamedTuple):
    """Exactly B pairs in packed rows; token i sees j <= i of its segment whose branch is 0 or its own.

    The targets are no shift of the tokens, because the first token of BOTH responses is predicted from the last
    prompt token; each trained token therefore names its source position, its target and its place in the batch.
    """

    tokens: Array  # [R, L] int32
    segments: Array  # [R, L] int32; 0 is padding
    branches: Array  # [R, L] int32; 0 shared by both sides, 1 chosen, 2 rejected
    positions: Array  # [R, L] int32, counted from the start of the prompt on each branch
    source: Array  # [G, T] int32, position in the R/G * L tokens of the group whose hidden state predicts the target
    target: Array  # [G, T] int32
    slot: Array  # [G, T] int32, 3 * pair + side; 3 * B marks filler
    weight: Array  # [B] float32; 0 marks a filler pair
    index: Array  # [B] int32, the pair's number in its data set; -1 marks filler
    mean_tokens: Array  # [2] float32, weighted mean number of trained (prompt, chosen) tokens a pair, global batch
    reference: PairLogps | None = None  # cached reference log-probabilities


class PairLogps(NamedTuple):
    """Log-probabilities of B pairs under one model, with the token counts a loss may divide by.

    `mean_tokens` is over the whole global batch, whatever share of it is at hand: dividing by it turns a sum over a
    pair's tokens into its part of a mean over the batch's tokens.
    """

    chosen: Array  # [B] float32, summed over the response
    rejected: Array  # [B] float32
    chosen_tokens: Array  # [B] float32
    rejected_tokens: Array  # [B] float32
    prompt: Array | None = None  # [B] float32, summed over the prompt's tokens after the first
    prompt_tokens: Array | None = None  # [B] float32
    mean_tokens: Array | None = None  # [2] float32: (prompt, chosen)


class TrainState(NamedTuple):
    """Everything an update reads and writes. `reference` is the frozen copy, None where none is kept on the device."""

    step: Array  # [] int32
    params: Params
    opt_state: Any
    reference: Params | None = None


class LanguageModel(NamedTuple):
    """What the rest of the package knows of a model: pure functions of its parameters.

    Attributes:
      config: the model's own configuration record.
      init: key -> params.
      hidden: (params, tokens [R, L], positions [R, L], segments [R, L], branches [R, L]) -> hidden [R, L, D] after the
        final norm.
      head: params -> [V, D] output embedding.
    """

    config: Any
    init: Callable[[jax.Array], Params]
    hidden: Callable[..., jax.Array]
    head: Callable[[Params], jax.Array]
