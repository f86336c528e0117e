"""The documentation as a site builds without warnings; what is public is on a page (a hook of the build asks that)."""

import doctest
import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("material")
pytest.importorskip("mkdocstrings")
pytest.importorskip("latex2mathml")
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def test_every_page_of_docs_is_in_the_site_with_its_text(site):
    for page in (ROOT / "docs").rglob("*.md"):
        made = site / page.relative_to(ROOT / "docs").with_suffix(".html")
        title = page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        assert title in re.sub("<[^>]*>", "", made.read_text(encoding="utf-8")), page


def test_formulas_are_mathml_and_need_no_script(site):
    text = (site / "learn" / "dpo.html").read_text(encoding="utf-8")
    assert text.count("<math") == 3 and "mathjax" not in text.lower() and "katex" not in text.lower()


def test_the_reference_shows_a_loss_by_name_formula_and_source(site):
    text = re.sub("<[^>]*>", "", (site / "reference" / "losses.html").read_text(encoding="utf-8"))
    assert "Odds ratio preference optimization (ORPO)" in text
    assert "-log pi_w / n_w - lambda log sigmoid(log odds_w - log odds_l)" in text
    assert "Source: Hong et al." in text


def test_a_name_without_a_page_is_seen(site, monkeypatch):
    from mkdocs.exceptions import PluginError

    from docs_pages import site as hooks

    monkeypatch.setattr(hooks, "public", lambda module: ["nowhere"] if module.endswith("losses.dpo") else [])
    with pytest.raises(PluginError, match="has prefalign_jax.losses.dpo.nowhere"):
        hooks.on_post_build(type("Config", (), {"site_dir": str(site)}))


def test_every_module_is_on_one_page():
    from docs_pages import site as hooks

    shown = re.findall(r"^::: (.*)$", "\n".join(hooks.reference().values()), re.MULTILINE)
    assert sorted(shown) == hooks.modules() and "prefalign_jax.data.chat" in shown


def test_docstrings_are_turned_as_the_example_says():
    from docs_pages import docstrings

    assert doctest.testmod(docstrings, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
