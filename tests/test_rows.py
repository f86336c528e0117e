"""Malformed files: one line with file and row, or a repair that data/rows.py documents; and large ones, row by row."""

import codecs
import collections
import csv
import gzip
import io
import json
import math
import time
import tracemalloc

import numpy as np
import pytest

from prefalign_jax.data import rows as rows_
from prefalign_jax.data.memory import as_source
from prefalign_jax.data.reading import Tally
from prefalign_jax.data.records import iter_records, read_records
from prefalign_jax.data.rows import LARGEST_ROW, content_digest, count_rows, json_rows, read_rows
from prefalign_jax.types import Place, UserError
from test_fields import KINDS
from test_fields import ROWS as PUBLISHED

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
LINE = json.dumps(PAIR).encode() + b"\n"
OTHER = {"prompt": [{"role": "user", "content": "p"}]} | {
    side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")
}
SURROGATE = rb'{"prompt": "p\ud83d", "chosen": "c", "rejected": "r"}'


def array(*rows, indent=4):
    return json.dumps(rows, indent=indent).encode()


# What is wrong -> (name of the file, its bytes, what the one line says after the file).
STOPS = {
    "truncated gzip": (
        "a.jsonl.gz",
        gzip.compress(LINE * 9, 0)[:-50],
        ", row 9: expected a readable file, found",
    ),
    "gzip in name only": ("a.jsonl.gz", LINE, ", row 1: expected a readable file, found Not a gzipped file"),
    "truncated line": ("a.jsonl", LINE + LINE[:20], ", row 2: expected one JSON object in UTF-8, found Unterminated"),
    "UTF-16": ("a.jsonl", LINE.decode().encode("utf-16"), ", row 1: expected one JSON object in UTF-8, found"),
    "NaN for text": ("a.jsonl", LINE + LINE.replace(b'"c"', b"NaN"), ", row 2: field 'chosen': expected a string or a"),
    "wrong types": ("a.jsonl", LINE + LINE.replace(b'"r"', b'["r"]'), ", row 2: field 'rejected[0]': expected a messa"),
    "nested nulls": (
        "a.jsonl",
        LINE + json.dumps({**OTHER, "chosen": [{"role": "assistant", "content": None}]}).encode(),
        ", row 2: field 'chosen[0].content': expected a string, found nothing",
    ),
    "null for a message": (
        "a.jsonl",
        LINE + json.dumps({**OTHER, "prompt": [None]}).encode(),
        ", row 2: field 'prompt[0]': expected a message with 'role' and 'content', found nothing",
    ),
    "null for a row": ("a.jsonl", LINE + b"null\n", ", row 2: expected a JSON object, found nothing"),
    "lone surrogate": ("a.jsonl", LINE + SURROGATE, ", row 2: field 'prompt': expected valid Unicode, found a string"),
    "duplicate keys": (
        "a.jsonl",
        LINE + b'{"prompt": "p", "chosen": "c", "chosen": "d", "rejected": "r"}\n',
        ", row 2: expected one JSON object in UTF-8, found the field 'chosen' twice",
    ),
    "mixed schemas": (
        "a.jsonl",
        LINE + b'{"prompt": "p", "good": "c", "bad": "r"}\n',
        ", row 2: expected prompt, chosen, rejected, found prompt, good, bad; if others hold them, write "
        "--config.data.columns=chosen=good,rejected=bad",
    ),
    "mixed schemas in one row": (
        "a.jsonl",
        LINE + json.dumps({**PAIR, "rejected": OTHER["rejected"]}).encode(),
        ", row 2: field 'rejected': expected a string, as in 'chosen', found a list",
    ),
    "several objects on a line": (
        "a.jsonl",
        LINE + LINE.strip() * 2,
        ", row 2: expected one JSON object in UTF-8",
    ),
    "pretty-printed JSONL": (
        "a.jsonl",
        json.dumps([json.loads(LINE)], indent=1).encode(),
        ", row 1: expected one JSON object in UTF-8, found '[' alone; values of several lines are read from a .json",
    ),
    "a pretty-printed object": (
        "a.json",
        json.dumps({"data": [1]}, indent=1).encode(),
        ", row 1: expected one JSON object in UTF-8, found '{' alone; values of several lines",
    ),
    "semicolons": (
        "a.csv",
        b'prompt;chosen;rejected\n"a, b";"c";"d"\n',
        ": expected columns separated by ',', found ';' between",
    ),
    "commas": ("a.tsv", b"prompt,chosen,rejected\na,b,c\n", ": expected columns separated by '\\t', found ',' between"),
    "a misspelled column": (
        "a.csv",
        b"prompt,choosen,rejected\na,b,c\n",
        ", row 1: expected prompt, chosen, rejected, found prompt, choosen, rejected; if others hold them, "
        "write --config.data.columns=chosen=choosen",
    ),
    "a winner": (
        "a.csv",
        b"question,response_a,response_b,winner\na,b,c,a\n",
        ", row 1: expected prompt, chosen, rejected, found question, response_a, response_b, winner; if others "
        "hold them, write --config.data.columns=prompt=question,chosen=FIELD,rejected=FIELD; "
        "where 'winner' says which of two is better, map the rows by",
    ),
    "array cut off": (
        "a.json",
        array(PAIR, PAIR)[:-20],
        ", row 2: expected a JSON array of objects, found Unt",
    ),
    "array without an end": (
        "a.json",
        array(PAIR)[:-1],
        ", row 1: expected ',' or ']' after it, found the end",
    ),
    "array without commas": ("a.json", b"[" + LINE * 2, ", row 1: expected ',' or ']' after it, found '{'"),
    "array with more behind": ("a.json", array(PAIR) + LINE, ", row 2: expected nothing after the array, found '{'"),
    "array with a key twice": (
        "a.json",
        b'[{"a": 1, "a": 2}]',
        ", row 1: expected a JSON object, found the field",
    ),
    "array of bad UTF-8": ("a.json", array(PAIR).replace(b"p", b"\xff"), ", row 1: expected JSON in UTF-8, found"),
    "gzipped array cut off": (
        "a.json.gz",
        gzip.compress(array(*[PAIR] * 9), 0)[:-50],
        ", row 1: expected a readable file",
    ),
    "empty array": ("a.json", b"[ ]", ": no record is left (there was no row)"),
}


