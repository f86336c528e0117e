"""No field of a row is lost in silence: whatever of it has a meaning changes what is trained, or is said."""

import copy
import json
import math

import pytest

from conftest import longer
from prefalign_jax.data.chat import iter_pairs
from prefalign_jax.data.fields import MEANINGS, meaning_of
from prefalign_jax.data.memory import MemoryRows
from prefalign_jax.data.pairs import digest_of_pair
from prefalign_jax.data.reading import Tally
from prefalign_jax.data.records import iter_prompts, iter_records
from prefalign_jax.types import UserError
from published_rows import (
    ALPACA,
    ALPACA_EVAL,
    CALL,
    KTO,
    PAIRS,
    PANDALM,
    SHAREGPT,
    WEATHER,
    Q,
    assistant,
    helpsteer,
    user,
)

KINDS = {
    "pairs": {},
    "scored pairs": {"margin": True},
    "unpaired": {"unpaired": True},
    "supervised": {"responses": ("chosen",)},
    "supervised, the last answer": {"responses": ("chosen",), "train_on": "last"},
    "all pairs": {"pairs": "all"},
    "groups": {"groups": True},
}
# A template that writes all of a message.
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if mood %}{{ mood }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.name %}({{ m.name }}){% endif %}{% if m.tool_call_id %}[{{ m.tool_call_id }}]{% endif %}"
    "{% if m.reasoning_content %}<{{ m.reasoning_content }}>{% endif %}"
    "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BESIDE = {
    "weight": 2.0,
    "tools": [WEATHER],
    "system": "Be brief.",
    "history": [["Hi.", "Hello."]],
    "chat_template_kwargs": {"mood": "calm"},
    "note": {"by": "someone", "tags": ["a"]},
}
MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "Rome?"}], "name": "Ada"},
    {**CALL, "reasoning_content": "Look it up."},
    {"role": "tool", "content": "Sun.", "tool_call_id": "1", "cost": 3},
]
ROWS = {name: row for name, (_, row, *_) in PAIRS.items()}
PLAIN = (
    "Anthropic/hh-rlhf",
    "stanfordnlp/SHP",
)  # text alone; `history` is its prompt
ROWS |= {f"{name}, with more": {**row, **BESIDE} for name, row in ROWS.items() if name not in PLAIN}
ROWS |= {
    "PandaLM": PANDALM,
    "AlpacaEval": {**ALPACA_EVAL, "weight": 0.5},
    "HelpSteer": helpsteer(Q, "Air scatters blue.", 4),
    "Alpaca": {**ALPACA, **BESIDE},
    "ShareGPT": {**SHAREGPT, **BESIDE, "label": True},
    "KTO": {**KTO, **BESIDE, "kto_tag": None},
    "LLaMA-Factory's KTO": {"instruction": Q, "input": "x", "output": "Air.", "kto_tag": False},
    "tool calls": {"messages": [*MESSAGES, assistant("Sun.")], "tools": json.dumps([WEATHER])},
    "tool calls in pairs": {"prompt": MESSAGES, "chosen": CALL, "rejected": "[]", "tools": [WEATHER]},
    "strings of JSON": {side: json.dumps([user(Q), assistant(side)]) for side in ("chosen", "rejected")},
    "strings": {"prompt": Q, "chosen": " Air.", "rejected": " Paint.", "label": None, "weight": "2", "margin": "0.5"},
    "a group": {"prompt": Q, "responses": ["Air.", "Paint.", "Water."], "scores": [2, 1, 1.5], "weight": 2},
    "a group of messages": {
        "prompt": [user("Rome?")],
        "responses": [[assistant("Sun.")], [CALL], [assistant("[]")]],
        "ranks": [1, 3, 2],
        **BESIDE,
    },
    "comparisons": {
        "prompt": Q,
        "responses": ["Air.", "Paint.", "Water."],
        "comparisons": [{"chosen": 0, "rejected": 2, "by": "Ada"}, {"chosen": 2, "rejected": 1}],
    },
    "a whole text": {"text": "Air scatters blue.", "weight": 3},
}


def leaves(value, path=()):
    """(path, value) of whatever is no list or object."""
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(one, (*path, key))
    elif value is not None and not (isinstance(value, float) and math.isnan(value)):
        yield path, value


def changed(row, path, value):
    """The row with another value at a place."""
    row = copy.deepcopy(row)
    place = row
    for key in path[:-1]:
        place = place[key]
    text = isinstance(value, str)
    place[path[-1]] = (
        (value.replace("e", "ee", 1) if "e" in value else value + "!")
        if text
        else (not value if isinstance(value, bool) else value + 1)
    )
    return row


