"""The pages of the site that are made, as hooks of mkdocs: mkdocs.yml names this file.

- the start page is the README; CONTRIBUTING and CHANGELOG are pages too
- reference/ has every module of the package, grouped as GROUPS says, its text from the docstrings
- a file of the repository that a page links to becomes a page of its own, so that no link leaves the site; of a
  notebook it shows cells and outputs

Links stay as they work on a hub, and are turned here. After a build every public name must be on a page.
"""

import ast
import json
import os
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "prefalign_jax"
# Pages that lie outside docs/, by their place in the site.
OUTSIDE = {
    "README.md": "index.md",
    "README.ja.md": "ja/index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".cff": "yaml"}
# Page of the reference -> (title, modules and rooms of the package); one page has what no other names.
REST = ""
GROUPS = {
    "library": ("Library", "prefalign_jax library policy types callable_module"),
    "losses": ("Losses", "losses"),
    "training": ("Training", REST),
    "experiments": ("Experiments and options", "config experiment options load_data limits"),
    "data": ("Data", "data"),
    "models": ("Models", "models gguf logps torch_free"),
    "generation": ("Generation", "generation"),
    "evaluation": ("Evaluation and judges", "evaluation judges intervals"),
    "analysis": ("Analysis, pages and inspection", "analysis pages inspection tables"),
    "cost": ("Cost", "cost"),
    "command_line": ("Command line and processes", "cli commands processes progress exits files quiet"),
}


def modules() -> list[str]:
    """Dotted names of the package's modules: a room before what is in it, what begins with _ left out."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] != "experiments" and not any(part.startswith("_") and part != "__init__" for part in parts):
            names.append(".".join(part for part in parts if part != "__init__"))
    return sorted(names)


def public(module: str) -> list[str]:
    """The public classes, functions and constants that a module defines."""
    path = ROOT / module.replace(".", "/")
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    names = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]


def reference() -> dict[str, str]:
    """Path in the site -> text, of the pages of the reference."""
    rooms = {"prefalign_jax": ["prefalign_jax"]}
    for name in modules()[1:]:
        rooms.setdefault(name.split(".")[1], []).append(name)
    pages = {"reference/index.md": _face()}
    named = {page: names.split() for page, (_, names) in GROUPS.items()}
    for page, (title, names) in GROUPS.items():
        mine = named[page] if names != REST else [room for room in rooms if room not in sum(named.values(), [])]
        texts = [f"::: {name}\n" for room in mine for name in rooms[room]]
        pages[f"reference/{page}.md"] = f"# {title}\n\n" + "\n".join(texts)
    return pages


def _face() -> str:
    """The first page of the reference: what the package itself offers."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    face = next(ast.literal_eval(n.value) for n in tree.body if ast.unparse(n).startswith("FACE = "))
    rows = []
    for name, module in face.items():
        target = f"prefalign_jax.{module}.{name}" if module else f"prefalign_jax.{name}"
        rows.append(f"| `pa.{name}` | [`{target}`][{target}] |")
    groups = [f"- [{title}]({page}.md)" for page, (title, _) in GROUPS.items()]
    return "\n".join(
        [
            "# Reference",
            "",
            "This is made from the docstrings. The package itself offers these names, which are stable.",
            "[The library's page](../library.md) shows them together.",
            "",
            "| after `import prefalign_jax as pa` | where it is |",
            "|---|---|",
            *rows,
            "",
            "All other public names are here, by what they are about:",
            "",
            *groups,
            "",
        ]
    )


def parts(text: str) -> list[str]:
    """A page cut into prose and blocks of code, in turns."""
    return re.split(r"(^ *```.*?^ *```$)", text, flags=re.DOTALL | re.MULTILINE)


def linked(page: str, text: str) -> list[str]:
    """What a page links to, as paths from the root of the repository."""
    targets = [target for part in parts(text)[::2] for target in re.findall(r"\]\(([^)\s#]+)", part)]
    return [posixpath.normpath(posixpath.join(posixpath.dirname(page), t)) for t in targets if ":" not in t]


def in_site(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def turned(page: str, text: str) -> str:
    """A page of the repository with its links as they are in the site."""

    def link(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), match[1]))
        return "](" + os.path.relpath(in_site(target), posixpath.dirname(in_site(page)) or ".")

    pieces = parts(text)
    pieces[::2] = [re.sub(r"\]\(([^)\s#:]+)(?=[)#])", link, piece) for piece in pieces[::2]]
    return "".join(pieces)


