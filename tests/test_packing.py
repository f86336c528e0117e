import jax
import numpy as np
import pytest

from prefalign_jax.data.packing import Shape, arrange, fill_rows, mean_tokens, pack
from prefalign_jax.data.pipeline import batch_of, make_pair_set
from prefalign_jax.data.trees import Layout, lengths_of
from prefalign_jax.models.attention import tree_mask
from prefalign_jax.types import CHOSEN, PROMPT, REJECTED, SIDES, TILE, Pair, UserError
from small import FULL, ORDINARY, first, make_pairs, packed


def pair(prompt: str, chosen: str, rejected: str, weight: float = 1.0) -> Pair:
    """Tokens from letters, so that rows read as text."""
    return Pair(*(np.array([ord(c) for c in text], np.int32) for text in (prompt, chosen, rejected)), weight)


def text(row) -> str:
    return "".join(chr(token) if token else "." for token in row)


def test_the_picture():
    """Two pairs in one row; the last token of each response is a target only."""
    batch = first(packed([pair("PQRS", "abc", "wxyz"), pair("TU", "de", "v")]))
    assert batch.tokens.shape == (1, 64)
    row = {name: getattr(batch, name)[0][:13] for name in ("tokens", "segments", "branches", "positions")}
    assert text(row["tokens"]) == "PQRSabwxyTUd."
    assert "".join(map(str, row["segments"])) == "1111111112220"
    assert "".join(map(str, row["branches"])) == "0000112220010"
    assert "".join(map(str, row["positions"])) == "0123454560120"
    trained = [
        (int(s), chr(row["tokens"][f]), chr(t))
        for f, t, s in zip(batch.source[0], batch.target[0], batch.slot[0], strict=True)
        if s < 2 * SIDES
    ]
    assert trained == [
        *[(CHOSEN, "S", "a"), (CHOSEN, "a", "b"), (CHOSEN, "b", "c")],
        *[(REJECTED, "S", "w"), (REJECTED, "w", "x"), (REJECTED, "x", "y"), (REJECTED, "y", "z")],
        *[(SIDES + CHOSEN, "U", "d"), (SIDES + CHOSEN, "d", "e"), (SIDES + REJECTED, "U", "v")],
    ]


