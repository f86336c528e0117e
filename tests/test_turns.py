"""What the assistant writes in a conversation, as pictures: trained stretches stand in brackets."""

import copy
import itertools
import json
import random

import numpy as np
import pytest

from prefalign_jax.data import chat as chat_
from prefalign_jax.data.chat import iter_pairs, tokenize_records
from prefalign_jax.data.records import Record
from prefalign_jax.data.remarks import Remarks, lines
from prefalign_jax.data.template import ChatOptions
from prefalign_jax.data.turns import Stretch, Stretches
from prefalign_jax.types import Place, UserError
from templates import ENDS, JINJA, tokenizer_of, tokenizer_with
from templates.generated import GENERATED


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def tool(text):
    return {"role": "tool", "content": text, "tool_call_id": "abcdefghi"}


CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "temp", "arguments": {"city": "Rome"}}}
CALLING = assistant("", tool_calls=[CALL])
ASKED = [user("Hi")]
TALK = [assistant("Yes."), user("Sure?"), assistant("No.")]
USE = [CALLING, tool("9 C"), assistant("Cold.")]
THINKING = [assistant("A", reasoning_content="B"), user("C"), assistant("D", reasoning_content="E")]
# Families that take calls of tools and what they give.
CALLERS = ("deepseek_v3", "llama31", "mistral", "qwen25", "qwen3")


@pytest.fixture(scope="module")
def tokenizers():
    return {family: tokenizer_of(family) for family in ENDS}


@pytest.fixture(scope="module")
def generated():
    return {family: tokenizer_with(GENERATED[family], ENDS[family][1], ENDS[family][0]) for family in GENERATED}


def record(prompt, *responses, **fields):
    chosen, rejected, *others = (*responses, [])[: max(2, len(responses))]
    return Record(prompt, chosen, rejected, others=tuple(others), where=Place("x", 3), **fields)


def pair_of(tokenizer, one, **options):
    (pair,), dropped = tokenize_records([one], tokenizer, **{"max_length": 4096} | options)
    assert not dropped
    return pair


def weights_of(pair, number=0):
    weights = pair.weights(number)
    return np.ones(len(pair.responses[number]), np.float32) if weights is None else weights


def picture(tokenizer, pair, number=0):
    """The text of a response, what is trained in brackets; a weight other than 1 stands before its bracket."""
    out = []
    tokens = zip(pair.responses[number].tolist(), weights_of(pair, number).tolist(), strict=True)
    for weight, run in itertools.groupby(tokens, key=lambda token: token[1]):
        text = tokenizer.decode([token for token, _ in run])
        out.append(text if weight == 0 else f"{'' if weight == 1 else weight}⟦{text}⟧")
    return "".join(out)


def drawn(tokenizer, prompt, response, **options):
    return picture(tokenizer, pair_of(tokenizer, record(prompt, response), **options))


