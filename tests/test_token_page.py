import html.parser

import numpy as np
import pytest

from prefalign_jax.pages.token_page import BEST, WORST, Example, Response, choose_examples, page, pieces_of

HOSTILE = [
    "<script>alert('1')</script> & \"quoted\" 'single' </div></i>",
    "naïve 日本語 👩‍👩‍👧 é",
    "tabs\tand\n\nnew lines  two spaces",
    ' title=" onmouseover="alert(1)" <img src=x onerror=alert(1)>',
]


class Seen(html.parser.HTMLParser):
    """The elements of a page with their attributes, and the text of each panel."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append((tag, dict(attrs)))
        if (tag, dict(attrs).get("class")) == ("div", "text"):
            self.texts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.texts and self.open and self.open[-1][0] == "i":
            self.texts[-1] += data


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def example(tokenizer, text, seed=0):
    rng = np.random.default_rng(seed)
    ids = ids_of(tokenizer, text)
    reference, policy = -rng.exponential(size=(2, len(ids)))
    pieces = pieces_of(tokenizer, ids_of(tokenizer, "Hi:"), ids)
    response = Response("chosen " + text, ids, pieces, {"reference": reference, "policy": policy}, reference)
    return Example("highest", "margin +1 " + text, True, text, text, [response])


# Pieces


@pytest.mark.parametrize("text", HOSTILE)
def test_pieces_joined_are_the_text(tiny_tokenizer, text):
    ids = ids_of(tiny_tokenizer, text)
    pieces = pieces_of(tiny_tokenizer, ids_of(tiny_tokenizer, "Question: é?"), ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_a_character_of_several_tokens_stands_in_the_last(tiny_tokenizer):
    ids = ids_of(tiny_tokenizer, "a👧b")
    pieces = pieces_of(tiny_tokenizer, ids_of(tiny_tokenizer, "x"), ids)
    assert len(ids) == 6
    assert pieces == ["a", "", "", "", "👧", "b"]


def test_bytes_that_never_become_a_character_are_not_lost(tiny_tokenizer):
    ids = ids_of(tiny_tokenizer, "a👧")[:-1]
    pieces = pieces_of(tiny_tokenizer, ids_of(tiny_tokenizer, "x"), ids)
    assert pieces[:-1] == ["a", "", ""]
    assert set(pieces[-1]) == {"\ufffd"}


def test_a_character_that_began_in_the_prompt_is_shown(tiny_tokenizer):
    ids = ids_of(tiny_tokenizer, "a👧b")
    assert "".join(pieces_of(tiny_tokenizer, ids[:3], ids[3:])) == "👧b"


def test_special_tokens_are_shown(tiny_tokenizer):
    ids = [*ids_of(tiny_tokenizer, "yes"), tiny_tokenizer.eos_token_id]
    assert "".join(pieces_of(tiny_tokenizer, ids[:1], ids)) == "yes<|im_end|>"


# The page


def test_hostile_text_is_text(tiny_tokenizer):
    found = Seen(page(HOSTILE[0], HOSTILE[3], [example(tiny_tokenizer, text) for text in HOSTILE], beta=0.1))
    assert found.open == []  # every element is closed where it should be
    assert {tag for tag, _ in found.elements} <= set(
        "html head meta title style body nav ol li a h1 h2 h3 h4 p span br article div i script".split()
    )
    allowed = {"class", "style", "title", "lang", "charset", "name", "content", "http-equiv"}
    allowed |= {"id", "href", "hidden", "role", "tabindex", "aria-label"}
    assert {name for _, attributes in found.elements for name in attributes} <= allowed
    assert found.texts == [text for text in HOSTILE for _ in range(2)]


def test_an_index_leads_to_every_pair(tiny_tokenizer):
    found = Seen(page("t", "a", [example(tiny_tokenizer, text) for text in HOSTILE], beta=0.1))
    links = [attributes["href"] for tag, attributes in found.elements if tag == "a" and attributes["href"] != "#index"]
    assert links == [f"#pair{number}" for number in range(1, len(HOSTILE) + 1)]
    places = {attributes["id"] for _, attributes in found.elements if "id" in attributes}
    assert {link[1:] for link in links} | {"index"} <= places


def test_tokens_are_reached_by_keys_and_their_texts_are_named(tiny_tokenizer):
    found = Seen(page("t", "a", [example(tiny_tokenizer, "x")], beta=0.1))
    texts = [attributes for _, attributes in found.elements if "text" in attributes.get("class", "").split()]
    assert len(texts) > 1 and all(one["tabindex"] == "0" and one["aria-label"] for one in texts)


def test_a_token_that_is_markup_by_itself_is_text():
    logps = -np.arange(1.0, len(HOSTILE) + 1)
    response = Response("chosen", range(len(HOSTILE)), HOSTILE, {"policy": logps}, None)
    found = Seen(page("t", "a", [Example("g", "s", None, "w", "p", [response])], beta=1.0))
    assert found.texts == ["".join(HOSTILE)]
    assert "img" not in {tag for tag, _ in found.elements}
    assert [tag for tag, _ in found.elements].count("script") == 1  # the page's own


def test_pointing_at_a_token_shows_its_numbers(tiny_tokenizer):
    shown = example(tiny_tokenizer, HOSTILE[0])
    response = shown.responses[0]
    found = Seen(page("t", "a", [shown], beta=0.5))
    titles = [attributes["title"] for tag, attributes in found.elements if tag == "i"]
    assert len(titles) == 2 * len(response.ids)
    for i, title in enumerate(titles[len(response.ids) :]):
        policy, reference = response.policies["policy"][i], response.reference[i]
        lines = [
            f"{response.pieces[i]!r}, id {response.ids[i]}",
            f"log policy {policy:.4f}",
            f"log reference {reference:.4f}",
            f"reward {0.5 * (policy - reference):+.4f}",
        ]
        assert title == "\n".join(lines)


def styles_of(rewards):
    """(colour, opacity) of tokens with these rewards under beta 1."""
    reference = np.full(len(rewards), -5.0)
    names = [f"t{i}" for i in range(len(rewards))]
    response = Response("chosen", range(len(rewards)), names, {"policy": reference + rewards}, reference)
    found = Seen(page("t", "a", [Example("g", "s", None, "w", "p", [response])], beta=1.0))
    styles = [attributes["style"] for tag, attributes in found.elements if tag == "i"]
    numbers = [style.removeprefix("background:rgba(").removesuffix(")").split(",") for style in styles]
    return [(tuple(map(int, parts[:3])), float(parts[3])) for parts in numbers]


def test_colours_diverge_from_zero():
    styles = styles_of(np.array([-2.0, -1.0, 0.0, 1.0, 2.0, 2.0]))
    assert [colour for colour, _ in styles if colour != styles[2][0]] == [BEST] * 3
    assert styles[0][0] == styles[1][0] == WORST
    opacity = [value for _, value in styles]
    assert opacity[2] == 0
    assert opacity[0] == opacity[4] == pytest.approx(2 * opacity[1], abs=0.02)  # the same scale on both sides


def test_models_that_agree_are_not_coloured():
    assert {opacity for _, opacity in styles_of(np.zeros(4))} == {0.0}


def test_tokens_that_are_not_trained_have_no_colour_and_do_not_count():
    reference, weights = np.full(4, -5.0), np.array([1.0, 0.0, 0.5, 3.0], np.float32)
    policy = np.array([-4.0, np.nan, -3.0, -6.0])
    response = Response("chosen", range(4), ["a", "b", "c", "d"], {"policy": policy}, reference, weights)
    text = page("t", "a", [Example("g", "s", None, "w", "p", [response])], beta=1.0)
    found = Seen(text)
    shown = [attributes for tag, attributes in found.elements if tag == "i"][2:]  # two are the legend's
    assert [one.get("class") for one in shown] == [None, "untrained", "weighted", "weighted"]
    assert "style" not in shown[1] and shown[1]["title"] == "'b', id 1\nread, not trained"
    assert [one["style"].partition("--weight:")[2] for one in shown if "style" in one] == ["", "25%", "100%"]
    assert "\nweight 0.5" in shown[2]["title"] and "weight" not in shown[0]["title"]
    assert "policy: reward -1.000" in text  # 1 + 0.5 * 2 - 3 * 1
    assert "nan" not in text
    plain = page("t", "a", [Example("g", "s", None, "w", "p", [response._replace(weights=None)])], beta=1.0)
    assert 'class="untrained"' not in plain and "--weight:" not in plain


def test_without_a_reference_only_log_probabilities_are_shown(tiny_tokenizer):
    shown = example(tiny_tokenizer, "Hello")
    response = shown.responses[0]._replace(reference=None)
    text = page("t", "a", [shown._replace(responses=[response])], beta=1.0)
    assert "reward" not in text
    assert f"log-probability {response.policies['policy'].sum():.2f}" in text


# Which pairs


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, 40])
def test_examples_are_the_extremes_and_some_others_once_each(count):
    scores = np.random.default_rng(0).normal(size=count)
    found = choose_examples(scores, 3)
    numbers = [number for _, number in found]
    assert len(set(numbers)) == len(numbers) == min(count, 9)
    assert (np.diff(scores[numbers]) <= 0).all()
    order = np.argsort(-scores).tolist()
    assert [number for group, number in found if group == "highest"] == order[:3]
    assert [number for group, number in found if group == "lowest"] == order[3:][-3:]


def test_the_seed_draws_the_random_ones():
    scores = np.arange(100.0)
    assert (
        choose_examples(scores, 5, seed=1) == choose_examples(scores, 5, seed=1) != choose_examples(scores, 5, seed=2)
    )