def read(*rows, **kind):
    tally = Tally()
    return list(iter_records(MemoryRows("rows", rows), tally, **kind)), tally


def trained(row, **kind):
    """What is trained of a row, or why nothing is; of records that are tokenized later, the records."""
    try:
        records, tally = read(row, **kind)
    except UserError as error:
        return str(error), Tally()
    return records or dict(tally.dropped), tally


def digests(items, tokenizer):
    """Lists of records as what is trained of them; others as they are."""
    records = [record for item in items if isinstance(item, list) for record in item]
    pairs = (pair for _, pair in iter_pairs(records, tokenizer, max_length=4096))
    pairs = (pair if isinstance(pair, str) else digest_of_pair(pair) for pair in pairs)
    pairs = (f"{pair} {record.others} {record.scores}" for pair, record in zip(pairs, records, strict=True))
    return [[next(pairs) for _ in item] if isinstance(item, list) else item for item in items]


# Parts that are reported under a name of their own.
APART = {
    ("conversations", 2): "conversations[] after the last answer",
    ("completions", 2): "completions[] between best and worst",
    ("completions", 3): "completions[] without a score",
    **dict.fromkeys(((name, 2) for name in ("responses", "scores", "ranks")), "responses[] between best and worst"),
    ("answers", 0): "answers[] between best and worst",
    **{
        (f"conversation_{side}", number): f"conversation_{side}[] of a later turn" for side in "ab" for number in (2, 3)
    },
}
# Fields of published formats -> what they become in the common one, under whose name they are reported.
BECOMES = {
    **dict.fromkeys(("response_k", "rejected_response", "rejected_conversations", "non_preferred_output"), "rejected"),
    **dict.fromkeys(("human_ref_A", "response_0", "response_1", "response2", "output", "summaries"), "rejected"),
    **dict.fromkeys(("output_1", "response_B", "response 1", "targets", "conversation_a"), "rejected"),
    **dict.fromkeys(("score_ratio", "preference_strength", "overall_preference", "completions", "answers"), "margin"),
    **dict.fromkeys(("scores", "ranks", "comparisons"), "margin"),
    "responses": "rejected",
}


def reported(path, unread):
    """Whether a place of a row is among the names of what is not used."""
    names = [str(part) for part in path if isinstance(part, str)]
    said = {
        path[0],
        *names[1:2] * (path[0] == "input"),
        f"message.{names[-1]}",
        f"{path[0]}[].{names[min(1, len(names) - 1)]}",
        BECOMES.get(path[0]),
    }
    return not {*said, APART.get(path[:2])}.isdisjoint(unread)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("name", [longer(name) if name.endswith("with more") else name for name in ROWS])
def test_a_part_that_changes_changes_what_is_trained_or_is_reported(name, tokenizer):
    row, kinds = ROWS[name], 0
    for kind in KINDS.values():
        whole, tally = trained(row, **kind)
        if not isinstance(whole, list):
            continue
        kinds += 1
        places = [*leaves(row)]
        before, *after = digests([whole, *(trained(changed(row, *place), **kind)[0] for place in places)], tokenizer)
        for (path, _), now in zip(places, after, strict=True):
            assert now != before or reported(path, tally.unread), (kind, path)
    assert kinds


