"""`prefalign generate`: prompts in, samples out; stopped anywhere, it goes on with the same samples."""

import dataclasses
import json
import os

import numpy as np
import pytest

from prefalign_jax import commands
from prefalign_jax.commands import generate
from prefalign_jax.data.chat import tokenize_prompts
from prefalign_jax.files import hold
from prefalign_jax.generation.sample_files import read_samples
from prefalign_jax.generation.sampling import Sampling
from prefalign_jax.models import hf_io
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.endings import stop_ids
from prefalign_jax.types import UserError
from small import CONFIG, make_params

PROMPTS = [
    {"prompt": "Boil the water, add", "id": "tea"},
    {"prompt": [{"role": "user", "content": "Is the sky blue?"}]},
    {"prompt": "The policy", "chosen": " is good", "rejected": " is bad"},
    {"prompt": "The policy", "completion": " is another"},
]


@pytest.fixture(scope="module")
def model(tiny_tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "small"
    config = dataclasses.replace(CONFIG, vocab_size=len(tiny_tokenizer))
    hf_io.save_params(make_params(0, make_decoder(config)), config, directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def run(model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))

    def go(*options):
        words = [f"--model={model}", f"--prompts={prompts}", f"--out={tmp_path / 'out.jsonl'}", "--max_new_tokens=6"]
        return commands.main(["generate", *words, "--batch_size=8", *options])

    return go


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_samples_are_written_and_a_stopped_run_goes_on(run, tmp_path, capsys, tiny_tokenizer):
    out = tmp_path / "out.jsonl"
    assert run("--n=2", "--top_k=40") == 0
    assert "left out: 1 the prompt of an earlier row" in capsys.readouterr().err
    whole = out.read_text()
    found = rows(tmp_path)
    assert sorted((json.dumps(row["prompt"]), row["sample"]) for row in found) == sorted(
        (json.dumps(row["prompt"]), j) for row in PROMPTS[:3] for j in range(2)
    )
    for row in found:
        assert len(row["tokens"]) == len(row["logps"]) <= 6
        assert row["response"] == tiny_tokenizer.decode(row["tokens"], skip_special_tokens=True)
        assert row["settings"]["top_k"] == 40
    assert {s.id for s in read_samples(out)} == {"tea", ""}

    out.write_text(whole[: len(whole) // 2])  # killed in the middle of a line
    assert run("--n=2", "--top_k=40") == 0
    again = rows(tmp_path)
    assert sorted(map(json.dumps, [[r["prompt"], r["tokens"]] for r in again])) == sorted(
        map(json.dumps, [[r["prompt"], r["tokens"]] for r in found])
    )
    before = out.stat().st_mtime_ns
    assert run("--n=2", "--top_k=40", "--limit=2") == 0
    assert out.stat().st_mtime_ns == before
    assert "holds all 4 samples" in capsys.readouterr().err
    assert run("--n=2", "--top_k=30") == 2
    assert "its samples have top_k=40, not 30" in capsys.readouterr().err
    assert run("--seed=1", "--top_k=40") == 2


@pytest.mark.parametrize("text", ["mine", '[{"output": 1}]', '{"prompt": "a", "chosen": "b"}', '{"prompt": "a"}\nmine'])
def test_a_file_of_another_kind_keeps_its_last_line(run, tmp_path, capsys, text):
    (tmp_path / "out.jsonl").write_text(text)
    assert run() == 2
    assert "name another file" in capsys.readouterr().err and (tmp_path / "out.jsonl").read_text() == text


@pytest.mark.everything
def test_a_last_sample_that_lacks_its_line_end_alone_is_kept(run, tmp_path):
    out = tmp_path / "out.jsonl"
    assert run() == 0
    whole = out.read_bytes()
    for cut in (1, 2, 40, len(whole.splitlines()[-1])):  # the last leaves one byte of the line
        out.write_bytes(whole[:-cut])
        assert run() == 0 and out.read_bytes() == whole


def test_samples_are_written_for_alpaca_eval_too(run, tmp_path):
    assert run("--limit=2", f"--alpaca_eval={tmp_path / 'outputs.json'}", "--name=mine") == 0
    first, second = json.loads((tmp_path / "outputs.json").read_text())
    samples = {row["response"] for row in rows(tmp_path)}
    assert {first["output"], second["output"]} == samples and first["generator"] == "mine"


def test_the_options_of_a_distribution_are_those_that_there_are():
    assert generate.SAMPLING.keys() == Sampling.__dataclass_fields__.keys()


def test_a_stop_text_is_left_out_of_the_response(run, tmp_path):
    assert run("--temperature=0") == 0
    free = rows(tmp_path)
    stop = free[0]["response"][2:4]
    (tmp_path / "out.jsonl").unlink()
    assert run("--temperature=0", f"--stop={stop}") == 0
    (row,) = (row for row in rows(tmp_path) if row["prompt"] == free[0]["prompt"])
    assert (row["ended"], row["response"]) == ("string", free[0]["response"][: free[0]["response"].find(stop)])


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--top_p=2", "top_p=2.0 is out of range"),
        ("--n=0", "n=0"),
        ("--limit=-1", "limit=-1"),
        ("--dtype=float8", "float8"),
        ("--stop=", "an empty text"),
        ("--tensor=3", "does not fit"),
        ("--temprature=1", "did you mean '--temperature'?"),
        ("--out=.", "--out=. is a directory; name a file in it"),
        ("--prompts=nowhere.jsonl", "no such file"),
        ("--top_k=many", "--help lists the options"),
    ],
)
def test_mistakes_are_one_line(run, option, says, capsys):
    assert run(option) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and says in error


def test_a_file_of_something_else_is_not_appended_to(run, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text('{"a": 1}\n')
    assert run() == 2
    assert "row 1: it has no field 'prompt'; this is no sample" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == '{"a": 1}\n'


@pytest.mark.parametrize(("eos", "expected"), [(None, [2]), (7, [7, 2]), ([7, 2, 9], [7, 2, 9])])
def test_all_ends_of_the_generation_config_stop(eos, expected, tmp_path, tiny_tokenizer):
    assert tiny_tokenizer.eos_token_id == 2
    assert list(stop_ids(tmp_path, tiny_tokenizer)) == [2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert list(stop_ids(tmp_path, tiny_tokenizer)) == expected
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["a"]}')
    with pytest.raises(UserError, match="eos_token_id: expected a token id"):
        stop_ids(tmp_path, tiny_tokenizer)


def test_a_chat_prompt_ends_where_the_answer_begins(tiny_tokenizer):
    (ids,) = tokenize_prompts([PROMPTS[1]["prompt"]], tiny_tokenizer)
    assert tiny_tokenizer.decode(ids) == "<|im_start|>user\nIs the sky blue?<|im_end|>\n<|im_start|>assistant\n"
    assert ids.dtype == np.int32


@pytest.mark.parametrize(
    "row", ["3", "[]", '{"prompt": "a", "sample": "1"}', "[" * 5000 + "]" * 5000], ids=lambda x: x[:9]
)
def test_valid_json_of_another_shape_is_one_line(run, tmp_path, capsys, row):
    (tmp_path / "out.jsonl").write_text(row + "\n")
    assert run() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --out=") and "row 1" in error and len(error) < 300


def test_a_file_that_another_process_writes_is_refused(run, tmp_path, capsys):
    descriptor = hold(tmp_path / "out.jsonl")
    assert run() == 2
    os.close(descriptor)
    assert "another process is writing there" in capsys.readouterr().err
