"""Every published format: what it is told by, and what its rows become."""

import json
import math

import pytest

from prefalign_jax.data.formats import FORMATS, HARD, detect
from prefalign_jax.data.records import read_prompts, read_records
from prefalign_jax.types import Place, UserError
from published_rows import (
    ALPACA,
    ALPACA_EVAL,
    ASKED,
    BAD,
    CALL,
    GOOD,
    KTO,
    PAIRS,
    PANDALM,
    SAFE,
    SHAREGPT,
    SHP,
    TLDR,
    WEATHER,
    Q,
    assistant,
    graded,
    helpsteer,
    user,
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def said(text):
    return text if isinstance(text, str) else [(m["role"], m["content"]) for m in text]


@pytest.mark.parametrize(("name", "row", "prompt", "chosen", "rejected", "margin"), PAIRS.values(), ids=PAIRS)
def test_published_pairs(tmp_path, name, row, prompt, chosen, rejected, margin):
    assert detect(row) == name
    file = write(tmp_path / "rows.jsonl", [row])
    records, dropped = read_records(file)
    assert [tuple(map(said, record[:3])) for record in records] == [(prompt, chosen, rejected)] and not dropped
    assert records[0].weight == 1 and records[0].where == Place(str(file), 1)
    if margin is not None:
        assert read_records(file, margin=True)[0][0].margin == pytest.approx(margin)
    else:
        with pytest.raises(UserError, match="row 1: expected the field margin, or score_chosen and score_rejected"):
            read_records(file, margin=True)
    # As labelled completions, and its prompt alone.
    both = read_records(file, unpaired=True)[0]
    assert [(said(r.chosen), r.label) for r in both] == [(chosen, True), (rejected, False)]
    assert said(read_prompts(file)[0][0].prompt) == prompt


@pytest.mark.parametrize(
    ("name", "row", "first"),
    [
        ("pandalm", PANDALM, 1 / 6),
        ("pandalm", {**PANDALM, "annotator3": 2}, 0.0),
        ("alpaca_eval", ALPACA_EVAL, 0.25),
        ("alpaca_eval", {**ALPACA_EVAL, "preference": 2}, 0.0),
        ("alpaca_eval", {**ALPACA_EVAL, "preference": 1.1}, 0.9),
    ],
)
def test_a_soft_preference_is_both_orders_by_their_probability(tmp_path, name, row, first):
    """So a mean over pairs is the expectation, and a certain one is one pair."""
    assert detect(row) == name
    file = write(tmp_path / "rows.jsonl", [row])
    records, dropped = read_records(file)
    found = {(said(r.chosen)[0][1], said(r.rejected)[0][1]): r.weight for r in records}
    orders = {("Air scatters blue.", "Paint."): 1 - first, ("Paint.", "Air scatters blue."): first}
    assert found == pytest.approx({order: p for order, p in orders.items() if p}) and not dropped
    assert [r.weight for r in records] == sorted((r.weight for r in records), reverse=True)
    assert {str(said(r.prompt)) for r in records} == {str(ASKED)}
    # The likelier order has the margin that Bradley and Terry's model gives it; the other cannot be better by it.
    (record,), dropped = read_records(file, margin=True)
    likely = min(max(first, 1 - first), 1 - HARD)
    assert record.margin == pytest.approx(math.log(likely / (1 - likely)))
    assert dropped == ({"rejected scores higher": 1} if 0 < first < 1 else {})


def test_helpsteer_pairs_the_best_with_the_worst_response_to_each_prompt(tmp_path):
    rows = [
        *[helpsteer(Q, text, score) for text, score in (("Water.", 2), ("Paint.", 0), ("Air scatters blue.", 4))],
        *[helpsteer("Tie?", text, 3) for text in ("Yes.", "No.")],
        helpsteer("Alone?", "Yes.", 4),
        {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1},  # another format ends a group
        *[helpsteer("Last?", text, score) for text, score in (("a", 1), ("b", 2))],
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    records, dropped = read_records(file, margin=True)
    assert [(said(r.prompt), said(r.chosen), said(r.rejected), r.margin) for r in records] == [
        (ASKED, GOOD, BAD, 4.0),
        ("p", "c", "r", 1.0),
        ([("user", "Last?")], [("assistant", "b")], [("assistant", "a")], 1.0),
    ]
    assert dropped == {"neither best nor worst of its prompt": 1, "tie": 1, "fewer than two answers": 1}
    # For fine-tuning each is a demonstration as it stands.
    demonstrations, dropped = read_records(write(tmp_path / "sft.jsonl", rows[:6]), responses=("chosen",))
    assert [r.chosen for r in demonstrations] == [row["response"] for row in rows[:6]] and not dropped


def test_which_response_is_safer_is_another_format_with_the_same_fields(tmp_path):
    file = write(tmp_path / "rows.jsonl", [SAFE])
    assert [said(r.chosen) for r in read_records(file, format="pku_saferlhf_safer")[0]] == [BAD]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**ALPACA_EVAL, "preference": 1.5}, "tie"),
        ({**ALPACA_EVAL, "preference": 0}, "tie"),
        ({**ALPACA_EVAL, "preference": -1}, "no preference"),
        ({**PANDALM, "annotator1": 1, "annotator2": 2}, "tie"),
        ({**PAIRS["nvidia/HelpSteer3"][1], "overall_preference": 0}, "tie"),
        ({**PAIRS["GAIR-NLP/auto-j"][1], "label": 2}, "tie"),
        ({**PAIRS["lmsys/mt_bench_human_judgments"][1], "winner": "tie (inconsistent)"}, "tie"),
        (
            {**PAIRS["prometheus-eval's HHH alignment"][1], "rejected_instruction": graded("Why?", "a")},
            "prompts differ",
        ),
        ({**PAIRS["openbmb/UltraFeedback"][1], "completions": []}, "fewer than two answers"),
        ({**SHP, "human_ref_A": "Air scatters blue."}, "identical responses"),
        ({**SHP, "human_ref_A": " "}, "empty response"),
    ],
)
def test_what_prefers_nothing_is_counted(tmp_path, row, reason):
    records, dropped = read_records(write(tmp_path / "rows.jsonl", [SHP, row]))
    assert len(records) == 1 and dropped == {reason: 1}


