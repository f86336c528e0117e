"""Where reference log-probabilities come from besides a frozen copy: a cache on disk, or a copy that moves."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence, Set
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from prefalign_jax.data.pairs import digest_of
from prefalign_jax.data.pipeline import PairSet, eval_batches
from prefalign_jax.files import whole
from prefalign_jax.logps import REFERENCE_NEEDS, VOCABULARY_CHUNK, preference_logps
from prefalign_jax.sharding import place_batch
from prefalign_jax.types import LanguageModel, Pair, PairLogps, Params, Sides

FORMAT = 2  # raise it whenever the numbers of an old cache would no longer be right


def compute(
    model: LanguageModel,
    params: Params,
    data: PairSet,
    *,
    mesh: Mesh | None = None,
    chunk: int = VOCABULARY_CHUNK,
    progress: Callable[[int], None] = lambda done: None,
    needs: Set[str] = frozenset(),
) -> PairLogps:
    """Log-probabilities of every pair, one pass over the data.

    Args:
      model: pure functions of params.
      params: of the reference.
      data: the pairs, with micro_steps 1.
      mesh: deals the rows of a batch to its devices; None computes on one.
      chunk: columns of logits at once.
      progress: called with the number of pairs done.
      needs: of the loss; what it reads of the reference is computed.

    Returns:
      `PairLogps` of float32 NumPy arrays [len(data.pairs)], with what `needs` names and without prompt.
    """

    @jax.jit
    def logps(params, batch):
        out = preference_logps(model, params, jax.tree.map(lambda x: x[0], batch), chunk, needs & REFERENCE_NEEDS)
        return PairLogps(*out[:4], shared=out.shared, sampled=out.sampled)

    out = None
    for batch in eval_batches(data):
        real = batch.index[0] >= 0
        found = jax.device_get(logps(params, place_batch(mesh, batch)))
        out = out or jax.tree.map(lambda x: np.zeros(len(data.pairs), np.float32), found)
        for column, values in zip(jax.tree.leaves(out), jax.tree.leaves(found), strict=True):
            column[batch.index[0][real]] = values[real]
        progress(int(batch.index.max()) + 1)
    return out


def cache_key(
    model: LanguageModel, weights: str, pairs: Sequence[Pair], dtype: str, needs: Set[str] = frozenset()
) -> str:
    """A digest of everything that changes a cached number.

    That is: the weights, the shape of the model, the compute type, which sums the loss reads, and the tokens of every
    pair, which hold whatever the data, the template, the lengths and the truncation made of them.

    Args:
      model: its config enters.
      weights: `params_digest` of the reference.
      pairs: every token enters, with the roles.
      dtype: compute type and precision.
      needs: of the loss.

    Returns:
      64 hexadecimal digits.
    """
    what = f"{FORMAT} {model.config} {dtype} {weights} {sorted(needs & REFERENCE_NEEDS)} {digest_of(pairs)}"
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
                sides = {
                    name: Sides(*(stored[f"{name}.{side}"] for side in Sides._fields))
                    for name in sorted(REFERENCE_NEEDS)
                    if f"{name}.chosen" in stored
                }
                return PairLogps(*(stored[name] for name in names), **sides)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass
    logps = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    sides = {
        f"{name}.{side}": value
        for name in REFERENCE_NEEDS
        if getattr(logps, name) is not None
        for side, value in getattr(logps, name)._asdict().items()
    }
    with whole(path) as part, part.open("wb") as file:
        np.savez(file, **{name: getattr(logps, name) for name in names}, **sides)
    return logps


def mover(mixup: float, every: int) -> Callable[[jax.Array, Params, Params], Params]:
    """Every `every` steps: reference <- mixup policy + (1 - mixup) reference.

    Args:
      mixup: 1 replaces the reference (the paper's hard update), less mixes (its soft update).
      every: steps between updates; the paper's tau.

    Returns:
      (steps done, policy's parameters, reference's) -> the reference's parameters for the next step.

    Source: TR-DPO, Gorbatovski et al., arXiv 2404.09656, section 3, where soft updates come every step and hard ones
      now and then; TRL's `sync_ref_model`, like this, mixes every so many steps.

    Example:
      >>> move = mover(0.5, 2)
      >>> print(*(move(step, {"w": np.float32(4)}, {"w": np.float32(0)})["w"] for step in (1, 2)))
      0.0 2.0
    """

    def mix(policy: Params, reference: Params) -> Params:
        return jax.tree.map(lambda p, r: (mixup * p + (1 - mixup) * r).astype(r.dtype), policy, reference)

    def move(step: jax.Array, policy: Params, reference: Params) -> Params:
        return jax.lax.cond(step % every == 0, mix, lambda policy, reference: reference, policy, reference)

    return move