PICTURES = {
    ("chatml", "talk"): "⟦Yes.<|im_end|>⟧\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦No.<|im_end|>⟧",
    ("gemma3", "talk"): "⟦Yes.<end_of_turn>⟧\n<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n"
    "⟦No.<end_of_turn>⟧",
    ("llama31", "talk"): "⟦Yes.<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦No.<|eot_id|>⟧",
    ("mistral", "talk"): "⟦ Yes.</s>⟧[INST] Sure?[/INST]⟦ No.</s>⟧",
    # Its end of turn inside a conversation is another than at the conversation's end, which has both.
    ("phi3", "talk"): "⟦Yes.<|end|>⟧\n<|user|>\nSure?<|end|>\n<|assistant|>\n⟦No.<|end|>\n<|endoftext|>⟧",
    ("deepseek_v3", "talk"): "⟦Yes.<｜end▁of▁sentence｜>⟧<｜User｜>Sure?<｜Assistant｜>⟦No.<｜end▁of▁sentence｜>⟧",
    # `<think>` is written where an answer is asked for, and never where one is given.
    ("deepseek_r1", "talk"): "⟦Yes.<｜end▁of▁sentence｜>⟧<｜User｜>Sure?<｜Assistant｜>⟦No.<｜end▁of▁sentence｜>⟧",
    # An empty thought is written before the last answer alone.
    ("qwen3", "talk"): "⟦Yes.<|im_end|>⟧\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    "⟦<think>\n\n</think>\n\nNo.<|im_end|>⟧",
    # Its own marks have the header and the newline after the end, which nobody generates.
    ("smollm3", "talk"): "⟦Yes.<|im_end|>⟧\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦No.<|im_end|>⟧",
    ("qwen25", "use"): '⟦<tool_call>\n{"name": "temp", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>⟧\n'
    "<|im_start|>user\n<tool_response>\n9 C\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦Cold.<|im_end|>⟧",
    ("llama31", "use"): '⟦{"name": "temp", "parameters": {"city": "Rome"}}<|eot_id|>⟧'
    '<|start_header_id|>ipython<|end_header_id|>\n\n"9 C"<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Cold.<|eot_id|>⟧",
    ("mistral", "use"): '⟦[TOOL_CALLS] [{"name": "temp", "arguments": {"city": "Rome"}, "id": "abcdefghi"}]</s>⟧'
    '[TOOL_RESULTS] {"content": 9 C, "call_id": "abcdefghi"}[/TOOL_RESULTS]⟦ Cold.</s>⟧',
    ("chatml", "two in a row"): "⟦A<|im_end|>⟧\n<|im_start|>assistant\n⟦B<|im_end|>⟧",
    ("chatml", "an empty one"): "⟦<|im_end|>⟧\n<|im_start|>user\nSay<|im_end|>\n<|im_start|>assistant\n⟦B<|im_end|>⟧",
}
TALKS = {
    "talk": TALK,
    "use": USE,
    "two in a row": [assistant("A"), assistant("B")],
    "an empty one": [assistant(""), user("Say"), assistant("B")],
}


@pytest.mark.parametrize(("family", "name"), PICTURES)
def test_the_assistants_words_and_its_ends_of_turn_are_trained(tokenizers, family, name):
    assert drawn(tokenizers[family], ASKED, TALKS[name]) == PICTURES[family, name]


def test_the_named_template_with_tools():
    """It writes calls and results as Qwen 2.5 does, and what has no tools as ChatML does."""
    tokenizer = tokenizer_with(chat_.CHAT_TEMPLATES["chatml_tools"].jinja)
    assert drawn(tokenizer, ASKED, USE) == PICTURES["qwen25", "use"]
    assert drawn(tokenizer, ASKED, TALK) == PICTURES["chatml", "talk"]
    twice = [assistant("Let me see.", tool_calls=[CALL, CALL]), tool("9 C"), tool("8 C"), assistant("Cold.")]
    call = '\n<tool_call>\n{"name": "temp", "arguments": {"city": "Rome"}}\n</tool_call>'
    assert drawn(tokenizer, ASKED, twice) == (
        f"⟦Let me see.{call}{call}<|im_end|>⟧\n<|im_start|>user\n<tool_response>\n9 C\n</tool_response>\n"
        "<tool_response>\n8 C\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦Cold.<|im_end|>⟧"
    )
    weather = {"type": "function", "function": {"name": "temp", "parameters": {"type": "object", "properties": {}}}}
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        prompt = tokenizer.decode(pair_of(tokenizer, record(system + ASKED, USE, tools=(weather,))).prompt)
        begin = "<|im_start|>system\n" + "Be brief.\n\n" * bool(system) + "# Tools\n"
        assert prompt.startswith(begin) and json.dumps(weather) in prompt and prompt.count("<|im_start|>") == 3