PAIR = {"prompt": [user(Q)], "chosen": [assistant("Air.")], "rejected": [assistant("Paint.")]}
BASE = {
    "pairs": PAIR,
    "unpaired": {"prompt": [user(Q)], "completion": [assistant("Air.")], "label": True},
    "supervised": {"prompt": [user(Q)], "completion": [assistant("Air.")]},
}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("pairs", {"system_prompt": "Be brief."}),
        ("pairs", {"System Message": "Be brief."}),
        ("pairs", {"label": True}),
        ("pairs", {"label": False, "weight": 2}),
        ("pairs", {"completion": "Water."}),
        ("pairs", {"question": "And the sea?"}),
        ("pairs", {"messages": [user("And the sea?")]}),
        ("pairs", {"sample_weight": 0.5}),
        ("pairs", {"loss_mask": [0, 1]}),
        ("pairs", {"images": ["sky.png"]}),
        ("pairs", {"preference_score": 8.0}),
        ("pairs", {"functions": [{"name": "f"}]}),
        ("unpaired", {"answer": "Water."}),
        ("unpaired", {"kto_tag": False}),
        ("unpaired", {"chat_history": [user("Hi.")]}),
        ("supervised", {"label": False}),
        ("supervised", {"reasoning": "Light."}),
        ("supervised", {"response": "Water."}),
        ("supervised", {"text": "Water."}),
        ("supervised", {"context": "Physics."}),
    ],
)
def test_a_field_with_a_meaning_that_nobody_reads_stops_the_run_and_may_be_ignored(kind, fields):
    name = next(iter(fields))
    with pytest.raises(UserError) as caught:
        read(BASE[kind], {**BASE[kind], **fields}, **KINDS[kind])
    said = str(caught.value)
    assert said.startswith(f"rows, row 2: field {name!r} holds ") and f"data.ignore={name}" in said and len(said) < 220
    records, tally = read({**BASE[kind], **fields}, **KINDS[kind], ignore=(name,))
    assert len(records) == 1 and tally.unread == {name: 1}
    # What says nothing is nothing to stop for, as Parquet and CSV write it.
    for nothing in (None, "", [], {}, math.nan):
        assert not read({**BASE[kind], name: nothing}, **KINDS[kind])[1].unread


@pytest.mark.parametrize(
    ("kind", "fields", "listed"),
    [
        ("pairs", {"id": 7, "source": "mine", "turns": 2}, ("id", "source", "turns")),
        ("pairs", {"score_chosen": 5.0, "score_rejected": 4.0}, ("score_chosen", "score_rejected")),
        ("supervised", {"rejected": "Water.", "chosen": None}, ("rejected",)),
        ("pairs", {"question": Q, "messages": [user(Q), assistant("Air.")]}, ("question", "messages")),  # said before
        ("pairs", {"\ud800\n": 1, "x" * 99: 2}, ("\\ud800\\n", "x" * 37 + "...")),
        ("pairs", {"chosen": [{**assistant("Air."), "id": 3, "name": "Ada"}]}, ("message.id",)),
    ],
)
def test_what_has_no_meaning_here_is_listed_by_name_and_count(kind, fields, listed):
    records, tally = read(BASE[kind], {**BASE[kind], **fields}, {**BASE[kind], **fields}, **KINDS[kind])
    assert len(records) == 3 and tally.unread == dict.fromkeys(listed, 2)


def test_every_field_that_means_something_is_in_the_table_under_the_name_that_rows_are_compared_by():
    assert all(name == name.lower() and not set(" -") & set(name) for name in MEANINGS)
    assert all(meaning.common in {"", *MEANINGS} for meaning in MEANINGS.values())


def test_the_weight_of_a_row_is_that_of_its_pairs_times_their_own():
    row = {**ALPACA_EVAL, "weight": 4}
    assert sorted(record.weight for record in read(row)[0]) == [1.0, 3.0]
    with pytest.raises(UserError, match="row 1: field 'weight': rows with the same 'prompt' are read together"):
        read(helpsteer(Q, "Air.", 4), {**helpsteer(Q, "Paint.", 1), "weight": 2})


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"system_prompt": "s", "question": Q, "response": "Air."}, "prompt=question"),
        (
            {"conversation": [user(Q)], "chosen": [assistant("Air.")], "rejected": [assistant("No.")]},
            "prompt=conversation",
        ),
    ],
)
def test_a_row_whose_prompt_has_another_name_is_answered_with_what_names_it(row, hint):
    with pytest.raises(UserError) as caught:
        read(row, **KINDS["pairs" if "rejected" in row else "supervised"])
    said = str(caught.value)
    assert (
        f"found {', '.join(row)}; if others hold them, write --config.data.columns={hint}" in said and "\n" not in said
    )


def test_a_row_of_other_columns_is_answered_with_its_columns_and_what_names_them():
    with pytest.raises(UserError) as caught:
        read({"question": Q, "good": "Air.", "b": "Paint.", "id": 3})
    assert str(caught.value) == (
        "rows, row 1: expected prompt, chosen, rejected, found question, good, b, id; "
        "if others hold them, write --config.data.columns=prompt=question,chosen=good,rejected=FIELD"
    )


