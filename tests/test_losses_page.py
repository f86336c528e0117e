"""docs/losses.md says what the code does."""

import json
import pathlib
import re

import numpy as np
import pytest

from docs_pages import losses
from prefalign_jax.losses import LOSSES, MIXTURES

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
        _, _, formula, options, reference, _, trl, source, _ = re.split(r"(?<!\\)\|", line)
        assert len(formula) > 8 and len(options) > 5 and reference.strip() in ("yes", "no")
        assert trl.strip() and re.search(r"arXiv \d{4}\.\d{5}", source)


@pytest.mark.parametrize("name", LOSSES)
def test_every_docstring_tells_shapes_source_and_what_trl_does(name):
    doc = LOSSES[name].function.__doc__
    for part in ("Args:", "[B]", "Returns:", "TRL: ", "Source: "):
        assert part in doc or ("as in `aot`" in doc and part == "[B]"), part