def test_what_it_thinks_is_its_own(tokenizers):
    thinking = [assistant("", reasoning_content="Ask.", tool_calls=[CALL]), tool("9 C"), assistant("Cold.")]
    assert drawn(tokenizers["qwen3"], ASKED, thinking) == (
        '⟦<think>\nAsk.\n</think>\n\n<tool_call>\n{"name": "temp", "arguments": {"city": "Rome"}}\n</tool_call>'
        "<|im_end|>⟧\n<|im_start|>user\n<tool_response>\n9 C\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nCold.<|im_end|>⟧"
    )


def test_a_prompt_that_closes_a_thought_is_followed_by_what_comes_after_it(tokenizers):
    """Without thinking Qwen 3's prompt has an empty thought, which a call in the middle of a conversation lacks."""
    one = record(ASKED, USE, chat_template_kwargs=(("enable_thinking", False),))
    pair = pair_of(tokenizers["qwen3"], one)
    assert tokenizers["qwen3"].decode(pair.prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert picture(tokenizers["qwen3"], pair) == (
        '⟦<tool_call>\n{"name": "temp", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>⟧\n<|im_start|>user\n'
        "<tool_response>\n9 C\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        "⟦Cold.<|im_end|>⟧"
    )


def test_a_call_is_whole_where_its_prompt_is_written_otherwise(tokenizers):
    """Mistral's writes the system prompt into the last message, which is another in the prompt alone."""
    asked = [{"role": "system", "content": "S"}, *ASKED]
    assert drawn(tokenizers["mistral"], asked, USE) == PICTURES["mistral", "use"]
    assert drawn(tokenizers["mistral"], asked, TALK) == PICTURES["mistral", "talk"]


def test_a_begun_answer_goes_on_and_others_follow(tokenizers):
    begun = [user("Sky?"), assistant("It is")]
    assert drawn(tokenizers["chatml"], begun, [assistant(" blue"), *TALK[1:]]) == (
        "⟦ blue<|im_end|>⟧\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦No.<|im_end|>⟧"
    )


# Rows of which a template looks at what they say.

THOUGHTS = [assistant("<think>B</think>A"), user("C"), assistant("<think>E</think>D")]
MAY_DROP = {"chat": ChatOptions(may_drop=("reasoning",))}


@pytest.mark.parametrize("talk", [THINKING, THOUGHTS])
def test_earlier_thoughts_that_a_template_strips_stop_the_run_unless_it_is_allowed(tokenizers, talk):
    with pytest.raises(
        UserError,
        match=r"^x, row 3: the chat template leaves out the reasoning; .* data.train_on=last, .*\(chosen\[0\]\.",
    ):
        drawn(tokenizers["qwen3"], ASKED, talk)
    assert drawn(tokenizers["qwen3"], ASKED, talk, **MAY_DROP) == (
        "⟦A<|im_end|>⟧\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n⟦<think>\nE\n</think>\n\nD<|im_end|>⟧"
    )
    assert drawn(tokenizers["deepseek_r1"], ASKED, talk, **MAY_DROP) == (
        "⟦A<｜end▁of▁sentence｜>⟧<｜User｜>C<｜Assistant｜>⟦D<｜end▁of▁sentence｜>⟧"
    )


def test_a_thought_after_the_last_question_stays(tokenizers):
    calling = [assistant("<think>B</think>", tool_calls=[CALL]), tool("9 C"), assistant("<think>E</think>D")]
    assert drawn(tokenizers["qwen3"], ASKED, calling) == (
        '⟦<think>\nB\n</think>\n\n<tool_call>\n{"name": "temp", "arguments": {"city": "Rome"}}\n</tool_call>'
        "<|im_end|>⟧\n<|im_start|>user\n<tool_response>\n9 C\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nE\n</think>\n\nD<|im_end|>⟧"
    )


# What cannot be told is refused.


@pytest.mark.parametrize(
    ("jinja", "response", "why"),
    [
        # DeepSeek's writes a second call otherwise than it asks for it.
        (JINJA["deepseek_v3"], [CALLING, tool("9 C"), *USE], "writes '<｜tool▁output▁end｜><｜Assistant｜>"),
        # The end of a turn is another where the turn is the last.
        (
            "{% for m in messages %}{{ m.content + ('<|eot_id|>' if loop.last else ' ... ') }}{% endfor %}",
            TALK,
            r"ends it with '<\|eot_id\|>' where it is the last, and goes on with ' ... ...",
        ),
        (
            "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
            "{% if messages | length == 3 and add_generation_prompt %}{{ raise_exception('no') }}{% endif %}",
            TALK,
            "does not render what leads up to it: no",
        ),
        # All answers at the end.
        (
            "{% for m in messages if m.role != 'assistant' %}{{ m.content + '<|im_end|>' }}{% endfor %}"
            "{% for m in messages if m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}{% endfor %}",
            TALK,
            "writes other messages before it",
        ),
    ],
)
def test_what_cannot_be_told_is_refused_in_one_line(jinja, response, why):
    for one, says in ((record(ASKED, response), "data.train_on=last"), (record(ASKED, response, [assistant("x")]), "")):
        with pytest.raises(UserError, match=why) as caught:
            pair_of(tokenizer_with(jinja), one)
        said = str(caught.value)
        assert said.startswith("x, row 3: chosen: what the assistant writes cannot be told from the rest, as the chat ")
        assert "set another data.chat_template" in said and says in said and "\n" not in said
        assert bool(says) == ("train_on" in said)


def test_a_tokenizer_that_does_not_say_where_its_tokens_lie_is_refused(tokenizers, monkeypatch):
    slow = copy.copy(tokenizers["chatml"])
    monkeypatch.setattr(type(slow), "backend_tokenizer", None)
    pair_of(slow, record(ASKED, [assistant("A")]))
    with pytest.raises(UserError, match="need a tokenizer with a tokenizer.json") as caught:
        pair_of(slow, record(ASKED, TALK))
    assert "\n" not in str(caught.value)


# Templates that say what is generated.


def conversations(family):
    rng = random.Random(family)
    yield ASKED, TALK
    yield [user("Hi"), assistant("Hello"), user(" Tell me \n")], [assistant(" one\n"), user("two"), assistant("three ")]
    if family in CALLERS:
        yield ASKED, USE
        yield ASKED, [*USE, user("Thanks."), assistant("Bye.")]
    for _ in range(4):
        words = ["red", "Oslo ", "{'a': 1}", "é", "\n\n", " <b>", "assistant", "it is"]
        said = [" ".join(rng.choices(words, k=rng.randint(1, 5))) + "." for _ in range(7)]
        yield ASKED, [(user, assistant)[n % 2 == 0](text) for n, text in enumerate(said[: rng.choice((3, 5, 7))])]


@pytest.mark.parametrize("family", GENERATED)
def test_masks_are_those_of_transformers_and_the_same_without_marks(tokenizers, generated, family):
    """Of eight public templates with `{% generation %}`, and without."""
    for prompt, response in conversations(family):
        given = copy.deepcopy([*prompt, *response])
        for call in (call for message in given for call in message.get("tool_calls", ())):
            if family == "deepseek_v3":
                call["function"]["arguments"] = '{"city": "Rome"}'
        theirs = generated[family].apply_chat_template(given, return_dict=True, return_assistant_tokens_mask=True)
        for tokenizer in (generated[family], tokenizers[family]):
            pair = pair_of(tokenizer, record(prompt, response), keep_end=True)
            assert [*pair.prompt, *pair.chosen] == theirs["input_ids"]
            ours, start = weights_of(pair), len(pair.prompt)
            # Of the prompt's answers theirs trains, and what is after the last end is ours by `keep_end`.
            last = max(np.nonzero(theirs["assistant_masks"])[0]) + 1 - start
            spaces = [not tokenizer.decode([token]).strip() for token in pair.chosen]
            if family != "phi3":
                assert all(spaces[last:])
            compared = np.array(theirs["assistant_masks"][start:])
            different = np.nonzero(ours != compared)[0]
            assert all(spaces[n] or n >= last for n in different)
            exact = pair_of(tokenizer, record(prompt, response))
            assert weights_of(exact)[:last].tolist() == compared[:last].tolist()


def test_published_marks_without_the_headers(tokenizers):
    """SmolLM 3's marks begin before the header of a turn; the rest is as transformers has it."""
    tokenizer = tokenizers["smollm3"]
    theirs = tokenizer.apply_chat_template([*ASKED, *TALK], return_dict=True, return_assistant_tokens_mask=True)
    pair = pair_of(tokenizer, record(ASKED, TALK), keep_end=True)
    assert [*pair.prompt, *pair.chosen] == theirs["input_ids"]
    mask = np.array(theirs["assistant_masks"][len(pair.prompt) :])
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
    ids = pair.chosen.tolist()
    (at,) = (n for n in range(len(ids)) if ids[n : n + len(header)] == header)
    mask[at : at + len(header)] = 0
    assert weights_of(pair).tolist() == mask.tolist()


def test_marks_of_several_stretches_are_obeyed_and_the_last_answer_ends():
    jinja = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.reasoning }}{% endgeneration %}{{ ' so ' }}"
        "{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    talk = [assistant("A", reasoning="B", weight=0.5), user("C"), assistant("D", reasoning="E")]
    assert drawn(tokenizer_with(jinja), ASKED, talk) == (
        "0.5⟦B⟧ so 0.5⟦A⟧<|im_end|>\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n⟦E⟧ so ⟦D<|im_end|>⟧"
    )


