"""Rows that are damaged in every way are read as they stand or answered in one line; none is a traceback."""

import copy
import gzip
import json
import math
import random

import pytest

from conftest import longer
from prefalign_jax.data.chat import iter_pairs
from prefalign_jax.data.memory import MemoryRows
from prefalign_jax.data.reading import Tally
from prefalign_jax.data.records import iter_records
from prefalign_jax.data.rows import read_rows
from prefalign_jax.types import UserError
from published_rows import assistant, user
from test_fields import KINDS, ROWS, TEMPLATE

KEPT = ("prompt", "chosen", "rejected", "others", "scores", "weight", "label", "tools", "chat_template_kwargs")
DEEP = json.loads("[" * 500 + "]" * 500)
ODD = [
    None,
    True,
    False,
    0,
    1,
    1.0,
    -1,
    2.5,
    math.nan,
    math.inf,
    10**400,
    1e-320,
    1e308,
    -0.0,
    "",
    " ",
    "x",
    "1",
    "true",
]
ODD += ["\ud800", "a\ud83d", "\x00", "\x1b[31m", "x" * 3000, "[{", '[{"role": "user"', "{'role': 'user'}", "NaN", "[]"]
ODD += [[], {}, [[]], [None], [{}], {"": ""}, {"a": None}, {"role": "user"}, {"\ud800": 1}, {"x" * 3000: 1}, DEEP]
ODD += [user("x"), [user("x"), assistant("y")], json.dumps([user("x"), assistant("y")]), {"messages": [assistant("z")]}]
NAMES = [
    "system",
    "history",
    "label",
    "weight",
    "tools",
    "margin",
    "text",
    "messages",
    "input",
    "id",
    "\ud800",
    "a\nb",
    "",
]
NAMES += [
    "x" * 3000,
    "chosen",
    "prompt",
    "completion",
    "chat_template_kwargs",
    "images",
    "kto_tag",
    "name",
    "tool_calls",
]


def places(value, path=()):
    """Every place in a row, the row itself left out."""
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(one, dict | list) and len(path) < 9:
            yield from places(one, (*path, key))


def damaged(row, rng):
    """The row after one to three accidents."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice([*places(row)] or [("prompt",)])
        inside = row
        for key in path[:-1]:
            inside = inside[key]
        key, odd = path[-1], copy.copy(rng.choice(ODD))
        match rng.randrange(7):
            case 0 | 1 | 2:
                inside[key] = odd
            case 3 if isinstance(inside, dict):
                inside.pop(key, None)
            case 3:
                inside.append(copy.copy(inside[key]))
            case 4 if isinstance(inside, dict):
                inside[rng.choice(NAMES)] = inside.pop(key, odd)
            case 4:
                inside[key] = [inside[key]]
            case 5:
                row[rng.choice(NAMES)] = odd
            case 6 if key in inside or isinstance(inside, list):
                try:
                    inside[key] = json.dumps(inside[key])
                except (ValueError, RecursionError):
                    inside[key] = odd
    return row


def one_line(error, most=700):
    said = str(error)
    assert said.isprintable() and len(said) < most, said[:2000]
    return said


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from strings(one)


def as_row(record):
    """The record in the common format; tools and arguments as JSON, whose nulls are somebody's and stay."""
    row = copy.deepcopy({name: getattr(record, name) for name in KEPT})
    row["responses"] = [row["chosen"], row["rejected"], *row.pop("others")]
    for part in (row["prompt"], *row["responses"]):
        for message in part if isinstance(part, list) else ():
            for call in message.get("tool_calls", ()):
                place = call.get("function", call)
                if "arguments" in place:
                    place["arguments"] = json.dumps(place["arguments"])
    row |= {"tools": json.dumps(row["tools"]), "chat_template_kwargs": dict(record.chat_template_kwargs)}
    if record.scores:
        return {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    del row["responses"], row["scores"]
    if not record.rejected:
        del row["rejected"]
        row["completion"] = row.pop("chosen")
    return row


@pytest.mark.parametrize("count", [1000, longer(10_000)], ids=["a thousand", "ten thousand"])
def test_damaged_rows_are_read_as_they_stand_or_answered_in_one_line(count, tiny_tokenizer):
    """What is read, written and read again is the same; nothing is made up that the row does not say."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    rng, accepted, refused = random.Random(0), [], 0
    sources, kinds = [*ROWS.values()], [*KINDS.values()]
    for _ in range(count):
        row, kind = damaged(rng.choice(sources), rng), rng.choice(kinds)
        try:
            records = list(iter_records(MemoryRows("rows", [row]), Tally(), **kind))
        except UserError as error:
            assert one_line(error).startswith("rows, row 1: ")
            refused += 1
            continue
        written = "\0".join(strings(row)) + "\0" + "\0".join(map(repr, strings(row)))
        for record in records:
            assert 0 < record.weight < math.inf and not record.margin < 0
            for text in strings([record.prompt, *record.responses]):
                known = {"user", "assistant", "system", "tool", "developer", "function"}
                pieces = [piece for piece in text.split("\n\n") if piece.strip()] if text not in known else []
                for piece in pieces:
                    at_hand = piece in written or json.dumps(piece)[1:-1] in written or piece.strip() in written
                    assert at_hand or piece.startswith(("SUBREDDIT", "TITLE", "POST", "TL;DR", "Article")), (row, piece)
            again = {"responses": ("completion",)} if not record.rejected else {}
            again |= {name: True for name in ("unpaired", "groups") if kind.get(name)}
            row_again = as_row(record)
            if not kind.get("unpaired"):
                del row_again["label"]
            (same,) = iter_records(MemoryRows("again", [row_again]), Tally(), **again)
            for name in KEPT:
                assert getattr(same, name) == getattr(record, name), (name, row)
        accepted += records
    assert min(len(accepted), refused) > count / 10
    try:
        for _ in iter_pairs(accepted, tokenizer, max_length=4096):
            pass
    except UserError as error:
        one_line(error)


def test_damaged_files_are_answered_in_one_line(tmp_path):
    """A byte changed, bytes cut off, bytes put in: of every kind of file."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": f"p {i}", "chosen": "c é", "rejected": "r"} for i in range(4)]
    lines, table = (
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
        pyarrow.table({name: [row[name] for row in rows] for name in rows[0]}),
    )
    parquet.write_table(table, tmp_path / "whole.parquet")
    with pyarrow.OSFile(str(tmp_path / "whole.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    files = {f"a.{kind}": (tmp_path / f"whole.{kind}").read_bytes() for kind in ("parquet", "arrow")}
    files |= {"a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines), "a.json": json.dumps(rows, indent=1).encode()}
    files |= {
        "a.csv": b'prompt,chosen,rejected\r\n"p, ""q""",c,r\r\nd,e,f\r\n',
        "a.tsv": b"prompt\tchosen\tx\na\tb\tc\n",
    }
    rng, read, refused = random.Random(0), 0, 0
    for name, content in files.items():
        for _ in range(60):
            broken = bytearray(content)
            at = rng.randrange(len(broken))
            match rng.randrange(3):
                case 0:
                    broken[at] ^= 1 << rng.randrange(8)
                case 1:
                    del broken[at:]
                case 2:
                    broken[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
            (tmp_path / name).write_bytes(broken)
            try:
                read += len(list(iter_records(read_rows(tmp_path / name), Tally())))
            except UserError as error:
                assert one_line(error, 900).startswith(str(tmp_path / name))
                refused += 1
    assert min(read, refused) > 50
