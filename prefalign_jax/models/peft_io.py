"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, out and in.

A layer that Hugging Face keeps in one tensor with others (GPT-2's c_attn, NeoX's query_key_value, Phi-3's qkv_proj and
gate_up_proj) has one adapter there, where each of ours has its own. Both ways are exact:

    out: [Aq Ak Av] and a B with Bq, Bk and Bv as blocks; the rank is the sum of the three
    in:  every part has all of A, and its columns of B; what its columns of B leave at zero is not kept
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from prefalign_jax.files import shaped, whole, write_json
from prefalign_jax.limits import check_pattern, time_limit
from prefalign_jax.models import families
from prefalign_jax.models.decoder import DecoderConfig
from prefalign_jax.models.hf_io import joined, param_shapes, read_object, split
from prefalign_jax.models.lora import MAGNITUDE, A, B, Lora
from prefalign_jax.processes import fetch, is_first
from prefalign_jax.types import Params, UserError, one_line

ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Our names of an adapter's arrays -> PEFT's.
_LEAVES = {A: "lora_A.weight", B: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}
FULL = ("embed", "head", "score")  # what may be trained in full, by the first name of its path
# Field of adapter_config.json -> what it may be; under the other initialisations PEFT changes the base model's weights.
_SUPPORTED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva"),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "trainable_token_indices": (None,),
}


_SETTINGS = {
    "r?": "a count",
    **dict.fromkeys(("use_rslora?", "use_dora?"), "true or false"),
    "lora_alpha?": "a positive number",
    "lora_dropout?": "a number",
    "rank_pattern?": {"*": "a count"},
    "alpha_pattern?": {"*": "a positive number"},
}


def _linear(rows: tuple[families.Weight, ...]) -> bool:
    """Whether a tensor is a kernel that may have an adapter; experts' may not."""
    return bool(re.fullmatch(r"layers/(?!experts/(gate|up|down)/).*/kernel", rows[0].path))


def _module(row: families.Weight) -> str:
    """The name of a linear layer within its block, such as self_attn.q_proj."""
    return row.name.rpartition("{}.")[2].removesuffix(".weight")


def save_adapters(
    params: Params,
    config: DecoderConfig,
    lora: Lora,
    directory: str | pathlib.Path,
    *,
    base: str,
    quantized: str | None = None,
) -> None:
    """Writes adapters as `peft` reads them; of several processes all call, and the first writes.

    Args:
      params: of adapters alone.
      config: the decoder's shape.
      lora: what they are.
      directory: where to; an earlier export there is replaced.
      base: the model that they belong to, a directory or a hub name.
      quantized: how the base was stored while they were trained, None for as it is; the files and their card say so.

    Raises:
      UserError: with DoRA, a layer that shares its tensor has an adapter and another of that tensor has none.
    """
    config = dataclasses.replace(config, vocab_padding=0)
    flat, shapes = traverse_util.flatten_dict(params, sep="/"), param_shapes(config)
    tensors, ranks, others, stored_as_in_out = {}, {}, set(), False
    for name, rows, layer in families.weights(config):
        if not _linear(rows):
            continue
        paths = [row.path.removesuffix("/kernel") for row in rows]
        adapted = [path for path in paths if f"{path}/{A}" in flat]
        if not adapted:
            others.add(_module(rows[0]))
            continue
        arrays = {path: {leaf: fetch(flat[f"{path}/{leaf}"][layer]) for leaf in (A, B)} for path in adapted}
        rank, at, blocks = sum(x[A].shape[-1] for x in arrays.values()), 0, []
        for path, row in zip(paths, rows, strict=True):
            blocks.append(np.zeros((rank, shapes[row.path][-1]), np.float32))
            if path in adapted:
                b = arrays[path][B]
                blocks[-1][at : at + len(b)] = b
                at += len(b)
        arrays_of_tensor = {
            A: np.concatenate([x[A] for x in arrays.values()], axis=-1),
            B: joined(blocks, rows[0], config.num_heads),
        }
        if lora.dora:
            if missing := [path for path in paths if path not in adapted]:
                raise UserError(
                    f"DoRA adapters of {adapted[0]} cannot be written in PEFT's format without one of {missing[0]}: a "
                    f"{config.family} model keeps both in {name}; add it to lora.targets, or use the merged export"
                )
            lengths = [fetch(flat[f"{path}/{MAGNITUDE}"][layer]) for path in paths]
            arrays_of_tensor[MAGNITUDE] = joined(lengths, rows[0], config.num_heads)
        ranks[_module(rows[0])] = rank
        stored_as_in_out |= not rows[0].transpose
        for leaf, value in arrays_of_tensor.items():
            key = f"{PEFT_PREFIX}{name.removesuffix('.weight')}.{_LEAVES[leaf]}"
            tensors[key] = np.ascontiguousarray(value.T.astype(np.float32))
    saved = []  # modules that are trained in full
    for name, row in _full_tensors(config):
        if row.path in flat:
            value = fetch(flat[row.path])[: shapes[row.path][0]].astype(np.float32)  # without rows of padding
            saved.append(name.rpartition(".")[0].rpartition(".")[2])
            tensors[PEFT_PREFIX + name] = np.ascontiguousarray(value.T if row.transpose else value)

    unusual = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    taken = {module.rpartition(".")[2] for module in others}
    short = {module.rpartition(".")[2] for module in ranks}
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.reward else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilised,
        "use_dora": lora.dora,
        "rank_pattern": unusual,
        "alpha_pattern": {
            module: lora.scale * (math.sqrt(rank) if lora.rank_stabilised else rank) for module, rank in unusual.items()
        },
        # The last part of a name, unless that is also the name of a layer without an adapter.
        "target_modules": sorted(short - taken | {m for m in ranks if m.rpartition(".")[2] in taken}),
        "modules_to_save": sorted(set(saved)) or None,
        "fan_in_fan_out": stored_as_in_out,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "inference_mode": True,
    }
    if not is_first():
        return
    metadata = {"format": "pt"} | ({"base_quantization": quantized} if quantized else {})
    directory = pathlib.Path(directory)
    with whole(directory / ADAPTER_CONFIG) as described, whole(directory / ADAPTER_WEIGHTS) as weights:
        write_json(described, settings)
        save_file(tensors, weights, metadata=metadata)
        shutil.copymode(described, weights)  # safetensors makes its files private


