"""Conversations in every form that rows write them in, and what is no conversation."""

import json

import pytest

from prefalign_jax.data.messages import read_history, read_text, read_tools
from prefalign_jax.data.values import Malformed
from published_rows import assistant, user

TALK = [user("Hi"), assistant("Hello")]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    "given",
    [
        TALK,
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        [{"role": "Human", "content": "Hi"}, {"role": "GPT", "content": "Hello"}],
        [{"from": "USER", "value": "Hi"}, {"role": "Model", "content": "Hello"}],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, assistant("Hello")],
        [{"role": "user", "content": [{"type": "text", "text": "H", "image_url": None}, {"text": "i"}]}, TALK[1]],
        [{**user("Hi"), "name": None, "tool_calls": None}, {**assistant("Hello"), "tool_calls": []}],
        json.dumps(TALK),
        f"  {json.dumps(TALK, indent=1)}\n",
        json.dumps([{"value": "Hi", "from": "human"}, {"value": "Hello", "from": "gpt"}]),
        {"messages": TALK},
        json.dumps({"messages": TALK}),
        {"conversations": TALK},
        json.dumps({"conversation": TALK}),
        json.dumps(json.dumps(TALK)),
        "\ufeff" + json.dumps(TALK),
    ],
)
def test_a_conversation_is_the_same_however_it_is_written(given):
    assert read_text(given, "prompt") == TALK


@pytest.mark.parametrize("given", [assistant("Hello"), {"from": "gpt", "value": "Hello"}, json.dumps(TALK[1])])
def test_a_message_is_a_conversation_of_one(given):
    assert read_text(given, "chosen") == TALK[1:]


LOOKS_LIKE = ("", "[", "{}", "[]", "[1, 2]", '[{"a": 1}]', '{"role": "engineer", "content": "x"}', "{'a': 1}", "[{")
LOOKS_LIKE += (
    '{"from": "Oslo", "value": 3}',
    '{"messages": 3}',
    '{"messages": [3]}',
    '[{"role": "engineer"',
    '"[{"',
    '"[1]"',
    '{"users": [{"name": "x", "role": "user"}], ...}',  # no JSON, and nothing that somebody says
    "[INST] Hi",
)


@pytest.mark.parametrize("text", LOOKS_LIKE)
def test_what_only_looks_like_a_conversation_stays_text(text):
    assert read_text(text, "chosen") == text


@pytest.mark.parametrize(
    "given",
    [
        {**assistant(None), "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{**CALL, "id": None}], "content": ""},
        {**assistant(None), "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {**assistant(None), "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {"x": 1, "y": None}}}]},
        {**assistant(None), "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {**assistant(None), "tool_calls": json.dumps([CALL])},
        {**assistant(None), "tool_calls": [{**CALL, "function": {"name": "f", "arguments": json.dumps('{"x": 1}')}}]},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "function_call", "value": '[{"name": "f", "arguments": {"x": 1}}]'},
    ],
)
def test_a_call_is_the_same_however_it_is_written(given):
    assert read_text([given], "chosen") == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([{"role": "user"}], "field 'p[0]': expected a message with 'role' and 'content'"),
        ([{"role": "user", "content": {"text": "x"}}], "field 'p[0].content': expected a string"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "p[0].content[0]': expected a part",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "x", "more": 1}]}], "and nothing else"),
        ([{**assistant(""), "refusal": "I will not."}], "field 'p[0].refusal': no text holds it"),
        ([{**user("x"), "name": "\ud800"}], "field 'p[0].name': expected valid Unicode"),
        ([{**user("x"), "\ud800": "y"}], "field 'p[0]': expected valid Unicode"),
        ([{**assistant(""), "tool_calls": [{"function": {"name": "f", "arguments": {"\ud800": 1}}}]}], "valid Unicode"),
        ([{**assistant(""), "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]}], "Unicode"),
        ([{"from": "function_call", "value": "f(1)"}], "field 'p[0].content': expected JSON"),
        ([{**user("x"), "name": 7}], "field 'p[0].name': expected a string, found a number 7"),
        ([{**assistant("x"), "reasoning_content": {"text": "y"}}], "field 'p[0].reasoning_content': expected a string"),
        ("[{'role': 'user', 'content': 'x'}]", "field 'p': expected messages as JSON"),
        ("[{'content': 'x', 'role': 'user'}\n {'content': 'y', 'role': 'assistant'}]", "field 'p': expected messages"),
        ('[{"role": "user", "content": "x"', "field 'p': expected messages as JSON"),
        (7, "field 'p': expected a string or a list of messages, found a number 7"),
    ],
)
def test_what_is_wrong_is_named(given, says):
    with pytest.raises(Malformed) as caught:
        read_text(given, "p")
    assert says in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_tools_lose_the_nulls_that_a_table_gives_them_but_not_those_of_their_own_json():
    schema = {"type": "object", "properties": {"x": {"type": "string", "enum": ["a", None]}}, "required": ["x"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    filled = json.loads(json.dumps(tool))
    filled["function"]["parameters"]["properties"] |= {"y": None}
    filled["function"] |= {"strict": None}
    assert read_tools([filled]) == (tool,) == read_tools(json.dumps([tool]))
    assert read_tools(json.dumps([filled])) == (filled,) == read_tools([json.dumps(filled)])
    assert read_tools([]) == read_tools("") == read_tools("[]") == ()
    deep = json.loads('{"a":' * 100 + "1" + "}" * 100)
    wrong = {"a tool with a 'name'": [{"name": 5}], "a 'name'": [{}], "a list of objects": {"name": "f"}}
    for says, given in (wrong | {"at most 64 levels": [{"name": "f", "parameters": deep}]}).items():
        with pytest.raises(Malformed, match=says):
            read_tools(given)


def test_what_was_said_before_is_pairs_or_messages():
    for given in ([["Hi", "Hello"]], TALK, json.dumps([["Hi", "Hello"]]), json.dumps(TALK)):
        assert read_history(given) == TALK
    assert read_history("") == []
    for wrong in ("x", [["Hi"]], [["Hi", 3]], {"a": 1}, [3]):
        with pytest.raises(Malformed, match="field 'history"):
            read_history(wrong)
