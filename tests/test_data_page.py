import dataclasses
import html.parser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefalign_jax.data.trees import Layout
from prefalign_jax.inspection.data_page import Branch, Shown, Token, page, pictures, shown_pairs, visible, written_pair
from prefalign_jax.tables import Table
from prefalign_jax.types import Pair
from small import make_pairs, packed

EOS = 60
HOSTILE = '<script>alert(\'1\')</script> & "quoted" </i> title=" onmouseover="x \u202eevil\u200b\ttab\n👧'


def with_eos(pairs):
    """The same pairs; each response ends with EOS, which is nowhere else."""

    def end(ids):
        return np.append(np.where(ids == EOS, 1, ids), EOS).astype(np.int32)

    return [Pair(np.where(p.prompt == EOS, 1, p.prompt), end(p.chosen), end(p.rejected), weight=i + 1.0, margin=0.5 * i)
            for i, p in enumerate(pairs)]  # fmt: skip


LAYOUTS = [
    Layout(),
    Layout(tree=False),
    Layout(prompt=True),
    Layout(tree=False, prompt=True),
    Layout(after=True),
    Layout(rejected=False),
    Layout(rewards=True),
    Layout(tree=False, rewards=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("how", [{}, {"micro_steps": 2, "groups": 2, "group": True}, {"row_length": 64}], ids=str)
def test_what_is_shown_is_what_was_packed(layout, how):
    pairs = with_eos(make_pairs(6, seed=len(how)))
    if how.get("group") and not layout.after:  # three pairs with one prompt, and two responses that come twice
        same = dict(prompt=pairs[0].prompt, chosen=pairs[0].chosen)
        pairs[1] = dataclasses.replace(pairs[1], **same)
        pairs[2] = dataclasses.replace(pairs[2], prompt=pairs[0].prompt, rejected=pairs[0].chosen)
    batch = packed(pairs, layout=layout, **how)
    shown = {one.index: one for one in shown_pairs(batch, layout, EOS)}
    assert sorted(shown) == list(range(6))
    for i, pair in enumerate(pairs):
        one = shown[i]
        assert (one.weight, one.margin, one.label) == (i + 1, 0.5 * i, True)
        sides = [pair.chosen, pair.rejected][: 1 + layout.rejected]
        assert len(one.branches) == len(sides)
        for side, branch in zip(sides, one.branches, strict=True):
            assert [t.id for t in branch.prompt] == pair.prompt.tolist()
            roles = [t.role for t in branch.response]
            ids, end = [t.id for t in branch.response], side.tolist()
            if layout.rewards:  # nothing is trained; the reward is read at the last token
                assert ids == end and set(roles) == {"untrained"}
                assert [t.read for t in branch.response] == [False] * (len(end) - 1) + [True]
            elif layout.after:
                assert ids == [*end, EOS] and roles == ["trained"] * (len(end) - 1) + ["eos", "eos"]
            else:
                assert ids == end and roles == ["trained"] * (len(end) - 1) + ["eos"]
                assert [t.held for t in branch.response] == [True] * (len(end) - 1) + [False]
            assert [t.position for t in branch.prompt + branch.response] == list(range(len(pair.prompt) + len(ids)))
        prompt = [t.role for t in one.branches[0].prompt]
        assert prompt == ["prompt", *(["trained" if layout.prompt else "prompt"] * (len(pair.prompt) - 1))]


@pytest.mark.parametrize("tree", [True, False])
def test_all_responses_of_a_group_are_shown(tree):
    pairs = with_eos(make_pairs(4))
    groups = [
        dataclasses.replace(pairs[0], others=(pairs[1].chosen, pairs[1].rejected), scores=(4.0, 3.0, 2.0, 1.0)),
        dataclasses.replace(pairs[2], scores=(1.0, 0.0)),
    ]
    layout = Layout(tree=tree, group=True)
    for one, group in zip(shown_pairs(packed(groups, layout=layout), layout, EOS), groups, strict=True):
        assert [[t.id for t in branch.response] for branch in one.branches] == [x.tolist() for x in group.responses]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_the_trained_tokens_are_those_of_the_batch(seed, count):
    """Counted on the page and in the arrays that the step reads, in whatever rows the pairs fell."""
    pairs = with_eos(make_pairs(count, seed=seed))
    batch = packed(pairs, batch_size=count + 1)
    shown = list(shown_pairs(batch, Layout(), EOS))
    trained = sum(t.role in ("trained", "eos") for one in shown for b in one.branches for t in b.response)
    assert trained == sum(len(p.chosen) + len(p.rejected) for p in pairs)
    assert len(shown) == count, "filler is not shown"


def test_a_target_that_does_not_follow_its_source_is_an_error():
    pairs = with_eos(make_pairs(3))
    batch = packed(pairs)
    target = batch.target.copy()
    target[0, 0, 0] += 1  # the first token of a response
    with pytest.raises(ValueError, match="target"):
        list(shown_pairs(batch._replace(target=target), Layout(), EOS))


@pytest.mark.parametrize("how", [{"layout": Layout()}, {"layout": Layout(tree=False), "groups": 2}], ids=str)
def test_weights_of_tokens_are_shown(how, tiny_tokenizer):
    pairs = [
        dataclasses.replace(one, token_weights=tuple(np.float32(np.arange(len(x)) % 4 / 2) for x in one.responses))
        for one in with_eos(make_pairs(3))
    ]
    for shown, pair in zip(shown_pairs(packed(pairs, **how), how["layout"], EOS), pairs, strict=True):
        for branch, weights in zip(shown.branches, pair.token_weights, strict=True):
            assert [t.weight for t in branch.response if t.role != "untrained"] == [w for w in weights if w]
    tokens = [Token(5, n, "trained", weight=weight) for n, weight in enumerate((0.5, 1.0, 2.25))]
    shown = Shown(0, [Branch([Token(5, 0, "prompt")], tokens)], 1.0, 0.0, True)
    text = page("t", "a", [], {}, [("g", [written_pair(shown, tiny_tokenizer, "supervised", "t", "w")])])
    assert 'class="trained less" title=' in text and 'class="trained more" title=' in text
    assert "position 0: trained, counts 0.5" in text and "counts 2.25" in text and text.count("counts ") == 3


def test_a_response_without_eos_is_marked(tiny_tokenizer):
    ids = [5, 6, 7]
    cut = [Token(i, n, "trained") for n, i in enumerate(ids, 3)]
    ended = [*cut, Token(tiny_tokenizer.eos_token_id, 6, "eos", held=False)]
    prompt = [Token(5, n, "prompt") for n in range(3)]
    shown = Shown(0, [Branch(prompt, cut), Branch(prompt, ended)], 1.0, 0.0, True)
    text = page("t", "a", [], {}, [("g", [written_pair(shown, tiny_tokenizer, "pairs", "t", "w")])])
    chosen, rejected = text.split("<section>")[1:]
    assert "does not end with EOS" in chosen and "does not end with EOS" not in rejected
    assert 'class="eos"' in rejected and "3 tokens, 3 trained" in chosen


class Seen(html.parser.HTMLParser):
    """A page's elements, and the text of its tokens without what stands for white space."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.tokens, self.texts = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "wbr"):
            self.open.append(tag)
        if tag == "i" and "title" in dict(attrs):
            self.tokens.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if "i" in self.open and self.tokens:
            self.tokens[-1] += data


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def hostile_page(tokenizer):
    prompt, response = (ids_of(tokenizer, text) for text in ("Hi " + HOSTILE, HOSTILE))
    tokens = [Token(i, n, "prompt") for n, i in enumerate(prompt)]
    more = [Token(i, len(prompt) + n, "trained") for n, i in enumerate(response)]
    shown = Shown(0, [Branch(tokens, more), Branch(tokens, more)], 2.0, 0.0, True)
    pair = written_pair(shown, tokenizer, "pairs", HOSTILE, HOSTILE)
    drawn = {"tokens": {"prompt": np.arange(9), "chosen": np.arange(9), "rejected": np.arange(9)[::-1]}}
    drawn |= {"total": {"prompt + longer response": np.arange(1, 9)}, "scores": {"margin": np.arange(5.0)}}
    images = pictures(drawn, 5)
    assert len(images) == 4
    return page(HOSTILE, HOSTILE, [Table(HOSTILE, (HOSTILE, "n"), [(HOSTILE, 1)])], images, [(HOSTILE, [pair])])


def test_the_page_escapes_everything_and_loads_nothing(tiny_tokenizer):
    text = hostile_page(tiny_tokenizer)
    seen = Seen(text)
    names = {tag for tag, _ in seen.elements}
    assert names.isdisjoint({"link", "iframe", "object", "base"})
    assert [tag for tag, _ in seen.elements].count("script") == 1  # the page's own
    policy = next(a["content"] for t, a in seen.elements if a.get("http-equiv") == "Content-Security-Policy")
    policy, digest = policy.split("; script-src ")
    assert policy == "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'"
    assert digest.startswith("'sha256-") and " " not in digest
    for _, attributes in seen.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert "src" not in attributes and attributes.get("href", "#").startswith("#")
    assert [tag for tag, _ in seen.elements].count("figure") == 4
    # All tokens are there, and their text, white space shown.
    ids = [len(ids_of(tiny_tokenizer, text)) for text in ("Hi " + HOSTILE, HOSTILE)]
    assert len(seen.tokens) == ids[0] + 2 * ids[1]
    written = "".join(token for token in seen.tokens[: ids[0]] if token != "•")
    shape = HOSTILE.replace(" ", "·").replace("\n", "↵\n").replace("\t", "⇥")
    shape = shape.replace("\u202e", "U+202E").replace("\u200b", "U+200B")
    assert written == "Hi·" + shape


@settings(max_examples=60, deadline=None)
@given(st.text() | st.text(alphabet="<>&;/ab\n "))
def test_visible_text_has_no_hidden_character(text):
    shown = "".join(plain + sign for plain, sign in visible(text))
    assert shown.replace("\n", "").replace("·", "").isprintable()
    if text.isascii() and text.replace("\n", "").isprintable():
        assert shown == text.replace(" ", "·").replace("\n", "↵\n")
    assert not [plain for plain, _ in visible(text) if set(plain) & set(" \t\u202a\u202e\u200b\u2066\xa0")]


def test_an_index_leads_to_every_pair_of_every_group(tiny_tokenizer):
    text = hostile_page(tiny_tokenizer)
    seen = Seen(text)
    links = [attributes["href"][1:] for tag, attributes in seen.elements if tag == "a"]
    places = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    assert set(links) <= set(places) and len(places) == len(set(places)) and "group0-pair0" in links
