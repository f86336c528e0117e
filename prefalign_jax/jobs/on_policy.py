"""Preference data drawn from models: samples among themselves, under a data set's responses, of one model over another.

And rounds of that, each followed by a training.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from prefalign_jax import processes
from prefalign_jax.alike import check_config
from prefalign_jax.assemble import load_model
from prefalign_jax.data.chat import load_tokenizer
from prefalign_jax.data.pairing import Scored, group_up, pair_up, put_over
from prefalign_jax.data.records import Prompt, read_records, told, told_by
from prefalign_jax.data.rows import content_digest
from prefalign_jax.data.template import prints_date
from prefalign_jax.evaluation.policy_samples import MODEL, draw_samples
from prefalign_jax.experiment import Experiment, read
from prefalign_jax.files import locked, read_json, write_json
from prefalign_jax.generation.sample_files import answer_text, write_jsonl
from prefalign_jax.judges.kinds import make_grader
from prefalign_jax.judges.tournament import Grader
from prefalign_jax.load_data import load_prompts
from prefalign_jax.models.endings import stop_ids
from prefalign_jax.models.hf_io import resolve
from prefalign_jax.models.loading import exported
from prefalign_jax.options import split_names
from prefalign_jax.processes import agreed, by_first, note, told_by_first
from prefalign_jax.progress import Progress
from prefalign_jax.sharding import make_mesh
from prefalign_jax.train import train
from prefalign_jax.types import UserError

PAIRS, MADE = "pairs.jsonl", "pairs.json"  # the data, and what it was made with
AT_ONCE = 64  # prompts between two lines of progress
# The fields of `samples` and `on_policy` that decide what the pairs are.
DRAWING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
PAIRING = ("prompts", "limit", "per_prompt", "pairing", "min_gap", "labels", "sharpness")
KINDS = ("against", "policies", "judge", "judge_options")  # that are kept where they are set


class Made(NamedTuple):
    """Rows of preference data.

    Attributes:
      rows: of pairs or groups, those of a prompt next to each other.
      prompts: how many were answered.
      dropped: {reason: how many pairs or responses} that are in none.
      dated: whether a chat template has printed the date.
    """

    rows: list[dict[str, Any]]
    prompts: int
    dropped: dict[str, int]
    dated: bool


def make_pairs(config: ConfigDict, model_path: str, directory: Path, seed: int) -> Path:
    """Pairs or groups of responses that models draw: DIRECTORY/pairs.jsonl, with where each came from.

    Samples of the policy are compared by a reward or a judge. With `on_policy.against` a row's own response is better
    than each sample; with `on_policy.policies` one model's sample is better than another's. A loss of groups gets a
    prompt's samples as one row.

    Args:
      config: `samples` says how to draw, `on_policy` from what and how to pair.
      model_path: of the policy.
      directory: where to; what is there already, made the same way, is kept.
      seed: of the draws and of noisy labels.

    Returns:
      The file.

    Raises:
      UserError: there is data made another way, or no pair is left.
    """
    experiment = read(config, complete=False).dated(directory)
    made = _made(experiment, model_path, seed)
    if agreed((directory / MADE).exists()):
        known = read_json(directory / MADE, {"made": "an object"})["made"]
        known.setdefault("content", made["content"])  # which was not kept once
        if known != made:
            name = next(name for name in {**made, **known} if known.get(name) != made.get(name))
            raise UserError(
                f"{directory / PAIRS} was made with {name}={known.get(name)!r}, not {made.get(name)!r}; "
                "set it back or use another --workdir"
            )
        return directory / PAIRS
    make = _over_samples if config.on_policy.against else _of_two if config.on_policy.policies else _among_samples
    rows, prompts, dropped, dated = make(experiment, model_path, directory, seed)
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    what = "groups" if "responses" in (rows or [{}])[0] else "pairs"
    note(f"{len(rows)} {what} of {prompts} prompts x {config.on_policy.per_prompt} samples; left out: {counts}")
    if not rows:
        raise UserError(f"{config.on_policy.prompts}: no pair is left; left out: {counts}")

    def write() -> None:
        write_jsonl(directory / PAIRS, rows)
        day = {"date": experiment.config.data.date} if dated else {}
        about = {"made": made, "pairs": len(rows), "left_out": dropped, **day}
        write_json(directory / MADE, about)  # last: all is there

    by_first(write)
    return directory / PAIRS


def _made(experiment: Experiment, model_path: str, seed: int) -> dict[str, Any]:
    """All that decides what the pairs are."""
    config, how, chat = experiment.config, experiment.config.on_policy, experiment.chat
    made = {} if how.policies else {"model": model_path}
    made |= {"seed": seed, "chat_template": config.data.chat_template}
    made |= {"chat_template_kwargs": dict(chat.kwargs)} if chat.kwargs else {}
    made |= {name: how[name] for name in PAIRING} | {name: how[name] for name in KINDS if how[name] is not None}
    made |= {} if how.judge or how.against or how.policies else {"reward": config.samples.reward}
    made |= {"groups": True} if experiment.loss.record_kind.get("groups") else {}
    made |= {name: config.samples[name] for name in DRAWING}
    return made | {"content": told_by_first(lambda: content_digest(how.prompts))}


def _among_samples(experiment: Experiment, model_path: str, directory: Path, seed: int) -> Made:
    """The policy's samples, by their scores."""
    config, how = experiment.config, experiment.config.on_policy
    graders: list[Grader] = []
    by_first(lambda: graders.append(_grader(experiment, directory)))  # what is wrong with it is said before the draws
    prompts = load_prompts(how.prompts, how.limit)
    responses, dated = _draw(experiment, model_path, config.data.chat_template, prompts, seed)
    grades = told_by_first(lambda: [(g.values.tolist(), g.reasons) for g in graders[0](prompts, responses)])
    scored = [Scored(several, values) for several, (values, _) in zip(responses, grades, strict=True)]
    if lost := Counter(reason for _, reasons in grades for reason in reasons if reason):
        listed = ", ".join(f"{reason}: {count}" for reason, count in lost.most_common(4))
        note(f"{lost.total()} responses have no reward and are in no pair ({listed})")
    about = {"model": model_path, "reward": how.judge or config.samples.reward, "seed": seed}
    rows = []

    def add(number: int, row: dict[str, Any]) -> None:
        prompt = prompts[number]
        rows.append({"prompt": prompt.prompt, **row, **told(prompt), "prompt_number": number, **about})

    if experiment.loss.record_kind.get("groups"):
        groups, dropped = group_up(scored)
        for number, places in groups:
            add(number, {name: [column[i] for i in places] for name, column in scored[number]._asdict().items()})
        return Made(rows, len(prompts), dropped, dated)
    options = dict(pairing=how.pairing, min_gap=how.min_gap, labels=how.labels, sharpness=how.sharpness, seed=seed)
    pairs, dropped = pair_up(scored, **options)
    for number, (chosen, rejected) in pairs:
        (better, worse), scores = (scored[number].responses[i] for i in (chosen, rejected)), scored[number].scores
        row = {"chosen": better, "rejected": worse}
        add(number, {**row, "score_chosen": scores[chosen], "score_rejected": scores[rejected]})
    return Made(rows, len(prompts), dropped, dated)


