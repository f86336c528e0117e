"""Runs the commands of README.md and docs/*.md, and lists what ran and what needs a hub, a GPU or an endpoint.

They run in a copy of the repository, in a short form: a training takes 64 pairs, and sweeps of hours print their runs.
Without options it needs no network and no file: MODEL and DATA are those of the quickstart.
"""

import sys
import tempfile
from pathlib import Path

from docs_pages.commands import check
from prefalign_jax.cli.parser import Parser
from prefalign_jax.exits import status_of
from prefalign_jax.types import UserError


def main() -> int:
    """Reads the command line and runs them."""
    parser = Parser("check_commands.py", __doc__)
    parser.add_argument(
        "--give",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="what a word in capitals stands for; repeatable",
    )
    parser.add_argument("--full", action="store_true", help="commands as they are written: hours")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the place (docs/data.md:12) or the command")
    parser.add_argument(
        "--seconds", type=float, default=600, metavar="N", help="that a command may take (default: 600)"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="run there, and keep what the commands leave")
    args = parser.read(sys.argv[1:])
    pairs = [one.partition("=") for one in args.give]
    if faulty := [one for one, (name, _, path) in zip(args.give, pairs, strict=True) if not name.isupper() or not path]:
        raise UserError(f"--give={faulty[0]}: expected NAME=PATH, such as HARMLESS=data/test.jsonl.gz")
    given = {name: str(Path(path).absolute()) if Path(path).exists() else path for name, _, path in pairs}
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        return check(args.keep.absolute(), given, args.full, args.only, args.seconds)
    with tempfile.TemporaryDirectory() as directory:
        return check(Path(directory), given, args.full, args.only, args.seconds)


if __name__ == "__main__":
    sys.exit(status_of(main))