def read_back(batch, count: int):
    """Every pair's trained text by side, found through slots and targets; each source must lie on the target's path."""
    groups = batch.source.shape[0]
    flat = {n: getattr(batch, n).reshape(groups, -1) for n in ("tokens", "segments", "positions", "branches")}
    out = {}
    for g in range(groups):
        for source, target, slot in zip(batch.source[g], batch.target[g], batch.slot[g], strict=True):
            if slot < SIDES * count:
                where = {n: flat[n][g, source] for n in flat}
                out.setdefault((slot // SIDES, slot % SIDES), []).append((int(where["positions"]), int(target)))
                assert where["segments"] > 0
                assert where["branches"] in (0, slot % SIDES + 1)
    return {key: [t for _, t in sorted(rows)] for key, rows in out.items()}


@pytest.mark.parametrize("layout", [FULL, ORDINARY, Layout(), Layout(rejected=False)], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_every_trained_token_is_there_once(layout, groups):
    pairs = make_pairs(9, seed=3)
    found = read_back(first(packed(pairs, layout=layout, groups=groups)), 9)
    for number, one in enumerate(pairs):
        assert found[number, CHOSEN] == one.chosen.tolist()
        if layout.rejected:
            assert found[number, REJECTED] == one.rejected.tolist()
        if layout.prompt and len(one.prompt) > 1:
            assert found[number, PROMPT] == one.prompt[1:].tolist()
    sides = {side for _, side in found}
    assert sides == {CHOSEN} | ({REJECTED} if layout.rejected else set()) | ({PROMPT} if layout.prompt else set())


def test_tree_rows_hold_the_prompt_once():
    pairs = [pair("prompt" * 5, "ab", "cd")]
    tree, ordinary = (np.count_nonzero(packed(pairs, layout=layout).segments) for layout in (FULL, ORDINARY))
    assert ordinary - tree == 30


def test_micro_steps_deal_the_pairs_in_order_and_share_a_shape():
    pairs = make_pairs(6)
    batch = packed(pairs, micro_steps=3)
    np.testing.assert_array_equal(batch.index, [[0, 1], [2, 3], [4, 5]])
    assert batch.tokens.ndim == 3
    np.testing.assert_allclose(batch.mean_tokens, np.broadcast_to(mean_tokens(pairs), (3, 2)))


def test_mean_tokens_are_weighted():
    pairs = [pair("abc", "ab", "x", weight=3.0), pair("abcde", "abcdef", "x")]
    np.testing.assert_allclose(mean_tokens(pairs), [(3 * 2 + 4) / 4, (3 * 2 + 6) / 4])


def test_rows_overflow_nowhere_and_use_little_more_than_needed():
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    rows = fill_rows(lengths, 64)
    assert sorted(n for row in rows for n in row) == list(range(200))
    assert all(sum(lengths[n] for n in row) <= 64 for row in rows)
    assert len(rows) <= 1.05 * lengths.sum() / 64 + 1


def test_groups_get_equally_many_rows_to_within_one():
    plan = arrange(lengths_of(make_pairs(23), FULL), 4, 64)
    rows = [len(group) for group in plan.groups]
    assert max(rows) - min(rows) <= 1 and sum(rows) > 0


def test_few_shapes_and_every_batch_fits():
    pairs = make_pairs(200, longest=40)
    shapes = make_pair_set(pairs, 8).shapes
    assert len(shapes) <= 4
    longest = max(pairs, key=lambda p: len(p.chosen) + len(p.rejected))
    worst = pack([longest] * 8, range(8), 8, shapes)  # as where two epochs meet
    assert Shape(*worst.tokens.shape[1:], worst.source.shape[2], worst.tiles.shape[2]) in shapes


def test_a_row_shorter_than_a_pair_is_refused():
    with pytest.raises(UserError, match="data.row_length=8"):
        make_pair_set([pair("prompt", "chosen", "rejected")], 1, row_length=8)


def test_the_tiles_are_those_with_something_to_see():
    """Against the dense mask, for every layout, over one row and several; filler comes last and is no block."""
    pairs = make_pairs(20, longest=90)
    for layout in (FULL, ORDINARY, Layout(rejected=False)):
        for options in (dict(groups=1), dict(groups=3), dict(groups=2, row_length=320)):
            batch = first(packed(pairs, layout=layout, **options))
            groups, length = options["groups"], batch.tokens.shape[1]
            sees = np.asarray(tree_mask(batch.segments, batch.branches)) & (batch.segments > 0)[:, :, None]
            blocks = sees.reshape(groups, -1, length // TILE, TILE, length // TILE, TILE).any((3, 5))
            for g, tiles in enumerate(batch.tiles):
                r, query, key = np.nonzero(blocks[g])
                wanted = np.stack([query, key], axis=1) + r[:, None] * (length // TILE)
                np.testing.assert_array_equal(tiles[: len(wanted)], wanted)
                assert (tiles[len(wanted) :, 0] == blocks[g].shape[0] * length // TILE).all()


def test_packing_is_a_function_of_its_arguments():
    pairs = make_pairs(8)
    for a, b in zip(packed(pairs)[:-1], packed(pairs)[:-1], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("row_length", [None, 320, 1024])
def test_every_batch_fits_whatever_the_rows_and_groups(groups, row_length):
    """Short rows to many groups, and one long row that takes the whole batch."""
    pairs = [*make_pairs(40, longest=90), *[Pair(*(np.ones(n, np.int32) for n in (60, 22, 22)))] * 8]
    data = make_pair_set(pairs, 8, groups=groups, row_length=row_length)
    rng = np.random.default_rng(0)
    for batch in (*(rng.choice(48, 8, replace=False) for _ in range(20)), np.arange(40, 48)):
        assert batch_of(data, batch).tokens.shape[-1] % TILE == 0


def test_a_micro_batch_may_hold_nothing_but_filler():
    batch = packed(make_pairs(2), batch_size=4, micro_steps=2)
    assert (batch.segments[0] > 0).any() and not (batch.segments[1] > 0).any()
    np.testing.assert_array_equal(batch.weight, [[1, 1], [0, 0]])


@pytest.mark.parametrize("layout", [FULL, ORDINARY, Layout(rejected=False), Layout(rewards=True)], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_sequences_are_the_texts_of_the_pairs(groups, layout):
    pairs = make_pairs(11)
    batch = first(packed(pairs, 12, groups=groups, layout=layout, attends="sequences"))
    index, place = batch.sequences
    tokens = batch.tokens.reshape(groups, -1)
    texts = sorted(tokens[g, text[text >= 0]].tolist() for g in range(groups) for text in index[g] if text[0] >= 0)
    end = None if layout.rewards else -1
    sides = [side[:end] for pair in pairs for side in (pair.chosen, pair.rejected)[: 1 + layout.rejected]]
    prompts = [pair.prompt for pair in pairs for _ in range(1 + layout.rejected)]
    assert texts == sorted([*prompt, *side] for prompt, side in zip(prompts, sides, strict=True))
    # A text begins at its first token, and `place` is where `index` has each token.
    assert all((np.diff((text >= 0).astype(int)) <= 0).all() for text in index.reshape(-1, index.shape[-1]))
    for g in range(groups):
        for token, where in enumerate(place[g]):
            assert sorted(where[where >= 0]) == np.flatnonzero(index[g].reshape(-1) == token).tolist()
    assert packed(pairs, 12, groups=groups, layout=layout).sequences is None


PER_ROW = {"tokens", "segments", "branches", "positions", "source", "target", "slot", "tiles", "sequences"}


def of_groups(x, own):
    """[M, 4 groups of rows, ...] -> the rows of some groups."""
    by_group = x.reshape(x.shape[0], 4, -1, *x.shape[2:])[:, own]
    return by_group.reshape(x.shape[0], -1, *x.shape[2:])


@pytest.mark.parametrize("layout", [FULL, ORDINARY, Layout(after=True), Layout(rewards=True)], ids=str)
@pytest.mark.parametrize(("own", "row_length"), [([2], None), ([0, 3], None), ([1, 2], 64)])
def test_a_process_lays_out_the_rows_of_its_own_groups_alone(layout, own, row_length):
    """Those of the batch that one process would lay out, to the bit; what is per pair is of all pairs."""
    pairs = make_pairs(9, seed=5)
    for attends in ("tiles", "sequences"):
        options = dict(groups=4, layout=layout, row_length=row_length, micro_steps=2, attends=attends)
        whole, part = (packed(pairs, 10, **options, own=numbers) for numbers in (None, own))
        for name, everything in whole._asdict().items():
            if name in PER_ROW:
                everything = jax.tree.map(lambda x: of_groups(x, own), everything)
            jax.tree.map(np.testing.assert_array_equal, getattr(part, name), everything)
