"""Samples responses: --model=DIR --prompts=FILE --out=samples.jsonl --n=4 --temperature=0.7 --max_new_tokens=256.

PROMPTS is JSONL with a 'prompt' a row, text or messages, or preference data of any format, whose prompts are taken.
Messages go through the tokenizer's chat template. Each line of the output is a sample with its tokens and their
log-probabilities. The same command goes on where it was stopped, with the samples that it would have drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefalign_jax.cli.parser import Parser

# Options of the next token's distribution, as `generation.sampling.Sampling` has them.
SAMPLING = {
    "temperature": (float, "the logits are divided by it; 0 takes the likeliest token (default: 1)"),
    "top_k": (int, "keep so many of the likeliest tokens; 0 keeps all (default)"),
    "top_p": (float, "keep the likeliest tokens that together have this probability (default: 1, all)"),
    "min_p": (float, "keep tokens at least this share as likely as the likeliest (default: 0, all)"),
    "repetition_penalty": (float, "makes tokens less likely that were there before (default: 1, does not)"),
}


def main(argv: Sequence[str]) -> None:
    """Draws the samples that the file does not hold."""
    parser = Parser("prefalign generate", __doc__)
    parser.add_argument("--model", required=True, help="directory, hub name, GGUF file, or --workdir of a run")
    parser.add_argument("--prompts", required=True, help="a file, directory or data set of the hub")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSONL that samples are appended to")
    parser.add_argument("--alpaca_eval", type=Path, metavar="FILE", help="JSON that gets them in AlpacaEval's format")
    parser.add_argument("--name", default="", help="the model's name in the samples; --model by default")
    parser.add_argument("--n", type=int, default=1, help="samples a prompt (default: 1)")
    parser.add_argument("--limit", type=int, metavar="N", help="prompts at most")
    parser.add_argument("--split", default="train", help="split of a data set (default: train)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--max_new_tokens", type=int, default=256, metavar="N", help="of a response (default: 256)")
    for name, (kind, what) in SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, metavar="X", help=what)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a response; repeatable")
    parser.add_argument("--chat_template", metavar="NAME", help="in place of the tokenizer's own")
    parser.add_argument("--chat_template_kwargs", metavar="JSON", help="its variables (default: those of the run)")
    parser.add_argument("--template_may_drop", metavar="PARTS", help="parts it may leave out (default: the run's)")
    parser.add_argument("--special_in_text", help="special tokens that prompts spell: keep, split (default: the run's)")
    parser.add_argument("--date", metavar="DAY", help="YYYY-MM-DD that it prints (default: the run's, or today)")
    parser.add_argument("--batch_size", type=int, default=64, metavar="N", help="responses at once (default: 64)")
    parser.add_argument("--dtype", default="float32", help="of the computation: float32 (default) or bfloat16")
    parser.add_argument("--fsdp", type=int, default=1, metavar="N", help="devices that share the parameters")
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="devices that share each product")
    options = parser.read(argv)
    from prefalign_jax.data.template import CHAT_FIELDS
    from prefalign_jax.generation.sample_files import read_samples, write_alpaca_eval
    from prefalign_jax.generation.sample_to_file import Draw, sample_to_file
    from prefalign_jax.generation.sampling import Sampling

    given = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
    drawn_by = ("seed", "max_new_tokens", "stop", "chat_template", "dtype", *CHAT_FIELDS)
    draw = Draw(Sampling(**given), **{name: getattr(options, name) for name in drawn_by})
    sample_to_file(
        options.model,
        options.prompts,
        options.out,
        draw,
        **{name: getattr(options, name) for name in ("name", "n", "limit", "split", "batch_size")},
        mesh={"data": None, "fsdp": options.fsdp, "tensor": options.tensor},
    )
    if options.alpaca_eval:
        write_alpaca_eval(options.alpaca_eval, read_samples(options.out))
