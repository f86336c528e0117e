import collections
import gzip
import json
import math
import random

import pytest

from prefalign_jax.data.records import Record, flip_labels, read_prompts, read_records, split_by_prompt
from prefalign_jax.types import Place, UserError

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(tmp_path, *rows, **options):
    """The records without their places, and what was dropped."""
    records, dropped = read_records(write(tmp_path / "data.jsonl", rows), **options)
    return [tuple(record[:3]) for record in records], dropped


TURN = [user("q"), assistant("a"), user("q2")]
HH = "\n\nHuman: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant:"


FORMATS = {
    "strings": ({**PAIR, "score": 1}, ("p", "c", "r")),
    "the prompt repeated in strings is text": ({**PAIR, "chosen": "pc"}, ("p", "pc", "r")),
    "explicit empty prompt": ({**PAIR, "prompt": ""}, ("", "c", "r")),
    "HH-RLHF": ({"chosen": HH + " yes", "rejected": HH + " no"}, (HH, " yes", " no")),
    "messages": (
        {"prompt": TURN, "chosen": [assistant("c")], "rejected": [assistant("r")]},
        (TURN, [assistant("c")], [assistant("r")]),
    ),
    "messages that repeat the prompt": (
        {"prompt": TURN, "chosen": [*TURN, assistant("c")], "rejected": [assistant("r")]},
        (TURN, [assistant("c")], [assistant("r")]),
    ),
    "whole conversations": (
        {"chosen": [*TURN, assistant("c")], "rejected": [*TURN, assistant("r")]},
        (TURN, [assistant("c")], [assistant("r")]),
    ),
    "string prompt with whole conversations": (
        {"prompt": "q", "chosen": [*TURN, assistant("c")], "rejected": [*TURN, assistant("r")]},
        (TURN, [assistant("c")], [assistant("r")]),
    ),
    "string prompt with answers": (
        {"prompt": "q", "chosen": [assistant("c")], "rejected": [assistant("r")]},
        ([user("q")], [assistant("c")], [assistant("r")]),
    ),
    "fields that Parquet fills in": (
        {"chosen": [{**user("q"), "name": None}, assistant("c")], "rejected": [user("q"), assistant("r")]},
        ([user("q")], [assistant("c")], [assistant("r")]),
    ),
}


@pytest.mark.parametrize(("row", "record"), FORMATS.values(), ids=FORMATS.keys())
def test_formats_of_pairs(tmp_path, row, record):
    assert read(tmp_path, row) == ([record], {})


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"prompt": "p", "completion": "c"}, ("p", "c", "")),
        ({"prompt": "p", "chosen": "c", "rejected": ""}, ("p", "c", "")),
        ({"prompt": "p", "response": "c"}, ("p", "c", "")),
        ({"chosen": HH + " yes"}, (HH, " yes", "")),
        ({"text": "once"}, ("", "once", "")),
        ({"messages": [*TURN, assistant("c")]}, (TURN[:1], [*TURN[1:], assistant("c")], [])),
        ({"prompt": "q", "messages": [*TURN, assistant("c")]}, (TURN[:1], [*TURN[1:], assistant("c")], [])),
        ({"prompt": TURN, "completion": [assistant("c")]}, (TURN, [assistant("c")], [])),
    ],
)
def test_formats_of_demonstrations(tmp_path, row, record):
    assert read(tmp_path, row, responses=("chosen",)) == ([record], {})
    # The last answer alone has all before it as its prompt.
    last = (TURN, [assistant("c")], []) if isinstance(record[0], list) else record
    assert read(tmp_path, row, responses=("chosen",), train_on="last") == ([last], {})


