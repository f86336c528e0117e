"""Files that appear whole or not at all, are to the bit what was written, and are read with care."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from prefalign_jax import files
from prefalign_jax.files import (
    DEEPEST,
    checksum,
    hold,
    intact,
    locked,
    parse_json,
    read_json,
    read_json_lines,
    remove_directory,
    remove_parts,
    sealed,
    whole,
    write_json,
    writing,
)
from prefalign_jax.judges.cache import open_cache
from prefalign_jax.models import hf_io
from prefalign_jax.types import UserError, WriteError

# JSON


def test_json_comes_back_and_a_broken_file_says_which(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, None]} and os.listdir(tmp_path) == ["a.json"]
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json: expected JSON"):
        read_json(tmp_path / "a.json")
    assert read_json(tmp_path / "b.json", missing={}) == {}
    with pytest.raises(UserError, match=r"b\.json: expected JSON, found .*No such file"):
        read_json(tmp_path / "b.json")


def test_lines_are_split_at_line_ends_alone_and_the_last_is_whole_or_none(tmp_path):
    rows = [{"text": "a\u2028b\x85é"}, {"text": ""}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '{"te')
    assert read_json_lines(tmp_path / "a.jsonl", {"text": "a string"}) == rows
    assert read_json_lines(tmp_path / "b.jsonl") == []


@pytest.mark.parametrize("late", [0, 3, 10**6])
def test_a_directory_goes_though_threads_of_a_failed_write_still_add_files(tmp_path, monkeypatch, late):
    directory, real, times = tmp_path / "x", os.rmdir, iter(range(late))
    (directory / "inner").mkdir(parents=True)

    def removed(path, **options):
        if next(times, None) is not None:  # a file appears between the look into the directory and its removal
            (directory / "late").write_text("")
        real(path, **options)

    monkeypatch.setattr(os, "rmdir", removed)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    if late > 10:
        with pytest.raises(OSError, match="not empty"):
            remove_directory(directory)
    else:
        remove_directory(directory)
        assert not directory.exists()


@pytest.mark.parametrize("depth", [DEEPEST - 1, DEEPEST + 1, 5000, 200_000])
@pytest.mark.parametrize("brackets", ["[]", '{"a":}'])
def test_a_value_is_read_to_a_certain_depth(depth, brackets):
    text = brackets[:-1] * depth + "0" + brackets[-1] * depth
    if depth < DEEPEST:
        assert json.dumps(parse_json(text, where="x")).replace(" ", "") == text
    else:
        with pytest.raises(UserError, match="^x: expected JSON, found more than 64 levels of nesting$"):
            parse_json(text, where="x")


SHAPES = [  # a shape, what has it, what has not and where it is told to be wrong
    ("a number", ["1", "1.5", "-0", "NaN", "1" + "0" * 30], {"true": "", '"1"': "", "null": ""}),
    ("an integer or null", ["1", "null"], {"1.0": "", "false": ""}),
    (["a string"], ["[]", '["a"]'], {'["a", 1]': ", element 1", "{}": "", '"a"': ""}),
    ({"a": "a list", "b?": "true or false"}, ['{"a": [], "c": 1}', '{"a": [], "b": false}'],
     {'{"a": 1}': ", field 'a'", '{"a": [], "b": null}': ", field 'b'", "[]": ""}),
    ({"*": {"x": "null"}}, ["{}", '{"a": {"x": null}}'],
     {'{"a": {"x": 1}}': ", field 'a', field 'x'", '{"a": 1}': ", field 'a'"}),
    (("null", {"a": "a string"}), ["null", '{"a": "b"}'], {'{"a": 1}': ", field 'a'", "1": ""}),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "right", "wrong"), SHAPES, ids=lambda x: str(x)[:40])
def test_a_shape_is_held_to(shape, right, wrong):
    for text in right:
        parse_json(text, shape, where="x")
    for text, place in wrong.items():
        with pytest.raises(UserError, match=f"^x{re.escape(place)}: expected .*, found"):
            parse_json(text, shape, where="x")


def test_a_field_that_must_be_there_is_missed_even_if_it_may_be_null():
    with pytest.raises(UserError, match="^x, field 'a': it has no field 'b'$"):
        parse_json('{"a": {}}', {"a": {"b": "null"}}, where="x")


# Writing


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


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device; make room on the disk"),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded; make room on the disk"),
        (OSError("40 requested and 0 written"), "40 requested and 0 written; see to the disk"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on device; make room"),
        (ValueError("OUT_OF_RANGE: x [os_error_code='27']"), "File too large; raise the limit"),
        (ValueError("RESOURCE_EXHAUSTED: x\n[system error, errno 28]"), "No space left on device; make room"),
    ],
)
def test_what_the_system_has_against_a_write_is_one_line_and_the_old_file_stays(tmp_path, error, says):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(WriteError, match=f"^{file} cannot be written: {says}") as told, whole(file):
        raise error
    assert "\n" not in str(told.value) and told.value.status == 1
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_another_kind_of_file_in_the_place_is_named(tmp_path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "directory", tmp_path / "file" / "a.json"):
        with pytest.raises(WriteError, match=f"^{path} cannot be written: .*directory; move away what is in its place"):
            write_json(path, {})
    assert (tmp_path / "file").read_text() == "" and sorted(os.listdir(tmp_path)) == ["directory", "file"]


def test_links_in_a_circle_are_named(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(WriteError, match="loop cannot be written: "), hf_io.replacing(loop) as fresh:
        (fresh / "config.json").write_text("{}")
    with pytest.raises(WriteError, match="loop cannot be written: Too many levels"), open_cache(loop):
        pass
    assert os.listdir(tmp_path) == ["loop"]


def test_a_mistake_of_ones_own_stays_what_it_is():
    with pytest.raises(ZeroDivisionError), writing("a"):
        raise ZeroDivisionError
    with pytest.raises(UserError, match="^mine$") as told, writing("a"):
        raise UserError("mine")
    assert told.value.status == 2


# What killed runs leave behind

DIES = """
import os, signal, sys
from pathlib import Path
from prefalign_jax.files import whole
with whole(Path(sys.argv[1])) as part:
    part.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_run_that_holds_the_directory_removes_what_a_killed_one_left(tmp_path):
    (tmp_path / "deep").mkdir()
    process = subprocess.run([sys.executable, "-c", DIES, tmp_path / "deep" / "a.txt"], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    (tmp_path / ".export.01234567.new" / "x").mkdir(parents=True)
    for name in (".hidden", ".a.part", "a.01234567.part", ".b.0123456x.part"):  # not of our making
        (tmp_path / name).write_text("")
    assert len(os.listdir(tmp_path / "deep")) == 1
    with locked(tmp_path):
        assert os.listdir(tmp_path / "deep") == []
        assert sorted(os.listdir(tmp_path)) == sorted(
            [".lock", ".hidden", ".a.part", "a.01234567.part", ".b.0123456x.part", "deep"]
        )


def test_what_was_moved_away_comes_back_unless_there_is_a_new_one(tmp_path):
    for name, text in ((".export.01234567.old", "old"), (".other.01234567.old", "old"), ("other", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    remove_parts(tmp_path)
    assert {path.name: (path / "file").read_text() for path in tmp_path.iterdir()} == {"export": "old", "other": "new"}


def test_what_a_living_process_is_writing_stays_and_links_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    (tmp_path / "inside").mkdir()
    outside.mkdir()
    (outside / ".a.01234567.part").write_text("")
    (tmp_path / "inside" / "link").symlink_to(outside)
    (tmp_path / "inside" / ".b.01234567.part").symlink_to(outside / ".a.01234567.part")
    with whole(tmp_path / "inside" / "a.txt") as part:
        part.write_text("half")
        remove_parts(tmp_path / "inside")
        assert part.read_text() == "half"
    assert (outside / ".a.01234567.part").exists()


# Checksums


def test_a_checksum_depends_on_every_bit_and_on_the_length(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 8)
    file, seen = tmp_path / "a", set()
    data = bytes(range(20))
    flipped = [data[: i // 8] + bytes([data[i // 8] ^ 1 << i % 8]) + data[i // 8 + 1 :] for i in range(8 * len(data))]
    for content in (data, *flipped, data + b"\0", data[:16], data[:8], b"", data[8:16] + data[:8] + data[16:]):
        file.write_bytes(content)
        seen.add(checksum(file))
    assert len(seen) == 6 + len(flipped)


def test_what_is_sealed_is_intact_until_either_file_changes(tmp_path):
    file = tmp_path / "a"
    for content, found in ((b"a", True), (b"b", False)):
        with sealed(file) as part:
            part.write_bytes(b"a")
        file.write_bytes(content)
        assert intact(file) is found
    file.write_bytes(b"a")
    (tmp_path / "a.sum").unlink()
    assert not intact(file) and not intact(tmp_path / "absent")


# One at a time


def test_a_directory_is_held_by_one_and_let_go_of(tmp_path):
    with locked(tmp_path / "w"), pytest.raises(UserError, match="--out=.*another run is writing there") as told:
        with locked(tmp_path / "w", "--out"):
            pass
    assert told.value.status == 2
    with locked(tmp_path / "w"):
        pass


def test_of_many_at_once_one_holds_a_file(tmp_path):
    held = []
    threads = [threading.Thread(target=lambda: held.append(hold(tmp_path / "f"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (descriptor,) = [one for one in held if one is not None]
    os.close(descriptor)


@pytest.mark.parametrize("kind", ["link", "dangling link", "directory"])
def test_a_lock_follows_no_link_and_empties_nothing(tmp_path, kind):
    target = tmp_path / "precious"
    if kind == "directory":
        (tmp_path / "w" / ".lock").mkdir(parents=True)
    else:
        (tmp_path / "w").mkdir()
        (tmp_path / "w" / ".lock").symlink_to(target)
    if kind == "link":
        target.write_text("all")
    with pytest.raises(WriteError, match=r"\.lock cannot be written: .*; move away"), locked(tmp_path / "w"):
        pass
    assert target.exists() == (kind == "link") and (kind != "link" or target.read_text() == "all")


def test_a_lock_file_with_content_keeps_it(tmp_path):
    (tmp_path / ".lock").write_text("mine")
    with locked(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "mine"