# Weights of messages.


def test_a_message_counts_by_its_weight(tokenizers):
    half = [assistant("Yes.", weight=0.5), user("Sure?"), assistant("No.", weight=2.0)]
    rest = "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    assert drawn(tokenizers["chatml"], ASKED, half) == f"0.5⟦Yes.<|im_end|>⟧{rest}2.0⟦No.<|im_end|>⟧"
    read = [assistant("Yes.", weight=0.0), *TALK[1:]]
    assert drawn(tokenizers["chatml"], ASKED, read) == f"Yes.<|im_end|>{rest}⟦No.<|im_end|>⟧"
    begun = [*TALK[:2], assistant("No.", weight=0.0)]
    assert drawn(tokenizers["chatml"], ASKED, begun) == f"⟦Yes.<|im_end|>⟧{rest}No.<|im_end|>"
    assert drawn(tokenizers["chatml"], ASKED, [assistant("Yes.", weight=0.25)]) == "0.25⟦Yes.<|im_end|>⟧"
    assert pair_of(tokenizers["chatml"], record(ASKED, [assistant("Yes.", weight=1.0)])).token_weights == ()
    nothing = record(ASKED, [assistant("Yes.", weight=0.0)])
    assert tokenize_records([nothing], tokenizers["chatml"], max_length=64) == ([], {"no trained token": 1})