def _grader(experiment: Experiment, directory: Path) -> Grader:
    """Of `on_policy.judge`, or of `samples.reward`."""
    config, how = experiment.config, experiment.config.on_policy
    if how.judge:
        options = re.split(r",(?=\w+=)", how.judge_options or "")  # a value may have commas in it
        return make_grader(
            how.judge, [x for x in options if x], directory, ("on_policy.judge", "on_policy.judge_options")
        )
    reward = config.samples.reward
    spec = reward if reward.startswith(MODEL) else f"reward:{reward}"
    return make_grader(spec, (), directory, ("samples.reward", ""))


def _over_samples(experiment: Experiment, model_path: str, directory: Path, seed: int) -> Made:
    """The responses of the data over the policy's samples.

    Source: SPIN, Chen et al., arXiv 2401.01335, algorithm 1, which draws one sample a prompt.
    """
    how = experiment.config.on_policy
    records, dropped = read_records(how.prompts, responses=("chosen",), train_on="last", limit=how.limit)
    dropped = Counter(dropped)
    dropped["without a prompt"] += sum(not record.prompt for record in records)
    records = [record for record in records if record.prompt]
    prompts = [Prompt(record.prompt, "", record.where, **told_by(record)) for record in records]
    template = experiment.config.data.chat_template
    responses, dated = _draw(experiment, model_path, template, prompts, seed)
    pairs, left = put_over([[answer_text(record.chosen)] * how.per_prompt for record in records], responses)
    about = {"model": model_path, "seed": seed}
    rows = []
    for number, (_, worse) in pairs:
        chosen, sample = records[number].chosen, responses[number][worse]
        rejected = sample if isinstance(chosen, str) else [{"role": "assistant", "content": sample}]
        row = {"prompt": records[number].prompt, "chosen": chosen, "rejected": rejected, **told(prompts[number])}
        rows.append({**row, "prompt_number": number, **about})
    return Made(rows, len(prompts), dict(dropped + Counter(left)), dated)


