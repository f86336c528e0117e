import copy
import dataclasses
import math

import numpy as np
import pytest

from prefalign_jax.data.chat import tokenize_records
from prefalign_jax.data.records import Record
from prefalign_jax.data.token_cache import cached_tokens, token_key

RECORDS = [
    Record("a b", "the sky", "the tea", where="x, row 1"),
    Record("", "blue", "blue", weight=2.0, margin=0.5, where="x, row 2"),
    Record("c " * 40, "sky", "tea", label=False, where="x, row 3"),
]


def test_pairs_come_back_as_they_were_made_and_are_made_once(tiny_tokenizer, tmp_path):
    calls = []

    def make():
        calls.append(1)
        return tokenize_records(RECORDS, tiny_tokenizer, max_length=30)

    path = tmp_path / "deep" / f"{token_key(RECORDS, tiny_tokenizer, max_length=30)}.npz"
    made, dropped = cached_tokens(path, make)
    read, counts = cached_tokens(path, make)
    assert calls == [1] and counts == dropped and sum(dropped.values()) == 2 and len(read) == len(made) == 1
    for one, other in zip(made, read, strict=True):
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
    assert read[0].prompt.dtype == np.int32 and math.isnan(read[0].margin)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_set_of_which_nothing_is_left_comes_back_too(tmp_path):
    path = tmp_path / "x.npz"
    assert cached_tokens(path, lambda: ([], {"too long": 3})) == ([], {"too long": 3})
    assert cached_tokens(path, lambda: pytest.fail("made again")) == ([], {"too long": 3})


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"\x00" * 100])
def test_a_damaged_file_is_made_anew(tiny_tokenizer, tmp_path, damage):
    path = tmp_path / "x.npz"
    make = lambda: tokenize_records(RECORDS, tiny_tokenizer, max_length=300)  # noqa: E731
    cached_tokens(path, make)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if not damage else damage)
    pairs, _ = cached_tokens(path, make)
    np.testing.assert_array_equal(pairs[0].chosen, make()[0][0].chosen)
    assert path.read_bytes() == whole


def test_whatever_decides_the_tokens_is_in_the_key(tiny_tokenizer):
    other_template = copy.deepcopy(tiny_tokenizer)
    other_template.chat_template = "{{ messages }}"

    def key(records=RECORDS, tokenizer=tiny_tokenizer, **options):
        return token_key(records, tokenizer, **{"max_length": 30, "too_long": "drop"} | options)

    keys = {key(), key(max_length=31), key(too_long="truncate_prompt"), key(tokenizer=other_template)}
    changes = {"prompt": "a c", "chosen": "", "rejected": "x", "weight": 2.0, "margin": 1.0, "label": False}
    for field, value in changes.items():
        keys.add(key([RECORDS[0]._replace(**{field: value}), *RECORDS[1:]]))
    keys |= {key(RECORDS[::-1]), key(RECORDS[:2])}
    assert len(keys) == 12 and key() == key(list(RECORDS))
