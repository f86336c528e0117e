"""Plots reward against KL for the runs of a sweep, DIR/frontier.png, and prints a table: DIR [--pairs=pairs.jsonl]."""

import sys
from pathlib import Path

from prefalign_jax import cli
from prefalign_jax.analysis.frontier import best_of_points, draw_frontier, points_of, reward_within
from prefalign_jax.analysis.runs import find_runs
from prefalign_jax.tables import markdown

LIMITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # nats


def main() -> int:
    """Reads the command line; the exit status."""
    parser = cli.Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("directory", type=Path, metavar="DIR", help="--workdir of a sweep whose runs have `samples`")
    parser.add_argument("--pairs", type=Path, help="pairs.jsonl of the job `pairs`, for the best of n")
    options = parser.parse_args()
    runs = find_runs([options.directory])
    points = points_of(runs)
    best = best_of_points(options.pairs) if options.pairs else []
    path = options.directory / "frontier.png"
    draw_frontier(points, best).savefig(path, dpi=120)
    rows = [
        [method, *(f"{mean:.4f}" + (f" [{low:.4f}, {high:.4f}]" if low == low else "") for mean, low, high in values)]
        for method, values in reward_within(runs, LIMITS).items()
    ]
    print(markdown(["best mean reward at KL <=", *(f"{limit:g}" for limit in LIMITS)], rows))
    for n, kl, reward in best:
        print(f"best of {n}: reward {reward:.4f}, KL at most {kl:.3f}")
    print(f"{len(points)} evaluations of {max(p.seeds for p in points)} seeds; {path}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.status_of(main))
