import collections
import copy
import dataclasses
import itertools
import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from prefalign_jax.data import token_cache
from prefalign_jax.data.pairs import COLUMNS, Origin, concatenate, digest_of, from_list
from prefalign_jax.data.token_cache import cached_tokens, token_key
from prefalign_jax.types import Pair, Place
from small import make_pairs

PLACES = [("a", 1), ("b.jsonl", 12), ("", 0), ("x", 0), ("a", 2), ("a, row 9", 0), ("b, row 3", 4)]
PAIRS = [
    dataclasses.replace(
        pair, weight=1.0 + i, margin=float(i) if i % 3 else np.nan, label=i % 2 == 0, where=Place(*where)
    )
    for i, (pair, where) in enumerate(zip(make_pairs(7), PLACES, strict=True))
]
for i in (1, 4):
    weights = np.linspace(0, 1, len(PAIRS[i].chosen)).astype(np.float32)
    PAIRS[i] = dataclasses.replace(PAIRS[i], token_weights=(weights, None))
group = [ids for pair in make_pairs(2, seed=9) for ids in (pair.chosen, pair.rejected)]
PAIRS[5] = dataclasses.replace(PAIRS[5], others=tuple(group), scores=(4.0, 2.5, 2.0, 1.0, -3.0, -4.0))
ORIGINS = [Origin(i % 3, i % 2 == 0, 2**64 - 1 - i) for i in range(7)]
ABOUT = {"training": [{"too long": 3}], "flipped": 0}


def chunks(size=3, pairs=PAIRS, origins=ORIGINS):
    return [from_list(pairs[i : i + size], origins[i : i + size]) for i in range(0, len(pairs), size)]


def made(size=3):
    return iter(chunks(size)), lambda: ABOUT


def equal(one, other):
    def plain(pair):
        weights = [
            np.ones(len(ids)) if pair.weights(n) is None else pair.weights(n) for n, ids in enumerate(pair.responses)
        ]
        about = [pair.weight, pair.label, *pair.where, *pair.scores, *map(len, pair.responses)]
        return np.concatenate(
            [*(np.float64(x) for x in (pair.prompt, *pair.responses, *weights)), [pair.margin]]
        ), about

    (numbers, about), (other_numbers, other_about) = plain(one), plain(other)
    return np.array_equal(numbers, other_numbers, equal_nan=True) and about == other_about


@pytest.mark.parametrize("size", [1, 3, 7])
def test_pairs_come_back_as_they_were_made_and_are_made_once(tmp_path, size):
    calls = []
    path = tmp_path / "deep" / "x.arrow"
    for _ in range(2):
        found, about = cached_tokens(path, lambda: calls.append(1) or made(size))
        assert all(map(equal, found, PAIRS)) and len(found) == 7 and about == ABOUT
        assert found.source.tolist() == [o.source for o in ORIGINS]
        assert found.held_out.tolist() == [o.held_out for o in ORIGINS]
        assert found.prompt_key.tolist() == [o.prompt for o in ORIGINS]
        assert digest_of(found) == digest_of(PAIRS) and found[0].prompt.dtype == np.int32
        assert type(found[0].label) is bool and type(found[0].weight) is float
    assert calls == [1] and sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.sum"]
    in_memory, about = cached_tokens(None, lambda: made(size))
    assert all(map(equal, in_memory, PAIRS)) and about == ABOUT


def test_tokens_stay_on_disk_and_survive_that_the_file_goes(tmp_path):
    found, _ = cached_tokens(tmp_path / "x.arrow", made)
    assert not any(buffer.flags.owndata or buffer.flags.writeable for buffer in found.buffers)
    (tmp_path / "x.arrow").unlink()
    assert all(map(equal, found, PAIRS))


def test_a_set_of_which_nothing_is_left_comes_back_too(tmp_path):
    for empty in ([], [from_list([])]):
        path = tmp_path / f"{len(empty)}.arrow"
        for make in (lambda empty=empty: (empty, lambda: ABOUT), lambda: pytest.fail("made again")):
            pairs, about = cached_tokens(path, make)
            assert list(pairs) == [] and about == ABOUT


