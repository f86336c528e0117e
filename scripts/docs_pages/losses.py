"""docs/losses.md and docs/losses.png, made from the losses themselves: python scripts/losses_page.py

A test fails where the page no longer says what the code does.
"""

import json
import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from prefalign_jax.data.token_weights import contrasted, decayed
from prefalign_jax.losses import LOSSES, MIXTURES, MODIFIERS, NEEDS, BoundLoss, hyper_of, make_loss
from prefalign_jax.options import hyper_parameters
from prefalign_jax.pages.palette import INK, PALETTE
from prefalign_jax.pages.pictures import styled
from prefalign_jax.tables import markdown
from prefalign_jax.types import PairLogps, Responses, Sides

DOCS = Path(__file__).parents[2] / "docs"
SECTIONS = {
    "Pairs, with a reference": lambda needs: {"rejected", "reference"} <= needs and not {"label", "group"} & needs,
    "Pairs, without a reference": lambda needs: not {"reference", "reward", "group"} & needs,
    "Groups: all responses to a prompt, with scores": lambda needs: "group" in needs and "reward" not in needs,
    "Single completions, desirable or not": lambda needs: "label" in needs,
    "Reward models": lambda needs: "reward" in needs,
}
MARGINS = np.linspace(-30.0, 30.0, 241)
TOKENS = 20.0


def paragraph(doc: str, begins: str) -> str:
    """The text after 'BEGINS: ' in a docstring, up to the next entry or empty line, on one line."""
    match = re.search(rf"^ *{begins}: (.*?)(?=\n *\n|\n *[A-Z]\w*:|\Z)", doc, re.DOTALL | re.MULTILINE)
    return " ".join(match[1].split()) if match else ""


def sections() -> dict[str, list[str]]:
    """{title: names of the losses}, each loss once."""
    out = {title: [] for title in SECTIONS}
    for name in LOSSES:
        needs = make_loss(name).needs
        out[next(title for title, holds in SECTIONS.items() if holds(needs))].append(name)
    return out


def row(name: str) -> list[str]:
    """A loss as a row of its table."""
    doc, loss = LOSSES[name].function.__doc__, make_loss(name)
    own = hyper_parameters(LOSSES[name].function)
    options = ", ".join(f"{key}={value}" for key, value in own.items())
    more = ", ".join(key for key in hyper_of(name) if key not in own)
    usual = {"rejected", "reference", "label", "reward", "group"}
    return [
        f"`{name}`",
        loss.title,
        f"`{loss.formula}`",
        "; ".join(filter(None, (options, more))) or "none",
        "yes" if "reference" in loss.needs else "no",
        ", ".join(sorted(loss.needs - usual)) or "-",
        paragraph(doc, "TRL").rstrip("."),
        paragraph(doc, "Source").rstrip("."),
    ]


def prose(text: str) -> list[str]:
    """A paragraph, wrapped, and the empty line after it."""
    return [*textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False), ""]


