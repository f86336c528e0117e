"""The notebooks as files to open, in English and in Japanese: python scripts/notebooks.py

Each is made from a .py file in jupytext's percent format, which holds the prose in both languages. It is executed (the
`notebook` extra), and its outputs are stored. Where the code is as it was, the stored outputs are kept.
"""

import base64
import io
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefalign_jax.files import write_text
from prefalign_jax.types import UserError

FOLDER = Path(__file__).parents[2] / "experiments" / "notebooks"
SOURCES = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
LANGUAGES = {"en": ".ipynb", "ja": ".ja.ipynb"}
MARK = re.compile(r'# %%(?: \[(markdown)\] lang="(en|ja)"| tags=\["([\w-]+)"\])?')
COLOURS = 128  # of a stored picture, which then takes a third of the room


class Cell(NamedTuple):
    """A cell.

    Attributes:
      lang: of its prose; '' for code.
      source: without comment signs.
      tag: '' for none. Cells with `skip-execution` are not executed here.
    """

    lang: str
    source: str
    tag: str = ""


def parse(text: str) -> list[Cell]:
    """The cells of a notebook in percent format, after its jupytext header.

    Raises:
      UserError: a line is no mark of a cell, or a line of prose has no comment sign.
    """
    header = re.match(r"# ---\n(# .*\n)*?# ---\n", text)
    before, *parts = re.split(r"^(# %%.*)\n", text[header.end() if header else 0 :], flags=re.MULTILINE)
    if not header or "format_name: percent" not in header[0] or before.strip():
        raise UserError("a notebook begins with jupytext's header of the percent format, and then with a cell")
    cells = []
    for mark, source in zip(parts[::2], parts[1::2], strict=True):
        match, source = MARK.fullmatch(mark), source.strip("\n")
        if not match:
            raise UserError(f"{mark}: unknown mark of a cell")
        if match[1]:
            if bare := [line for line in source.split("\n") if not re.fullmatch(r"#( .*)?", line)]:
                raise UserError(f"prose without a comment sign: {bare[0]}")
            source = "\n".join(line[2:] for line in source.split("\n"))
        cells.append(Cell(match[2] or "", source, match[3] or ""))
    return cells


def notebook(cells: Sequence[Cell], lang: str) -> dict[str, Any]:
    """A notebook in one language, without outputs, as its file holds it (nbformat 4.5).

    Args:
      cells: from `parse`.
      lang: whose prose is taken; code is the same in all.
    """
    out = []
    for cell in cells:
        if cell.lang not in ("", lang):
            continue
        source = cell.source
        metadata = {"tags": [cell.tag]} if cell.tag else {}
        made = {"cell_type": "markdown" if cell.lang else "code", "id": f"cell-{len(out):02}", "metadata": metadata}
        if not cell.lang:
            source = re.sub(r"^# (?=%)", "", source, flags=re.MULTILINE)  # a magic is a comment to Python
            made |= {"execution_count": None, "outputs": []}
        out.append(made | {"source": source.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": out, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def target(name: str, lang: str) -> Path:
    """Where a notebook lies as a file to open."""
    return FOLDER / f"{name}{LANGUAGES[lang]}"


def code(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The code cells of a notebook."""
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def kept(name: str, sources: list[list[str]]) -> list[dict[str, Any]] | None:
    """The executed code cells of the file, if its code is the same."""
    file = target(name, "en")
    cells = code(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else []
    return cells if [cell["source"] for cell in cells] == sources else None


def executed(content: dict[str, Any], directory: str) -> list[dict[str, Any]]:
    """The code cells of a notebook after they ran in a directory.

    Raises:
      UserError: nbclient is not installed.
    """
    try:
        import nbclient
        import nbformat
    except ImportError:
        raise UserError('notebooks need nbclient; run `pip install -e ".[notebook]"`') from None
    node = nbformat.reads(json.dumps(content), as_version=4)
    resources = {"metadata": {"path": directory}}
    options = dict(timeout=None, record_timing=False, coalesce_streams=True)
    nbclient.NotebookClient(node, resources=resources, kernel_name="python3", **options).execute()
    cells = code(json.loads(nbformat.writes(node)))
    for output in (output for cell in cells for output in cell["outputs"]):
        data = output.get("data", {})
        if "image/png" in data:
            data["image/png"] = smaller(data["image/png"])
    return cells


def smaller(picture: str) -> str:
    """A PNG picture of few colours, both in base64."""
    from PIL import Image

    out = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def write(names: Sequence[str], execute: bool = False) -> None:
    """Writes the files of these notebooks.

    Args:
      names: keys of SOURCES.
      execute: whether also those are executed whose code is as it was.
    """
    for name in names:
        if name not in SOURCES:
            raise UserError(f"there is no notebook {name!r}; there are {', '.join(SOURCES)}")
        cells = parse(SOURCES[name].read_text(encoding="utf-8"))
        made = {lang: notebook(cells, lang) for lang in LANGUAGES}
        done = None if execute else kept(name, [cell["source"] for cell in code(made["en"])])
        if done is None:
            with tempfile.TemporaryDirectory() as directory:
                done = executed(made["en"], directory)
        for lang, content in made.items():
            for cell, ran in zip(code(content), done, strict=True):
                cell |= {"execution_count": ran["execution_count"], "outputs": ran["outputs"]}
            write_text(target(name, lang), json.dumps(content, ensure_ascii=False, indent=1) + "\n")
            print(target(name, lang))
