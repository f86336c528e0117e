"""How near each loss comes to the best there is on a table, as a figure."""

from __future__ import annotations

from pathlib import Path

import jax
import matplotlib.figure
import numpy as np

from prefalign_jax.analysis.tabular import (
    both_orders,
    bradley_terry,
    descend,
    divergence,
    expected_reward,
    frontier,
    make_problem,
    population,
)
from prefalign_jax.files import whole
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
def draw_tabular_frontier(out: Path) -> str:
    """Follows every loss of LEARNERS by gradient descent from the reference, and draws where it goes.

    Args:
      out: of the .png file.

    Returns:
      A table of where each ends.
    """
    problem = make_problem()
    weights = both_orders(problem, bradley_terry(problem))
    figure = matplotlib.figure.Figure(figsize=(8.5, 5.5))
    axes = figure.add_subplot()
    head = ("loss", "reward at the end", "best at that KL", "KL, nats", "most above the frontier on the way")
    rows, widest = [], 0.0
    with jax.enable_x64(True):
        for number, (label, (name, options, rate)) in enumerate(LEARNERS.items()):
            colour, style = look(number)
            loss = make_loss(name, **options)
            reference = problem.reference if "reference" in loss.needs else None
            f = population(loss, weights, problem.tokens, reference)
            path = descend(f, problem.reference, STEPS, rate)
            reward, kl = expected_reward(problem, path), divergence(problem, path)
            best = frontier(problem, kl)
            axes.plot(kl, reward, style, color=colour, lw=1.6, label=label)
            axes.plot(kl[-1], reward[-1], "o", color=colour, ms=5)
            widest = max(widest, float(kl.max()))
            above = float((reward - best).max())
            rows.append((label, f"{reward[-1]:.4f}", f"{best[-1]:.4f}", f"{kl[-1]:.3f}", f"{above:.1e}"))
        kl = np.linspace(0.0, 1.05 * widest, 400)
        axes.plot(kl, frontier(problem, kl), "k--", lw=1.2, label="the best there is")
    axes.set_xlabel("KL(policy || reference), nats")
    axes.set_ylabel("expected true reward")
    axes.legend()
    with whole(out) as part:
        figure.savefig(part, format=out.suffix[1:], dpi=120)
    return markdown(head, rows)
