"""Experiments: found by name or file, run for their config, with fields set by --config.FIELD=VALUE.

`--config=dpo:model=M,data=D` is the experiment `dpo` that comes with the package; a name that ends in .py is a file.
What follows the colon goes to the file's `get_config`.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from prefalign_jax.cli.trl_names import TRL_NAMES, instead
from prefalign_jax.options import TRUTH, did_you_mean, flatten, truth
from prefalign_jax.types import UserError, one_line

EXPERIMENTS = Path(__file__).parents[1] / "experiments"  # the repository's, and in the wheel


def experiments() -> dict[str, Path]:
    """Name -> file of every experiment that comes with the package, those of the top folder first."""
    files = sorted(EXPERIMENTS.rglob("*.py"), key=lambda file: (len(file.parts), file))
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    return {
        file.relative_to(EXPERIMENTS).with_suffix("").as_posix(): file
        for file, text in texts.items()
        if re.search(r"^def get_config\(", text, re.MULTILINE)
    }


def summary(file: Path) -> str:
    """The first line of an experiment's docstring."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def locate(name: str) -> Path:
    """The file of an experiment.

    Args:
      name: of one that comes with the package, or a path that ends in .py.

    Raises:
      UserError: there is none; the line says what is nearest.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".py":
        return path
    known = experiments()
    if name in known:
        return known[name]
    if not name:
        raise UserError("no experiment given; write --config=quickstart, for one (prefalign list has all)")
    raise UserError(f"--config={name}{_instead_of(name, path, known)}")


def _instead_of(name: str, path: Path, known: Iterable[str]) -> str:
    """What is wrong with the name of an experiment, and what to write instead."""
    if match := re.fullmatch(r"([^,;\s]+)[,;\s]+(.+)", name):
        return f": a colon follows the experiment, --config={match[1]}:{match[2]}"
    if path.suffix in (".yaml", ".yml", ".json", ".toml"):
        return ": an experiment is a Python file with a get_config(), see prefalign list"
    if path.with_name(f"{path.name}.py").is_file():
        return f": no such experiment; did you mean {path.with_name(f'{path.name}.py')}?"
    if path.is_dir():
        return " is a directory; name an experiment file in it"
    stem = name.removesuffix(".py").removeprefix("experiments/")
    ends = [other for other in known if other.rpartition("/")[2] == stem.rpartition("/")[2]]
    hint = f"did you mean --config={ends[0]}? " if ends else did_you_mean(stem, known)
    what = "no such file" if path.suffix == ".py" else "no such experiment"
    return f": {what}; {hint}prefalign list has those that come with the package"


def load(file: Path) -> ModuleType:
    """Runs an experiment file.

    Raises:
      UserError: the file fails; the line says where.
    """
    spec = importlib.util.spec_from_file_location("experiment", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["experiment"] = module  # dataclasses look up their module there
    _in_file(file, lambda: spec.loader.exec_module(module))
    return module


def config_of(spec: str, words: Sequence[str] = ()) -> ConfigDict:
    """The config of an experiment, with fields set.

    Args:
      spec: NAME or NAME:ARG.
      words: --config.FIELD=VALUE, --config.FIELD VALUE, and for truth values --config.FIELD and --noconfig.FIELD.

    Returns:
      A locked config.

    Raises:
      UserError: a mistake in one of them, or in the experiment.
    """
    name, colon, arg = spec.partition(":")
    file = locate(name)
    get_config = getattr(load(file), "get_config", None)
    if get_config is None:
        raise UserError(f"{file}: it has no get_config(); an experiment defines one that returns its config")
    given = [arg] if colon else []
    try:
        inspect.signature(get_config).bind(*given)
    except TypeError:
        what = "takes no argument; leave out the colon" if given else f"needs an argument; write --config={name}:ARG"
        raise UserError(f"{file}: its get_config {what}") from None
    if again := re.search(r":([A-Za-z_]\w*)=(?![^()]*\))", arg):
        right = f"{arg[: again.start()]},{arg[again.start() + 1 :]}"
        raise UserError(f"--config={spec}: arguments are separated by commas, --config={name}:{right}")
    config = _in_file(file, lambda: get_config(*given))
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config() returned {type(config).__name__}, not a ConfigDict; return the config")
    config.lock()
    set_fields(config, words)
    return config


def sweep_of(name: str, *, needed: bool = True) -> list[Mapping[str, Any]]:
    """The points that the sweep() of an experiment lists.

    Args:
      name: of the experiment.
      needed: whether there has to be one; else an experiment without has one point, which changes nothing.

    Raises:
      UserError: it has none and needs one, or it fails.
    """
    file = locate(name)
    sweep = getattr(load(file), "sweep", None)
    if sweep is None and not needed:
        return [{}]
    if sweep is None:
        raise UserError(
            f"{file}: it has no sweep(); write one that returns dicts such as {{'seed': 0}}, or say what varies: "
            "--grid loss.beta=0.05,0.1 --seeds=4"
        )
    return _in_file(file, lambda: list(sweep()))


def _in_file(file: Path, run: Callable[[], Any]) -> Any:
    """What an experiment's own code gives; whatever it raises becomes one line with its place."""
    try:
        return run()
    except UserError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file.resolve()]
        line = error.lineno if isinstance(error, SyntaxError) else own[-1] if own else 0
        text = f"{type(error).__name__}: {one_line(error)}"
        if "ml_collections" in frames[-1].filename and isinstance(error, AttributeError | KeyError):
            names = re.search(r"[Kk]ey \W*(\w+)", str(error))
            near = re.search(r'Did you mean \\?"(\w+)', str(error))
            text = f"the config has no field {names[1] if names else text!r}"
            text += f"; did you mean {near[1]!r}?" if near else ""
        raise UserError(f"{file}, line {line}: {text}" if line else f"{file}: {text}") from None


