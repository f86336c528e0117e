"""Reports on runs and sweeps in one page: DIR [DIR ...] [--out=report.html] [--group_by=FIELD,...] [--metrics=...]."""

import sys
from pathlib import Path

from prefalign_jax import cli
from prefalign_jax.analysis.compare_page import markdown, write_page
from prefalign_jax.analysis.runs import find_runs


def names(text: str) -> list[str]:
    """The names between commas."""
    return [name for name in text.split(",") if name]


def main() -> int:
    """Reads the command line and says what was written."""
    parser = cli.Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="--workdir of a run or of a sweep")
    parser.add_argument("--out", type=Path, help="the page; DIR/report.html by default. Pictures go beside it")
    parser.add_argument("--group_by", type=names, help="config fields; all that differ but for the seed by default")
    parser.add_argument("--metrics", type=names, help="columns of eval.jsonl or metrics.jsonl; all held-out by default")
    parser.add_argument("--x", type=names, help="what equal compute is: flops, trained_tokens, seconds, tokens, pairs")
    options = parser.parse_args()
    runs = find_runs(options.directories)
    written = write_page(
        runs,
        options.out or options.directories[0] / "report.html",
        title=" and ".join(directory.resolve().name for directory in options.directories),
        group_by=options.group_by,
        metrics=options.metrics,
        columns=options.x,
    )
    print(markdown(runs, options.group_by, options.metrics))
    print(f"{written[0]}, and {len(written) - 1} pictures in {written[-1].parent}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.status_of(main))
