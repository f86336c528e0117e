"""Signs: what a run's own numbers say of it, in a few plain lines, where a reader should look twice.

Each is a function of what the run left in its directory, and says its lines or None. Its docstring has the threshold
and the reason for it. What is normal has no sign. docs/signs.md has them for readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prefalign_jax.analysis.runs import Run

Row = Mapping[str, Any]

FALL = 1.0  # nats: the response is e = 2.7 times less likely
RATIO = 0.01  # of a loss or a mean log-probability: less is no change to speak of
APART = 0.1  # nats: rounding moves a mean of log-probabilities by less
DRIFT = 1.25  # ratio of mean lengths
FAR = 10.0  # nats: log n - (n - 1) / n is that for the best of n = 60,000 samples
RIGHT = 0.99  # accuracy of pairs in training that are as good as all right
FLOOR = 0.05  # of the loss that the run began with
SEEN = 100  # pairs that a mean over training steps is of, at least
KNOWN = 0.9  # accuracy of pairs in training that the run knows
GAP = 0.25  # of accuracies
HALF = 0.5  # of the loss that the run began with
SHARE = 0.05  # of records: any share that is measured can be off by as much
TRIED = 20  # steps before anything is said of a learning rate


def displacement(run: Run) -> str | None:
    """The chosen responses themselves became less likely.

    Threshold: more than half of the held-out chosen responses are less likely than under the reference, and all of
    them by FALL nats in the mean. Without a reference: their mean log-probability fell by RATIO of itself.
    Reason: with half of them it is the usual response and not the tail. A fall of 1 nat makes a response e times less
    likely; a response of 40 tokens at 2.5 nats a token has 100 nats, of which RATIO is 1.
    Source: Razin et al., arXiv 2410.08847, who name it likelihood displacement; what takes the place of the chosen
      response may be as good or may be its opposite.
    """
    fell, change = (last(run.held_out, f"eval/displacement/{name}") for name in ("fell", "change"))
    if not math.isnan(fell):
        return fallen(fell, change, held_out_count(run), run.config)
    before, now = ends(run.held_out, "eval/logps/chosen")
    if "eval/rewards/margins" in _columns(run) and now < before - RATIO * abs(before):
        seen = f"the mean log-probability of held-out chosen responses fell from {before:.4g} to {now:.4g}."
        return f"{seen} {_why_they_fall(run.config)}"
    return None


def fallen(fell: float, change: float, count: int | None, config: Row) -> str | None:
    """`displacement` of a model with a reference, which `prefalign evaluate` says too.

    Args:
      fell: share of the chosen responses that are less likely than under the reference.
      change: mean of log policy - log reference over all of them, in nats.
      count: how many there are, None where nobody counted.
      config: with the names and values of `loss.*`.
    """
    if not (fell > 0.5 and change < -FALL):
        return None
    how_many = f"{fell:.0%} of {count:,} held-out" if count else f"{fell:.0%} of the held-out"
    seen = f"{how_many} chosen responses are less likely than under the reference; the mean change is {change:.3g} nats"
    return f"{seen}. {_why_they_fall(config)}"


def _why_they_fall(config: Row) -> str:
    name, parts = str(config.get("loss.name", "")), []
    if name == "dpo":
        parts.append("loss.name=rpo or dpop holds them up")
    elif name not in ("", "kto", "mpo") and not any(word in name for word in ("sft", "rpo", "dpop", "cpo", "unpaired")):
        parts.append(f"loss.name='{name} + sft' holds them up")
    strength = next((key for key in ("loss.beta", "loss.tau") if config.get(key) is not None), None)
    softer = "a smaller learning_rate or fewer steps move less"
    parts.append(f"a larger {strength}, {softer}" if strength else softer)
    return (
        "That is common and no fault by itself: the loss trains the difference of two responses, which can grow while "
        "both fall. Something else became likelier, so read samples. If they are worse: " + "; ".join(parts) + "."
    )


def length(run: Run) -> str | None:
    """Samples grew longer or shorter.

    Threshold: their mean length is DRIFT times that before training, or as much shorter, and the two 95% intervals do
    not overlap. Of fine-tuning nothing is said: it teaches the length of its answers.
    Reason: apart from each other, the intervals show more than chance. A quarter is a choice: it is what a reader of
    samples side by side notices.
    Source: Singhal et al., arXiv 2310.03716, and Park et al., arXiv 2403.19159: much of what is won in rewards and win
      rates can be length alone.
    """
    before, now = ends(run.held_out, "samples/length")
    (low_before, low), (high_before, high) = (ends(run.held_out, f"samples/length{end}") for end in ("_low", "_high"))
    longer, shorter = now > DRIFT * before and low > high_before, now < before / DRIFT and high < low_before
    if not (longer or shorter) or run.config.get("loss.name") == "sft":
        return None
    bias = run.datasheet.get("training", {}).get("length_bias", {}).get("longer_wins")
    data = f" The chosen response is the longer one in {bias:.0%} of the training pairs." if bias else ""
    return (
        f"samples grew {'longer' if longer else 'shorter'}: {now:.4g} tokens in the mean, {before:.4g} before training."
        f"{data} Judges and rewards often favour length, so compare answers of equal length. "
        "loss.name=ln_dpo, r_dpo or simpo takes length out of the reward."
    )


def kl(run: Run) -> str | None:
    """Samples are far from where the run began.

    Threshold: the 95% interval of their KL lies above FAR nats a response. Of losses with a reference alone: others do
    not hold the policy near anything.
    Reason: the best of n samples is log n - (n - 1) / n nats away from the model that draws them, so 10 nats are the
    best of 60,000: further than any choice among samples goes.
    Source: Gao et al., arXiv 2210.10760, and Rafailov et al., arXiv 2406.02900: at a growing KL the reward that is
      trained goes on rising, and the true one falls.
    """
    low, now = last(run.held_out, "samples/kl_low"), last(run.held_out, "samples/kl")
    if not low > FAR or not _compares(run):
        return None
    return (
        f"samples are {now:.3g} nats a response away from where the run began; the best of 60,000 samples would be "
        f"{FAR:.0f} nats away. At such distances rewards can rise while answers get worse, so read samples. "
        "A larger loss.beta, a smaller learning_rate or fewer steps stay nearer."
    )


def saturation(run: Run) -> str | None:
    """Training pairs are as good as all ranked right, and the margins go on growing.

    Threshold: over the last logged steps, of SEEN pairs or more, the accuracy in training is at least RIGHT, or the
    loss at most FLOOR of that in the first step; and the margins are larger than over as many steps before.
    Reason: if one pair in twenty were still wrong, 100 pairs would be as right as that once in thirty times. At
    FLOOR of log 2 a pair's gradient has 7% of its first weight: what is left drives rewards apart.
    Source: Azar et al., arXiv 2310.12036, section 4.2: with pairs that are all right DPO's margins grow without end,
      whatever beta is.
    """
    count = _steps_of(run, SEEN)
    rows = [row for row in run.train if row.get("rewards/margins") is not None]
    if len(rows) < 2 * count:
        return None
    now, earlier = rows[-count:], rows[-2 * count : -count]
    accuracy, loss = mean(now, "rewards/accuracies"), mean(now, "loss")
    margins = mean(earlier, "rewards/margins"), mean(now, "rewards/margins")
    at_floor = run.train[0].get("loss") is not None and 0 <= loss <= FLOOR * run.train[0]["loss"]
    if not (accuracy >= RIGHT or at_floor) or margins[1] <= margins[0]:
        return None
    held_out = last(run.held_out, "eval/rewards/accuracies")
    others = "" if math.isnan(held_out) else f" Of held-out pairs {held_out:.1%} are ranked right."
    return (
        f"training pairs are learnt: over the last {count} logged steps their accuracy is {accuracy:.3f} and the loss "
        f"{loss:.3g}, and margins still grow, from {margins[0]:.3g} to {margins[1]:.3g}.{others} "
        "More steps mostly drive rewards apart. Fewer epochs, loss.label_smoothing or loss.name=ipo end that."
    )


def idle(run: Run) -> str | None:
    """The learning rate does next to nothing.

    Threshold: after half of the run, and TRIED steps or more, no held-out loss or mean log-probability has changed by
    RATIO of itself. Without held-out data: the loss in training, of a run that begins at equal rewards.
    Reason: half of a run is past the warm-up of any usual schedule. RATIO of log 2 is a margin of 0.014, and an
    accuracy counts signs, so it can look good at any size of margins.
    Source: for adapters, Schulman et al., LoRA Without Regret, 2025: ten times the rate of all weights.
    """
    total = run.config.get("steps") or 0
    columns = _columns(run)
    if "eval/loss" in columns:
        names = [name for name in ("eval/loss", "eval/logps/chosen", "eval/logps/rejected") if name in columns]
        changes = {name: ends(run.held_out, name) for name in names}
        step = run.held_out[-1]["step"]
    else:
        count = _steps_of(run, SEEN)
        equal = bool(run.train) and run.train[0]["step"] == 1 and run.train[0].get("rewards/margins") == 0
        if not equal or len(run.train) <= count:
            return None
        changes = {"loss": (run.train[0]["loss"], mean(run.train[-count:], "loss"))}
        step = run.train[-1]["step"]
    still = all(abs(now - before) < RATIO * abs(before) for before, now in changes.values())
    if not still or step < TRIED or step < total / 2:
        return None
    before, now = next(iter(changes.values()))  # of the loss
    advice = f"try learning_rate={10 * run.config.get('learning_rate', math.nan):.1g}"
    if run.config.get("lora.rank") or run.config.get("lora.path"):
        advice += "; adapters take about ten times the rate of all weights"
    if run.config.get("model.param_dtype") == "bfloat16" and not run.config.get("model.stochastic_rounding"):
        advice += "; bfloat16 weights lose small updates: set model.param_dtype=float32 or model.stochastic_rounding"
    return (
        f"next to nothing has changed after {step:,} of {total:,} steps: the loss is {now:.4g} and was {before:.4g}. "
        "The accuracy counts signs, so it may look good all the same. "
        f"The learning rate does little: {advice}."
    )


def ties(run: Run) -> str | None:
    """The two responses of a pair are the same to the model, or to the data.

    Threshold: SHARE of the records of one stage have no winner (a tie, or identical responses, also once truncated), or
    SHARE of the held-out pairs have equal log-probabilities.
    Reason: what has no winner teaches nothing, and a share of SHARE can move any other share by as much.
    """
    for part, counts, before in _dropped(run):
        lost = {name: n for name, n in counts.items() if name == "tie" or name.startswith("identical")}
        if sum(lost.values()) >= SHARE * before > 0:
            share, reasons = _share(sum(lost.values()), before), ", ".join(f"{n:,} {name}" for name, n in lost.items())
            return (
                f"{share} of the {part} records have no winner and are left out: {reasons}. "
                "Look how they were made: equal scores, one answer twice, or a max_length that cuts where they differ."
            )
    tied = last(run.held_out[-1:], "eval/ties")  # a row has none where no pair is tied
    if tied >= SHARE:
        return (
            f"{tied:.0%} of the held-out pairs have two responses of the same log-probability. To the model they are "
            "one response, and nothing is learnt of them. `prefalign inspect` shows which of their tokens count."
        )
    return None


def noise(run: Run) -> str | None:
    """What holds for the training pairs does not for others: wrong labels are learnt by heart.

    Threshold: the accuracy in training is at least KNOWN over the last logged steps of SEEN pairs or more, that of
    held-out pairs GAP lower, and its 95% interval lower too. Where margins begin at 0 the loss in training has fallen
    to HALF of its first value: before that the accuracy counts signs of small margins. Or, with a reference: the
    interval of the held-out accuracy lies below one half. Or: SHARE of the records contradict another one.
    Reason: a network can fit labels that are random, and then nothing carries over to other pairs. People agree in
    about three comparisons of four, so that a quarter of the labels say little.
    Source: Zhang et al., arXiv 1611.03530; Yeh et al., arXiv 2410.01957: a quarter of HH-RLHF has low agreement with
      reward models; Ray Chowdhury et al., arXiv 2403.00409.
    """
    for part, counts, before in _dropped(run):
        if (lost := counts.get("contradictory", 0)) >= SHARE * before > 0:
            return (
                f"{_share(lost, before)} of the {part} records contradict another one and are left out. "
                "The other labels may be as noisy. loss.name=robust_dpo or loss.label_smoothing allows for that."
            )
    # Not of step 0, where with accuracy_ties=trl equal rewards count 0.
    held_out, high = (ends(run.held_out, f"eval/rewards/accuracies{end}")[1] for end in ("", "_high"))
    rows = run.train[-_steps_of(run, SEEN) :]
    known = mean(rows, "rewards/accuracies")
    began = run.train[0] if run.train and run.train[0]["step"] == 1 else {}
    only_signs = began.get("rewards/margins") == 0 and mean(rows, "loss") > HALF * began["loss"]
    if known >= KNOWN and not only_signs and high < known and held_out <= known - GAP:
        return (
            f"{known:.0%} of the pairs in training are ranked right, and {held_out:.0%} of the held-out ones (at most "
            f"{high:.0%}). The run has learnt its pairs by heart: they are few, or their labels are noisy. "
            "Fewer epochs, more pairs, loss.label_smoothing or loss.name=robust_dpo help."
        )
    if "eval/displacement/change" in _columns(run) and high < 0.5:
        return (
            f"the held-out accuracy is {held_out:.0%} (at most {high:.0%}), worse than chance. The held-out pairs "
            "prefer what the training pairs do not. Look whether chosen and rejected are swapped in one of the files."
        )
    return None


def reference(run: Run) -> str | None:
    """The reference is not where the policy began.

    Threshold: before the first update chosen responses are APART nats, in the mean, from the reference.
    Reason: policy and reference then agree, so all log-ratios are 0, margins are 0 and the accuracy is one half. In
    bfloat16 a response of 100 tokens is off by about 0.1 nats, up or down, and the mean over pairs by less.
    """
    change = last([row for row in run.held_out if row["step"] == 0], "eval/displacement/change")
    noisy = any(run.config.get(name) for name in ("model.dropout", "model.attention_dropout", "lora.dropout"))
    if math.isnan(change) and not run.held_out and not noisy and run.config.get("loss.beta") and _compares(run):
        change = last([row for row in run.train if row["step"] == 1], "rewards/chosen") / run.config["loss.beta"]
    if not abs(change) > APART:
        return None
    path = run.config.get("reference.path")
    cause = f"reference.path={path} is another model" if path else "it is not the model that the run began with"
    return (
        "the policy did not begin at the reference: before the first step chosen responses are "
        f"{change:+.3g} nats away, since {cause}. So margins do not begin at 0, nor the accuracy at 0.5. "
        "Look at their changes. If it is not meant so, leave reference.path unset or begin with that model."
    )


def truncation(run: Run) -> str | None:
    """Many records are too long for max_length.

    Threshold: SHARE of the records are dropped for their length, or SHARE of the training pairs are cut.
    Reason: those that are too long are no random part of the data: they are the long answers and conversations. Any
    share that is measured on the others can be off by as much as they are.
    """
    limit, kept = run.datasheet.get("max_length"), run.datasheet.get("training", {})
    for part, counts, before in _dropped(run):
        if (lost := counts.get("too long", 0)) >= SHARE * before > 0:
            return (
                f"{_share(lost, before)} of the {part} records are longer than max_length={limit} and are left out. "
                "They are the long answers and conversations. A larger max_length keeps them; too_long=truncate_prompt "
                "cuts prompts from the left and keeps responses whole."
            )
    if kept.get("cut", 0) >= SHARE * kept.get("count", 0) > 0:
        how = run.datasheet.get("too_long")
        what = (
            "A response that is cut has no end, so nothing teaches the policy to stop there."
            if how == "truncate_response"
            else "What stands first in a prompt, such as the system message, is gone there."
        )
        return (
            f"{_share(kept['cut'], kept['count'])} of the training pairs are cut to max_length={limit} tokens "
            f"(too_long={how}). {what} A larger max_length keeps them whole."
        )
    return None


SIGNS: dict[str, Callable[[Run], str | None]] = {
    "displacement": displacement,
    "length": length,
    "kl": kl,
    "saturation": saturation,
    "idle": idle,
    "ties": ties,
    "noise": noise,
    "reference": reference,
    "truncation": truncation,
}


def signs_of(run: Run) -> dict[str, str]:
    """{name: its lines} of the signs that a run shows, in the order of SIGNS."""
    shown = {name: sign(run) for name, sign in SIGNS.items()}
    return {name: text for name, text in shown.items() if text}


# Numbers of a run; NaN where there is none, and no comparison with NaN is true


def last(rows: Sequence[Row], name: str) -> float:
    """The last value of a column."""
    return next((float(row[name]) for row in reversed(rows) if row.get(name) is not None), math.nan)


def ends(rows: Sequence[Row], name: str) -> tuple[float, float]:
    """(value before training, last value after it began) of a column of eval.jsonl."""
    return last([row for row in rows if row["step"] == 0], name), last([row for row in rows if row["step"] > 0], name)


def mean(rows: Sequence[Row], name: str) -> float:
    """The mean of a column."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return float(np.mean(values)) if values else math.nan


def held_out_count(run: Run) -> int | None:
    """How many held-out pairs there are, None where the datasheet does not say."""
    stages = run.datasheet.get("stages", {}).get("held out")
    return stages[-1]["after"] if stages else None


def _columns(run: Run) -> set[str]:
    return {name for row in run.held_out for name in row}


def _steps_of(run: Run, pairs: int) -> int:
    """Logged steps that make so many pairs, at least 5."""
    return max(5, math.ceil(pairs / run.config.get("batch_size", 1)))


def _compares(run: Run) -> bool:
    return run.config.get("reference.kind") not in (None, "none")


def _dropped(run: Run) -> list[tuple[str, Mapping[str, int], int]]:
    """(part, {reason: records left out}, records before) of each stage of each part of the data."""
    stages = run.datasheet.get("stages", {})
    return [(part.replace(" ", "-"), one["dropped"], one["before"]) for part, some in stages.items() for one in some]


def _share(count: int, every: int) -> str:
    return f"{count / every:.0%} ({count:,} of {every:,})"
