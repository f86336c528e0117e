"""Tokenized pairs by column: a few flat arrays, in memory or mapped from a file, that read as a sequence of `Pair`s.

A million pairs as objects are four million Python objects; as columns they are their tokens and about 150 bytes a pair,
and the tokens may stay on disk. Choosing some of the pairs, or giving each the completion of another, copies no token.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from prefalign_jax.types import Pair, Place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_BLOCK = 1024  # pairs made into objects at once


class Origin(NamedTuple):
    """What is known of a pair beside its tokens."""

    source: int = 0  # its number in a mixture
    held_out: bool = False
    prompt: int = 0  # 64 bits: prompts that are the same but for case and spaces have the same


class Texts(NamedTuple):
    """A pair as text; `rejected` is '' where there is none."""

    prompt: str
    chosen: str
    rejected: str


class Tokens(NamedTuple):
    """What some pairs hold, one part after the other.

    Attributes:
      ids: [tokens] int32.
      weights: [tokens] float32, by how much each counts; None where each counts once.
      start: [N, 1 + K] int64, where the prompt and each response begin.
    """

    ids: np.ndarray
    weights: np.ndarray | None
    start: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pairs(Sequence[Pair]):
    """P pairs, or groups of at most K responses.

    Attributes:
      buffers: flat arrays of token ids, int32.
      token_weights: for each buffer the weights of its tokens, float32, see `types.Pair`; None where each counts once.
      buffer: [P, 1 + K], for the prompt and each response which of `buffers` holds it; the chosen response is the
        first, the rejected one the second.
      start, length: [P, 1 + K], and where in there; of a response that is not there the length is 0.
      scores: [P, K] float64, of groups; NaN where there is none.
      weight, margin: [P] float64.
      label: [P] bool.
      place, row: [P], the `where` of each: its file as a number of `places`, and its row.
      places: names of files.
      source, held_out: [P], see `Origin`.
      prompt_key: [P] uint64, see `Origin`.
      digest: [P, 2] uint64, see `digest_of_pair`.
      dropped: how many rows of the data gave no pair, by reason, where somebody counted them.
      needs: keys of losses.NEEDS, what the loss that they were made for reads; None where it is not known.
    """

    buffers: tuple[np.ndarray, ...]
    buffer: np.ndarray
    start: np.ndarray
    length: np.ndarray
    scores: np.ndarray
    weight: np.ndarray
    margin: np.ndarray
    label: np.ndarray
    place: np.ndarray
    row: np.ndarray
    places: tuple[str, ...]
    source: np.ndarray
    held_out: np.ndarray
    prompt_key: np.ndarray
    digest: np.ndarray
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    needs: Set[str] | None = None
    token_weights: tuple[np.ndarray | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.token_weights:
            object.__setattr__(self, "token_weights", (None,) * len(self.buffers))

    def __len__(self) -> int:
        return len(self.weight)

    def __repr__(self) -> str:
        return f"Pairs({len(self)} pairs, {self.length.sum()} tokens)"

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.some(np.array([index]))[0]

    def __iter__(self) -> Iterator[Pair]:
        for start in range(0, len(self), _BLOCK):
            yield from self.some(np.arange(start, min(start + _BLOCK, len(self))))

    def some(self, index: np.ndarray) -> list[Pair]:
        """Those with these numbers, as objects; quicker than one by one."""
        buffer, start, end = self.buffer[index], self.start[index], self.start[index] + self.length[index]
        about = self.weight[index], self.margin[index], self.label[index], self.place[index], self.row[index]
        counts = (self.length[index, 1:] > 0).sum(1)
        out = []
        for b, i, j, count, scores, weight, margin, label, place, row in zip(
            *(column.tolist() for column in (buffer, start, end, counts, self.scores[index], *about)), strict=True
        ):
            prompt, chosen, rejected, *others = (self.buffers[b[n]][i[n] : j[n]] for n in range(max(count, 2) + 1))
            whole = [self.token_weights[b[n]] for n in range(1, max(count, 2) + 1)]
            weights = [x if x is None else x[i[n] : j[n]] for n, x in enumerate(whole, 1)]
            out.append(
                Pair(
                    prompt,
                    chosen,
                    rejected,
                    weight,
                    margin,
                    label,
                    Place(self.places[place], row),
                    others=tuple(others),
                    scores=() if math.isnan(scores[0]) else tuple(scores[:count]),
                    token_weights=() if all(x is None for x in weights) else tuple(weights),
                )
            )
        return out

    def tokens(self) -> Tokens:
        """Copies the tokens of all; quicker than by objects, for the few pairs of a batch."""
        end = self.start + self.length
        parts = list(zip(*(x.reshape(-1).tolist() for x in (self.buffer, self.start, end)), strict=True))
        start = (self.length.cumsum() - self.length.reshape(-1)).reshape(self.length.shape)
        weights = None
        if any(x is not None for x in self.token_weights):
            each = [(self.token_weights[b], i, j) for b, i, j in parts]
            weights = np.concatenate([np.ones(j - i, np.float32) if x is None else x[i:j] for x, i, j in each])
        return Tokens(np.concatenate([self.buffers[b][i:j] for b, i, j in parts]), weights, start)

    def texts(self, tokenizer: Tokenizer) -> list[Texts]:
        """What each pair says, decoded with special tokens: what a model is shown, to the letter.

        Args:
          tokenizer: the Hugging Face tokenizer that made the pairs.
        """
        decode = functools.partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [Texts(*(decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected))) for pair in self]

    @property
    def weighted(self) -> bool:
        """Whether some token counts other than once or not at all: then batches have weights of tokens."""
        return any(x is not None and np.any((x != 0) & (x != 1)) for x in self.token_weights)

    def sums(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """[P, 1 + K] sums over each part of a function of the weights of its tokens, such as how many are trained."""
        out = self.length.astype(np.float64)
        for number, weights in enumerate(self.token_weights):
            if weights is not None:
                total = np.concatenate([[0.0], np.cumsum(function(weights), dtype=np.float64)])
                here = self.buffer == number
                start = self.start[here]
                out[here] = total[start + self.length[here]] - total[start]
        return out

    def select(self, index: np.ndarray) -> Pairs:
        """Those with these numbers, in this order."""
        return dataclasses.replace(self, **{name: getattr(self, name)[index] for name in COLUMNS})

    def reweighted(self, weight: np.ndarray) -> Pairs:
        """The same with other weights, [P]."""
        return self._changed(weight=weight)

    def with_token_weights(self, weights: Sequence[np.ndarray | None]) -> Pairs:
        """The same with other weights of their tokens, for each of `buffers`."""
        return self._changed(token_weights=tuple(weights))

    def with_rejected(self, other: np.ndarray, most: np.ndarray) -> Pairs:
        """Each with the chosen response of another as its rejected one.

        Args:
          other: [P], whose.
          most: [P], tokens of it that are kept.
        """
        columns = {name: getattr(self, name).copy() for name in ("buffer", "start", "length")}
        for column in columns.values():
            column[:, 2] = column[other, 1]
        columns["length"][:, 2] = np.minimum(columns["length"][:, 2], most)
        return self._changed(**columns)

    def _changed(self, **fields: Any) -> Pairs:
        """With other values of fields that are part of the digest."""
        changed = dataclasses.replace(self, **fields)
        return dataclasses.replace(changed, digest=_digests(changed))


COLUMNS: tuple[str, ...] = ("buffer", "start", "length", "scores", "weight", "margin", "label", "place", "row")
COLUMNS += ("source", "held_out", "prompt_key", "digest")


def as_pairs(pairs: Sequence[Pair]) -> Pairs:
    """The same by column; what is already, as it is."""
    return pairs if isinstance(pairs, Pairs) else from_list(pairs)


def from_list(pairs: Sequence[Pair], origins: Iterable[Origin] | None = None) -> Pairs:
    """Copies pairs into columns.

    Args:
      pairs: in order.
      origins: of each; None leaves them 0.
    """
    count, most = len(pairs), max((len(pair.others) for pair in pairs), default=0) + 2
    prompts = [np.asarray(pair.prompt, np.int32) for pair in pairs]
    nothing = np.zeros(0, np.int32)
    padded = [[*pair.responses, *[nothing] * (most - 2 - len(pair.others))] for pair in pairs]
    responses = [np.asarray(ids, np.int32) for one in padded for ids in one]
    weights = [pair.weights(n) if n < len(pair.others) + 2 else None for pair in pairs for n in range(most)]
    scores = np.full((count, most), math.nan)
    for number, pair in enumerate(pairs):
        scores[number, : len(pair.scores)] = pair.scores
    of_prompts = np.array([len(ids) for ids in prompts], np.int32)
    of_responses = np.array([len(ids) for ids in responses], np.int32)
    starts = [np.cumsum(x, dtype=np.int64) - x for x in (of_prompts, of_responses)]
    names: dict[str, int] = {}
    origins = list(origins) if origins is not None else [Origin()] * count
    return Pairs(
        buffers=tuple(np.concatenate([nothing, *part]) for part in (prompts, responses)),
        buffer=np.broadcast_to(np.array([0] + [1] * most, np.int32), (count, 1 + most)),
        start=np.concatenate([starts[0][:, None], starts[1].reshape(count, most)], axis=1),
        length=np.concatenate([of_prompts[:, None], of_responses.reshape(count, most)], axis=1),
        scores=scores,
        weight=np.array([pair.weight for pair in pairs], np.float64),
        margin=np.array([pair.margin for pair in pairs], np.float64),
        label=np.array([pair.label for pair in pairs], bool),
        place=np.array([names.setdefault(pair.where.file, len(names)) for pair in pairs], np.int32),
        row=np.array([pair.where.row for pair in pairs], np.int64),
        places=tuple(names),
        source=np.array([origin.source for origin in origins], np.int32),
        held_out=np.array([origin.held_out for origin in origins], bool),
        prompt_key=np.array([origin.prompt for origin in origins], np.uint64),
        digest=_digests(pairs),
        token_weights=(None, _joined(weights, responses)),
    )


def _joined(weights: Sequence[np.ndarray | None], tokens: Sequence[np.ndarray]) -> np.ndarray | None:
    """The weights of the tokens of all pairs one after the other; None where each counts once."""
    if all(one is None or np.all(one == 1) for one in weights):
        return None
    each = (np.ones(len(ids)) if one is None else one for one, ids in zip(weights, tokens, strict=True))
    return np.concatenate([np.zeros(0), *each]).astype(np.float32)


def concatenate(parts: Sequence[Pairs]) -> Pairs:
    """One after the other."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return from_list([])
    most = max(part.scores.shape[1] for part in parts)
    columns = {name: [getattr(part, name) for part in parts] for name in COLUMNS}
    for name, filler in (("buffer", 0), ("start", 0), ("length", 0), ("scores", math.nan)):
        columns[name] = [_widened(x, most + (name != "scores"), filler) for x in columns[name]]
    names = list(dict.fromkeys(name for part in parts for name in part.places))
    number = {name: i for i, name in enumerate(names)}
    before = 0
    for i, part in enumerate(parts):
        columns["buffer"][i] = columns["buffer"][i] + np.int32(before)
        before += len(part.buffers)
        columns["place"][i] = np.array([number[name] for name in part.places], np.int32)[columns["place"][i]]
    joined = {name: np.concatenate(column) for name, column in columns.items()}
    flat = {name: tuple(x for part in parts for x in getattr(part, name)) for name in ("buffers", "token_weights")}
    fields: dict[str, Any] = flat | joined
    return Pairs(places=tuple(names), **fields)


