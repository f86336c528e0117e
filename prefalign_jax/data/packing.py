"""Pairs -> packed tree rows: a pair's prompt is stored and computed once, both responses continue from it.

    tokens    p p p p c c r r r | q q c c c r | 0 0
    segment   1 1 1 1 1 1 1 1 1 | 2 2 2 2 2 2 | 0 0
    branch    0 0 0 0 1 1 2 2 2 | 0 0 1 1 1 2 | 0 0
    position  0 1 2 3 4 5 4 5 6 | 0 1 2 3 4 2 | 0 0

The last token of a response is a target but predicts nothing, so no row holds it: two tokens a pair less to compute.
(A reward model reads it, so its rows do.)

A prompt may have more responses than two: those of a group, or of several pairs that share the prompt (`shared`).
Each has a branch of its own, and each is stored and computed once, however many pairs read it.

A piece is what lies in one segment: a tree, or in the ordinary layout one of its sides. It is laid down as runs: the
prompt, then each response. All of a batch is written at once, run by run, by NumPy.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from prefalign_jax.data.pairs import Pairs, Tokens, as_pairs
from prefalign_jax.data.trees import Layout, Lengths, Sharing, Trees, lengths_of, plain, shared
from prefalign_jax.types import (
    SIDES,
    TILE,
    Pair,
    PreferenceBatch,
    Sequences,
    UserError,
)

TRAINED_MULTIPLE = 64
TILES_MULTIPLE = 8


class Shape(NamedTuple):
    """The fixed shape of a packed batch; a program is compiled for each."""

    rows: int  # in a group
    length: int  # tokens in a row
    trained: int  # trained tokens in a group
    tiles: int  # of attention in a group
    sequences: int = 0  # in a group, if they are asked for
    span: int = 0  # tokens in the longest of them


def deal(loads: Sequence[float], bins: int, capacity: int | None = None) -> list[list[int]]:
    """Deals things to bins so that these carry about the same: the heaviest first, each to the lightest with room.

    Args:
      loads: of the things.
      bins: how many.
      capacity: most things in a bin; None for any number.

    Returns:
      For each bin the numbers of its things; deterministic.

    Example:
      >>> deal([5, 4, 3, 2, 2], 2)
      [[0, 3, 4], [1, 2]]
      >>> deal([9, 1, 1, 1], 2, capacity=2)
      [[0, 3], [1, 2]]
    """
    dealt: list[list[int]] = [[] for _ in range(bins)]
    lightest = [(0.0, number) for number in range(bins)]
    for thing in np.argsort(-np.asarray(loads), kind="stable").tolist():
        load, number = heapq.heappop(lightest)
        dealt[number].append(thing)
        if capacity is None or len(dealt[number]) < capacity:
            heapq.heappush(lightest, (load + loads[thing], number))
    return dealt


def deal_whole(units: Sequence[Sequence[int]], loads: Sequence[float], bins: int, capacity: int) -> list[list[int]]:
    """As `deal`, things that belong together to one bin; where they fit in none, as many as fit in the emptiest.

    Args:
      units: for each the numbers of its things, `bins * capacity` in all.
      loads: of the units.
      bins, capacity: as there.

    Returns:
      For each bin the numbers of its things, `capacity` of them; deterministic.

    Example:
      >>> deal_whole([[0, 1], [2, 3], [4], [5, 6, 7]], [2, 2, 1, 3], 2, capacity=4)
      [[5, 6, 7, 4], [0, 1, 2, 3]]
    """
    dealt: list[list[int]] = [[] for _ in range(bins)]
    lightest = [(0.0, number) for number in range(bins)]
    rest = [
        (-len(unit), -load, number, list(unit)) for number, (unit, load) in enumerate(zip(units, loads, strict=True))
    ]
    heapq.heapify(rest)  # those of most things first, since they find room hardest
    while rest:
        count, load, number, unit = heapq.heappop(rest)
        passed = []
        while lightest and len(dealt[lightest[0][1]]) - count > capacity:
            passed.append(heapq.heappop(lightest))
        if lightest:
            carried, to = heapq.heappop(lightest)
            here, part = unit, -load
        else:
            carried, to = passed.pop(min(range(len(passed)), key=lambda i: len(dealt[passed[i][1]])))
            here, left = unit[: capacity - len(dealt[to])], unit[capacity - len(dealt[to]) :]
            part = -load * len(here) / len(unit)
            heapq.heappush(rest, (-len(left), load + part, number, left))
        dealt[to] += here
        for one in passed:
            heapq.heappush(lightest, one)
        if len(dealt[to]) < capacity:
            heapq.heappush(lightest, (carried + part, to))
    return dealt


def fill_rows(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Best-fit decreasing: which pieces share a row.

    Args:
      lengths: of the pieces, in tokens.
      length: of a row.

    Returns:
      For each row the numbers of its pieces; deterministic.

    Example:
      >>> fill_rows([5, 3, 4, 2], 7)
      [[0, 3], [2, 1]]
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = lengths[number]
        best = min((r for r in range(len(rows)) if free[r] >= size), key=lambda r: free[r], default=None)
        if best is None:
            best = len(rows)
            rows.append([])
            free.append(length)
        rows[best].append(number)
        free[best] -= size
    return rows


class Runs(NamedTuple):
    """The runs of N trees' pieces, [N, pieces, runs] each: of a piece its prompt and the sides that it holds.

    Attributes:
      length: in tokens.
      at: first token, in the group's rows one after the other.
      branch: 0 for a prompt, side + 1.
      position: of the first token.
    """

    length: np.ndarray
    at: np.ndarray
    branch: np.ndarray
    position: np.ndarray


def _runs(lengths: Lengths, at: np.ndarray) -> Runs:
    pairs, pieces = lengths.pieces.shape
    sides = lengths.inputs.shape[1]
    prompt = np.where(lengths.pieces > 0, lengths.prompt[:, None], 0)[:, :, None]
    length = np.concatenate([prompt, lengths.inputs.reshape(pairs, pieces, sides // pieces)], axis=2)
    branch = np.zeros(length.shape, np.int64)
    branch[:, :, 1:] = np.arange(1, sides + 1).reshape(pieces, -1)
    position = np.where(branch > 0, lengths.prompt[:, None, None], 0)
    return Runs(length, at.reshape(pairs, pieces, 1) + length.cumsum(axis=2) - length, branch, position)


class Arrangement(NamedTuple):
    """Where every piece of a micro-batch goes, and what that takes.

    Attributes:
      groups: for each group its rows, each a list of piece numbers, `pair * pieces + piece`.
      at: [N pieces], first token of each piece in its group's rows one after the other.
      group: [N pieces].
      segment: [N pieces], in the piece's row, from 1.
      tiles: for each group [tiles, 2], the (query block, key block) that hold something to attend to, in order; blocks
        of TILE tokens count through the group's rows.
      runs: of all pieces.
      shape: what the fullest group needs.
    """

    groups: list[list[list[int]]]
    at: np.ndarray
    group: np.ndarray
    segment: np.ndarray
    tiles: list[np.ndarray]
    runs: Runs
    shape: Shape


def arrange(lengths: Lengths, groups: int, row_length: int | None = None, sequences: bool = False) -> Arrangement:
    """Chooses group, row and place of every piece of a micro-batch.

    Args:
      lengths: of its trees.
      groups: G, one for each data-parallel shard.
      row_length: tokens in a row; None gives each group one row, as long as it takes.
      sequences: whether the batch is to have them.

    Returns:
      The plan, a function of its arguments alone.
    """
    sizes, trained = lengths.pieces.reshape(-1), lengths.trained.reshape(-1)
    if row_length is None:
        dealt = deal(sizes.tolist(), groups) if groups > 1 else [range(len(sizes))]
        dealt = [[sorted(group)] for group in dealt]
        row_length = max(int(sizes[row].sum()) for (row,) in dealt)
    else:
        rows = fill_rows(sizes.tolist(), row_length)
        loads = [int(trained[row].sum()) for row in rows]
        dealt = [[rows[r] for r in group] for group in deal(loads, groups, -(-len(rows) // groups))]
    length = round_up(row_length, TILE)
    at, group_of, segment = np.zeros((3, len(sizes)), np.int64)
    for number, group in enumerate(dealt):
        for r, row in enumerate(group):
            at[row] = r * length + sizes[row].cumsum() - sizes[row]
            group_of[row], segment[row] = number, np.arange(1, len(row) + 1)
    rows = max(map(len, dealt))
    runs = _runs(lengths, at)
    tiles = _tiles(runs, group_of, groups, rows * length // TILE)
    most = int(np.bincount(group_of, trained, groups).max())
    shape = Shape(rows, length, most, max(map(len, tiles)))
    if sequences:
        owner = np.broadcast_to(group_of.reshape(len(lengths.pieces), -1), lengths.responses.shape)
        count = np.bincount(owner[lengths.responses > 0], minlength=groups).max()
        shape = shape._replace(sequences=int(count), span=round_up(_longest(lengths), TILE))
    return Arrangement(dealt, at, group_of, segment, tiles, runs, shape)


def _longest(lengths: Lengths) -> int:
    return int((lengths.prompt[:, None] + lengths.inputs).max())


def _tiles(runs: Runs, group: np.ndarray, groups: int, blocks: int) -> list[np.ndarray]:
    """The tiles of attention that are not empty, see `Arrangement`: a token sees its own run and its piece's prompt."""
    length, at = runs.length.reshape(-1), runs.at.reshape(-1)
    each = runs.length.shape[2]
    prompt_at, prompt_length = (x[:, :, 0].reshape(-1).repeat(each) for x in (runs.at, runs.length))
    first, last = at // TILE, (at + length - 1) // TILE
    count = np.where(length > 0, last - first + 1, 0)
    run, step = _spread(count)
    query = first[run] + step  # a block with tokens of this run
    # The blocks that they see: from the start of the run to their own, and those of the prompt.
    starts = np.concatenate([first[run], prompt_at[run] // TILE])
    ends = np.concatenate([query, np.minimum(query, (prompt_at + prompt_length - 1)[run] // TILE)])
    number, step = _spread(ends - starts + 1)
    row = group.repeat(each)[run] * blocks + query
    seen = np.zeros((groups, blocks, blocks), bool)
    seen.reshape(-1)[np.concatenate([row, row])[number] * blocks + starts[number] + step] = True
    return [np.stack(np.divmod(np.flatnonzero(one), blocks), axis=1) for one in seen]


def _spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of counts[i] copies of i: i, and which copy it is."""
    number = np.arange(len(counts)).repeat(counts)
    return number, np.arange(len(number)) - (counts.cumsum() - counts).repeat(counts)


def _along(counts: np.ndarray, counting: Sequence[np.ndarray], constant: Sequence[np.ndarray]) -> np.ndarray:
    """Values of counts[i] tokens of each run i, [values, tokens]: those that count on from its first, then the same."""
    counts = counts.reshape(-1)
    table = np.array([x.reshape(-1) for x in (*counting, *constant)])
    table[: len(counting)] -= counts.cumsum() - counts
    table = table.repeat(counts, axis=1)
    table[: len(counting)] += np.arange(table.shape[1])
    return table


def mean_tokens(pairs: Sequence[Pair]) -> np.ndarray:
    """[2] float32: weighted mean number of trained (prompt, chosen) tokens a pair, each by how much it counts."""
    if isinstance(pairs, Pairs):
        weight, counts = pairs.weight, pairs.sums(lambda weights: weights)[:, :2]
    else:
        weight = np.array([pair.weight for pair in pairs], np.float64)
        chosen = [len(one.chosen) if one.weights(0) is None else one.weights(0).sum() for one in pairs]
        counts = np.array([(len(pair.prompt), count) for pair, count in zip(pairs, chosen, strict=True)], np.float64)
    counts -= [1, 0]
    return (weight[:, None] * counts).sum(0).astype(np.float32) / np.float32(weight.sum())


def lay_out(
    plan: Arrangement,
    shape: Shape,
    trees: Trees,
    tokens: Tokens,
    pairs: Pairs,
    part: np.ndarray,
    index: np.ndarray,
    batch_size: int,
    means: np.ndarray,
    layout: Layout,
    own: Sequence[int] | None = None,
) -> PreferenceBatch:
    """Writes a plan, or the rows of some of its groups, into arrays of a fixed shape.

    Args:
      plan: from `arrange`.
      shape: at least what the plan needs.
      trees: what the plan is of.
      tokens: where they are.
      pairs: of the whole batch.
      part: the numbers of those that read it, at most `batch_size`; missing ones are filler of weight 0.
      index: each pair's number in its data set.
      batch_size: B.
      means: [2], see `mean_tokens`, over the global batch.
      layout: of the pairs.
      own: the groups to write, in order; None for all.

    Returns:
      A `PreferenceBatch` of NumPy arrays, whose rows are those of these groups; what is per pair is of all.
    """
    lengths = trees.lengths
    own = range(len(plan.groups)) if own is None else own
    groups = len(own)
    blocks = shape.rows * shape.length // TILE
    runs = plan.runs
    if shape.rows > 1 and shape.length != plan.shape.length:
        row, place = np.divmod(plan.at, plan.shape.length)
        runs = _runs(lengths, row * shape.length + place)
    place_of = np.full(len(plan.groups), -1)
    place_of[list(own)] = np.arange(groups)
    group = place_of[plan.group].reshape(lengths.pieces.shape)
    placed = group >= 0

    # Tokens: of each its place, and what is the same for a run or counts on from its first.
    rows = np.zeros((4, groups * shape.rows, shape.length), np.int32)
    length = np.where(placed[:, :, None], runs.length, 0)
    start = runs.at + group[:, :, None] * (shape.rows * shape.length)
    segment = plan.segment.repeat(runs.length.shape[2])
    begin = trees.start[:, :1].repeat(lengths.pieces.shape[1], axis=1)[:, :, None]
    begin = np.concatenate([begin, trees.start[:, 1:].reshape(runs.length[:, :, 1:].shape)], axis=2)
    counting, constant = [start, runs.position, begin], [segment, runs.branch]
    here, position, held, segment, branch = _along(length, counting, constant)
    for row, values in zip(rows.reshape(4, -1), (tokens.ids[held], segment, branch, position), strict=True):
        row[here] = values

    # Trained tokens.
    slots = SIDES if trees.slots is not None else trees.ids.shape[1]  # of a pair, or group
    count, first, target, codes = _targets(lengths, runs, layout, begin)
    offsets = trees.ids[np.arange(len(trees.ids))[:, None, None], codes]
    owner = group.reshape(-1).repeat(count.shape[2])
    count = np.where(owner >= 0, count.reshape(-1), 0)
    read, target, names = _along(count, [first, target], [offsets])
    weights = None
    if tokens.weights is not None and not layout.rewards:
        run = _spread(count)[0]
        follows = codes.reshape(-1)[run] > max(2, lengths.responses.shape[1])
        weights = np.where(follows, np.float32(1), tokens.weights[target])  # what is predicted after a response counts
        kept = weights != 0
        read, names, target, weights = (x[kept] for x in (read, names, target, weights))
        count = np.bincount(run[kept], minlength=len(count))
    filled = np.zeros(len(count), np.int64)
    for g in range(groups):
        here = owner == g
        filled[here] = count[here].cumsum() - count[here]
    (here,) = _along(count, [owner * shape.trained + filled], [])
    trained = np.zeros((3, groups, shape.trained), np.int32)
    trained[2] = slots * batch_size
    for row, values in zip(trained.reshape(3, -1), (read, tokens.ids[target], names), strict=True):
        row[here] = values
    token_weight = None
    if layout.weighted:
        token_weight = np.zeros((groups, shape.trained), np.float32)
        token_weight.reshape(-1)[here] = 1.0 if weights is None else weights

    # Attention. Blocks count through rows of another length than the plan's only if there is one row.
    tiles = np.full((groups, shape.tiles, 2), (blocks, 0), np.int32)
    for g, number in enumerate(own):
        tiles[g, : len(plan.tiles[number])] = plan.tiles[number]

    weight, margin, label = np.zeros((3, batch_size), np.float32)
    weight[: len(part)] = pairs.weight[part]
    margin[: len(part)] = np.where(np.isnan(pairs.margin[part]), 0, pairs.margin[part])
    label[: len(part)] = pairs.label[part]
    numbers = np.full(batch_size, -1, np.int32)
    numbers[: len(part)] = index[part]
    batch = PreferenceBatch(*rows, *trained, tiles, weight, margin, label, numbers, means)
    sequences = _sequences(runs, lengths, group, groups, shape, layout.most) if shape.sequences else None
    scores = None
    if layout.group:
        scores = np.full((batch_size, layout.most), np.nan, np.float32)
        scores[: len(part), : pairs.scores.shape[1]] = pairs.scores[part]
    return batch._replace(sequences=sequences, token_weight=token_weight, scores=scores, slots=trees.slots)


def _sequences(runs: Runs, lengths: Lengths, group: np.ndarray, groups: int, shape: Shape, most: int) -> Sequences:
    """The texts of a micro-batch: of each side its prompt's run and its own."""
    index = np.full((groups, shape.sequences, shape.span), -1, np.int32)
    place = np.full((groups, shape.rows * shape.length, most), -1, np.int32)
    pieces, sides = group.shape[1], group.shape[1] * (runs.length.shape[2] - 1)
    filled = np.zeros(groups, np.int64)
    for side in range(sides):
        piece, run = (0, side + 1) if pieces == 1 else (side, 1)
        owner = np.where(lengths.responses[:, side] > 0, group[:, piece], -1)
        number = np.zeros(len(owner), np.int64)
        for g in range(groups):
            in_group = owner == g
            number[in_group] = filled[g] + np.arange(in_group.sum())
            filled[g] += in_group.sum()
        begin = 0
        for part in (0, run):  # the prompt, then what follows it
            length = np.where(owner >= 0, runs.length[:, piece, part], 0)
            text, step = _spread(length)
            token, to = runs.at[text, piece, part] + step, begin + step if part == 0 else begin[text] + step
            index[owner[text], number[text], to] = token
            place[owner[text], token, side] = number[text] * shape.span + to
            begin = length
    return Sequences(index, place)


def _targets(
    lengths: Lengths, runs: Runs, layout: Layout, begin: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(count, first source, first target, code) of the runs of trained tokens, [N, pieces, runs] each.

    The codes count through a row of `Trees.ids`, the targets through `Tokens`, as `begin` of each of `runs` does.
    """
    pairs, pieces = lengths.pieces.shape
    sides = lengths.responses.shape[1]
    responses, codes = lengths.responses.reshape(pairs, pieces, sides // pieces), max(2, sides)
    ends = runs.at[:, :, 0] + runs.length[:, :, 0] - 1  # of the prompts
    parts = []
    if layout.prompt:
        counts = np.zeros((pairs, pieces), np.int64)
        counts[:, 0] = lengths.prompt - 1  # only one copy of the prompt is trained on
        parts.append((counts, runs.at[:, :, 0], begin[:, :, 0] + 1, codes))
    for side in range(responses.shape[2]):
        count, at, to = responses[:, :, side], runs.at[:, :, side + 1], begin[:, :, side + 1]
        name = runs.branch[:1, :, side + 1] - 1
        one = np.minimum(count, 1)
        if not layout.rewards:
            # The first token of each response is predicted from the last prompt token, the others from their
            # predecessor.
            parts += [(one, ends, to, name), (count - one, at, to + one, name)]
        if layout.after or layout.rewards:
            parts.append((one, at + count - 1, to + count - 1, name if layout.rewards else codes + 1 + name))
    out = np.empty((4, pairs, pieces, len(parts)), np.int64)
    for number, part in enumerate(parts):
        for column, values in zip(out, part, strict=True):
            column[:, :, number] = values
    return tuple(out)


def round_up(x: int, multiple: int) -> int:
    """The least multiple that is at least x."""
    return -(-x // multiple) * multiple


def shape_of(batch: PreferenceBatch) -> Shape:
    """The shape of a packed batch."""
    groups, trained = batch.source.shape[1:]
    texts = batch.sequences.index.shape[2:] if batch.sequences is not None else ()
    return Shape(batch.tokens.shape[1] // groups, batch.tokens.shape[2], trained, batch.tiles.shape[2], *texts)


def coarser(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """The shapes, each size up to the next quarter of a power of two: sets of like pairs then have the same ones.

    Example:
      >>> coarser([Shape(1, 704, 320, 72), Shape(1, 768, 320, 80)])
      (Shape(rows=1, length=768, trained=320, tiles=80, sequences=0, span=0),)
    """

    def up(size: int, least: int) -> int:
        return round_up(size, max(least, 2 ** (size.bit_length() - 3)))

    return tuple(
        dict.fromkeys(
            one._replace(
                length=up(one.length, TILE),
                trained=up(one.trained, TRAINED_MULTIPLE),
                tiles=up(one.tiles, TILES_MULTIPLE),
            )
            for one in shapes
        )
    )


def choose_shapes(
    lengths: Lengths,
    batch_size: int,
    trials: Sequence[Sequence[np.ndarray]],
    *,
    groups: int = 1,
    row_length: int | None = None,
    sequences: bool = False,
    layout: Layout = Layout(),
    sharing: Sharing | None = None,
) -> tuple[Shape, ...]:
    """A few shapes such that almost every batch of these pairs fits closely in one, and every batch fits in the last.

    Args:
      lengths: of the data set.
      batch_size: pairs in a (micro-)batch.
      trials: lists of such batches, drawn as they will be. The median of what the first list's need is a shape, and of
        each list the most; another holds the longest pairs all at once. So at most len(trials) + 2 programs are
        compiled, whatever the data.
      groups: G.
      row_length: tokens in a row; None gives each group one row, as long as it takes.
      sequences: whether the batches are to have them.
      layout: of the pairs.
      sharing: which of them share a prompt and responses; None for none.

    Returns:
      Shapes in increasing order.

    Raises:
      UserError: a piece is longer than `row_length`.
    """
    longest = int(lengths.pieces.max())
    if row_length is not None and longest > row_length:
        raise UserError(
            f"data.row_length={row_length} is shorter than the longest pair, {longest} tokens with both sides"
        )
    # A batch that spans two epochs may hold a pair twice, so the worst is the longest pair all over.
    pieces, blocks = batch_size * lengths.pieces.shape[1], -(-longest // TILE) + 1
    tiles = pieces * blocks * (blocks + 1) // 2
    trained = batch_size * int(lengths.trained.sum(1).max())
    if sharing is not None:  # a tree is as long as all its pairs at most; each run sees its prompt and itself
        prompt, runs = (-(-x // TILE) + 1 for x in (lengths.prompt, lengths.inputs))
        seen = prompt * (prompt + 1) // 2 + (runs * (runs + 1) // 2 + runs * prompt[:, None]).sum(1)
        tiles = max(tiles, batch_size * int(seen.max()))
        longest *= batch_size
    if row_length is None:  # of n pieces in g groups one may get more than its share, where others are lighter
        share = batch_size * int(lengths.pieces.sum(1).max()) // groups + longest
        widest = Shape(1, round_up(share, TILE), trained, tiles)
    else:
        widest = Shape(-(-pieces // groups), round_up(row_length, TILE), trained, tiles)
    if sequences:
        widest = widest._replace(sequences=batch_size * lengths.inputs.shape[1], span=round_up(_longest(lengths), TILE))

    def of(batch: np.ndarray) -> Lengths:
        some = lengths.of(batch)
        return some if sharing is None else shared(None, some, sharing.of(batch), layout, 0, row_length).lengths

    shapes = []
    for number, batches in enumerate(trials):
        needs = np.array([arrange(of(batch), groups, row_length, sequences).shape for batch in batches])
        for quantile in (0.5, 1.0) if number == 0 else (1.0,):
            shapes.append(_rounded(np.quantile(needs, quantile, axis=0, method="higher"), widest))
    shapes = dict.fromkeys([*shapes, _rounded(widest, widest)])
    return tuple(sorted(shapes, key=lambda shape: (shape.rows * shape.length, shape.trained, shape.tiles)))


def _rounded(need: Sequence[int], widest: Shape) -> Shape:
    shape = Shape(*(int(min(x, most)) for x, most in zip(need, widest, strict=True)))
    return shape._replace(
        trained=round_up(shape.trained, TRAINED_MULTIPLE), tiles=round_up(shape.tiles, TILES_MULTIPLE)
    )


def smallest(shapes: Sequence[Shape], need: Shape) -> Shape:
    """The first of some shapes, in increasing order, that holds what is needed."""
    fitting = [shape for shape in shapes if all(map(operator.ge, shape, need))]
    if not fitting:  # an iterator would take a StopIteration for the end of the data
        raise ValueError(f"{need} fits none of {shapes}")
    return fitting[0]


def pack(
    pairs: Sequence[Pair],
    index: Sequence[int],
    batch_size: int,
    shapes: Sequence[Shape],
    *,
    micro_steps: int = 1,
    groups: int = 1,
    layout: Layout = Layout(),
    row_length: int | None = None,
    sequences: bool = False,
    means: np.ndarray | None = None,
    lengths: Lengths | None = None,
    own: Sequence[int] | None = None,
    sharing: Sharing | None = None,
) -> PreferenceBatch:
    """Packs exactly `batch_size` pairs into `micro_steps` parts of one shape, the smallest that holds them.

    Args:
      pairs: at most `batch_size`; fewer leave filler of weight 0.
      index: each pair's number in its data set.
      batch_size: pairs in all, a multiple of `micro_steps`.
      shapes: from `choose_shapes` for batch_size / micro_steps pairs.
      micro_steps: M.
      groups: G.
      layout: what to lay out.
      row_length, sequences: as `choose_shapes` was given them.
      means: as in `lay_out`; None computes it from these pairs.
      lengths: of these pairs under the layout; None measures them.
      own: as in `lay_out`.
      sharing: of these pairs; None lays each down by itself.

    Returns:
      A `PreferenceBatch` of NumPy arrays with M as leading axis.
    """
    share = batch_size // micro_steps
    pairs = as_pairs(pairs)
    tokens = pairs.tokens()
    if means is None:  # by column, the weights of all that lies in the same buffers would be added up
        means = mean_tokens(pairs if tokens.weights is None else list(pairs))
    lengths = lengths_of(pairs, layout) if lengths is None else lengths
    parts = [np.arange(m * share, min((m + 1) * share, len(pairs))) for m in range(micro_steps)]

    def trees_of(part: np.ndarray) -> Trees:
        if sharing is None:
            return plain(tokens.start[part], lengths.of(part), layout)
        return shared(tokens.start[part], lengths.of(part), sharing.of(part), layout, share, row_length)

    trees = list(map(trees_of, parts))
    plans = [arrange(one.lengths, groups, row_length, sequences) for one in trees]
    shape = smallest(shapes, Shape(*map(max, zip(*(plan.shape for plan in plans), strict=True))))
    index = np.asarray(index)
    micro = [
        lay_out(plan, shape, one, tokens, pairs, part, index, share, means, layout, own)
        for plan, one, part in zip(plans, trees, parts, strict=True)
    ]
    if micro_steps == 1:
        return jax.tree.map(lambda x: np.asarray(x)[None], micro[0])
    return jax.tree.map(lambda *arrays: np.stack(arrays), *micro)
