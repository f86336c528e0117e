"""Commands that run an experiment: its options, its config, its working directory, and the processes of the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from prefalign_jax.cli.experiments import config_of
from prefalign_jax.cli.parser import Parser, add_config


def launch(name: str, doc: str, main: Callable[[ConfigDict, Path], int | None], argv: Sequence[str]) -> int | None:
    """Parses --config, --workdir, --print_config and the processes of the run, and runs `main(config, workdir)`.

    Args:
      name: of the command.
      doc: the text of its --help.
      main: returns the exit status, None for 0.
      argv: the words after the command's name.

    Returns:
      What `main` returns.

    Raises:
      UserError: a mistake in the command line or the experiment.
    """
    parser = Parser(f"prefalign {name}", doc)
    add_config(parser)
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="gets what is written; runs/NAME by default")
    parser.add_argument("--print_config", action="store_true", help="print the experiment with all fields, and stop")
    several = parser.add_argument_group("runs of several processes (docs/distributed.md)")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument("--processes", metavar="COUNT", help="how many there are; auto asks the launcher")
    several.add_argument("--process", type=int, metavar="NUMBER", help="this one's number, from 0")
    several.add_argument("--heartbeat", type=int, metavar="SECONDS", help="after which a silent process counts as dead")
    options, words = parser.read_with_fields(argv)
    config = config_of(options.config, words)
    if options.print_config:
        import yaml

        from prefalign_jax.experiment import read

        print(yaml.safe_dump(read(config, complete=False).plain, sort_keys=False), end="")
        return 0
    workdir = options.workdir
    if workdir is None:
        workdir = Path("runs") / Path(options.config.split(":")[0]).stem
        print(f"workdir: {workdir}", file=sys.stderr)
    from prefalign_jax.processes import join_processes

    heartbeat = {} if options.heartbeat is None else {"heartbeat": options.heartbeat}
    join_processes(options.coordinator, options.processes, options.process, **heartbeat)
    return main(config, workdir)