def test_other_field_names(tmp_path):
    assert read(tmp_path, {"prompt": "p", "a": "x", "b": "y"}, responses=("b", "a")) == ([("p", "y", "x")], {})


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"prompt": "p", "completion": "c", "label": True}, ("p", "c", "", True)),
        ({"prompt": "p", "response": "c", "label": False}, ("p", "c", "", False)),
        ({"prompt": "p", "completion": "c", "label": 1}, ("p", "c", "", True)),
        ({"prompt": "p", "completion": "c", "label": 0}, ("p", "c", "", False)),
        ({"prompt": "q", "completion": [assistant("c")], "label": False}, ([user("q")], [assistant("c")], [], False)),
        ({"prompt": TURN, "completion": [assistant("c")], "label": True}, (TURN, [assistant("c")], [], True)),
        ({"messages": [*TURN, assistant("c")], "label": False}, (TURN, [assistant("c")], [], False)),
        ({"completion": HH + " yes", "label": False}, (HH, " yes", "", False)),
        # As pandas and CSV write labels, and as LLaMA-Factory calls them.
        ({"prompt": "p", "completion": "c", "label": 0.0}, ("p", "c", "", False)),
        ({"prompt": "p", "completion": "c", "label": "True"}, ("p", "c", "", True)),
        ({"prompt": "p", "completion": "c", "kto_tag": "0"}, ("p", "c", "", False)),
        # Parquet fills in the fields of the other form.
        ({**dict.fromkeys(PAIR), "prompt": "p", "completion": "c", "label": False}, ("p", "c", "", False)),
    ],
)
def test_formats_of_labelled_completions(tmp_path, row, record):
    records, dropped = read_records(write(tmp_path / "data.jsonl", [row]), unpaired=True)
    assert [(r.prompt, r.chosen, r.rejected, r.label) for r in records] == [record]
    assert type(records[0].label) is bool and not dropped


NO_PAIRS = {
    "identical responses": {**PAIR, "rejected": "c"},
    "empty response": {**PAIR, "chosen": " "},
    "prompts differ": {"chosen": HH + " yes", "rejected": HH + " a\n\nHuman: q3\n\nAssistant: no"},
}


def test_a_pair_read_as_unpaired_is_its_chosen_then_its_rejected(tmp_path):
    """In every format, with weight and place, whatever else the row has; what is no pair is dropped once."""
    rows = [row for row, _ in FORMATS.values()] + [{**PAIR, "weight": 3, "source": "x"}]
    path = write(tmp_path / "data.jsonl", [*rows[:3], *NO_PAIRS.values(), *rows[3:]])
    pairs, dropped = read_records(path)
    assert len(pairs) == len(rows) and dropped == dict.fromkeys(NO_PAIRS, 1)
    expected = []
    for pair in pairs:
        none = "" if isinstance(pair.prompt, str) else []
        expected += [
            pair._replace(rejected=none, label=True),
            pair._replace(chosen=pair.rejected, rejected=none, label=False),
        ]
    assert read_records(path, unpaired=True) == (expected, dropped)
    for limit in range(1, len(expected) + 2):
        assert read_records(path, unpaired=True, limit=limit)[0] == expected[:limit]


def test_both_kinds_of_unpaired_rows_keep_their_order_and_empty_completions_are_counted(tmp_path):
    rows = [
        {"prompt": "0", "completion": "bad", "label": False, "weight": 2},
        {"prompt": "1", "completion": " \n", "label": True},
        {**PAIR, "prompt": "2"},
        {"prompt": "3", "completion": [], "label": True},
        {"prompt": "4", "completion": "good", "label": True},
    ]
    path = write(tmp_path / "data.jsonl", rows)
    # The names of the responses do not matter.
    for names in (("chosen", "rejected"), ("chosen",), ("a", "b"), ()):
        records, dropped = read_records(path, unpaired=True, responses=names)
        assert [(r.prompt, r.chosen, r.label, r.weight) for r in records] == [
            ("0", "bad", False, 2.0),
            ("2", "c", True, 1.0),
            ("2", "r", False, 1.0),
            ("4", "good", True, 1.0),
        ]
        assert [r.where for r in records] == [Place(str(path), i) for i in (1, 3, 3, 5)]
        assert dropped == {"empty response": 2}
    assert [r.label for r in read_records(path, unpaired=True, limit=2)[0]] == [False, True]


