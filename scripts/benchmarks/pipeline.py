"""The input pipeline: reading, tokenizing, the cache, packing."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.inputs import pairs_for, write_pairs
from benchmarks.measuring import GIB, measured
from prefalign_jax.config import defaults
from prefalign_jax.data.chat import load_tokenizer
from prefalign_jax.data.pipeline import balanced, batch_of, make_pair_set, train_batches
from prefalign_jax.data.trees import Layout, lengths_of
from prefalign_jax.experiment import read
from prefalign_jax.load_data import load_pairs
from prefalign_jax.types import Pair, UserError


def pack(*, data: str = "", vocabulary: int = 49152, max_length: int = 512, pairs: str = "8,64,512") -> dict[str, Any]:
    """The input pipeline alone, on one core: pairs packed in a second.

    Args:
      data: a file of preference pairs, tokenized as in `train`.
      vocabulary: of the tokenizer.
      max_length: longer pairs are left out.
      pairs: batch sizes.

    Returns:
      For each batch size pairs a second and the share of positions that is padding.
    """
    if not data:
        raise UserError("--data is missing: a file of preference pairs")
    sizes = [int(text) for text in pairs.split(",")]
    if min(sizes) < 1:
        raise UserError(f"--pairs={pairs} must be positive")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        path = Path(scratch) / "pairs.json"
        path.write_text(json.dumps(pairs_for(data, vocabulary, max(sizes), 1, max_length)))
        figures, *_ = measured("pipeline.pack_step", path=str(path), sizes=sizes, devices=1)
    return figures


def pack_step(path: str, sizes: Sequence[int], devices: int) -> dict[str, Any]:
    """Packs for two seconds a batch size, in the order of training."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    sides = json.loads(Path(path).read_text()).values()
    data = [Pair(*(np.array(ids, np.int32) for ids in three)) for three in zip(*sides, strict=True)]
    mean = float(lengths_of(data, Layout()).pieces.mean())
    figures: dict[str, Any] = {"pairs": float(len(data)), "tokens a pair": mean}
    for size in sizes:
        began = time.perf_counter()
        chosen = make_pair_set(data, size)
        figures[f"{size} pairs: shapes chosen, s"] = time.perf_counter() - began
        batches = balanced(chosen.lengths, size)
        done, tokens, positions, began = 0, 0, 0, time.perf_counter()
        while time.perf_counter() - began < 2:
            batch = batch_of(chosen, batches[done % len(batches)])
            done += 1
            tokens, positions = tokens + np.count_nonzero(batch.segments), positions + batch.segments.size
        figures[f"{size} pairs: packed, pairs/s"] = done * size / (time.perf_counter() - began)
        figures[f"{size} pairs: padding, share of positions"] = float(1 - tokens / positions)
    return figures


def data(*, pairs: float = 1e6, max_length: int = 512, keep: str = "") -> dict[str, Any]:
    """A file of made-up pairs -> the first batch, read and tokenized, and again from the cache, in a process each.

    Args:
      pairs: in the file, about 70 tokens each.
      max_length: longer pairs are left out.
      keep: directory for the file and the cache, or where an earlier run left them; none is a temporary one.

    Returns:
      For both seconds to the first batch, by the clock and of all processors, imports left out, and peaks of memory,
      imports included. File-backed memory is mapped from the files, and free for others to take.
    """
    if pairs < 16 or max_length < 2:
        raise UserError(f"--pairs={pairs:g} must be at least 16 and --max_length={max_length} at least 2")
    with contextlib.ExitStack() as stack:
        directory = Path(keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        file = directory / f"{int(pairs)}.jsonl"
        write_pairs(directory, file, int(pairs))
        out: dict[str, Any] = {"file, GiB": file.stat().st_size / GIB}
        for name in ("made", "cached"):
            step = dict(path=str(file), max_length=max_length, made=name == "made", devices=1)
            figures, anonymous, mapped = measured("pipeline.data_step", **step)
            out |= {f"{name}: {key}": value for key, value in figures.items()}
            out[f"{name}: peak anonymous memory, GiB"] = anonymous / GIB
            out[f"{name}: peak file-backed memory, GiB"] = mapped / GIB
    return out


def data_step(path: str, max_length: int, made: bool, devices: int) -> dict[str, Any]:
    """Seconds to the first batch of a file of pairs, and what the batches after it take."""
    directory = Path(path).parent
    config = defaults("dpo")
    config.data.path, config.data.cache_dir, config.max_length = path, str(directory / "cache"), max_length
    if made:
        shutil.rmtree(directory / "cache", ignore_errors=True)
    began, busy = time.perf_counter(), time.process_time()
    tokenizer = load_tokenizer(directory / "tokenizer")
    pairs = load_pairs(read(config, complete=False), tokenizer).training
    loaded = time.perf_counter()
    set_ = make_pair_set(pairs, config.batch_size)
    batches = train_batches(set_, seed=0, shuffle=True, start=0, stop=max(1, len(pairs) // config.batch_size))
    next(batches)
    first, busy = time.perf_counter(), time.process_time() - busy
    more = sum(1 for _ in itertools.islice(batches, 1000))
    rate = more * config.batch_size / (time.perf_counter() - first)
    tokens = int(pairs.length.sum())
    return {
        "pairs": len(pairs),
        "tokens, millions": tokens / 1e6,
        "seconds to the pairs": loaded - began,
        "seconds to the first batch": first - began,
        "processor seconds to it": busy,
        "pairs a second after it": rate,
    }
