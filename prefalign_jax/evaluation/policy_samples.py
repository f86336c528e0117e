"""Samples of a policy, what they are worth, and how far the policy has moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from prefalign_jax.data.chat import tokenize_prompts
from prefalign_jax.data.records import Prompt, Text, told
from prefalign_jax.data.template import AS_IT_IS, ChatOptions
from prefalign_jax.evaluation.held_out import sequence_logps
from prefalign_jax.experiment import Experiment
from prefalign_jax.generation.diversity import distinct
from prefalign_jax.generation.generate import Completion, sample, sample_members
from prefalign_jax.generation.sample_files import write_jsonl
from prefalign_jax.generation.sampling import Sampling
from prefalign_jax.intervals import bootstrap_mean
from prefalign_jax.judges import reward_model, rewards
from prefalign_jax.judges.judge import Scorer
from prefalign_jax.load_data import load_prompts
from prefalign_jax.models.endings import stop_ids
from prefalign_jax.models.hf_io import resolve
from prefalign_jax.processes import is_first
from prefalign_jax.types import LanguageModel, Pair, Params, TrainState

BATCH = 64  # samples computed together
MOST_ROWS = 256  # the same of all members of a program
MODEL = "model:"  # what a reward's name begins with if it is a reward model's directory


class Drawn(NamedTuple):
    """N samples.

    Attributes:
      prompts: N prompts, as in the file; with their tools and the like, where they have any.
      pairs: N pairs whose chosen response is the sample, as tokens; there is no rejected one.
      texts: N responses.
      logps: [N] float32 log-probability of each under the policy that drew it.
      numbers: [N] which prompt each is a sample of.
      ended: N times 'token' or 'length'.
    """

    prompts: list[Text | Prompt]
    pairs: list[Pair]
    texts: list[str]
    logps: np.ndarray
    numbers: np.ndarray
    ended: list[str]


def scorer_of(reward: str) -> Scorer:
    """The scores of a reward written down in judges/rewards.py, or of 'model:DIR', a reward model."""
    return reward_model.scorer(reward[len(MODEL) :]) if reward.startswith(MODEL) else rewards.scorer(reward)


def sampling_of(fields: ConfigDict) -> Sampling:
    """How a config's `samples` are drawn."""
    return Sampling(fields.temperature, fields.top_k, fields.top_p, fields.min_p)


def make_sampler(
    experiments: Sequence[Experiment],
    model: LanguageModel,
    started: tuple[LanguageModel, Params] | None,
    tokenizer: Any,
    mesh: jax.sharding.Mesh,
    workdirs: Sequence[Path],
    members: bool = False,
) -> Callable[[TrainState, Sequence[int | None]], list[dict[str, float]]]:
    """sample(state, steps) -> [{metric: mean}]: draws from the policy, measures, writes WORKDIR/samples/STEP.jsonl.

    `steps` says at which step each run is; of one that has ended, None, nothing is measured or written.

    Args:
      experiments: whose `samples` say what is drawn and what it is worth; without prompts nothing is. One, or those of
        members of a program, which differ in their seed alone as far as samples go.
      model: of the policy.
      started: (model, parameters) that they are compared with; None is the reference in the state.
      tokenizer: Hugging Face tokenizer.
      mesh: deals rows to its devices.
      workdirs: of the runs.
      members: whether the state is of a program, see `members.Program`.

    Raises:
      UserError: the prompts or the reward cannot be read.
    """
    config, fields = experiments[0].config, experiments[0].config.samples
    if not fields.prompts:
        return lambda state, steps: [{}] * len(experiments)
    prompts = load_prompts(fields.prompts, fields.limit)
    score = scorer_of(fields.reward) if fields.reward else None
    seeds = [one.config.seed for one in experiments]
    options = dict(stop_tokens=stop_ids(resolve(config.model.path), tokenizer), per_prompt=fields.per_prompt)
    options |= dict(chat=experiments[0].chat)

    def draw(state: TrainState) -> list[Drawn]:
        if members and model.join is None:
            return draw_of_members(model, state.params, tokenizer, prompts, fields, seeds=seeds, **options)
        # One after another: what is under adapters is too large to be there for each.
        out = []
        for k, seed in enumerate(seeds):
            params = jax.tree.map(lambda x, k=k: x[k], state.params) if members else state.params
            policy = model.join(state.reference, params) if model.join else params
            out.append(draw_samples(model, policy, tokenizer, prompts, fields, seed=seed, **options))
        return out

    def sample_now(state: TrainState, steps: Sequence[int | None]) -> list[dict[str, float]]:
        drawn, out = draw(state), []
        frozen = reference_logps(started or (model, state.reference), fields, drawn, mesh)
        for experiment, workdir, step, one, logps in zip(experiments, workdirs, steps, drawn, frozen, strict=True):
            if step is None:
                out.append({})
                continue
            means, scores = measure(one, fields, score, logps)
            about = {"model": workdir.name, "step": step, "seed": experiment.config.seed}
            rows = [
                {**_row_of(prompt), "response": text, **about}
                for prompt, text in zip(one.prompts, one.texts, strict=True)
            ]
            if scores is not None:
                rows = [{**row, "reward": float(value)} for row, value in zip(rows, scores, strict=True)]
            if is_first():
                write_jsonl(workdir / "samples" / f"{step}.jsonl", rows)
            out.append(means)
        return out

    return sample_now