def test_an_end_that_is_added_counts_as_its_message():
    tokenizer = tokenizer_of("chatml")
    tokenizer.eos_token = "<|pad|>"
    talk = [assistant("Yes."), user("Sure?"), assistant("No.", weight=0.5)]
    assert drawn(tokenizer, ASKED, talk).endswith("assistant\n0.5⟦No.<|im_end|><|pad|>⟧")
    assert drawn(tokenizer, ASKED, talk, keep_end=True).endswith("assistant\n0.5⟦No.<|im_end|>\n⟧")
    assert drawn(tokenizer, ASKED, talk, mask_format=True).endswith("assistant\n0.5⟦No.⟧<|im_end|><|pad|>")


# The template's own tokens.

MASKED = {
    ("chatml", "talk"): "⟦Yes.⟧<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦No.⟧<|im_end|>",
    ("phi3", "talk"): "⟦Yes.⟧<|end|>\n<|user|>\nSure?<|end|>\n<|assistant|>\n⟦No.⟧<|end|>\n<|endoftext|>",
    ("qwen3", "talk"): "⟦Yes.⟧<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    "<think>\n\n</think>\n\n⟦No.⟧<|im_end|>",
    ("qwen25", "use"): '<tool_call>\n{"name": "⟦temp⟧", "arguments": ⟦{"city": "Rome"}⟧}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\n9 C\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦Cold.⟧<|im_end|>",
}