@pytest.mark.parametrize(("name", "content", "says"), STOPS.values(), ids=STOPS)
def test_what_stops_the_reading_is_one_line_with_file_and_row(tmp_path, name, content, says):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_records(file)
    assert str(caught.value).startswith(f"{file}{says}") and "\n" not in str(caught.value)


REPAIRS = {
    "byte order mark": ("a.jsonl", codecs.BOM_UTF8 + LINE * 2),
    "CRLF": ("a.jsonl", (LINE * 2).replace(b"\n", b"\r\n")),
    "empty lines": ("a.jsonl", b"\n" + LINE + b" \r\n" + LINE),
    "no last newline": ("a.jsonl", LINE * 2 + b"\n  "),
    "NaN in a field that is not read": ("a.jsonl", (LINE * 2).replace(b"}", b', "score": NaN}')),
    "a key twice in different objects": ("a.jsonl", (LINE * 2).replace(b"}", b', "m": {"prompt": 1}}')),
    "array": ("a.json", array(PAIR, PAIR)),
    "array on one line": ("a.json", array(PAIR, PAIR, indent=None)),
    "array with a byte order mark and CRLF": ("a.json", codecs.BOM_UTF8 + array(PAIR, PAIR).replace(b"\n", b"\r\n")),
    "gzipped array": ("a.json.gz", gzip.compress(array(PAIR, PAIR))),
    "lines called .json": ("a.json", LINE * 2),
}


@pytest.mark.parametrize(("name", "content"), REPAIRS.values(), ids=REPAIRS)
def test_what_is_put_right(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    records, dropped = read_records(file)
    assert [tuple(record[:3]) for record in records] == [("p", "c", "r")] * 2 and not dropped


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_a_line_of_100_megabytes_is_named_without_being_held(tmp_path, name):
    """The file has a hole for most of it, so writing it costs nothing."""
    file = tmp_path / name
    if name.endswith("gz"):
        with gzip.open(file, "wb", compresslevel=1) as out:
            out.write(LINE)
            for _ in range(5):
                out.write(bytes(4 * 2**20))
    else:
        with file.open("wb") as out:
            out.write(LINE)
            out.truncate(100 * 2**20)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"row 2: longer than 16 MiB; expected one JSON object a line"):
        list(read_rows(file))
    assert tracemalloc.get_traced_memory()[1] < 4 * LARGEST_ROW
    tracemalloc.stop()


EMPTY = {  # a small file that holds gigabytes of nothing
    "lines": ("a.jsonl.gz", b"", b"\n", "row 100002: expected a row, found 100,000 empty lines"),
    "lines of spaces": ("a.jsonl.gz", b"", b" \r\n", "row 100002: expected a row, found 100,000 empty lines"),
    "spaces": ("a.jsonl.gz", b"", b" ", "row 2: longer than 16 MiB"),
    "an array": ("a.json.gz", b"[", b"\n", "row 2: longer than 16 MiB"),
}


