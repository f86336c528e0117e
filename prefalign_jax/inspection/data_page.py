"""What a run trains on, token by token, read off its packed batches, with tables and histograms, in one HTML page."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np

from prefalign_jax.data.trees import Layout
from prefalign_jax.pages.frame import render
from prefalign_jax.pages.palette import INK
from prefalign_jax.pages.pictures import styled, svg
from prefalign_jax.pages.plots import BAD, GOOD, edges_around_zero
from prefalign_jax.pages.token_page import pieces_of
from prefalign_jax.tables import Table
from prefalign_jax.types import AFTER_CHOSEN, PROMPT, PreferenceBatch

NAMES = {
    "pairs": ("chosen", "rejected"),
    "supervised": ("response", ""),
    "unpaired": ("completion", "completion of another prompt, from which nothing is learned"),
}
SIGNS = {" ": "·", "\n": "↵", "\t": "⇥"}  # what stands for white space
_CONTEXT = 8  # tokens before a response that decide how its first is written


class Token(NamedTuple):
    """One token of a branch.

    Attributes:
      id, position: as the batch has them; the prompt's first is at 0.
      role: 'prompt', 'trained', 'untrained' or 'eos', which is trained too; what is not trained is read by the model.
      held: whether a row holds it; the last of a response is only a target.
      read: a reward is read there.
      weight: by how much it counts where it is trained.
    """

    id: int
    position: int
    role: str
    held: bool = True
    read: bool = False
    weight: float = 1.0


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


_UNREAD = ("reference", "sequences")  # fields of a batch that are trees themselves


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
        fields = {name: x[micro] for name, x in batch._asdict().items() if x is not None and name not in _UNREAD}
        part = PreferenceBatch(**fields)
        for number, index in enumerate(part.index.tolist()):
            if index >= 0:
                there = [True, layout.rejected] if part.scores is None else ~np.isnan(part.scores[number])
                sides = np.flatnonzero(there).tolist()
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
    most = 2 if batch.scores is None else batch.scores.shape[1]
    wanted = [(2 * most + 1) * pair + code for code in (side, most, most + 1 + side)]
    if batch.slots is not None:
        wanted = batch.slots[pair, [side, PROMPT, AFTER_CHOSEN + side]]
    group, at = np.nonzero(np.isin(batch.slot, wanted))
    own = batch.slot[group, at] == wanted[0]
    home, first = group[own][0], batch.source[group, at][own][0]  # the piece of this side
    here = (rows[home] == rows[home, first]) & (segments[home] == segments[home, first])
    branch = side + 1 if batch.slots is None else branches[home, batch.source[group, at][own]].max()
    here &= np.isin(branches[home], [0, branch])
    held = dict(zip(positions[home, here].tolist(), tokens[home, here].tolist(), strict=True))
    length = int((branches[home, here] == 0).sum())  # of the prompt

    trained, read, weights = {}, set(), {}
    for g, t in zip(group.tolist(), at.tolist(), strict=True):
        source, target = int(batch.source[g, t]), int(batch.target[g, t])
        shared = batch.slots is not None and batch.slot[g, t] == wanted[1]
        if not shared and (g != home or not here[source]):
            continue  # the prompt's tokens are targets in one of its copies alone
        place = int(positions[g, source])
        if layout.rewards:
            read.add(place)
        elif held.get(place + 1, target) != target:
            raise ValueError(f"pair {pair}: target {target} after position {place}, where {held[place + 1]} follows")
        else:
            trained[place + 1] = target
            weights[place + 1] = 1.0 if batch.token_weight is None else float(batch.token_weight[g, t])

    def token(place: int) -> Token:
        id_ = held[place] if place in held else trained[place]
        if place not in trained:
            role = "prompt" if place < length else "untrained"
        else:
            role = "eos" if id_ == eos and place >= length else "trained"
        return Token(id_, place, role, place in held, place in read, weights.get(place, 1.0))

    every = [token(place) for place in sorted({*held, *trained})]
    return Branch(every[:length], every[length:])


class Written(NamedTuple):
    """A token as the page shows it: its classes in CSS, the text beside the pointer, its text as `visible` gives it."""

    classes: str
    hover: str
    text: list[tuple[str, str]]


class Side(NamedTuple):
    """A response as the page shows it: its name, how many tokens it has and learns, whether EOS ends it."""

    name: str
    counted: str
    ended: bool
    tokens: list[Written]


class WrittenPair(NamedTuple):
    """A pair as the page shows it."""

    index: int
    title: str
    about: str
    counted: str
    prompt: list[Written]
    sides: list[Side]


def visible(text: str) -> list[tuple[str, str]]:
    """The text in pieces of (as it is, what stands for the character after it), which shows what has no shape.

    Example:
      >>> visible("a <b\\n")
      [('a', '·'), ('<b', '↵'), ('\\n', '')]
      >>> visible("\\u200b")
      [('', 'U+200B')]
    """
    out, plain = [], ""
    for char in text:
        if char in SIGNS or unicodedata.category(char) in ("Cc", "Cf", "Co", "Cn", "Cs", "Zs", "Zl", "Zp"):
            out.append((plain, SIGNS.get(char) or f"U+{ord(char):04X}"))
            plain = "\n" if char == "\n" else ""
        else:
            plain += char
    return [*out, (plain, "")] if plain else out


def _written(tokenizer: Any, context: Sequence[Token], tokens: Sequence[Token], learned: bool = True) -> list[Written]:
    ids = [token.id for token in tokens]
    if not ids:
        return []
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
        weighed = role in ("trained", "eos") and token.weight != 1
        hover += f", counts {token.weight:.3g}" if weighed else ""
        role += (" more" if token.weight > 1 else " less") if weighed else ""
        out.append(Written(role + " read" * token.read, hover, visible(piece) or [("", "•")]))
    return out


def written_pair(
    shown: Shown, tokenizer: Any, kind: str, title: str, where: str, *, masked: bool = False
) -> WrittenPair:
    """A pair for the page: the prompt, and beneath it the branches side by side.

    Args:
      shown: from `shown_pairs`.
      tokenizer: Hugging Face tokenizer.
      kind: one of cleaning.RECORD_KINDS.
      title, where: plain text.
      masked: the ends of responses are not trained, so that batches do not have them.
    """
    about = [where]
    if shown.weight != 1:
        about.append(f"weight {shown.weight:g}")
    if shown.margin:
        about.append(f"margin {shown.margin:g}")
    if kind == "unpaired":
        about.append("desirable" if shown.label else "undesirable")
    prompt, sides = shown.branches[0].prompt, []
    names = NAMES[kind]
    if (of_group := len(shown.branches)) > len(names):
        names = tuple(f"response {number} of {of_group}, best first" for number in range(1, of_group + 1))
    for name, branch in zip(names, shown.branches, strict=False):
        learned = kind != "unpaired" or name == names[0]
        read = any(token.read for token in branch.response)
        ended = masked or read or not branch.response or branch.response[-1].role == "eos"
        tokens = _written(tokenizer, branch.prompt, branch.response, learned)
        sides.append(Side(name, _counted(branch.response, learned), ended, tokens))
    written = _written(tokenizer, [], prompt)
    return WrittenPair(shown.index, title, "; ".join(about), _counted(prompt), written, sides)


def _counted(tokens: Sequence[Token], learned: bool = True) -> str:
    trained = sum(token.role in ("trained", "eos") for token in tokens) if learned else 0
    return f"{len(tokens):,} tokens, {f'{trained:,}' if trained else 'none'} trained"


@styled
def pictures(drawn: Mapping[str, Mapping[str, np.ndarray]], max_length: int) -> dict[str, matplotlib.figure.Figure]:
    """Histograms, by what they show.

    Args:
      drawn: 'tokens': side -> [N]; 'total': 'prompt + longer response' -> [N]; 'scores': name -> [N].
      max_length: is marked.
    """
    tokens = drawn["tokens"]
    figures: dict[str, matplotlib.figure.Figure] = {}

    def axes_of(label: str, unit: str = "pairs") -> Any:
        figures[label] = matplotlib.figure.Figure(figsize=(4.4, 2.9))
        axes = figures[label].add_subplot()
        axes.set_xlabel(label)
        axes.set_ylabel(unit)
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
            (difference > 0, "chosen is longer", GOOD),
            (difference < 0, "chosen is shorter", BAD),
        ):
            axes.hist(difference[mask], edges, color=colour, alpha=0.8, label=f"{mask.sum():,} {label}")
        axes.legend()
    total = np.sort(drawn["total"]["prompt + longer response"])
    if total.size:
        axes = axes_of("max_length, in tokens", "share of pairs that fit")
        axes.plot(total, np.arange(1, total.size + 1) / total.size)
        fit = np.count_nonzero(total <= max_length) / total.size
        axes.axvline(max_length, color=INK, ls="--", lw=1, label=f"{max_length:,}: {fit:.1%} fit")
        axes.set_xscale("log")
        axes.legend()
    for name, values in drawn["scores"].items():
        axes = axes_of(name, "records")
        axes.hist(values, 50, alpha=0.8, label=f"mean {values.mean():.3g}")
        axes.legend()
    return figures


def page(
    title: str,
    about: str,
    tables: Sequence[Table],
    figures: Mapping[str, matplotlib.figure.Figure],
    examples: Sequence[tuple[str, Sequence[WrittenPair]]],
) -> str:
    """The whole page.

    Args:
      title, about: plain text.
      tables: of numbers.
      figures: from `pictures`.
      examples: (group, the pairs in it).
    """
    return render(
        "inspection/data_page.html",
        title=title,
        scripts=["pages/tokens.js"],
        about=about,
        tables=tables,
        figures=[svg(figure, label) for label, figure in figures.items()],
        examples=examples,
    )
