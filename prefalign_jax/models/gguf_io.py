"""GGUF files as Hugging Face directories are read: a config.json of their metadata, and tensors under those names.

What llama.cpp's converter does to a model is undone: where it stores the rows of q and k so that neighbours are rotated
together, they are put back in halves, and Gemma's norms count from 1 again. Tensors have the names that the package
`gguf` knows for each architecture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefalign_jax.gguf.file import Gguf, StoredTensor, library, read_gguf
from prefalign_jax.gguf.tokenizer import special_ids
from prefalign_jax.models import families
from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.models.rope import RopeScaling, frequencies
from prefalign_jax.types import UserError


class Architecture(NamedTuple):
    """What a `general.architecture` means.

    Attributes:
      family: the model_type.
      paired: whether the rows of q and k are stored so that neighbours are rotated together.
      counts_from_1: whether norms are stored with the 1 that the family adds to them.
      keys: of the metadata that few architectures have; see KEYS.
    """

    family: str
    paired: bool = False
    counts_from_1: bool = False
    keys: tuple[str, ...] = ()


_WINDOW, _PATTERN, _LOCAL = "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"
_ATTENTION_CAP, _LOGIT_CAP = "attn_logit_softcapping", "final_logit_softcapping"
_EXPERTS, _USED, _EXPERT_WIDTH = "expert_count", "expert_used_count", "expert_feed_forward_length"
_RMS, _LAYER_NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
_FACTOR, _ORIGINAL = "rope.scaling.factor", "rope.scaling.original_context_length"
_ATTENTION_FACTOR = "rope.scaling.attn_factor"
_GEMMA = (_WINDOW, _PATTERN, _LOGIT_CAP)
ARCHITECTURES = {
    "llama": Architecture("llama", paired=True, keys=(_EXPERTS, _USED, _WINDOW)),  # and Mistral, Mixtral
    "smollm3": Architecture("smollm3", paired=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture("qwen3_moe", keys=(_EXPERTS, _USED, _EXPERT_WIDTH)),
    "gemma": Architecture("gemma", counts_from_1=True),
    "gemma2": Architecture("gemma2", counts_from_1=True, keys=(*_GEMMA, _ATTENTION_CAP)),
    "gemma3": Architecture("gemma3_text", counts_from_1=True, keys=(*_GEMMA, _LOCAL)),
    "olmo2": Architecture("olmo2"),
    "phi2": Architecture("phi"),
    "phi3": Architecture("phi3", keys=(_WINDOW, _ATTENTION_FACTOR)),
    "starcoder2": Architecture("starcoder2", keys=(_WINDOW,)),
}
# Key of the metadata behind the architecture and a dot -> (shape of its value, the field of DecoderConfig that it is).
KEYS = {
    "context_length": ("a count", "max_position"),
    "embedding_length": ("a count", "hidden_size"),
    "block_count": ("a count", "num_layers"),
    "feed_forward_length": ("a count", "intermediate_size"),
    _EXPERT_WIDTH: ("a count", "intermediate_size"),
    "attention.head_count": ("a count", "num_heads"),
    "attention.head_count_kv": ("a count", "num_kv_heads"),
    "attention.key_length": ("a count", "head_dim"),
    _RMS: ("a positive number", "norm_eps"),
    _LAYER_NORM: ("a positive number", "norm_eps"),
    _EXPERTS: ("a count", "num_experts"),
    _USED: ("a count", "experts_per_token"),
    _ATTENTION_CAP: ("a positive number", "attention_softcap"),
    _LOGIT_CAP: ("a positive number", "logit_softcap"),
    **dict.fromkeys(("rope.freq_base", _LOCAL, _FACTOR, _ATTENTION_FACTOR), ("a positive number", None)),
    **dict.fromkeys((f"rope.scaling.yarn_{x}" for x in ("attn_factor", "beta_fast", "beta_slow")), ("a number", None)),
    **dict.fromkeys(("rope.dimension_count", _ORIGINAL), ("a count", None)),
    "rope.scaling.type": ("a string", None),
    _WINDOW: ("an integer", None),  # 0 is none
    _PATTERN: (("a count", ["true or false"]), None),
    # What follows from the rest.
    "attention.value_length": ("a count", None),
    "vocab_size": ("a count", None),
    "rope.scaling.finetuned": ("anything", None),
}
_NEEDED = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
_OF_FEW = {key for row in ARCHITECTURES.values() for key in row.keys}

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_LLAMA_3, _SHORT, _LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
_BAND = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)  # of every Llama 3
_LARGEST = {"gemma2": 46, "gemma3_text": 62}  # layers of the models whose scores are scaled by their width


def described(file: str | Path) -> dict[str, Any]:
    """The fields of config.json that a GGUF file stands for.

    Args:
      file: its path.

    Raises:
      UserError: its metadata lacks one, or says something that is not known here and may change what is computed.
    """
    gguf = read_gguf(file)
    name = gguf.architecture
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{gguf.file}: general.architecture={name!r} is not supported; supported are {known}")
    allowed = KEYS.keys() - _OF_FEW | {*ARCHITECTURES[name].keys}
    about = {}
    for key in gguf.metadata:
        if key.startswith(f"{name}."):
            short = key.removeprefix(f"{name}.")
            if short not in allowed:
                value = f"{gguf.metadata[key]!r:.40}"
                raise UserError(f"{gguf.file}: {key}={value} is not supported; a model that has it computes otherwise")
            about[short] = gguf.value(key, KEYS[short][0])
    model_type = _model_type(name, about)
    family = families.FAMILIES[model_type]
    norm, other = (_RMS, _LAYER_NORM) if family.constant.get("norm", "rms") != "layer" else (_LAYER_NORM, _RMS)
    about.pop(other, None)
    for key in (*_NEEDED, norm, *((_EXPERTS, _USED) if model_type in ("mixtral", "qwen3_moe") else ())):
        gguf.value(f"{name}.{key}")
    if _EMBEDDING not in gguf.tensors:
        raise UserError(f"{gguf.file}: tensor {_EMBEDDING} is missing")
    shape = {field: about[key] for key, (_, field) in KEYS.items() if field and key in about}
    shape = {"head_dim": shape["hidden_size"] // shape["num_heads"], "num_kv_heads": shape["num_heads"], **shape}
    shape["vocab_size"] = gguf.tensors[_EMBEDDING].shape[0]
    if about.get("attention.value_length", shape["head_dim"]) != shape["head_dim"]:
        raise UserError(f"{gguf.file}: {name}.attention.value_length differs from that of keys, {shape['head_dim']}")
    ids = special_ids(gguf)
    ends = list(dict.fromkeys(ids[end] for end in ("eos", "eot", "eom") if end in ids))
    return {
        "architectures": [family.architecture],
        "model_type": model_type,
        **{family.fields.get(field, field): value for field, value in shape.items()},
        "tie_word_embeddings": _HEAD not in gguf.tensors,
        **_rotation(gguf, about, shape),
        **_of_family(model_type, about, shape),
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids.get("pad"),
    }


def open_tensors(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a GGUF file, read when they are indexed.

    Args:
      file: its path.

    Returns:
      Hugging Face name -> tensor; those that have no place in the model keep the name that they have in the file.

    Raises:
      UserError: one is missing.
    """
    gguf = read_gguf(file)
    config = DecoderConfig(**families.from_hf(described(file)))
    about, package = ARCHITECTURES[gguf.architecture], library(gguf.file)
    if not any(name.startswith(f"blk.{config.num_layers - 1}.") for name in gguf.tensors):
        raise UserError(f"{gguf.file}: of {config.num_layers} layers the last has no tensor")
    architectures = {name: number for number, name in package.MODEL_ARCH_NAMES.items()}
    names = package.get_tensor_name_map(architectures[gguf.architecture], config.num_layers)
    tensors, placed = {}, {_LLAMA_3, _SHORT, _LONG}
    for name, rows, place in families.weights(config):
        theirs = names.get_name(re.sub(r"\.experts\.\d+\.", ".experts.", name), (".weight", ".bias"))
        if theirs not in gguf.tensors:
            raise UserError(f"{gguf.file}: tensor {theirs or name} is missing")
        order = None
        heads = {"q": config.num_heads, "k": config.num_kv_heads}.get(rows[0].path.split("/")[-2])
        if about.paired and heads:
            order = np.arange(heads * config.head_dim).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        lower = about.counts_from_1 and theirs.endswith("norm.weight")
        expert = place[1] if isinstance(place, tuple) else None
        tensors[name] = Tensor(gguf.tensors[theirs], order, lower, expert)
        placed.add(theirs)
    left = {name: Tensor(tensor) for name, tensor in gguf.tensors.items() if name not in placed}
    return {**tensors, **left}


