"""Token roles. "TRL" in a comment is TRL 1.16.0 on the same pair and tokenizer (tests/goldens/trl)."""

import functools
import json
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefalign_jax.data import chat as chat_
from prefalign_jax.data.chat import CHAT_TEMPLATES, iter_pairs, load_tokenizer, tokenize_records
from prefalign_jax.data.records import Record, read_records
from prefalign_jax.limits import time_limit
from prefalign_jax.models import endings
from prefalign_jax.types import Place, UserError

GOLDENS = Path(__file__).parent / "goldens"
EOS = "<|im_end|>"
SKY, BLUE, NO = "What colour is the sky?", " It is blue.", " No."
GARDEN = "Describe the garden. " * 12


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer of the TRL figures: byte-level BPE of 512 tokens, ChatML, no BOS."""
    return load_tokenizer(GOLDENS / "trl")


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """The same tokenizer, writing BOS or EOS, with another end-of-turn token, or without a template."""

    def load(single=None, **attributes):
        path = tmp_path_factory.mktemp("tokenizer")
        tokenizer = load_tokenizer(GOLDENS / "trl")
        if single:
            ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in single.split() if token != "$A"]
            tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
                single=single, special_tokens=ids
            )
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(path)
        return load_tokenizer(path)

    return load


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def chat(prompt, chosen, rejected):
    messages = [user(prompt)] if isinstance(prompt, str) else prompt
    return Record(messages, [assistant(chosen)], [assistant(rejected)] if rejected is not None else [])


def tokenize(tokenizer, *records, max_length=256, **options):
    """The pairs as text, (prompt, chosen, rejected) each, and what was dropped."""
    pairs, dropped = tokenize_records(records, tokenizer, max_length=max_length, **options)
    return [tuple(tokenizer.decode(ids) for ids in (p.prompt, p.chosen, p.rejected)) for p in pairs], dropped


def test_equals_trl_on_plain_text(tokenizer):
    rows = [json.loads(line) for line in (GOLDENS / "trl" / "pairs.jsonl").read_text().splitlines()]
    records, dropped = read_records(GOLDENS / "trl" / "pairs.jsonl")
    assert len(records) == 64 and not dropped
    pairs, dropped = tokenize_records(records, tokenizer, max_length=256)
    assert len(pairs) == 64 and not dropped
    for row, pair in zip(rows, pairs, strict=True):
        assert pair.prompt.tolist() == row["prompt_ids"]
        assert pair.chosen.tolist() == row["chosen_ids"]
        assert pair.rejected.tolist() == row["rejected_ids"]
        assert {pair.prompt.dtype, pair.chosen.dtype, pair.rejected.dtype} == {np.dtype(np.int32)}


HEADER = f"<|im_start|>user\n{SKY}{EOS}\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        # As TRL.
        (Record(SKY, BLUE, NO), (SKY, BLUE + EOS, NO + EOS)),
        # TRL's DPO trains the newline after the end of turn too (keep_end does), its ORPO writes EOS a second time.
        (chat(SKY, "It is blue.", "No."), (HEADER, f"It is blue.{EOS}", f"No.{EOS}")),
        # An empty answer ends at once. read_records drops such pairs; TRL trains on them.
        (chat(SKY, "It is blue.", ""), (HEADER, f"It is blue.{EOS}", EOS)),
        # The space joins the responses' first token, so it is theirs. As TRL.
        (Record(SKY + " ", "It is blue.", "No."), (SKY, BLUE + EOS, NO + EOS)),
        (Record("What colour is the s", "ky? It is blue.", "ea? No."), ("What colour is the", None, None)),
        # A merge on one side only moves the boundary of both.
        (Record(SKY + " ", "It is blue.", "\n"), (SKY, BLUE + EOS, f" \n{EOS}")),
        # TRL's DPO closes the begun turn and opens a second one; its ORPO puts that into the response.
        (
            chat([user("Sky?"), assistant("It is")], " blue.", " No."),
            (f"<|im_start|>user\nSky?{EOS}\n<|im_start|>assistant\nIt is", f" blue.{EOS}", f" No.{EOS}"),
        ),
        # As TRL: what the user wrote twice stays twice.
        (Record(SKY, SKY + BLUE, SKY + NO), (SKY, SKY + BLUE + EOS, SKY + NO + EOS)),
        # The text brings its own end: TRL adds another EOS.
        (Record(SKY, BLUE + EOS, NO + EOS + EOS), (SKY, BLUE + EOS, NO + EOS)),
        (Record(SKY, BLUE + EOS + "\n", NO), (SKY, BLUE + EOS, NO + EOS)),
        (chat(SKY, "It is blue." + EOS, "No."), (HEADER, f"It is blue.{EOS}", f"No.{EOS}")),
        # Without prompt and BOS nothing predicts the first token; TRL counts it as trained all the same.
        (Record("", " It is blue.", " It was."), (" It", f" is blue.{EOS}", f" was.{EOS}")),
        (Record("", BLUE, NO), "no prompt"),
        # TRL trains on pairs that say nothing.
        (Record(SKY, BLUE, BLUE), "identical responses"),
        (Record(SKY, BLUE, BLUE + EOS), "identical responses"),
        # Nothing may be trained after an EOS, and the text is not ours to cut.
        (Record(SKY, f" It{EOS} is", NO), "end token inside the response"),
        # Demonstrations.
        (Record(SKY, BLUE, ""), (SKY, BLUE + EOS, "")),
        (chat(SKY, "It is blue.", None), (HEADER, f"It is blue.{EOS}", "")),
        (Record("", BLUE, ""), (" It", f" is blue.{EOS}", "")),
    ],
)
def test_boundary_and_end(tokenizer, record, expected):
    pairs, dropped = tokenize(tokenizer, record)
    if isinstance(expected, str):
        assert (pairs, dropped) == ([], {expected: 1})
        return
    assert not dropped
    for text, wanted in zip(pairs[0], expected, strict=True):
        assert wanted is None or text == wanted


def test_formats_that_trl_misreads(tokenizer, tmp_path):
    rows = [
        # TRL takes the longest common prefix of the strings, which ends inside the answer: "... I think it is".
        {
            "chosen": f"\n\nHuman: {SKY}\n\nAssistant: I think it is blue.",
            "rejected": f"\n\nHuman: {SKY}\n\nAssistant: I think it is black, I don't know.",
        },
        # UltraFeedback: TRL's DPO fails with a TypeError.
        {"prompt": SKY, "chosen": [user(SKY), assistant("Blue.")], "rejected": [user(SKY), assistant("No.")]},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs, _ = tokenize(tokenizer, *read_records(tmp_path / "data.jsonl")[0])
    assert pairs == [
        (
            f"\n\nHuman: {SKY}\n\nAssistant:",
            f" I think it is blue.{EOS}",
            f" I think it is black, I don't know.{EOS}",
        ),
        (HEADER, f"Blue.{EOS}", f"No.{EOS}"),
    ]


def test_bos_is_written_once_before_the_prompt(variant):
    bos = "<|im_start|>"
    tokenizer = variant(f"{bos} $A", bos_token=bos)
    # As TRL; there a prompt that begins with BOS has two.
    expected = (bos + SKY, BLUE + EOS, NO + EOS)
    assert tokenize(tokenizer, Record(SKY, BLUE, NO))[0] == [expected]
    assert tokenize(tokenizer, Record(bos + SKY, BLUE, NO))[0] == [expected]
    # With BOS an empty prompt predicts any response.
    assert tokenize(tokenizer, Record("", BLUE, NO))[0] == [(bos, BLUE + EOS, NO + EOS)]
    # A template writes its own BOS, or none.
    assert tokenize(tokenizer, chat(SKY, "It is blue.", "No."))[0][0][0] == HEADER


def test_a_tokenizer_that_writes_eos_adds_none(variant):
    tokenizer = variant(f"$A {EOS}")
    # TRL's DPO trains EOS twice here.
    assert tokenize(tokenizer, Record(SKY, BLUE, NO))[0] == [(SKY, BLUE + EOS, NO + EOS)]
    assert tokenize(tokenizer, chat(SKY, "It is blue.", "No."))[0] == [(HEADER, f"It is blue.{EOS}", f"No.{EOS}")]


def test_end_of_turn_that_is_not_eos(variant):
    tokenizer = variant(eos_token="<|pad|>")
    record = chat(SKY, "It is blue.", "No.")
    assert tokenize(tokenizer, record)[0] == [(HEADER, f"It is blue.{EOS}<|pad|>", f"No.{EOS}<|pad|>")]
    assert tokenize(tokenizer, record, keep_end=True)[0] == [(HEADER, f"It is blue.{EOS}\n", f"No.{EOS}\n")]


def test_keep_end_trains_what_trls_dpo_trains(tokenizer):
    record = chat(SKY, "It is blue.", "No.")
    assert tokenize(tokenizer, record, keep_end=True)[0] == [(HEADER, f"It is blue.{EOS}\n", f"No.{EOS}\n")]
    assert tokenize(tokenizer, Record(SKY, BLUE, NO), keep_end=True)[0] == [(SKY, BLUE + EOS, NO + EOS)]


def test_too_long_pairs(tokenizer):
    long, short = Record(GARDEN, BLUE, NO), Record(SKY, BLUE, NO)
    kept = (SKY, BLUE + EOS, NO + EOS)
    # TRL's DPO drops prompts that leave no room. Its ORPO cuts both responses to nothing, and the loss is NaN.
    assert tokenize(tokenizer, long, short, max_length=60) == ([kept], {"too long": 1})
    assert tokenize(tokenizer, long, max_length=60) == ([], {"too long": 1})
    assert tokenize(tokenizer, long, max_length=60, too_long="truncate_response") == ([], {"too long": 1})
    # The limit counts the prompt (6 tokens) and the longer response (5), EOS included.
    assert tokenize(tokenizer, short, max_length=11) == ([kept], {})
    assert tokenize(tokenizer, short, max_length=10) == ([], {"too long": 1})
    # As TRL's ORPO: a response that is cut has no end to learn. The shorter response keeps its own.
    assert tokenize(tokenizer, short, max_length=9, too_long="truncate_response")[0] == [(SKY, " It is blue", NO + EOS)]
    assert tokenize(tokenizer, short, max_length=8, too_long="truncate_response")[0] == [(SKY, " It is", NO)]
    assert tokenize(tokenizer, short, max_length=6, too_long="truncate_response") == ([], {"too long": 1})
    same = Record(SKY, " It is blue.", " It is red.")
    assert tokenize(tokenizer, same, max_length=8, too_long="truncate_response") == (
        [],
        {"identical after truncation": 1},
    )
    # A prompt loses its beginning, never the responses their end.
    cut = {"too_long": "truncate_prompt"}
    end = tokenizer.decode(tokenizer(SKY).input_ids[-3:])
    assert tokenize(tokenizer, short, max_length=8, **cut) == ([(end, BLUE + EOS, NO + EOS)], {})
    for length in (6, 20, 64):
        pairs, _ = tokenize_records([long], tokenizer, max_length=length, **cut)
        assert len(pairs[0].prompt) + len(pairs[0].chosen) == length
        assert GARDEN.endswith(tokenizer.decode(pairs[0].prompt))
    assert tokenize(tokenizer, long, max_length=5, **cut) == ([], {"too long": 1})


def test_truncating_a_prompt_keeps_bos(variant):
    tokenizer = variant("<|im_start|> $A", bos_token="<|im_start|>")
    record = Record(SKY, BLUE, NO)
    pairs, _ = tokenize_records([record], tokenizer, max_length=8, too_long="truncate_prompt")
    whole, _ = tokenize_records([record], tokenizer, max_length=100)
    assert pairs[0].prompt.tolist() == [whole[0].prompt[0], *whole[0].prompt[-2:]]
    # BOS alone is no prompt.
    assert tokenize(tokenizer, record, max_length=6, too_long="truncate_prompt") == ([], {"too long": 1})
    assert tokenize(tokenizer, Record("", BLUE, NO), max_length=5, too_long="truncate_prompt") == ([], {"too long": 1})


def test_weight_and_order_and_no_more_read_than_asked_for(tokenizer):
    """Of an iterator too, a batch at a time and one ahead."""
    read = []

    def records():
        for i in range(5000):
            read.append(i)
            yield Record(f"{SKY} {i}", BLUE, NO, weight=1.0 + i)

    pairs = iter_pairs(records(), tokenizer, max_length=64)
    found = [next(pairs) for _ in range(1500)]
    assert len(read) == 3 * 1024
    assert [pair.weight for _, pair in found] == [1.0 + i for i in range(1500)]
    assert all(pair.weight == record.weight for record, pair in found)
    assert tokenizer.decode(found[1499][1].prompt) == f"{SKY} 1499"


@pytest.mark.parametrize("make", [Record, chat])
def test_unpaired_records_are_tokenized_as_demonstrations(tokenizer, make):
    """Of both labels, with what a pair carries besides its tokens."""
    wanted, unwanted = make(SKY, BLUE, ""), make(SKY, NO, "")
    records = [
        record._replace(rejected=type(record.chosen)(), label=label, margin=margin)
        for record, label, margin in ((wanted, True, 0.5), (unwanted, False, 2.0))
    ]
    pairs, dropped = tokenize_records(records, tokenizer, max_length=64)
    assert [(pair.label, pair.margin) for pair in pairs] == [(True, 0.5), (False, 2.0)]
    assert [tokenizer.decode(pair.chosen) for pair in pairs] == [BLUE + EOS, NO + EOS]
    assert [len(pair.rejected) for pair in pairs] == [0, 0]
    assert tokenizer.decode(pairs[0].prompt) == tokenizer.decode(pairs[1].prompt) and not dropped
    (plain,), _ = tokenize_records([Record(SKY, BLUE, NO)], tokenizer, max_length=64)
    assert plain.label is True and np.isnan(plain.margin)


def test_errors_say_what_to_do(tokenizer, variant, tmp_path):
    record = chat(SKY, "It is blue.", "No.")._replace(where=Place("data.jsonl", 7))
    cases = [
        (variant(chat_template=None), {}, r"^data.jsonl, row 7: .*no chat template.*set data.chat_template to chatml"),
        (variant(chat_template="{{ raise_exception('no\nsystem') }}"), {}, "^data.jsonl, row 7: .*not render it: no$"),
        (variant(chat_template="{{ messages[5].role }}"), {}, r"^data.jsonl, row 7: .*does not render it"),
        (tokenizer, {"too_long": "cut"}, "too_long: expected one of drop, truncate_prompt, truncate_response"),
        (tokenizer, {"max_length": 1}, "max_length: expected at least 2 tokens, found 1"),
    ]
    for tokenizer, options, message in cases:
        with pytest.raises(UserError, match=message):
            tokenize(tokenizer, record, **options)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=str(path)) as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="expected chatml, chatml_tools, llama3, zephyr or a .*, found 'chatlm'"):
        load_tokenizer(GOLDENS / "trl", "chatlm")
    with pytest.raises(UserError, match="no end-of-sequence token"):
        variant(eos_token=None)


ENDLESS = {
    "nested ranges": "{% for a in range(9999) %}" * 3 + "{% endfor %}" * 3,
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(30) }}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_without_end_ends(variant, monkeypatch, template):
    monkeypatch.setattr(chat_, "time_limit", functools.partial(time_limit, 0.2))
    monkeypatch.setattr(endings, "time_limit", functools.partial(time_limit, 0.2))
    endless, began = variant(chat_template=template), time.monotonic()
    record = Record([user("a")], [assistant("b")], [], where=Place("x", 3))
    with pytest.raises(UserError, match="^x, row 3: the chat template does not render it: it takes more than 0.2 s"):
        tokenize(endless, record)
    assert endings.end_of_turn(endless) is None
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_named_chat_templates(tiny_tokenizer, tmp_path, name):
    bpe = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|pad|>", chat_template=None
    )
    bpe.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, name)
    template = CHAT_TEMPLATES[name]
    assert tokenizer.eos_token == (template.eos or "<|pad|>")
    # ChatML's tokens are in the vocabulary and keep their ids, Llama 3's are new.
    assert len(tokenizer) == len(tiny_tokenizer) + (4 if name == "llama3" else 0)
    assert all(len(tokenizer(token, add_special_tokens=False).input_ids) == 1 for token in template.tokens)
    pairs, _ = tokenize(tokenizer, chat("Sky?", "Blue.", "No."))
    prompt, chosen, rejected = pairs[0]
    assert (chosen, rejected) == (f"Blue.{tokenizer.eos_token}", f"No.{tokenizer.eos_token}")
    assert prompt.count("Sky?") == 1 and "assistant" in prompt


def test_chat_template_from_a_file_and_from_text(tmp_path, variant):
    jinja = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (tmp_path / "plain.jinja").write_text(jinja)
    for template in (str(tmp_path / "plain.jinja"), jinja):
        tokenizer = load_tokenizer(GOLDENS / "trl", template)
        # A template without any end of turn: EOS alone ends the response.
        pairs, _ = tokenize(tokenizer, chat("q", "Blue. ", "No."))
        assert pairs == [("[user]q[assistant]", f"Blue. {EOS}", f"No.{EOS}")]
    # An unknown character is special to the tokenizer, but ends no turn.
    tokenizer = variant(chat_template=jinja, unk_token="<|pad|>")
    pairs, _ = tokenize(tokenizer, chat("q", "Blue <|pad|> ", "No."))
    assert pairs == [("[user]q[assistant]", f"Blue <|pad|> {EOS}", f"No.{EOS}")]


TOOLS = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_system_prompts_tools_and_calls_go_through_the_template_or_stop_the_run(variant):
    weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    asked = [{"role": "system", "content": "Be brief. "}, user("Rome?")]
    calling = Record(asked, [{"role": "assistant", "content": "", "tool_calls": [call]}], [], tools=(weather,))
    ((prompt, chosen, _),), dropped = tokenize(variant(chat_template=TOOLS), calling)
    assert '[tools][{"type": "function", "function": {"name": "weather"' in prompt and not dropped
    assert prompt.endswith("[system]Be brief. [user]Rome?[assistant]")
    assert chosen == f'weather({{"city": "Rome"}}){EOS}'
    blind = {
        "system message": "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
        "tools": TOOLS.replace("tools | tojson", "1"),
        "tool calls": TOOLS.replace("c.function.name", "1"),
    }
    said = calling._replace(chosen=[assistant("Sun.")])
    records = {"system message": said._replace(tools=()), "tools": said, "tool calls": calling._replace(tools=())}
    for what, template in blind.items():
        record = records[what]._replace(where=Place("x", 3))
        with pytest.raises(UserError, match=f"^x, row 3: the chat template leaves out the {what}; set data.chat_templ"):
            tokenize(variant(chat_template=template), record)


# Without the special tokens' own texts, which hypothesis finds in the sources: what those do has its tests above.
TEXT = (
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from([" ", "\n", " It", "s", " the"])
).filter(lambda text: "<|" not in text)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXT, chosen=TEXT.filter(bool), rejected=TEXT.filter(bool), as_chat=st.booleans())
def test_any_text_survives(tokenizer, prompt, chosen, rejected, as_chat):
    record = chat(prompt, chosen, rejected) if as_chat else Record(prompt, chosen, rejected)
    pairs, dropped = tokenize_records([record], tokenizer, max_length=4096)
    if chosen == rejected:
        assert dropped == {"identical responses": 1}
    elif not pairs:
        # Nothing is left of the prompt: it was empty, or one token that merged with a response.
        assert dropped == {"no prompt": 1} and len(tokenizer(prompt).input_ids) <= 1 and not as_chat
    else:
        (pair,) = pairs
        start = f"<|im_start|>user\n{prompt}{EOS}\n<|im_start|>assistant\n" if as_chat else prompt
        for response, text in ((pair.chosen, chosen), (pair.rejected, rejected)):
            assert tokenizer.decode(np.concatenate([pair.prompt, response])) == start + text + EOS
            assert response[-1] == tokenizer.eos_token_id
            assert np.sum(response == tokenizer.eos_token_id) == 1
        assert len(pair.prompt) > 0 and not dropped


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=TEXT, completion=TEXT.filter(bool), as_chat=st.booleans(), label=st.booleans(), margin=st.floats(width=32)
)
def test_any_labelled_text_survives(tokenizer, prompt, completion, as_chat, label, margin):
    record = chat(prompt, completion, None) if as_chat else Record(prompt, completion, "")
    pairs, dropped = tokenize_records([record._replace(label=label, margin=margin)], tokenizer, max_length=4096)
    start = f"<|im_start|>user\n{prompt}{EOS}\n<|im_start|>assistant\n" if as_chat else prompt
    (pair,) = pairs  # the end of the response always remains for an empty prompt to predict
    assert tokenizer.decode(np.concatenate([pair.prompt, pair.chosen])) == start + completion + EOS
    assert len(pair.prompt) > 0 and len(pair.rejected) == 0 and not dropped
    assert pair.label is label and np.array_equal(pair.margin, margin, equal_nan=True)