FORMS = "expected one of the fields completion, response, messages with a label, or chosen and rejected, found "


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, FORMS + "prompt, chosen"),
        ({"prompt": "p", "chosen": "c", "label": True}, FORMS + "prompt, chosen, label"),
        ({"prompt": "p", "completion": None, "label": True}, FORMS + "prompt, label"),
        ({"text": "p c", "label": True}, FORMS + "text, label"),
        ({}, FORMS + "no field"),
        ({"prompt": "p", "completion": "c"}, "field 'label': expected true or false (or 1 or 0), found nothing"),
        *(
            ({"prompt": "p", "completion": "c", "label": label}, f"or false (or 1 or 0), found {found}")
            for label, found in [
                ("maybe", "a string 'maybe'"),
                (2, "a number 2"),
                (-1, "a number -1"),
                (1.5, "a number 1.5"),
                (math.nan, "a number nan"),
                ([True], "a list [True]"),
            ]
        ),
        ({"prompt": "p", "completion": 3, "label": True}, "field 'completion': expected a string or a list of mess"),
        ({"completion": "c", "label": True}, "expected a field 'prompt', or an HH-RLHF transcript"),
        ({**PAIR, "rejected": 3}, "field 'rejected': expected a string or a list of messages, found a number 3"),
        (["p", "c"], "expected a JSON object, found a list ['p', 'c']"),
    ],
)
def test_malformed_unpaired_rows(tmp_path, row, message):
    path = write(tmp_path / "data.jsonl", [PAIR, row])
    with pytest.raises(UserError) as caught:
        read_records(path, unpaired=True)
    assert str(caught.value).startswith(f"{path}, row 2: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "margin"),
    [
        ({"margin": 1.5}, 1.5),
        ({"margin": 0}, 0.0),
        ({"score_chosen": 8, "score_rejected": 6.5}, 1.5),
        ({"chosen_score": -1.0, "rejected_score": -3.0}, 2.0),
        # The first that the row has.
        ({"margin": 0.25, "score_chosen": 8, "score_rejected": 6, "chosen_score": "?"}, 0.25),
        ({"margin": None, "score_chosen": 8, "score_rejected": 6}, 2.0),
        ({"score_chosen": 8, "score_rejected": None, "chosen_score": 3, "rejected_score": 2}, 1.0),
        ({"margin": -0.5}, None),
        ({"score_chosen": 6, "score_rejected": 8}, None),
    ],
)
def test_margins(tmp_path, fields, margin):
    path = write(tmp_path / "data.jsonl", [{**PAIR, "prompt": "0", "margin": 7}, {**PAIR, **fields}])
    records, dropped = read_records(path, margin=True)
    assert [r.margin for r in records] == [7.0] + [margin] * (margin is not None)
    assert dropped == ({"rejected scores higher": 1} if margin is None else {})
    # Nothing is read or checked that was not asked for.
    records, dropped = read_records(path)
    assert len(records) == 2 and not dropped and all(math.isnan(r.margin) for r in records)


