"""What ten public chat templates, and some that contradict themselves, make of conversations."""

import copy
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from prefalign_jax.data.chat import tokenize_prompts, tokenize_records
from prefalign_jax.data.records import Prompt, Record
from prefalign_jax.data.remarks import Remarks, lines
from prefalign_jax.data.rendering import Renderer
from prefalign_jax.data.template import ChatOptions, chat_options
from prefalign_jax.types import Place, UserError
from templates import ENDS, JINJA, tokenizer_of, tokenizer_with


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Temperature of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLING = assistant("", tool_calls=[CALL])
RESULT = {"role": "tool", "content": 'it is "-4"\nand falls', "tool_call_id": "abcdefghi"}
REASONED = assistant("Yes.", reasoning_content="Try 2 and 3.")
THOUGHT = assistant("<think>Try 2 and 3.</think>Yes.")

# Situation -> (prompt, response, tools).
CONVERSATIONS = {
    "a question": ([user("Say hi")], assistant("hi you"), ()),
    "a system message": ([system("Be terse."), user("Say hi")], assistant("hi you"), ()),
    "turns": ([user("Say hi"), assistant("hi"), user("Again")], assistant("hi you"), ()),
    "white space": ([user(" Say hi\n")], assistant("\n hi you "), ()),
    "thinking": ([user("7?")], THOUGHT, ()),
    "no thinking": ([system("Be terse. /no_think"), user("7?")], assistant("Yes."), ()),
    "reasoning": ([user("7?")], REASONED, ()),
    "earlier reasoning": ([user("7?"), REASONED, user("9?")], assistant("No."), ()),
    "a developer message": ([{"role": "developer", "content": "CAPITALS"}, user("Hi")], assistant("HI"), ()),
    "tools": ([user("Is the weather good?")], assistant("Cold."), (WEATHER,)),
    "a call": ([user("Rome?")], CALLING, ()),
    "a call of a tool": ([user("Rome?")], CALLING, (WEATHER,)),
    "a result": ([user("Rome?"), CALLING, RESULT], assistant("Cold."), ()),
    "a name": ([user("Hi") | {"name": "Ann"}], assistant("Hello"), ()),
}
# What a family does not take: situation -> a word of what is said. All else is rendered whole.
NO_TOOLS = {"tools": "tools", "a call of a tool": "tools"}
NO_CALLS = {"a call": "tool calls", "a call of a tool": "tool calls", "a result": "tool calls"}
STOPS = {family: {"reasoning": "reasoning", "a developer message": "developer message"} for family in ENDS}
STOPS["chatml"] = {"reasoning": "reasoning", **NO_CALLS, "tools": "tools", "a call of a tool": "tools"}
STOPS["deepseek_r1"] |= {"thinking": "reasoning", **NO_TOOLS}
STOPS["deepseek_v3"] |= NO_TOOLS
STOPS["gemma3"] |= {**NO_CALLS, **NO_TOOLS, "a developer message": "alternate", "a result": "alternate"}
STOPS["llama31"] = {"reasoning": "reasoning"}
STOPS["phi3"] |= {**NO_CALLS, **NO_TOOLS}
STOPS["qwen3"] = {"a developer message": "developer message"}
STOPS["smollm3"] |= NO_CALLS
COUNTED = {"earlier reasoning": "the reasoning of earlier turns", "a name": "the field 'name' of messages"}


@pytest.fixture(scope="module")
def tokenizers():
    return {family: tokenizer_of(family) for family in ENDS}


def record(prompt, response, tools=(), other=None, **fields):
    other = assistant("no way") if other is None else other
    return Record(prompt, [response], [other], tools=tuple(tools), where=Place("x", 3), **fields)


def tokenized(tokenizer, one, **options):
    remarks = Remarks()
    (pair,), _ = tokenize_records([one], tokenizer, max_length=4096, remarks=remarks, **options)
    return pair, remarks