JUDGED = [
    row for row in (PANDALM, ALPACA_EVAL, *(row for _, row, *_ in PAIRS.values())) if FORMATS[detect(row)].verdict
]


@pytest.mark.parametrize("nothing", [None, math.nan])
@pytest.mark.parametrize("row", [*JUDGED, SAFE], ids=lambda row: detect(row))
def test_a_row_that_nobody_judged_is_counted_and_the_others_are_read(tmp_path, row, nothing):
    """AlpacaEval's own files have such rows, where the annotator failed."""
    silent = {**row, **dict.fromkeys(FORMATS[detect(row)].verdict, nothing)}
    records, dropped = read_records(write(tmp_path / "rows.jsonl", [SHP, silent, row]))
    assert len(records) == 1 + len(read_records(write(tmp_path / "row.jsonl", [row]))[0])
    assert dropped == {"no preference": 1}


def test_a_vote_on_the_second_turn_is_about_both(tmp_path):
    row = {**PAIRS["lmsys/mt_bench_human_judgments"][1], "turn": 2}
    (record,), dropped = read_records(write(tmp_path / "rows.jsonl", [row]))
    assert said(record.prompt) == ASKED and not dropped
    assert said(record.chosen) == [*GOOD, ("user", "Why?"), ("assistant", "It does.")]
    assert said(record.rejected) == [*BAD, ("user", "Why?"), ("assistant", "It is.")]


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("princeton-nlp/LLMBar", {"label": 0}, "field 'label': expected one of 1, 2, found a number 0"),
        ("ScalerLab/JudgeBench", {"label": "A=B"}, "field 'label': expected one of 'A>B', 'B>A', found a string 'A=B'"),
        ("HuggingFaceH4/hhh_alignment", {"targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "one labelled 1 and"),
        ("prometheus-eval's HHH alignment", {"chosen_instruction": Q}, "in Prometheus's grading prompt"),
        ("lmsys/mt_bench_human_judgments", {"winner": "b"}, "field 'winner': expected one of 'model_a', 'model_b'"),
    ],
)
def test_a_judgement_that_is_none_is_named(tmp_path, name, change, says):
    with pytest.raises(UserError, match=says):
        read_records(write(tmp_path / "rows.jsonl", [{**PAIRS[name][1], **change}]))


