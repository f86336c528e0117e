"""docs/models.md has every family and every case that is compared, within what the tests allow."""

import re

import pytest

from docs_pages import models
from prefalign_jax.models.families import FAMILIES
from test_families_parity import CASES


def test_the_table_has_every_family_and_case():
    assert models.NAMES.keys() == FAMILIES.keys()
    page = models.PAGE.read_text(encoding="utf-8")
    table = page[page.index(models.BEGIN) : page.index(models.END)]
    rows = re.findall(r"^\| `(\w+)`(?:, ([\w ]+))? \|.*?\|((?: (?:[\d.]+e[+-]\d+|-) \|){5})$", table, re.MULTILINE)
    assert {" ".join(filter(None, row[:2])) for row in rows} == CASES.keys(), "run python scripts/models_page.py"
    for family, _, numbers in rows:
        logits, logps, gradient, export, *rewards = numbers.split(" |")[:-1]
        if FAMILIES[family].reward_architecture is None:
            assert rewards.pop() == " -"
        logits, logps, gradient, export, rewards = map(float, (logits, logps, gradient, export, *(rewards or [0])))
        assert max(logits, gradient, rewards) <= 1e-4 and logps <= 2e-5 and export <= 1e-6


def test_what_the_page_says_is_not_read_is_not():
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    page = models.PAGE.read_text(encoding="utf-8")
    sentence = page[page.index("this package does not read:") : page.index("and older or rarer ones")]
    named = set(re.findall(r"`(\w+)`", sentence))
    assert len(named) > 10 and named <= auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - FAMILIES.keys()


def test_variants_stand_beneath_their_family():
    rows = models.table({"llama": {"logits": 1e-6}, "llama dynamic": {"logits": 2e-6, "export": 0.0}}).splitlines()[2:]
    assert rows[0].startswith("| `llama` | Llama 2 and 3") and "| 1.0e-06 | - | - | - | - |" in rows[0]
    assert rows[1].startswith("| `llama`, dynamic |  |  | 2.0e-06 | - | - | 0.0e+00 | - |")
