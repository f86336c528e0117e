"""One style for all pictures, and a picture as an element of a page or as a file."""

from __future__ import annotations

import io
import re

import matplotlib
import matplotlib.figure
from markupsafe import Markup, escape

from prefalign_jax.pages.palette import INK, PALETTE

STYLE = {
    "text.parse_math": False,  # names of runs may hold dollar signs
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.prop_cycle": matplotlib.cycler(color=list(PALETTE.values())),
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 120,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
# Decorates whatever draws: the style is that of the package, whatever the user's own defaults are.
styled = matplotlib.rc_context(STYLE)


def svg(figure: matplotlib.figure.Figure, label: str) -> Markup:
    """A figure as an SVG element without a ground, its ink the page's own colour.

    Args:
      figure: drawn in INK.
      label: what it shows, for those who cannot see it; no other figure of the page has it.
    """
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every figure, and used by none
    return Markup(text.replace(INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def png(figure: matplotlib.figure.Figure) -> bytes:
    """A figure as a PNG file on white."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
