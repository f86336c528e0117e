import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefalign_jax.data.contamination import contamination
from prefalign_jax.data.records import Record
from prefalign_jax.types import UserError

WORDS = [f"w{i}" for i in range(40)]


def text(*numbers):
    return " ".join(WORDS[i] for i in numbers)


def dropped(prompts, record, **options):
    _, counts = contamination([record], prompts, held_out_too=True, **options)
    return counts["in a held-out prompt"]


@pytest.mark.parametrize("where", ["prompt", "chosen", "rejected"])
def test_thirteen_words_in_a_row_anywhere_are_enough(where):
    prompt = text(*range(20))
    record = Record("x", "y", "z")._replace(**{where: f"Before {text(*range(4, 17)).upper()}! After"})
    assert dropped([prompt], record) == 1
    assert dropped([prompt], record, ngram=14) == 0
    assert dropped([prompt], record._replace(**{where: text(*range(4, 16), 30, *range(16, 20))})) == 0


def test_a_shorter_prompt_is_looked_for_whole():
    prompt = text(*range(10))
    assert dropped([prompt], Record("x", f"Question: {prompt}?", "z")) == 1
    assert dropped([prompt], Record("x", text(*range(9)), text(*range(1, 10)))) == 0


def test_a_prompt_that_anybody_may_write_is_compared_with_prompts_alone():
    assert dropped(["Why is that?"], Record("why is that", "a", "b")) == 1
    assert dropped(["Why is that?"], Record("And why is that so?", "Why is that?", "b")) == 0


def test_only_what_the_person_wrote_counts_of_a_benchmark():
    system, question = text(*range(15)), text(*range(20, 35))
    chat = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    assert dropped([chat], Record(system, "a", "b")) == 0
    assert dropped([chat], Record([{"role": "user", "content": question}], "a", "b")) == 1
    transcript = f"\n\nHuman: {question}\n\nAssistant: {system}\n\nHuman: Why?\n\nAssistant:"
    assert dropped([transcript], Record(system, "a", "b")) == 0
    assert dropped([transcript], Record(question, "a", "b")) == 1


def test_the_benchmark_that_was_hit_is_named(tmp_path):
    files = []
    for number in range(2):
        files.append(tmp_path / f"bench{number}.jsonl")
        files[-1].write_text(json.dumps({"prompt": text(*range(15 * number, 15 * number + 15))}) + "\n")
    rows = [Record(text(*range(15)), "a", "b"), Record("free", "a", "b"), Record(text(*range(15, 30)), "a", "b")]
    kept, counts = contamination(rows, [], benchmarks=f"{files[0]}, {files[1]}")
    assert kept == rows[1:2]
    assert counts == {f"in benchmark {file.name}": 1 for file in files}


def test_a_benchmark_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UserError, match="bench.jsonl: no such file"):
        contamination([Record("a", "b", "c")], [], benchmarks=str(tmp_path / "bench.jsonl"))


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), max_size=4),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), max_size=6),
    st.integers(2, 10),
)
def test_it_agrees_with_comparing_every_run(prompts, texts, ngram):
    records = [Record("prompt of its own", text(*numbers), "") for numbers in texts]
    kept, counts = contamination(records, [text(*prompt) for prompt in prompts], held_out_too=True, ngram=ngram)

    def runs(numbers, size):
        return [numbers[i : i + size] for i in range(len(numbers) - size + 1)]

    def hit(numbers):
        for prompt in prompts:
            size = min(ngram, len(prompt))
            if size >= min(8, ngram) and any(run in runs(numbers, size) for run in runs(prompt, size)):
                return True
        return False

    assert kept == [record for record, numbers in zip(records, texts, strict=True) if not hit(numbers)]
    assert sum(counts.values()) == len(records) - len(kept)
