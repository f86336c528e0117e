"""Every page that the package can write, made from tiny data: one frame, nothing from elsewhere, text stays text."""

import base64
import configparser
import fnmatch
import hashlib
import html.parser
import itertools
import json
import pathlib
import re

import matplotlib.figure
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fake_runs import leave_run
from prefalign_jax.analysis import compare_page
from prefalign_jax.analysis.runs import find_runs
from prefalign_jax.inspection import data_page
from prefalign_jax.judges import bench
from prefalign_jax.judges import page as judge_page
from prefalign_jax.judges.benchmarks import Benchmark, Questions
from prefalign_jax.judges.judge import Comparison, Verdict
from prefalign_jax.pages import frame, pictures, token_page
from prefalign_jax.pages.palette import PALETTE, look
from prefalign_jax.tables import Cell, Table

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "prefalign_jax"
HOSTILE = (
    "</script><script>alert(1)</script></style><img src=http://x/ onerror='a'>\" onclick=\"a {{ 7*7 }} {% x %} &lt;"
)
TEXTS = st.text("<>/&\"'{}%scriptmg= ", min_size=1, max_size=40).filter(str.strip)


def token_pages(text, tmp_path=None):
    logps = -np.ones(2)
    response = token_page.Response(text, [1, 2], [text, text], {text: logps}, logps - 1)
    return token_page.page(text, text, [token_page.Example(text, text, True, text, text, [response])], beta=0.1)


def data_pages(text, tmp_path=None):
    class Tokenizer:
        def decode(self, ids, **_):
            return text * len(ids)

    tokens = [data_page.Token(1, 0, "prompt"), data_page.Token(2, 1, "trained")]
    shown = data_page.Shown(0, [data_page.Branch(tokens[:1], tokens[1:])] * 2, 1.0, 0.0, True)
    pair = data_page.written_pair(shown, Tokenizer(), "pairs", text, text)
    table = Table(text, (text, text), [(text, text), (text, Cell(text, text))])
    return data_page.page(text, text, [table], {}, [(text, [pair])])


def judge_pages(text, tmp_path=None):
    verdict = Verdict(Comparison(text, text, text + "2", text), None, text)
    return judge_page.page([verdict], (text, text), text)


def bench_pages(text, tmp_path=None):
    comparisons = [Comparison(text + str(i), text, text + "2") for i in range(2)]
    asked = Questions(text, Benchmark(text, None, source=text), comparisons, [text, text + "2"], {text: 1}, [text])
    verdicts = {text: [Verdict(comparisons[0], 1.0), Verdict(comparisons[1], None, text)]}
    return bench.page(text, [bench.measure(asked, verdicts)], {text: {"judge": text, "options": [text]}})


def report_pages(text, tmp_path):
    for number in range(2):
        leave_run(tmp_path / "runs" / str(number), note=text + str(number), loss={"name": text})
    options = dict(title=text, metrics=["eval/loss"], columns=["seconds"])
    return compare_page.write_page(find_runs([tmp_path / "runs"]), tmp_path / "report.html", **options)[0].read_text()


DRAWN = {"svg", "defs", "clippath", "g", "path", "rect", "use", "text"}
QUICK = {"tokens": token_pages, "data": data_pages, "judge": judge_pages, "bench": bench_pages}
PAGES = {**QUICK, "report": report_pages}


