"""Docstrings of the house form as the reference shows them: an extension of griffe, which reads them."""

import re

import griffe

SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields", "Example", "Examples")


def _sections(text: str) -> list[tuple[str, list[str]]]:
    """[(title, lines)] of a docstring; its prose has no title."""
    out: list[tuple[str, list[str]]] = [("", [])]
    for line in text.split("\n"):
        title, colon, rest = line.partition(":")
        if line and not line[0].isspace() and colon and (title in SECTIONS and not rest or title in ("TRL", "Source")):
            out.append((title, [rest.strip()] if rest else []))
        elif out[-1][0] and line and not line[0].isspace():
            out.append(("", [line]))  # prose once more
        else:
            out[-1][1].append(line)
    return out


def _escaped(text: str) -> str:
    """Prose whose stars and angles are what they look like; code in backticks stays as it is."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([*\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


def shown(text: str) -> str:
    """A docstring of the house form in Markdown and the sections that griffe knows.

    Example:
      >>> print(shown('''Identity preference optimization (IPO).
      ...
      ... (h - 1 / (2 tau))^2
      ...
      ... Args:
      ...   policy, reference: [B] log-probabilities.
      ...
      ... TRL: equal.
      ... Source: Azar et al.'''))
      Identity preference optimization (IPO).
      <BLANKLINE>
      ```text
      (h - 1 / (2 tau))^2
      ```
      <BLANKLINE>
      Args:
        policy: \\[B\\] log-probabilities.
        reference: \\[B\\] log-probabilities.
      <BLANKLINE>
      **TRL**: equal.
      <BLANKLINE>
      **Source**: Azar et al.
    """
    sections = _sections(text)
    loss = any(title == "TRL" for title, _ in sections)
    out = []
    for number, (title, lines) in enumerate(sections):
        body = "\n".join(lines)
        if title in ("Example", "Examples"):
            out.append(f"Examples:\n{body}")
        elif title in ("TRL", "Source"):
            out.append(f"**{title}**: {_escaped(' '.join(body.split()))}\n")
        elif title == "Returns":
            out.append(f"**Returns**: {_escaped(' '.join(body.split()))}\n")
        elif title:
            out.append(f"{title}:\n{_entries(_escaped(body))}")
        elif loss and number == 0:
            name, formula, *rest = body.split("\n\n")
            out.append("\n\n".join([name, f"```text\n{formula.strip()}\n```", *map(_escaped, rest)]))
        else:
            out.append(body if "    " in body else _escaped(body))
    return "\n".join(out).strip()


def _entries(text: str) -> str:
    """The entries of a section, one for each of the names that share one."""
    out = []
    for entry in re.split(r"\n(?=  \S)", text.rstrip("\n")):
        names, colon, rest = entry.strip().partition(":")
        several = (
            names.split(", ") if colon and re.fullmatch(r"[\w*]+(, [\w*]+)+", names.replace("\\", "")) else [names]
        )
        out += [f"  {name.strip()}{colon}{rest}" for name in several]
    return "\n".join(out) + "\n"


class HouseForm(griffe.Extension):
    """Rewrites each docstring before it is read, and takes a constant's comment for its docstring."""

    def on_object(self, *, obj, **_) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = shown(obj.docstring.value)
        elif obj.is_attribute and obj.parent.is_module and (lines := self._comment(obj)):
            obj.docstring = griffe.Docstring(_escaped(lines), parent=obj)

    def on_class_members(self, *, cls, **_) -> None:
        """Leaves out what a class has without a word about it: fields are told under Attributes."""
        for name in [name for name, member in cls.members.items() if not member.docstring]:
            cls.del_member(name)

    @staticmethod
    def _comment(obj) -> str:
        lines, number, out = obj.module.source.splitlines(), obj.lineno - 2, []
        while number >= 0 and lines[number].startswith("# "):
            out.insert(0, lines[number][2:])
            number -= 1
        return " ".join(out)