@pytest.mark.parametrize(("family", "situation"), list(itertools.product(ENDS, CONVERSATIONS)))
def test_tokens_are_the_templates_own_and_the_prompt_is_what_a_model_is_asked_with(tokenizers, family, situation):
    tokenizer, (prompt, response, tools) = tokenizers[family], CONVERSATIONS[situation]
    one = record(prompt, response, tools)
    if says := STOPS[family].get(situation):
        with pytest.raises(UserError, match=f"^x, row 3: the chat template .*{says}"):
            tokenized(tokenizer, one)
        return
    pair, remarks = tokenized(tokenizer, one, keep_end=True)
    said = [COUNTED[situation]] if situation in COUNTED and (family, situation) != ("qwen3", "reasoning") else []
    assert list(remarks.left_out) == said
    (asked,) = tokenize_prompts([Prompt(prompt, "", Place(), tuple(tools))], tokenizer)
    assert asked.tolist() == pair.prompt.tolist()
    # DeepSeek's writes what follows a tool's result without a header, asked for or not.
    after_result = family.startswith("deepseek") and situation == "a result"
    contradicts = (family == "deepseek_r1" and not after_result) or (
        family == "mistral" and prompt[0]["role"] == "system"
    )
    assert len(remarks.meeting) == contradicts
    if contradicts:
        return
    given = [copy.deepcopy(m) for m in [*prompt, response]]
    if family.startswith("deepseek"):  # takes arguments as text
        for call in (call for m in given for call in m.get("tool_calls", ())):
            call["function"]["arguments"] = '{"city": "Rome"}'
    whole = tokenizer.apply_chat_template(given, tools=list(tools) or None, return_dict=False)
    assert [*pair.prompt, *pair.chosen] == whole


@pytest.mark.parametrize("family", ENDS)
def test_every_family_ends_a_response_once(tokenizers, family):
    pair, _ = tokenized(tokenizers[family], record(*CONVERSATIONS["a question"][:2]))
    text = tokenizers[family].decode(pair.chosen)
    assert text.endswith(f"hi you{'<|end|>' + chr(10) if family == 'phi3' else ''}{ENDS[family][1]}")
    assert (pair.chosen == tokenizers[family].eos_token_id).sum() == 1


# Templates that contradict themselves.

