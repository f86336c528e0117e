"""README and docs/*.md: how long they are, how long their sentences are, and that their links lead somewhere.

A word is whatever stands between white space and has a letter or a digit in it. Blocks of code are never counted. The
README's words are all others, those of tables and headings included. Sentences are those of paragraphs and lists: code,
tables, headings and pictures have none. Code within a sentence and a link are the words that a reader sees.
"""

import pathlib
import re

import pytest

from prefalign_jax.losses import LOSSES
from prefalign_jax.models.families import FAMILIES

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def without_code(text: str) -> str:
    """A page without its blocks of code and its comments."""
    return re.sub(r"^ *```.*?^ *```$|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)


def words(text: str) -> int:
    return len(re.findall(r"\S*\w\S*", text))


def paragraphs(text: str) -> list[str]:
    """Paragraphs and entries of lists, each on one line."""
    blocks, inside = [], False
    for line in without_code(text).splitlines():
        entry = re.match(r"\s*(?:[-*]|\d+\.)\s+", line)
        if not line.strip() or line.startswith(("#", "|", "![", "<")) or (line.startswith("    ") and not inside):
            inside = False  # the last are blocks of code without marks
        elif entry or not inside:
            blocks.append(line[entry.end() if entry else 0 :].strip())
            inside = True
        else:
            blocks[-1] += " " + line.strip()
    return blocks


def sentences(text: str) -> list[str]:
    """What ends with a full stop, a question or an exclamation mark before a capital, or with its paragraph."""
    out = []
    for block in paragraphs(text):
        block = re.sub(r"`([^`]*)`", lambda code: "C" + code[1].replace(".", "_").replace(" ", " C"), block)
        block = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", lambda link: link[1][:1].upper() + link[1][1:], block)
        out += [part for part in re.split(r"(?<=[.!?])[)\"*]*\s+(?=[A-Z(\[\"*])", block) if words(part)]
    return out


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links to them."""
    heads = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", head)).strip().lower().replace(" ", "-") for head in heads}


def test_what_is_a_word_and_a_sentence():
    page = "# A heading\n\n| a | table |\n|---|---|\n\nFour words, e.g. these. `code.path` is (a) word!\n\n"
    page += "```\nno word\n```\n"
    assert words(without_code(page)) == 2 + 2 + 4 + 4
    assert [words(part) for part in sentences(page)] == [4, 4]
    listed = (
        "Text that goes\non.\n\n    code of no words\n\n- One entry\n  goes on. [link.md](x) begins another.\n- Next"
    )
    assert [words(part) for part in sentences(listed)] == [4, 4, 3, 1]


def test_the_readme_has_at_most_900_words():
    assert words(without_code(PAGES[0].read_text(encoding="utf-8"))) <= 900


@named
def test_sentences_have_at_most_20_words_on_average(page):
    parts = sentences(page.read_text(encoding="utf-8"))
    longest = sorted(parts, key=words)[-3:]
    assert sum(map(words, parts)) / len(parts) <= 20, "shorten these:\n" + "\n".join(longest)


@named
def test_no_sentence_is_a_chain_of_semicolons(page):
    assert [part for part in sentences(page.read_text(encoding="utf-8")) if part.count(";") > 1] == []


@named
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        path, _, heading = target.partition("#")
        if path.startswith("https:"):
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            assert heading in anchors(file.read_text(encoding="utf-8")), f"{page.name} links to {target}"


def test_every_page_is_reached_from_the_readme():
    reached, queue = set(), PAGES[:1]
    while queue:
        page = queue.pop().resolve()
        if page not in reached and page in PAGES:
            reached.add(page)
            queue += [page.parent / path for path in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))]
    assert sorted(page.name for page in {*PAGES} - reached) == []


def test_every_page_is_in_the_navigation_of_the_site():
    listed = set(re.findall(r"^ +- ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    made = {"index.md", "contributing.md", "changes.md"}
    assert listed - made == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}


def test_the_readme_counts_losses_and_families():
    page = " ".join(PAGES[0].read_text(encoding="utf-8").split())
    assert re.findall(r"\[(\d+) (other losses|families)\]", page) == [
        (str(len(LOSSES) - 2), "other losses"),
        (str(len(FAMILIES)), "families"),
    ]
    assert f"| preference losses | {len(LOSSES)} |" in page
