"""The pictures of docs/learn: python scripts/learn_pictures.py [DIR]

dpo.png is computed from the loss. curves.png and beta.png show runs in DIR/kept, which `commands` makes.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from prefalign_jax.losses.dpo import dpo
from prefalign_jax.metrics import read_metrics
from prefalign_jax.pages.palette import PALETTE
from prefalign_jax.pages.pictures import styled
from prefalign_jax.types import PairLogps

DOCS = Path(__file__).parents[2] / "docs" / "learn"
QUICKSTART = "runs/quickstart"
BETAS = (0.03, 0.1, 0.3, 1.0)
PLAIN = (
    f"--config=dpo:model={QUICKSTART}/sft/export,data={QUICKSTART}/data/train.jsonl "
    f"--config.data.eval_path={QUICKSTART}/data/held_out.jsonl --config.batch_size=32 --config.schedule=cosine "
    "--config.warmup_steps=10 --config.log_steps=5 --config.eval_steps=20 --config.export.enabled=False"
)
IDLE = f"{PLAIN} --config.learning_rate=1e-6 --config.epochs=2"
HEART = f"{PLAIN} --config.learning_rate=1e-3 --config.data.limit=160 --config.epochs=30"


def commands() -> list[str]:
    """What makes the runs that the pictures show. All of DPO have one workdir, so each is moved away."""
    lines = ["mkdir -p kept"]
    for beta in BETAS:
        lines.append(f"prefalign train --config=quickstart --config.loss.beta={beta}")
        lines.append(f"mv {QUICKSTART}/dpo kept/dpo_{beta}; mv {QUICKSTART}/table_dpo.txt kept/table_dpo_{beta}.txt")
    return [*lines, f"prefalign train {IDLE} --workdir=kept/idle", f"prefalign train {HEART} --workdir=kept/heart"]


@styled
def loss() -> None:
    """docs/learn/dpo.png: DPO's loss and the pull of a pair, against the margin before it is multiplied by beta."""
    ratios = jnp.linspace(-40.0, 40.0, 321)
    one = jnp.ones(1)
    zero = PairLogps(0 * one, 0 * one, one, one)
    figure = matplotlib.figure.Figure(figsize=(8, 2.9))
    left, right = figure.subplots(1, 2)
    for beta, colour in zip((0.05, 0.1, 0.5), PALETTE.values(), strict=False):
        value = jax.vmap(
            jax.value_and_grad(lambda h, beta=beta: dpo(PairLogps(h * one, 0 * one, one, one), zero, beta=beta)[0][0])
        )
        losses, slopes = value(ratios)
        left.plot(ratios, losses, color=colour, label=f"beta {beta}")
        right.plot(ratios, -slopes / beta, color=colour, label=f"beta {beta}")
    left.axhline(np.log(2), color="#999999", lw=0.8, ls=":")
    left.annotate("log 2, where training begins", (-38, 0.25), fontsize=8)
    left.set(
        title="Loss of a pair", xlabel="h: log-ratio of chosen minus that of rejected, nats", ylabel="loss", ylim=(0, 5)
    )
    right.set(title="How strongly the pair pulls", xlabel="h, nats", ylabel="weight, in units of beta")
    right.annotate("wrong order", (-38, 0.06), fontsize=8)
    right.annotate("right order", (24, 0.85), fontsize=8)
    left.legend()
    figure.savefig(DOCS / "dpo.png", dpi=140)


@styled
def curves(kept: Path) -> None:
    """docs/learn/curves.png: a healthy run, one that does next to nothing, and one that learns its pairs by heart."""
    figure = matplotlib.figure.Figure(figsize=(9, 4.6))
    axes = figure.subplots(2, 3, sharey="row")
    titles = {"dpo_0.1": "Healthy", "idle": "The learning rate is too small", "heart": "Learnt by heart"}
    for (upper, lower), (name, title) in zip(axes.T, titles.items(), strict=True):
        held, train = (read_metrics(kept / name / f"{which}.jsonl") for which in ("eval", "metrics"))
        held = [line for line in held if "eval/loss" in line]
        steps = [line["step"] for line in held]
        upper.plot(
            *zip(*[(line["step"], line["loss"]) for line in train if "loss" in line], strict=True),
            "--",
            color=PALETTE["blue"],
            lw=1,
            label="loss, training pairs",
        )
        upper.plot(steps, [line["eval/loss"] for line in held], color=PALETTE["blue"], label="loss, held-out pairs")
        upper.axhline(np.log(2), color="#999999", lw=0.8, ls=":")
        lower.plot(
            steps,
            [line["eval/rewards/chosen"] for line in held],
            color=PALETTE["green"],
            label="reward of the chosen, held out",
        )
        lower.plot(
            steps,
            [line["eval/rewards/rejected"] for line in held],
            color=PALETTE["vermillion"],
            label="reward of the rejected, held out",
        )
        accuracy = held[-1]["eval/rewards/accuracies"]
        lower.set_xlabel(f"step (held-out accuracy at the end: {accuracy:.2f})")
        upper.set(title=title, ylim=(0, 0.9))
    axes[0, 0].legend(loc="lower left")
    axes[1, 0].legend(loc="lower left")
    figure.savefig(DOCS / "curves.png", dpi=140)


def table(path: Path) -> list[tuple[float, float]]:
    """[(mean, half-width)] of the true reward after training and of the KL, as the quickstart printed them."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(("true reward", "KL"))]
    last = [re.findall(r"([-+][\d.]+) ± ([\d.]+)", line)[-1] for line in lines]
    return [(float(mean), float(width)) for mean, width in last]


@styled
def betas(kept: Path) -> None:
    """docs/learn/beta.png: what beta buys in the quickstart."""
    figure = matplotlib.figure.Figure(figsize=(5.6, 3.1))
    axes = figure.add_subplot()
    for beta in BETAS:
        (reward, above), (kl, beside) = table(kept / f"table_dpo_{beta}.txt")
        axes.errorbar(kl, reward, above, beside, fmt="o", lw=1, ms=5, capsize=2, color=PALETTE["blue"])
        axes.annotate(f"beta {beta:g}", (kl, reward), xytext=(-46, 7), textcoords="offset points", fontsize=8)
    axes.plot(0, 0.13, "s", ms=5, color=PALETTE["vermillion"])
    axes.annotate("before", (0, 0.13), xytext=(8, -3), textcoords="offset points", fontsize=8)
    axes.set(xlabel="KL to where DPO began, nats an answer", ylabel="true reward of sampled answers", xlim=(-0.15, 4.3))
    figure.savefig(DOCS / "beta.png", dpi=140)


def write(directory: Path | None) -> None:
    """Draws them; without runs, what can be drawn without."""
    loss()
    if directory:
        curves(directory / "kept")
        betas(directory / "kept")
