"""Hugging Face model directories: safetensors in and out, never pickle, one tensor at a time.

A GGUF file is read as the directory that it could have been made of; what reads one here takes either path.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from prefalign_jax.files import marked, read_json, write_json, writing
from prefalign_jax.gguf.file import gguf_file
from prefalign_jax.models import families, gguf_io, mxfp4
from prefalign_jax.models.decoder import DecoderConfig, make_decoder
from prefalign_jax.models.families import multimodal
from prefalign_jax.models.quantize import quantize, quantize_params, quantized_paths
from prefalign_jax.processes import fetch, is_first
from prefalign_jax.types import Params, UserError, one_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("float32", "bfloat16", "float16")
SEEN = 64  # rows of two tables that are compared where a config.json alone is read
# Not the original/ or onnx/ folders, nor a second copy of the weights under another name.
_DOWNLOAD = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
_IGNORE = ["*/*", "*.bin", "*.py"]
_STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
# Fields of a base's config.json that do not describe the exported model: how it is stored, and code that nobody runs.
_NOT_KEPT = ("dtype", "torch_dtype", "auto_map", "_name_or_path", "transformers_version", "quantization_config")
# Recomputed from the config; older files still hold them.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")


def resolve(name: str | pathlib.Path) -> pathlib.Path:
    """Finds a model directory or GGUF file, fetching it from the Hugging Face hub if the name is not a local one.

    Args:
      name: a local directory, a file NAME.gguf, a key of `gguf.file.PACKAGED` such as `smollm2`, or a hub name such as
        `HuggingFaceTB/SmolLM2-135M-Instruct`.

    Returns:
      The local directory or file.

    Raises:
      UserError: there is none.
    """
    if file := gguf_file(name):
        return file
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        if (path / "metrics.jsonl").is_file() and (path / "export" / "config.json").is_file():
            raise UserError(f"{path} is a run; name its model, {path / 'export'}")
        return path
    if str(name).startswith(("/", ".", "~")) or str(name).count("/") > 1:  # a name on the hub has one
        raise UserError(f"model {str(name)!r}: no such directory")
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(str(name), allow_patterns=_DOWNLOAD, ignore_patterns=_IGNORE)
        )
    except (OSError, ValueError) as error:  # the hub's own errors are both or either
        raise UserError(
            f"model {str(name)!r} is neither a directory nor a model that the hub gives out: {one_line(error)}"
        ) from error


def load_config(directory: str | pathlib.Path) -> DecoderConfig:
    """Reads config.json.

    Args:
      directory: a Hugging Face model directory, or a GGUF file.

    Returns:
      The decoder's shape; `reward` says what the directory holds, and may be replaced by True to train a reward model
      from a language model.

    Raises:
      UserError: the file is missing, is not JSON, or describes a model that the decoder does not compute.
    """
    return DecoderConfig(**families.from_hf(read_object(pathlib.Path(directory) / "config.json")))


def load_params(
    directory: str | pathlib.Path,
    config: DecoderConfig,
    *,
    dtype: str = "float32",
    quantize: str | None = None,
    shardings: Any = None,
) -> Params:
    """Reads the weights tensor by tensor onto their devices, of which each is sent its own part.

    The host holds one tensor at a time, as it is stored; types are changed and kernels quantized on the devices, before
    they are stacked. So there is nowhere a second copy of the model.

    A reward model may start from a language model: its head is left out on purpose then, and the score is zeros.

    Args:
      directory: a Hugging Face model directory with safetensors files, or a GGUF file.
      config: its shape, from `load_config`, with `reward` as the caller wants the model.
      dtype: type of the parameters whatever the stored one, or 'stored' to keep that: of layers that differ the one
        that holds both, float32 for float64, and for a score of zeros.
      quantize: one of quantize.QUANTIZATIONS for the kernels of the linear layers, None for none.
      shardings: None, or a tree like the parameters' with a NamedSharding for each.

    Returns:
      The parameter tree of `make_decoder`, or what `quantize_params` makes of it, to the bit.

    Raises:
      UserError: a file is missing or broken; a tensor is missing, unknown, of the wrong shape or type, or not finite;
        the tied embedding and head differ; a language model is asked for and this is a reward model; or there are only
        pickle files, which could run any code when opened.
    """
    directory = pathlib.Path(directory)
    hf = read_object(directory / "config.json")
    architecture, scored = families.family(config.family).reward_architecture, families.is_reward(hf)
    if scored and not config.reward:
        raise UserError(
            f"{directory} is a reward model ({architecture}), which has no head to predict tokens with; "
            "set loss.name=bradley_terry, or name a language model"
        )
    shapes = param_shapes(config)
    stored = _open(directory)
    _add_prefix(stored, config)
    head, embedding = (families.name_of(config, path) for path in ("head/kernel", "embed/embedding"))
    if config.tie_embeddings and not scored:
        _untie(stored, head, embedding)
    if config.reward and not scored:
        stored.pop(head, None)
        stored.pop(families.name_of(config, "head/bias"), None)
    if scored and families.SCORE in stored:
        shape = stored[families.SCORE].shape
        if len(shape) == 2 and shape[0] != 1:  # config.json was silent, as transformers is of 2 labels
            raise UserError(f"{directory}: {families.SCORE} has {shape[0]} labels where a reward model has 1")
    parts = collections.defaultdict(list)  # table row -> its tensors in the order of the layers
    for name, rows, _ in families.weights(config):
        if name == families.SCORE and not scored:
            parts[rows[0]].append(np.zeros(shapes[rows[0].path], np.float32))  # as `Score` begins
            continue
        if name not in stored:
            raise UserError(f"{directory}: tensor {name} is missing")
        tensor = stored.pop(name)
        sizes = [shapes[row.path][-1] for row in rows]
        shape = (*shapes[rows[0].path][rows[0].name.count("{}") : -1], sum(sizes))
        _check(directory, name, tensor, shape[::-1] if rows[0].transpose else shape)
        for number, row in enumerate(rows):
            parts[row].append(_part(tensor, rows, number, sizes, config.num_heads))
    unknown = [name for name in stored if not _BUFFERS.search(name)]
    if families.SCORE in unknown:
        raise UserError(
            f"{directory}: tensor {families.SCORE} is a reward model's, but config.json does not say so; "
            f'it should have "architectures": ["{architecture}"]'
        )
    if unknown:
        raise UserError(
            f"{directory}: tensor {unknown[0]} has no place in a {config.family} model of {config.num_layers} "
            f"layers ({len(unknown)} such)"
        )
    return _place(parts, shapes, dtype, quantize, shardings)


def save_params(
    params: Params,
    config: DecoderConfig,
    directory: str | pathlib.Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: float = 5e9,
    base: str | pathlib.Path | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and safetensors under Hugging Face's names; the directory appears whole or not at all.

    Args:
      params: the parameter tree of `make_decoder`, wherever its parts lie.
      config: its shape.
      directory: where to; a model directory that is there already is replaced.
      dtype: stored type, one of DTYPES.
      max_shard_bytes: a larger model is split into files of at most this size (a larger tensor has its own file).
      base: directory of the model that training started from, see `config_json`.
      extra: more fields for config.json, such as bos_token_id.

    Raises:
      UserError: the tree is not this model's, a value is not finite in `dtype`, or the directory holds something else.
    """
    with replacing(directory) as fresh:
        write_params(
            params,
            config,
            fresh,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            base=base,
            extra=extra,
        )