FLAGS = ({"weight": 0}, {"train": False}, {"training": "false"}, {"masked": True}, {"loss": 0.0}, {"weight": 2.5})


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: next(iter(flag)))
def test_a_flag_of_an_answer_is_its_weight_and_nothing_is_cut(flag):
    """In demonstrations, labelled completions and pairs; flags in a prompt must ask for what is done."""
    ((name, value),) = flag.items()
    weight = {"weight": 2.5 if value == 2.5 else 0.0}
    on = {name: not value} if isinstance(value, bool) else {name: 1}
    talk = [user("One?"), {**assistant("1"), **on}, user("Two?"), {**assistant("2"), **flag}]
    answers = [assistant("1"), user("Two?"), {**assistant("2"), **weight}]
    (record,), tally = read({"messages": talk}, **KINDS["supervised"])
    assert (record.prompt, record.chosen) == (talk[:1], answers) and not tally.unread
    (record,), _ = read({"prompt": talk[:1], "completion": talk[1:], "label": True}, **KINDS["unpaired"])
    assert (record.prompt, record.chosen) == (talk[:1], answers)
    (record,), _ = read({"chosen": talk, "rejected": [talk[0], assistant("I")]})
    assert record[:3] == (talk[:1], answers, [assistant("I")])
    # Without the flag, and with one that says what is done anyway, all of it is trained.
    for told in ({"ignore": (f"message.{name}",)}, {}):
        row = {"messages": talk if told else [talk[0], answers[0], talk[2], {**assistant("2"), **on}]}
        (record,), tally = read(row, **KINDS["supervised"], **told)
        assert record.chosen == [assistant("1"), user("Two?"), assistant("2")]
        assert tally.unread == (dict.fromkeys([f"message.{name}"], 1) if told else {})
    # Who is not trained anyway may say so, and may not say otherwise.
    for row, place in (
        ({"messages": [{**user("One?"), **on}, *talk[1:]]}, "messages[0]"),
        ({"messages": [*talk[:2], {**user("Two?"), **on}, talk[3]]}, "messages[2]"),
        ({"prompt": talk[:3], "completion": "2"}, "prompt[1]"),
        ({"history": talk[:2], "prompt": "Two?", "completion": "2", "system": "Be brief."}, "history[1]"),
    ):
        with pytest.raises(UserError, match=f"data.ignore=message.{name}, or shorten the conversation") as caught:
            read(row, **KINDS["supervised"])
        assert f"field '{place}.{name}'" in str(caught.value)
        assert len(read(row, **KINDS["supervised"], ignore=(f"message.{name}",))[0]) == 1
        assert len(list(iter_prompts(MemoryRows("rows", [row]), Tally()))) == 1
    off = dict.fromkeys([name], value if value != 2.5 else 0)
    read({"messages": [{**user("One?"), **off}, talk[1], {**user("Two?"), **off}, talk[3]]}, **KINDS["supervised"])
    read({"prompt": [talk[0], {**assistant("1"), **off}, talk[2]], "completion": "2"}, **KINDS["supervised"])
    rejected = [talk[0], {**assistant("1"), **on}, talk[2], assistant("3")]
    with pytest.raises(UserError, match=rf"field 'rejected\[1\].{name}'"):
        read({"chosen": [talk[0], assistant("1"), talk[2], assistant("2")], "rejected": rejected})


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"weight": -1}, "'messages[1].weight': expected 0 or a positive finite number (float32), found a number -1"),
        ({"weight": math.inf}, "'messages[1].weight': expected a value of JSON, found a number inf"),
        ({"weight": 1e-40}, "'messages[1].weight': expected 0 or a positive finite number"),
        ({"weight": "much"}, "'messages[1].weight': expected 0 or a positive finite number"),
        ({"weight": [1]}, "'messages[1].weight': expected 0 or a positive finite number"),
        ({"train": 0.5}, "'messages[1].train': expected true or false"),
        ({"loss": 2.31}, "'messages[1].loss': expected true or false"),
        ({"weight": 0, "train": True}, "fields 'weight', 'train' of messages[1] contradict each other"),
    ],
)
def test_a_flag_that_says_nothing_or_two_things_stops_the_run(flags, says):
    with pytest.raises(UserError) as caught:
        read({"messages": [user(Q), {**assistant("Air."), **flags}]}, **KINDS["supervised"])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_flags_of_equal_meaning_and_empty_ones_are_read():
    for flags in ({"weight": None, "train": True}, {"weight": 1.0, "train": True, "mask": False}):
        row = {"messages": [user(Q), {**assistant("Air."), **flags}]}
        assert read(row, **KINDS["supervised"])[0][0].chosen == [assistant("Air.")]
    row = {"messages": [user(Q), {**assistant("Air."), "loss_weight": "0.5", "weight": 0.5}]}
    assert read(row, **KINDS["supervised"])[0][0].chosen == [{**assistant("Air."), "weight": 0.5}]


