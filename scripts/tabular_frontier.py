"""Reward against divergence where the best is known: how near each loss comes on a table, drawn to a PNG: OUT.png.

Every loss is followed by gradient descent from the reference, its expectation over Bradley-Terry pairs a plain sum. The
line is the most reward that any policy has at a divergence (arXiv 2305.18290, Eq. 4): nothing lies above it.
"""

import argparse
import sys
from pathlib import Path

import jax
import matplotlib.figure
import numpy as np

from prefalign_jax import cli
from prefalign_jax.analysis import tabular
from prefalign_jax.losses import make_loss
from prefalign_jax.pages.palette import look
from prefalign_jax.pages.pictures import styled
from prefalign_jax.tables import markdown

# Label -> (loss, its options, step size).
LEARNERS = {
    "dpo, beta 0.05": ("dpo", {"beta": 0.05}, 100.0),
    "dpo, beta 0.5": ("dpo", {"beta": 0.5}, 20.0),
    "dpo, beta 2": ("dpo", {"beta": 2.0}, 2.0),
    "ipo, tau 0.05": ("ipo", {"tau": 0.05}, 0.5),
    "simpo": ("simpo", {}, 0.5),
    "orpo, lambda 5": ("orpo", {"lam": 5.0}, 0.1),
    "unlikelihood, alpha 0.5": ("unlikelihood", {"alpha": 0.5}, 0.3),
    "preferred-FT": ("sft", {}, 1.0),
}
STEPS = 6000


@styled
def main() -> int:
    """Reads the command line; the exit status."""
    parser = cli.Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.png", help="the figure")
    out = parser.parse_args().out
    problem = tabular.make_problem()
    weights = tabular.both_orders(problem, tabular.bradley_terry(problem))
    figure = matplotlib.figure.Figure(figsize=(8.5, 5.5))
    axes = figure.add_subplot()
    head = ("loss", "reward at the end", "best at that KL", "KL, nats", "most above the frontier on the way")
    rows, widest = [], 0.0
    with jax.enable_x64(True):
        for number, (label, (name, options, rate)) in enumerate(LEARNERS.items()):
            colour, style = look(number)
            loss = make_loss(name, **options)
            reference = problem.reference if "reference" in loss.needs else None
            f = tabular.population(loss, weights, problem.tokens, reference)
            path = tabular.descend(f, problem.reference, STEPS, rate)
            reward, kl = tabular.expected_reward(problem, path), tabular.divergence(problem, path)
            best = tabular.frontier(problem, kl)
            axes.plot(kl, reward, style, color=colour, lw=1.6, label=label)
            axes.plot(kl[-1], reward[-1], "o", color=colour, ms=5)
            widest = max(widest, float(kl.max()))
            above = float((reward - best).max())
            rows.append((label, f"{reward[-1]:.4f}", f"{best[-1]:.4f}", f"{kl[-1]:.3f}", f"{above:.1e}"))
        kl = np.linspace(0.0, 1.05 * widest, 400)
        axes.plot(kl, tabular.frontier(problem, kl), "k--", lw=1.2, label="the best there is")
    axes.set_xlabel("KL(policy || reference), nats")
    axes.set_ylabel("expected true reward")
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print(markdown(head, rows))
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(cli.status_of(main))
