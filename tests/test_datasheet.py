import hashlib
import json

import numpy as np
import pytest

from prefalign_jax.config import defaults
from prefalign_jax.data.cleaning import Stage
from prefalign_jax.data.datasheet import ReadFrom, as_markdown, make_datasheet, read_from, write_datasheet
from prefalign_jax.data.pipeline import make_pair_set
from prefalign_jax.experiment import read
from prefalign_jax.types import Pair


def pairs_of(lengths):
    return [Pair(*(np.ones(n, np.int32) for n in three), label=bool(i % 2)) for i, three in enumerate(lengths)]


class Tokenizer:
    chat_template, bos_token, eos_token = "{{ x }}", None, "<eos>"

    def __len__(self):
        return 99


def sheet_of(loss="dpo", lengths=((2, 3, 4), (2, 9, 5), (5, 3, 3)), chat=True, **fields):
    config = defaults(loss)
    config.model.path, config.data.path = "somewhere/model", "pairs.jsonl"
    config.update_from_flattened_dict(fields)
    experiment = read(config).fitted(4096)
    data = make_pair_set(pairs_of(lengths), 2, layout=experiment.layout)
    stages = {
        "training": [Stage("read", 5, 3, {"empty response": 2}), Stage("encoding", 3, 3, {}, {"wrong encoding": 1})]
    }
    sources = [ReadFrom("/home/someone/pairs.jsonl", "training", 3, "ab" * 32, "file", 17)]
    about = dict(stages={**stages, "held out": []}, steps=experiment.cleaning, kind=experiment.loss.kind, chat=chat)
    mixture = [{"source": "pairs.jsonl", "pairs": 3, "share": 1.0, "dropped": {"too long": 4}}]
    about |= dict(read=sources, mixture=mixture, tokenizer=Tokenizer(), digest="cd" * 32)
    return make_datasheet(experiment.plain, data, **about)


def test_a_file_is_named_with_the_hash_of_its_bytes(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("whatever")
    digest = hashlib.sha256(b"whatever").hexdigest()
    assert read_from(str(file), "train", "training", 3) == ReadFrom(str(file), "training", 3, digest, "file", 8)
    # A directory has no bytes of its own: what is read of it decides.
    first = read_from(str(tmp_path), "train", "training")
    assert (first.of, first.bytes, first.records) == ("content", None, None)
    file.write_text("whatever else")
    assert read_from(str(tmp_path), "train", "training").sha256 != first.sha256


def test_the_sheet_counts_what_is_trained():
    sheet = json.loads(json.dumps(sheet_of()))
    training = sheet["training"]
    assert (training["count"], training["kind"], training["trained_tokens"]) == (3, "pairs", 15 + 12)
    assert training["tokens"]["prompt"]["sum"] == 9 and training["tokens"]["rejected"]["most"] == 5
    assert [training["length_bias"][name] for name in ("longer", "shorter", "equal", "rule")] == [1, 1, 1, "longer"]
    for stage in sheet["stages"]["training"]:
        assert stage["before"] == stage["after"] + sum(stage["dropped"].values())


def test_unpaired_completions_are_told_apart():
    tokens = sheet_of("kto", lengths=((2, 3, 1), (2, 9, 1), (2, 4, 1)))["training"]["tokens"]
    assert (tokens["desirable"]["sum"], tokens["undesirable"]["sum"]) == (9, 7)
    assert "rejected" not in tokens and "length_bias" not in sheet_of("kto")["training"]
    assert list(sheet_of("sft")["training"]["tokens"]) == ["prompt", "chosen"]


@pytest.mark.parametrize(
    ("fields", "chat", "name"),
    [({}, True, "the tokenizer's own"), ({"data.chat_template": "chatml"}, True, "chatml"), ({}, False, None)],
)
def test_the_template_is_named_where_it_was_used(fields, chat, name):
    template = sheet_of(chat=chat, **fields)["template"]
    assert template["name"] == name and (template["text"] is None) == (name is None)


def test_the_sheet_is_written_for_programs_and_people(tmp_path):
    sheet = sheet_of(**{"data.clean": "encoding,lengths", "data.cleaning.lengths.least_words": 2})
    write_datasheet(tmp_path, sheet)
    assert json.loads((tmp_path / "datasheet.json").read_text()) == json.loads(json.dumps(sheet))
    text = (tmp_path / "datasheet.md").read_text()
    assert text.startswith("# Training data\n") and text.endswith("\n")
    for part in (
        "abab",
        "2 empty response",
        "1 wrong encoding (changed)",
        "lengths least_words=2.",
        "cdcd",
        "0.500",
        "| pairs.jsonl | 3 | 100.0% | 4 too long |",
    ):
        assert part in text, part
    assert "/home/someone" not in text, "where the file lay on the machine means nothing to a reader"
    tables = [block.split("\n") for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
    assert as_markdown(sheet, level=3).startswith("### Sources\n")


def test_text_from_data_cannot_break_a_table():
    sheet = sheet_of()
    sheet["sources"][0]["name"] = "a|b\n# c"
    assert "| a\\|b # c |" in as_markdown(sheet)
