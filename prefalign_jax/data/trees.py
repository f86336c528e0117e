"""What of pairs is laid down in rows: trees of a prompt and its responses, each stored and computed once.

    pairs    (p, a, b)  (p, a, c)  (q, d, e)
    trees    p: a b c   q: d e

A pair by itself is a tree with two branches. Pairs that share a prompt may share a tree, and read the sums of the
responses that they compare wherever those lie; a group is a tree whose branches are its K responses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prefalign_jax.data.pairs import Pairs, as_pairs
from prefalign_jax.types import AFTER_CHOSEN, PROMPT, SIDES, Pair


class Layout(NamedTuple):
    """What of a pair is laid out, and how.

    Attributes:
      tree: share the prompt between the branches; False gives each side its own copy, the ordinary layout.
      rejected: lay out the rejected response.
      prompt: train on the prompt's tokens after its first as well.
      after: predict the last token of each response once more, from itself.
      rewards: predict nothing, but read the hidden state of each response's last token.
      weighted: say of each trained token by how much it counts.
      group: lay out all responses of a group, not the first two.
      most: responses to one prompt at most.
    """

    tree: bool = True
    rejected: bool = True
    prompt: bool = False
    after: bool = False
    rewards: bool = False
    weighted: bool = False
    group: bool = False
    most: int = 2

    @property
    def sides(self) -> int:
        """How many responses of a pair are laid out, where all are there."""
        return self.most if self.group else 1 + self.rejected


class Lengths(NamedTuple):
    """Tokens of N pairs, or trees, by part, known without laying anything out.

    Attributes:
      prompt: [N].
      responses: [N, sides], targets of each side; 0 for one that is not there.
      counted: [N, sides], those of them whose weight is not 0.
      inputs: [N, sides], tokens of each side that rows hold.
      pieces: [N, pieces], tokens of each piece.
      trained: [N, pieces], trained tokens of each piece.
    """

    prompt: np.ndarray
    responses: np.ndarray
    counted: np.ndarray
    inputs: np.ndarray
    pieces: np.ndarray
    trained: np.ndarray

    def of(self, index: Sequence[int] | np.ndarray) -> Lengths:
        """Those of the pairs with these numbers."""
        index = np.asarray(index, np.int64)
        return Lengths(*(part[index] for part in self))


def lengths_of(pairs: Sequence[Pair], layout: Layout) -> Lengths:
    """Measures pairs under a layout."""
    pairs, sides = as_pairs(pairs), slice(1, 1 + layout.sides)
    tokens = pairs.length.astype(np.int64)
    counted = pairs.sums(lambda weights: weights != 0)[:, sides].astype(np.int64)
    return _lengths(tokens[:, 0], tokens[:, sides], counted, layout)


def _lengths(prompt: np.ndarray, responses: np.ndarray, counted: np.ndarray, layout: Layout) -> Lengths:
    last = np.minimum(responses, 1)
    inputs = responses if layout.after or layout.rewards else responses - last
    trained = last.copy() if layout.rewards else counted + last * layout.after
    of_prompt = (prompt - 1) * layout.prompt
    if layout.tree:
        pieces, trained = (prompt + inputs.sum(1))[:, None], (trained.sum(1) + of_prompt)[:, None]
    else:
        pieces = np.where(last > 0, prompt[:, None] + inputs, 0)
        trained[:, 0] += of_prompt  # only one copy of the prompt is trained on
    return Lengths(prompt, responses, counted, inputs, pieces, trained)


class Sharing(NamedTuple):
    """Which pairs have the same prompt, and which of their responses are the same, weights of tokens included.

    Attributes:
      prompt: [N] int64, a number for each prompt.
      responses: [N, sides] int64, a number for each prompt with a response; -1 for one that is not there.
    """

    prompt: np.ndarray
    responses: np.ndarray

    def of(self, index: Sequence[int] | np.ndarray) -> Sharing:
        """That of the pairs with these numbers."""
        return Sharing(*(part[np.asarray(index, np.int64)] for part in self))


def sharing_of(pairs: Pairs, layout: Layout) -> Sharing:
    """Compares prompts and responses token by token."""
    prompt, responses = prompts_of(pairs), np.full((len(pairs), layout.sides), -1, np.int64)
    there = pairs.length[:, 1 : 1 + layout.sides] > 0
    responses[there] = np.arange(there.sum())  # all different so far
    names: dict[tuple[int, bytes], int] = {}
    for pair in _several(prompt):
        for side in np.flatnonzero(there[pair]).tolist():
            name = int(prompt[pair]), _content(pairs, pair, 1 + side)
            responses[pair, side] = names.setdefault(name, int(responses[pair, side]))
    return Sharing(prompt, responses)


def prompts_of(pairs: Pairs) -> np.ndarray:
    """[P] int64, for each pair the first one with the same prompt, token by token."""
    prompt, names = np.arange(len(pairs)), {}
    for pair in _several(pairs.prompt_key):  # what reads as another prompt has other tokens
        prompt[pair] = names.setdefault(_content(pairs, pair, 0), pair)
    return prompt


def _several(keys: np.ndarray) -> list[int]:
    """The places of those that are there several times."""
    _, number, times = np.unique(keys, return_inverse=True, return_counts=True)
    return np.flatnonzero(times[number] > 1).tolist()


def _content(pairs: Pairs, pair: int, part: int) -> bytes:
    """A digest of the tokens of a part of a pair, and of their weights."""
    buffer, start = pairs.buffer[pair, part], pairs.start[pair, part]
    here, weights = slice(start, start + pairs.length[pair, part]), pairs.token_weights[buffer]
    digest = hashlib.blake2b(pairs.buffers[buffer][here].tobytes(), digest_size=16)
    if weights is not None and np.any(weights[here] != 1):
        digest.update(weights[here].tobytes())
    return digest.digest()


class Trees(NamedTuple):
    """What is laid down of B pairs: N prompts, each with all its responses.

    Attributes:
      start: [N, 1 + K] int64, where in the tokens of the batch each prompt and response begins; None without tokens.
      lengths: of them, K sides.
      ids: [N, 2K + 1] int64, which slot the tokens of each response belong to, then those of the prompt, then what
        follows each response.
      slots: [B, SIDES] int32, the slots that each pair reads, where pairs share them.
      tree: [B], the tree of each pair.
    """

    start: np.ndarray | None
    lengths: Lengths
    ids: np.ndarray
    slots: np.ndarray | None
    tree: np.ndarray


def plain(start: np.ndarray, lengths: Lengths, layout: Layout) -> Trees:
    """Each pair by itself; `start` as in `pairs.Tokens`."""
    codes = 2 * max(2, layout.sides) + 1
    numbers = np.arange(len(lengths.prompt))
    start = start[:, : 1 + lengths.responses.shape[1]]
    return Trees(start, lengths, numbers[:, None] * codes + np.arange(codes), None, numbers)


def shared(
    start: np.ndarray | None,
    lengths: Lengths,
    sharing: Sharing,
    layout: Layout,
    batch_size: int = 0,
    row_length: int | None = None,
) -> Trees:
    """Pairs with the same prompt in one tree, as long as it fits in a row.

    A sum belongs to the slot of the pair that has its tokens first, and the others read it there.

    Args:
      start: of a micro-batch's pairs, as in `pairs.Tokens`; None for lengths alone.
      lengths, sharing: of them.
      layout: as they are laid out.
      batch_size: B.
      row_length: tokens in a row, None for any number.
    """
    count, sides = lengths.responses.shape
    slots = np.arange(SIDES * max(batch_size, count), dtype=np.int32).reshape(-1, SIDES)
    firsts: list[int] = []  # of each tree its first pair
    trees: list[list[tuple[int, int]]] = []  # and the (pair, side) that have its responses first
    sizes: list[int] = []
    latest: dict[int, int] = {}  # of each prompt its last tree
    tree_of: list[int] = []
    known: dict[tuple[int, int], tuple[int, int]] = {}
    prompts, inputs = lengths.prompt.tolist(), lengths.inputs.tolist()
    for pair, (prompt, responses) in enumerate(zip(sharing.prompt.tolist(), sharing.responses.tolist(), strict=True)):
        tree = latest.get(prompt, -1)
        if tree >= 0 and row_length is not None:
            more = {r: size for r, size in zip(responses, inputs[pair], strict=True) if (tree, r) not in known}
            tree = tree if sizes[tree] + sum(more.values()) <= row_length else -1
        if tree < 0:
            tree = latest[prompt] = len(trees)
            firsts.append(pair)
            trees.append([])
            sizes.append(prompts[pair])
        tree_of.append(tree)
        for side, response in enumerate(responses):
            if response < 0:
                continue
            if (tree, response) not in known:
                known[tree, response] = pair, side
                trees[tree].append((pair, side))
                sizes[tree] += inputs[pair][side]
            owner, its = known[tree, response]
            slots[pair, side] = SIDES * owner + its
            slots[pair, AFTER_CHOSEN + side] = SIDES * owner + AFTER_CHOSEN + its
        slots[pair, PROMPT] = SIDES * firsts[tree] + PROMPT

    most = max(2 if sides == 2 else 1, *map(len, trees))
    at = np.full((len(trees), most), -1)
    for tree, some in enumerate(trees):
        at[tree, : len(some)] = [pair * sides + side for pair, side in some]
    there, owners, its = at >= 0, *np.divmod(at, sides)
    parts = (np.where(there, x.reshape(-1)[at], 0) for x in (lengths.responses, lengths.counted))
    merged = _lengths(lengths.prompt[firsts], *parts, layout)
    filler, codes = SIDES * len(slots), max(2, most)
    ids = np.full((len(trees), 2 * codes + 1), filler)
    ids[:, :most] = np.where(there, SIDES * owners + its, filler)
    ids[:, codes] = SIDES * np.array(firsts) + PROMPT
    ids[:, codes + 1 : codes + 1 + most] = np.where(there, ids[:, :most] + AFTER_CHOSEN, filler)
    if start is not None:
        start = np.concatenate([start[firsts, :1], np.where(there, start[owners, 1 + its], 0)], axis=1)
    return Trees(start, merged, ids, slots, np.array(tree_of))


def most_responses(sharing: Sharing) -> int:
    """How many different responses a prompt has at most."""
    there = sharing.responses >= 0
    prompts = np.broadcast_to(sharing.prompt[:, None], there.shape)[there]
    _, first = np.unique(sharing.responses[there], return_index=True)
    return int(np.unique(prompts[first], return_counts=True)[1].max())


def over_prompts(pairs: Pairs) -> Pairs:
    """The pairs with weights that make a mean over them one over prompts: those of a prompt have 1 in all.

    Example:
      >>> p, q, a, b = np.arange(1, 5)[:, None]
      >>> over_prompts(as_pairs([Pair(p, a, b), Pair(p, b, a), Pair(q, a, b)])).weight
      array([0.5, 0.5, 1. ])
    """
    _, prompt = np.unique(prompts_of(pairs), return_inverse=True)
    return pairs.reweighted(pairs.weight / np.bincount(prompt, pairs.weight)[prompt])
