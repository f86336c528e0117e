"""The formats of published data sets, each a small function: a row as it is published -> rows of the common format.

The common format is what `records.read_records` takes: prompt, chosen and rejected as text or messages (or a completion
with a label, or several `responses` with what tells which is better, see groups.py), a `margin` by which the chosen
response is better, a `weight`. FORMATS is in the order in which a row's
fields are compared; a row that has all fields of one, and none that it excludes, is of that format, and every other row
is taken for the common one. So a file may mix formats: each row is told apart by itself.

A reader takes the fields of its format. All others stay beside what it makes, so that weight, label, tools, system
prompt and history mean the same in every format, and what nobody reads is found (`fields.account`). Parts of a field
that a reader leaves out stay too, under a name such as 'completions[].critique'; None marks a field that it took.

Where a data set gives instruction and answers as strings, prompt and responses become messages, since their roles are
known: the chat template says how they are joined. Text that is continued (TL;DR posts) stays text.

A soft preference, chosen with probability p, is two rows of weight p and 1 - p with the responses swapped: every mean
over pairs is then the expectation that was meant.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from prefalign_jax.data.conversation import is_answer, until_last_answer
from prefalign_jax.data.groups import check_alike, read_list
from prefalign_jax.data.messages import read_text
from prefalign_jax.data.values import (
    Dropped,
    Malformed,
    choice,
    empty,
    expected,
    missing,
    name_of,
    number,
    string,
)

Row = Mapping[str, Any]

HARD = 1e-6  # a soft preference is no more certain than 1 - HARD where it becomes a margin


class Format(NamedTuple):
    """How rows of a data set are told apart and read.

    Attributes:
      read: row -> rows of the common format; of a `group`, [rows] -> rows.
      fields: that it reads; a row of this format has them all, none null but the verdict.
      signs: and these, which only tell it from others.
      without: and none of these.
      also: fields that it reads where a row has them.
      group: consecutive rows with the same value in this field are read together.
      gather: the pairs of consecutive rows with the same values in these fields are one group, where groups are wanted.
      answers: what the field or fields with its responses are called, for what is left out of them.
      verdict: the fields that say which response is better. Where all of them are null, nobody has said it, and the row
        is left out.
      pairs: it makes pairs of what are demonstrations as they stand, so it is detected only where pairs are wanted.
    """

    read: Callable[[Any], list[Row]]
    fields: tuple[str, ...]
    signs: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    group: str | None = None
    gather: tuple[str, ...] = ()
    answers: str = ""
    verdict: tuple[str, ...] = ()
    pairs: bool = False

    def fits(self, fields: frozenset[str], null: frozenset[str]) -> bool:
        """Whether a row with these fields, and these that are null, has what this format has. A verdict may be null."""
        return (fields | null.intersection(self.verdict)).issuperset((*self.fields, *self.signs))


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
    return _detect(*fields_of(row), pairs)


def fields_of(row: Row) -> tuple[frozenset[str], frozenset[str]]:
    """(fields of a row that are not null, those that are)"""
    null = frozenset(field for field, value in row.items() if value is None)
    return frozenset(row) - null, null


@functools.lru_cache(maxsize=1024)
def _detect(fields: frozenset[str], null: frozenset[str], pairs: bool) -> str:
    for name, one in FORMATS.items():
        if one.fits(fields, null) and fields.isdisjoint(one.without) and (pairs or not one.pairs):
            return name
    return "common"


def in_common(name: str, row: Row, rows: Sequence[Row]) -> list[Row]:
    """Rows of a published format in the common one, with all that the format does not name.

    Args:
      name: a key of FORMATS.
      row: the one that is read, of a group the first.
      rows: all of the group, or that one.

    Raises:
      Malformed: it is not of this format, or a field that it does not name says again what it says.
      Dropped: it is no pair.
    """
    form = FORMATS[name]
    if name == "common":
        return [row]
    if form.verdict and all(missing(row.get(field)) for field in form.verdict):
        raise Dropped("no preference")
    others = {field: value for field, value in row.items() if field not in (*form.fields, *form.also)}
    for other in rows[1:]:
        check_alike(row, other, [form.group])
    out = []
    for one in form.read(rows if form.group else row):
        for field in others.keys() & one.keys():
            again = one[field] is not others[field] and not missing(one[field]) and not empty(others[field])
            if field != "weight" and again:
                raise Malformed(
                    f"field {name_of(field)!r}: format {name!r} makes it of other fields; "
                    f"write data.ignore={name_of(field)}, or data.format=common to read it instead of those"
                )
        both = {**others, **one}
        if not missing(others.get("weight")) and not missing(one.get("weight")):
            both["weight"] = one["weight"] * number(others["weight"], "weight")
        out.append(both)
    return out


def _user(text: str, system: str | None = None) -> list[dict]:
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}]


def _assistant(text: Any, field: str) -> list[dict]:
    return [{"role": "assistant", "content": string(text, field)}]


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


def several(prompt: Any, texts: Sequence[Any], scores: Sequence[float], field: str, by: str = "scores") -> list[Row]:
    """A group of answers that are strings, with their scores, or with ranks."""
    if len(scores) < 2:
        raise Dropped("fewer than two answers")
    responses = [_assistant(text, f"{field}[{i}]") for i, text in enumerate(texts)]
    return [{"prompt": prompt, "responses": responses, by: [*scores]}]


def _objects(row: Row, field: str, keys: Sequence[str]) -> list[Mapping]:
    value = read_list(row.get(field), field)
    for i, item in enumerate(value):
        if not isinstance(item, Mapping) or any(key not in item for key in keys):
            raise expected(f"an object with {', '.join(map(repr, keys))}", item, f"{field}[{i}]")
    return value


def _left(items: Iterable[Mapping], field: str, keys: Sequence[str]) -> Row:
    """What a reader leaves out of the objects of a list, under names that say where it stands."""
    names = {name for item in items for name, value in item.items() if name not in keys and not empty(value)}
    return {f"{field}[].{name_of(name)}": True for name in sorted(names, key=str)}


def _with(rows: list[Row], *more: Row) -> list[Row]:
    return [{**row, **{name: value for one in more for name, value in one.items()}} for row in rows]


def _instruction(row: Row, field: str = "instruction") -> str:
    """Instruction and input, a line between them; either may be empty, and the input missing or, from pandas, NaN."""
    text, given = string(row.get(field), field), row.get("input")
    return "\n\n".join(filter(None, (text, "" if empty(given) else string(given, "input"))))


def ultrafeedback(row: Row) -> list[Row]:
    """openbmb/UltraFeedback: the completions by `fine-grained_score`, the mean of the ratings.

    Not by `overall_score`, which is 10 where 1 was meant in known rows; it is read only where the other is missing.
    """
    rated = _objects(row, "completions", ("response",))
    texts, scores, left = [], [], []
    for i, one in enumerate(rated):
        names = [name for name in ("fine-grained_score", "overall_score") if not missing(one.get(name))][:1]
        if names:
            texts.append(one["response"])
            scores.append(number(one[names[0]], f"completions[{i}].{names[0]}"))
        left.append(_left([one], "completions", ("response", *names)))
    unscored = {"completions[] without a score": True} if len(texts) < len(rated) else {}
    prompt = _user(string(row.get("instruction"), "instruction"))
    return _with(several(prompt, texts, scores, "completions.response"), *left, unscored)


def nectar(row: Row) -> list[Row]:
    """berkeley-nest/Nectar: answers by `rank`, 1 is best; plain text, since the prompt is a transcript as HH-RLHF's."""
    given = _objects(row, "answers", ("answer", "rank"))
    texts = [" " + string(one["answer"], f"answers[{i}].answer").strip() for i, one in enumerate(given)]
    ranks = [number(one["rank"], f"answers[{i}].rank", "a rank, 1 for the best", 0.0) for i, one in enumerate(given)]
    prompt = string(row.get("prompt"), "prompt").rstrip()
    return _with([{"prompt": prompt, "responses": texts, "ranks": ranks}], _left(given, "answers", ("answer", "rank")))


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
    """HuggingFaceH4/stack-exchange-preferences: the answers by `pm_score`."""
    given = _objects(row, "answers", ("text", "pm_score"))
    scores = [number(one["pm_score"], f"answers[{i}].pm_score") for i, one in enumerate(given)]
    prompt = _user(string(row.get("question"), "question"))
    group = several(prompt, [one["text"] for one in given], scores, "answers.text")
    return _with(group, _left(given, "answers", ("text", "pm_score")))