def test_labelled_completions_of_kto_mix(tmp_path):
    """trl-lib/kto-mix-14k."""
    file = write(tmp_path / "rows.jsonl", [KTO, {**KTO, "completion": [assistant("Paint.")], "label": False}])
    records, dropped = read_records(file, unpaired=True)
    assert [(said(r.chosen), r.label) for r in records] == [(GOOD, True), (BAD, False)] and not dropped
    assert said(records[0].prompt) == [("user", "Hi."), ("assistant", "Hello."), *ASKED]


@pytest.mark.parametrize(
    ("name", "row", "prompt"),
    [
        ("alpaca", ALPACA, ASKED),
        ("alpaca", {**ALPACA, "history": [["Hi.", "Hello."]]}, [("user", "Hi."), ("assistant", "Hello."), *ASKED]),
        ("alpaca", {**ALPACA, "input": "In one line."}, [("user", f"{Q}\n\nIn one line.")]),
        ("instruction", {"instruction": Q, "completion": "Air scatters blue."}, ASKED),
        ("instruction_response", {"instruction": Q, "response": "Air scatters blue."}, ASKED),
        ("question", {"question": Q, "completion": "Air scatters blue.", "system": ""}, ASKED),
        ("sharegpt", SHAREGPT, ASKED),
        ("sharegpt", {"conversations": [user(Q), assistant("Air scatters blue.")]}, ASKED),
        ("sharegpt", {**SHAREGPT, "system": "Be brief."}, [("system", "Be brief."), *ASKED]),
        # HuggingFaceH4/ultrachat_200k
        ("common", {"prompt": Q, "prompt_id": "0", "messages": [user(Q), assistant("Air scatters blue.")]}, ASKED),
        ("common", {"prompt": [user(Q)], "completion": [assistant("Air scatters blue.")]}, ASKED),
    ],
)
def test_demonstrations(tmp_path, name, row, prompt):
    assert detect(row, pairs=False) == name
    records, dropped = read_records(write(tmp_path / "rows.jsonl", [row]), responses=("chosen",))
    assert [(said(r.prompt), said(r.chosen), r.rejected) for r in records] == [(prompt, GOOD, [])] and not dropped


def test_a_conversation_without_an_answer_is_counted(tmp_path):
    rows = [SHAREGPT, {"conversations": SHAREGPT["conversations"][:1]}, {"conversations": []}]
    records, dropped = read_records(write(tmp_path / "rows.jsonl", rows), responses=("chosen",))
    assert len(records) == 1 and dropped == {"no answer": 2}


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER])])
def test_tools_and_calls(tmp_path, tools):
    """Their arguments become objects; an answer that only calls a tool is not empty."""
    rows = [
        {"messages": [user("Rome?"), CALL], "tools": tools},
        {
            "messages": [
                user("Rome?"),
                CALL,
                {"role": "tool", "name": "weather", "content": "Sun."},
                assistant("Sun."),
            ],
            "tools": tools,
        },
        {"messages": [user("Hi."), {**assistant("Hello."), "tool_calls": None}], "tools": None},
    ]
    records, dropped = read_records(write(tmp_path / "rows.jsonl", rows), responses=("chosen",))
    call = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": {"city": "Rome", "unit": None}}}
    assert not dropped and [record.tools for record in records] == [(WEATHER,), (WEATHER,), ()]
    assert records[0].chosen == records[1].chosen[:1] == [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert records[2].chosen == [assistant("Hello.")]


MALFORMED = [
    ({**SHP, "labels": 2}, "field 'labels': expected one of 0, 1, found a number 2"),
    ({**SHP, "labels": "A"}, "field 'labels': expected one of 0, 1, found a string 'A'"),
    ({**SHP, "human_ref_A": 3}, "field 'human_ref_A': expected a string, found a number 3"),
    ({**SHP, "score_ratio": math.nan}, "field 'score_ratio': expected a finite number (float32), found a number nan"),
    ({**SAFE, "better_response_id": 2}, "field 'better_response_id': expected one of 0, 1"),
    ({**PANDALM, "annotator2": 3}, "field 'annotator2': expected one of 0, 1, 2, found a number 3"),
    ({**PANDALM, "input": 3}, "field 'input': expected a string, found a number 3"),
    ({**ALPACA_EVAL, "preference": 3}, "field 'preference': expected a number from 1 to 2, or 0 for a tie"),
    (
        {**ALPACA_EVAL, "preference": True},
        "field 'preference': expected a finite number (float32), found a boolean",
    ),
    ({**TLDR, "info": "x"}, "field 'info': expected an object, found a string 'x'"),
    ({**TLDR, "summaries": [{"text": "x"}]}, "field 'summaries': expected two summaries"),
    ({**TLDR, "summaries": [None, None]}, "field 'summaries[0]': expected an object with 'text', found nothing"),
    ({**TLDR, "info": {**TLDR["info"], "title": None}}, "field 'info.title': expected a string, found nothing"),
    ({"instruction": Q, "completions": "x"}, "field 'completions': expected a list, found a string 'x'"),
    ({"instruction": Q, "completions": [None]}, "field 'completions[0]': expected an object with 'response'"),
    ({"conversations": "x"}, "field 'conversations': expected a list of turns, found a string 'x'"),
    ({"conversations": [{"role": "user"}]}, "field 'conversations[0]': expected a message with 'role' and 'content'"),
    ({"conversations": [{"from": "me", "value": "x"}]}, "field 'conversations[0].role': expected one of system"),
    ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "field 'conversations[0].role': expected a string"),
    ({"qid": 1, "question": Q, "answers": [{"text": "x"}]}, "expected an object with 'text', 'pm_score'"),
    (helpsteer(Q, "x", "4!"), "field 'helpfulness': expected a finite number (float32), found a string '4!'"),
]