def test_scores_follow_the_names_of_the_responses(tmp_path):
    path = write(tmp_path / "data.jsonl", [{**PAIR, "score_chosen": 8, "score_rejected": 6}])
    with pytest.raises(UserError, match=r"no record is left \(rejected scores higher: 1\)"):
        read_records(path, margin=True, responses=("rejected", "chosen"))
    path = write(tmp_path / "data.jsonl", [{"prompt": "p", "a": "x", "b": "y", "a_score": 1, "b_score": 4}])
    assert read_records(path, margin=True, responses=("b", "a"))[0][0].margin == 3.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"score_chosen": 3, "rejected_score": 2, "margin": None},
            "expected the field margin, or score_chosen and score_rejected, or chosen_score and rejected_score, "
            "or rating_chosen and rating_rejected, or chosen-rating and rejected-rating, "
            "found prompt, chosen, rejected, score_chosen, rejected_score",
        ),
        ({"margin": "1 "}, "field 'margin': expected a finite number (float32), found a string '1 '"),
        ({"margin": True}, "field 'margin': expected a finite number (float32), found a boolean True"),
        ({"margin": math.nan}, "field 'margin': expected a finite number (float32), found a number nan"),
        ({"margin": -math.inf}, "field 'margin'"),
        ({"margin": 10**400}, "field 'margin'"),  # no float
        ({"score_chosen": math.inf, "score_rejected": 1}, "field 'score_chosen'"),
        ({"chosen_score": 1, "rejected_score": [2]}, "field 'rejected_score'"),
        ({"margin": 1, "weight": 10**400}, "field 'weight': expected a positive finite number (float32)"),
    ],
)
def test_malformed_margins(tmp_path, fields, message):
    path = write(tmp_path / "data.jsonl", [{**PAIR, "margin": 1}, {**PAIR, **fields}])
    with pytest.raises(UserError) as caught:
        read_records(path, margin=True)
    assert str(caught.value).startswith(f"{path}, row 2: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_margins_are_for_pairs(tmp_path):
    for kind, options in {"unpaired": {"unpaired": True}, "supervised": {"responses": ("chosen",)}}.items():
        with pytest.raises(UserError, match=f"^margin: applies to pairs; leave it out for {kind} data$"):
            read(tmp_path, {**PAIR, "margin": 1}, margin=True, **options)


def test_each_reason_is_counted_and_the_rest_is_kept(tmp_path):
    rows = [
        PAIR,
        {"chosen": HH + " yes", "rejected": HH + " a\n\nHuman: q3\n\nAssistant: no"},
        {"chosen": [user("q"), assistant("c")], "rejected": [user("other"), assistant("r")]},
        {**PAIR, "rejected": "c"},
        {**PAIR, "rejected": " \n"},
        {"prompt": "q", "chosen": [assistant(" ")], "rejected": [assistant("r")]},
        {"prompt": "q", "chosen": [], "rejected": [assistant("r")]},
        {**PAIR, "prompt": "last"},
    ]
    records, dropped = read(tmp_path, *rows)
    assert [record[0] for record in records] == ["p", "last"]
    assert dropped == {"prompts differ": 2, "identical responses": 1, "empty response": 3}


def test_dropped_transcripts_are_those_that_another_way_of_counting_finds(tmp_path):
    """Rows of HH-RLHF's form; counted turn by turn, not by where a marker stands last."""
    rng = random.Random(0)

    def transcript(questions, answers):
        turns = zip(questions, answers, strict=True)
        return "".join(f"\n\nHuman: {question}\n\nAssistant:{answer}" for question, answer in turns)

    rows, wanted, kept = [], collections.Counter(), []
    for i in range(400):
        questions = [f"q{i}.{j}" for j in range(rng.randint(1, 3))]
        before = [f" a{j}" for j in range(len(questions) - 1)]
        last = [rng.choice([f" x{i}", f" y{i}", f" z{i}", "", " ", "\n"]) for _ in range(2)]
        others = [q if rng.random() < 0.9 else q + "?" for q in questions]
        rows.append({"chosen": transcript(questions, [*before, last[0]]),
                     "rejected": transcript(others, [*before, last[1]])})  # fmt: skip
        if questions != others:
            wanted["prompts differ"] += 1
        elif not last[0].split() or not last[1].split():
            wanted["empty response"] += 1
        elif last[0] == last[1]:
            wanted["identical responses"] += 1
        else:
            kept.append((transcript(questions, [*before, ""]), *last))
    assert min(wanted.values()) > 10
    assert read(tmp_path, *rows) == (kept, wanted)


def test_a_conversation_is_never_cut_by_the_other_sides_length(tmp_path):
    # The sides share `q` only: the rest of each is its response, of which the user's second message is read.
    chosen = [user("q"), assistant("a"), user("q2"), assistant("c")]
    rejected = [user("q"), assistant("b"), user("q3"), assistant("r"), user("q4"), assistant("s")]
    assert read(tmp_path, {"chosen": chosen, "rejected": rejected})[0] == [([user("q")], chosen[1:], rejected[1:])]
    rejected[0] = user("p")
    with pytest.raises(UserError, match=r"no record is left \(prompts differ: 1\)"):
        read(tmp_path, {"chosen": chosen, "rejected": rejected})


def test_where_weight_and_limit(tmp_path):
    path = write(tmp_path / "data.jsonl", [PAIR, {**PAIR, "rejected": "c"}, {**PAIR, "weight": 2}, PAIR])
    records, dropped = read_records(path, limit=2)
    assert [(r.weight, r.where) for r in records] == [(1.0, Place(str(path), 1)), (2.0, Place(str(path), 3))]
    assert dropped == {"identical responses": 1}


MALFORMED = {
    "bad JSON": (b'{"prompt": ', "expected one JSON object"),
    "bad UTF-8": (b'{"prompt": "\xff"}', "can't decode byte 0xff"),
    "array": (b'["p", "c"]', "expected a JSON object, found a list ['p', 'c']"),
    "no response": (
        b'{"prompt": "p", "chosen": "c"}',
        "expected prompt, chosen, rejected, found prompt, chosen; ",
    ),
    "null response": (b'{"prompt": "p", "chosen": null, "rejected": "r"}', "--config.data.columns=chosen=FIELD"),
    "number": (b'{"prompt": "p", "chosen": "c", "rejected": 3}', "field 'rejected'", "found a number 3"),
    "wrong prompt": (b'{"prompt": {"a": 1}, "chosen": "c", "rejected": "r"}', "field 'prompt'", "found an object"),
    "mixed sides": (
        b'{"prompt": "p", "chosen": "c", "rejected": [{"role": "assistant", "content": "r"}]}',
        "field 'rejected': expected a string, as in 'chosen', found a list",
    ),
    "implicit prompt": (b'{"chosen": "ab c", "rejected": "ab d"}', "expected a field 'prompt'", "HH-RLHF"),
    "no assistant in a transcript": (b'{"chosen": "\\n\\nHuman: a", "rejected": "\\n\\nHuman: b"}', "'prompt'"),
    "bad role": (
        b'{"prompt": "p", "chosen": [{"role": "bot", "content": "c"}], "rejected": []}',
        "field 'chosen[0].role': expected one of system, developer, user, assistant, tool (or human, gpt",
    ),
    "not role and content": (
        b'{"prompt": "p", "chosen": [{"speaker": "gpt", "value": "c"}], "rejected": []}',
        "field 'chosen[0]': expected a message with 'role' and 'content'",
    ),
    "content is no string": (
        b'{"prompt": "p", "chosen": [{"role": "assistant", "content": ["c"]}], "rejected": []}',
        "field 'chosen[0].content[0]': expected a part with 'type' and 'text', found a string 'c'",
    ),
    "ends with the user": (
        b'{"chosen": [{"role": "user", "content": "c"}], "rejected": [{"role": "user", "content": "c"}]}',
        "field 'chosen': expected a conversation with an answer of the assistant",
    ),
    "user inside a response": (
        b'{"prompt": [{"role": "user", "content": "p"}], "rejected": [{"role": "assistant", "content": "c"}],'
        b' "chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "c"}]}',
        "field 'chosen': expected an assistant message first",
    ),
    "another prompt beside conversations": (
        b'{"prompt": "Be brief.", "chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "c"}],'
        b' "rejected": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "r"}]}',
        "field 'prompt': expected a message of 'chosen'",
    ),
    "no message before": (
        b'{"prompt": [], "chosen": [{"role": "assistant", "content": "c"}], "rejected": []}',
        "field 'prompt': expected at least one message, found nothing",
    ),
    "lone surrogate": (b'{"prompt": "\\ud800", "chosen": "c", "rejected": "r"}', "field 'prompt': expected valid Uni"),
    "NaN weight": (b'{"prompt": "p", "chosen": "c", "rejected": "r", "weight": NaN}', "field 'weight'", "number nan"),
    "zero weight": (b'{"prompt": "p", "chosen": "c", "rejected": "r", "weight": 0}', "field 'weight'"),
    "boolean weight": (b'{"prompt": "p", "chosen": "c", "rejected": "r", "weight": true}', "field 'weight'"),
    "text weight": (b'{"prompt": "p", "chosen": "c", "rejected": "r", "weight": "2\\n"}', "field 'weight'"),
    "deep nesting": (b"[" * 100_000, "expected one JSON object"),
}


@pytest.mark.parametrize(("line", "parts"), [(v[0], v[1:]) for v in MALFORMED.values()], ids=list(MALFORMED))
def test_malformed_row_names_file_row_and_field(tmp_path, line, parts):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n\n" + line + b"\n")  # the blank line counts as a line
    with pytest.raises(UserError) as caught:
        read_records(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, row 3: ") and "\n" not in message
    assert all(part in message for part in parts), message


def test_supervised_row_without_a_response_names_what_is_there(tmp_path):
    with pytest.raises(UserError, match=r"row 1: expected one of the fields chosen, .* or text, found prompt, answer"):
        read(tmp_path, {"prompt": "p", "answer": "c"}, responses=("chosen",))


def test_truncated_gzip(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(PAIR) + "\n").encode() * 500)[:-12])
    with pytest.raises(UserError, match=r"data.jsonl.gz, row \d+: expected a readable file, found") as caught:
        read_records(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/missing/dir", "data/missing.json.gz", "~/missing"])
def test_missing_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^\S*missing\S*: no such file or directory$"):
        read_records(name)


def test_wrong_kind_of_file_and_no_rows(tmp_path):
    (tmp_path / "data.txt").write_text("prompt,chosen\n")
    with pytest.raises(UserError, match=r"data.txt: expected a .jsonl, .json, .csv, .tsv, .parquet or .arrow file"):
        read_records(tmp_path / "data.txt")
    with pytest.raises(UserError, match=r"no record is left \(there was no row\)"):
        read(tmp_path)
    with pytest.raises(UserError, match="one or two field names"):
        read(tmp_path, PAIR, responses=("a", "b", "c"))


def test_gzip_parquet_and_byte_order_mark_read_alike(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"chosen": [user("q"), assistant(f"c{i}")], "rejected": [user("q"), assistant("r")]} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(lines))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    paths = [tmp_path / f"data.{suffix}" for suffix in ("jsonl", "jsonl.gz", "parquet")]
    results = [read_records(path)[0] for path in paths]
    assert [r.chosen[0]["content"] for r in results[0]] == ["c0", "c1", "c2"]
    assert [[r._replace(where=Place()) for r in result] for result in results[1:]] == [
        [r._replace(where=Place()) for r in results[0]]
    ] * 2
    assert results[2][1].where == Place(str(paths[2]), 2)
    paths[2].write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"data.parquet, row 1: expected a readable file"):
        read_records(paths[2])