@pytest.mark.parametrize(("family", "name"), MASKED)
def test_what_the_template_writes_is_masked(tokenizers, family, name):
    assert drawn(tokenizers[family], ASKED, TALKS[name], mask_format=True) == MASKED[family, name]


def test_what_the_template_writes_is_masked_of_one_answer_and_the_end_of_plain_text(tokenizers):
    tokenizer = tokenizers["qwen3"]
    assert drawn(tokenizer, ASKED, [assistant("A", reasoning_content="B")], mask_format=True) == (
        "<think>\n⟦B⟧\n</think>\n\n⟦A⟧<|im_end|>"
    )
    pair = pair_of(tokenizer, Record("Hi", " A", " B"), mask_format=True)
    assert [picture(tokenizer, pair, number) for number in (0, 1)] == ["⟦ A⟧<|im_end|>", "⟦ B⟧<|im_end|>"]
    assert pair_of(tokenizer, Record("Hi", " A", " B")).token_weights == ()
    with pytest.raises(UserError, match=r"message 0 of it in a way of its own \(data.mask_format\)"):
        pair_of(tokenizer, record(ASKED, [assistant("<think>B</think>A")]), mask_format=True)
    # Here the template writes the message as it is.
    shown = drawn(tokenizers["chatml"], ASKED, [assistant("<think>B</think>A")], mask_format=True)
    assert shown == "⟦<think>B</think>A⟧<|im_end|>"


# Tokens.


class Places(list):
    """Where tokens begin and end, as a `tokenizers.Encoding` knows it."""

    def char_to_token(self, at):
        return next((n for n, (begin, end) in enumerate(self) if begin <= at < end), None)

    def token_to_chars(self, number):
        return self[number]


def test_a_token_with_a_trained_character_is_trained():
    """As transformers' masks have it; `ab` is one token, which a stretch may begin or end inside."""
    ids, places, text = [1, 2, 3, 4], Places([(0, 2), (2, 4), (4, 6), (6, 8)]), "abcdefgh"
    for begin, end, trained in ((2, 4, "0100"), (3, 4, "0100"), (3, 5, "0110"), (1, 7, "1111"), (8, 8, "0000")):
        stretches = Stretches((Stretch(begin, end),), 8)
        weights = chat_._weighted(ids, places, text, stretches, eos=9).weights
        assert "".join(f"{weight:g}" for weight in weights) == trained
    # Two tokens of one character, and white space that no token has.
    parts = Places([(1, 2), (1, 2), (3, 5), (5, 6)])
    for begin, end, trained in ((1, 2, "1100"), (0, 3, "1100"), (2, 3, "0000"), (2, 4, "0010"), (5, 8, "0001")):
        weights = chat_._weighted(ids, parts, text, Stretches((Stretch(begin, end),), 8), eos=9).weights
        assert "".join(f"{weight:g}" for weight in weights) == trained
    two = Stretches((Stretch(0, 3, 0.5), Stretch(3, 8, 0.25)), 8)
    assert chat_._weighted(ids, places, text, two, eos=9).weights.tolist() == [0.5, 0.5, 0.25, 0.25]


def test_characters_of_several_tokens_and_merged_borders(tokenizers):
    """A newline of the template that merges with those of a text is one token with them."""
    talk = [assistant("naïve 👧"), user("\n日本 é"), assistant("👩‍👩‍👧")]
    shown = drawn(tokenizers["chatml"], ASKED, talk)
    assert shown == (
        "⟦naïve 👧<|im_end|>⟧\n<|im_start|>user\n\n日本 é<|im_end|>\n<|im_start|>assistant\n⟦👩‍👩‍👧<|im_end|>⟧"
    )