@pytest.mark.parametrize(("row", "message"), MALFORMED, ids=[message for _, message in MALFORMED])
def test_a_malformed_row_names_file_row_and_field(tmp_path, row, message):
    file = write(tmp_path / "rows.jsonl", [SHP, row])
    with pytest.raises(UserError) as caught:
        read_records(file)
    assert str(caught.value).startswith(f"{file}, row 2: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [user("x"), {**CALL, "tool_calls": "x"}]}, "field 'messages[1].tool_calls': expected JSON"),
        ({"messages": [user("x"), {**CALL, "tool_calls": {"x": 1}}]}, "'messages[1].tool_calls': expected a list of"),
        ({"messages": [user("x"), {**CALL, "tool_calls": [{}]}]}, "messages[1].tool_calls[0].name': expected a string"),
        (
            {"messages": [user("x"), {**CALL, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "field 'messages[1].tool_calls[0].function.arguments': expected JSON",
        ),
        ({"messages": [user("x"), assistant(None)]}, "field 'messages[1].content': expected a string, found nothing"),
        ({"messages": [user("x"), None]}, "field 'messages[1]': expected a message with 'role' and 'content'"),
        ({"messages": [user("x"), assistant("y")], "tools": "["}, "field 'tools': expected JSON"),
        ({"messages": [user("x"), assistant("y")], "tools": [3]}, "field 'tools': expected a list of objects"),
        ({"prompt": "x", "completion": "y", "tools": [WEATHER]}, "field 'tools': they go through the chat template"),
    ],
)
def test_malformed_tools(tmp_path, row, message):
    file = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as caught:
        read_records(file, responses=("chosen",))
    assert str(caught.value).startswith(f"{file}, row 1: ") and message in str(caught.value)


def test_a_named_format_must_have_its_fields(tmp_path):
    with pytest.raises(UserError, match=r"row 1: format 'shp' has the fields history, .*, labels, found question"):
        read_records(write(tmp_path / "rows.jsonl", [{"question": Q}]), format="shp")


def test_a_file_may_mix_formats(tmp_path):
    rows = [row for _, row, *_ in PAIRS.values()]
    records, dropped = read_records(write(tmp_path / "rows.jsonl", rows))
    assert [said(r.prompt) for r in records] == [prompt for _, _, prompt, *_ in PAIRS.values()] and not dropped


def test_every_format_is_tested():
    tested = {name for name, *_ in PAIRS.values()} | {"pandalm", "alpaca_eval", "alpaca", "helpsteer", "samples"}
    tested |= {"instruction", "instruction_response", "question"}
    assert tested | {"pku_saferlhf_safer"} == set(FORMATS)
