"""docs/readme.png, the picture of the README: python scripts/readme_picture.py runs/quickstart

Left are the losses of ten steps of TRL's DPO, as recorded in tests/goldens/trl, and those of the same steps here. Right
are the true rewards of sampled answers before and after a quickstart.
"""

import json
import tempfile
from pathlib import Path

import matplotlib.figure
import numpy as np

import prefalign_jax as pa
from prefalign_jax.files import read_json_lines
from prefalign_jax.jobs.quickstart import measure
from prefalign_jax.metrics import read_metrics
from prefalign_jax.pages.palette import PALETTE
from prefalign_jax.pages.pictures import styled

ROOT = Path(__file__).parents[2]
TRL = ROOT / "tests" / "goldens" / "trl"


def losses() -> tuple[np.ndarray, np.ndarray]:
    """(TRL's losses of ten steps of DPO, ours), the options as tests/goldens/README.md has them."""
    options = {"model.path": str(TRL), "batch_size": 4, "steps": 10, "max_length": 256, "log_steps": 1}
    options |= {"learning_rate": 1e-3, "schedule": "constant", "data.shuffle": False, "tensorboard": False}
    with tempfile.TemporaryDirectory() as directory:
        pa.train(pa.experiment("dpo", **options), directory, data=read_json_lines(TRL / "pairs.jsonl"))
        ours = read_metrics(Path(directory) / "metrics.jsonl")
    theirs = [json.loads(line) for line in (TRL / "dpo.jsonl").read_text(encoding="utf-8").splitlines()]
    return tuple(np.array([line["loss"] for line in lines if "loss" in line]) for lines in (theirs, ours))


def rewards(quickstart: Path) -> tuple[np.ndarray, np.ndarray]:
    """True rewards of sampled answers to held-out prompts: (before, after)."""
    questions = read_json_lines(quickstart / "data" / "held_out.jsonl")
    return tuple(measure(pa.load(quickstart / stage), questions, 0)[0] for stage in ("sft", "dpo"))


@styled
def write(quickstart: Path) -> None:
    """Draws the picture."""
    before, after = rewards(quickstart)
    theirs, ours = losses()
    figure = matplotlib.figure.Figure(figsize=(8, 2.7))
    left, right = figure.subplots(1, 2)
    steps = np.arange(1, len(ours) + 1)
    left.plot(steps, ours, color=PALETTE["blue"], label="prefalign_jax")
    left.plot(steps, theirs, "o", color=PALETTE["vermillion"], mfc="none", label="TRL 1.16")
    left.set(title=f"DPO: the losses differ by {np.abs(ours - theirs).max():.0e} at most", xlabel="step", ylabel="loss")
    edges = np.arange(min(before.min(), after.min()) - 0.5, max(before.max(), after.max()) + 1.5)
    for values, label, colour in ((before, "before DPO", "blue"), (after, "after", "vermillion")):
        right.hist(values, edges, alpha=0.6, label=f"{label}: mean {values.mean():+.2f}", color=PALETTE[colour])
    right.set(title="The quickstart, held-out prompts", xlabel="true reward of a sampled answer", ylabel="answers")
    for axes in (left, right):
        axes.legend()
    figure.savefig(ROOT / "docs" / "readme.png", dpi=160)
