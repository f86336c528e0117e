"""The command line of scripts/: flags, one-line errors with exit status 2, and the compilation cache."""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax
import yaml
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from prefalign_jax.experiment import read
from prefalign_jax.files import user_cache
from prefalign_jax.processes import HEARTBEAT, join, status_of
from prefalign_jax.types import UserError, one_line

# What other trainers and habit call a field.
USUAL_NAMES = {
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "beta": "loss.beta",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "gradient_accumulation_steps": "micro_steps",
    "max_grad_norm": "grad_clip",
    "per_device_train_batch_size": "batch_size",
}


def launch(main: Callable[[ConfigDict, Path], int | None], argv: Sequence[str] | None = None) -> int:
    """Parses --config, --workdir, --print_config and the processes of the run, and runs `main(config, workdir)`.

    Args:
      main: returns the exit status, None for 0.
      argv: the command line; sys.argv by default.

    Returns:
      The exit status: 2 after a mistake of the user's, which is printed as one line.
    """
    argv = list(sys.argv if argv is None else argv)
    values = _define(argv)
    logging.set_verbosity(logging.WARNING)  # Orbax and Grain report their inner life at INFO

    def run() -> int | None:
        config = _parse(values, argv)
        if config is None:
            print(f"usage: {argv[0]} --config=FILE.py[:arg=value,...] [--config.FIELD=VALUE ...] [--workdir=DIR]")
            print(values)
            return 0
        if values.print_config:
            print(yaml.safe_dump(read(config, complete=False).plain, sort_keys=False), end="")
            return 0
        if not values.workdir:
            values.workdir = str(Path("runs") / Path(_option(argv, "config").split(":")[0]).stem)
            print(f"workdir: {values.workdir}", file=sys.stderr)
        _cache_compilations()
        join(values.coordinator, values.processes, values.process, values.heartbeat)
        return main(config, Path(values.workdir))

    return status_of(run)


class Parser(argparse.ArgumentParser):
    """argparse's, for scripts that take no experiment; a mistake is a UserError."""

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print over several lines."""
        raise UserError(f"{message} (--help lists the options)")


def read_config(words: Sequence[str]) -> ConfigDict:
    """The config that the words --config=FILE.py:ARG --config.x=y ... of a command line make.

    Raises:
      UserError: a mistake in them or in the experiment.
    """
    argv = ["", *words]
    sys.modules.pop("config_config", None)  # where ml_collections keeps the experiment it read before
    config = _parse(_define(argv), argv)
    if config is None:
        raise UserError("--help stands alone")
    return config


def _define(argv: list[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Experiment, FILE.py or FILE.py:arg=value,...", flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string(
        "workdir", None, "Directory for metrics, checkpoints and the exported model", flag_values=values
    )
    flags.DEFINE_bool("print_config", False, "Print the resolved experiment and stop", flag_values=values)
    flags.DEFINE_bool("help", False, "Show this text", flag_values=values)
    flags.DEFINE_string(
        "coordinator", None, "Of a run of several processes: HOST:PORT of process 0", flag_values=values
    )
    flags.DEFINE_string(
        "processes", None, "How many there are; auto asks the launcher, as on a TPU pod", flag_values=values
    )
    flags.DEFINE_integer("process", None, "The number of this one, from 0", flag_values=values)
    flags.DEFINE_integer(
        "heartbeat", HEARTBEAT, "Seconds after which a silent process counts as dead", flag_values=values
    )
    return values


def _parse(values: flags.FlagValues, argv: list[str]) -> ConfigDict | None:
    """The config, None if only help is asked for."""
    path = _option(argv, "config")
    if path and not Path(path.split(":")[0]).is_file():
        raise UserError(f"--config: no file {path.split(':')[0]!r}")
    try:
        rest = values(argv)
    except UserError:
        raise
    except (AttributeError, KeyError) as error:  # ml_collections': a field that the config does not have
        text = str(error)
        if "'get_config'" in text:
            raise UserError(f"{path.split(':')[0]}: it has no get_config; name an experiment") from None
        if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise _in_experiment(path, error) from None
        if near := re.search(r'Did you mean \\?"(\w+)\\?" instead of \\?"(\w+)', text):
            field, hint = near[2], f", did you mean {near[1]!r}?"
        else:
            words = re.search(r"[Kk]ey \W*(\w+)", text) or re.search(r"(\w+)", text)
            field, hint = words[1] if words else text, ""
        if field in USUAL_NAMES:
            hint = f", did you mean {USUAL_NAMES[field]!r}?"
        raise UserError(f"the config has no field {field!r}{hint} (--print_config lists the fields)") from None
    except TypeError as error:  # ml_collections': a field of a value that has none
        wrong = [word for word in argv if word.startswith(("--config.", "-config."))]
        if not wrong:
            raise _in_experiment(path, error) from None
        raise UserError(f"{' '.join(wrong)}: a field of a field that has none (--print_config lists them)") from None
    except flags.Error as error:
        # A file that fails to load arrives as a whole traceback in the message: its last line says what happened.
        last = [line for line in str(error).splitlines() if line.strip()][-1]
        group = re.match(r"flag --(config\.\w+)=(\w+): Failed to parse .* as a ConfigDict", last)
        if group:
            last = f"--{group[1]} is a group of fields; did you mean --{group[1]}.name={group[2]}?"
        file = path.split(":")[0]
        names = "|".join({re.escape(file), re.escape(str(Path(file).absolute()))})
        lines = re.findall(rf'File "(?:{names})", line (\d+)', str(error)) if path else []
        if lines and "UserError: " not in last:
            last = f"{file}, line {lines[-1]}: {last}"
        raise UserError(re.sub(r"^\S*UserError: ", "", last)) from None
    except Exception as error:  # the experiment's own code raises whatever it likes
        raise _in_experiment(path, error) from None
    if values.help:
        return None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; options are written --name=value")
    if not path:
        raise UserError("no experiment given; write --config=experiments/quickstart.py, for one")
    if not isinstance(values.config, ConfigDict):
        raise UserError(f"{path.split(':')[0]}: get_config returned no ConfigDict; it must return its config")
    return values.config


def _in_experiment(path: str, error: Exception) -> UserError:
    """Where an experiment file failed, and how."""
    frames = traceback.extract_tb(error.__traceback__)
    file = Path(path.split(":")[0])
    own = [frame for frame in frames if Path(frame.filename).resolve() == file.resolve()]
    line = f", line {own[-1].lineno}" if own else ""
    return UserError(f"{file}{line}: {type(error).__name__}: {one_line(error)}")


def _option(argv: Sequence[str], name: str) -> str:
    """The text of --name=text or --name text, '' if absent."""
    for number, word in enumerate(argv):
        if re.fullmatch(f"--?{name}", word) and number + 1 < len(argv):
            return argv[number + 1]
        if match := re.fullmatch(f"--?{name}=(.*)", word):
            return match[1]
    return ""


def _cache_compilations() -> None:
    """Compiled programs outlive the process, unless the user has set a place for them."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "xla"))
