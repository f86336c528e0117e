"""From files to batches: read, tokenize, hold out, and draw packed batches in an order fixed by (seed, step)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import grain
import jax
import numpy as np

from prefalign_jax.data.packing import (
    TILES_MULTIPLE,
    Shape,
    choose_shapes,
    coarser,
    deal,
    deal_whole,
    mean_tokens,
    pack,
    round_up,
    shape_of,
    smallest,
)
from prefalign_jax.data.pairs import Pairs, as_pairs
from prefalign_jax.data.trees import (
    Layout,
    Lengths,
    Sharing,
    lengths_of,
    most_responses,
    shared,
    sharing_of,
)
from prefalign_jax.types import TILE, Pair, PairLogps, PreferenceBatch, UserError

STRETCH = 4096  # pairs dealt to batches at once
TRIALS = 48  # batches that shapes are chosen by
WORTH = 1 / 3  # of the tokens of a batch: pairs share them by default if that saves so much, since fewer prompts meet


class PairSet(NamedTuple):
    """Tokenized pairs with everything that turns some of them into a batch.

    Attributes:
      pairs: the pairs; a batch's `index` counts in here.
      batch_size: pairs in a batch.
      micro_steps: M.
      groups: G, a row each unless `row_length` is set.
      layout: what is laid out of a pair.
      lengths: of the pairs, under the layout.
      shapes: the few shapes a batch may have.
      row_length: of packed rows; None gives each group one row, as long as it takes.
      reference: cached reference log-probabilities, each [len(pairs)], or None.
      own: the groups whose rows are laid out, those of this process's devices; None for all.
      sharing: which pairs have a prompt and responses in common, stored and computed once in a batch; None for none.
    """

    pairs: Sequence[Pair]
    batch_size: int
    micro_steps: int
    groups: int
    layout: Layout
    lengths: Lengths
    shapes: tuple[Shape, ...]
    row_length: int | None = None
    reference: PairLogps | None = None
    own: Sequence[int] | None = None
    sharing: Sharing | None = None

    def laid_out(self, index: np.ndarray) -> Lengths:
        """Of what a micro-batch of pairs with these numbers holds."""
        lengths = self.lengths.of(index)
        if self.sharing is None:
            return lengths
        return shared(None, lengths, self.sharing.of(index), self.layout, row_length=self.row_length).lengths


def make_pair_set(
    pairs: Sequence[Pair],
    batch_size: int,
    *,
    micro_steps: int = 1,
    groups: int = 1,
    layout: Layout = Layout(),
    row_length: int | None = None,
    attends: str | None = None,
    own: Sequence[int] | None = None,
    context: int = 1,
    group: bool | None = False,
    coarse: bool = False,
) -> PairSet:
    """Chooses the shapes for these pairs, by batches as `train_batches` balances them and by others.

    Args:
      pairs, batch_size, micro_steps, groups, layout, own: see `PairSet`.
      row_length: see `PairSet`; a model that attends by no field of the batch is better off with rows of a few hundred
        tokens, as its attention costs L^2.
      attends: of the model that is to take the batches; for 'sequences' they have those.
      context: devices that the tokens of a row are dealt over.
      group: whether pairs with the same prompt come together, and a batch holds the prompt and each of their responses
        once; None does it where that saves at least WORTH of the tokens. Groups of responses never share.
      coarse: whether shapes are taken in large steps (`packing.coarser`), for sets that are made again and again.

    Raises:
      UserError: there are no pairs, one is longer than `row_length`, or `context` does not divide what it has to.
    """
    if TILES_MULTIPLE % context:
        raise UserError(f"mesh.context={context} must divide {TILES_MULTIPLE}")
    if row_length is not None and round_up(row_length, TILE) % (TILE * context):
        raise UserError(
            f"data.row_length={row_length} must be a multiple of {TILE * context} for mesh.context={context}"
        )
    if not pairs:
        raise UserError("no pairs to batch: every record was dropped")
    pairs = as_pairs(pairs)
    if layout.group and (unscored := np.isnan(pairs.scores[:, 0])).any():
        where = pairs[int(np.argmax(unscored))].where
        raise UserError(f"{where}: a group of responses has no scores; tokenize them for a loss of groups")
    layout = layout._replace(weighted=pairs.weighted, most=pairs.scores.shape[1])
    lengths, share = lengths_of(pairs, layout), batch_size // micro_steps
    sharing = None if layout.group or group is False else sharing_of(pairs, layout)
    if sharing is not None and group is None:
        one_by_one, together = _tokens_shared(sharing, lengths, layout, batch_size)
        sharing = sharing if together <= (1 - WORTH) * one_by_one else None
    if sharing is not None:
        layout = layout._replace(most=max(2, most_responses(sharing)))
    rng = np.random.default_rng(0)
    some = _shuffled(sharing, len(pairs), rng)[:STRETCH]
    if sharing is None:
        other = [rng.choice(len(pairs), share, replace=len(pairs) < share) for _ in range(TRIALS)]
    else:  # as they come, shuffled or not
        streams = _shuffled(sharing, len(pairs), rng), np.arange(len(pairs))
        starts = rng.integers(len(pairs), size=TRIALS)
        other = [np.take(x, np.arange(start, start + share), mode="wrap") for x in streams for start in starts]
    batches = balanced(lengths.of(some), batch_size, micro_steps, sharing and sharing.of(some), layout)
    dealt = [some[part] for batch in batches for part in np.split(batch, micro_steps)][:TRIALS]
    trials = [dealt, other] if dealt else [other]
    packing = dict(groups=groups, row_length=row_length, sequences=attends == "sequences")
    shapes = choose_shapes(lengths, share, trials, layout=layout, sharing=sharing, **packing)
    shapes = coarser(shapes) if coarse else shapes
    shapes = tuple(shape._replace(length=round_up(shape.length, TILE * context)) for shape in shapes)
    return PairSet(
        pairs, batch_size, micro_steps, groups, layout, lengths, shapes, row_length, own=own, sharing=sharing
    )


def _shuffled(sharing: Sharing | None, count: int, rng: np.random.Generator) -> np.ndarray:
    """The numbers of all pairs at random, those with the same prompt one after the other."""
    if sharing is None:
        return rng.permutation(count)
    _, prompt = np.unique(sharing.prompt, return_inverse=True)
    place = rng.permutation(prompt.max() + 1)
    return np.argsort(place[prompt], kind="stable")


def tokens_shared(data: PairSet) -> tuple[int, int]:
    """(tokens of some batches if each pair were by itself, tokens that these hold)."""
    return _tokens_shared(data.sharing, data.lengths, data.layout, data.batch_size)


def _tokens_shared(sharing: Sharing, lengths: Lengths, layout: Layout, size: int) -> tuple[int, int]:
    """The same; it depends on no device and no micro-step."""
    some = _shuffled(sharing, len(sharing.prompt), np.random.default_rng(0))[:STRETCH]
    few = [some[batch] for batch in balanced(lengths.of(some), size, 1, sharing.of(some), layout)] or [some]
    together = (shared(None, lengths.of(x), sharing.of(x), layout).lengths.pieces.sum() for x in few)
    return sum(int(lengths.of(batch).pieces.sum()) for batch in few), sum(map(int, together))


def balanced(
    lengths: Lengths,
    size: int,
    micro_steps: int = 1,
    sharing: Sharing | None = None,
    layout: Layout = Layout(),
) -> list[np.ndarray]:
    """Deals pairs to batches of exactly `size` that hold about as many tokens each; what is left over is left out.

    Which pairs share a batch does not depend on `micro_steps`: a batch is dealt first, and then to its micro-steps.

    Args:
      lengths: of the pairs.
      size: pairs in a batch.
      micro_steps: parts of a batch, which hold about as many tokens each too.
      sharing: of the pairs; those with the same prompt come together then, as far as batches have room.
      layout: of the pairs.

    Returns:
      [size] numbers of pairs for each batch, one micro-step after the other.
    """
    count = len(lengths.prompt) // size

    def dealt(some: np.ndarray, bins: int) -> list[np.ndarray]:
        if sharing is None:
            return [some[part] for part in deal(lengths.pieces[some].sum(1).tolist(), bins, len(some) // bins)]
        trees = shared(None, lengths.of(some), sharing.of(some), layout)
        order = np.argsort(trees.tree, kind="stable")
        units = np.split(some[order], np.cumsum(np.bincount(trees.tree))[:-1])
        loads = trees.lengths.pieces.sum(1).tolist()
        return [np.array(part) for part in deal_whole([x.tolist() for x in units], loads, bins, len(some) // bins)]

    if not count:
        return []
    batches = dealt(np.arange(count * size), count)
    return batches if micro_steps == 1 else [np.concatenate(dealt(batch, micro_steps)) for batch in batches]


def batch_of(data: PairSet, index: np.ndarray, means: np.ndarray | None = None) -> PreferenceBatch:
    """Packs the pairs with these numbers, cached reference log-probabilities included.

    Args:
      data: the pairs.
      index: at most `batch_size` numbers.
      means: as in `packing.lay_out`; None computes it from the batch.

    Returns:
      A batch of NumPy arrays with M as leading axis.
    """
    batch = pack(
        as_pairs(data.pairs).select(np.asarray(index)),
        index,
        data.batch_size,
        data.shapes,
        micro_steps=data.micro_steps,
        groups=data.groups,
        layout=data.layout,
        row_length=data.row_length,
        sequences=data.shapes[-1].sequences > 0,
        means=means,
        lengths=data.lengths.of(index),
        own=data.own,
        sharing=data.sharing and data.sharing.of(index),
    )
    if data.reference is None:
        return batch
    # Filler (index -1) reads some pair's value and has weight 0.
    return batch._replace(reference=jax.tree.map(lambda x: x[batch.index], data.reference))


def alike(sets: Sequence[PairSet]) -> list[PairSet]:
    """The sets with the same shapes, so that batches of all can be one; see `batches_of`.

    Raises:
      UserError: the batches of one have a part that those of another lack.
    """
    kinds = {(one.layout, one.sharing is None, one.row_length, one.reference is None) for one in sets}
    if len(kinds) > 1:
        raise UserError("these data sets make batches of several kinds, which cannot be computed together")
    count = min(len(one.shapes) for one in sets)
    shapes = [
        Shape(*np.max(some, axis=0).tolist()) for some in zip(*(one.shapes[-count:] for one in sets), strict=True)
    ]
    return [one._replace(shapes=tuple(shapes)) for one in sets]


def batches_of(sets: Sequence[PairSet], numbers: Sequence[np.ndarray]) -> PreferenceBatch:
    """A batch of each of K sets, in the smallest shape that holds each.

    Args:
      sets: from `alike`.
      numbers: of the pairs of each batch.

    Returns:
      A batch of NumPy arrays with K, then M as leading axes.
    """
    batches = [batch_of(data, index) for data, index in zip(sets, numbers, strict=True)]
    shapes = list(map(shape_of, batches))
    shape = smallest(sets[0].shapes, Shape(*np.max(shapes, axis=0).tolist()))
    for k, data in enumerate(sets):
        if shapes[k] != shape:
            batches[k] = batch_of(data._replace(shapes=(shape,)), numbers[k])
    return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)


def mismatched(pairs: Sequence[Pair], max_length: int) -> Pairs:
    """Gives every example the completion of another prompt as its `rejected`, for KTO's estimate of the KL divergence.

    The k-th of the examples in a row that share a prompt gets that of the k-th of the next such run, and the end is
    followed by the start: so the two completions of a preference pair get one of either label. It is cut on the right
    where prompt and completion are longer than `max_length`.

    Args:
      pairs: unpaired examples; what they have as `rejected` is replaced.
      max_length: most tokens of prompt + completion.

    Returns:
      The examples in the given order.

    Raises:
      UserError: all prompts are the same, or one leaves no room for a token.

    Source: Ethayarajh et al., arXiv 2402.01306, section 4.1.
    """
    pairs = as_pairs(pairs)
    count = len(pairs)
    if not count:
        return pairs
    runs = _runs_of_a_prompt(pairs)
    if len(runs) == 1:
        raise UserError(
            f"all {count} examples have the same prompt, so none has a mismatched completion; "
            "set loss.name to apo_zero_unpaired or bco_unpaired, which need none"
        )
    others = np.zeros(count, np.int64)
    for run, following in zip(runs, [*runs[1:], runs[0]], strict=True):
        others[run] = following[np.arange(len(run)) % len(following)]
    room = max_length - pairs.length[:, 0]
    if room.min() < 1:
        i = int(np.argmax(room < 1))
        raise UserError(
            f"example {i}: its prompt of {pairs.length[i, 0]} tokens leaves no room for a mismatched completion; "
            f"set max_length above that (it is {max_length})"
        )
    return pairs.with_rejected(others, room)


def _runs_of_a_prompt(pairs: Pairs) -> list[np.ndarray]:
    """The numbers of the examples that share a prompt with the one before; the end is followed by the start."""
    before, starts = pairs[len(pairs) - 1].prompt, []
    for i, pair in enumerate(pairs):
        if not np.array_equal(pair.prompt, before):
            starts.append(i)
        before = pair.prompt
    if not starts:
        return [np.arange(len(pairs))]
    numbers = np.roll(np.arange(len(pairs)), -starts[0])
    return np.split(numbers, np.array(starts[1:], np.int64) - starts[0])


def train_batches(
    data: PairSet, *, seed: int, shuffle: bool, start: int, stop: int, balance: bool | None = None
) -> Iterator[PreferenceBatch]:
    """Batches start, start + 1, ..., stop - 1 of an endless stream of epochs, each shuffled anew.

    Batch n is a function of (pairs, seed, n), so a run resumes by its step alone. Batches span epochs: each holds
    exactly `batch_size` pairs.

    A stretch of the shuffled stream is dealt to its batches so that all hold about as many tokens (`balanced`): rows
    are then full, and one compiled program fits. Every pair still comes once an epoch, with others at random but for
    that a long one meets shorter ones.

    Args:
      data: the pairs.
      seed: of the order.
      shuffle: False keeps the order of the file in every epoch.
      start, stop: steps.
      balance: deal; False takes pairs as they come, None does as `shuffle`.

    Returns:
      An iterator that packs ahead in a thread.
    """
    numbers_of = train_order(data, seed=seed, shuffle=shuffle, stop=stop, balance=balance)
    return packed_ahead(lambda step: batch_of(data, numbers_of(step)), start, stop)


def train_order(
    data: PairSet, *, seed: int, shuffle: bool, stop: int, balance: bool | None = None
) -> Callable[[int], np.ndarray]:
    """Which pairs batch n has: step -> [batch_size] numbers of pairs; the arguments are those of `train_batches`."""
    pairs, size = len(data.pairs), data.batch_size
    order = grain.MapDataset.source(range(pairs)).seed(seed)
    if shuffle:
        order = order.shuffle()
    order = order.repeat(1 + stop * size // pairs)  # endless would overflow Grain's lengths

    @functools.lru_cache(maxsize=2)
    def of_epoch(epoch: int) -> np.ndarray:
        """The order of prompts whose pairs come together."""
        return _shuffled(data.sharing, pairs, np.random.default_rng((seed, epoch)))

    def drawn(first: int, last: int) -> np.ndarray:
        """The numbers of the pairs first ... last - 1 of the stream."""
        if data.sharing is None or not shuffle:
            return np.array([order[slot] for slot in range(first, last)])
        return np.array([of_epoch(slot // pairs)[slot % pairs] for slot in range(first, last)])

    @functools.lru_cache(maxsize=2)
    def stretch(begin: int, end: int) -> list[np.ndarray]:
        """Batches begin ... end - 1, dealt."""
        numbers = drawn(begin * size, end * size)
        sharing = data.sharing and data.sharing.of(numbers)
        batches = balanced(data.lengths.of(numbers), size, data.micro_steps, sharing, data.layout)
        # The heaviest pairs went to the first ones: those come in any order.
        return [numbers[batches[i]] for i in np.random.default_rng((seed, begin)).permutation(len(batches))]

    def numbers_of(step: int) -> np.ndarray:
        epoch = step * size // pairs
        first, after = -(-epoch * pairs // size), (epoch + 1) * pairs // size  # the batches that lie in one epoch
        if not (shuffle if balance is None else balance) or not first <= step < after:
            return drawn(step * size, (step + 1) * size)
        most = max(1, STRETCH // size)
        begin = first + (step - first) // most * most
        return stretch(begin, min(begin + most, after))[step - begin]

    return numbers_of


T = TypeVar("T")


def packed_ahead(make: Callable[[int], T], start: int, stop: int) -> Iterator[T]:
    """make(start), ..., make(stop - 1), made ahead in a thread."""
    batches = grain.MapDataset.source(range(stop)).map(make)
    # Slicing before iteration is what makes resuming cost nothing.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(batches.slice(slice(start, stop)).to_iter_dataset(options))


def eval_batches(data: PairSet) -> Iterator[PreferenceBatch]:
    """All pairs once, in order; the last batch is filled up with pairs of weight 0.

    Token means are over the whole set, so that averaging over batches gives the set's own mean.
    """
    means = mean_tokens(data.pairs)
    for start in range(0, len(data.pairs), data.batch_size):
        yield batch_of(data, np.arange(start, min(start + data.batch_size, len(data.pairs))), means)