def _widened(column: np.ndarray, width: int, filler: float) -> np.ndarray:
    """With so many entries a row."""
    return np.pad(column, ((0, 0), (0, width - column.shape[1])), constant_values=filler)


def digest_of(pairs: Sequence[Pair]) -> str:
    """SHA-256 of the digests of all pairs in order: 64 hexadecimal digits."""
    return hashlib.sha256(np.ascontiguousarray(as_pairs(pairs).digest)).hexdigest()


def digest_of_pair(pair: Pair) -> bytes:
    """128 bits of every token with its role and weight, of weight, margin, label and scores."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in (pair.prompt, *pair.responses):
        digest.update(len(ids).to_bytes(4, "little"))
        digest.update(np.asarray(ids, np.int32).tobytes())
    digest.update(np.float32([pair.weight, pair.margin, pair.label]).tobytes())
    for number, weights in enumerate(pair.token_weights):
        if weights is not None and np.any(weights != 1):
            digest.update(number.to_bytes(4, "little") + np.asarray(weights, np.float32).tobytes())
    digest.update(np.float32(pair.scores).tobytes())
    return digest.digest()


def _digests(pairs: Sequence[Pair]) -> np.ndarray:
    return np.frombuffer(b"".join(map(digest_of_pair, pairs)), np.uint64).reshape(-1, 2)