class Tensor(NamedTuple):
    """A tensor as Hugging Face has it, read when it is indexed.

    Attributes:
      source: where it lies.
      order: for each row which one in the file it is; None for the same.
      lower: whether the file has it with 1 added.
      expert: its number in a tensor of all; None where there are no experts.
    """

    source: StoredTensor
    order: np.ndarray | None = None
    lower: bool = False
    expert: int | None = None

    @property
    def name(self) -> str:
        """As the file has it."""
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.source.shape if self.expert is None else self.source.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        """Of the values; float32 for blocks."""
        return self.source.dtype

    @property
    def stored(self) -> str:
        """The type of the values, in the word of safetensors."""
        return {"float16": "F16", "bfloat16": "BF16"}.get(self.dtype.name, "F32")

    def view(self) -> np.ndarray:
        """All values."""
        return self[(slice(None),) * len(self.shape)]

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, *columns = index if isinstance(index, tuple) else (index,)
        rows = rows if self.order is None else self.order[rows]
        lead = () if self.expert is None else (self.expert,)
        if len(self.shape) == 1:
            values = self.source.rows(*lead)[rows]
        else:
            values = self.source.rows(*lead, rows)[(slice(None), *columns)]
        return values - values.dtype.type(1) if self.lower else values


def _model_type(name: str, about: Mapping[str, Any]) -> str:
    """The family; llama.cpp has one word for Llama, Mistral and Mixtral."""
    if name == "llama" and about.keys() & {_EXPERTS, _USED}:
        return "mixtral"
    return "mistral" if name == "llama" and about.get(_WINDOW) else ARCHITECTURES[name].family


