"""What a cell of a notebook shows: tables, pictures, answers side by side. A script prints the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
from markupsafe import Markup

from prefalign_jax.files import whole
from prefalign_jax.intervals import Interval
from prefalign_jax.pages.palette import PALETTE
from prefalign_jax.pages.pictures import styled
from prefalign_jax.processes import in_notebook
from prefalign_jax.tables import aligned, to_the_right, written

Text = str | Sequence[Mapping[str, Any]]  # plain text, or messages

# Notebooks have styles of their own for tables, of which these are not to be left to chance.
_TABLE = Markup('<div style="overflow-x: auto"><table style="margin: 0">{}</table></div>')
_CELL = Markup('<{0} style="text-align: {1}; vertical-align: top; white-space: pre-line">{2}</{0}>')


def show_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Shows a table whose first column names its rows.

    Args:
      head: names of the columns.
      rows: as many cells in each; numbers stand to the right.

    Example:
      >>> show_table(("run", "pairs"), [("dpo", 1200)])
      run  pairs
      dpo  1,200
    """
    _show(html_table(head, rows), aligned(head, rows))


def show_answers(prompts: Sequence[Text], answers: Mapping[str, Sequence[Text]]) -> None:
    """Shows the answers of several models to the same prompts side by side.

    Args:
      prompts: texts, or lists of messages, of which the last is shown.
      answers: name of a model -> its answers, in the order of the prompts.

    Example:
      >>> show_answers(["Is it far?"], {"before": ["Well, that depends."], "DPO": ["No."]})
      Is it far?
        before: Well, that depends.
        DPO:    No.
    """
    rows = [list(map(_last, row)) for row in zip(prompts, *answers.values(), strict=True)]
    width = max(map(len, answers)) + 1
    printed = [
        "\n".join([text, *(f"  {f'{name}:':<{width}} {answer}" for name, answer in zip(answers, row, strict=True))])
        for text, *row in rows
    ]
    _show(html_table(("prompt", *answers), rows), "\n".join(printed))


def show_intervals(runs: Mapping[str, Mapping[str, Interval]], digits: int = 3) -> None:
    """Shows a table of estimates with their intervals.

    Args:
      runs: name of a run -> name of a measure -> its interval; every run has the same measures.
      digits: of each number after the point.

    Example:
      >>> show_intervals({"dpo": {"reward": Interval(1.0, 0.5, 1.5)}}, digits=1)
      run           reward
      dpo  1.0 [0.5, 1.5]
    """
    measures = list(next(iter(runs.values())))

    def cell(value: Interval) -> str:
        mean, low, high = (f"{x:.{digits}f}" for x in value)
        return f"{mean} [{low}, {high}]"

    show_table(("run", *measures), [(name, *(cell(row[m]) for m in measures)) for name, row in runs.items()])


@styled
def draw_intervals(runs: Mapping[str, Mapping[str, Interval]], path: Path) -> Path:
    """Draws the estimates with their intervals, a panel for each measure.

    Args:
      runs: as in `show_intervals`.
      path: of the .png file.

    Returns:
      The picture's path.
    """
    measures = list(next(iter(runs.values())))
    figure = matplotlib.figure.Figure(figsize=(3 * len(measures) + 1, 0.3 * len(runs) + 1))
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        for line, row in enumerate(runs.values()):
            axes.plot([row[measure].low, row[measure].high], [line, line], color=PALETTE["blue"])
            axes.plot(row[measure].mean, line, "o", color=PALETTE["blue"])
        axes.set_title(f"{measure}, 95%")
    panels[0].set_yticks(range(len(runs)), list(runs))
    panels[0].invert_yaxis()
    with whole(path) as part:
        figure.savefig(part, format="png")
    return path


def show_picture(path: Path) -> None:
    """Shows a picture; a script prints where it is."""
    if in_notebook():
        from IPython.display import Image, display

        display(Image(filename=str(path)))
    else:
        print(path)


def html_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    """A table in HTML, its text escaped.

    Example:
      >>> "&lt;b&gt;" in html_table(("a",), [("<b>",)])
      True
    """
    cells = [[written(cell) for cell in row] for row in rows]
    sides = ["right" if right else "left" for right in to_the_right(cells)] if cells else ["left"] * len(head)

    def line(tag: str, texts: Sequence[str]) -> Markup:
        parts = (_CELL.format(tag, side, text) for side, text in zip(sides, texts, strict=True))
        return Markup("<tr>{}</tr>").format(Markup("").join(parts))

    return _TABLE.format(Markup("\n").join([line("th", head), *(line("td", row) for row in cells)]))


def _last(text: Text) -> str:
    return text if isinstance(text, str) else text[-1]["content"]


def _show(html: str, text: str) -> None:
    if in_notebook():
        from IPython.display import display

        display({"text/html": str(html), "text/plain": text}, raw=True)
    else:
        print(text)
