"""A file of samples that grows by a line a sample; stopped anywhere, it goes on with the samples it would have had."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefalign_jax.data.chat import load_tokenizer, tokenize_prompts
from prefalign_jax.data.records import Prompt, read_prompts
from prefalign_jax.files import append, hold, parse_json, writing
from prefalign_jax.generation.generate import Completion, stream, text_of
from prefalign_jax.generation.sample_files import Sample
from prefalign_jax.generation.sampling import Sampling
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.endings import split_stops, stop_ids
from prefalign_jax.models.hf_io import load_config, resolve
from prefalign_jax.models.loading import exported, load_decoder
from prefalign_jax.options import DTYPES, choose
from prefalign_jax.processes import note
from prefalign_jax.progress import Progress
from prefalign_jax.sharding import make_mesh, param_shardings
from prefalign_jax.types import UserError

SAMPLE = {"prompt": "anything", "sample": "an integer"}  # of a row, what is read again
SAMPLE |= {"model": "a string", "seed": "an integer", "settings": "an object"}


class Draw(NamedTuple):
    """How samples are drawn; the file keeps it, and samples drawn otherwise are not added to it.

    Attributes:
      sampling: how the next token is drawn.
      seed: random seed; a sample is a function of it, the prompt and its number.
      max_new_tokens: tokens of a response at most.
      stop: texts that end a response; they are left out of it.
      chat_template: in place of the tokenizer's own.
      dtype: of the computation.
    """

    sampling: Sampling = Sampling()
    seed: int = 0
    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    chat_template: str | None = None
    dtype: str = "float32"

    def checked(self) -> Draw:
        """Itself.

        Raises:
          UserError: a value is out of range.
        """
        choose("--dtype", self.dtype, dict.fromkeys(DTYPES))
        if not all(self.stop):
            raise UserError("--stop: an empty text ends every response; leave it out")
        return self

    def settings(self) -> dict[str, Any]:
        """As a sample has them."""
        rest = {"max_new_tokens": self.max_new_tokens, "stop": [*self.stop]}
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
    mesh: Mapping[str, int] | None = None,
) -> None:
    """Samples responses to prompts; appends each to a file, with its tokens and their log-probabilities.

    Args:
      model: Hugging Face directory, hub name, or the working directory of a run.
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
    run = {"model": name or model, "seed": draw.seed, "settings": draw.settings()}
    with _file(out) as descriptor:
        done = held(out, descriptor, run)
        left = [(i, one) for i, one in enumerate(asked) if any((_key(one.prompt), j) not in done for j in range(n))]
        if not left:
            note(f"{out} holds all {n * len(asked)} samples")
            return
        tokens, samples = 0, _samples(model, dict(left), draw, n, batch_size, mesh or {"data": -1})
        with Progress(n * len(left), "sample") as progress:
            for count, (prompt, number, drawn, text) in enumerate(samples, 1):
                tokens += drawn.tokens.size
                progress.update(count, {"tokens": tokens})
                if (_key(prompt.prompt), number) in done:
                    continue
                row = Sample(prompt.prompt, text, id=prompt.id, **run)._asdict()
                row |= {"sample": number, "ended": drawn.ended}
                row |= {"tokens": drawn.tokens.tolist(), "logps": drawn.logps.tolist()}
                append(out, descriptor, (json.dumps(row, ensure_ascii=False) + "\n").encode())


def _samples(
    model: str, prompts: Mapping[int, Prompt], draw: Draw, n: int, batch_size: int, mesh: Mapping[str, int]
) -> Iterator[tuple[Prompt, int, Completion, str]]:
    """(prompt, number of the sample, what was drawn, its text) of the prompts, whose keys are their numbers."""
    directory = resolve(exported(model))
    tokenizer = load_tokenizer(directory, draw.chat_template)
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
    asked = [*prompts.values()]
    for i, number, drawn in stream(
        decoder,
        params,
        tokenize_prompts([one.prompt for one in asked], tokenizer),
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
    done = set()
    for number, text in enumerate(whole[: whole.rfind(b"\n") + 1].splitlines(), 1):
        try:
            row = parse_json(text, SAMPLE, where=f"--out={out}, row {number}")
        except UserError as error:
            raise UserError(f"{error}; this is no sample: name another file") from None
        done.add((_key(row["prompt"]), row["sample"]))
        before = {name: row[name] for name in run}
        for name, value in _flat(run).items():
            if (old := _flat(before).get(name)) != value:
                raise UserError(f"--out={out}: its samples have {name}={old!r}, not {value!r}; name another file")
    if not whole.endswith(b"\n"):
        os.ftruncate(descriptor, whole.rfind(b"\n") + 1)
    return done


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


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True)


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in run.items() if name != "settings"}, **run["settings"]}