def test_a_damaged_file_is_made_anew(tmp_path):
    path = tmp_path / "x.arrow"
    cached_tokens(path, made)
    whole = path.read_bytes()
    cuts = [whole[:at] for at in range(0, len(whole), max(1, len(whole) // 40))]
    for damage in [*cuts, whole[:-1], b"\x00" * 100, b"PK\x03\x04", whole[: len(whole) // 2] + bytes(len(whole) // 2)]:
        path.write_bytes(damage)
        found, about = cached_tokens(path, made)
        assert all(map(equal, found, PAIRS)) and about == ABOUT
        assert path.read_bytes() == whole


def test_one_flipped_bit_anywhere_is_found_and_the_file_made_anew_with_one_line(tmp_path, capsys):
    path = tmp_path / "x.arrow"
    cached_tokens(path, made)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [(path, int(bit)) for bit in rng.integers(8 * len(whole), size=40)]
    for file, bit in [*places, (tmp_path / "x.arrow.sum", 3), (tmp_path / "x.arrow.sum", 130)]:
        data, calls = bytearray(file.read_bytes()), []
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        capsys.readouterr()
        found, about = cached_tokens(path, lambda calls=calls: calls.append(1) or made())
        assert calls and digest_of(found) == digest_of(PAIRS) and about == ABOUT
        assert capsys.readouterr().err == f"{path} is damaged; its pairs are tokenized anew\n"
        assert path.read_bytes() == whole


def test_what_fails_in_the_middle_leaves_no_file(tmp_path):
    def broken():
        yield chunks()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_tokens(tmp_path / "x.arrow", lambda: (broken(), lambda: ABOUT))
    assert list(tmp_path.iterdir()) == []


DIES = """
import os, signal, sys
from pathlib import Path
from prefalign_jax.data.pairs import from_list
from prefalign_jax.data.token_cache import cached_tokens
from prefalign_jax.types import Pair

def dies():
    yield from_list([Pair([1], [2], [3])] * 1000)
    os.kill(os.getpid(), signal.SIGKILL)

cached_tokens(Path(sys.argv[1]), lambda: (dies(), dict))
"""


def test_a_kill_in_the_middle_leaves_nothing_that_is_believed(tmp_path):
    path = tmp_path / "x.arrow"
    process = subprocess.run([sys.executable, "-c", DIES, str(path)], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    (left,) = tmp_path.iterdir()
    assert left != path and left.name.endswith(".part")
    calls = []
    found, _ = cached_tokens(path, lambda: calls.append(1) or made())
    assert calls and digest_of(found) == digest_of(PAIRS)
    assert not left.exists()


def test_two_runs_at_once_each_write_their_own(tmp_path):
    """Both are in the middle of writing before either goes on."""
    path, middle = tmp_path / "x.arrow", threading.Barrier(2)

    def waits():
        yield chunks()[0]
        middle.wait()
        assert not path.exists() and len(list(tmp_path.iterdir())) == 2
        middle.wait()
        yield from chunks()[1:]

    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(cached_tokens, path, lambda: (waits(), lambda: ABOUT)) for _ in range(2)]
        found = [run.result() for run in runs]
    assert [(digest_of(pairs), about) for pairs, about in found] == [(digest_of(PAIRS), ABOUT)] * 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.arrow", "x.arrow.sum"]
    pairs, _ = cached_tokens(path, lambda: pytest.fail("made again"))
    assert digest_of(pairs) == digest_of(PAIRS)


def test_where_nothing_can_be_written_pairs_are_made_in_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way of a directory")
    pairs, about = cached_tokens(tmp_path / "file" / "x.arrow", made)
    assert digest_of(pairs) == digest_of(PAIRS) and about == ABOUT

    def full(part, some, about):
        next(iter(some))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache, "_write", full)
    pairs, about = cached_tokens(tmp_path / "x.arrow", made)
    assert digest_of(pairs) == digest_of(PAIRS) and about == ABOUT and not (tmp_path / "x.arrow").exists()


def test_whatever_decides_the_tokens_is_in_the_key(tiny_tokenizer, monkeypatch):
    other_template = copy.deepcopy(tiny_tokenizer)
    other_template.chat_template = "{{ messages }}"

    def key(tokenizer=tiny_tokenizer, **what):
        return token_key(tokenizer, **{"max_length": 30, "sources": ["a", "b"]} | what)

    keys = {key(), key(max_length=31), key(sources=["b", "a"]), key(more=1), key(tokenizer=other_template)}
    assert key() in keys and len(keys) == 5
    monkeypatch.setattr(token_cache, "_code", lambda: "changed")
    assert key() not in keys


# Pairs by column.


def test_columns_read_as_the_list_they_were_made_of():
    pairs = concatenate(chunks())
    assert len(pairs) == 7 and all(map(equal, pairs, PAIRS)) and equal(pairs[-1], PAIRS[-1])
    assert [pair.where for pair in pairs[2:5]] == [Place(), Place("x"), Place("a", 2)]
    with pytest.raises(IndexError):
        pairs[7]
    assert list(concatenate([])) == [] and not concatenate([])


def test_choosing_pairs_copies_no_token():
    pairs = concatenate(chunks())
    index = np.array([5, 0, 0, 3])
    chosen = pairs.select(index)
    assert [equal(a, PAIRS[i]) for a, i in zip(chosen, index, strict=True)] == [True] * 4
    assert chosen.buffers is pairs.buffers and digest_of(chosen) == digest_of([PAIRS[i] for i in index])
    assert all(len(getattr(chosen, name)) == 4 for name in COLUMNS)
    mask = np.arange(7) % 2 == 0
    assert [equal(a, b) for a, b in zip(pairs.select(mask), itertools.compress(PAIRS, mask), strict=True)] == [True] * 4


def test_another_pairs_completion_as_the_rejected_one():
    pairs = concatenate(chunks())
    other, most = np.array([1, 2, 3, 4, 5, 6, 0]), np.array([1, 2, 3, 4, 5, 6, 99])
    changed = pairs.with_rejected(other, most)
    wanted = []
    for pair, o, m in zip(PAIRS, other, most, strict=True):
        cut = pair.weights(0), None if PAIRS[o].weights(0) is None else PAIRS[o].weights(0)[:m]
        wanted.append(
            dataclasses.replace(pair, rejected=PAIRS[o].chosen[:m], token_weights=(*cut, *[None] * len(pair.others)))
        )
    assert all(map(equal, changed, wanted)) and digest_of(changed) == digest_of(wanted)
    assert digest_of(pairs) == digest_of(PAIRS) and all(map(equal, pairs, PAIRS))


def test_a_digest_depends_on_scores_and_on_weights_of_tokens():
    group = PAIRS[5]
    changed = [
        group,
        dataclasses.replace(group, scores=(*group.scores[:-1], 0.0)),
        dataclasses.replace(group, others=group.others[::-1]),
        dataclasses.replace(group, token_weights=(None, np.zeros(len(group.rejected)), *[None] * len(group.others))),
        dataclasses.replace(group, token_weights=(np.zeros(len(group.chosen)), None, *[None] * len(group.others))),
    ]
    assert len({digest_of([one]) for one in changed}) == len(changed)
    counted_once = tuple(np.ones(len(ids), np.float32) for ids in group.responses)
    assert digest_of([dataclasses.replace(group, token_weights=counted_once)]) == digest_of([group])


def test_the_file_can_be_read_by_others(tmp_path):
    """By any reader of Arrow files, such as the library `datasets`."""
    pa = pytest.importorskip("pyarrow")
    cached_tokens(tmp_path / "x.arrow", made)
    with pa.memory_map(str(tmp_path / "x.arrow")) as source:
        rows = pa.ipc.open_file(source).read_all().to_pylist()
    assert [row["responses"][0] for row in rows] == [pair.chosen.tolist() for pair in PAIRS]
    assert [ids for ids in rows[5]["responses"] if ids] == [ids.tolist() for ids in PAIRS[5].responses]
    assert collections.Counter(row["source"] for row in rows) == {0: 3, 1: 2, 2: 2}
    assert json.dumps(rows[0]["weight"]) == "1.0" and isinstance(PAIRS[0], Pair)
