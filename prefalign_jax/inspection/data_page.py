"""What a run trains on, token by token, read off its packed batches, with tables and histograms, in one HTML page."""

from __future__ import annotations

import base64
import html
import io
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np

from prefalign_jax.data.packing import Layout
from prefalign_jax.pages.frame import self_contained
from prefalign_jax.pages.plots import HELD_OUT_COLOUR, TRAIN_COLOUR, edges_around_zero
from prefalign_jax.pages.token_page import pieces_of
from prefalign_jax.types import AFTER_CHOSEN, CHOSEN, PROMPT, REJECTED, SIDES, PreferenceBatch

NAMES = {
    "pairs": ("chosen", "rejected"),
    "supervised": ("response", ""),
    "unpaired": ("completion", "completion of another prompt, from which nothing is learned"),
}
_CONTEXT = 8  # tokens before a response that decide how its first is written

_STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; margin: 0 auto; max-width: 1400px; padding: 0 1rem 4rem;
  color: #222; background: #fff; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
h3 { font-size: .9rem; margin: .6rem 0 .2rem; }
h4 { margin: 0 0 .2rem; font-weight: 500; font-size: .85rem; color: #666; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .1rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, td.words { text-align: left; }
th:first-child, td:first-child { padding-left: 0; }
.tables, .pictures { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; align-items: flex-start; }
img { max-width: 100%; }
article { border-top: 2px solid #ddd; margin-top: 1.5rem; }
nav { columns: 12rem; font-size: .85rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1.2rem; }
.shared { max-height: 18rem; overflow: auto; border-left: 4px solid #ccc; padding-left: .7rem; }
i { font-style: normal; border-radius: 3px; box-decoration-break: clone; unicode-bidi: isolate;
  box-shadow: inset 0 0 0 1px #0001; }
i:hover { outline: 2px solid #222; }
i.prompt { background: #eeeeee; color: #555; }
i.trained { background: #cfe3f7; }
i.untrained { background: #fdf1cf; color: #7a6a3a; }
i.eos { background: #1b7f4b; color: #fff; }
i.read { outline: 2px solid #7851a9; }
s { text-decoration: none; opacity: .45; }
.warning { color: #b23a2e; }
"""


class Token(NamedTuple):
    """One token of a branch.

    Attributes:
      id, position: as the batch has them; the prompt's first is at 0.
      role: 'prompt', 'trained', 'untrained' or 'eos', which is trained too; what is not trained is read by the model.
      held: whether a row holds it; the last of a response is only a target.
      read: a reward is read there.
    """

    id: int
    position: int
    role: str
    held: bool = True
    read: bool = False


class Branch(NamedTuple):
    """A prompt and one response to it."""

    prompt: list[Token]
    response: list[Token]


class Shown(NamedTuple):
    """A pair as a batch has it: its number in the data set, its branches, weight, margin and label."""

    index: int
    branches: list[Branch]
    weight: float
    margin: float
    label: bool


def shown_pairs(batch: PreferenceBatch, layout: Layout, eos: int) -> Iterator[Shown]:
    """Reads pairs back from a packed batch: what is not in there is not shown, and what is shown is what is trained.

    Args:
      batch: NumPy arrays with M as leading axis.
      layout: as it was packed.
      eos: end-of-sequence token.

    Raises:
      ValueError: a target is not the token that follows its source, so the batch is wrong.
    """
    for micro in range(batch.tokens.shape[0]):
        part = PreferenceBatch(*(None if x is None else x[micro] for x in batch[:12]), batch.mean_tokens)
        for number, index in enumerate(part.index.tolist()):
            if index >= 0:
                sides = (CHOSEN, REJECTED)[: 1 + layout.rejected]
                branches = [_branch(part, number, side, layout, eos) for side in sides]
                about = part.weight[number].item(), part.margin[number].item(), bool(part.label[number])
                yield Shown(index, branches, *about)


def _branch(batch: PreferenceBatch, pair: int, side: int, layout: Layout, eos: int) -> Branch:
    groups = batch.source.shape[0]

    def by_group(x: np.ndarray) -> np.ndarray:  # [G, R/G * L]
        return x.reshape(groups, -1)

    tokens, positions, branches = (by_group(x) for x in (batch.tokens, batch.positions, batch.branches))
    rows = np.arange(batch.tokens.size).reshape(groups, -1) // batch.tokens.shape[1]
    segments = by_group(batch.segments)
    wanted = [SIDES * pair + slot for slot in (side, PROMPT, AFTER_CHOSEN + side)]
    group, at = np.nonzero(np.isin(batch.slot, wanted))
    own = batch.slot[group, at] == SIDES * pair + side
    home, first = group[own][0], batch.source[group, at][own][0]  # the piece of this side
    here = (rows[home] == rows[home, first]) & (segments[home] == segments[home, first])
    here &= np.isin(branches[home], [0, side + 1])
    held = dict(zip(positions[home, here].tolist(), tokens[home, here].tolist(), strict=True))
    length = int((branches[home, here] == 0).sum())  # of the prompt

    trained, read = {}, set()
    for g, t in zip(group.tolist(), at.tolist(), strict=True):
        source, target = int(batch.source[g, t]), int(batch.target[g, t])
        if g != home or not here[source]:
            continue  # the prompt's tokens are targets in one of its copies alone
        place = int(positions[home, source])
        if layout.rewards:
            read.add(place)
        elif held.get(place + 1, target) != target:
            raise ValueError(f"pair {pair}: target {target} after position {place}, where {held[place + 1]} follows")
        else:
            trained[place + 1] = target

    def token(place: int) -> Token:
        id_ = held[place] if place in held else trained[place]
        if place not in trained:
            role = "prompt" if place < length else "untrained"
        else:
            role = "eos" if id_ == eos and place >= length else "trained"
        return Token(id_, place, role, place in held, place in read)

    every = [token(place) for place in sorted({*held, *trained})]
    return Branch(every[:length], every[length:])


def visible(text: str) -> str:
    """HTML in which white space and what has no shape of its own can be seen.

    Example:
      >>> visible("a <b")
      'a<s>·</s><wbr>&lt;b'
      >>> visible("\\u200b")
      '<s>U+200B</s>'
    """
    out = []
    for char in text:
        if char == " ":
            out.append("<s>·</s><wbr>")
        elif char == "\n":
            out.append("<s>↵</s>\n")
        elif char == "\t":
            out.append("<s>⇥</s><wbr>")
        elif unicodedata.category(char) in ("Cc", "Cf", "Co", "Cn", "Cs", "Zs", "Zl", "Zp"):
            out.append(f"<s>U+{ord(char):04X}</s>")
        else:
            out.append(html.escape(char))
    return "".join(out)


def _written(tokenizer: Any, context: Sequence[Token], tokens: Sequence[Token], learned: bool = True) -> str:
    ids = [token.id for token in tokens]
    if not ids:
        return ""
    if context:
        pieces = pieces_of(tokenizer, [token.id for token in context[-_CONTEXT:]], ids)
    else:
        pieces = [tokenizer.decode(ids[:1], skip_special_tokens=False), *pieces_of(tokenizer, ids[:1], ids[1:])]
    out = []
    for token, piece in zip(tokens, pieces, strict=True):
        role = token.role if learned or token.role == "prompt" else "untrained"
        said = {"prompt": "read, not trained", "untrained": "not trained", "trained": "trained", "eos": "EOS, trained"}
        hover = f"{piece!r}, id {token.id}, position {token.position}: {said[role]}"
        hover += "; only a target, in no row" if not token.held else ""
        hover += "; the reward is read here" if token.read else ""
        classes = role + " read" * token.read
        out.append(f'<i class="{classes}" title="{html.escape(hover, quote=True)}">{visible(piece) or "<s>•</s>"}</i>')
    return "".join(out)


def written_pair(shown: Shown, tokenizer: Any, kind: str, title: str, where: str) -> str:
    """HTML of a pair: the prompt, and beneath it the branches side by side.

    Args:
      shown: from `shown_pairs`.
      tokenizer: Hugging Face tokenizer.
      kind: one of cleaning.KINDS.
      title, where: plain text.
    """
    about = [where]
    if shown.weight != 1:
        about.append(f"weight {shown.weight:g}")
    if shown.margin:
        about.append(f"margin {shown.margin:g}")
    if kind == "unpaired":
        about.append("desirable" if shown.label else "undesirable")
    prompt = shown.branches[0].prompt
    out = [f'<article id="pair{shown.index}"><h2>{html.escape(title)}</h2><h4>{html.escape("; ".join(about))}</h4>']
    out.append(f'<h3>prompt, {_counted(prompt)}</h3><div class="text shared">{_written(tokenizer, [], prompt)}</div>')
    out.append('<div class="sides">')
    for name, branch in zip(NAMES[kind], shown.branches, strict=False):
        learned = kind != "unpaired" or name == NAMES[kind][0]
        note = ""
        if not any(token.read for token in branch.response) and branch.response and branch.response[-1].role != "eos":
            note = ' <span class="warning">does not end with EOS</span>'
        out.append(f"<section><h3>{html.escape(name)}, {_counted(branch.response, learned)}{note}</h3>")
        out.append(f'<div class="text">{_written(tokenizer, branch.prompt, branch.response, learned)}</div></section>')
    return "".join([*out, "</div></article>"])


def _counted(tokens: Sequence[Token], learned: bool = True) -> str:
    trained = sum(token.role in ("trained", "eos") for token in tokens) if learned else 0
    return f"{len(tokens)} tokens, {trained or 'none'} trained"


def pictures(drawn: Mapping[str, Mapping[str, np.ndarray]], max_length: int) -> list[bytes]:
    """Histograms as PNG files.

    Args:
      drawn: 'tokens': side -> [N]; 'total': 'prompt + longer response' -> [N]; 'scores': name -> [N].
      max_length: is marked.
    """
    tokens, figures = drawn["tokens"], []

    def axes_of(label: str, unit: str = "pairs") -> Any:
        figures.append(matplotlib.figure.Figure(figsize=(6, 3.4), layout="constrained"))
        axes = figures[-1].add_subplot()
        axes.set_xlabel(label)
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        return axes

    axes = axes_of("tokens")
    top = max((float(np.quantile(x, 0.99)) for x in tokens.values() if len(x)), default=1.0)
    for side, values in tokens.items():
        axes.hist(np.minimum(values, top), 50, range=(0, top), histtype="step", lw=1.5, label=side)
    axes.legend(title="the last bar holds what is longer")
    if "rejected" in tokens:
        difference = tokens["chosen"] - tokens["rejected"]
        axes = axes_of("tokens of chosen less those of rejected")
        edges = edges_around_zero(difference.astype(float))
        for mask, label, colour in (
            (difference > 0, "chosen is longer", TRAIN_COLOUR),
            (difference < 0, "chosen is shorter", HELD_OUT_COLOUR),
        ):
            axes.hist(difference[mask], edges, color=colour, alpha=0.8, label=f"{mask.sum()} {label}")
        axes.legend()
    total = np.sort(drawn["total"]["prompt + longer response"])
    if total.size:
        axes = axes_of("max_length, in tokens", "share of pairs that fit")
        axes.plot(total, np.arange(1, total.size + 1) / total.size, color=TRAIN_COLOUR)
        fit = np.count_nonzero(total <= max_length) / total.size
        axes.axvline(max_length, color="black", ls="--", lw=1, label=f"{max_length}: {fit:.1%} fit")
        axes.set_xscale("log")
        axes.legend()
    for name, values in drawn["scores"].items():
        axes = axes_of(name, "records")
        axes.hist(values, 50, color=TRAIN_COLOUR, alpha=0.8, label=f"mean {values.mean():.3g}")
        axes.legend()
    out = []
    for figure in figures:
        file = io.BytesIO()
        figure.savefig(file, dpi=100, format="png")
        out.append(file.getvalue())
    return out


def _cell(value: Any) -> str:
    words = ' class="words"' if isinstance(value, str) and not value[:1].isdecimal() else ""
    return f"<td{words}>{html.escape(str(value))}</td>"


def page(
    title: str,
    about: str,
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Any]]]],
    images: Sequence[bytes],
    examples: Sequence[tuple[str, Sequence[str]]],
) -> str:
    """The whole page.

    Args:
      title, about: plain text.
      tables: (title, names of columns, rows).
      images: PNG files.
      examples: (group, the pairs in it as `written_pair` gives them).
    """
    out = [f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>"]
    out.append('<div class="tables">')
    for name, head, rows in tables:
        cells = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in head)
        body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
        out.append(f"<div><h2>{html.escape(name)}</h2><table><tr>{cells}</tr>{body}</table></div>")
    out.append('</div><h2>Histograms</h2><div class="pictures">')
    for image in images:
        out.append(f'<img alt="histogram" src="data:image/png;base64,{base64.b64encode(image).decode()}">')
    out.append("</div><h2>Pairs, token by token</h2><p>Read off the packed batches that the run would train on. ")
    out.append(
        '<i class="prompt">prompt</i> <i class="trained">trained</i> <i class="untrained">not trained</i> '
        '<i class="eos">EOS, trained</i> <i class="untrained read">a reward is read here</i>. Spaces are <s>·</s>, '
        "newlines <s>↵</s>, tabs <s>⇥</s>, other characters without a shape their code. Pointing at a token shows its "
        "number and position. <s>•</s> is a token that holds a part of a character; the character stands in the last "
        "of its tokens.</p>"
    )
    links = [f'<a href="#group{i}">{html.escape(name)}</a> ({len(pairs)})' for i, (name, pairs) in enumerate(examples)]
    out.append("<p>" + " · ".join(links) + "</p>")
    for number, (name, pairs) in enumerate(examples):
        out.append(f'<section id="group{number}"><h2>{html.escape(name)}</h2>' + "".join(pairs) + "</section>")
    return self_contained(title, _STYLE, "".join(out), pictures=True)
