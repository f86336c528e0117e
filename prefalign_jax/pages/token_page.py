"""Responses with every token coloured by its log-probability and implicit reward, in one self-contained HTML page."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from prefalign_jax.pages.frame import render
from prefalign_jax.pages.palette import PALETTE


def _rgb(name: str) -> tuple[int, int, int]:
    return tuple(bytes.fromhex(PALETTE[name][1:]))


WORST, BEST, RARE = _rgb("vermillion"), _rgb("blue"), _rgb("purple")
STRONGEST = 0.6  # opacity of the full colour, under which text can be read on light and on dark pages
LOWEST = 10.0  # nats of surprise that get the full colour
HIDDEN = "\ufffd"  # what decoders write for bytes that are no whole character


class Response(NamedTuple):
    """One response: what it is called, its tokens, and for each panel the values of its tokens.

    Attributes:
      name: such as 'chosen'.
      ids: [N] tokens.
      pieces: [N] the text of each, from `pieces_of`.
      policies: {panel: [N] log-probabilities}, in the order of the panels; those of tokens that are not trained are not
        looked at.
      reference: [N] log-probabilities under the reference, None where there is none.
      weights: [N], by how much each token counts, 0 for one that is read and not trained; None where each counts once.
    """

    name: str
    ids: Sequence[int]
    pieces: Sequence[str]
    policies: dict[str, np.ndarray]
    reference: np.ndarray | None
    weights: np.ndarray | None = None

    @property
    def trained(self) -> np.ndarray:
        """[N] bool."""
        return np.ones(len(self.ids), bool) if self.weights is None else self.weights != 0


class Token(NamedTuple):
    """A token as the page shows it: text, the text beside the pointer, colour, and how strong the line under it is.

    The colour is '' for a token that is not trained, and the shade is '' for one that counts once.
    """

    piece: str
    hover: str
    colour: str
    shade: str = ""


class Panel(NamedTuple):
    """A response under one model: its name, the response's sum, and the tokens."""

    name: str
    total: str
    tokens: list[Token]


class Example(NamedTuple):
    """A pair as the page shows it: why it was chosen, its score in words, whether that is right, and the texts."""

    group: str
    score: str
    right: bool | None
    where: str
    prompt: str
    responses: Sequence[Response]


def choose_examples(scores: np.ndarray, each: int, seed: int = 0) -> list[tuple[str, int]]:
    """('highest', 'lowest' or 'random', number) of up to 3 `each` pairs, in the order of falling scores, none twice.

    Args:
      scores: [N], such as margins.
      each: pairs of each group.
      seed: of the random ones.

    Example:
      >>> choose_examples(np.array([3.0, 1.0, 2.0]), 1)
      [('highest', 0), ('random', 2), ('lowest', 1)]
    """
    order = np.argsort(-scores, kind="stable").tolist()
    high = order[:each]
    low = order[max(len(order) - each, len(high)) :]
    middle = order[len(high) : len(order) - len(low)]
    drawn = np.random.default_rng(seed).permutation(len(middle))[:each]
    groups = {number: "highest" for number in high} | {number: "lowest" for number in low}
    groups |= {middle[i]: "random" for i in drawn}
    return [(groups[number], number) for number in order if number in groups]


def pieces_of(tokenizer: Any, context: Sequence[int], ids: Sequence[int]) -> list[str]:
    """The text that each token adds; joined, the text of the response after its context.

    A character of several tokens belongs to the last of them: the pieces of the others are empty. Each piece is the
    difference of two short decodings, because tokenizers write a token in other ways at the start of a text.

    Args:
      tokenizer: Hugging Face tokenizer.
      context: the last tokens before, at least one.
      ids: of the response.
    """

    def decode(part: Sequence[int]) -> str:
        return tokenizer.decode([int(i) for i in part], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    whole, pieces = [*context, *ids], []
    start, done = 0, len(context)  # what is decoded begins at `start`; up to `done` it is in the pieces
    for end in range(done + 1, len(whole) + 1):
        text = decode(whole[start:end])
        if text.endswith(HIDDEN) and end < len(whole):
            pieces.append("")
            continue
        before = os.path.commonprefix([decode(whole[start:done]), text])
        pieces.append(text[len(before) :])
        start, done = done, end
    return pieces


def page(title: str, about: str, examples: Sequence[Example], *, beta: float) -> str:
    """HTML with nothing to load from elsewhere; whatever comes from data is escaped.

    A token's implicit reward is beta (log policy - log reference). Without a reference, and in a panel of the reference
    itself, tokens are coloured by log-probability.

    Args:
      title: of the page.
      about: a line on models and data.
      examples: in the order in which they are shown.
      beta: scale of the rewards.

    Source: the reading of DPO's reward token by token: Rafailov et al., arXiv 2404.12358.
    """
    values = [
        np.abs(beta * (logps - response.reference))[response.trained]
        for example in examples
        for response in example.responses
        if response.reference is not None
        for logps in response.policies.values()
    ]
    values = np.concatenate(values) if values else np.zeros(0)
    values = values[values > 0]
    top = float(np.quantile(values, 0.95)) if values.size else 1.0  # a few outliers would leave the rest pale

    def panels(response: Response) -> list[Panel]:
        return [_panel(response, name, beta, top) for name in response.policies]

    return render(
        "pages/token_page.html",
        title=title,
        scripts=["pages/tokens.js"],
        about=about,
        examples=examples,
        panels=panels,
        beta=f"{beta:g}",
        reward=f"{top:.3g}" if values.size else "",
        lowest=f"{LOWEST:g}",
        worst=_colour(WORST),
        best=_colour(BEST),
        rare=_colour(RARE),
        read=any(not response.trained.all() for example in examples for response in example.responses),
        weighted=any(token.shade for one in examples for r in one.responses for p in panels(r) for token in p.tokens),
    )


def _panel(response: Response, name: str, beta: float, top: float) -> Panel:
    logps, reference = response.policies[name], response.reference
    rewards = None if reference is None or logps is reference else beta * (logps - reference)
    trained, weights = response.trained, np.ones(len(logps)) if response.weights is None else response.weights
    total = (weights * (logps if rewards is None else rewards))[trained].sum()
    total = f"log-probability {total:,.2f}" if rewards is None else f"reward {total:+,.3f}"
    tokens = []
    for i, (token, piece) in enumerate(zip(response.ids, response.pieces, strict=True)):
        if not trained[i]:
            tokens.append(Token(piece, f"{piece!r}, id {token}\nread, not trained", ""))
            continue
        hover = f"{piece!r}, id {token}\nlog policy {logps[i]:.4f}"
        if rewards is None:
            colour, strength = RARE, min(-logps[i] / LOWEST, 1.0)
        else:
            colour, strength = BEST if rewards[i] > 0 else WORST, min(abs(rewards[i]) / top, 1.0)
            hover += f"\nlog reference {reference[i]:.4f}\nreward {rewards[i]:+.4f}"
        shade = "" if weights[i] == 1 else shade_of(weights[i])
        hover += f"\nweight {weights[i]:.4g}" if shade else ""
        tokens.append(Token(piece, hover, _colour(colour, strength), shade))
    return Panel(name, total, tokens)


def shade_of(weight: float) -> str:
    """How strong the line under a token of this weight is, as a percentage; whole from 2 on.

    Example:
      >>> shade_of(0.5)
      '25%'
    """
    return f"{50 * min(weight, 2.0):.0f}%"


def _colour(colour: tuple[int, int, int], strength: float = 1.0) -> str:
    return f"rgba({','.join(map(str, colour))},{STRONGEST * strength:.2f})"