def pandalm(row: Row) -> list[Row]:
    """PandaLM's test set: annotators say 1 or 2, or 0 for a tie; the probability is their mean, a tie half a vote."""
    names = [name for name in row if name.startswith("annotator") and not missing(row[name])]
    votes = [(0.5, 1.0, 0.0)[choice(row[name], (0, 1, 2), name)] for name in names]
    pairs = soft(row, _user(_instruction(row)), ("response1", "response2"), sum(votes) / len(votes))
    return _with(pairs, dict.fromkeys(names))


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
    """nvidia/HelpSteer and HelpSteer2: consecutive responses to one prompt, by `helpfulness`."""
    scores = [number(row.get("helpfulness"), "helpfulness") for row in rows]
    prompt = _user(string(rows[0].get("prompt"), "prompt"))
    return several(prompt, [row.get("response") for row in rows], scores, "response")


def samples(rows: Sequence[Row]) -> list[Row]:
    """Samples with rewards, as runs write them (WORKDIR/samples/STEP.jsonl): consecutive responses to one prompt.

    A sample without a reward, which is null or NaN, is left out and counted.
    """
    scored = [row for row in rows if not missing(row.get("reward"))]
    if len(scored) < 2:
        raise Dropped("fewer than two answers")
    group = {"prompt": rows[0]["prompt"], "responses": [row["response"] for row in scored]}
    group["scores"] = [number(row["reward"], "reward") for row in scored]
    return [group | ({"samples without a reward": True} if len(scored) < len(rows) else {})]


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
    left = _left(pair, "summaries", ("text",)) | _left([info], "info", ("subreddit", "title", "post", "article"))
    return _with([{"prompt": prompt, "chosen": texts[better], "rejected": texts[1 - better]}], left)


