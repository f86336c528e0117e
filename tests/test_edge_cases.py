"""Every awkward pair that TRL 1.16's data path was run on (tests/goldens/trl/edge_cases.json): what ours does, and why.

`same` is checked against TRL's own tokens; where ours differs, the reason stands beside it.
"""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers

from prefalign_jax.data.chat import load_tokenizer, tokenize_records
from prefalign_jax.data.records import read_records
from prefalign_jax.types import UserError

GOLDENS = Path(__file__).parent / "goldens" / "trl"
TRL = json.loads((GOLDENS / "edge_cases.json").read_text(encoding="utf-8"))
EOS, BOS = "<|im_end|>", "<|im_start|>"
SKY, BLUE, NO, GARDEN = "What colour is the sky?", " It is blue.", " No.", "Describe the garden. " * 12
HEADER = f"<|im_start|>user\n{SKY}{EOS}\n<|im_start|>assistant\n"


class Case(NamedTuple):
    """Rows of a file, and what becomes of them here."""

    rows: list
    ours: object  # [(prompt, chosen, rejected)] of those that are left, as text
    dropped: dict = {}
    why: str = ""  # it differs from TRL; '' means the same tokens as TRL
    options: dict = {}
    tokenizer: str | None = None  # how it wraps a text


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def row(prompt=SKY, chosen=BLUE, rejected=NO):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat(prompt=SKY, chosen="It is blue.", rejected="No."):
    messages = [user(prompt)] if isinstance(prompt, str) else prompt
    return row(messages, [assistant(chosen)], [assistant(rejected)])


def hh(answer):
    return f"\n\nHuman: {SKY}\n\nAssistant: I think it is{answer}"


PLAIN = [(SKY, BLUE + EOS, NO + EOS)]
CHAT = [(HEADER, f"It is blue.{EOS}", f"No.{EOS}")]
LONG = row(GARDEN)
EMPTY = "an empty response says nothing but 'end', and ORPO's mean over its tokens rests on that one token"
SAME = "a pair without a preference has gradient 0 under DPO and is an SFT example under ORPO; neither was meant"
CONTINUED = "the template would close the begun turn and open another; the answer goes on where the prompt stopped"
INSIDE = "the common prefix of both strings reaches into the answers; the prompt ends with the last '\\n\\nAssistant:'"
NO_PROMPT = "nothing predicts the first token of a response, yet TRL counts it as trained"