def write_params(
    params: Params,
    config: DecoderConfig,
    directory: pathlib.Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: float = 5e9,
    base: str | pathlib.Path | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """`save_params` into a directory that exists, for a caller that has more to put there.

    Of several processes all call, since each has parts of the parameters; a tensor at a time is gathered, and the first
    process writes.
    """
    if dtype not in DTYPES:
        raise UserError(f"export dtype={dtype!r} is not supported; write one of {', '.join(DTYPES)}")
    if config.vocab_padding:
        params, config = pad_vocabulary(params, config, 1)
    flat, shapes = traverse_util.flatten_dict(params, sep="/"), param_shapes(config)
    for path in sorted(flat.keys() ^ shapes.keys()):
        raise UserError(f"parameter {path} is {'missing' if path in shapes else 'none of the model'}")
    for path, leaf in flat.items():
        if leaf.shape != shapes[path]:
            raise UserError(f"parameter {path} has shape {leaf.shape} where the model asks for {shapes[path]}")

    if is_first():
        write_json(directory / "config.json", {**config_json(config, base), "dtype": dtype, **(extra or {})})
    target = jnp.dtype(dtype)
    shards, used, total = [[]], 0, 0
    for name, rows, layer in families.weights(config):
        size = sum(math.prod(shapes[row.path][row.name.count("{}") :]) for row in rows) * target.itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards, used = [*shards, []], 0
        shards[-1].append((name, rows, layer))
        used, total = used + size, total + size

    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = [SINGLE] if len(shards) == 1 else names
    for file, shard in zip(names, shards, strict=True):
        tensors = {}
        for name, rows, layer in shard:
            values = [fetch(flat[row.path] if layer is None else flat[row.path][layer]) for row in rows]
            value = values[0] if len(rows) == 1 else joined(values, rows[0], config.num_heads)
            with np.errstate(over="ignore"):  # the check below names the tensor
                value = np.ascontiguousarray((value.T if rows[0].transpose else value).astype(target))
            if not np.isfinite(value).all():
                raise UserError(f"tensor {name} has values that are not finite in {dtype}")
            if is_first():
                tensors[name] = value
        if is_first():
            save_file(tensors, directory / file, metadata={"format": "pt"})
            shutil.copymode(directory / "config.json", directory / file)  # safetensors makes its files private
    if len(shards) > 1 and is_first():
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name, _, _ in shard}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def config_json(config: DecoderConfig, base: str | pathlib.Path | None = None) -> dict[str, Any]:
    """The fields of config.json: the base's, where they describe the same model, or else ours over them.

    Args:
      config: the decoder's shape, without padding of the vocabulary.
      base: directory or GGUF file of the model that training started from. What it says and the decoder has no opinion
        on is kept, its special ids included; None keeps nothing.

    Returns:
      The fields, without the type of the weights.
    """
    ours = families.to_hf(config)
    stored = {} if base is None else read_object(pathlib.Path(base) / "config.json")
    if stored.get("model_type") != ours["model_type"]:
        return ours
    kept = {name: value for name, value in stored.items() if name not in _NOT_KEPT}
    size = families.family(config.family).fields["vocab_size"]
    grown = {**kept, size: config.vocab_size}
    if DecoderConfig(**families.from_hf(grown)) == config:
        return grown
    return {**kept, **{name: value for name, value in ours.items() if value is not None or name not in kept}}


