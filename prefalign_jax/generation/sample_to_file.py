"""A file of samples that grows by a line a sample; stopped anywhere, it goes on with the samples it would have had."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefalign_jax.data.chat import load_tokenizer, tokenize_prompts
from prefalign_jax.data.records import TOLD, Prompt, read_prompts, told, told_by
from prefalign_jax.data.remarks import Remarks, lines
from prefalign_jax.data.template import CHAT_FIELDS, ChatOptions, chat_options, prints_date
from prefalign_jax.files import append, hold, parse_json, writing
from prefalign_jax.generation.generate import Completion, stream, text_of
from prefalign_jax.generation.sample_files import Sample, as_row
from prefalign_jax.generation.sampling import Sampling
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.endings import split_stops, stop_ids
from prefalign_jax.models.hf_io import load_config, resolve
from prefalign_jax.models.loading import exported, load_decoder, told_in_run
from prefalign_jax.options import DTYPES, choose
from prefalign_jax.processes import note
from prefalign_jax.progress import Progress
from prefalign_jax.sharding import make_mesh, param_shardings
from prefalign_jax.types import UserError

SAMPLE = {"prompt": "anything", "sample": "an integer"}  # of a row, what is read again
SAMPLE |= {"model": "a string", "seed": "an integer", "settings": "an object"}
BEGINNING = b'{"prompt": '  # of every line


class Draw(NamedTuple):
    """How samples are drawn; the file keeps it, and samples drawn otherwise are not added to it.

    Attributes:
      sampling: how the next token is drawn.
      seed: random seed; a sample is a function of it, the prompt and its number.
      max_new_tokens: tokens of a response at most.
      stop: texts that end a response; they are left out of it.
      chat_template: in place of the tokenizer's own.
      dtype: of the computation.
      chat_template_kwargs: variables of the chat template, an object or its JSON.
      template_may_drop: parts that the chat template may leave out, names of template.MAY_DROP with commas.
      special_in_text: 'keep', or 'split' to encode special tokens that prompts spell as text.
      date: YYYY-MM-DD, for templates that print the date.

    The last four are as in the run that made the model where they are None. Without a run the date is the day of the
    first sample.
    """

    sampling: Sampling = Sampling()
    seed: int = 0
    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    chat_template: str | None = None
    dtype: str = "float32"
    chat_template_kwargs: Any = None
    template_may_drop: str | None = None
    special_in_text: str | None = None
    date: str | None = None

    @property
    def chat(self) -> ChatOptions:
        """What the chat template is told.

        Raises:
          UserError: a value is no object, no name or no day.
        """
        return chat_options(**{name: getattr(self, name) for name in CHAT_FIELDS}, where="--")

    def checked(self) -> Draw:
        """Itself.

        Raises:
          UserError: a value is out of range.
        """
        choose("--dtype", self.dtype, dict.fromkeys(DTYPES))
        if not all(self.stop):
            raise UserError("--stop: an empty text ends every response; leave it out")
        self.chat  # noqa: B018 (it names what is wrong)
        return self

    def settings(self) -> dict[str, Any]:
        """As a sample has them."""
        rest = {"max_new_tokens": self.max_new_tokens, "stop": [*self.stop]}
        told = {"chat_template_kwargs": dict(self.chat.kwargs), "template_may_drop": [*self.chat.may_drop]}
        told |= {"special_in_text": "split" if self.chat.split_special else "", "date": self.date}
        rest |= {name: value for name, value in told.items() if value}
        return {**vars(self.sampling), **rest, "chat_template": self.chat_template, "dtype": self.dtype}


def sample_to_file(
    model: str,
    prompts: str,
    out: Path,
    draw: Draw = Draw(),  # noqa: B008 (immutable)
    *,
    name: str = "",
    n: int = 1,
    limit: int | None = None,
    split: str = "train",
    batch_size: int = 64,
    mesh: Mapping[str, int | None] | None = None,
) -> None:
    """Samples responses to prompts; appends each to a file, with its tokens and their log-probabilities.

    Args:
      model: Hugging Face directory, hub name, GGUF file, or the working directory of a run.
      prompts: a file, directory or data set, of rows with a prompt or preference data, whose prompts are taken.
      out: JSONL; samples that it holds are not drawn again.
      draw: how the samples are drawn.
      name: of the model in the samples; `model` if empty.
      n: samples a prompt.
      limit: prompts at most.
      split: of a data set.
      batch_size: responses drawn together.
      mesh: devices along each axis, as config.mesh; all share the rows by default.

    Raises:
      UserError: an option is out of range, a file cannot be read, or `out` holds something else.
    """
    for option, value in (("n", n), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"--{option}={value} is out of range; write at least 1")
    draw.checked()
    asked, dropped = read_prompts(prompts, split=split, limit=limit)
    for reason, count in dropped.items():
        note(f"left out: {count} {reason}")
    tokenizer = load_tokenizer(resolve(exported(model)), draw.chat_template)
    with _file(out) as descriptor:
        told_before = told_in_run(model, **{name: getattr(draw, name) for name in CHAT_FIELDS})
        day = draw.date
        if prints_date(tokenizer):
            day = day or _day(out) or told_before["date"] or datetime.date.today().isoformat()
        draw = draw._replace(**{**told_before, "date": day}).checked()
        run = {"model": name or model, "seed": draw.seed, "settings": draw.settings()}
        done = held(out, descriptor, run)
        keys = [_key({"prompt": one.prompt, **told(one)}) for one in asked]
        left = [(i, one) for i, one in enumerate(asked) if any((keys[i], j) not in done for j in range(n))]
        if not left:
            note(f"{out} holds all {n * len(asked)} samples")
            return
        tokens, samples = 0, _samples(model, tokenizer, dict(left), draw, n, batch_size, mesh or {"data": -1})
        with Progress(n * len(left), "sample") as progress:
            for count, (prompt, number, drawn, text) in enumerate(samples, 1):
                tokens += drawn.tokens.size
                progress.update(count, {"tokens": tokens})
                if (_key({"prompt": prompt.prompt, **told(prompt)}), number) in done:
                    continue
                row = as_row(Sample(prompt.prompt, text, id=prompt.id, **run, **told_by(prompt)))
                row |= {"sample": number, "ended": drawn.ended}
                row |= {"tokens": drawn.tokens.tolist(), "logps": drawn.logps.tolist()}
                append(out, descriptor, (json.dumps(row, ensure_ascii=False) + "\n").encode())


def _samples(
    model: str,
    tokenizer: Any,
    prompts: Mapping[int, Prompt],
    draw: Draw,
    n: int,
    batch_size: int,
    mesh: Mapping[str, int | None],
) -> Iterator[tuple[Prompt, int, Completion, str]]:
    """(prompt, number of the sample, what was drawn, its text) of the prompts, whose keys are their numbers."""
    directory = resolve(exported(model))
    vocabulary = load_config(directory).vocab_size
    if len(tokenizer) > vocabulary:
        raise UserError(f"--model={model}: its {vocabulary} embeddings lack tokens of its tokenizer")
    decoder, params = load_decoder(
        directory,
        make=functools.partial(make_decoder, dtype=draw.dtype),
        place=functools.partial(param_shardings, make_mesh(mesh)),
    )
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    stop_tokens, stop_strings = split_stops(draw.stop, tokenizer)
    asked, remarks = [*prompts.values()], Remarks()
    ids = tokenize_prompts(asked, tokenizer, draw.chat, remarks)
    for line in lines(remarks, draw.chat.split_special):
        note(line)
    for i, number, drawn in stream(
        decoder,
        params,
        ids,
        numbers=[*prompts],
        n=n,
        seed=draw.seed,
        max_new_tokens=draw.max_new_tokens,
        stop_tokens=(*stop_ids(directory, tokenizer), *stop_tokens),
        sampling=draw.sampling,
        stop_strings=stop_strings,
        decode=decode,
        batch_size=batch_size,
    ):
        yield asked[i], number, drawn, text_of(drawn, decode, stop_strings)


def held(out: Path, descriptor: int, run: Mapping[str, Any]) -> set[tuple[str, int]]:
    """The (prompt, sample) that a file of samples holds; a last line that was cut short is removed.

    Args:
      out: the file.
      descriptor: of it, to write.
      run: model, seed and settings of its samples.

    Raises:
      UserError: the file is no samples, or of another run.
    """
    whole = out.read_bytes()
    lines, last = whole[: whole.rfind(b"\n") + 1].splitlines(), whole[whole.rfind(b"\n") + 1 :]
    if last and not last.startswith(BEGINNING[: len(last)]):
        raise UserError(f"--out={out}: its last line is no sample that was cut short: name another file")
    done = set()
    for number, text in enumerate([*lines, *([last] if _whole(last) else [])], 1):
        try:
            row = parse_json(text, SAMPLE, where=f"--out={out}, row {number}")
        except UserError as error:
            raise UserError(f"{error}; this is no sample: name another file") from None
        done.add((_key({name: row[name] for name in ("prompt", *TOLD) if name in row}), row["sample"]))
        before = {name: row[name] for name in run}
        for name, value in _flat(run).items():
            if (old := _flat(before).get(name)) != value:
                raise UserError(f"--out={out}: its samples have {name}={old!r}, not {value!r}; name another file")
    if _whole(last):
        append(out, descriptor, b"\n")
    elif last:
        os.ftruncate(descriptor, len(whole) - len(last))
    return done


def _whole(line: bytes) -> bool:
    """Whether a last line without its end is a value all the same, of whoever wrote the file."""
    with contextlib.suppress(UserError):
        parse_json(line, where="")
        return True
    return False


@contextlib.contextmanager
def _file(out: Path) -> Iterator[int]:
    """Holds the file, made if it is not there; that it cannot be written is said before a model is loaded."""
    if out.is_dir():
        raise UserError(f"--out={out} is a directory; name a file in it")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out = out.resolve()  # a link that is named is meant
    descriptor = hold(out)
    if descriptor is None:
        raise UserError(f"--out={out}: another process is writing there; wait for it, or name another file")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _key(asked: Mapping[str, Any]) -> str:
    return json.dumps(asked, sort_keys=True)


def _day(out: Path) -> str | None:
    """The date that the samples of a file were asked with; None where they say none."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError), out.open("rb") as file:
        return json.loads(file.readline())["settings"].get("date")
    return None


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in run.items() if name != "settings"}, **run["settings"]}
