"""Shapes, random weights and pairs that benchmarks take."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tokenizers
import transformers
from safetensors.numpy import save_file

from prefalign_jax.data.pipeline import balanced
from prefalign_jax.data.records import read_records
from prefalign_jax.data.trees import Layout, lengths_of
from prefalign_jax.files import whole, write_json
from prefalign_jax.models import families, hf_io
from prefalign_jax.models.decoder import DecoderConfig, make_decoder
from prefalign_jax.types import Pair, UserError

SHAPES = {
    "tiny": DecoderConfig(512, 64, 128, 2, num_heads=4, num_kv_heads=2, head_dim=16, tie_embeddings=True),
    "smollm2-135m": DecoderConfig(49152, 576, 1536, 30, num_heads=9, num_kv_heads=3, head_dim=64, tie_embeddings=True),
    "smollm2-1.7b": DecoderConfig(
        49152, 2048, 8192, 24, num_heads=32, num_kv_heads=32, head_dim=64, tie_embeddings=True
    ),
    "llama-7b": DecoderConfig(32000, 4096, 11008, 32, num_heads=32, num_kv_heads=32, head_dim=128),
}
FIXED = re.compile(r"(\d+)\+(\d+)")  # --lengths of random tokens, else a source of pairs
GROUPS = re.compile(r"(\d+)\+(\d+)x(\d+)")  # the same by medians, of so many responses to a prompt
SPREAD = 0.5  # of the logarithm of lengths around their medians
EOS = 0  # of the pairs below


def random_params(config: DecoderConfig, dtype: str) -> Any:
    """Parameters distributed as `init` draws them, but by NumPy and with repetitions: billions in seconds."""
    rng = np.random.default_rng(0)

    def drawn(path, x: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(x.shape, x.dtype)
        block = (config.init_std * rng.standard_normal(min(x.size, 2**24), np.float32)).astype(x.dtype)
        return np.resize(block, x.shape)

    return jax.tree_util.tree_map_with_path(
        drawn, jax.eval_shape(make_decoder(config, param_dtype=dtype).init, jax.random.key(0))
    )


def pairs_for(lengths: str, vocabulary: int, size: int, steps: int, max_length: int) -> dict[str, list[list[int]]]:
    """Token ids of {prompt, chosen, rejected}, in balanced batches one after the other."""
    if fixed := FIXED.fullmatch(lengths):
        prompt, response = map(int, fixed.groups())
        rng = np.random.default_rng(0)

        def ids(count: int, end: list[int]) -> list[int]:
            return [*rng.integers(2, vocabulary, count - len(end)).tolist(), *end]

        drawn = [(ids(prompt, []), ids(response, [EOS]), ids(response, [EOS])) for _ in range(size * steps)]
    elif several := GROUPS.fullmatch(lengths):
        prompt, response, count = map(int, several.groups())
        if size % (count * (count - 1) // 2):
            raise UserError(
                f"--pairs={size} is no multiple of the {count * (count - 1) // 2} pairs of {count} responses"
            )
        rng, drawn = np.random.default_rng(0), []

        def around(median: int, most: int) -> int:
            return int(np.clip(median * np.exp(SPREAD * rng.normal()), 2, most))

        while len(drawn) < size * steps:
            asked = rng.integers(2, vocabulary, around(prompt, max_length // 2)).tolist()
            room = max_length - len(asked)
            answers = [rng.integers(2, vocabulary, around(response, room) - 1).tolist() + [EOS] for _ in range(count)]
            drawn += [(asked, *pair) for pair in itertools.combinations(answers, 2)]
        drawn = dealt(drawn, size) if count == 2 else drawn  # more have to stay together
    else:
        records, _ = read_records(lengths)
        texts = [(record.prompt, record.chosen, record.rejected) for record in records]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["</s>", "<unk>"])
        tokenizer.train_from_iterator((text for three in texts for text in three), trainer)
        encoded = [[one.ids for one in tokenizer.encode_batch(list(three))] for three in texts]
        drawn = [(prompt, chosen + [EOS], rejected + [EOS]) for prompt, chosen, rejected in encoded]
        drawn = [x for x in drawn if len(x[0]) + max(len(x[1]), len(x[2])) <= max_length and x[1] != x[2]]
        drawn = dealt(drawn, size)
    if len(drawn) < size * steps:
        raise UserError(f"{lengths}: {len(drawn)} pairs of at most {max_length} tokens are not enough")
    return dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*drawn, strict=True)), strict=True))


def dealt(drawn: list[tuple[list[int], ...]], size: int) -> list[tuple[list[int], ...]]:
    """Pairs in another order, in which batches hold about as many tokens each."""
    lengths = lengths_of([Pair(*map(np.array, x)) for x in drawn], Layout())
    order = np.random.default_rng(0).permutation(len(drawn))
    batches = balanced(lengths.of(order), size)
    return [drawn[i] for b in np.random.default_rng(1).permutation(len(batches)) for i in order[batches[b]]]


def write_pairs(directory: Path, file: Path, count: int) -> None:
    """A file of made-up preference pairs of different lengths and a tokenizer beside it, unless they are there."""
    if file.exists() and (directory / "tokenizer").exists():
        return
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(5000)]
    often = rng.zipf(1.3, 400_000) % len(words)
    sentences = [" ".join(words[i] for i in often[at : at + rng.integers(5, 20)]) + "." for at in range(0, 380_000, 20)]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=8192, special_tokens=["</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(sentences, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    wrapped.save_pretrained(directory / "tokenizer")

    def text(most: int) -> str:
        return " ".join(sentences[i] for i in rng.integers(0, len(sentences), rng.integers(1, most + 1)))

    with whole(file) as part, part.open("w", encoding="utf-8") as out:
        for number in range(count):
            row = {"prompt": f"Question {number}. {text(3)}", "chosen": f" {text(2)}", "rejected": f" {text(2)}"}
            out.write(json.dumps(row) + "\n")


def shape_of(params: float) -> DecoderConfig:
    """The Llama of nearest size, of 64-wide heads in groups of 4, with a layer for every 128 of width."""

    def shape(width: int) -> DecoderConfig:
        heads = dict(num_heads=width // 64, num_kv_heads=max(1, width // 256), head_dim=64)
        layers = max(2, width // 128)
        return DecoderConfig(16 * width, width, 7 * width // 2, layers, **heads)

    def size(config: DecoderConfig) -> int:
        return sum(int(np.prod(shape)) for _, shape in llama_tensors(config))

    return min((shape(width) for width in range(64, 16385, 64)), key=lambda config: abs(size(config) - params))


def llama_tensors(c: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and stored shape of every tensor; written out, since asking the decoder would occupy the device."""
    width, inner, heads, kv = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield "model.embed_tokens.weight", (c.vocab_size, width)
    for layer in range(c.num_layers):
        for name, shape in (
            ("self_attn.q_proj", (heads, width)),
            ("self_attn.k_proj", (kv, width)),
            ("self_attn.v_proj", (kv, width)),
            ("self_attn.o_proj", (width, heads)),
            ("mlp.gate_proj", (inner, width)),
            ("mlp.up_proj", (inner, width)),
            ("mlp.down_proj", (width, inner)),
            ("input_layernorm", (width,)),
            ("post_attention_layernorm", (width,)),
        ):
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (c.vocab_size, width)


