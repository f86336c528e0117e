"""Reference log-probabilities without a frozen copy on the device: computed once and cached on disk."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from prefalign_jax.data.pipeline import PairSet, digest_of, eval_batches
from prefalign_jax.logps import VOCABULARY_CHUNK, preference_logps
from prefalign_jax.sharding import place_batch
from prefalign_jax.types import LanguageModel, Pair, PairLogps, Params

FORMAT = 1  # raise it whenever the numbers of an old cache would no longer be right


def compute(
    model: LanguageModel,
    params: Params,
    data: PairSet,
    *,
    mesh: Mesh | None = None,
    chunk: int = VOCABULARY_CHUNK,
    progress: Callable[[int], None] = lambda done: None,
) -> PairLogps:
    """Log-probabilities of every pair, one pass over the data.

    Args:
      model: pure functions of params.
      params: of the reference.
      data: the pairs, with micro_steps 1.
      mesh: deals the rows of a batch to its devices; None computes on one.
      chunk: columns of logits at once.
      progress: called with the number of pairs done.

    Returns:
      `PairLogps` of float32 NumPy arrays [len(data.pairs)], without prompt.
    """

    @jax.jit
    def logps(params, batch):
        out = preference_logps(model, params, jax.tree.map(lambda x: x[0], batch), chunk)
        return out.chosen, out.rejected, out.chosen_tokens, out.rejected_tokens

    out = np.zeros((4, len(data.pairs)), np.float32)
    for batch in eval_batches(data):
        real = batch.index[0] >= 0
        out[:, batch.index[0][real]] = np.stack(jax.device_get(logps(params, place_batch(mesh, batch))))[:, real]
        progress(int(batch.index.max()) + 1)
    return PairLogps(*out)


def cache_key(model: LanguageModel, weights: str, pairs: Sequence[Pair], dtype: str) -> str:
    """A digest of everything that changes a cached number.

    That is: the weights, the shape of the model, the compute type, and the tokens of every pair, which hold whatever
    the data, the template, the lengths and the truncation made of them.

    Args:
      model: its config enters.
      weights: `params_digest` of the reference.
      pairs: every token enters, with the roles.
      dtype: compute type.

    Returns:
      64 hexadecimal digits.
    """
    what = f"{FORMAT} {model.config} {dtype} {weights} {digest_of(pairs)}"
    return hashlib.sha256(what.encode()).hexdigest()


def params_digest(params: Params) -> str:
    """SHA-256 of every array's name, type, shape and bytes, one array at a time: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def cached(path: Path, make: Callable[[], PairLogps]) -> PairLogps:
    """Reads log-probabilities from a file named after their key, or makes and writes them.

    The file appears whole or not at all: it is written beside its place and renamed. One that cannot be read is made
    anew.

    Args:
      path: .npz file, named by `cache_key`.
      make: computes what is missing.

    Returns:
      `PairLogps` of NumPy arrays.
    """
    names = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
    if path.exists():
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return PairLogps(*(stored[name] for name in names))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass
    logps = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez(file, **{name: getattr(logps, name) for name in names})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return logps
