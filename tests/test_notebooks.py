"""The course's notebooks: their format, their two languages, what they name, and a run of each from end to end."""

import json
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

from prefalign_jax.commands import COMMANDS
from prefalign_jax.config import defaults
from prefalign_jax.options import flatten

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "experiments" / "notebooks").glob("*.py"))
MARK = re.compile(r'# %%(?: \[(markdown)\] lang="(en|ja)")?')
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


class Cell(NamedTuple):
    """A cell: its language, '' for code, and its source without comment signs."""

    lang: str
    source: str


def parse(text: str) -> list[Cell]:
    """The cells of a notebook in percent format, after its jupytext header."""
    start, header, text = text.split("# ---\n", 2)
    assert start == ""
    assert "format_name: percent" in header
    parts = re.split(r"^(# %%.*)\n", text, flags=re.MULTILINE)
    assert parts[0].strip() == ""
    cells = []
    for mark, source in zip(parts[1::2], parts[2::2], strict=True):
        found = MARK.fullmatch(mark)
        assert found, mark
        if found[1]:
            lines = source.rstrip("\n").split("\n")
            assert all(re.fullmatch(r"#( .*)?", line) for line in lines), source
            source = "\n".join(line[2:] for line in lines)
        cells.append(Cell(found[2] or "", source))
    return cells


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def notebook(request):
    return request.param, parse(request.param.read_text(encoding="utf-8"))


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
    assert [path.stem for path in FILES] == ["dpo", "orpo"]


def test_every_cell_is_read(notebook):
    _, cells = notebook
    assert all(cell.source.strip() for cell in cells)
    assert cells[0].lang == "en"
    for cell in cells:
        if not cell.lang:
            compile(cell.source, "cell", "exec")


def test_english_is_followed_by_the_same_in_japanese(notebook):
    """Right after it, with the same headings, items, code and formulas; which words they are no test can say."""
    _, cells = notebook
    langs = "".join(f"<{cell.lang}>" for cell in cells)
    assert langs.count("<en><ja>") == langs.count("<en>") == langs.count("<ja>") > 5
    for english, japanese in markdown(cells):
        assert not JAPANESE.search(english.source), english.source
        assert len(JAPANESE.findall(japanese.source)) > 0.1 * len(english.source), japanese.source
        for what in (codes, formulas, lambda text: re.findall(r"^(#+|-|\d\.) ", text, re.MULTILINE)):
            assert what(english.source) == what(japanese.source), english.source


def test_the_levels_are_there(notebook):
    _, cells = notebook
    text = "\n".join(cell.source for cell in cells if cell.lang)
    for level in range(1, 4):
        assert re.search(rf"^## Level {level}: ", text, re.MULTILINE)
        assert re.search(rf"^## レベル{level}:", text, re.MULTILINE)


def test_files_that_it_names_exist(notebook):
    path, _ = notebook
    named = re.findall(r"\b(?:experiments|prefalign_jax|scripts)/[\w/]+\.py", path.read_text(encoding="utf-8"))
    assert len(named) > 5
    missing = {name for name in named if not (ROOT / name).is_file()}
    assert not missing


def known_names(cells: list[Cell]) -> set[str]:
    """Config fields, commands, and the metrics and Python names of the notebook's code."""
    commands = {f"prefalign {name}" for name in COMMANDS}
    code = "\n".join(cell.source for cell in cells if not cell.lang)
    return {*flatten(defaults("dpo").to_dict()), *commands, *re.findall(r"[\w/.]+", code)}


METRICS = {"eval/loss", "logps/chosen", "log_odds_chosen"}  # that the text names and the code does not
NOT_NAMES = {"prompt+chosen", "batch", "beta"}  # values of fields, and TRL's name for lambda
ABSENT = {"orpo_alpha", "orpo_beta"}


def test_what_it_names_is_a_field_a_metric_or_in_the_code(notebook):
    path, cells = notebook
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


@pytest.mark.everything
def test_it_runs_from_end_to_end(notebook, tmp_path, monkeypatch):
    path, cells = notebook
    monkeypatch.setenv("PREFALIGN_NOTEBOOK_SIZE", "tiny")
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as on a laptop
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
    if path.stem == "dpo":
        losses = [float(x) for x in re.findall(r"'step': 1, 'loss': ([\d.]+)", run.stdout)]
        assert losses == [0.6931, 0.6931]
    else:
        assert re.search(r"over seeds: +Interval", run.stdout)
