"""Conversations of several answers: where prompt and responses part, in whatever way a row keeps them."""

import json
import random

import pytest

from prefalign_jax.data.conversation import is_answer, is_trained, parting
from prefalign_jax.data.memory import MemoryRows
from prefalign_jax.data.reading import Tally
from prefalign_jax.data.records import iter_records
from prefalign_jax.types import UserError
from published_rows import assistant, user

FUNCTION = {"name": "temp", "arguments": {"city": "Oslo"}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": FUNCTION}]}
SUPERVISED = {"responses": ("chosen",)}


def tool(text):
    return {"role": "tool", "content": text}


def read(*rows, **kind):
    tally = Tally()
    records = list(iter_records(MemoryRows("rows", rows), tally, **kind))
    return [record[:3] for record in records], tally


def turn(rng, number):
    """A user's turn and what is done about it: calls with results, or answers, at random."""
    calls = [message for i in range(rng.randint(0, 2)) for message in (CALL, tool(f"r{number}.{i} {rng.random()}"))]
    return [user(f"q{number}"), *calls, assistant(f"a{number} {rng.random()}")]


def talk(rng, turns):
    return [message for number in range(turns) for message in turn(rng, number)]


def sharegpt(messages):
    names = {"user": "human", "tool": "observation", "system": "system"}

    def one(message):
        if message.get("tool_calls"):
            return {"from": "function_call", "value": json.dumps(message["tool_calls"][0]["function"])}
        return {"from": names.get(message["role"], "gpt"), "value": message["content"]}

    return list(map(one, messages))


@pytest.mark.parametrize("seed", range(20))
def test_a_pair_is_the_same_in_whatever_a_row_keeps_it(seed):
    rng = random.Random(seed)
    # Both sides begin with an answer or a call, and those differ.
    prompt = [*talk(rng, rng.randint(0, 2)), user("now")]
    begins = rng.choice([[assistant("c"), CALL], [CALL, assistant("r")], [assistant("c"), assistant("r")]])
    chosen, rejected = (([begun, user("more"), *talk(rng, rng.randint(0, 2)), assistant("end")]) for begun in begins)
    whole = {"chosen": [*prompt, *chosen], "rejected": [*prompt, *rejected]}
    containers = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        {"prompt": prompt, **whole},
        whole,
        {side: json.dumps(messages) for side, messages in whole.items()},
        {f"{side}_conversations": messages for side, messages in whole.items()},
        {"conversations": sharegpt(prompt), "chosen": sharegpt(chosen), "rejected": sharegpt(rejected)},
        {"messages": prompt, "chosen": chosen, "rejected": rejected},
        {"input": {"messages": prompt}, "preferred_output": chosen, "non_preferred_output": rejected},
        {"prompt": prompt, "chosen": {"messages": chosen}, "rejected": json.dumps({"messages": rejected})},
        {side: [{**message, "name": None, "weight": None} for message in whole[side]] for side in whole},
        {side: [*whole[side], user("Thanks!")] for side in whole},
    ]
    for row in containers:
        assert read(row)[0] == [(prompt, chosen, rejected)]
    # The pair as two labelled completions, and its chosen response as a demonstration, have the same prompt.
    assert read(whole, unpaired=True)[0] == [(prompt, chosen, []), (prompt, rejected, [])]
    assert read(whole, **SUPERVISED)[0] == [(prompt, chosen, [])]
    # The last answer of each alone is trained: nothing else of the record changes.
    ((before, *sides),) = read(whole, train_on="last")[0]
    assert before == prompt
    for side, given in zip(sides, (chosen, rejected), strict=True):
        assert [is_trained(message) for message in side] == [False] * (len(side) - 1) + [True]
        assert [{k: v for k, v in message.items() if k != "weight"} for message in side] == given


@pytest.mark.parametrize("seed", range(20))
def test_a_demonstration_is_its_own_messages_and_every_answer_is_trained(seed):
    rng = random.Random(seed)
    system = [{"role": "system", "content": "Be brief."}] * rng.randint(0, 1)
    messages = [*system, *talk(rng, rng.randint(1, 4))]
    rest = [user("Thanks!"), tool("x")][: rng.randint(0, 2)]
    for row in (
        {"messages": messages},
        {"messages": [*messages, *rest]},
        {"conversations": sharegpt([*messages, *rest])},
        {"messages": json.dumps(messages)},
        {"prompt": "q0", "messages": messages},
        {"system": "Be brief." if system else None, "messages": messages[len(system) :]},
    ):
        ((prompt, response, _),), tally = read(row, **SUPERVISED)
        assert prompt + response == messages
        assert not any(map(is_answer, prompt)) and is_answer(response[0]) and is_answer(response[-1])
        field = next(name for name in ("messages", "conversations") if name in row)
        cut = isinstance(row[field], list) and len(row[field]) > len(messages)
        assert tally.unread == ({f"{field}[] after the last answer": 1} if cut else {})
        several = sum(map(is_answer, messages)) > 1
        assert tally.notes == ({"with several answers that are trained": 1} if several else {})
        # The last alone is what the row without it as its prompt, and the last as its completion, is.
        last = {"prompt": messages[:-1], "completion": messages[-1:]}
        assert read(row, **SUPERVISED, train_on="last")[0] == read(last, **SUPERVISED)[0]