def test_a_response_of_which_nothing_is_trained_is_dropped_and_counted():
    off = {**assistant("Air."), "weight": 0}
    silent = [off, user("Sure?"), assistant(" ")]  # what is trained of it says nothing
    for row, kind in (
        ({"messages": [user(Q), off]}, "supervised"),
        ({"messages": [user(Q), *silent]}, "supervised"),
        ({"prompt": Q, "completion": [off], "label": True}, "unpaired"),
        ({**PAIR, "rejected": [{**off, "content": "Paint."}]}, "pairs"),
    ):
        records, tally = read(row, **KINDS[kind])
        assert not records and tally.dropped == {"nothing of a response is trained": 1}
    weighted = {**PAIR, "rejected": [{**PAIR["chosen"][0], "weight": 0.5}]}
    assert read(weighted)[1].dropped == {"identical responses": 1}


@pytest.mark.parametrize(
    "field",
    [
        {"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]},
        {"loss_mask": 0},
        {"token_weights": [0.5]},
        {"label": False},
        {"tools": [WEATHER]},
        {"system_prompt": "Be brief."},
    ],
    ids=lambda field: next(iter(field)),
)
def test_what_a_message_says_and_nobody_reads_stops_the_run_and_may_be_ignored(field):
    (name,) = field
    prompt, answers = [{**user(Q), **field}], {"chosen": [assistant("Air.")], "rejected": [assistant("Paint.")]}
    for row, where in (({"prompt": prompt, **answers}, "prompt[0]"), ({**PAIR, "history": prompt}, "history[0]")):
        with pytest.raises(UserError) as caught:
            read(row)
        assert f"field '{where}.{name}' holds " in str(caught.value) and f"data.ignore=message.{name}" in str(
            caught.value
        )
        assert read(row, ignore=(f"message.{name}",))[1].unread == {f"message.{name}": 1}


@pytest.mark.parametrize(
    "name", ["chosen_weight", "rejected_weights", "token_weights", "prompt_mask", "loss_multiplier"]
)
def test_a_weight_or_mask_is_known_by_what_it_is_of(name):
    assert meaning_of(name, [0.5]).says in ("how much the row counts", "which tokens are trained")
    assert meaning_of(f"body_{name}", 70) is None


def test_what_stands_beside_the_messages_of_openais_format_is_the_rows():
    given = {"messages": [user(Q)], "functions": [WEATHER["function"]], "parallel_tool_calls": True}
    row = {"input": given, "preferred_output": [assistant("Air.")], "non_preferred_output": [assistant("Paint.")]}
    with pytest.raises(UserError, match="row 1: field 'functions' holds tools that may be called.*map it to 'tools'"):
        read(row)
    assert read({**row, "input": {**given, "functions": None}})[1].unread == {"parallel_tool_calls": 1}


def test_what_is_beside_a_row_stands_before_its_prompt_in_every_kind():
    before = {"system": "Be brief.", "history": [["Hi.", "Hello."]]}
    said = [{"role": "system", "content": "Be brief."}, user("Hi."), assistant("Hello."), user(Q)]
    plain = {"prompt": Q, "chosen": "Air.", "rejected": "Paint.", "completion": None, "label": None}
    whole = {side: [user(Q), assistant(side)] for side in ("chosen", "rejected")}
    for row in (PAIR, plain, whole):
        assert read({**row, **before})[0][0].prompt == said
    for row in (BASE["unpaired"], {"prompt": Q, "completion": "Air.", "label": "false"}):
        assert read({**row, **before}, unpaired=True)[0][0].prompt == said
    for row in (BASE["supervised"], {"prompt": Q, "completion": "Air."}, {"messages": [user(Q), assistant("Air.")]}):
        assert read({**row, **before}, **KINDS["supervised"])[0][0].prompt == said
    # The same system prompt twice is one; two are a mistake.
    twice = {**PAIR, "prompt": said[:1] + [user(Q)], "system": "Be brief."}
    assert read(twice)[0][0].prompt == said[:1] + [user(Q)]
    with pytest.raises(UserError, match="field 'system': the conversation begins with another one"):
        read({**twice, "system": "Be long."})
    with pytest.raises(UserError, match="field 'system': it goes through the chat template; write the rest"):
        read({"chosen": f"\n\nHuman: {Q}\n\nAssistant: a", "rejected": f"\n\nHuman: {Q}\n\nAssistant: b", **before})