def load_adapters(directory: str | pathlib.Path, config: DecoderConfig) -> tuple[Params, Lora]:
    """Reads adapters that `peft` or `save_adapters` wrote.

    Modules whose alpha / r differs from that of the whole have the difference in B, as one `Lora` has one scale; a
    layer of the stack without an adapter gets one that is zero, and ranks are filled up with zeros to that of the
    largest in the stack.

    Args:
      directory: with adapter_config.json and adapter_model.safetensors.
      config: the decoder's shape.

    Returns:
      (adapters in float32, what they are).

    Raises:
      UserError: a file is missing, or holds what is no LoRA of this model's linear layers.
    """
    directory = pathlib.Path(directory)
    file = directory / ADAPTER_CONFIG
    settings = {key: value for key, value in read_object(file).items() if value is not None}
    shaped(settings, _SETTINGS, where=file)
    for key, values in _SUPPORTED.items():
        if settings.get(key, values[0]) not in values:
            supported = ", ".join(map(repr, values))
            raise UserError(
                f"{directory / ADAPTER_CONFIG}: {key}={settings[key]!r} is not supported; supported: {supported}"
            )
    lora = Lora(
        rank=settings.get("r", 8),  # PEFT's defaults
        alpha=float(settings.get("lora_alpha", 8)),
        rank_stabilised=bool(settings.get("use_rslora")),
        dora=bool(settings.get("use_dora")),
        dropout=float(settings.get("lora_dropout", 0.0)),
    )
    with contextlib.ExitStack() as stack:
        try:
            handle = stack.enter_context(safe_open(directory / ADAPTER_WEIGHTS, "np"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{directory / ADAPTER_WEIGHTS} cannot be read: {one_line(error)}") from error
        stored = {name: handle.get_tensor(name).astype(np.float32) for name in handle.keys()}
    for name, value in stored.items():
        if not np.isfinite(value).all():
            raise UserError(f"{directory / ADAPTER_WEIGHTS}: tensor {name} holds NaN or infinity")

    shapes, flat = param_shapes(config), {}
    stacks = collections.defaultdict(dict)  # rows of the table -> layer -> its arrays
    for name, rows, layer in families.weights(config):
        if not _linear(rows):
            continue
        module = name.removesuffix(".weight")
        arrays = {leaf: stored.pop(f"{PEFT_PREFIX}{module}.{theirs}", None) for leaf, theirs in _LEAVES.items()}
        if all(value is None for value in arrays.values()):
            continue
        for leaf, value in arrays.items():
            if (value is None) == (leaf != MAGNITUDE or lora.dora):
                raise UserError(f"{directory}: {module} has {'no' if value is None else 'a'} {_LEAVES[leaf]}")
        try:
            rank = _by_pattern(settings.get("rank_pattern", {}), module, lora.rank)
            alpha = _by_pattern(settings.get("alpha_pattern", {}), module, lora.alpha)
        except (re.error, TimeoutError, RecursionError, OverflowError) as error:
            raise UserError(f"{file}: rank_pattern, alpha_pattern: {one_line(error)}") from None
        sizes = [shapes[row.path][-1] for row in rows]
        wanted = {A: (rank, shapes[rows[0].path][-2]), B: (sum(sizes), rank), MAGNITUDE: (sum(sizes),)}
        for leaf, value in arrays.items():
            if value is not None and value.shape != wanted[leaf]:
                raise UserError(
                    f"{directory}: {module}.{_LEAVES[leaf]} has shape {value.shape} where {wanted[leaf]} is due"
                )
        stretched = dataclasses.replace(lora, rank=rank, alpha=alpha).scale / lora.scale
        stacks[rows][layer] = {A: arrays[A].T, B: arrays[B].T * np.float32(stretched), MAGNITUDE: arrays[MAGNITUDE]}
    full = _take_full(directory, stored, config, shapes)
    if stored:
        raise UserError(f"{directory}: tensor {next(iter(stored))} has no place in a {config.family} model")

    for rows, by_layer in stacks.items():
        if lora.dora and len(by_layer) < (layers := shapes[rows[0].path][0]):
            raise UserError(
                f"{directory}: {_module(rows[0])} has DoRA adapters in {len(by_layer)} of {layers} layers; "
                "they are supported in all layers or in none"
            )
        flat |= _of_stack(rows, by_layer, [shapes[row.path] for row in rows], config, lora)
    targets = sorted({path.rpartition("/")[0] for path in flat})
    names = tuple(sorted({path.partition("/")[0] for path in full}))
    lora = dataclasses.replace(lora, targets="|".join(targets), full=names)
    return traverse_util.unflatten_dict({**flat, **full}, sep="/"), lora


def _full_tensors(config: DecoderConfig) -> Iterator[tuple[str, families.Weight]]:
    """(name, row) of the tensors that may be trained in full: embedding, head, score; a tied head is the embedding."""
    for name, rows, _ in families.weights(config):
        if rows[0].path.partition("/")[0] in FULL:
            yield name, rows[0]
            if config.head_path == rows[0].path == "embed/embedding":  # PEFT wraps the embedding and its head apart
                yield families.name_of(config, "head/kernel"), rows[0]


def _take_full(
    directory: pathlib.Path, stored: dict[str, np.ndarray], config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Takes what was trained in full out of the stored tensors, by path."""
    full: dict[str, np.ndarray] = {}
    for name, row in _full_tensors(config):
        value = stored.pop(PEFT_PREFIX + name, None)
        if value is None:
            continue
        value = value.T if row.transpose else value
        if value.shape != shapes[row.path]:
            raise UserError(
                f"{directory}: {name} has shape {value.shape} where {shapes[row.path]} is due; "
                "it needs the tokenizer that the adapters were trained with"
            )
        if row.path in full and not np.array_equal(full[row.path], value):
            raise UserError(f"{directory}: {name} differs from the embedding, which this model uses as its head")
        full[row.path] = value
    for top in {path.partition("/")[0] for path in full}:  # a head's bias goes with its kernel
        if lacking := [path for path in shapes if path.partition("/")[0] == top and path not in full]:
            raise UserError(f"{directory} has {top} without {lacking[0]}; both are trained in full or neither")
    return full


def _by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value for a module; keys are regular expressions over the end of its name, and the first that fits counts."""
    for key in pattern:
        check_pattern(key)
    with time_limit():
        return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _of_stack(
    rows: tuple[families.Weight, ...],
    by_layer: Mapping[int, Mapping[str, np.ndarray]],
    shapes: list[tuple[int, ...]],
    config: DecoderConfig,
    lora: Lora,
) -> dict[str, np.ndarray]:
    """Path -> array for the parameters that share one tensor in every layer."""
    layers, features_in, _ = shapes[0]
    sizes, rank = [shape[-1] for shape in shapes], max(x[B].shape[0] for x in by_layer.values())
    a, b = (np.zeros(shape, np.float32) for shape in ((layers, features_in, rank), (layers, rank, sum(sizes))))
    for layer, x in by_layer.items():
        a[layer, :, : x[A].shape[-1]], b[layer, : x[B].shape[0]] = x[A], x[B]
    flat, parts = {}, split(b, rows[0], sizes, config.num_heads)
    used = [part.any(axis=(0, 2)) for part in parts]
    for number, (row, part, keep) in enumerate(zip(rows, parts, used, strict=True)):
        path = row.path.removesuffix("/kernel")
        if len(rows) == 1 or not np.any(used):
            keep = slice(None)  # nothing is trained yet, so that nothing tells whose A is whose
        elif not keep.any():
            if not lora.dora:
                continue
            keep = slice(None)  # the lengths need an adapter beside them
        flat |= {f"{path}/{A}": a[:, :, keep], f"{path}/{B}": part[:, keep]}
        if lora.dora:
            lengths = np.stack([by_layer[layer][MAGNITUDE] for layer in range(layers)])
            flat[f"{path}/{MAGNITUDE}"] = split(lengths, row, sizes, config.num_heads)[number]
    return flat