def source(path: str) -> str:
    """A file or a directory of the repository as a page."""
    file = ROOT / path
    if file.is_dir():
        return f"# {path}\n\n" + "\n".join(
            f"- `{one.name}`" for one in sorted(file.iterdir()) if one.name[0] not in "_."
        )
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return turned(path, text)
    if file.suffix == ".ipynb":
        return notebook(text)
    language = LANGUAGES.get(file.suffix, "text")  # a Dockerfile has no suffix
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n````{language}\n{text}\n````\n"


def notebook(text: str) -> str:
    """A notebook as a page: its prose, its code and what the code printed and drew."""
    out = ["---\nsearch: {exclude: true}\n---"]
    for cell in json.loads(text)["cells"]:
        words = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words = re.sub(r"\$\$(.+?)\$\$", lambda formula: math(formula[1]), words, flags=re.DOTALL)
            out.append(re.sub(r"\$([^$\n]+)\$", lambda formula: convert(formula[1]), words))
            continue
        out.append(f"````python\n{words}\n````")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", [])})
            if "image/png" in data:
                out.append(f'<img alt="" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">')
            elif "text/html" in data:
                out.append("".join(data["text/html"]))
            else:
                out.append("````\n" + "".join(data["text/plain"]).rstrip() + "\n````")
    return "\n\n".join(out) + "\n"


def math(text: str, *_, **__) -> str:
    """A block of LaTeX as MathML, which browsers show without a script."""
    return f'<div class="math">{convert(text, display="block")}</div>'


def on_config(config):
    """Blocks of math, and the reference in the navigation."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": math})
    titles = [{title: f"reference/{page}.md"} for page, (title, _) in GROUPS.items()]
    config.nav = [
        {"Reference": ["reference/index.md", *titles]} if "Reference" in entry else entry for entry in config.nav
    ]
    return config


def on_files(files, config):
    """Adds the pages that are made."""
    made = {place: turned(path, (ROOT / path).read_text(encoding="utf-8")) for path, place in OUTSIDE.items()}
    made |= reference()
    queue = [*OUTSIDE, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(queue)
    while queue:
        page = queue.pop()
        for path in linked(page, (ROOT / page).read_text(encoding="utf-8")):
            if path in seen or path.startswith("docs/"):
                continue
            seen.add(path)
            made[in_site(path)] = source(path)
            if path.endswith(".md"):
                queue.append(path)
    for place, text in made.items():
        linked_to = InclusionLevel.NOT_IN_NAV if place.startswith("source/") else InclusionLevel.INCLUDED
        files.append(File.generated(config, place, content=text, inclusion=linked_to))
    return files


def on_page_markdown(markdown, page, **_):
    """Turns the links of a page of docs/."""
    return turned(f"docs/{page.file.src_uri}", markdown) if page.file.generated_by is None else markdown


def on_page_context(context, page, config, **_):
    """The theme's own words, and the language that a page says it is in."""
    config.theme["language"] = "ja" if re.match(r"ja/|.*\.ja\.", page.file.src_uri) else "en"
    return context


def on_post_build(config):
    """Every public name is on a page, and no page asks another machine for anything.

    Raises:
      PluginError: one is not, or one does.
    """
    site = Path(config.site_dir)
    anchors = set()
    for page in (site / "reference").glob("*.html"):
        anchors |= set(re.findall(r'id="(prefalign_jax[\w.]*)"', page.read_text(encoding="utf-8")))
    missing = [f"{module}.{name}" for module in modules() for name in public(module)]
    missing = [name for name in missing if name not in anchors]
    if missing:
        raise PluginError(f"no page of the reference has {', '.join(missing)}")
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        if away := re.findall(
            r'<(?:script|img|iframe)[^>]* src="https?:[^>]*>|<link[^>]*stylesheet[^>]* href="https?:[^>]*>', text
        ):
            raise PluginError(f"{page}: {away[0]} is on another machine")
