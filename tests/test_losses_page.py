"""docs/losses.md says what the code does."""

import inspect
import json
import pathlib
import re

import numpy as np
import pytest

from docs_pages import losses
from prefalign_jax.losses import LOSSES, MIXTURES
from prefalign_jax.losses.loss import described

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")


def test_the_page_is_the_one_that_the_losses_make():
    assert losses.page() == PAGE, "run python scripts/losses_page.py"


@pytest.mark.everything
def test_the_picture_shows_the_curves_of_these_losses():
    (text,) = re.findall(rb"Description\0(\{.*?\})", (ROOT / "docs" / "losses.png").read_bytes())
    drawn, now = json.loads(text), losses.points()
    assert drawn.keys() == now.keys(), "run python scripts/losses_page.py"
    for name, values in now.items():
        np.testing.assert_allclose(values, drawn[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", [*LOSSES, *MIXTURES])
def test_every_loss_is_on_the_page_with_formula_and_source(name):
    (line,) = re.findall(rf"^(?:\| |- )`{name}`.*$", PAGE, re.MULTILINE)
    if name in LOSSES:
        _, _, title, formula, options, reference, _, trl, source, _ = re.split(r"(?<!\\)\|", line)
        assert title.strip() and len(formula) > 8 and len(options) > 5 and reference.strip() in ("yes", "no")
        assert trl.strip() and re.search(r"arXiv \d{4}\.\d{5}", source)


@pytest.mark.parametrize("name", LOSSES)
def test_every_docstring_opens_with_the_name_in_words_and_then_the_formula(name):
    title, formula, *_ = inspect.getdoc(LOSSES[name].function).split("\n\n")
    assert re.fullmatch(r"[A-Z][^\n=^|]*\.", title) and len(title.split()) > 1, title
    assert described(LOSSES[name].function) == (title[:-1], " ".join(formula.split()))
    # A formula is no sentence: it computes something.
    assert re.search(r"[-+/*^(]", formula) and not re.match(r"[A-Z][a-z]+ [a-z]+ ", formula), formula


def test_names_in_words_are_distinct():
    assert len({described(loss.function)[0] for loss in LOSSES.values()}) == len(LOSSES)


def test_what_a_docstring_of_a_loss_of_ones_own_says():
    def one(policy, reference):
        """log(1 + h^2)"""

    def short(policy, reference):
        """log(1 + h^2)

        Args:
          policy: log-probabilities.
        """

    def full(policy, reference):
        """Cauchy's loss.

        log(1 +
        h^2)

        More.
        """

    assert described(one) == described(short) == ("", "log(1 + h^2)")
    assert described(full) == ("Cauchy's loss", "log(1 + h^2)")
    assert described(lambda policy, reference: None) == ("", "")


@pytest.mark.parametrize("name", LOSSES)
def test_every_docstring_tells_shapes_source_and_what_trl_does(name):
    doc = LOSSES[name].function.__doc__
    for part in ("Args:", "[B]", "Returns:", "TRL: ", "Source: "):
        assert part in doc or ("as in `aot`" in doc and part == "[B]"), part
