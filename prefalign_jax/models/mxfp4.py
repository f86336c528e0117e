"""MXFP4, as gpt-oss is published: 4-bit numbers in blocks of 32 that share a power of two. Read, never written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

BLOCK = 32
# The values of the codes 0 to 15: a sign, two bits of exponent, one of mantissa.
FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], np.float32)
SCALES = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan))
_BLOCKS, _SCALES = "_blocks", "_scales"


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The numbers that codes and scales stand for, FP4[code] 2^(scale - 127); bfloat16 holds them exactly.

    Args:
      blocks: [..., n, 16] uint8, two codes a byte, the first in the lower half.
      scales: [..., n] uint8; 255 stands for NaN.

    Returns:
      [..., 32 n] float32.

    Source: OCP Microscaling Formats (MX) specification 1.0, sections 5.3.3 and 5.4.1.

    Example:
      >>> blocks = np.full((1, 16), 0x2F, np.uint8)  # codes 15 and 2: -6 and 1
      >>> dequantize(blocks, np.array([128], np.uint8))[:4].tolist()
      [-12.0, 2.0, -12.0, 2.0]
    """
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], BLOCK)
    return (FP4[codes] * SCALES[scales][..., None]).reshape(*blocks.shape[:-2], -1)


class Tensor(NamedTuple):
    """The kernels of all experts, [E, in, out], whose inputs lie in blocks. What is read is unpacked, and no more.

    Attributes:
      name: without what sets blocks and scales apart.
      blocks: [E, out, in / 32, 16].
      scales: [E, out, in / 32].
      outputs: which of the outputs these are, where those of several products take turns.
    """

    name: str
    blocks: Any
    scales: Any
    outputs: slice = slice(None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        experts, outputs, blocks, _ = self.blocks.shape
        return experts, blocks * BLOCK, len(range(outputs)[self.outputs])

    @property
    def dtype(self) -> np.dtype:
        """The narrowest type that holds the values."""
        return np.dtype(jnp.bfloat16)

    @property
    def stored(self) -> str:
        """The type of the values, in the word of safetensors."""
        return "BF16"

    def turn(self, number: int, count: int) -> Tensor:
        """Every `count`-th output, from this one on."""
        return self._replace(outputs=slice(number, None, count))

    def __getitem__(self, index: Any) -> np.ndarray:
        experts, inputs, outputs = index
        start, stop, _ = inputs.indices(self.shape[1])
        first, last = start // BLOCK, -(-stop // BLOCK)
        parts = [x.view()[experts, self.outputs][:, outputs, first:last] for x in (self.blocks, self.scales)]
        values = np.empty((len(parts[0]), stop - start, parts[0].shape[1]), self.dtype)
        for value, blocks, scales in zip(values, *parts, strict=True):  # one expert at a time is wide
            value[:] = dequantize(blocks, scales)[:, start - first * BLOCK : stop - first * BLOCK].T
        return values


def whole(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a model, each pair of blocks and scales as the one that it stands for.

    Args:
      stored: name -> tensor.

    Returns:
      The same, with a `Tensor` in the place of every such pair of bytes that fit each other.
    """
    out = dict(stored)
    for name in stored:
        blocks, scales = stored[name], stored.get(name.removesuffix(_BLOCKS) + _SCALES)
        if not name.endswith(_BLOCKS) or scales is None or {blocks.stored, scales.stored} != {"U8"}:
            continue
        if len(blocks.shape) == 4 and blocks.shape == (*scales.shape, BLOCK // 2):
            del out[name], out[scales.name]
            out[name.removesuffix(_BLOCKS)] = Tensor(name.removesuffix(_BLOCKS), blocks, scales)
    return out
