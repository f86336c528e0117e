import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefalign_jax.tables import Cell, Table, aligned, markdown, to_the_right, written

CELLS = st.text(max_size=12) | st.integers() | st.booleans() | st.none()
PLAIN = st.text("abc 1", max_size=8)


def grids(cells):
    """Tables of at least one row and one column."""
    return st.integers(1, 4).flatmap(
        lambda width: st.lists(st.lists(cells, min_size=width, max_size=width), min_size=1, max_size=5)
    )


@given(grids(CELLS))
def test_a_row_is_a_line_whatever_is_in_it(rows):
    text = aligned((), rows)
    assert len(text.split("\n")) == len(rows)
    assert text.replace("\n", "").isprintable()


@given(grids(PLAIN))
def test_columns_begin_or_end_at_one_place(rows):
    """Every cell lies within its column's stretch of the line, with two spaces between stretches."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = to_the_right(rows)
    for line, row in zip(aligned((), rows, indent=3).split("\n"), rows, strict=True):
        at = 3
        for cell, width, to_right in zip(row, widths, right, strict=True):
            place = line[at : at + width].ljust(width)
            assert place == (cell.rjust(width) if to_right else cell.ljust(width))
            assert not line[at + width : at + width + 2].strip()
            at += width + 2


@pytest.mark.parametrize(
    ("column", "right"),
    [
        (["1", "12,345", "-"], True),
        (["0.6931", "−3.2", "+1e-05", "1.2e−7"], True),
        (["3/10", ""], True),
        (["0:01:09", "10%"], True),
        (["0.5 [0.4, 0.6]", "1"], False),
        (["1", "2 pairs"], False),
        (["", "-"], False),
        (["v1"], False),
    ],
)
def test_a_column_of_numbers_stands_to_the_right(column, right):
    assert to_the_right([["name", cell] for cell in column]) == [False, right]


def test_names_of_rows_stand_to_the_left_even_if_they_are_numbers():
    assert aligned(("turns", "pairs"), [(1, 1000), (10, 2)]) == "turns  pairs\n1      1,000\n10         2"


def test_wide_characters_take_two_columns_and_accents_none():
    lines = aligned((), [("日本", "x"), ("cafe\u0301", "x"), ("four", "x")]).split("\n")
    assert lines == ["日本  x", "cafe\u0301  x", "four  x"]


def test_what_steers_a_terminal_does_not_reach_it():
    assert aligned((), [("a\x1b[2Jb\nc", "d")]) == "a?[2Jb c  d"


@given(grids(CELLS))
def test_markdown_has_as_many_bars_as_columns(rows):
    lines = markdown([""] * len(rows[0]), rows).split("\n")
    assert len(lines) == len(rows) + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(rows[0]) + 1}


def test_a_table_of_no_rows_is_its_head():
    assert aligned(("a", "b"), []) == "a  b"
    assert Table("t", ("a", "b"), []).right == [False, False]


def test_a_page_gets_every_cell_as_text():
    table = Table("t", ("", "n", "words"), [("a", 12345, None), ("b", Cell("1.5", "n = 3", True), "x")])
    assert table.cells == [[("a", "", False), ("12,345", "", False), ("", "", False)],
                           [("b", "", False), ("1.5", "n = 3", True), ("x", "", False)]]  # fmt: skip
    assert table.right == [False, True, False]


def test_a_flag_is_no_number():
    assert [written(value) for value in (True, False, 1, 0)] == ["yes", "no", "1", "0"]