Q, A, B, T = user("q"), assistant("a"), assistant("b"), tool("t")
OFF = {**A, "weight": 0.0}
PARTINGS = {
    # chosen, rejected, (prompt, chosen, rejected) or why there is none
    "at an answer": ([Q, A, user("r"), A], [Q, B, user("s"), B], ([Q], [A, user("r"), A], [B, user("s"), B])),
    "at a later answer": ([Q, A, T, A], [Q, A, T, B], ([Q, A, T], [A], [B])),
    "at a tool's result": ([Q, A, T, A], [Q, A, tool("u"), B], ([Q], [OFF, T, A], [OFF, tool("u"), B])),
    "at a turn": (
        [Q, A, user("r"), B],
        [Q, A, user("s"), B],
        ([Q], [OFF, user("r"), B], [OFF, user("s"), B]),
    ),
    "at the second of two answers": ([Q, A, A], [Q, A, B], ([Q], [OFF, A], [OFF, B])),
    "at an answer and a turn": ([Q, A, B], [Q, A, user("r"), A], ([Q], [OFF, B], [OFF, user("r"), A])),
    "after a greeting": ([A, Q, A], [A, Q, B], ([A, Q], [A], [B])),
    "one goes on": ([Q, A], [Q, A, user("r"), B], "nothing of a response is trained"),
    "nowhere": ([Q, A, user("r"), B], [Q, A, user("r"), B], "identical responses"),
    "before the first answer": ([Q, A], [Q, user("r"), A], "prompts differ"),
    "at the first message": ([Q, A], [user("p"), A], "prompts differ"),
    "at a greeting": ([A, Q, A], [B, Q, B], "prompts differ"),
}


@pytest.mark.parametrize(("chosen", "rejected", "due"), PARTINGS.values(), ids=PARTINGS)
def test_where_a_pair_parts(chosen, rejected, due):
    """A response begins with an answer; what both share of it is read and not trained."""
    records, tally = read({"chosen": chosen, "rejected": rejected})
    assert (records or list(tally.dropped)) == [due]
    assert read({"chosen": rejected, "rejected": chosen})[1].dropped == tally.dropped


@pytest.mark.parametrize("seed", range(30))
def test_prompt_and_responses_are_the_rows_own_messages_and_what_is_trained_is_not_shared(seed):
    rng = random.Random(seed)
    kinds = [user("x"), user("y"), assistant("x"), assistant("y"), tool("x")]
    shared = [user("q"), *rng.choices(kinds, k=rng.randint(0, 5))]
    sides = [[*shared, *rng.choices(kinds, k=rng.randint(0, 4)), assistant(rng.choice("xyz"))] for _ in range(2)]
    begin, part = parting(sides)
    assert begin <= part and sides[0][:part] == sides[1][:part]
    assert part == min(map(len, sides)) or sides[0][part] != sides[1][part]
    for prompt, *responses in read(dict(zip(("chosen", "rejected"), sides, strict=True)))[0]:
        assert len(prompt) == begin and not is_answer(prompt[-1])
        for side, response in zip(sides, responses, strict=True):
            assert is_answer(response[0])
            assert [{**message, "weight": 1} for message in [*prompt, *response]] == [{**m, "weight": 1} for m in side]
            for number, message in enumerate(response, begin):
                assert is_trained(message) == (is_answer(message) and number >= part)


def test_a_labelled_conversation_is_judged_by_the_answer_to_its_last_turn():
    """With the calls that belong to it; a prompt that is given says what is judged."""
    messages = [Q, A, user("r"), CALL, T, B]
    row = {"messages": messages, "label": True}
    assert read(row, unpaired=True)[0] == [(messages[:3], messages[3:], [])]
    assert read(row, unpaired=True, train_on="last")[0] == [(messages[:5], messages[5:], [])]
    given = {"prompt": messages[:1], "completion": messages[1:], "label": False}
    assert read(given, unpaired=True)[0] == [(messages[:1], messages[1:], [])]


def test_a_prompt_that_is_given_is_the_prompt():
    row = {"prompt": [Q, A, user("r")], "completion": [B, user("s"), A]}
    records, tally = read(row, **SUPERVISED)
    assert records == [(row["prompt"], row["completion"], [])]
    assert tally.notes["with earlier answers, which are not trained"] == 1
    # Also where the responses begin alike: both are trained on it.
    pair = {"prompt": [Q], "chosen": [A, T, A], "rejected": [A, T, B]}
    assert read(pair)[0] == [([Q], [A, T, A], [A, T, B])]
    for wrong in ([T, A], [user("r"), A], [{"role": "system", "content": "s"}, Q, A]):
        with pytest.raises(UserError, match="field 'chosen': expected an assistant message first"):
            read({**pair, "chosen": wrong})


def test_the_last_answer_that_a_row_trains_is_the_last():
    messages = [Q, {**A, "weight": 2}, user("r"), {**B, "weight": 0}]
    records, tally = read({"messages": messages}, **SUPERVISED, train_on="last")
    assert records == [([Q], [{**A, "weight": 2.0}, user("r"), {**B, "weight": 0.0}], [])]
    assert tally.notes == {"with answers that are read and not trained": 1}
    messages[3]["weight"] = 1
    assert read({"messages": messages}, **SUPERVISED, train_on="last")[0] == [([Q, A, user("r")], [B], [])]
    with pytest.raises(UserError, match="train_on: expected one of all, last, found 'first'"):
        read({"messages": messages}, **SUPERVISED, train_on="first")