def test_weights_are_cut_with_their_tokens(tokenizers):
    tokenizer, one = tokenizers["chatml"], record(ASKED, TALK, [assistant("Why not today?")])
    whole = pair_of(tokenizer, one)
    length = len(whole.prompt) + len(whole.chosen)
    for cut in range(1, len(whole.chosen)):
        pair = pair_of(tokenizer, one, max_length=length - cut, too_long="truncate_response")
        assert weights_of(pair).tolist() == weights_of(whole)[:-cut].tolist()
        assert pair.chosen.tolist() == whole.chosen.tolist()[:-cut]
        assert pair.weights(0) is None or len(pair.weights(0)) == len(pair.chosen)
    shorter = pair_of(tokenizer, one, max_length=length - 2, too_long="truncate_prompt")
    assert weights_of(shorter).tolist() == weights_of(whole).tolist() and len(shorter.prompt) == len(whole.prompt) - 2
    # What is left has nothing to learn from.
    late = record(ASKED, [assistant("Yes.", weight=0.0), *TALK[1:]])
    short = {"max_length": len(whole.prompt) + 4, "too_long": "truncate_response"}
    assert tokenize_records([late], tokenizer, **short) == ([], {"no trained token": 1})


def test_an_end_inside_what_is_trained_drops_the_pair(tokenizers):
    tokenizer = tokenizers["chatml"]
    for number, dropped in ((0, True), (1, False), (2, True)):
        talk = copy.deepcopy(TALK)
        talk[number]["content"] = "No <|im_end|> way"
        pairs, reasons = tokenize_records([record(ASKED, talk)], tokenizer, max_length=256)
        assert (not pairs) == dropped and reasons == ({"end token inside the response": 1} if dropped else {})
    # As text it is no end.
    talk = [assistant("It is <|im_end|>."), user("Is <|im_end|> all?"), assistant("Yes.")]
    pair = pair_of(tokenizer, record(ASKED, talk), chat=ChatOptions(split_special=True))
    assert picture(tokenizer, pair) == (
        "⟦It is <|im_end|>.<|im_end|>⟧\n<|im_start|>user\nIs <|im_end|> all?<|im_end|>\n<|im_start|>assistant\n"
        "⟦Yes.<|im_end|>⟧"
    )
    assert (pair.chosen == tokenizer.eos_token_id).sum() == 3


# Properties.

WORDS = ["red", "Oslo", "{'a': 1}", "é", "\n", "<b>", "assistant", "it is", '"', "7"]


