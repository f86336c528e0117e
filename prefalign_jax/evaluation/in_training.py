"""The evaluation that a training makes on its way: on held-out pairs and by samples, of a run or of all members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prefalign_jax import averages
from prefalign_jax.assemble import Assembled
from prefalign_jax.evaluation.held_out import columns_of, moved_columns, set_logps, summary
from prefalign_jax.evaluation.policy_samples import make_sampler
from prefalign_jax.experiment import Experiment
from prefalign_jax.members import AXES
from prefalign_jax.train_step import make_eval_step
from prefalign_jax.types import TrainState


def make_evaluation(
    experiments: Sequence[Experiment],
    began: Sequence[Assembled],
    workdirs: Sequence[Path],
    tokenizer: Any,
    mesh: jax.sharding.Mesh,
    members: bool = False,
) -> Callable[[TrainState, Sequence[int | None]], list[dict[str, float]]]:
    """evaluate(state, steps) -> [{metric: mean}], one for each run; what was sampled is written into its directory.

    `steps` says at which step each run is, None for one that is not evaluated: it has ended, and gets {} and no file.

    Args:
      experiments: of one run, or of the members of a program, see `members.shared_fields`.
      began: what each begins with.
      workdirs: of each.
      tokenizer: of the policies.
      mesh: where everything lies.
      members: whether the state is of a program, see `members.Program`. Members with the same held-out pairs read them
        at once.

    Raises:
      UserError: the prompts of the samples or their reward cannot be read.
    """
    model, chunk = began[0].model, experiments[0].config.vocabulary_chunk
    sample = make_sampler(experiments, model, began[0].started, tokenizer, mesh, workdirs, members)
    eval_step = make_eval_step(model, experiments[0].loss, mesh, chunk, members)
    same: dict[int, list[int]] = {}  # the members with each set
    for k, one in enumerate(began):
        same.setdefault(id(one.held_out), []).append(k)

    def measured(state: TrainState, numbers: Sequence[int]) -> list[dict[str, float]]:
        """Of members with one held-out set."""
        held_out = began[numbers[0]].held_out
        if held_out is None:
            return [{}] * len(numbers)
        params = state.params
        if len(numbers) < len(began):
            params = jax.tree.map(lambda x: x[np.array(numbers)], params)
        both = set_logps(eval_step, params, state.reference, held_out, members)
        logps = [jax.tree.map(lambda x, at=at: x[at], both) for at in range(len(numbers))] if members else [both]
        out = []
        for k, (policy, frozen) in zip(numbers, logps, strict=True):
            running = jax.tree.map(lambda x, k=k: x[k], state.running) if members else state.running
            loss = experiments[k].loss
            out.append(summary(columns_of(loss, policy, frozen, running) | moved_columns(loss, policy, frozen)))
        return out

    def weights(state: TrainState) -> TrainState:
        return averages.evaluated(state, experiments[0].config.ema.evaluate)

    if members:
        weights = jax.vmap(weights, in_axes=(AXES,), out_axes=AXES)

    def evaluate(state: TrainState, steps: Sequence[int | None]) -> list[dict[str, float]]:
        state = weights(state)
        means: list[dict[str, float]] = [{} for _ in began]
        for numbers in same.values():
            for k, some in zip(numbers, measured(state, numbers), strict=True):
                means[k] |= some
        sampled = sample(state, steps)
        return [{} if steps[k] is None else means[k] | sampled[k] for k in range(len(began))]

    return evaluate
