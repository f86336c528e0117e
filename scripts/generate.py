"""Samples responses: --model=DIR --prompts=FILE --out=samples.jsonl --n=4 --temperature=0.7 --max_new_tokens=256.

PROMPTS is JSONL with a 'prompt' a row, text or messages, or preference data of any format, whose prompts are taken.
Messages go through the tokenizer's chat template. Each line of the output is a sample with its tokens and their
log-probabilities. The same command goes on where it was stopped, with the samples that it would have drawn.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from prefalign_jax import cli
from prefalign_jax.data.chat import load_tokenizer, tokenize_prompts
from prefalign_jax.data.records import read_prompts
from prefalign_jax.generation.generate import stream, text_of
from prefalign_jax.generation.sample_files import Sample
from prefalign_jax.generation.sampling import Sampling
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.endings import split_stops, stop_ids
from prefalign_jax.models.hf_io import load_config, load_params, resolve
from prefalign_jax.options import choose
from prefalign_jax.progress import Progress
from prefalign_jax.sharding import make_mesh, param_shardings
from prefalign_jax.types import UserError

DTYPES = {"float32": "float32", "bfloat16": "bfloat16"}


def finished(out: Path, run: Mapping[str, Any]) -> set[tuple[str, int]]:
    """The (prompt, sample) that a file holds; a last line cut short is removed.

    Raises:
      UserError: the file is no samples, or of another run.
    """
    if not out.exists():
        return set()
    whole = out.read_bytes()
    done = set()
    for number, line in enumerate(whole[: whole.rfind(b"\n") + 1].splitlines(), 1):
        try:
            row = json.loads(line)
            done.add((_key(row["prompt"]), row["sample"]))
            before = {name: row[name] for name in run}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--out={out}, row {number}: this is no sample of this script; name another file") from None
        for name, value in _flat(run).items():
            if (old := _flat(before).get(name)) != value:
                raise UserError(f"--out={out}: its samples have {name}={old!r}, not {value!r}; name another file")
    if not whole.endswith(b"\n"):
        os.truncate(out, whole.rfind(b"\n") + 1)
    return done


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True)


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in run.items() if name != "settings"}, **run["settings"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the samples and appends them to the file, line by line."""
    parser = cli.Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face directory or hub name")
    parser.add_argument("--prompts", required=True, help="a file, directory or data set of the hub")
    parser.add_argument("--out", required=True, type=Path, help="JSONL file that samples are appended to")
    parser.add_argument("--name", default="", help="of the model, in the samples; by default what --model says")
    parser.add_argument("--n", type=int, default=1, help="samples a prompt")
    parser.add_argument("--limit", type=int, default=None, help="prompts at most")
    parser.add_argument("--split", default="train", help="of a data set")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="tokens of a response at most")
    for name, default in Sampling.__dataclass_fields__.items():
        parser.add_argument(f"--{name}", type=type(default.default), default=default.default, help="see sampling.py")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a response; repeatable")
    parser.add_argument("--chat_template", default=None, help="in place of the tokenizer's own")
    parser.add_argument("--batch_size", type=int, default=64, help="responses drawn together")
    parser.add_argument("--dtype", default="float32", help="of the computation: float32 or bfloat16")
    parser.add_argument("--fsdp", type=int, default=1, help="devices that share the parameters; the rest share rows")
    parser.add_argument("--tensor", type=int, default=1, help="devices that share each product")
    values = parser.parse_args(argv)
    sampling = Sampling(**{name: getattr(values, name) for name in Sampling.__dataclass_fields__})
    choose("--dtype", values.dtype, DTYPES)
    for name in ("n", "limit"):
        if (value := getattr(values, name)) is not None and value < 1:
            raise UserError(f"--{name}={value} is out of range; write at least 1")
    if not all(values.stop):
        raise UserError("--stop: an empty text ends every response; leave it out")

    directory = resolve(values.model)
    prompts, dropped = read_prompts(values.prompts, split=values.split, limit=values.limit)
    for reason, count in dropped.items():
        print(f"left out: {count} {reason}", file=sys.stderr)
    tokenizer = load_tokenizer(directory, values.chat_template)
    config = load_config(directory)
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"--model={values.model}: its {config.vocab_size} embeddings lack tokens of its tokenizer")
    settings = {**vars(sampling), "max_new_tokens": values.max_new_tokens, "stop": values.stop}
    settings |= {"chat_template": values.chat_template, "dtype": values.dtype}
    run = {"model": values.name or values.model, "seed": values.seed, "settings": settings}
    done = finished(values.out, run)
    left = [i for i, p in enumerate(prompts) if any((_key(p.prompt), j) not in done for j in range(values.n))]
    if not left:
        print(f"{values.out} holds all {values.n * len(prompts)} samples", file=sys.stderr)
        return
    mesh = make_mesh({"data": -1, "fsdp": values.fsdp, "tensor": values.tensor})
    model = make_decoder(config, dtype=values.dtype)
    shardings = param_shardings(mesh, jax.eval_shape(model.init, jax.random.key(0)))
    params = load_params(directory, config, shardings=shardings)

    def decode(tokens: Any) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    stop_tokens, stop_strings = split_stops(values.stop, tokenizer)
    drawn = stream(
        model,
        params,
        tokenize_prompts([prompts[i].prompt for i in left], tokenizer),
        numbers=left,
        n=values.n,
        seed=values.seed,
        max_new_tokens=values.max_new_tokens,
        stop_tokens=(*stop_ids(directory, tokenizer), *stop_tokens),
        sampling=sampling,
        stop_strings=stop_strings,
        decode=decode,
        batch_size=values.batch_size,
    )
    values.out.parent.mkdir(parents=True, exist_ok=True)
    progress, tokens = Progress(values.n * len(left), "sample"), 0
    with values.out.open("ab", buffering=0) as file:  # a line is one write: a killed run cuts at most its last
        for count, (i, j, found) in enumerate(drawn, 1):
            one = prompts[left[i]]
            tokens += found.tokens.size
            progress.update(count, {"tokens": tokens})
            if (_key(one.prompt), j) in done:
                continue
            text = text_of(found, decode, stop_strings)
            line = Sample(one.prompt, text, id=one.id, **run)._asdict() | {"sample": j, "ended": found.ended}
            line |= {"tokens": found.tokens.tolist(), "logps": found.logps.tolist()}
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
    progress.close()


if __name__ == "__main__":
    sys.exit(cli.status_of(main))