def _rotation(gguf: Gguf, about: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that tell of the rotation. The factors of Llama 3 and of longrope are tensors."""
    theta, kind = about.get("rope.freq_base", 10000.0), about.get("rope.scaling.type", "none")
    fields: dict[str, Any] = {"rope_theta": theta}
    if (turned := about.get("rope.dimension_count", shape["head_dim"])) != shape["head_dim"]:
        fields["partial_rotary_factor"] = turned / shape["head_dim"]
    if _ORIGINAL in about:
        fields["original_max_position_embeddings"] = about[_ORIGINAL]
    if _LLAMA_3 in gguf.tensors:
        return fields | {"rope_scaling": _llama_3(gguf.tensors[_LLAMA_3], theta, turned)}
    if kind == "none" and _LONG not in gguf.tensors:
        return fields
    if kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": about.get(_FACTOR)}
        if kind == "yarn":
            told = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
            scaling |= {field: about.get(f"rope.scaling.yarn_{key}") for field, key in told.items()}
            scaling["original_max_position_embeddings"] = about.get(_ORIGINAL)
        return fields | {"rope_scaling": scaling}
    if not {_SHORT, _LONG} <= gguf.tensors.keys():
        raise UserError(f"{gguf.file}: rope.scaling.type={kind!r} is not supported; supported are linear, yarn")
    scaling = {"rope_type": "longrope"}
    for field, tensor in (("short_factor", _SHORT), ("long_factor", _LONG)):
        scaling[field] = [float(str(x)) for x in gguf.tensors[tensor].rows().astype(np.float32)]
    original = about.get(_ORIGINAL, shape["max_position"])
    stretch = max(shape["max_position"] / original, 1.0)
    derived = math.sqrt(1 + math.log(stretch) / math.log(max(original, 2)))  # which needs no saying
    if not math.isclose(about.get(_ATTENTION_FACTOR, derived), derived, rel_tol=1e-5):
        scaling["attention_factor"] = about[_ATTENTION_FACTOR]
    return fields | {"rope_scaling": scaling}


def _llama_3(tensor: StoredTensor, theta: float, turned: int) -> dict[str, Any] | None:
    """Llama 3's scaling, of which a file has only the divisor of each frequency; None if it divides none."""
    divisors = tensor.rows().astype(np.float32)
    factor = float(str(divisors.max()))
    plain, _ = frequencies(turned, theta, None)
    scaled, _ = frequencies(turned, theta, RopeScaling("llama3", max(factor, 1.0), **_BAND))
    if divisors.shape != plain.shape or not np.allclose(divisors, plain / scaled, rtol=1e-4):
        raise UserError(f"{tensor.file}: tensor {tensor.name} is not Llama 3's scaling by {factor:g}")
    names = {"original_max_position": "original_max_position_embeddings"}
    band = {names.get(name, name): value for name, value in _BAND.items()}
    return None if factor == 1 else {"rope_type": "llama3", "factor": factor, **band}


def _of_family(model_type: str, about: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a family has of its own."""
    fields: dict[str, Any] = {}
    if model_type in ("mistral", "mixtral", "phi3", "starcoder2", "gemma3_text") or about.get(_WINDOW):
        fields["sliding_window"] = about.get(_WINDOW) or None  # silence would mean that of the family's first model
    if model_type == "qwen3_moe":
        fields["norm_topk_prob"] = True  # llama.cpp always does
    if model_type in _LARGEST:
        by_width = shape["num_layers"] == _LARGEST[model_type]
        fields["query_pre_attn_scalar"] = shape["hidden_size"] // shape["num_heads"] if by_width else shape["head_dim"]
        pattern = about.get(_PATTERN)
        if isinstance(pattern, list):
            fields["layer_types"] = ["sliding_attention" if one else "full_attention" for one in pattern]
        elif pattern:
            every = range(1, shape["num_layers"] + 1)
            fields["layer_types"] = ["sliding_attention" if n % pattern else "full_attention" for n in every]
    if _LOCAL in about:
        fields["rope_local_base_freq"] = about[_LOCAL]
    return fields