def write_checkpoint(directory: Path, config: DecoderConfig, tensors: dict[str, tuple[int, ...]]) -> None:
    """Random weights in bfloat16, in up to four files and an index; a whole one that is there already is left alone.

    Raises:
      UserError: the directory holds something else.
    """
    wanted, written = families.to_hf(config), directory / "config.json"
    if written.is_file():
        if json.loads(written.read_text(encoding="utf-8")) != wanted:
            raise UserError(f"--keep={directory} holds another model; name another directory, or its --params")
        return
    directory.mkdir(parents=True, exist_ok=True)
    rng, total = np.random.default_rng(0), sum(int(np.prod(shape)) for shape in tensors.values())
    parts, used = [[]], 0
    for name, shape in tensors.items():
        if used > total * len(parts) / 4:
            parts.append([])
        parts[-1].append(name)
        used += int(np.prod(shape))
    weight_map = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        drawn = {name: rng.standard_normal(tensors[name], np.float32) for name in names}
        save_file({name: (0.02 * x).astype(ml_dtypes.bfloat16) for name, x in drawn.items()}, directory / file)
    write_json(directory / hf_io.INDEX, {"metadata": {"total_size": 2 * total}, "weight_map": weight_map})
    write_json(written, wanted)  # last: it says that the rest is whole
