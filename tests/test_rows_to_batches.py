"""From rows of a file to packed batches as a run has them: nothing is lost, repeated, or trained by mistake."""

import json

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from prefalign_jax.config import defaults
from prefalign_jax.data.pipeline import make_pair_set, train_batches
from prefalign_jax.experiment import read
from prefalign_jax.load_data import load_pairs
from prefalign_jax.types import CHOSEN, REJECTED, SIDES, Place

EOS = "<|im_end|>"
# Without the special tokens' own texts and the markers of turns, which mean something else.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda text: not any(mark in text for mark in ("<|", "Human", "Assistant"))
)
ANSWER = TEXT | st.sampled_from([" It", "s", " the", "\n", "", " a a a a a a a a a"])
ROWS = st.lists(
    st.tuples(st.sampled_from(["text", "messages", "transcript"]), TEXT, ANSWER, ANSWER), min_size=1, max_size=9
)


def row_of(number, kind, prompt, chosen, rejected):
    """A row with a prompt of its own, and what the model must see before an answer."""
    prompt = f"{number}: {prompt}"
    if kind == "text":
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}, prompt
    if kind == "transcript":
        start = f"\n\nHuman: {prompt}\n\nAssistant:"
        return {"chosen": start + chosen, "rejected": start + rejected}, start
    sides = {name: [{"role": "assistant", "content": text}] for name, text in
             (("chosen", chosen), ("rejected", rejected))}  # fmt: skip
    asked = [{"role": "user", "content": prompt}]
    return {"prompt": asked, **sides}, f"<|im_start|>user\n{prompt}{EOS}\n<|im_start|>assistant\n"


def reason(chosen, rejected):
    if not chosen.strip() or not rejected.strip():
        return "empty response"
    return "identical responses" if chosen == rejected else None


def read_back(batch):
    """[(number of the pair, prompt ids, chosen ids, rejected ids)] of a batch; every trained token is in one."""
    found = []
    for m in range(len(batch.index)):
        one = jax.tree.map(lambda x, m=m: x[m], batch._replace(reference=None))
        groups, length = len(one.source), one.tokens.shape[1]
        rows = {n: getattr(one, n).reshape(groups, -1) for n in ("tokens", "segments", "branches", "positions")}
        sides = [{} for _ in one.index]
        for g in range(groups):
            for source, target, slot in zip(one.source[g], one.target[g], one.slot[g], strict=True):
                pair, side = divmod(int(slot), SIDES)
                if pair < len(sides):
                    assert side in (CHOSEN, REJECTED)
                    at = source - source % length
                    mine = rows["segments"][g][at : at + length] == rows["segments"][g][source]
                    prompt = rows["tokens"][g][at : at + length][mine & (rows["branches"][g][at : at + length] == 0)]
                    sides[pair].setdefault("prompt", prompt.tolist())
                    assert sides[pair]["prompt"] == prompt.tolist()
                    ids = sides[pair].setdefault(side, [])
                    # Each token is predicted from the one before it, the first from the last of the prompt.
                    assert rows["positions"][g][source] == len(prompt) - 1 + len(ids)
                    assert rows["tokens"][g][source] == (ids or prompt.tolist())[-1]
                    ids.append(int(target))
        found += [(int(i), s["prompt"], s[CHOSEN], s[REJECTED]) for i, s in zip(one.index, sides, strict=True)]
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


NO_SHRINKING = [Phase.explicit, Phase.reuse, Phase.generate]  # an example is small, and costs a quarter of a second


@settings(
    deadline=None, max_examples=12, phases=NO_SHRINKING, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    given_rows=ROWS,
    size=st.sampled_from([(2, 1), (4, 2)]),
    groups=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
    shuffle=st.booleans(),
    cached=st.booleans(),
    data=st.data(),
)
def test_any_rows(tiny_tokenizer, directory, given_rows, size, groups, seed, shuffle, cached, data):
    rows = [row_of(number, *one) for number, one in enumerate(given_rows)]
    rows.append(row_of(len(rows), "text", "the last", " yes", " no"))  # so that there is one
    given_rows = [*given_rows, ("text", "the last", " yes", " no")]
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row, _ in rows), encoding="utf-8")
    config = defaults("dpo")
    config.data.path, config.data.cache_dir = str(file), str(directory / "cache") if cached else ""
    found = [load_pairs(read(config, complete=False).fitted(4096), tiny_tokenizer) for _ in range(1 + cached)][-1]

    # Every row is a pair or counted, in order, with the place that it came from.
    reasons = [reason(*one[2:]) for one in given_rows]
    accepted = [number for number, why in enumerate(reasons) if not why]
    assert found.dropped["training"] == {why: reasons.count(why) for why in set(reasons) - {None}}
    assert [pair.where for pair in found.training] == [Place(str(file), number + 1) for number in accepted]

    batch_size, micro_steps = size
    pairs = make_pair_set(found.training, batch_size, micro_steps=micro_steps, groups=groups)
    steps = len(accepted)  # batch_size epochs
    order = dict(seed=seed, shuffle=shuffle, stop=steps)
    batches = list(train_batches(pairs, start=0, **order))
    eos = tiny_tokenizer.eos_token_id
    numbers = []
    for batch in batches:
        for number, prompt, *sides in read_back(batch) if len(set(batch.index.reshape(-1))) == batch_size else ():
            _, _, *texts = given_rows[accepted[number]]
            for ids, text in zip(sides, texts, strict=True):
                assert tiny_tokenizer.decode(prompt + ids) == rows[accepted[number]][1] + text + EOS
                assert ids[-1] == eos and ids.count(eos) == 1
        numbers += batch.index.reshape(-1).tolist()

    # Each epoch has every pair once, and a run that begins in the middle goes on as it was.
    for epoch in np.array(numbers).reshape(batch_size, steps):
        assert sorted(epoch) == list(range(steps))
    start = data.draw(st.integers(0, steps))
    rest = list(train_batches(pairs, start=start, **order))
    for one, other in zip(rest, batches[start:], strict=True):
        assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))