@pytest.mark.parametrize(("name", "before", "again", "says"), EMPTY.values(), ids=EMPTY)
def test_gzipped_emptiness_is_named_without_being_read_to_its_end(tmp_path, name, before, again, says):
    file = tmp_path / name
    with gzip.open(file, "wb", compresslevel=1) as out:
        out.write(before + LINE.strip() + (b"," if before else b"\n"))
        for _ in range(64):
            out.write(again * (2**20 // len(again)))
    assert file.stat().st_size < 2**20
    began = time.monotonic()
    with pytest.raises(UserError, match=says):
        list(json_rows(file))
    assert time.monotonic() - began < 2


def test_fewer_empty_lines_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE + b"\n" * 99_999 + LINE + b"\n" * 99_999 + LINE)
    assert [place.row for place, _ in json_rows(tmp_path / "a.jsonl")] == [1, 100_001, 200_001]


def test_an_element_larger_than_a_row_may_be_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_, "LARGEST_ROW", 1000)
    monkeypatch.setattr(rows_, "_CHUNK", 64)
    file = tmp_path / "a.json"
    file.write_bytes(array(PAIR, {"prompt": "x" * 3000}))
    with pytest.raises(UserError, match="row 2: longer than 0 MiB"):
        list(json_rows(file))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_an_array_is_the_same_however_it_is_read(tmp_path, monkeypatch, chunk):
    """Elements of every type, cut anywhere, between the bytes of a character too."""
    monkeypatch.setattr(rows_, "_CHUNK", chunk)
    wanted = [{"a": '日本 \\ " ] , [', "b": [1, [2, {}]]}, 12345, -1.5e-7, "x", True, None, [], {}, 678]
    for indent in (None, 2):
        file = tmp_path / "a.json"
        file.write_text(json.dumps(wanted, indent=indent, ensure_ascii=False), encoding="utf-8")
        found = list(json_rows(file))
        assert [row for _, row in found] == wanted
        assert [where for where, _ in found] == [Place(str(file), i) for i in range(1, 10)]


def test_rows_come_one_at_a_time(tmp_path):
    """What comes later is not even looked at."""
    for name, content in (("a.jsonl", LINE * 3 + b"{"), ("a.json", array(PAIR, PAIR, PAIR) + b"x" * (3 * 2**20))):
        file = tmp_path / name
        file.write_bytes(content)
        rows = read_rows(file)
        assert [next(rows)[1] for _ in range(3)] == [PAIR] * 3


def test_the_digest_is_of_the_content_and_the_names_of_the_files(tmp_path):
    def made(name, content, folder="x"):
        file = tmp_path / folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        return file

    one = content_digest(made("a.jsonl", LINE))
    assert content_digest(made("a.jsonl", LINE, "y")) == one == content_digest(tmp_path / "y")
    changed = {content_digest(made("a.jsonl", LINE * 2)), content_digest(made("b.jsonl", LINE)), one}
    changed.add(content_digest(tmp_path / "x"))
    assert len(changed) == 4
    made("test.jsonl", LINE, "z"), made("train.jsonl", LINE * 2, "z")
    assert content_digest(tmp_path / "z", "test") != content_digest(tmp_path / "z", "train")
    with pytest.raises(UserError, match=r"missing.jsonl: no such file or directory"):
        content_digest(tmp_path / "missing.jsonl")


