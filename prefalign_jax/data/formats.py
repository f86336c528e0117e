"""The formats of published data sets, each a small function: a row as it is published -> rows of the common format.

The common format is what `records.read_records` takes: prompt, chosen and rejected as text or messages (or a completion
with a label), a `margin` by which the chosen response is better, a `weight`. FORMATS is in the order in which a row's
fields are compared; a row that has all fields of one, and none that it excludes, is of that format, and every other row
is taken for the common one. So a file may mix formats: each row is told apart by itself.

Where a data set gives instruction and answers as strings, prompt and responses become messages, since their roles are
known: the chat template says how they are joined. Text that is continued (TL;DR posts) stays text.

A soft preference, chosen with probability p, is two rows of weight p and 1 - p with the responses swapped: every mean
over pairs is then the expectation that was meant.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]

HARD = 1e-6  # a soft preference is no more certain than 1 - HARD where it becomes a margin


class Malformed(ValueError):
    """A row breaks its format; whoever reads adds where."""


class Dropped(Exception):
    """A well-formed row is no pair; its one argument is the reason that is counted."""


class Format(NamedTuple):
    """How rows of a data set are told apart and read.

    Attributes:
      read: row -> rows of the common format; of a `group`, [rows] -> rows.
      fields: a row of this format has them all, none null.
      without: and none of these.
      group: consecutive rows with the same value in this field are read together.
      pairs: it makes pairs of what are demonstrations as they stand, so it is detected only where pairs are wanted.
    """

    read: Callable[[Any], list[Row]]
    fields: tuple[str, ...]
    without: tuple[str, ...] = ()
    group: str | None = None
    pairs: bool = False


def detect(row: Row, pairs: bool = True) -> str:
    """The name of a row's format.

    Args:
      row: its fields decide; the values only by being null or not.
      pairs: whether pairs are wanted (or labelled completions), not demonstrations.

    Returns:
      A key of FORMATS; 'common' if it is of no other.

    Example:
      >>> detect({"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1})
      'shp'
    """
    there = {field for field, value in row.items() if value is not None}
    for name, one in FORMATS.items():
        if there.issuperset(one.fields) and there.isdisjoint(one.without) and (pairs or not one.pairs):
            return name
    return "common"


def _user(text: str, system: str | None = None) -> list[dict]:
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}]


def _assistant(text: Any, field: str) -> list[dict]:
    return [{"role": "assistant", "content": string(text, field)}]


def string(value: Any, field: str) -> str:
    """The value, which must be a string."""
    if not isinstance(value, str):
        raise expected("a string", value, field)
    return value


def number(value: Any, field: str) -> float:
    """The value, which must be a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise expected("a finite number", value, field)
    return float(value)


def choice(value: Any, of: Sequence[Any], field: str) -> Any:
    """The value, which must be one of those given."""
    if not isinstance(value, int | float | str) or value not in of:
        raise expected(f"one of {', '.join(map(repr, of))}", value, field)
    return value


def expected(what: str, found: Any, field: str = "") -> Malformed:
    """The error of a field that holds something else."""
    return Malformed((f"field {field!r}: " if field else "") + f"expected {what}, found {show(found)}")


def show(value: Any) -> str:
    """A value for a message, shortened."""
    return "nothing" if value is None or value == [] else f"{kind(value)} {reprlib.repr(value)}"


def kind(value: Any) -> str:
    """The JSON type of a value, for a message."""
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def answers(row: Row, prompt: Any, names: Sequence[str], better: int, margin: float | None = None) -> list[Row]:
    """One pair of two fields that hold the answers as strings; `better` is the place of the preferred one."""
    chosen, rejected = names[better], names[1 - better]
    pair = {"prompt": prompt, "chosen": _assistant(row.get(chosen), chosen)}
    pair["rejected"] = _assistant(row.get(rejected), rejected)
    return [pair if margin is None else {**pair, "margin": margin}]


def soft(row: Row, prompt: Any, names: Sequence[str], first: float) -> list[Row]:
    """Both orders of two answers, weighted by the probability that each is meant; `first` that the first is better.

    The margin is the difference of rewards under which Bradley and Terry's model gives that probability.
    """
    if first == 0.5:
        raise Dropped("tie")
    bounded = min(max(first, HARD), 1 - HARD)
    gap = math.log(bounded) - math.log1p(-bounded)
    orders = [(0, first, gap), (1, 1 - first, -gap)]
    return [
        {**pair, "weight": weight}
        for better, weight, margin in sorted(orders, key=lambda order: -order[1])
        if weight > 0
        for pair in answers(row, prompt, names, better, margin)
    ]


def best_and_worst(prompt: Any, texts: Sequence[Any], scores: Sequence[float], field: str) -> list[Row]:
    """The pair of the answers with the highest and the lowest score; of equal ones the first."""
    if len(scores) < 2:
        raise Dropped("fewer than two answers")
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if best == worst:
        raise Dropped("tie")
    pair = {"prompt": prompt, "chosen": _assistant(texts[best], field), "rejected": _assistant(texts[worst], field)}
    return [{**pair, "margin": scores[best] - scores[worst]}]


def _objects(row: Row, field: str, keys: Sequence[str]) -> list[Mapping]:
    value = row.get(field)
    if not isinstance(value, list):
        raise expected("a list", value, field)
    for i, item in enumerate(value):
        if not isinstance(item, Mapping) or any(key not in item for key in keys):
            raise expected(f"an object with {', '.join(map(repr, keys))}", item, f"{field}[{i}]")
    return value


def _instruction(row: Row, field: str = "instruction") -> str:
    """Instruction and input, a line between them; the input may be missing, empty or, from pandas, NaN."""
    text, given = string(row.get(field), field), row.get("input")
    if given is None or given == "" or (isinstance(given, float) and math.isnan(given)):
        return text
    return f"{text}\n\n{string(given, 'input')}"


def ultrafeedback(row: Row) -> list[Row]:
    """openbmb/UltraFeedback: best and worst of the completions by `fine-grained_score`, the mean of the ratings.

    Not by `overall_score`, which is 10 where 1 was meant in known rows; it is read only where the other is missing.
    """
    rated = _objects(row, "completions", ("response",))
    found = []
    for i, one in enumerate(rated):
        names = [name for name in ("fine-grained_score", "overall_score") if one.get(name) is not None]
        if names:
            found.append((one["response"], number(one[names[0]], f"completions[{i}].{names[0]}")))
    prompt = _user(string(row.get("instruction"), "instruction"))
    return best_and_worst(prompt, [t for t, _ in found], [s for _, s in found], "completions.response")


def shp(row: Row) -> list[Row]:
    """stanfordnlp/SHP: `labels` 1 says that A is better; the margin is the logarithm of `score_ratio`."""
    better = 1 - choice(row.get("labels"), (0, 1), "labels")
    ratio = row.get("score_ratio")
    margin = None if ratio is None else math.log(max(1.0, number(ratio, "score_ratio")))
    return answers(row, _user(string(row.get("history"), "history")), ("human_ref_A", "human_ref_B"), better, margin)


def stack_exchange_paired(row: Row) -> list[Row]:
    """lvwerra/stack-exchange-paired: `response_j` is better than `response_k`."""
    return answers(row, _user(string(row.get("question"), "question")), ("response_j", "response_k"), 0)


def stack_exchange(row: Row) -> list[Row]:
    """HuggingFaceH4/stack-exchange-preferences: best and worst answer by `pm_score`."""
    given = _objects(row, "answers", ("text", "pm_score"))
    scores = [number(one["pm_score"], f"answers[{i}].pm_score") for i, one in enumerate(given)]
    prompt = _user(string(row.get("question"), "question"))
    return best_and_worst(prompt, [one["text"] for one in given], scores, "answers.text")


def pandalm(row: Row) -> list[Row]:
    """PandaLM's test set: annotators say 1 or 2, or 0 for a tie; the probability is their mean, a tie half a vote."""
    names = [name for name in row if name.startswith("annotator") and row[name] is not None]
    votes = [(0.5, 1.0, 0.0)[choice(row[name], (0, 1, 2), name)] for name in names]
    return soft(row, _user(_instruction(row)), ("response1", "response2"), sum(votes) / len(votes))


def alpaca_eval(row: Row) -> list[Row]:
    """AlpacaEval's annotations: `preference` from 1 (output_1) to 2 (output_2), 1.5 a tie, in between soft.

    The human annotations of AlpacaFarm use 0 for a tie. A `preference` of -1 says that the annotator failed.
    """
    value = number(row.get("preference"), "preference")
    if value == -1:
        raise Dropped("no preference")
    if value == 0:
        raise Dropped("tie")
    if not 1 <= value <= 2:
        raise expected("a number from 1 to 2, or 0 for a tie", row["preference"], "preference")
    return soft(row, _user(_instruction(row)), ("output_1", "output_2"), 2 - value)


def pku_saferlhf(row: Row, by: str = "better_response_id") -> list[Row]:
    """PKU-Alignment/PKU-SafeRLHF, by which response is better."""
    better = choice(row.get(by), (0, 1), by)
    return answers(row, _user(string(row.get("prompt"), "prompt")), ("response_0", "response_1"), better)


def pku_saferlhf_safer(row: Row) -> list[Row]:
    """PKU-Alignment/PKU-SafeRLHF, by which response is safer; named, since the fields are the same."""
    return pku_saferlhf(row, "safer_response_id")


def helpsteer(rows: Sequence[Row]) -> list[Row]:
    """nvidia/HelpSteer and HelpSteer2: consecutive responses to one prompt, best and worst by `helpfulness`."""
    scores = [number(row.get("helpfulness"), "helpfulness") for row in rows]
    prompt = _user(string(rows[0].get("prompt"), "prompt"))
    return best_and_worst(prompt, [row.get("response") for row in rows], scores, "response")


def _strength(row: Row, field: str, prompt: Any, names: Sequence[str]) -> list[Row]:
    """A preference from -3, the first response is much better, to 3, the second is."""
    value = number(row.get(field), field)
    if value == 0:
        raise Dropped("tie")
    return answers(row, prompt, names, int(value > 0), abs(value))


def helpsteer2_preference(row: Row) -> list[Row]:
    """nvidia/HelpSteer2's preferences; the margin is their strength, 1 to 3."""
    prompt = _user(string(row.get("prompt"), "prompt"))
    return _strength(row, "preference_strength", prompt, ("response_1", "response_2"))


def helpsteer3(row: Row) -> list[Row]:
    """nvidia/HelpSteer3's preferences: the prompt is a conversation; the margin is their strength, 1 to 3."""
    return _strength(row, "overall_preference", row.get("context"), ("response1", "response2"))


def summarize_from_feedback(row: Row) -> list[Row]:
    """openai/summarize_from_feedback's comparisons: plain text, a TL;DR post (or an article) and two summaries."""
    info, pair = row.get("info"), _objects(row, "summaries", ("text",))
    if not isinstance(info, Mapping):
        raise expected("an object", info, "info")
    if len(pair) != 2:
        raise expected("two summaries", pair, "summaries")
    if info.get("post") is not None:
        names = ("subreddit", "title", "post")
        subreddit, title, post = (string(info.get(name), f"info.{name}") for name in names)
        prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    else:
        prompt = f"Article: {string(info.get('article'), 'info.article')}\n\nTL;DR:"
    better = choice(row.get("choice"), (0, 1), "choice")
    texts = [" " + string(one["text"], f"summaries[{i}].text").strip() for i, one in enumerate(pair)]
    return [{"prompt": prompt, "chosen": texts[better], "rejected": texts[1 - better]}]


def orca(row: Row) -> list[Row]:
    """Intel/orca_dpo_pairs and its descendants: a system prompt, which may be empty, beside question and answers."""
    field = "question" if row.get("question") is not None else "input"
    system = None if row.get("system") is None else string(row["system"], "system")
    return answers(row, _user(string(row.get(field), field), system), ("chosen", "rejected"), 0)


def alpaca(row: Row) -> list[Row]:
    """tatsu-lab/alpaca: instruction, input (may be empty) and output; a demonstration."""
    return [{"prompt": _user(_instruction(row)), "completion": _assistant(row.get("output"), "output")}]


_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


def _turn(turn: Any, field: str) -> dict:
    if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
        raise expected("a turn with 'from' and 'value'", turn, field)
    speaker = choice(turn["from"], tuple(_SPEAKERS), f"{field}.from")
    return {"role": _SPEAKERS[speaker], "content": string(turn["value"], f"{field}.value")}


def sharegpt(row: Row) -> list[Row]:
    """ShareGPT's `conversations` of {from, value}, with a `system` beside it or not; what follows the last answer is
    left out. Beside it may stand `chosen` and `rejected` turns: then it is the prompt of a pair.
    """
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise expected("a list of turns", turns, "conversations")
    messages = [_turn(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    if row.get("system"):
        messages = [{"role": "system", "content": string(row["system"], "system")}, *messages]
    if row.get("chosen") is not None:
        return [{"prompt": messages, **{side: [_turn(row.get(side), side)] for side in ("chosen", "rejected")}}]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if len(messages) < 2:
        raise Dropped("no answer")
    return [{"messages": messages, "tools": row.get("tools")}]


FORMATS: dict[str, Format] = {
    "ultrafeedback": Format(ultrafeedback, ("instruction", "completions"), without=("chosen",)),
    "shp": Format(shp, ("history", "human_ref_A", "human_ref_B", "labels")),
    "stack_exchange_paired": Format(stack_exchange_paired, ("question", "response_j", "response_k")),
    "stack_exchange": Format(stack_exchange, ("question", "answers", "qid"), without=("chosen",)),
    "pandalm": Format(pandalm, ("instruction", "response1", "response2", "annotator1")),
    "alpaca_eval": Format(alpaca_eval, ("instruction", "output_1", "output_2", "preference")),
    "pku_saferlhf": Format(pku_saferlhf, ("prompt", "response_0", "response_1", "better_response_id")),
    "helpsteer2_preference": Format(
        helpsteer2_preference, ("prompt", "response_1", "response_2", "preference_strength")
    ),
    "helpsteer3": Format(helpsteer3, ("context", "response1", "response2", "overall_preference")),
    "helpsteer": Format(
        helpsteer, ("prompt", "response", "helpfulness", "verbosity"), ("chosen", "label"), group="prompt", pairs=True
    ),
    "summarize_from_feedback": Format(summarize_from_feedback, ("info", "summaries", "choice")),
    "sharegpt": Format(sharegpt, ("conversations",), without=("messages", "prompt")),
    "orca": Format(orca, ("system", "question", "chosen", "rejected"), without=("prompt", "conversations")),
    "orca_input": Format(orca, ("system", "input", "chosen", "rejected"), without=("prompt", "conversations")),
    "alpaca": Format(alpaca, ("instruction", "output"), without=("chosen", "prompt", "messages")),
    # Of rows with the fields of an earlier one; to be named.
    "pku_saferlhf_safer": Format(pku_saferlhf_safer, ("prompt", "response_0", "response_1", "safer_response_id")),
    "common": Format(lambda row: [row], ()),
}
