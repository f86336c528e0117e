"""Files that appear whole or not at all."""

import os

import pytest

from prefalign_jax.files import read_json, whole, write_json
from prefalign_jax.types import UserError


def test_json_comes_back_and_a_broken_file_says_which(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, None]} and os.listdir(tmp_path) == ["a.json"]
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json: expected JSON"):
        read_json(tmp_path / "a.json")


def test_a_file_that_fails_half_way_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), whole(file) as part:
        part.write_text("ne")
        assert file.read_text() == "old"
        raise ZeroDivisionError
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with whole(file) as part:
        part.write_text("new")
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]