def orca(row: Row) -> list[Row]:
    """Intel/orca_dpo_pairs and its descendants, axolotl's chatml.intel and chatml.icr: question (or input), answers."""
    field = "input" if missing(row.get("question")) else "question"
    return [{"prompt": _user(string(row.get(field), field)), "chosen": row["chosen"], "rejected": row["rejected"]}]


def argilla(row: Row) -> list[Row]:
    """axolotl's chatml.argilla: a prompt under one of four names, chosen_response and rejected_response."""
    field = next((name for name in ("prompt", "input", "question") if not missing(row.get(name))), "instruction")
    sides = {side: row[f"{side}_response"] for side in ("chosen", "rejected")}
    return [{field: None, "prompt": _user(string(row.get(field), field)), **sides}]


def alpaca(row: Row) -> list[Row]:
    """tatsu-lab/alpaca: instruction, input (may be empty) and output; a demonstration.

    LLaMA-Factory's older preference files have a list as output, the better answer first.
    """
    prompt, output = _instruction(row), row.get("output")
    if isinstance(output, list):
        if len(output) != 2:
            raise expected("an answer, or the list of the better and the worse one", output, "output")
        return [{"prompt": _user(prompt), "chosen": output[0], "rejected": output[1]}]
    pair = {"prompt": _user(prompt), "completion": _assistant(output, "output")}
    # The published file writes all of it out again as `text`.
    again = isinstance(row.get("text"), str) and row["instruction"] in row["text"] and output in row["text"]
    return [pair | {"text": None}] if again else [pair]


def alpaca_preference(row: Row) -> list[Row]:
    """LLaMA-Factory's preference files: instruction, input, chosen and rejected."""
    return [{"prompt": _user(_instruction(row)), "chosen": row["chosen"], "rejected": row["rejected"]}]


def instruction(row: Row) -> list[Row]:
    """axolotl's KTO files: an instruction (or question) and a completion (or response), labelled or not."""
    prompt = _instruction(row, "question" if missing(row.get("instruction")) else "instruction")
    completion = row.get("response") if missing(row.get("completion")) else row["completion"]
    return [{"prompt": _user(prompt), "completion": completion}]


def messages_preference(row: Row) -> list[Row]:
    """axolotl's chat_template.default: `messages` and two last answers, each a message, a string or a conversation.

    Whole conversations in chosen and rejected hold the messages themselves; then `messages` may only repeat them.
    """
    sides = {side: row[side] for side in ("chosen", "rejected")}
    chosen = read_text(row["chosen"], "chosen")
    if not isinstance(chosen, str) and chosen and not is_answer(chosen[0]):
        return [{**sides, "messages": row["messages"]}]
    return [{"prompt": row["messages"], **sides}]