# Name without the trainer -> {trainer: case}.
CASES: dict[str, dict[str, Case]] = {
    "conversational, ends of sequences": {
        "dpo": Case([chat()], CHAT, why="the newline after the end of the turn is no part of the answer"),
        "orpo": Case([chat()], CHAT, why="one end of sequence is enough; TRL adds another"),
    },
    "standard": {"dpo": Case([row()], PLAIN), "orpo": Case([row()], PLAIN)},
    "prompt longer than max_length": {
        "dpo": Case([LONG, row()], PLAIN, {"too long": 1}, options={"max_length": 60}),
        "orpo": Case([LONG, row()], PLAIN, {"too long": 1}, "cut to nothing, its loss is NaN", {"max_length": 60}),
    },
    "only rows with too long prompts": {
        "dpo": Case([LONG], [], {"too long": 1}, options={"max_length": 60}),
        "orpo": Case([LONG], [], {"too long": 1}, "cut to nothing, its loss is NaN", {"max_length": 60}),
    },
    "prompt leaves room for 2 completion tokens": {
        "dpo": Case(
            [row()], [], {"too long": 1}, "half an answer is another answer; cut only where asked to", {"max_length": 8}
        ),  # fmt: skip
        "orpo": Case([row()], [(SKY, " It is", NO)], options={"max_length": 8, "too_long": "truncate_response"}),
    },
    "empty completions, standard": {
        name: Case([row(rejected="")], [], {"empty response": 1}, EMPTY) for name in ("dpo", "orpo")
    },
    "empty assistant content, conversational": {
        name: Case([chat(rejected="")], [], {"empty response": 1}, EMPTY) for name in ("dpo", "orpo")
    },
    "chosen == rejected, explicit prompt": {
        name: Case([row(rejected=BLUE)], [], {"identical responses": 1}, SAME) for name in ("dpo", "orpo")
    },
    "empty prompt": {name: Case([row("")], [], {"no prompt": 1}, NO_PROMPT) for name in ("dpo", "orpo")},
    "BPE merge across boundary (prompt ends with a space)": {
        name: Case([row(SKY + " ", BLUE.strip(), NO.strip())], PLAIN) for name in ("dpo", "orpo")
    },
    "BPE merge inside a word": {
        name: Case(
            [row("What colour is the s", "ky? It is blue.", "ea? No.")],
            [("What colour is the", f" sky? It is blue.{EOS}", f" sea? No.{EOS}")],
        )
        for name in ("dpo", "orpo")
    },
    "prompt ends with assistant turn (continuation)": {
        name: Case(
            [chat([user("Sky?"), assistant("It is")], " blue.", " No.")],
            [(f"<|im_start|>user\nSky?{EOS}\n<|im_start|>assistant\nIt is", f" blue.{EOS}", f" No.{EOS}")],
            why=CONTINUED,
        )
        for name in ("dpo", "orpo")
    },
    "HH-RLHF raw strings (no prompt column)": {
        name: Case(
            [{"chosen": hh(" blue."), "rejected": hh(" black, I don't know.")}],
            [
                (
                    f"\n\nHuman: {SKY}\n\nAssistant:",
                    f" I think it is blue.{EOS}",
                    f" I think it is black, I don't know.{EOS}",
                )
            ],
            why=INSIDE,
        )
        for name in ("dpo", "orpo")
    },
    "implicit prompt, chosen == rejected": {
        name: Case([{"chosen": hh(" blue."), "rejected": hh(" blue.")}], [], {"identical responses": 1}, SAME)
        for name in ("dpo", "orpo")
    },
    "explicit prompt that is ALSO inside chosen/rejected": {
        name: Case([row(chosen=SKY + BLUE, rejected=SKY + NO)], [(SKY, SKY + BLUE + EOS, SKY + NO + EOS)])
        for name in ("dpo", "orpo")
    },
    "string prompt + conversational chosen/rejected (ultrafeedback_binarized style)": {
        name: Case(
            [row("Sky?", [user("Sky?"), assistant("Blue.")], [user("Sky?"), assistant("No.")])],
            [(f"<|im_start|>user\nSky?{EOS}\n<|im_start|>assistant\n", f"Blue.{EOS}", f"No.{EOS}")],
            why=why,
        )
        for name, why in (("dpo", "TRL fails with a TypeError"), ("orpo", "one end of sequence is enough"))
    },
    "tokenizer that prepends BOS": {
        name: Case([row()], [(BOS + SKY, BLUE + EOS, NO + EOS)], tokenizer=f"{BOS} $A") for name in ("dpo", "orpo")
    },
    "tokenizer that appends EOS": {
        "dpo": Case([row()], PLAIN, why="TRL adds its own to the tokenizer's", tokenizer=f"$A {EOS}"),
        "orpo": Case([row()], PLAIN, tokenizer=f"$A {EOS}"),
    },
}
CASES = {f"{trainer}: {name}": case for name, both in CASES.items() for trainer, case in both.items()}
CASES["dpo keep_end: long prompt"] = Case(
    [LONG],
    [(" Describe the garden. ", BLUE + EOS, NO + EOS)],
    why="a prompt too long loses its beginning for good, not in the collator, so lengths and statistics are the truth",
    options={"max_length": 11, "too_long": "truncate_prompt"},
)
# Strings without a prompt: TRL takes their longest common prefix for it.
GUESSED = {
    "extract_prompt: one string is a prefix of the other": ("abc", "abcd"),
    "extract_prompt: identical strings": ("abc", "abc"),
    "extract_prompt: first char differs": ("x y", "z y"),
    "extract_prompt: empty string": ("", "abc"),
}


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    def load(single):
        tokenizer = load_tokenizer(GOLDENS)
        if single is None:
            return tokenizer
        path = tmp_path_factory.mktemp("tokenizer")
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in single.split() if token != "$A"]
        wrap = tokenizers.processors.TemplateProcessing(single=single, special_tokens=special)
        tokenizer.backend_tokenizer.post_processor = wrap
        tokenizer.bos_token = BOS if single.startswith(BOS) else None
        tokenizer.save_pretrained(path)
        return load_tokenizer(path)

    loaded = {}
    return lambda single: loaded.setdefault(single, load(single))


def of_trl(name):
    """TRL's rows as ours: texts with their numbers of tokens."""
    found = TRL[name]
    if "error" in found:
        return found["error"]
    return [
        tuple(map(tuple, (one["prompt_ids"], one["chosen_ids"], one["rejected_ids"])))
        if "prompt_ids" in one
        else tuple(map(tuple, (one["chosen"]["prompt"], one["chosen"]["completion"], one["rejected"]["completion"])))
        for one in found["rows"]
    ]


@pytest.mark.parametrize("name", CASES)
def test_what_becomes_of_an_awkward_pair(tmp_path, variant, name):
    case = CASES[name]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in [*case.rows, row("What", " is", " No")]))
    records, dropped = read_records(file)
    tokenizer = variant(case.tokenizer)
    pairs, reasons = tokenize_records(records, tokenizer, **{"max_length": 256, **case.options})
    assert {**dropped, **reasons} == case.dropped
    *found, _ = [
        tuple((tokenizer.decode(ids), len(ids)) for ids in (pair.prompt, pair.chosen, pair.rejected)) for pair in pairs
    ]
    assert [tuple(text for text, _ in pair) for pair in found] == case.ours
    assert (found == of_trl(name)) == (not case.why)


def test_keep_end_gives_what_trls_dpo_trains(tmp_path, variant):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(chat()))
    tokenizer = variant(None)
    ((pair,), _) = tokenize_records(read_records(file)[0], tokenizer, max_length=256, keep_end=True)
    parts = tuple((tokenizer.decode(ids), len(ids)) for ids in (pair.prompt, pair.chosen, pair.rejected))
    assert [parts] == of_trl("dpo: conversational, ends of sequences")


@pytest.mark.parametrize("name", GUESSED)
def test_a_prompt_is_never_guessed(tmp_path, name):
    """Where two strings happen to part says nothing of where the question ends: the row must say so."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(dict(zip(("chosen", "rejected"), GUESSED[name], strict=True))))
    with pytest.raises(UserError, match="row 1: expected a field 'prompt', or an HH-RLHF transcript"):
        read_records(file)


def test_every_edge_case_is_here():
    assert CASES.keys() | GUESSED.keys() == TRL.keys()