class Seen(html.parser.HTMLParser):
    """What a browser makes of a page: its elements, and the text of its scripts, styles and title."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.inside, self.texts = [], "", {"script": [], "style": [], "title": []}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside in self.texts:
            self.texts[self.inside][-1] += data

    def shape(self):
        """Elements with the names of their attributes, but for pictures and the signs that stand for white space."""
        return [(tag, sorted(attributes)) for tag, attributes in self.elements if tag not in {"s", "wbr", *DRAWN}]


@pytest.fixture(scope="module", params=PAGES)
def made(request, tmp_path_factory):
    text = PAGES[request.param](HOSTILE, tmp_path_factory.mktemp("hostile"))
    plain = PAGES[request.param]("plain", tmp_path_factory.mktemp("plain"))
    return text, Seen(text), Seen(plain)


def test_hostile_text_makes_no_element_and_no_attribute(made):
    text, seen, plain = made
    assert seen.shape() == plain.shape()
    assert "49" not in "".join(seen.texts["title"])  # nor is it a template


@pytest.mark.parametrize("make", QUICK.values(), ids=QUICK)
@settings(max_examples=25, deadline=None)
@given(text=TEXTS)
@example(text=HOSTILE)
def test_no_text_is_markup(make, text):
    assert Seen(make(text)).shape() == Seen(make("plain")).shape()


def test_a_page_loads_nothing(made):
    _, seen, _ = made
    for tag, attributes in seen.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img", "image", "form")
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    styles = "".join(seen.texts["style"]) + "".join(attributes.get("style", "") for _, attributes in seen.elements)
    assert not re.search(r"@import|url\((?!#)", styles)


def test_the_browser_is_told_to_load_and_run_nothing_else(made):
    _, seen, _ = made
    tags = [tag for tag, _ in seen.elements]
    (at,) = (i for i, (_, a) in enumerate(seen.elements) if a.get("http-equiv") == "Content-Security-Policy")
    assert at < min(tags.index("style"), tags.index("body"))
    policy = seen.elements[at][1]["content"]
    scripts = [code for code, (_, a) in zip(seen.texts["script"], scripts_of(seen), strict=True) if "type" not in a]
    digests = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in scripts]
    allowed = "".join(f"; script-src 'sha256-{digest}'" for digest in digests)
    assert policy == "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'" + allowed


def scripts_of(seen):
    return [(tag, attributes) for tag, attributes in seen.elements if tag == "script"]


def test_pages_have_one_frame(made):
    text, seen, _ = made
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    metas = {a.get("name"): a.get("content") for tag, a in seen.elements if tag == "meta"}
    assert metas["viewport"] == "width=device-width, initial-scale=1" and metas["color-scheme"] == "light dark"
    (style,) = seen.texts["style"]
    css = (PACKAGE / "pages" / "frame.css").read_text().strip()
    assert css in style
    assert all(f"--{name}: {colour}" in style for name, colour in PALETTE.items())
    own = style.split("}", 1)[1].replace(css, "")
    assert set(re.findall(r"#[0-9a-f]{3,6}\b", own)) <= {"#fff", "#000"}  # a page adds no colours of its own
    assert len(seen.texts["title"]) == 1 and HOSTILE in seen.texts["title"][0]


def test_every_table_scrolls_in_a_box_of_its_own(made):
    text, seen, _ = made
    assert text.count("<table>") == text.count('<div class="wide"><table>')


def test_only_templates_hold_markup():
    markup = re.compile(r"</?(html|head|body|div|span|table|t[rdh]|p|h\d|article|section|script)\b[^\n]*>")
    for path in {*PACKAGE.rglob("*.py")} - {PACKAGE / "pages" / "cells.py"}:  # which writes cells of notebooks
        assert not markup.search(path.read_text(encoding="utf-8")), path


def test_every_template_travels_in_the_wheel():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    patterns = config["options.package_data"]["*"].split()
    files = [path for path in PACKAGE.rglob("*.*") if path.suffix in (".html", ".css", ".js", ".jinja", ".LICENSE")]
    assert len(files) > 5 and {"uplot.js", "uplot.css", "uplot.LICENSE"} <= {path.name for path in files}
    assert "prefalign_jax/pages/uplot.LICENSE" in config["metadata"]["license_files"].split()
    assert not [path for path in files if not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)]
    assert not [path for path in files if not (path.parent / "__init__.py").exists()]


def test_a_name_that_a_template_lacks_is_an_error():
    with pytest.raises(Exception, match="'about' is undefined"):
        frame.render("inspection/data_page.html", title="t")


# Pictures


@pytest.mark.parametrize("text", [HOSTILE, "$x_1$ _y", "a&b"])
def test_text_in_a_picture_is_text(text):
    figure = matplotlib.figure.Figure()
    figure.add_subplot().set_title(text, parse_math=False)
    seen = Seen(pictures.svg(figure, text))
    assert seen.elements[0] == ("svg", {**seen.elements[0][1], "aria-label": text})
    assert {tag for tag, _ in seen.elements} <= DRAWN


def test_ink_is_the_page_s_own_colour():
    @pictures.styled
    def draw():
        figure = matplotlib.figure.Figure()
        figure.add_subplot().plot([1, 2], label="a")
        figure.axes[0].legend()
        return figure

    text = pictures.svg(draw(), "curve")
    assert "currentColor" in text and PALETTE["blue"] in text and "#000000" not in text
    assert 'id="figure_1"' not in text


def linear(colour):
    parts = np.array(list(bytes.fromhex(colour[1:]))) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """WCAG's ratio of two colours' luminance."""
    high, low = sorted((linear(colour) @ [0.2126, 0.7152, 0.0722] for colour in (one, other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def lab(rgb):
    x, y, z = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    f, g, h = (np.cbrt(t) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x / 0.9505, y, z / 1.089))
    return np.array([116 * g - 16, 500 * (f - g), 200 * (g - h)])


# What is seen without red or without green cones, on linear light: Vienot, Brettel and Mollon (1999).
BLIND = {
    "red": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "green": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


def nearest(colours, cones):
    """The least distance of two colours in CIELAB, where 2 is just noticed, to eyes without these cones."""
    seen = [lab(np.clip(np.array(BLIND[cones]) @ linear(colour), 0, 1)) for colour in colours]
    return min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2))


@pytest.mark.parametrize("cones", BLIND)
def test_colours_can_be_told_apart_without_red_or_green_cones(cones):
    assert nearest(PALETTE.values(), cones) > 16
    assert nearest(["#d62728", "#2ca02c"], "green") < 10  # the usual red and green


def test_text_can_be_read_on_both_grounds():
    css = (PACKAGE / "pages" / "frame.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in css.split("@media (prefers-color-scheme")[:2])
    for theme in (light, dark):
        ground = "#ffffff" if theme["page"] == "#fff" else theme["page"]
        assert contrast(theme["ink"], ground) > 10 and contrast(theme["soft"], ground) > 4.5
    for colour in PALETTE.values():
        assert contrast(colour, "#ffffff") > 2 and contrast(colour, dark["page"]) > 3


def test_no_two_curves_look_alike():
    assert len({look(number) for number in range(24)}) == 24


def test_the_judges_data_is_json_in_an_element():
    seen = Seen(judge_pages(HOSTILE))
    data = json.loads(seen.texts["script"][0])
    assert data["rows"][0]["prompt"] == data["names"][0] == HOSTILE
