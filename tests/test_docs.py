"""README and docs/*.md: how long they are, how long their sentences are, and that their links lead somewhere.

A word is whatever stands between white space and has a letter or a digit in it. Blocks of code are never counted. The
README's words are all others, those of tables and headings included. Sentences are those of paragraphs and lists: code,
tables, headings and pictures have none. Code within a sentence and a link are the words that a reader sees.

README, docs/start.md and docs/learn/*.md are in Japanese too. Both languages say the same: commands, figures, links.
"""

import pathlib
import re
from collections import Counter

import pytest

from prefalign_jax.losses import LOSSES
from prefalign_jax.models.families import FAMILIES

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
JAPANESE = [ROOT / "README.ja.md", *sorted((DOCS / "ja").rglob("*.md"))]
ENGLISH = [ROOT / "README.md", *sorted({*DOCS.rglob("*.md")} - {*JAPANESE})]
PAGES = [*ENGLISH, *JAPANESE]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def named(pages: list[pathlib.Path]):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.relative_to(ROOT).as_posix())


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


def anchors(text: str) -> list[str]:
    """What the headings of a page are called in links to them."""
    heads = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", head)).strip().lower().replace(" ", "-") for head in heads]


def english(page: pathlib.Path) -> pathlib.Path:
    """The English page or notebook that a Japanese one translates; of others, the same."""
    name = page.relative_to(ROOT).as_posix()
    return ROOT / re.sub(r"^docs/ja/", "docs/", re.sub(r"\.ja\.(md|ipynb)$", r".\1", name))


def blocks(text: str) -> list[str]:
    """A page's blocks of code, formulas included, without the comments in them."""
    code = re.findall(r"^ *```.*?^ *```$", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(r"(?<!\S)#.*", "", block) for block in code]


def inline(text: str) -> Counter[str]:
    """Code within sentences and tables."""
    return Counter(re.findall(r"`([^`]+)`", without_code(text)))


def figures(text: str) -> Counter[str]:
    """Numbers outside blocks of code, with their signs; what a link leads to has none."""
    text = re.sub(r"\]\([^)]*\)", "]", without_code(text))
    return Counter(re.findall(r"(?<![A-Za-z\d])[+−-]?(?<![A-Za-z_.])\d+(?:[.,]\d+)*(?:e-?\d+)?", text, re.ASCII))


def written_out(text: str) -> Counter[str]:
    """Numbers that English has as words and Japanese as digits."""
    said = Counter(re.findall(r"[a-z]+", text.lower()))
    said["two"] += said["second"] + said["twice"] + said["half"]
    said["three"] += said["third"]
    return Counter({str(number): said[word] for number, word in enumerate(NUMBERS, 1)})


def links(page: pathlib.Path) -> Counter[tuple[str, int]]:
    """Links and pictures of a page: (address or English file, which of its headings)."""
    counts = Counter()
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        path, _, heading = target.partition("#")
        if path.startswith("https:"):
            counts[target, -1] += 1
            continue
        file = (page.parent / path).resolve() if path else page
        number = anchors(file.read_text(encoding="utf-8")).index(heading) if heading else -1
        counts[english(file).relative_to(ROOT).as_posix(), number] += 1
    return counts


def shape(text: str) -> list[tuple[str, int]]:
    """Headings and rows of tables in their order: (#, level) and (|, bars)."""
    lines = [line for line in without_code(text).splitlines() if line.startswith(("#", "|"))]
    return [(line[0], len(re.match("#*", line)[0]) or line.count("|")) for line in lines]


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


@named(ENGLISH)
def test_sentences_have_at_most_20_words_on_average(page):
    parts = sentences(page.read_text(encoding="utf-8"))
    longest = sorted(parts, key=words)[-3:]
    assert sum(map(words, parts)) / len(parts) <= 20, "shorten these:\n" + "\n".join(longest)


@named(ENGLISH)
def test_no_sentence_is_a_chain_of_semicolons(page):
    assert [part for part in sentences(page.read_text(encoding="utf-8")) if part.count(";") > 1] == []


@named(PAGES)
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
    made = {"index.md", "contributing.md", "changes.md", "ja/index.md"}
    assert listed - made == {page.relative_to(DOCS).as_posix() for page in PAGES if page.parent != ROOT}


def test_the_readme_counts_losses_and_families():
    page = " ".join(PAGES[0].read_text(encoding="utf-8").split())
    assert re.findall(r"\[(\d+) (other losses|families)\]", page) == [
        (str(len(LOSSES) - 2), "other losses"),
        (str(len(FAMILIES)), "families"),
    ]
    assert f"| preference losses | {len(LOSSES)} |" in page


def test_readme_start_and_lessons_are_in_japanese_too():
    assert [english(page) for page in JAPANESE] == [PAGES[0], *sorted((DOCS / "learn").glob("*.md")), DOCS / "start.md"]


@named(JAPANESE)
def test_both_languages_have_the_same_commands(page):
    ours, theirs = (one.read_text(encoding="utf-8") for one in (page, english(page)))
    assert blocks(ours) == blocks(theirs)
    assert inline(ours) == inline(theirs)


@named(JAPANESE)
def test_both_languages_have_the_same_figures(page):
    ours, theirs = (one.read_text(encoding="utf-8") for one in (page, english(page)))
    assert figures(theirs) - figures(ours) == Counter()
    more = figures(ours) - figures(theirs)
    del more["1"]  # English has it as "a", "once" or nothing
    assert more - written_out(theirs) == Counter()


@named(JAPANESE)
def test_both_languages_have_the_same_links_headings_and_tables(page):
    assert links(page) == links(english(page))
    ours, theirs = (one.read_text(encoding="utf-8") for one in (page, english(page)))
    assert shape(ours) == shape(theirs)


@named(JAPANESE)
def test_japanese_is_polite_and_its_sentences_are_short(page):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"[^\x00-\x7f]\n[^\x00-\x7f].*", text) == []  # a line's end would show as a space
    parts = [part for block in paragraphs(text) for part in re.findall(r"[^。]+(?=。)", block)]
    parts = [re.sub(r"\]\([^)]*\)|[*`\[]", "", part).strip() for part in parts]
    ends = r"(です|ます|ません|でした|ました|ましょう|でしょう|ください)か?[」)]?$"
    assert [part for part in parts if not re.search(ends, part)] == []
    assert sum(map(len, parts)) / len(parts) <= 45, "shorten these:\n" + "\n".join(sorted(parts, key=len)[-3:])