def stored_dtype(directory: str | pathlib.Path) -> str:
    """The type in which a model's weights are stored; of several the one that holds all, and float32 for float64.

    Args:
      directory: a Hugging Face model directory with safetensors files, or a GGUF file, whose blocks are float32.

    Returns:
      One of DTYPES.
    """
    return str(jnp.result_type(*(tensor.dtype for tensor in _open(pathlib.Path(directory)).values())))


def resize_embeddings(
    params: Params, config: DecoderConfig, vocab_size: int, *, used: int | None = None
) -> tuple[Params, DecoderConfig]:
    """Changes the number of rows of the embedding, and of the head if it has its own; a reward model's score stays.

    Args:
      params: the parameter tree of `make_decoder`.
      config: its shape.
      vocab_size: rows to have; a new row is the mean of the old ones, so that its logit is unremarkable at first.
      used: number of ids that the tokenizer can produce; rows above may be cut off, and without it none is.

    Returns:
      (parameters, configuration).

    Raises:
      UserError: rows in use would be cut off.
    """
    old = config.vocab_size
    needed = old if used is None else used
    if vocab_size < needed:
        hint = "" if used is not None else "; pass the tokenizer's size to cut off rows that it does not use"
        raise UserError(f"vocab_size={vocab_size} would cut off rows in use: {needed} are needed{hint}")
    if vocab_size == old:
        return params, config

    def resize(table: jax.Array) -> jax.Array:
        if vocab_size < old:
            return table[:vocab_size]
        mean = jnp.mean(table, axis=0, keepdims=True, dtype=jnp.float32).astype(table.dtype)
        return jnp.concatenate([table, jnp.broadcast_to(mean, (vocab_size - old, *table.shape[1:]))])

    resized = {**params, "embed": {"embedding": resize(params["embed"]["embedding"])}}
    if config.head_path == "head/kernel":
        resized["head"] = {name: resize(table) for name, table in params["head"].items()}
    return resized, dataclasses.replace(config, vocab_size=vocab_size)