def page() -> str:
    """docs/losses.md."""
    lines = ["# Losses", ""]
    lines += prose(
        "Made by `python scripts/losses_page.py` from the docstrings, which say more: shapes, ranges, metrics. Choose "
        "one with `--config.loss.name=NAME` (or in the experiment, `config.defaults('NAME')`) and set its options with "
        "`--config.loss.OPTION=VALUE`; an option that the loss does not have is an error."
    )
    lines += prose(
        "a = log pi(y_w|x) - log pi_ref(y_w|x) of the chosen response, b the same of the rejected, h = a - b; pi_w and "
        "pi_l are the probabilities of the responses under the policy, n_w and n_l their tokens. Log-probabilities are "
        "sums over the response unless divided by n. *Reads* is what a loss needs besides; what none needs is not "
        "computed."
    )
    lines += prose(
        "A group is all K responses to a prompt. Of response i, s_i is the score (more is better), n_i its tokens, and "
        "r_i = beta (log pi - log pi_ref) its reward. Responses of equal score are not compared with each other. "
        "Losses of groups can be added to each other and to `sft`, which reads the best response."
    )
    for title, names in sections().items():
        head = ("loss", "in words", "formula", "options", "reference", "reads", "TRL 1.16", "source")
        lines += [f"## {title}", "", markdown(head, [row(name) for name in names]), ""]
    lines += ["## What can be added to a loss", ""]
    lines += prose("Options after the semicolon above, for losses of log-ratios:")
    for modifier in MODIFIERS.values():
        options = ", ".join(f"{key}={value}" for key, value in hyper_parameters(modifier.function).items())
        doc = modifier.function.__doc__
        lines += [f"- `{options}`: {' '.join(doc.splitlines()[0].split())} ({paragraph(doc, 'Source').rstrip('.')})"]
    lines += prose(
        "- `weighting=none`: `wpo` multiplies by WPO's weight, `wpo_unclipped` by the same unbounded, as TRL."
    )
    lines += prose(
        "A weighted sum is a loss too: `--config.loss.name='0.8*dpo + 0.2*bco(shift=none) + sft'`. Options in brackets "
        "are the term's own, others go to every term that has them. Sums with a name:"
    )
    lines += [*(f"- `{name}`: `{text}`" for name, text in MIXTURES.items()), ""]
    lines += prose(
        "The reference moves with the policy under `--config.reference.kind=moving` (TR-DPO, arXiv 2404.09656): "
        "reference <- mixup policy + (1 - mixup) reference every so many steps; mixup=1 is the hard update."
    )
    lines += ["## Weights of tokens", ""]
    lines += prose(
        "Each token of a response has a weight, which is 1 unless something gives it another. Every sum over tokens is "
        "then a weighted sum, of policy and reference alike. So a token count n is the sum of the weights, and a mean "
        "per token (ORPO, SimPO, IPO per token, ...) a weighted mean. A token of weight 0 is read and not trained. Two "
        "options compute weights, for training and held-out data alike; both together multiply:"
    )
    for option, function in (
        ("token_weights.decay=0.98", decayed),
        ("token_weights.positive=DIR --config.token_weights.negative=DIR", contrasted),
    ):
        first, more = textwrap.dedent("    " + function.__doc__).split("\n\n")[:2]
        source = paragraph(function.__doc__, "Source").rstrip(".")
        about = f"- `--config.{option}`: {first} {more} Source: {source}."
        lines += textwrap.wrap(about, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    lines += [""]
    lines += prose(
        "The two models of the second may be fine-tuned on the chosen and on the rejected responses, or trained by DPO "
        "on the pairs and on the pairs turned round: `--config.data.columns=chosen=rejected,rejected=chosen`. They "
        "share the policy's tokenizer. Before training each makes one pass over the data; its log-probabilities are "
        "kept in WORKDIR/token_weights. A response's `ld_alpha` and `sampled` tokens are counted, not weighed. The "
        "page of `prefalign inspect` shows the weights that need no model."
    )
    lines += ["## What a loss may read", ""]
    lines += [markdown(("name", "what"), [(f"`{name}`", what) for name, what in NEEDS.items()]), ""]
    lines += prose(
        "`batch`: the statistic is over the global batch, whatever the devices and micro-steps; a TRL trainer takes it "
        "over a device's share of a micro-step."
    )
    lines += ["## Loss and gradient against the margin", ""]
    lines += prose(
        f"One pair of two responses of {TOKENS:.0f} tokens, log-ratios a = h/2 and b = -h/2 around a log-probability "
        "of -60 each (so for losses without a reference h is the difference of the policy's), defaults otherwise. "
        "Blue: the loss. Orange, right axis: its derivative along h. (beta_dpo's beta follows the batch, which "
        "is this one pair.) Groups have a third response in between, of log-probability -60 and log-ratio 0; the "
        "scores are 2, 1 and 0."
    )
    return "\n".join([*lines, "![loss and gradient against the margin](losses.png)", ""])


def pair(margin: jax.Array) -> tuple[PairLogps, PairLogps]:
    """Policy and reference of a batch of one pair with this margin; whatever else a loss reads is neutral.

    A loss of groups reads a third response halfway between the two.
    """
    one = jnp.ones(1)
    tokens = TOKENS * one

    def record(half: jax.Array) -> PairLogps:
        sides = Sides(-60.0 + half * one, -60.0 - half * one)
        return PairLogps(
            *sides,
            chosen_tokens=tokens,
            rejected_tokens=tokens,
            mean_tokens=jnp.array([0.0, TOKENS]),
            weight=one,
            margin=2 * one,
            shared=sides,
            sampled=sides,
            token_kl=Sides(one, one),
            sum_squares=sides,
            responses=Responses(
                jnp.stack([sides.chosen, -60.0 * one, sides.rejected], axis=1),
                tokens=jnp.full((1, 3), TOKENS),
                scores=jnp.array([[2.0, 1.0, 0.0]]),
                present=jnp.ones((1, 3)),
            ),
        )

    return record(margin / 2), record(0.0)


def curves(loss: BoundLoss) -> tuple[np.ndarray, np.ndarray]:
    """(loss, its derivative) at every margin of MARGINS."""
    running = {name: jnp.float32(value) for name, value in loss.running.items()}

    def value(margin: jax.Array) -> jax.Array:
        policy, reference = pair(margin)
        policy = policy._replace(running=running)
        return loss(policy, reference if "reference" in loss.needs else None)[0][0]

    return jax.vmap(jax.value_and_grad(value))(jnp.asarray(MARGINS, jnp.float32))


def shown() -> dict[str, BoundLoss]:
    """The losses that are drawn: those of pairs and groups."""
    losses = {name: make_loss(name) for name in LOSSES}
    return {name: loss for name, loss in losses.items() if "rejected" in loss.needs and "label" not in loss.needs}


def points() -> dict[str, list[float]]:
    """Some points of every curve: kept in the picture, so that a test sees when it is out of date."""
    return {name: [float(f"{y:.6g}") for y in np.concatenate(curves(loss))[::48]] for name, loss in shown().items()}


@styled
def plot(path: Path) -> None:
    """docs/losses.png."""
    losses = shown()
    columns = 5
    lines = -(-len(losses) // columns)
    figure = matplotlib.figure.Figure(figsize=(15, 2.3 * lines))
    for number, (name, loss) in enumerate(losses.items(), 1):
        axes = figure.add_subplot(lines, columns, number)
        value, slope = curves(loss)
        axes.plot(MARGINS, value, color=PALETTE["blue"])
        axes.axvline(0, color="#999999", lw=0.6)
        axes.set_title(name)
        axes.tick_params(labelsize=7, labelcolor=PALETTE["blue"])
        axes.tick_params(axis="x", labelcolor=INK)
        right = axes.twinx()
        right.grid(False)
        right.spines.right.set_visible(True)
        right.plot(MARGINS, slope, color=PALETTE["vermillion"], lw=1)
        right.tick_params(labelsize=7, labelcolor=PALETTE["vermillion"])
    figure.savefig(path, dpi=80, metadata={"Description": json.dumps(points())})


def write() -> None:
    """Writes both files."""
    (DOCS / "losses.md").write_text(page(), encoding="utf-8")
    plot(DOCS / "losses.png")