def test_rows_are_counted_where_that_costs_little(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = {"a.jsonl": LINE * 3, "b.jsonl.gz": gzip.compress(LINE), "c.json": array(PAIR)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    parquet.write_table(pyarrow.Table.from_pylist([PAIR] * 5), tmp_path / "d.parquet")
    counts = {name: count_rows(tmp_path / name) for name in (*files, "d.parquet")}
    assert counts == {"a.jsonl": 3, "b.jsonl.gz": None, "c.json": None, "d.parquet": 5}
    assert count_rows(tmp_path) is None
    (tmp_path / "b.jsonl.gz").unlink(), (tmp_path / "c.json").unlink()
    assert count_rows(tmp_path) == 8


def test_the_digest_of_a_saved_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name, rows in (("one", [PAIR]), ("same", [PAIR]), ("two", [PAIR, PAIR])):
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
    digests = [content_digest(tmp_path / name) for name in ("one", "same", "two")]
    assert digests[0] != digests[2] and len(digests[0]) == 64
    assert [row for _, row in read_rows(tmp_path / "two")] == [PAIR, PAIR] and count_rows(tmp_path / "two") == 2
    assert math.isfinite(len(digests[1]))


# The same rows in every container.

TOOLS = {
    name: {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    for name, properties in (("city", {"city": {"type": "string"}}), ("add", {"x": {"type": "number", "least": 0}}))
}


def call(name, **arguments):
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return [{"role": "assistant", "content": "", "tool_calls": calls}]


ASKED = {"prompt": [{"role": "user", "content": "p"}], "rejected": [{"role": "assistant", "content": "no"}]}
NESTED = [  # a table gives each of these what only the others have
    {**ASKED, "chosen": call("city", city="Oslo"), "tools": [TOOLS["city"]], "weight": 2.0},
    {**ASKED, "chosen": call("add", x=1, more={"y": [2]}), "tools": [TOOLS["add"], TOOLS["city"]], "system": "s"},
    {
        **ASKED,
        "chosen": [{"role": "assistant", "content": "", "name": "Ada", "weight": 1} | call("city")[0]],
        "id": "7",
    },
    {**ASKED, "chosen": [{"role": "assistant", "content": "yes"}], "chat_template_kwargs": {"think": False}},
]
FLAT = [
    {"prompt": 'p, "q"', "chosen": " c\nd", "rejected": " r\t", "weight": 2, "margin": 0.5, "id": 7},
    {"prompt": "日本", "chosen": '[{"role": "assistant"}, 1]', "rejected": "x", "weight": 1, "margin": 2, "id": 8},
    {"prompt": "", "chosen": "x", "rejected": " ", "weight": 0.25, "margin": 1, "id": 9},
]
EMPTY = FLAT[2:]  # a response of nothing makes no pair
LABELLED = [
    {"prompt": "p", "completion": "c", "label": True, "weight": 1.5},
    {"prompt": "p", "completion": "d", "label": False, "weight": 1.0},
]


def written(directory, rows, flat):
    """The rows in a file, or a directory, of every kind."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    filled = [{**dict.fromkeys(name for row in rows for name in row), **row} for row in rows]
    lines, table = "".join(json.dumps(row) + "\n" for row in rows), pyarrow.Table.from_pylist(filled)
    (directory / "a.jsonl").write_text(lines)
    (directory / "a.ndjson.gz").write_bytes(gzip.compress(lines.encode()))
    (directory / "a.json").write_bytes(array(*rows))
    parquet.write_table(table, directory / "a.parquet", row_group_size=2)
    for name, new in (("a.arrow", pyarrow.ipc.new_file), ("a.feather", pyarrow.ipc.new_stream)):
        with pyarrow.OSFile(str(directory / name), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    pytest.importorskip("datasets").Dataset.from_list(filled).save_to_disk(directory / "saved")
    for name, separator in (("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")) if flat else ():
        text = io.StringIO()
        table = csv.DictWriter(text, rows[0], delimiter=separator, lineterminator="\r\n")
        table.writeheader()
        table.writerows({key: None if value != value else value for key, value in row.items()} for row in rows)
        data = codecs.BOM_UTF8 + text.getvalue().encode()
        (directory / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    return sorted(directory.iterdir())


@pytest.mark.parametrize(
    ("rows", "options", "flat"),
    [(NESTED, {}, False), (FLAT, {"margin": True}, True), (LABELLED, {"unpaired": True}, True)],
    ids=["nested", "flat", "labelled"],
)
def test_the_same_rows_are_the_same_records_in_every_container(tmp_path, rows, options, flat):
    found = {}
    for path in written(tmp_path, rows, flat):
        records, dropped = read_records(path, **options)
        assert [record.where.row for record in records] == [i for i, row in enumerate(rows, 1) if row not in EMPTY]
        # As JSON, since templates write objects in their order.
        found[path.name] = json.dumps([*map(tuple, (r._replace(where=0) for r in records))]), dropped
    assert len(found) == 7 + 3 * flat
    assert [name for name in found if found[name] != found["a.jsonl"]] == []


def test_objects_of_any_keys_are_objects_though_a_table_keeps_them_as_pairs(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    told = pyarrow.array([[("think", False)]], pyarrow.map_(pyarrow.string(), pyarrow.bool_()))
    columns = {name: [value] for name, value in OTHER.items()}
    parquet.write_table(pyarrow.table({**columns, "chat_template_kwargs": told}), tmp_path / "a.parquet")
    assert read_records(tmp_path / "a.parquet")[0][0].chat_template_kwargs == (("think", False),)


def test_a_class_is_its_name_and_not_its_number(tmp_path):
    """Which number is which class is for its names to say, in every container of `datasets`."""
    datasets = pytest.importorskip("datasets")
    features = {name: datasets.Value("string") for name in ("prompt", "completion")}
    features = datasets.Features(features | {"label": datasets.ClassLabel(names=["desirable", "undesirable"])})
    columns = {"prompt": ["p", "q"], "completion": ["c", "d"], "label": [0, 1]}
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "saved", tmp_path / "a.parquet", as_source(rows)):
        records = iter_records(read_rows(path), Tally(), unpaired=True)
        assert [record.label for record in records] == [True, False], path


def test_rows_of_numpy_and_pandas_are_those_of_lists_and_texts():
    pair = {name: np.array(value, object) for name, value in OTHER.items()}
    odd = [{**pair, "weight": np.float32(2)}, {name: tuple(value) for name, value in OTHER.items()} | {"weight": 2}]
    one, other = iter_records(as_source(odd), Tally())
    (plain,) = iter_records(as_source([{**OTHER, "weight": 2}]), Tally())
    assert one._replace(where=0) == other._replace(where=0) == plain._replace(where=0)


def test_the_kind_of_a_file_is_told_in_any_case(tmp_path):
    for name, content in (("A.JSONL", LINE), ("B.Csv", b"prompt, chosen,rejected\np,c,r\n"), ("C.JSON", array(PAIR))):
        (tmp_path / name).write_bytes(content)
        assert [row for _, row in read_rows(tmp_path / name)] == [PAIR]
    assert len(list(read_rows(tmp_path))) == 3


@pytest.mark.everything
def test_every_published_row_is_the_same_in_every_container(tmp_path):
    compared = collections.Counter()
    mixed = {"tool calls", "tool calls in pairs"}  # content is a text here, a list there: no table holds that
    for number, (name, row) in enumerate((name, row) for name, row in PUBLISHED.items() if name not in mixed):
        flat = all(isinstance(value, str | int | float) or value is None for value in row.values())
        (tmp_path / str(number)).mkdir()
        paths = written(tmp_path / str(number), [row], flat)
        for kind in KINDS.values():
            read = {}
            for path in paths:
                tally = Tally()
                try:
                    records = [one._replace(where=0) for one in iter_records(read_rows(path), tally, **kind)]
                except UserError as error:
                    records = str(error).removeprefix(str(path))
                unread = {field for field in tally.unread if field != ""}
                read[path.name] = json.dumps([records, tally.dropped, sorted(unread)])
            assert [path for path in read if read[path] != read["a.jsonl"]] == [], (name, kind)
            compared[kind.get("unpaired", False), flat] += bool(records)
    assert min(compared.values()) > 5, compared


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"prompt,chosen,prompt\n", ": two columns are called 'prompt'; rename one"),
        (
            "a.csv",
            b"prompt,chosen,rejected\na,b,c\nd,e\n",
            ", row 2: expected one value a column, found 2 values",
        ),
        ("a.csv", b'prompt,chosen,rejected\na,b,c\n\nd,"e', ", row 3: expected a readable file, found unexpected end"),
        ("a.tsv", b"prompt\tchosen\trejected\na\tb\xff\tc", ", row 1: expected a readable file, found 'utf-8' codec"),
        ("a.csv.gz", b"prompt,chosen", ", row 1: expected a readable file, found Not a gzipped file"),
        ("a.csv", b"x" * (LARGEST_ROW + 2), ", row 1: longer than 16 MiB"),
        (
            "a.csv",
            b"prompt;chosen;rejected\na;b;c\n",
            ": expected columns separated by ',', found ';' between their names",
        ),
        ("a.arrow", b"ARROW1", ", row 1: expected a readable file"),
        ("a.jsonl", b'{"a":' * 5000 + b"1" + b"}" * 5000, ", row 1: expected "),
        ("a.json", b'[{"a":' + b"[" * 5000 + b"]" * 5000 + b"}]", ", row 1: expected "),
        (
            "a.jsonl",
            b'{"a": 1, "a": 2, "' + b"x" * 9999 + b'": 1, "' + b"x" * 9999 + b'": 2}',
            ", row 1: expected ",
        ),
    ],
)
def test_a_broken_table_is_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_records(tmp_path / name)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / name}{says}") and "\n" not in said and len(said) < 500


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(LINE)
    pytest.importorskip("datasets").Dataset.from_list([PAIR]).save_to_disk(tmp_path / "saved")
    for name in ("~/a.jsonl", "~/saved"):
        assert [row for _, row in read_rows(name)] == [PAIR] and len(content_digest(name)) == 64
    with pytest.raises(UserError, match="expected a file or directory, found"):
        read_rows("~nobody-of-that-name/a.jsonl")
    with pytest.raises(UserError, match="expected a file or directory, found"):
        read_rows("x" * 300 + ".jsonl")