@pytest.mark.parametrize(
    ("files", "split", "found"),
    [
        (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["b.jsonl", "a.jsonl"], "train", ["a.jsonl", "b.jsonl"]),
        (
            ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
            "train",
            [
                "data/train-00000-of-00002.jsonl",
                "data/train-00001-of-00002.jsonl",
            ],
        ),
        (["train_prefs-0.jsonl", "train_sft-0.jsonl"], "train_prefs", ["train_prefs-0.jsonl"]),
        (["train/x.jsonl", "test/x.jsonl", "README.md"], "train", ["train/x.jsonl"]),
        # Never another split than the one asked for.
        (["test.jsonl"], "train", None),
        (["train_prefs-0.jsonl", "train_sft-0.jsonl"], "train", None),
        (["a.jsonl"], "test", None),
        (["README.md"], "train", None),
    ],
)
def test_a_directory_gives_the_files_of_the_split(tmp_path, files, split, found):
    for name in files:
        write(tmp_path / name, [PAIR])
    if found is None:
        with pytest.raises(UserError, match=rf"no file of the split '{split}', found .*; name another split or a file"):
            read_records(tmp_path, split=split)
    else:
        records, _ = read_records(tmp_path, split=split)
        assert [r.where for r in records] == [Place(str(tmp_path / name), 1) for name in found]