# Fields


def set_fields(config: ConfigDict, words: Sequence[str], lead: str = "--config.") -> None:
    """Sets the fields that --config.FIELD=VALUE and its other forms name, in their order.

    Args:
      config: what has the fields.
      words: of a command line.
      lead: what stands before a field's name.

    Raises:
      UserError: no such field, a value of another type, or a word that sets none.
    """
    words = list(words)
    while words:
        word = words.pop(0)
        off = word.startswith("--noconfig.")
        name, equals, text = word.removeprefix("--noconfig." if off else lead).partition("=")
        if not word.startswith(lead) and not off:
            raise UserError(f"unexpected argument {word!r}; fields are set by {lead}FIELD=VALUE")
        holder, key = _holder(config, name, text)
        kind, option = holder.get_type(key), f"{lead}{name}"
        if off and (equals or kind is not bool):
            raise UserError(f"{word} is for truth values; write {option}=VALUE")
        if kind is bool and not equals:
            follows = not off and words and words[0].lower() in TRUTH
            text = words.pop(0) if follows else "false" if off else "true"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"{option} has no value; write {option}=VALUE")
            text = words.pop(0)
        if isinstance(holder[key], ConfigDict):
            first = next((name for name in ("name", "path", "kind") if name in holder[key]), next(iter(holder[key])))
            raise UserError(f"{option} is a group of fields; did you mean {option}.{first}={text}?")
        holder[key] = _value(option, text, kind)


# Type of a field -> (reads a text, what it is to be).
READ: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (truth, "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "a text"),
    tuple: (lambda text: _tuple(ast.literal_eval(text)), "a tuple as Python writes it, such as '(1, 2)'"),
    object: (lambda text: ast.literal_eval(text) if text[:1] == "{" else text, "a text, or a dict as Python writes it"),
}


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _value(field: str, text: str, kind: type) -> Any:
    if kind not in READ:
        raise UserError(f"{field}={text}: a field of type {kind.__name__} is set in an experiment file")
    read, what = READ[kind]
    try:
        return read(text)
    except (ValueError, SyntaxError):
        raise UserError(f"{field}={text!r} is of the wrong type; write {what}") from None


def _holder(config: ConfigDict, name: str, value: str) -> tuple[ConfigDict, str]:
    """The group that a field lies in, and its name there."""
    *groups, key = name.split(".")
    holder = config
    for depth, group in enumerate(groups, 1):
        if group in holder and not isinstance(holder[group], ConfigDict):
            raise UserError(
                f"--config.{name}: {'.'.join(groups[:depth])} is a field, not a group; leave out what follows"
            )
        if group not in holder:
            raise no_field(name, value, config)
        holder = holder[group]
    if key not in holder:
        raise no_field(name, value, config)
    return holder, key


def no_field(name: str, value: str, config: ConfigDict) -> UserError:
    """The mistake that a config has no such field, with what was meant: TRL's name, another group's field, a slip."""
    fields = [*flatten(config.to_dict()), *(group for group in config if isinstance(config[group], ConfigDict))]
    last = name.rpartition(".")[2]
    # What begins a field's name is a slip, and not one of a family of TRL's options.
    begun = [field for field in fields if field.startswith(name) or field.rpartition(".")[2].startswith(last)]
    if (last in TRL_NAMES or not begun) and (text := instead(last, value)):
        return UserError(f"the config has no field {name!r}; {text}")
    same = [field for field in fields if field.rpartition(".")[2] == last]
    hint = f"did you mean {' or '.join(map(repr, same[:3]))}? " if same else did_you_mean(name, begun or fields)
    if not hint:
        near = did_you_mean(last, [field.rpartition(".")[2] for field in fields])
        hint = near and next(f"did you mean {field!r}? " for field in fields if field.endswith(near.split("'")[1]))
    return UserError(f"the config has no field {name!r}; {hint}--print_config lists the fields")
