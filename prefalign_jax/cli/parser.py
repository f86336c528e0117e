"""The habits of every command: -h and --help, hints, a mistake in one line with status 2, variables of the process."""

from __future__ import annotations

import argparse
import difflib
import gc
import os
import re
import runpy
from collections.abc import Sequence
from typing import NoReturn

from prefalign_jax.cli.trl_names import instead
from prefalign_jax.files import user_cache
from prefalign_jax.options import did_you_mean, flatten, truth
from prefalign_jax.types import UserError, one_line


class Parser(argparse.ArgumentParser):
    """The options of one command.

    Args:
      prog: its name, as it is typed.
      doc: its module's docstring, the text of --help.
    """

    def __init__(self, prog: str, doc: str):
        self.needed: list[argparse.Action] = []
        super().__init__(
            prog=prog,
            description=doc,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_truth(self, option: str, help: str) -> None:
        """Adds an option that is false unless it is given, alone or with true or false."""
        self.add_argument(option, nargs="?", type=truth, const=True, default=False, metavar="true", help=help)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options of a command line that has nothing else.

        Raises:
          UserError: a mistake in it.
        """
        options, others = self.read_others(argv)
        if others:
            raise self.unknown(others)
        return self.complete(options)

    def read_with_fields(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options of a command line that may set fields of an experiment, and the words that set them.

        Raises:
          UserError: a mistake in the options; one in the words is named where they are used.
        """
        options, others = self.read_others(argv)
        for number, word in enumerate(others):
            before = others[number - 1] if number else ""
            is_value = before.startswith("--config.") and "=" not in before and not word.startswith("--")
            if not is_value and not word.startswith(("--config.", "--noconfig.")):
                raise self.unknown(others[number:])
        return self.complete(options), others

    def read_others(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options, which may lack some, and all other words: one that is mistyped is to be named before those."""
        if {"-h", "--help"} & {*argv}:
            self.print_help()
            self.exit()
        self.needed = [action for action in self._actions if action.required]
        for action in self.needed:
            action.required = False
        return self.parse_known_args([re.sub(r"^-(?=[A-Za-z]\w)", "--", word) for word in argv])

    def complete(self, options: argparse.Namespace) -> argparse.Namespace:
        """The options, of which none is missing.

        Raises:
          UserError: one is.
        """
        missing = [action for action in self.needed if getattr(options, action.dest) in (None, "")]
        if missing:
            names = (action.option_strings[0] if action.option_strings else action.metavar for action in missing)
            self.error(f"{', '.join(names)} must be given")
        return options

    def unknown(self, words: Sequence[str], more: Sequence[str] = ()) -> UserError:
        """The mistake that a command line has words which are no options, with what to write instead.

        Args:
          words: the first of them, and all that follows it.
          more: options that argparse does not know of.
        """
        word, *after = words
        given, equals, value = word.partition("=")
        options = [option for option in self._option_string_actions if option.startswith("--")] + [*more]
        experiment = "--config" in options
        if not word.startswith("-"):
            hint = "options are written --name=value"
            if experiment and equals:
                hint = f"arguments of the experiment follow its colon, --config=NAME:{word}"
            elif experiment:
                hint = f"an experiment is named by --config={word}, an option is written --name=value"
            return UserError(f"unexpected argument {word!r}; {hint}")
        if not equals and after and not after[0].startswith("-"):
            value = after[0]
        name = given.strip("-").replace("-", "_")
        text = instead(name, value)
        if experiment and text:
            return UserError(f"{given}: {text}")
        near = did_you_mean(name, [option[2:] for option in options]).replace("'", "'--", 1)
        group, dot, field = given.strip("-").partition(".")
        if experiment and dot and difflib.get_close_matches(group, ["config"]):
            near = f"did you mean '--config.{field}'? "
        if "--config.model.path" in text and "--model" in options:
            near = "did you mean '--model'? "
        return UserError(f"{given}: no such option; {near or (experiment and _field(name, value)) or ''}see --help")

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print over several lines."""
        raise UserError(f"{message.removeprefix('argument ')} (--help lists the options)")


def add_config(parser: Parser) -> None:
    """Adds --config, whose fields `read_with_fields` hands on."""
    what = "an experiment of `prefalign list`, or a .py file; --config.FIELD=VALUE sets a field of it"
    parser.add_argument("--config", default="", metavar="NAME[:ARG]", help=what)


def run_file(path: str) -> None:
    """Runs a file of the user's own, such as one that adds rewards, for --load.

    Raises:
      UserError: it raises whatever it likes.
    """
    try:
        runpy.run_path(path)
    except Exception as error:
        raise UserError(f"--load={path}: {type(error).__name__}: {one_line(error)}") from None


def _field(name: str, value: str) -> str:
    """'write --config.FIELD=VALUE; ' for a name that is a field of the config."""
    from prefalign_jax.config import defaults  # its losses take a second to import

    fields = list(flatten(defaults().to_dict()))
    ends = [field for field in fields if field == name or field.rpartition(".")[2] == name]
    near = ends or difflib.get_close_matches(name, fields, 1)
    return f"write --config.{near[0]}={value or 'VALUE'}; " if near else ""


_OBJECTS = 500_000  # new ones, before Python looks for garbage among them: at most some 50 MB


def set_environment() -> None:
    """Lets compiled programs outlive the process, and PyTorch out; what the user has set stays. It comes before jax.

    Python looks for cycles of garbage after every few hundred objects. Importing and tracing make millions that stay,
    so it looks less often here: a run begins a tenth sooner.
    """
    if 0 < gc.get_threshold()[0] < _OBJECTS:
        gc.set_threshold(_OBJECTS, 10, 10)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(user_cache() / "xla"))
    # JAX keeps what takes a second to compile. A run has dozens of programs that take less, and that much together.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("USE_TORCH", "0")  # see `torch_free.without_torch`