def test_saved_data_sets_and_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([PAIR, {**PAIR, "prompt": "p2"}])
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "two")
    assert [r.prompt for r in read_records(tmp_path / "one")[0]] == ["p", "p2"]
    assert [r.prompt for r in read_records(tmp_path / "two", split="test")[0]] == ["p2"]
    with pytest.raises(UserError, match="no split 'validation', found train, test"):
        read_records(tmp_path / "two", split="validation")

    calls = []

    def load_dataset(name, subset=None, *, split, data_dir=None):
        calls.append((name, subset, split, data_dir))
        if name == "no/such":
            raise ConnectionError("offline\nsecond line")
        if subset:
            raise ValueError("BuilderConfig not found")  # HH-RLHF's subsets are folders
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records, _ = read_records("Anthropic/hh-rlhf:harmless-base", split="test")
    assert records[1].where == Place("Anthropic/hh-rlhf:harmless-base", 2)
    assert calls == [
        ("Anthropic/hh-rlhf", "harmless-base", "test", None),
        ("Anthropic/hh-rlhf", None, "test", "harmless-base"),
    ]
    with pytest.raises(UserError, match=r"^no/such: cannot load the split 'train': offline$"):
        read_records("no/such")


def test_split_by_prompt_shares_no_prompt_and_is_stable(tmp_path):
    rows = [{"prompt": f"p{i % 200}", "chosen": f"c{i}", "rejected": "r"} for i in range(400)]
    records, _ = read_records(write(tmp_path / "data.jsonl", rows))
    train, held_out = split_by_prompt(records, 0.25, seed=1)
    assert sorted(train + held_out) == sorted(records)
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert 60 <= len(held_out) <= 140  # 100 expected, standard deviation 12
    assert split_by_prompt(records[:100], 0.25, seed=1)[1] == [r for r in records[:100] if r in held_out]
    assert split_by_prompt(records, 0.25, seed=2)[1] != held_out
    assert split_by_prompt(records, 0.0, seed=1) == (records, [])
    # Growing the held-out share keeps what was held out before.
    assert set(held_out) <= set(split_by_prompt(records, 0.5, seed=1)[1])
    with pytest.raises(UserError, match="fraction"):
        split_by_prompt(records, 1.0, seed=1)


