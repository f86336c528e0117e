"""What an experiment runs: one training, or several that follow on each other; `job` in its config names it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from prefalign_jax import processes
from prefalign_jax.config import defaults
from prefalign_jax.evaluation.held_out import columns_of, summary
from prefalign_jax.experiment import read
from prefalign_jax.export import hub_token
from prefalign_jax.jobs import quickstart
from prefalign_jax.jobs.on_policy import run_pairs, run_rounds
from prefalign_jax.losses import make_loss
from prefalign_jax.processes import note
from prefalign_jax.train import train
from prefalign_jax.types import PairLogps


def run_train(config: ConfigDict, workdir: Path) -> int:
    """One training; its exit status."""
    return processes.STOPPED if train(config, workdir).stopped else 0


def run_sft_first(config: ConfigDict, workdir: Path) -> int:
    """Fine-tunes on the chosen responses, WORKDIR/sft, and trains what comes out as the config says, WORKDIR/aligned.

    Args:
      config: `sft` has what the first stage has otherwise; the rest holds for both.
      workdir: of both; each is resumed where it stopped.

    Returns:
      The exit status: 0, or processes.STOPPED if a stage was told to stop.
    """
    steps = read(config).cleaning
    first = copy.deepcopy(config)
    with first.unlocked():
        plain = defaults("sft")
        first.loss, first.reference, first.job = plain.loss, plain.reference, "train"
        first.steps, first.examples, first.epochs, first.profile_steps = None, None, config.sft.epochs, None
        first.learning_rate = config.sft.learning_rate
        first.data.flip_labels = 0.0
        first.token_weights = dict.fromkeys(config.token_weights)
        supervised = [step.name for step in steps if "supervised" in step.step.kinds]
        first.data.clean = ",".join(supervised) or None
        for step in steps:
            if step.name not in supervised and step.options:
                first.data.cleaning[step.name] = dict.fromkeys(step.options)
        first.export.push_to = None  # the model of the second stage alone is what is asked for
        metric = config.checkpoint.best_metric or config.early_stopping.metric
        ignored = bool(metric) and not _measured_by_sft(metric)
        if ignored:
            first.early_stopping = dict.fromkeys(config.early_stopping)
            first.checkpoint.best_metric = first.checkpoint.best_mode = None
        if ignored or (config.export.checkpoint or "").isdecimal():  # a step of the second stage
            first.export.checkpoint = None
    first.sft = dict.fromkeys(config.sft)
    note(f"1/2 fine-tuning on chosen responses, then {config.loss.name}")
    if ignored:
        note(f"fine-tuning does not measure {metric}: its stage goes through all sft.epochs, and its last step goes on")
    if config.export.push_to:
        hub_token(config.export.push_to)  # that it is missing is said before both stages
    if train(first, workdir / "sft").stopped:
        return processes.STOPPED
    second = copy.deepcopy(config)
    second.job = "train"
    second.sft = dict.fromkeys(config.sft)
    second.model.path = str(workdir / "sft" / "export")
    note(f"2/2 {config.loss.name}")
    return run_train(second, workdir / "aligned")


def _measured_by_sft(metric: str) -> bool:
    """Whether an evaluation of supervised fine-tuning has a metric; samples are measured as in any run."""
    one = np.ones(1, np.float32)
    pairs = PairLogps(-one, -one, one, one, mean_tokens=np.ones(2, np.float32), weight=one)
    return metric.startswith("samples/") or metric in summary(columns_of(make_loss("sft"), pairs, None))


JOBS: dict[str, Callable[[ConfigDict, Path], int]] = {
    "train": run_train,
    "sft_first": run_sft_first,
    "pairs": run_pairs,
    "rounds": run_rounds,
    "quickstart": quickstart.run,
}
