"""Responses with every token coloured by its log-probability and implicit reward, in one self-contained HTML page."""

from __future__ import annotations

import html
import os.path
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from prefalign_jax.pages.frame import self_contained

WORST, BEST = (178, 58, 46), (38, 104, 178)  # red and blue, told apart by the colour-blind
RARE = (120, 81, 169)
STRONGEST = 0.75  # opacity of the full colour, under which black text can be read
HIDDEN = "\ufffd"  # what decoders write for bytes that are no whole character

_STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; margin: 0 auto; max-width: 1400px; padding: 0 1rem 4rem;
  color: #222; background: #fff; }
h1 { font-size: 1.25rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .3rem; } h3, h4 { font-size: .85rem; color: #666; }
h3 { margin: .8rem 0 .2rem; } h4 { margin: 0 0 .2rem; font-weight: 500; }
article { border-top: 2px solid #ddd; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { border-left: 4px solid #ccc; padding-left: .7rem; color: #555; max-height: 14rem; overflow: auto; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1.2rem; }
.right { color: #1b7f4b; } .wrong { color: #b23a2e; }
i { font-style: normal; border-radius: 3px; box-decoration-break: clone; }
i:hover { outline: 2px solid #222; }
i:empty::before { content: "\\2022"; opacity: .5; }
.scale { display: inline-block; width: 14rem; height: .8rem; vertical-align: middle; margin: 0 .5rem;
  border: 1px solid #ccc; }
"""


class Response(NamedTuple):
    """One response: what it is called, its tokens, and for each panel the values of its tokens.

    Attributes:
      name: such as 'chosen'.
      ids: [N] tokens.
      pieces: [N] the text of each, from `pieces_of`.
      policies: {panel: [N] log-probabilities}, in the order of the panels.
      reference: [N] log-probabilities under the reference, None where there is none.
    """

    name: str
    ids: Sequence[int]
    pieces: Sequence[str]
    policies: dict[str, np.ndarray]
    reference: np.ndarray | None


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
        np.abs(beta * (logps - response.reference))
        for example in examples
        for response in example.responses
        if response.reference is not None
        for logps in response.policies.values()
    ]
    values = np.concatenate(values) if values else np.zeros(0)
    values = values[values > 0]
    top = float(np.quantile(values, 0.95)) if values.size else 1.0  # a few outliers would leave the rest pale
    lowest = 10.0  # nats of surprise that get the full colour
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p><p>"]
    if values.size:
        scale = _scale(_colour(WORST), "#fff", _colour(BEST))
        meaning = f"implicit reward of a token, {beta:g} (log policy − log reference)"
        parts.append(f"{meaning}: −{top:.3g}{scale}+{top:.3g} and beyond<br>")
    parts.append(
        f"log-probability of a token, in nats: 0{_scale('#fff', _colour(RARE))}−{lowest:g} and below</p>"
        "<p>Pointing at a token shows its numbers. A dot is a token that holds a part of a character; the character "
        "stands in the last of its tokens.</p>"
    )
    for number, example in enumerate(examples, 1):
        verdict = {True: '<span class="right">right</span>', False: '<span class="wrong">wrong</span>', None: ""}
        parts.append(
            f"<article><h2>{number}. {html.escape(example.group)}: {html.escape(example.score)} "
            f"{verdict[example.right]}</h2><h4>{html.escape(example.where)}</h4>"
            f'<div class="text prompt">{html.escape(example.prompt)}</div>'
        )
        for response in example.responses:
            parts.append(f'<h3>{html.escape(response.name)}, {len(response.ids)} tokens</h3><div class="panels">')
            parts += [_panel(response, name, beta, top, lowest) for name in response.policies]
            parts.append("</div>")
        parts.append("</article>")
    return self_contained(title, _STYLE, "".join(parts))


def _panel(response: Response, name: str, beta: float, top: float, lowest: float) -> str:
    logps, reference = response.policies[name], response.reference
    rewards = None if reference is None or logps is reference else beta * (logps - reference)
    total = f"log-probability {logps.sum():.2f}" if rewards is None else f"reward {rewards.sum():+.3f}"
    out = [f'<div><h4>{html.escape(name)}: {total}</h4><div class="text">']
    for i, (token, piece) in enumerate(zip(response.ids, response.pieces, strict=True)):
        hover = f"{piece!r}, id {token}\nlog policy {logps[i]:.4f}"
        if rewards is None:
            colour, strength = RARE, min(-logps[i] / lowest, 1.0)
        else:
            colour, strength = BEST if rewards[i] > 0 else WORST, min(abs(rewards[i]) / top, 1.0)
            hover += f"\nlog reference {reference[i]:.4f}\nreward {rewards[i]:+.4f}"
        style = f"background:{_colour(colour, strength)}"
        out.append(f'<i style="{style}" title="{html.escape(hover, quote=True)}">{html.escape(piece)}</i>')
    return "".join([*out, "</div></div>"])


def _colour(colour: tuple[int, int, int], strength: float = 1.0) -> str:
    return f"rgba({','.join(map(str, colour))},{STRONGEST * strength:.2f})"


def _scale(*colours: str) -> str:
    return f'<span class="scale" style="background:linear-gradient(90deg,{",".join(colours)})"></span>'