def random_talk(rng, calls):
    out = []
    for number in range(rng.randint(1, 4)):
        said = [" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) + str(number) for _ in range(3)]
        use = calls and rng.random() < 0.4
        out += [assistant("", tool_calls=[CALL]), tool(said[1])] if use else []
        out += [assistant(said[0]), user(said[2])]
    return out[:-1]


ENDS_OF_TURN = {"phi3": "<|end|>"}


@pytest.mark.parametrize("family", ENDS)
def test_trained_is_what_the_assistant_says_with_its_ends_and_prefixes_have_prefixes(tokenizers, family):
    tokenizer, rng = tokenizers[family], random.Random(family)
    end = ENDS_OF_TURN.get(family, ENDS[family][1])
    for _ in range(6):
        talk = random_talk(rng, family in CALLERS and not family.startswith("deepseek"))
        pair = pair_of(tokenizer, record(ASKED, talk))
        weights = weights_of(pair)
        trained = tokenizer.decode(pair.chosen[weights == 1])
        answers = [m["content"] for m in talk if m["role"] == "assistant"]
        if not any(m.get("tool_calls") for m in talk):
            plain = trained.replace("<think>\n\n</think>\n\n", "").replace("\n<|endoftext|>", "")
            strip = str.strip if family in ("gemma3", "llama31") else lambda text: text
            space = " " if family == "mistral" else ""
            if family == "qwen3":
                answers[-1] = answers[-1].lstrip("\n")
            if family == "smollm3":
                answers = [answer.lstrip("\n") for answer in answers]
            assert plain == "".join(space + strip(answer) + end for answer in answers)
        assert trained.count(end) == len(answers)
        read = tokenizer.decode(pair.chosen[weights == 0])
        assert all(m["content"].strip() in read or family == "llama31" for m in talk if m["role"] != "assistant")
        # Up to an earlier answer it is the same, but for what a template writes for the last alone.
        for stop in (n + 1 for n, m in enumerate(talk) if m["role"] == "assistant" and not m.get("tool_calls")):
            earlier = pair_of(tokenizer, record(ASKED, talk[:stop]))
            if family not in ("qwen3", "phi3"):
                count = len(earlier.chosen)
                assert earlier.chosen.tolist() == pair.chosen[:count].tolist()
                assert weights_of(earlier).tolist() == weights[:count].tolist()
        # Tokens do not depend on what is trained of them.
        other = [m | {"weight": rng.choice((0.5, 1.0))} if m["role"] == "assistant" else m for m in talk]
        for same in (
            pair_of(tokenizer, record(ASKED, other)),
            pair_of(tokenizer, record(ASKED, talk), mask_format=True),
        ):
            assert same.chosen.tolist() == pair.chosen.tolist() and same.prompt.tolist() == pair.prompt.tolist()
            assert not np.any((weights_of(same) > 0) & (weights == 0))


# Groups.


def test_a_group_keeps_its_order_and_its_scores(tokenizers):
    tokenizer = tokenizers["chatml"]
    sides = [[assistant("A")], TALK, [assistant("B")], [assistant("C", weight=0.5)]]
    pair = pair_of(tokenizer, record(ASKED, *sides, scores=(4.0, 3.0, 2.0, 1.0)))
    assert pair.scores == (4.0, 3.0, 2.0, 1.0) and len(pair.others) == 2
    alone = [pair_of(tokenizer, record(ASKED, side)) for side in sides]
    for number, one in enumerate(alone):
        assert pair.responses[number].tolist() == one.chosen.tolist()
        assert weights_of(pair, number).tolist() == weights_of(one).tolist()
    assert [weights is None for weights in pair.token_weights] == [True, False, True, False]
    strings = pair_of(tokenizer, Record("Hi", " A", " B", others=(" C",), scores=(3.0, 2.0, 1.0)))
    assert [tokenizer.decode(ids) for ids in strings.responses] == [" A<|im_end|>", " B<|im_end|>", " C<|im_end|>"]


def test_a_group_loses_the_responses_that_cannot_be_trained_alone(tokenizers):
    tokenizer, long = tokenizers["chatml"], [assistant("long " * 60)]
    sides = [long, [assistant("A")], [assistant("B <|im_end|> B")], [assistant("A")], [assistant("C")]]
    one, remarks = record(ASKED, *sides, scores=(5.0, 4.0, 3.0, 2.0, 1.0)), Remarks()
    pair = pair_of(tokenizer, one, max_length=80, remarks=remarks)
    assert [tokenizer.decode(ids) for ids in pair.responses] == ["A<|im_end|>", "C<|im_end|>"]
    assert pair.scores == (4.0, 1.0) and pair.others == ()
    reasons = {"too long": 1, "end token inside the response": 1, "identical responses": 1}
    assert remarks.responses == reasons
    assert "1 responses of groups are dropped: too long" in lines(remarks)
    ((_, reason),) = iter_pairs([one._replace(others=one.others[:2])], tokenizer, max_length=80)
    assert reason == "too long"
    pairs, dropped = tokenize_records([record(ASKED, long, [assistant("A")])], tokenizer, max_length=80)
    assert not pairs and dropped == {"too long": 1}