def draw_samples(
    model: LanguageModel,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[Text | Prompt],
    fields: ConfigDict,
    *,
    stop_tokens: Sequence[int],
    per_prompt: int,
    seed: int,
    first: int = 0,
    chat: ChatOptions = AS_IT_IS,
) -> Drawn:
    """Draws `per_prompt` samples of every prompt.

    Args:
      model, params: of the policy.
      tokenizer: Hugging Face tokenizer.
      prompts: strings, messages, or messages with their tools.
      fields: a config's `samples`.
      stop_tokens: ids that end a response, see `models.endings.stop_ids`.
      per_prompt: samples of each.
      seed: of the draws.
      first: number of the first prompt, where these are a part of a longer list.
      chat: what the chat template is told.
    """
    ids = tokenize_prompts(prompts, tokenizer, chat)
    how = dict(n=per_prompt, stop_tokens=stop_tokens, numbers=range(first, first + len(ids)), **_how(fields))
    completions = sample(model, params, ids, seed=seed, batch_size=BATCH, **how)
    return _as_drawn(prompts, ids, completions, tokenizer)


def draw_of_members(
    model: LanguageModel,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[Text | Prompt],
    fields: ConfigDict,
    *,
    stop_tokens: Sequence[int],
    per_prompt: int,
    seeds: Sequence[int],
    chat: ChatOptions = AS_IT_IS,
) -> list[Drawn]:
    """`draw_samples` of each of K models at once; params have a leading axis [K], and there are K seeds."""
    ids = tokenize_prompts(prompts, tokenizer, chat)
    how = dict(
        n=per_prompt, stop_tokens=stop_tokens, batch_size=min(BATCH, -(-MOST_ROWS // len(seeds))), **_how(fields)
    )
    of_each = sample_members(model, params, ids, seeds=seeds, **how)
    return [_as_drawn(prompts, ids, completions, tokenizer) for completions in of_each]


def _how(fields: ConfigDict) -> dict[str, Any]:
    return dict(max_new_tokens=fields.max_new_tokens, sampling=sampling_of(fields))


def _as_drawn(
    prompts: Sequence[Text | Prompt],
    ids: Sequence[np.ndarray],
    completions: Sequence[Sequence[Completion]],
    tokenizer: Any,
) -> Drawn:
    flat = [(i, one) for i, several in enumerate(completions) for one in several]
    empty = np.zeros(0, np.int32)
    return Drawn(
        prompts=[one.prompt if isinstance(one := prompts[i], Prompt) and not told(one) else one for i, _ in flat],
        pairs=[Pair(ids[i], one.tokens, empty) for i, one in flat],
        texts=tokenizer.batch_decode([one.spoken for _, one in flat], skip_special_tokens=True),
        logps=np.array([one.logps.sum(dtype=np.float64) for _, one in flat], np.float32),
        numbers=np.array([i for i, _ in flat]),
        ended=[one.ended for _, one in flat],
    )


def _row_of(prompt: Text | Prompt) -> dict[str, Any]:
    return {"prompt": prompt.prompt, **told(prompt)} if isinstance(prompt, Prompt) else {"prompt": prompt}


def reference_logps(
    reference: tuple[LanguageModel, Params],
    fields: ConfigDict,
    drawn: Sequence[Drawn],
    mesh: jax.sharding.Mesh | None = None,
) -> list[np.ndarray | None]:
    """Log-probabilities of samples under one reference, which reads a prompt once for the samples of several policies.

    Args:
      reference: (model, params).
      fields: a config's `samples`. Where a temperature or a cut tail lets other responses be drawn than the policy's,
        there is no divergence to be estimated, and nothing is computed.
      drawn: samples of the same prompts from each of K policies.
      mesh: deals rows to its devices.

    Returns:
      K times [N] float32, or None.
    """
    if sampling_of(fields) != Sampling():
        return [None] * len(drawn)
    pairs = [pair for several in zip(*(one.pairs for one in drawn), strict=True) for pair in several]
    return list(sequence_logps(*reference, pairs, BATCH, mesh).reshape(-1, len(drawn)).T)


def measure(
    drawn: Drawn,
    fields: ConfigDict,
    score: Scorer | None,
    reference: np.ndarray | None = None,
) -> tuple[dict[str, float], np.ndarray | None]:
    """Means over samples with their 95% intervals, in which whole prompts are the units.

    samples/kl is the mean of log policy(y|x) - log reference(y|x), unbiased for KL(policy || reference) over responses
    up to the limit.

    Args:
      drawn: the samples.
      fields: a config's `samples`.
      score: what a response is worth; None for no reward.
      reference: from `reference_logps`; None for no divergence.

    Returns:
      ({name: number}: samples/reward, samples/kl, samples/length, each with _low and _high; samples/unscored, how many
      have no reward and are left out of its mean; samples/distinct_2; samples/cut_off, the share that reached the
      limit; [N] the rewards, NaN where there is none).
    """
    columns: dict[str, np.ndarray] = {}
    out: dict[str, float] = {}
    scores = None
    if score is not None:
        scores = score(drawn.prompts, drawn.texts).values
        columns["reward"] = scores
        out["samples/unscored"] = float(np.isnan(scores).sum())
    if reference is not None:
        columns["kl"] = drawn.logps - reference
    columns["length"] = np.array([len(pair.chosen) for pair in drawn.pairs], np.float64)
    for name, values in columns.items():
        known = np.isfinite(values)
        interval = bootstrap_mean(values[known], clusters=drawn.numbers[known]) if known.any() else [np.nan] * 3
        for end_of, value in zip(("", "_low", "_high"), interval, strict=True):
            out[f"samples/{name}{end_of}"] = float(value)
    out["samples/distinct_2"] = distinct([pair.chosen.tolist() for pair in drawn.pairs], 2)
    out["samples/cut_off"] = float(np.mean([ended == "length" for ended in drawn.ended]))
    return out, scores