def _of_two(experiment: Experiment, model_path: str, directory: Path, seed: int) -> Made:
    """One model's k-th sample over another's; each has the chat template of its own tokenizer.

    Source: delta learning, Geng et al., arXiv 2507.06187.
    """
    how = experiment.config.on_policy
    paths = split_names(how.policies)
    prompts = load_prompts(how.prompts, how.limit)
    seeds = seed, int(np.random.default_rng((seed, 1)).integers(2**31))  # one would make like models say like things
    drawn = (_draw(experiment, exported(path), None, prompts, own) for path, own in zip(paths, seeds, strict=True))
    (better, first), (worse, second) = drawn
    pairs, dropped = put_over(better, worse)
    about = dict(zip(("model", "rejected_model"), paths, strict=True)) | {"seed": seed}
    rows = []
    for number, (chosen, rejected) in pairs:
        row = {"prompt": prompts[number].prompt, "chosen": better[number][chosen], "rejected": worse[number][rejected]}
        rows.append({**row, **told(prompts[number]), "prompt_number": number, **about})
    return Made(rows, len(prompts), dropped, first or second)


def _draw(
    experiment: Experiment, path: str, template: str | None, prompts: Sequence[Prompt], seed: int
) -> tuple[list[list[str]], bool]:
    """(`on_policy.per_prompt` samples of a model for each prompt, whether the chat template prints the date)."""
    config, count = experiment.config, experiment.config.on_policy.per_prompt
    tokenizer = load_tokenizer(path, template)
    model, params = load_model(config, path, make_mesh(config.mesh), len(tokenizer))
    options = dict(stop_tokens=stop_ids(resolve(path), tokenizer), per_prompt=count, seed=seed, chat=experiment.chat)
    responses: list[list[str]] = []
    with Progress(len(prompts), "prompt") as progress:
        for first in range(0, len(prompts), AT_ONCE):
            part = prompts[first : first + AT_ONCE]
            texts = draw_samples(model, params, tokenizer, part, config.samples, first=first, **options).texts
            responses += [texts[at : at + count] for at in range(0, len(texts), count)]
            progress.update(len(responses))
    return responses, prints_date(tokenizer)


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

    The reference of a round is the model that it starts from. KL is measured to the model of the config. Where
    `on_policy.policies` are named, these draw in every round.

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
        if number < config.on_policy.rounds:
            one.export.push_to = None  # the last round's model is what is asked for
        for name in ("prompts", *KINDS):
            one.on_policy[name] = None
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