def openai_preference(row: Row) -> list[Row]:
    """OpenAI's preference fine-tuning: input with messages and tools, preferred and non-preferred output."""
    given = row["input"]
    if not isinstance(given, Mapping) or "messages" not in given:
        raise expected("an object with 'messages'", given, "input")
    sides = {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    beside = {name: value for name, value in given.items() if name != "messages" and not empty(value)}
    return [{**beside, "prompt": given["messages"], **sides}]


def torchtune(row: Row) -> list[Row]:
    """torchtune's preference files: two whole conversations."""
    return [{side: row[f"{side}_conversations"] for side in ("chosen", "rejected")}]


def sharegpt(row: Row) -> list[Row]:
    """ShareGPT's `conversations`; what follows the last answer is left out and counted. Beside them may stand `chosen`
    and `rejected` turns: then they are the prompt of a pair.
    """
    if not missing(row.get("chosen")):
        return [{"prompt": row["conversations"], **{side: row.get(side) for side in ("chosen", "rejected")}}]
    messages = read_text(row["conversations"], "conversations")
    if isinstance(messages, str):
        raise expected("a list of turns", row["conversations"], "conversations")
    answered = until_last_answer(messages)
    if len(answered) < 2:
        raise Dropped("no answer")
    left = {"conversations[] after the last answer": True} if len(answered) < len(messages) else {}
    return [{"messages": answered, **left}]


def llmbar(row: Row) -> list[Row]:
    """princeton-nlp/LLMBar: `label` is the number of the better output, 1 or 2."""
    better = choice(row.get("label"), (1, 2), "label") - 1
    return answers(row, _user(string(row.get("input"), "input")), ("output_1", "output_2"), better)


def judgebench(row: Row) -> list[Row]:
    """ScalerLab/JudgeBench: `label` is 'A>B' or 'B>A', by which answer is correct."""
    better = ("A>B", "B>A").index(choice(row.get("label"), ("A>B", "B>A"), "label"))
    return answers(row, _user(string(row.get("question"), "question")), ("response_A", "response_B"), better)


def autoj(row: Row) -> list[Row]:
    """GAIR-NLP/auto-j's pairwise test set: `label` 0 says that the first response is better, 1 the second, 2 a tie."""
    better = choice(row.get("label"), (0, 1, 2), "label")
    if better == 2:
        raise Dropped("tie")
    return answers(row, _user(string(row.get("prompt"), "prompt")), ("response 1", "response 2"), better)


def hhh_alignment(row: Row) -> list[Row]:
    """HuggingFaceH4/hhh_alignment: `targets` holds two choices and their labels, 1 for the better one."""
    targets = row.get("targets")
    if not isinstance(targets, Mapping) or not {"choices", "labels"} <= targets.keys():
        raise expected("an object with 'choices' and 'labels'", targets, "targets")
    texts, labels = (read_list(targets[name], f"targets.{name}") for name in ("choices", "labels"))
    labels = [choice(label, (0, 1), f"targets.labels[{i}]") for i, label in enumerate(labels)]
    if len(texts) != 2 or sorted(labels) != [0, 1]:
        raise expected("two choices, one labelled 1 and one 0", targets, "targets")
    pair = {f"targets.choices[{i}]": text for i, text in enumerate(texts)}
    return answers(pair, _user(string(row.get("input"), "input")), list(pair), labels.index(1))


_GRADED = re.compile(
    r"###Task Description:.*?###The instruction to evaluate:\n(.*?)\n\n"
    r"###Response to evaluate:\n(.*?)\n\n###Score Rubrics:\n.*",
    re.DOTALL,
)


def prometheus_hhh(row: Row) -> list[Row]:
    """prometheus-eval's copy of HHH alignment: instruction and response stand in a prompt that asks for a grade."""
    parts = {}
    for side in ("chosen", "rejected"):
        field = f"{side}_instruction"
        match = _GRADED.fullmatch(string(row.get(field), field))
        if match is None:
            raise expected("an instruction and a response in Prometheus's grading prompt", row[field], field)
        parts[side] = match
    if parts["chosen"][1] != parts["rejected"][1]:
        raise Dropped("prompts differ")
    return [{"prompt": _user(parts["chosen"][1]), **{side: _assistant(part[2], side) for side, part in parts.items()}}]


def mt_bench_human(row: Row) -> list[Row]:
    """lmsys/mt_bench_human_judgments: one vote between two conversations, of which `turn` turns were judged."""
    winner = string(row.get("winner"), "winner")
    if winner.startswith("tie"):
        raise Dropped("tie")
    better = ("model_a", "model_b").index(choice(winner, ("model_a", "model_b"), "winner"))
    judged = 2 * choice(row.get("turn"), (1, 2), "turn")
    talks = {field: read_list(row.get(field), field) for field in ("conversation_a", "conversation_b")}
    left = {f"{field}[] of a later turn": True for field, talk in talks.items() if len(talk) > judged}
    sides = [talk[:judged] for talk in talks.values()]
    return [{"chosen": sides[better], "rejected": sides[1 - better], **left}]


def rewardbench(row: Row) -> list[Row]:
    """allenai/reward-bench: the prompt is what a user says, and the responses are answers to it."""
    pair = {side: _assistant(row.get(side), side) for side in ("chosen", "rejected")}
    return [{"prompt": _user(string(row.get("prompt"), "prompt")), **pair}]


_SIDES = ("chosen", "rejected")
FORMATS: dict[str, Format] = {
    "ultrafeedback": Format(ultrafeedback, ("instruction", "completions"), without=_SIDES, answers="completions"),
    "shp": Format(
        shp,
        ("history", "human_ref_A", "human_ref_B", "labels"),
        verdict=("labels",),
        also=("score_ratio",),
        gather=("post_id", "history"),
    ),
    "stack_exchange_paired": Format(stack_exchange_paired, ("question", "response_j", "response_k")),
    "stack_exchange": Format(
        stack_exchange, ("question", "answers"), signs=("qid",), without=_SIDES, answers="answers"
    ),
    "nectar": Format(nectar, ("prompt", "answers"), signs=("turns",), without=_SIDES, answers="answers"),
    "pandalm": Format(
        pandalm,
        ("instruction", "response1", "response2", "annotator1"),
        verdict=("annotator1", "annotator2", "annotator3"),
        also=("input",),
        gather=("instruction", "input"),
    ),
    "alpaca_eval": Format(
        alpaca_eval,
        ("instruction", "output_1", "output_2", "preference"),
        verdict=("preference",),
        also=("input",),
        gather=("instruction", "input"),
    ),
    "llmbar": Format(llmbar, ("input", "output_1", "output_2", "label"), verdict=("label",)),
    "judgebench": Format(judgebench, ("question", "response_A", "response_B", "label"), verdict=("label",)),
    "autoj": Format(autoj, ("prompt", "response 1", "response 2", "label"), verdict=("label",)),
    "hhh_alignment": Format(hhh_alignment, ("input", "targets")),
    "prometheus_hhh": Format(prometheus_hhh, ("chosen_instruction", "rejected_instruction")),
    "mt_bench_human": Format(
        mt_bench_human, ("conversation_a", "conversation_b", "winner", "turn"), verdict=("winner",)
    ),
    "rewardbench": Format(rewardbench, ("prompt", *_SIDES), signs=("chosen_model", "rejected_model", "subset")),
    "pku_saferlhf": Format(
        pku_saferlhf, ("prompt", "response_0", "response_1", "better_response_id"), verdict=("better_response_id",)
    ),
    "helpsteer2_preference": Format(
        helpsteer2_preference,
        ("prompt", "response_1", "response_2", "preference_strength"),
        verdict=("preference_strength",),
    ),
    "helpsteer3": Format(
        helpsteer3, ("context", "response1", "response2", "overall_preference"), verdict=("overall_preference",)
    ),
    "helpsteer": Format(
        helpsteer,
        ("prompt", "response", "helpfulness"),
        signs=("verbosity",),
        without=("chosen", "label"),
        group="prompt",
        pairs=True,
    ),
    "samples": Format(
        samples,
        ("prompt", "response", "reward"),
        without=(*_SIDES, "label", "kto_tag", "completion", "messages"),
        group="prompt",
        pairs=True,
    ),
    "summarize_from_feedback": Format(summarize_from_feedback, ("info", "summaries", "choice"), verdict=("choice",)),
    "openai_preference": Format(openai_preference, ("input", "preferred_output", "non_preferred_output")),
    "torchtune": Format(torchtune, ("chosen_conversations", "rejected_conversations")),
    "sharegpt": Format(sharegpt, ("conversations",), without=("messages", "prompt")),
    "messages_preference": Format(messages_preference, ("messages", *_SIDES), without=("prompt",)),
    "argilla": Format(argilla, ("chosen_response", "rejected_response"), without=_SIDES, also=("prompt",)),
    "alpaca_preference": Format(alpaca_preference, ("instruction", *_SIDES), without=("prompt",), also=("input",)),
    "orca": Format(orca, ("question", *_SIDES), without=("prompt",)),
    "orca_input": Format(orca, ("input", *_SIDES), without=("prompt",)),
    "alpaca": Format(alpaca, ("instruction", "output"), without=("chosen", "prompt", "messages"), also=("input",)),
    "instruction": Format(instruction, ("instruction", "completion"), without=("prompt", "chosen"), also=("input",)),
    "instruction_response": Format(
        instruction, ("instruction", "response"), without=("prompt", "chosen"), also=("input",)
    ),
    "question": Format(instruction, ("question", "completion"), without=("prompt", "chosen"), also=("input",)),
    # Of rows with the fields of an earlier one; to be named.
    "pku_saferlhf_safer": Format(
        pku_saferlhf_safer, ("prompt", "response_0", "response_1", "safer_response_id"), verdict=("safer_response_id",)
    ),
    "common": Format(lambda row: [row], (), answers="responses"),
}
