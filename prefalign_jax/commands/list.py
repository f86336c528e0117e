"""Names what there is to choose from: experiments, losses, families and shapes of models, formats, chat templates."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence

from prefalign_jax.cli.experiments import experiments, summary
from prefalign_jax.cli.parser import Parser
from prefalign_jax.options import choose
from prefalign_jax.tables import aligned


def experiment_lines() -> Mapping[str, str]:
    """Experiment -> the first line of its docstring."""
    return {name: summary(file) for name, file in experiments().items()}


def loss_lines() -> Mapping[str, str]:
    """Loss -> its name in words, and on a second line its formula; a weighted sum with a name -> the sum."""
    from prefalign_jax.losses import LOSSES, MIXTURES
    from prefalign_jax.losses.loss import described

    return {name: "\n".join(filter(None, described(loss.function))) for name, loss in LOSSES.items()} | MIXTURES


def family_lines() -> Mapping[str, str]:
    """model_type of config.json -> nothing to add."""
    from prefalign_jax.models.families import FAMILIES

    return dict.fromkeys(FAMILIES, "")


def format_lines() -> Mapping[str, str]:
    """Format of rows -> what it is told by."""
    from prefalign_jax.data.formats import FORMATS

    return dict.fromkeys(FORMATS, "")


def template_lines() -> Mapping[str, str]:
    """Chat template -> nothing to add."""
    from prefalign_jax.data.chat import CHAT_TEMPLATES

    return dict.fromkeys(CHAT_TEMPLATES, "")


def shape_lines() -> Mapping[str, str]:
    """Published model -> nothing to add."""
    from prefalign_jax.cost.shapes import SHAPES

    return dict.fromkeys(SHAPES, "")


# What there is -> (how it is chosen, its names and what they mean).
LISTS: dict[str, tuple[str, Callable[[], Mapping[str, str]]]] = {
    "experiments": ("--config=NAME", experiment_lines),
    "losses": ("--config.loss.name=NAME", loss_lines),
    "families": ("model_type of a model's config.json", family_lines),
    "formats": ("--config.data.format=NAME, told from the rows by default", format_lines),
    "shapes": ("prefalign plan --model=NAME", shape_lines),
    "templates": ("--config.data.chat_template=NAME", template_lines),
}


def main(argv: Sequence[str]) -> int:
    """Prints the lists that are asked for, all by default."""
    parser = Parser("prefalign list", __doc__)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"{', '.join(LISTS)}; all by default")
    asked = parser.read(argv).what or list(LISTS)
    for what in asked:
        how, lines = choose("list", what, LISTS)
        names = lines()
        print(f"{what}: {how}")
        if any(names.values()):
            rows = [
                ("" if number else name, line)
                for name, text in names.items()
                for number, line in enumerate(text.split("\n"))
            ]
            print(aligned((), rows, indent=2))
        else:
            print(*textwrap.wrap(", ".join(names), 110, initial_indent="  ", subsequent_indent="  "), sep="\n")
        print()
    return 0
