"""What cells of notebooks show: HTML in a notebook, text in a script, and nothing of a text is markup."""

import sys
import types

import pytest

from prefalign_jax.intervals import Interval
from prefalign_jax.pages.cells import draw_intervals, html_table, show_answers, show_intervals, show_picture, show_table

RUNS = {"dpo": {"reward": Interval(1.0, 0.5, 1.5)}, "orpo": {"reward": Interval(-10.25, -11.0, -9.5)}}


@pytest.fixture
def shown(monkeypatch):
    """What a notebook is given to display."""
    out = []
    display = types.ModuleType("IPython.display")
    display.display = lambda what, raw=False: out.append(what)
    display.Image = lambda filename: ("picture", filename)
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return out


def test_a_table_is_html_in_a_notebook_and_text_beside_it(shown, capsys):
    show_table(("run", "pairs"), [("<b>dpo</b>", 1200)])
    (bundle,) = shown
    assert bundle["text/plain"].splitlines() == ["run         pairs", "<b>dpo</b>  1,200"]
    assert "&lt;b&gt;dpo&lt;/b&gt;" in bundle["text/html"] and "<b>" not in bundle["text/html"]
    assert capsys.readouterr().out == ""


def test_numbers_stand_to_the_right_and_names_to_the_left():
    html = html_table(("run", "pairs"), [("dpo", 1200), ("orpo", 7)])
    assert html.count("text-align: right") == 3 and html.count("text-align: left") == 3
    assert html_table(("a", "b"), []).count("text-align: left") == 2


def test_answers_stand_side_by_side(shown):
    messages = [{"role": "user", "content": "Is it far?"}]
    reply = [{"role": "assistant", "content": "No."}]
    show_answers([messages], {"before": ["Well,\nthat depends."], "DPO": [reply]})
    (bundle,) = shown
    assert bundle["text/html"].count("<tr>") == 2 and bundle["text/html"].count("<td") == 3
    assert bundle["text/plain"].startswith("Is it far?\n  before: Well,")
    with pytest.raises(ValueError, match="zip"):
        show_answers([messages], {"before": []})


def test_intervals_as_a_table_and_as_a_picture(tmp_path, capsys):
    show_intervals(RUNS, digits=2)
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["run", "dpo", "orpo"] and "-10.25 [-11.00, -9.50]" in out[2]
    path = draw_intervals(RUNS, tmp_path / "intervals.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_is_shown_in_a_notebook_and_named_in_a_script(shown, monkeypatch, tmp_path, capsys):
    show_picture(tmp_path / "a.png")
    assert shown == [("picture", str(tmp_path / "a.png"))] and capsys.readouterr().out == ""
    monkeypatch.delitem(sys.modules, "ipykernel")
    show_picture(tmp_path / "a.png")
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}\n"
