"""Where reference log-probabilities come from besides a frozen copy: a cache on disk, or a copy that moves."""

from __future__ import annotations

import functools
import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prefalign_jax.data.pairs import digest_of
from prefalign_jax.data.pipeline import PairSet, eval_batches
from prefalign_jax.files import intact, remove_parts, sealed
from prefalign_jax.logps import REFERENCE_NEEDS, VOCABULARY_CHUNK, preference_logps
from prefalign_jax.processes import all_have, by_first, note
from prefalign_jax.sharding import place_batch
from prefalign_jax.types import LanguageModel, Pair, PairLogps, Params, PreferenceBatch, Responses, Sides

FORMAT = 3  # raise it whenever the numbers of an old cache would no longer be right


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
    logps, out = _program(model, mesh, chunk, frozenset(needs) & REFERENCE_NEEDS), None
    for batch in eval_batches(data):
        real = batch.index[0] >= 0
        computed = jax.device_get(logps(params, place_batch(mesh, batch)))
        out = out or jax.tree.map(lambda x: np.zeros((len(data.pairs), *x.shape[1:]), np.float32), computed)
        for column, values in zip(jax.tree.leaves(out), jax.tree.leaves(computed), strict=True):
            column[batch.index[0][real]] = values[real]
        progress(int(batch.index.max()) + 1)
    return out


@functools.lru_cache(maxsize=8)  # what is computed again, as at every evaluation, is not compiled again
def _program(model: LanguageModel, mesh: Mesh | None, chunk: int, needs: frozenset[str]) -> Callable[..., PairLogps]:
    @functools.partial(jax.jit, out_shardings=mesh and NamedSharding(mesh, P()))
    def logps(params: Params, batch: PreferenceBatch) -> PairLogps:
        out = preference_logps(model, params, jax.tree.map(lambda x: x[0], batch), chunk, needs)
        return PairLogps(*out[:4], shared=out.shared, sampled=out.sampled, responses=out.responses)

    return logps


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
    """A digest of every array's name, type, shape and bits, the same however they lie: 64 hexadecimal digits.

    Each array is summed up where it lies, in 64 bits that depend on every bit and its place.
    """
    digest, leaves = hashlib.sha256(), jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get(_all_bit_sums([leaf for _, leaf in leaves]))
    for (path, leaf), each in zip(leaves, sums, strict=True):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.asarray(each).tobytes())
    return digest.hexdigest()


@jax.jit
def _all_bit_sums(arrays: list[jax.Array]) -> list[jax.Array]:
    """Of each; one program for all, since compiling takes longer than running."""
    return list(map(_bit_sums, arrays))


def _bit_sums(x: jax.Array) -> jax.Array:
    """[2] uint32: sums of hashes of (bits, place), of which the order of summation changes nothing."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis in range(x.ndim):
        place = place * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    h = (bits ^ place) + jnp.uint32(1)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)  # MurmurHash3's finaliser
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    h = h ^ (h >> 16)
    return jnp.stack([jnp.sum(h), jnp.sum(h * (2 * place + 1))])


def cached(path: Path, make: Callable[[], PairLogps]) -> PairLogps:
    """Reads log-probabilities from a file named after their key, or makes and writes them.

    The file appears whole or not at all, and its checksum beside it. One that is not to the bit what was written is
    made anew. Of several processes each reads it, and the first writes it.

    Args:
      path: .npz file, named by `cache_key`.
      make: computes what is missing.

    Returns:
      `PairLogps` of NumPy arrays.
    """
    return cached_arrays(path, lambda: _as_arrays(make()), _as_logps, "the reference's log-probabilities are")


T = TypeVar("T")


def cached_arrays(
    path: Path, make: Callable[[], Mapping[str, np.ndarray]], read: Callable[[Mapping[str, np.ndarray]], T], what: str
) -> T:
    """As `cached`, of any arrays.

    Args:
      path: .npz file, named by a key.
      make: computes what is missing, by name.
      read: what they mean; a KeyError or ValueError says that the file is damaged.
      what: they are, with the verb, for the note that they are computed anew.
    """
    stored = _read(path, read, what)
    if all_have(stored is not None):
        return stored
    arrays = make()
    by_first(lambda: _write(path, arrays))
    return read(arrays)


_SUMS = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
_RECORDS = {"shared": Sides, "sampled": Sides, "responses": Responses}  # fields that are there only for some losses


def _as_arrays(logps: PairLogps) -> dict[str, np.ndarray]:
    records = {
        f"{name}.{field}": value
        for name in _RECORDS
        if getattr(logps, name) is not None
        for field, value in getattr(logps, name)._asdict().items()
    }
    return {name: getattr(logps, name) for name in _SUMS} | records


def _as_logps(arrays: Mapping[str, np.ndarray]) -> PairLogps:
    records = {
        name: kind(*(arrays[f"{name}.{field}"] for field in kind._fields))
        for name, kind in _RECORDS.items()
        if f"{name}.{kind._fields[0]}" in arrays
    }
    return PairLogps(*(arrays[name] for name in _SUMS), **records)


def _read(path: Path, read: Callable[[Mapping[str, np.ndarray]], T], what: str) -> T | None:
    if not path.exists():
        return None
    try:
        if not intact(path):
            raise ValueError
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return read(stored)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        note(f"{path} is damaged; {what} computed anew")
        return None


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    remove_parts(path.parent)
    with sealed(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)


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
