import json

import pytest

from prefalign_jax.models.endings import end_of_turn, generation_config, split_stops, stop_ids, stored_ends
from prefalign_jax.types import UserError


class Template:
    """A tokenizer as far as the end of a turn goes."""

    def __init__(self, after: str, eos: int | None = 0):
        self.chat_template, self.after = "a template", after
        self.bos_token_id, self.eos_token_id, self.pad_token_id = None, eos, None
        token = type("Token", (), {})
        self.added_tokens_decoder = {}
        for i, (text, special) in enumerate([("</s>", True), ("<|end", True), ("<|end|>", True), ("<br>", False)]):
            self.added_tokens_decoder[i] = token()
            self.added_tokens_decoder[i].content, self.added_tokens_decoder[i].special = text, special

    def convert_ids_to_tokens(self, i):
        return i

    def apply_chat_template(self, chat, tokenize):
        return "".join(f"[{m['role']}]{m['content']}{self.after}" for m in chat)


@pytest.mark.parametrize(
    ("after", "turn", "eos"),
    [
        ("<|end|>\n", 2, [0, 2]),  # the longest token that fits, not its prefix
        ("\n<|end|>", 2, [0, 2]),
        ("</s>\n", 0, 0),
        (" </s><|end|>", 0, 0),
        ("\n\nHuman:", None, 0),
        ("<br>", None, 0),
        ("", None, 0),
    ],
)
def test_generation_ends_at_eos_and_at_the_end_of_a_turn(after, turn, eos):
    assert end_of_turn(Template(after)) == turn
    assert generation_config(Template(after)) == {"eos_token_id": eos}


def test_no_template_and_no_eos():
    tokenizer = Template("<|end|>", eos=None)
    assert generation_config(tokenizer) == {"eos_token_id": 2}
    tokenizer.chat_template = None
    assert generation_config(tokenizer) == {}


def says(directory, generation=None, config=None):
    for name, fields in (("generation_config.json", generation), ("config.json", config)):
        if fields is not None:
            (directory / name).write_text(json.dumps(fields))
    return directory


@pytest.mark.parametrize(
    ("generation", "config", "stored", "stops"),
    [
        (None, None, (), (0, 2)),
        ({"eos_token_id": [9, 7]}, None, (9, 7), (9, 7, 0, 2)),
        (None, {"eos_token_id": 7}, (7,), (7, 0, 2)),
        ({"eos_token_id": 9}, {"eos_token_id": 7}, (9,), (9, 7, 0, 2)),
        ({}, {"eos_token_id": 7}, (), (7, 0, 2)),
        ({"eos_token_id": 2}, {"eos_token_id": None}, (2,), (2, 0)),
    ],
)
def test_every_place_that_names_an_end_is_read(generation, config, stored, stops, tmp_path):
    says(tmp_path, generation, config)
    assert stored_ends(tmp_path) == stored
    assert stop_ids(tmp_path, Template("<|end|>")) == stops
    ends = generation_config(Template("<|end|>"), tmp_path)["eos_token_id"]
    assert ends == list(dict.fromkeys([*stored, 0, 2]))


@pytest.mark.parametrize("value", [["a"], "a", [1.0], True])
def test_an_end_that_is_no_id_is_refused(value, tmp_path):
    with pytest.raises(UserError, match="config.json: eos_token_id: expected a token id"):
        stop_ids(says(tmp_path, config={"eos_token_id": value}), Template(""))


def test_a_bases_settings_and_ids_are_kept(tmp_path):
    settings = {"temperature": 0.6, "top_p": 0.9, "bos_token_id": 5, "suppress_tokens": None}
    found = generation_config(Template("<|end|>"), says(tmp_path, settings, {"pad_token_id": 8}))
    assert found == settings | {"eos_token_id": [0, 2], "pad_token_id": 8}


def test_a_stop_text_that_is_a_special_token_is_a_stop_token():
    assert split_stops(["<|end|>", "Human:", "</s>", "<br>"], Template("")) == ((2, 0), ("Human:", "<br>"))
    with pytest.raises(UserError, match="holds the special token '</s>' and more; write '</s>'"):
        split_stops(["</s>\n"], Template(""))