HEADERS = {
    "special": (JINJA["chatml"].replace("{% if add_generation_prompt %}", "{% if true %}"), "<|im_end|>", ""),
    "all special": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' }}",
        "<|endoftext|>",
        "<|end|>",
    ),
    "text": (
        "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n' }}{% endfor %}{{ '### assistant:\n' }}",
        "<|im_end|>",
        "",
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_response_ends_before_the_header_of_the_next_turn(kind):
    jinja, end, own = HEADERS[kind]
    tokenizer = tokenizer_with(jinja, end)
    for prompt in ([user("Say hi")], [user("Say hi"), assistant("hi"), user("Again")]):
        pair, remarks = tokenized(tokenizer, record(prompt, assistant("hi you")))
        assert tokenizer.decode(pair.chosen) == f"hi you{own}{end}"
        assert tokenizer.decode(pair.rejected) == f"no way{own}{end}"
        assert [asked.tolist() for asked in tokenize_prompts([prompt], tokenizer)] == [pair.prompt.tolist()]
        (line,) = lines(remarks)
        assert "after the last answer though no other is asked for" in line and "assistant" in line
    # A separator that also ends the prompt is no header: it is the response's own end.
    separated = "{% for m in messages %}{{ m.content + '<|end|>' }}{% endfor %}"
    pair, remarks = tokenized(tokenizer_with(separated, "<|end|>"), record([user("Say hi")], assistant("hi you")))
    assert pair.chosen.tolist()[-1] == tokenizer_with(separated, "<|end|>").eos_token_id and not lines(remarks)


@pytest.mark.parametrize(
    ("content", "own"),
    [
        ("hi you", "hi you"),
        ("<b>hi</b>", "<b>hi</b>"),  # shares its first character with the tag
        ("<think>\nSo.</think>hi", "So.</think>hi"),  # it opens what the prompt has opened
        ("<think>So.</think>hi", "So.</think>hi"),
        ("think>\n", "think>\n"),
    ],
)
def test_a_prompt_that_opens_more_than_a_conversation_has(content, own):
    """`<think>` in the generation prompt alone: the prompt is what is asked with, the response keeps all its text."""
    jinja = JINJA["chatml"].replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>\\n")
    assert jinja != JINJA["chatml"]
    tokenizer = tokenizer_with(jinja)
    pair, remarks = tokenized(tokenizer, record([user("Say hi")], assistant(content)))
    (asked,) = tokenize_prompts([[user("Say hi")]], tokenizer)
    assert tokenizer.decode(asked).endswith("<|im_start|>assistant\n<think>\n")
    assert [*pair.prompt, *pair.chosen][: len(asked)] == asked.tolist()
    assert tokenizer.decode([*pair.prompt, *pair.chosen]) == tokenizer.decode(asked) + own + "<|im_end|>"
    (line,) = lines(remarks)
    assert (
        "'<|im_end|>\\n<|im_start|>assistant\\n<think>\\n'" in line
        and "'<|im_end|>\\n<|im_start|>assistant\\n'" in line
    )


def test_a_call_after_a_prompt_that_opens_more(tokenizers):
    pair, _ = tokenized(tokenizers["deepseek_r1"], record([user("Rome?")], CALLING))
    text = tokenizers["deepseek_r1"].decode([*pair.prompt, *pair.chosen])
    assert "<｜Assistant｜><think>\n<｜tool▁calls▁begin｜>" in text and '{"city": "Rome"}' in text


def test_what_a_template_writes_before_the_last_turn_is_taken_as_it_is_asked_with(tokenizers):
    """Mistral's writes the system message before the last turn, if that is the user's."""
    tokenizer = tokenizers["mistral"]
    pair, remarks = tokenized(tokenizer, record([system("Be terse."), user("Hi")], assistant("hi you")))
    assert tokenizer.decode(pair.prompt) == "<s>[INST] Be terse.\n\nHi[/INST]"
    assert tokenizer.decode(pair.chosen) == " hi you</s>"
    assert "...\\n\\n...[/INST]" in lines(remarks)[0]


def test_a_begun_answer_is_continued(tokenizers):
    for family in ("chatml", "llama31", "qwen25", "gemma3", "phi3"):
        one = record([user("Sky?"), assistant("It is")], assistant(" blue"), other=assistant(" red"))
        pair, remarks = tokenized(tokenizers[family], one)
        text = tokenizers[family].decode(pair.prompt)
        assert text.endswith("It is") and not lines(remarks)
        assert tokenizers[family].decode(pair.chosen).startswith(" blue")


# What is left out.


def dropping(role):
    return JINJA["chatml"].replace(
        "{% for message in messages %}", f"{{% for message in messages if message.role != '{role}' %}}"
    )


@pytest.mark.parametrize(
    ("jinja", "one", "name", "where"),
    [
        (dropping("system"), record([system("Be terse."), user("Hi")], assistant("a")), "system", "prompt[0].content"),
        (dropping("user"), record([user("Hi")], assistant("a")), "user", "prompt[0].content"),
        (dropping("tool"), record([user("Hi"), RESULT], assistant("a")), "tool", "prompt[1].content"),
        (
            JINJA["chatml"].replace("'] +", "'][:5] +"),
            record([user("Hi")], assistant("first second")),
            "assistant",
            "chosen[0].content",
        ),
        (JINJA["chatml"], record([user("weather in Rome?")], assistant("Cold."), [WEATHER]), "tools", "tools[0]"),
        (JINJA["deepseek_r1"], record([user("7?")], THOUGHT), "reasoning", "chosen[0].content"),
        (
            JINJA["chatml"],
            record([user("7?")], assistant("No."), other=REASONED),
            "reasoning",
            "rejected[0].reasoning_content",
        ),
    ],
)
def test_a_part_that_is_left_out_stops_the_run_unless_it_is_allowed(jinja, one, name, where):
    tokenizer = tokenizer_with(jinja)
    with pytest.raises(UserError) as caught:
        tokenized(tokenizer, one)
    said = str(caught.value)
    assert said.startswith("x, row 3: the chat template leaves out the ") and "set data.chat_template" in said
    assert f"data.template_may_drop={name} ({where}" in said and "\n" not in said
    _, remarks = tokenized(tokenizer, one, chat=ChatOptions(may_drop=(name,)))
    assert sum(remarks.left_out.values()) == 1
    assert "of 1 records" in " ".join(lines(remarks))


@pytest.mark.parametrize(
    ("written", "rewritten"),
    [
        ("content | upper", True),
        ("content.split() | join(' ')", True),
        ("content | replace('a', 'o')", True),
        ("content | e", True),
        ("content | trim", False),
        ("content | tojson", False),
        ("content.split('</think>') | join('\\n</think>\\n\\n')", False),  # moves what stands between tags
    ],
)
def test_text_that_the_template_rewrites_is_counted(written, rewritten):
    tokenizer = tokenizer_with(JINJA["chatml"].replace("message['content']", f"message.{written}"))
    assert written in tokenizer.chat_template
    remarks = Remarks()
    for text in ("def a(b):\n  return 1 < 2", "Oslo", "<think>\nSay</think> aye"):
        one = record([user(text)], assistant("Ay, ay."), other=assistant("Nay."))
        tokenize_records([one], tokenizer, max_length=4096, remarks=remarks)
    assert bool(remarks.rewritten["the user message"]) == rewritten and not remarks.left_out
    assert any("the chat template rewrites the user message of" in line for line in lines(remarks)) == rewritten


@pytest.mark.parametrize(
    ("printed", "lost"),
    [
        ("tool | tojson", ""),
        ("tool.function | tojson(indent=2)", ""),
        ("tool | string", ""),
        ("tool.function.name ~ ': ' ~ tool.function.description ~ tool.function.parameters | tojson", ""),
        ("tool.function.name ~ ': ' ~ tool.function.description", "function.parameters"),
        ("tool.function.name", "function.description"),
        ("'a tool'", "tools[0]"),
    ],
)
def test_a_tool_is_written_whole_in_whatever_way(printed, lost):
    jinja = f"{{% for tool in tools or [] %}}{{{{ {printed} }}}}{{% endfor %}}" + JINJA["chatml"]
    tokenizer = tokenizer_with(jinja)
    other = copy.deepcopy(WEATHER)
    other["function"] |= {"name": "time", "description": 'says "now"'}
    for tools in ([WEATHER], [other], [WEATHER, other]):
        one = record([user("What does weather or time say?")], assistant("Cold."), tools)
        if lost:
            with pytest.raises(UserError, match="leaves out the tools; .* such as chatml_tools,") as caught:
                tokenized(tokenizer, one)
            assert lost in str(caught.value)
        else:
            assert not lines(tokenized(tokenizer, one)[1])


@pytest.mark.parametrize(
    ("printed", "lost"),
    [
        ("call.name ~ call.arguments | tojson", ""),
        ("call | tojson", ""),
        ("call.name ~ call.arguments", ""),
        ("call.name + '\n' + call.arguments", ""),
        ("call.name ~ (call.arguments | items | list)", ""),
        ("call.arguments | tojson", "name"),
        ("call.name", "arguments"),
        ("call.name ~ (call.arguments | list)", "arguments"),
    ],
)
def test_a_call_is_written_whole_in_whatever_form_the_template_takes(printed, lost):
    """Arguments reach it as an object, or as JSON where it joins texts."""
    each = f"{{% for c in message.tool_calls or [] %}}{{% set call = c.function %}}{{{{ {printed} }}}}{{% endfor %}}"
    jinja = JINJA["chatml"].replace("+ '<|im_end|>'", f"}}}}{each}{{{{ '<|im_end|>'")
    tokenizer = tokenizer_with(jinja)
    for arguments in ({"city": "Oslo", "days": 3}, {"city": 'the "old" one\n', "now": True}):
        call = copy.deepcopy(CALL)
        call["function"]["arguments"] = arguments
        one = record(
            [user("weather in Oslo for 3 days?"), assistant("Wait", tool_calls=[call]), RESULT], assistant("a")
        )
        if lost:
            with pytest.raises(UserError, match=f"leaves out the tool calls.*{lost}"):
                tokenized(tokenizer, one)
            continue
        pair, remarks = tokenized(tokenizer, one)
        assert not lines(remarks) and "'city'" not in tokenizer.decode(pair.prompt).replace("('city'", "")


def test_variables_are_told_to_the_template(tokenizers):
    """By the options, and by the row, which goes first."""
    tokenizer, prompt = tokenizers["qwen3"], [user("Hi")]
    off = chat_options('{"enable_thinking": false}')
    closed = "<think>\n\n</think>\n\n"
    for options, told, ending in (
        (ChatOptions(), (), "assistant\n"),
        (off, (), closed),
        (ChatOptions(), (("enable_thinking", False),), closed),
        (off, (("enable_thinking", True),), "assistant\n"),
    ):
        pair, remarks = tokenized(tokenizer, record(prompt, assistant("a"), chat_template_kwargs=told), chat=options)
        (asked,) = tokenize_prompts([Prompt(prompt, "", Place(), (), told)], tokenizer, options)
        assert tokenizer.decode(asked).endswith(ending) and asked.tolist() == pair.prompt.tolist()
        assert tokenizer.decode([*pair.prompt, *pair.chosen]).endswith(f"assistant\n{closed}a<|im_end|>")
        assert not lines(remarks)
    with pytest.raises(UserError, match="data.chat_template_kwargs: the chat template reads no 'enable_thinking'"):
        tokenized(tokenizers["chatml"], record(prompt, assistant("a")), chat=off)
    _, remarks = tokenized(tokenizers["chatml"], record(prompt, assistant("a"), chat_template_kwargs=(("mood", "x"),)))
    assert lines(remarks) == ["the chat template leaves out 'mood' of chat_template_kwargs of 1 records"]


def test_a_template_that_is_missing_or_breaks_names_the_row():
    for jinja in ("{{ raise_exception('no system') }}", "{{ messages[9].role }}", "{{ messages | nosuch }}"):
        with pytest.raises(UserError, match="^x, row 3: the chat template does not render it: "):
            tokenized(tokenizer_with(jinja), record([user("Hi")], assistant("a")))


# Whatever is changed in a row changes its texts, or is reported.

WORDS = st.lists(
    st.sampled_from(
        ["red", "Oslo", "<b>", "</think>", "<think>", "/no_think", '"', "\n", "7", "é", "user", "<tool_response>"]
    ),
    min_size=1,
    max_size=5,
).map(" ".join)
TURN = st.builds(lambda text, more: [user(text), assistant(more)], WORDS, WORDS)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(sorted(ENDS)),
    first=st.none() | WORDS.map(system),
    turns=st.lists(TURN, max_size=2),
    question=WORDS,
    chosen=WORDS,
    reasoning=st.none() | WORDS,
    number=st.integers(0, 99),
)
def test_what_changes_no_text_is_reported(tokenizers, family, first, turns, question, chosen, reasoning, number):
    prompt = [*([first] if first else []), *(m for turn in turns for m in turn), user(question)]
    answer = assistant(chosen, **({"reasoning_content": reasoning} if reasoning else {}))
    every = ("system", "user", "assistant", "reasoning")
    renderer = Renderer(tokenizers[family], ChatOptions(may_drop=every))
    one = record(prompt, answer, other=assistant("other"))
    remarks = Remarks()
    texts = renderer.texts(one, remarks)
    changed = copy.deepcopy(one)
    parts = [(m, f) for m in (*changed.prompt, *changed.chosen) for f in sorted(m) if f != "role"]
    places = [(m, f, at) for m, f in parts for at, word in enumerate(m[f].split()) if word.isalnum()]
    assume(places)
    message, field, at = places[number % len(places)]
    words = message[field].split()
    message[field] = " ".join([*words[:at], "zebra", *words[at + 1 :]])
    if renderer.texts(changed, Remarks()) == texts:
        assert remarks.left_out


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(family=st.sampled_from(sorted(ENDS)), chosen=WORDS, rejected=WORDS, question=WORDS)
def test_prompts_are_those_that_a_model_is_asked_with_whatever_is_said(tokenizers, family, chosen, rejected, question):
    one = record([user(question)], assistant(chosen), other=assistant(rejected))
    renderer = Renderer(tokenizers[family], ChatOptions(may_drop=("assistant", "reasoning")))
    start, *texts = renderer.texts(one, Remarks())
    assert [start] == renderer.texts(one, Remarks(), responses=False)
    assert all(text.startswith(start) for text in texts)
    pairs, _ = tokenize_records(
        [one], tokenizers[family], max_length=4096, chat=ChatOptions(may_drop=("assistant", "reasoning"))
    )
    for pair in pairs:
        (asked,) = tokenize_prompts([one.prompt], tokenizers[family])
        n = len(pair.prompt)
        assert np.array_equal(pair.prompt, asked[:n]) and len(asked) - n <= 1  # a token that spans the end