def test_flipped_labels_are_nested_counted_and_a_function_of_the_pair():
    records = [Record(f"p{i}", f"good {i}", f"bad {i}") for i in range(2000)]
    few, many = (flip_labels(records, share, 0) for share in (0.1, 0.4))
    for (flipped, count), share in ((few, 0.1), (many, 0.4)):
        swapped = {i for i, record in enumerate(flipped) if record.chosen.startswith("bad")}
        assert len(swapped) == count and abs(count / 2000 - share) < 0.03
        assert all({a.chosen, a.rejected} == {b.chosen, b.rejected} for a, b in zip(flipped, records, strict=True))
    assert {r.prompt for r in few[0] if r.chosen.startswith("bad")} < {
        r.prompt for r in many[0] if r.chosen.startswith("bad")
    }
    assert flip_labels(records[1000:], 0.4, 0)[0] == many[0][1000:]
    assert flip_labels(records, 0.4, 1)[0] != many[0]


def test_prompts_of_any_format_come_once(tmp_path):
    rows = [
        {"prompt": "A", "id": 7},
        {"prompt": [user("hi")]},
        {"prompt": "B", "chosen": " x", "rejected": " y"},
        {"chosen": [user("C"), assistant("x")], "rejected": [user("C"), assistant("y")]},
        {"messages": [user("D"), assistant("x")]},
        {"prompt": "A", "completion": " again"},
        {"prompt": "E", "chosen": " x", "rejected": " x"},
        {"text": "no prompt"},
        {"prompt": "F"},
        {"prompt": "G"},
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    prompts, dropped = read_prompts(file, limit=6)
    assert [one.prompt for one in prompts] == ["A", [user("hi")], "B", [user("C")], [user("D")], "F"]
    assert [one.id for one in prompts] == ["7", "", "", "", "", ""]
    assert prompts[5].where == Place(str(file), 9)
    assert sum(dropped.values()) == 3
    assert dropped["the prompt of an earlier row"] == dropped["no prompt"] == 1
    with pytest.raises(UserError, match=r"row 1: field 'prompt': expected a string or a list of messages"):
        read_prompts(write(tmp_path / "bad.jsonl", [{"prompt": 7}]))
    with pytest.raises(UserError, match="no prompt is left"):
        read_prompts(write(tmp_path / "none.jsonl", [{"text": "x"}]))


def test_what_a_row_tells_the_chat_template(tmp_path):
    """An object, its JSON, or Parquet's object with nulls; of prompts alone too."""
    row = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Yes"}]}
    row["rejected"] = [{"role": "assistant", "content": "No"}]
    given = ({"enable_thinking": False}, '{"enable_thinking": false}', {"enable_thinking": False, "x": None}, None)
    file = write(tmp_path / "told.jsonl", [{**row, "chat_template_kwargs": told} for told in given])
    expected = [(("enable_thinking", False),)] * 3 + [()]
    assert [record.chat_template_kwargs for record in read_records(file)[0]] == expected
    prompts, dropped = read_prompts(file)
    assert [prompt.chat_template_kwargs for prompt in prompts] == expected[2:]  # told the same, it is the same prompt
    assert dropped == {"the prompt of an earlier row": 2}
    wrong = (
        ([1], "expected an object, or its JSON"),
        ("{", "expected JSON"),
        ({"tools": []}, "a string 'tools' is no var"),
    )
    for told, message in wrong:
        with pytest.raises(UserError, match=f"row 1: field 'chat_template_kwargs': {message}"):
            read_records(write(tmp_path / "bad.jsonl", [{**row, "chat_template_kwargs": told}]))
    plain = {"prompt": "a", "chosen": "b", "rejected": "c", "chat_template_kwargs": given[0]}
    with pytest.raises(UserError, match="no chat template for plain text"):
        read_records(write(tmp_path / "plain.jsonl", [plain]))
