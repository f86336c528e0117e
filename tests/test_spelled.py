"""Special tokens that a row's own text spells: counted, and text where that is asked for."""

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from prefalign_jax.data.chat import tokenize_prompts, tokenize_records
from prefalign_jax.data.records import Prompt, Record
from prefalign_jax.data.remarks import Remarks, lines
from prefalign_jax.data.template import ChatOptions
from prefalign_jax.types import Place
from templates import ENDS, tokenizer_of

WORDS = st.lists(
    st.sampled_from(["a", " b", "<|im_end|>", "<|im_start|>", "<|im", "_end|>", "\n", "[INST]", "<", "é"]),
    min_size=1,
    max_size=6,
).map("".join)


@pytest.fixture(scope="module")
def tokenizers():
    return {family: tokenizer_of(family) for family in ENDS}


def chat(prompt, chosen, rejected="no"):
    sides = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return Record([{"role": "user", "content": prompt}], *sides)


def tokenized(tokenizer, record, split):
    remarks = Remarks()
    pairs, _ = tokenize_records(
        [record], tokenizer, max_length=4096, chat=ChatOptions(split_special=split), remarks=remarks
    )
    return pairs, remarks


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=WORDS, chosen=WORDS, plain=st.booleans())
def test_text_stays_text_and_the_templates_own_tokens_stay_tokens(tokenizers, prompt, chosen, plain):
    """Whatever is spelled: as many control tokens as in a row that spells none, and the same text."""
    tokenizer = tokenizers["chatml"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    make = Record if plain else chat
    pairs, remarks = tokenized(tokenizer, make(prompt, chosen + "x", chosen + "y"), split=True)
    assume(pairs or not plain)  # a prompt of one token that the response continues is no prompt, which is counted
    (pair,), (blank,) = pairs, tokenized(tokenizer, make("p", "c", "d"), split=False)[0]
    for side in ("prompt", "chosen", "rejected"):
        ids, few = getattr(pair, side).tolist(), getattr(blank, side).tolist()
        if side != "prompt" or prompt.strip():
            assert [i for i in ids if i in special] == [i for i in few if i in special]
    text = tokenizer.decode([*pair.prompt, *pair.chosen])
    assert prompt.strip() in text and (chosen + "x") in text
    texts = (prompt + chosen,) if plain else (prompt, chosen)
    spelled = any(token in text for token in ("<|im_end|>", "<|im_start|>", "[INST]") for text in texts)
    assert remarks.special == spelled and not remarks.meeting
    assert lines(remarks, split=True) == lines(remarks) == [] or lines(remarks, split=True)[0].endswith(
        "they stay text"
    )


@pytest.mark.parametrize("family", ENDS)
def test_where_nothing_is_spelled_nothing_changes(tokenizers, family):
    record = chat("Say <b>hi</b>", "hi you")
    (one,), (other,) = (tokenized(tokenizers[family], record, split)[0] for split in (False, True))
    assert all(
        getattr(one, side).tolist() == getattr(other, side).tolist() for side in ("prompt", "chosen", "rejected")
    )


def test_what_becomes_a_control_token_is_said_with_what_keeps_it_text(tokenizers):
    _, remarks = tokenized(tokenizers["chatml"], chat("What is <|im_end|>?", "An end"), split=False)
    (line,) = lines(remarks)
    assert (
        "1 records spell special tokens in their text ('<|im_end|>')" in line and "data.special_in_text=split" in line
    )


def test_prompts_alone_are_split_as_those_of_pairs(tokenizers):
    tokenizer, split = tokenizers["chatml"], ChatOptions(split_special=True)
    (pair,), _ = tokenized(tokenizer, chat("What is <|im_end|>?", "An end"), split=True)
    (asked,) = tokenize_prompts([Prompt(chat("What is <|im_end|>?", "").prompt, "", Place())], tokenizer, split)
    assert asked.tolist() == pair.prompt.tolist()
    (asked,) = tokenize_prompts(["What is <|im_end|>?"], tokenizer, split)
    assert tokenizer.decode(asked) == "What is <|im_end|>?" and tokenizer.eos_token_id not in asked


def test_variables_that_a_row_tells_the_template_are_its_text_too(tokenizers):
    record = chat("Hi", "a")._replace(chat_template_kwargs=(("mood", "<|im_end|>"),))
    assert tokenized(tokenizers["chatml"], record, split=False)[1].special == 1