def pad_vocabulary(params: Params, config: DecoderConfig, multiple: int) -> tuple[Params, DecoderConfig]:
    """Gives embedding and head rows of zeros, up to a multiple, that get no probability; `write_params` cuts them off.

    Args:
      params: the parameter tree of `make_decoder`.
      config: its shape; what it has of such rows is replaced.
      multiple: of the rows to have, such as the devices along the mesh's tensor axis; 1 takes them away.

    Returns:
      (parameters, configuration).
    """
    size, padding = config.vocab_size, -config.vocab_size % multiple

    def pad(table: jax.Array) -> jax.Array:
        return jnp.pad(table[:size], [(0, padding)] + [(0, 0)] * (table.ndim - 1))

    tables = {
        name: {key: pad(table) for key, table in params[name].items()} for name in ("embed", "head") if name in params
    }
    return {**params, **tables}, dataclasses.replace(config, vocab_padding=padding)


@contextlib.contextmanager
def replacing(directory: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a fresh sibling directory to fill, and renames it to `directory` once all went well.

    Of several processes only the first has something to fill; the others get the final name, to read from later.

    Args:
      directory: its final name. A model directory there is replaced; anything else is left alone.

    Yields:
      The directory to fill.

    Raises:
      UserError: there is something other than a model directory under that name.
      WriteError: the disk is full, and the like; what was there before stays.
    """
    with writing(directory):
        directory = pathlib.Path(directory).expanduser().resolve()
    if directory.exists() and not _replaceable(directory):
        raise UserError(f"{directory} exists and holds more than an exported model; name another directory")
    if not is_first():
        yield directory
        return
    tag = secrets.token_hex(4)
    fresh, old = (directory.with_name(f".{directory.name}.{tag}.{suffix}") for suffix in ("new", "old"))
    with writing(directory), contextlib.ExitStack() as stack:
        fresh.mkdir(parents=True)
        stack.callback(shutil.rmtree, fresh, ignore_errors=True)
        stack.enter_context(marked(fresh))
        yield fresh
        if directory.exists():
            stack.enter_context(marked(directory))
            directory.rename(old)  # a rename onto a directory that is not empty fails
        try:
            fresh.rename(directory)
        except OSError:
            if old.exists():
                old.rename(directory)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _replaceable(directory: pathlib.Path) -> bool:
    """Whether a directory is empty or a model: a run's directory, with its checkpoints, must not be taken for one."""
    if not directory.is_dir():
        return False
    entries = list(directory.iterdir())
    if any(entry.is_dir() and entry.name != "additional_chat_templates" for entry in entries):
        return False
    return not entries or "model_type" in read_object(directory / "config.json", missing={})


def read_object(path: pathlib.Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """Reads a JSON object of a model's; `missing` is what a file that is not there stands for, None for an error."""
    if gguf_file(path.parent):
        return gguf_io.described(path.parent) if path.name == "config.json" else missing or {}
    if missing is None and not path.is_file():
        others = sorted(file.name for file in path.parent.glob("*.gguf"))
        hint = f"; name the file, {path.parent / others[0]}" if others else ""
        raise UserError(f"{path.parent} is not a Hugging Face model directory: it has no {path.name}{hint}")
    content = read_json(path, "an object", missing=missing)
    return _text_of(path.parent, content) if path.name == "config.json" and _is_of_images(content) else content


def sees(directory: str | pathlib.Path) -> bool:
    """Whether this is a model of images and text, of which the text model is read."""
    return _is_of_images(read_json(pathlib.Path(directory) / "config.json", missing={}))


def _is_of_images(hf: Any) -> bool:
    return isinstance(hf, dict) and hf.get("model_type") in tuple(multimodal.TEXT)


def left_out(directory: str | pathlib.Path) -> int:
    """How many tensors a checkpoint has beside its text model's: of images, or of layers that predict ahead."""
    if gguf_file(directory):
        return 0
    name_of = _name_of(pathlib.Path(directory))
    return sum(name_of(name) is None for name in _stored(pathlib.Path(directory)))


def _name_of(directory: pathlib.Path) -> Callable[[str], str | None]:
    """(a stored tensor's name) -> its name in the text model, None if it is no part of that."""
    hf = read_json(directory / "config.json", missing={})
    if _is_of_images(hf):
        return multimodal.name_of
    ahead = isinstance(hf, dict) and hf.get("model_type") in multimodal.PREDICT_AHEAD
    return lambda name: None if ahead and name.startswith(multimodal.AHEAD) else name


def _text_of(directory: pathlib.Path, whole: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the text model; whether its head is tied is what the files say, if they are here."""
    hf = families.text_config(whole)
    if any((directory / file).is_file() for file in (SINGLE, INDEX)):
        head, embedding = (_open(directory).get(name) for name in (multimodal.HEAD, multimodal.EMBEDDING))
        stored_twice = None not in (head, embedding) and hf.get("tie_word_embeddings") is not False
        # A look at some rows: reading the weights compares all, and refuses a head that differs in others alone.
        hf["tie_word_embeddings"] = head is None or (stored_twice and _same(head, embedding, rows=SEEN))
    return hf


def fingerprint(directory: str | pathlib.Path, *, whole: bool = False) -> str:
    """A digest by which processes that read the same model know it: quick, so of large files it reads only samples.

    Args:
      directory: of a model, or of adapters; or a GGUF file.
      whole: read all of every file, for what is kept between runs.

    Returns:
      16 hexadecimal digits: of every byte of the small files, and of the length, the first MiB and 64 pages of others.
    """
    digest, alone = hashlib.sha256(), gguf_file(directory)
    for file in [alone] if alone else sorted(pathlib.Path(directory).glob("*")):
        if file.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt", ".gguf"):
            with file.open("rb") as opened:
                if whole:
                    digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()} ".encode())
                    continue
                size = os.fstat(opened.fileno()).st_size
                digest.update(f"{file.name} {size} ".encode() + opened.read(2**20))
                for place in range(64):
                    digest.update(os.pread(opened.fileno(), 4096, place * size // 64))
    return digest.hexdigest()[:16]


def param_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter."""
    tree = jax.eval_shape(make_decoder(config).init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


class _Tensor(NamedTuple):
    """A tensor in a file, read when it is indexed. What is mapped of the file for that is let go of at once."""

    file: pathlib.Path
    name: str
    offset: int
    shape: tuple[int, ...]
    stored: str

    @property
    def dtype(self) -> np.dtype:
        """As jax keeps it, which has no float64."""
        return np.dtype(np.float32 if self.stored == "F64" else _STORED[self.stored])

    def view(self) -> np.ndarray:
        kind = np.uint8 if self.stored == "U8" else _STORED[self.stored]
        return np.memmap(self.file, kind, "r", self.offset, self.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.array(self.view()[index])


def _tensors(file: pathlib.Path) -> dict[str, _Tensor]:
    """The tensors of a whole safetensors file."""
    with safe_open(file, "np"):  # checks the header, the places that it gives, and the length of the file
        pass
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {
        name: _Tensor(file, name, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
    }


def _open(directory: pathlib.Path) -> dict[str, _Tensor | gguf_io.Tensor | mxfp4.Tensor]:
    """Name -> lazily read tensor, of the text model alone."""
    if gguf_file(directory):
        return gguf_io.open_tensors(directory)
    name_of = _name_of(directory)
    return {name: tensor for old, tensor in _stored(directory).items() if (name := name_of(old)) is not None}


def _stored(directory: pathlib.Path) -> dict[str, _Tensor | mxfp4.Tensor]:
    """Name -> lazily read tensor, from one file or from the files that the index names."""
    weight_map = None
    files = [SINGLE]
    if not (directory / SINGLE).is_file():
        if not (directory / INDEX).is_file():
            pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
            if pickles:
                raise UserError(
                    f"{directory} holds only pickle files ({pickles[0]}), which can run any code when opened and are "
                    "refused; convert them to safetensors first"
                )
            raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}")
        weight_map = read_json(directory / INDEX, {"weight_map": {"*": "a string"}})["weight_map"]
        files = sorted(set(weight_map.values()))
        for file in files:
            if pathlib.PurePath(file).name != file or file in ("", ".."):
                raise UserError(f"{directory / INDEX} names {file!r}; a model's files lie beside it")
    stored = {}
    for file in files:
        try:
            tensors = _tensors(directory / file)
        except FileNotFoundError:
            raise UserError(f"{directory / file} is missing; {INDEX} names it") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"{directory / file} is not a whole safetensors file: {one_line(error)}") from error
        stored |= {
            name: tensor for name, tensor in tensors.items() if weight_map is None or weight_map.get(name, file) == file
        }
    absent = [name for name in weight_map or () if name not in stored]
    if absent:
        raise UserError(f"{directory / weight_map[absent[0]]} does not hold tensor {absent[0]}; {INDEX} says it does")
    return mxfp4.whole(stored)


def _add_prefix(stored: dict[str, Any], config: DecoderConfig) -> None:
    """Gives tensors their full names where a file holds a bare backbone, as GPT-2's own does."""
    prefix = families.name_of(config, "embed/embedding").partition(".")[0] + "."
    if not any(name.startswith(prefix) for name in stored):
        heads = {families.name_of(config, path) for path in ("head/kernel", "head/bias")} | {families.SCORE}
        for name in [name for name in stored if name not in heads]:
            stored[prefix + name] = stored.pop(name)


def _untie(stored: dict[str, Any], head_name: str, embedding_name: str) -> None:
    """Leaves one of the two names under which a tied table may be stored."""
    if head_name not in stored:
        return
    head = stored.pop(head_name)
    embedding = stored.setdefault(embedding_name, head)
    if embedding is not head and not _same(embedding, head):
        raise UserError(
            f"tie_word_embeddings is true, but tensors {embedding_name} and {head_name} differ; "
            "set it to false in config.json or remove one"
        )


def _same(one: _Tensor, other: _Tensor, rows: int | None = None) -> bool:
    """Whether two tables of gigabytes are the same, read in parts up to the first that differs.

    Args:
      one, other: the tables.
      rows: look at so many alone, from the first to the last; None for all.
    """
    if one.shape != other.shape:
        return False
    size = one.shape[0]
    parts = [slice(start, start + 4096) for start in range(0, size, 4096)]
    if rows and rows < size:
        parts = [slice(row, row + 1) for row in np.linspace(0, size - 1, rows).astype(int).tolist()]
    return all(np.array_equal(one[part], other[part], equal_nan=True) for part in parts)


class _Part(NamedTuple):
    """One parameter's share of a tensor that holds several, read as the tensor itself would be."""

    tensor: _Tensor
    row: families.Weight
    number: int
    sizes: list[int]
    heads: int

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        whole = self.tensor.view()
        part = split(whole.T if self.row.transpose else whole, self.row, self.sizes, self.heads)[self.number]
        return np.array((part.T if self.row.transpose else part)[index])


def _part(
    tensor: _Tensor | gguf_io.Tensor | mxfp4.Tensor,
    rows: tuple[families.Weight, ...],
    number: int,
    sizes: list[int],
    heads: int,
) -> Any:
    """The share of a tensor that one of its rows has."""
    if len(rows) == 1:
        return tensor
    if isinstance(tensor, mxfp4.Tensor):
        return tensor.turn(number, len(rows))
    return _Part(tensor, rows[number], number, sizes, heads)


def split(whole: np.ndarray, row: families.Weight, sizes: list[int], heads: int) -> list[np.ndarray]:
    """The parameters that a tensor [..., out] holds, of these sizes along the last axis."""
    if row.interleaved == "outputs":
        return [whole[..., number :: len(sizes)] for number in range(len(sizes))]
    if not row.interleaved:
        return np.split(whole, np.cumsum(sizes)[:-1], axis=-1)
    by_head = whole.reshape(*whole.shape[:-1], heads, len(sizes), -1)
    return [by_head[..., number, :].reshape(*whole.shape[:-1], -1) for number in range(len(sizes))]


def joined(values: list[np.ndarray], row: families.Weight, heads: int) -> np.ndarray:
    """The tensor that holds several parameters, the inverse of `split`."""
    if not row.interleaved:
        return np.concatenate(values, axis=-1)
    heads = values[0].shape[-1] if row.interleaved == "outputs" else heads
    by_head = [value.reshape(*value.shape[:-1], heads, -1) for value in values]
    return np.stack(by_head, axis=-2).reshape(*values[0].shape[:-1], -1)


def _check(directory: pathlib.Path, name: str, tensor: _Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        asks = "its metadata" if directory.suffix == ".gguf" else "config.json"
        raise UserError(f"{directory}: tensor {name} has shape {tensor.shape} where {asks} asks for {expected}")
    if tensor.stored not in _STORED:
        raise UserError(f"{directory}: tensor {name} is stored as {tensor.stored}; supported are {', '.join(_STORED)}")


def _place(
    parts: Mapping[families.Weight, list[Any]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    kind: str | None,
    shardings: Any,
) -> Params:
    """The parameters on their devices: made of zeros, into which the tensors of each are then written."""
    types = {
        row.path: jnp.result_type(*(tensor.dtype for tensor in tensors)) if dtype == "stored" else jnp.dtype(dtype)
        for row, tensors in parts.items()
    }
    plain = {path: jax.ShapeDtypeStruct(shapes[path], type_) for path, type_ in types.items()}
    blank = traverse_util.unflatten_dict(plain, sep="/")
    blank = jax.eval_shape(lambda params: quantize_params(params, kind), blank) if kind else blank
    flat = traverse_util.flatten_dict(blank, sep="/")
    where = dict.fromkeys(flat) if shardings is None else traverse_util.flatten_dict(shardings, sep="/")
    if where.keys() != flat.keys():
        raise ValueError(f"shardings and parameters differ in {sorted(where.keys() ^ flat.keys())}")
    flat = _zeros(tuple((path, x.shape, x.dtype, where[path]) for path, x in flat.items()))()
    for row, tensors in parts.items():
        paths = quantized_paths(row.path, kind) if kind else (row.path,)
        arrays, of_arrays = tuple(flat.pop(path) for path in paths), tuple(where[path] for path in paths)
        write = _writer(types[row.path], kind if len(paths) > 1 else None, of_arrays)
        flat |= dict(zip(paths, _fill(arrays, tensors, shapes[row.path], row, write, of_arrays[0]), strict=True))
    return traverse_util.unflatten_dict(flat, sep="/")


def _fill(
    arrays: tuple[jax.Array, ...],
    tensors: list[Any],
    shape: tuple[int, ...],
    row: families.Weight,
    write: Callable[..., tuple[jax.Array, ...]],
    sharding: jax.NamedSharding | None,
) -> tuple[jax.Array, ...]:
    """Reads the tensors of a parameter of this shape and sharding into its arrays, one after the other."""
    stacked = row.name.count("{}")  # leading axes along which there is a tensor for each place
    if sharding is not None:
        spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
        sharding = jax.NamedSharding(sharding.mesh, jax.P(*spec[stacked:]))
    for place, tensor in zip(np.ndindex(*shape[:stacked]), tensors, strict=True):
        value = _put(tensor, shape[stacked:], row.transpose, sharding)
        *arrays, finite = jax.block_until_ready(write(tuple(arrays), value, place))  # before the next one is read
        if not finite:
            raise UserError(
                f"tensor {tensor.name} holds NaN or infinity; the model's files are damaged, or it was exported after "
                "its training diverged"
            )
    return tuple(arrays)


def _put(tensor: Any, shape: tuple[int, ...], transpose: bool, sharding: jax.NamedSharding | None) -> jax.Array:
    """A tensor on its devices, in its stored type; of this shape once it is transposed, if that is asked for."""
    held = {}  # devices that have the same part share it

    def read(index: tuple[slice, ...]) -> np.ndarray:
        key = str(index)  # slices have no hash before Python 3.12
        if key not in held:
            held[key] = tensor[index[::-1]].T if transpose else tensor[index]
        return held[key]

    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)


@functools.cache  # a second model of the same shape shares the compiled program
def _zeros(
    arrays: tuple[tuple[str, tuple[int, ...], np.dtype, jax.NamedSharding | None], ...],
) -> Callable[[], dict[str, jax.Array]]:
    """What makes {path: zeros of a shape and type}, on these shardings if there are any."""
    where = {path: sharding for path, _, _, sharding in arrays if sharding is not None} or None
    return jax.jit(lambda: {path: jnp.zeros(shape, type_) for path, shape, type_, _ in arrays}, out_shardings=where)


@functools.cache  # so do parameters of one shape
def _writer(
    dtype: np.dtype, kind: str | None, shardings: tuple[jax.NamedSharding | None, ...]
) -> Callable[..., tuple[jax.Array, ...]]:
    """What writes a tensor at its place on the leading axes of a kernel, or of its codes and scales.

    It returns these, and whether the tensor is finite.
    """

    def bits(x: jax.Array) -> jax.Array:  # a CPU passes a whole array through float32 to write bfloat16 into it
        return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")

    def write(arrays, value: jax.Array, place: tuple[int, ...]) -> tuple[jax.Array, ...]:
        value = value.astype(dtype)
        values = quantize(value, kind).values() if kind else (value,)
        written = [
            jax.lax.dynamic_update_slice(bits(array), bits(x)[(None,) * len(place)], (*place, *[0] * x.ndim))
            for array, x in zip(arrays, values, strict=True)
        ]
        arrays = (jax.lax.bitcast_convert_type(x, array.dtype) for x, array in zip(written, arrays, strict=True))
        return *arrays, jnp.isfinite(value).all()

    where = shardings[0] and (*shardings, jax.NamedSharding(shardings[0].mesh, jax.P()))
    return jax.jit(write, donate_argnums=0, out_shardings=where)
