"""Preference data of the policy's own: sample, score, pair; and rounds of that, each followed by a training."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from prefalign_jax import processes
from prefalign_jax.alike import check_config
from prefalign_jax.assemble import load_model
from prefalign_jax.data.chat import load_tokenizer
from prefalign_jax.data.pairing import Scored, pair_up
from prefalign_jax.data.records import told
from prefalign_jax.data.template import prints_date
from prefalign_jax.evaluation.policy_samples import draw_samples, scorer_of
from prefalign_jax.experiment import read
from prefalign_jax.files import locked, read_json, write_json
from prefalign_jax.generation.sample_files import write_jsonl
from prefalign_jax.load_data import load_prompts
from prefalign_jax.models.endings import stop_ids
from prefalign_jax.models.hf_io import resolve
from prefalign_jax.processes import agreed, by_first, note
from prefalign_jax.progress import Progress
from prefalign_jax.sharding import make_mesh
from prefalign_jax.train import train
from prefalign_jax.types import UserError

PAIRS, MADE = "pairs.jsonl", "pairs.json"  # the data, and what it was made with
AT_ONCE = 64  # prompts between two lines of progress
# The fields of `samples` and `on_policy` that decide what the pairs are.
DRAWING = ("reward", "max_new_tokens", "temperature", "top_k", "top_p", "min_p")
PAIRING = ("prompts", "limit", "per_prompt", "pairing", "min_gap", "labels", "sharpness")


def make_pairs(config: ConfigDict, model_path: str, directory: Path, seed: int) -> Path:
    """Samples of a model, scored and paired: DIRECTORY/pairs.jsonl, with where each pair came from.

    Args:
      config: `samples` says how to draw and what a response is worth, `on_policy` how to pair.
      model_path: of the policy.
      directory: where to; what is there already, made the same way, is kept.
      seed: of the draws and of noisy labels.

    Returns:
      The file.

    Raises:
      UserError: there is data made another way, or no pair is left.
    """
    experiment = read(config, complete=False).dated(directory)
    fields, how, chat = config.samples, config.on_policy, experiment.chat
    made = {"model": model_path, "seed": seed, "chat_template": config.data.chat_template}
    made |= {"chat_template_kwargs": dict(chat.kwargs)} if chat.kwargs else {}
    made |= {name: how[name] for name in PAIRING} | {name: fields[name] for name in DRAWING}
    if agreed((directory / MADE).exists()):
        known = read_json(directory / MADE, {"made": "an object"})["made"]
        if known != made:
            name = next(name for name in made if known.get(name) != made[name])
            raise UserError(
                f"{directory / PAIRS} was made with {name}={known.get(name)!r}, not {made[name]!r}; "
                "set it back or use another --workdir"
            )
        return directory / PAIRS
    prompts = load_prompts(how.prompts, how.limit)
    tokenizer = load_tokenizer(model_path, config.data.chat_template)
    model, params = load_model(config, model_path, make_mesh(config.mesh), len(tokenizer))
    stop_tokens = stop_ids(resolve(model_path), tokenizer)
    scored: list[Scored] = []
    score = scorer_of(fields.reward)
    with Progress(len(prompts), "prompt") as progress:
        for first in range(0, len(prompts), AT_ONCE):
            part = draw_samples(
                model,
                params,
                tokenizer,
                prompts[first : first + AT_ONCE],
                fields,
                stop_tokens=stop_tokens,
                per_prompt=how.per_prompt,
                seed=seed,
                first=first,
                chat=chat,
            )
            values = score(part.prompts, part.texts).values
            for at in range(0, len(part.texts), how.per_prompt):
                several = slice(at, at + how.per_prompt)
                scored.append(Scored(part.texts[several], values[several].tolist()))
            progress.update(len(scored))
    options = dict(pairing=how.pairing, min_gap=how.min_gap, labels=how.labels, sharpness=how.sharpness, seed=seed)
    pairs, dropped = pair_up(scored, **options)
    if unscored := sum(np.isnan(one.scores).sum() for one in scored):
        note(f"{unscored} responses have no reward and are in no pair")
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    note(f"{len(pairs)} pairs of {len(prompts)} prompts x {how.per_prompt} samples; left out: {counts}")
    if not pairs:
        raise UserError(f"{how.prompts}: no pair is left; left out: {counts}")
    rows = []
    for number, (chosen, rejected) in pairs:
        responses, scores = scored[number]
        row = {"prompt": prompts[number].prompt, "chosen": responses[chosen], "rejected": responses[rejected]}
        row |= {"score_chosen": scores[chosen], "score_rejected": scores[rejected]}
        row |= told(prompts[number])
        rows.append({**row, "prompt_number": number, "model": model_path, "reward": fields.reward, "seed": seed})

    def write() -> None:
        write_jsonl(directory / PAIRS, rows)
        day = {"date": experiment.config.data.date} if prints_date(tokenizer) else {}
        about = {"made": made, "pairs": len(rows), "left_out": dropped, **day}
        write_json(directory / MADE, about)  # last: all is there

    by_first(write)
    return directory / PAIRS


def run_pairs(config: ConfigDict, workdir: Path) -> int:
    """WORKDIR/pairs.jsonl from the model of the config; the exit status."""
    check_config(config)
    read(config)
    with contextlib.ExitStack() as stack:
        by_first(lambda: stack.enter_context(locked(workdir)))
        note(f"pairs in {make_pairs(config, config.model.path, workdir, config.seed)}")
    return 0


def run_rounds(config: ConfigDict, workdir: Path) -> int:
    """Rounds of sampling from the policy, pairing, and training on the pairs; each starts from the last one's model.

    The reference of a round is the model that it starts from. KL is measured to the model of the config.

    Args:
      config: `on_policy.rounds` of them; the rest holds for each.
      workdir: gets round-1/, round-2/, ... with pairs.jsonl and a run each; resumed where it stopped.

    Returns:
      The exit status: 0, or processes.STOPPED if it was told to stop.

    Source: iterative DPO as in Xu et al., arXiv 2312.16682; Guo et al., arXiv 2402.04792, do so at every step.
    """
    check_config(config)
    read(config)
    path = config.model.path
    for number in range(1, config.on_policy.rounds + 1):
        directory = workdir / f"round-{number}"
        note(f"round {number}/{config.on_policy.rounds}")
        pairs = make_pairs(config, path, directory, config.seed * 1000 + number)
        one = copy.deepcopy(config)
        one.job = "train"
        one.on_policy.prompts = None
        one.data.path, one.model.path = str(pairs), path
        one.data.date = read_json(directory / MADE, "an object").get("date", config.data.date)  # as they were asked for
        if one.samples.prompts:
            one.samples.reference = config.samples.reference or config.model.path
        else:
            one.samples.reward = None
        if train(one, directory / "train").stopped:
            return processes.STOPPED
        path = str(directory / "train" / "export")
    return 0
