"""What a Hugging Face `model_type` means: its tensor names and config.json fields, as tables read both ways."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from prefalign_jax.files import Shape, shaped
from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.models.rope import RopeScaling
from prefalign_jax.types import UserError


class Weight(NamedTuple):
    """A row of a family's name table. Rows that follow each other under one name share its tensor.

    Attributes:
      name: the tensor's Hugging Face name, with {} in the place of the layer's number, and of the expert's.
      path: the parameter's path; layers, and then experts, are stacked there on leading axes.
      transpose: whether Hugging Face stores [out, in] where the parameter is [in, out].
      interleaved: of rows that share a tensor, how it holds their outputs: '' one row after the other; 'heads' head by
        head (q k v q k v ...); 'outputs' one by one (gate up gate up ...).
    """

    name: str
    path: str
    transpose: bool = False
    interleaved: str = ""


class Family(NamedTuple):
    """What a `model_type` means.

    Attributes:
      architecture: the class that transformers instantiates.
      reward_architecture: the same for a reward model; None where transformers has none.
      weights: the name table.
      fields: DecoderConfig field -> config.json field.
      constant: DecoderConfig fields that are the same in every model of the family.
      fixed: fields of config.json whose value the decoder has built in; another value is refused, and this one is
        written on export.
      defaults: what transformers assumes where the file is silent.
      read: config.json, with the defaults -> DecoderConfig fields that a table does not tell.
      write: the other way round.
      quantizations: the `quant_method`s of stored weights that are read, as plain ones.
    """

    architecture: str
    reward_architecture: str | None
    weights: tuple[Weight, ...]
    fields: Mapping[str, str]
    constant: Mapping[str, Any] = {}
    fixed: Mapping[str, Any] = {}
    defaults: Mapping[str, Any] = {}
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda hf: {}
    write: Callable[[DecoderConfig], dict[str, Any]] = lambda config: {}
    quantizations: tuple[str, ...] = ()


SCORE = "score.weight"


def linear(name: str, *paths: str, transpose: bool = True, interleaved: str = "") -> list[Weight]:
    """The rows of a linear map with a bias, which may hold several of ours; paths are those within a layer."""
    kernels = [Weight(f"{name}.weight", f"layers/{path}/kernel", transpose, interleaved) for path in paths]
    return kernels + [Weight(f"{name}.bias", f"layers/{path}/bias", False, interleaved) for path in paths]


def layer_norm(name: str, path: str) -> list[Weight]:
    """The rows of a LayerNorm with its bias."""
    return [Weight(f"{name}.weight", f"{path}/scale"), Weight(f"{name}.bias", f"{path}/bias")]


# The fields of most families.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_position": "max_position_embeddings",
    "init_std": "initializer_range",
}
DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02, "rope_theta": 10000.0}

LAYER_TYPES = ("sliding_attention", "full_attention")

# Hugging Face's names of activations -> the decoder's.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def activation(hf: Mapping[str, Any], field: str) -> str:
    """The decoder's name of the activation that a field of config.json names.

    Raises:
      UserError: the decoder does not know it.
    """
    if hf.get(field) not in ACTIVATIONS:
        raise unsupported(field, hf.get(field), ", ".join(ACTIVATIONS))
    return ACTIVATIONS[hf[field]]


def activation_to_hf(config: DecoderConfig, tanh: str) -> str:
    """Hugging Face's name of the activation; `tanh` is what the family calls the approximate GELU."""
    return tanh if config.activation == "gelu_tanh" else config.activation


# The shapes of fields of config.json that the families read, beside those in their tables of fields.
_ROPE = {
    **dict.fromkeys(("rope_theta?", "partial_rotary_factor?", "factor?"), "a positive number or null"),
    **dict.fromkeys(("low_freq_factor?", "high_freq_factor?", "beta_fast?", "beta_slow?"), "a positive number or null"),
    **dict.fromkeys(("mscale?", "mscale_all_dim?", "llama_4_scaling_beta?"), "a number or null"),
    "attention_factor?": "a positive number or null",
    **dict.fromkeys(("short_factor?", "long_factor?"), ("null", ["a positive number"])),
    "original_max_position_embeddings?": "a count or null",
    "truncate?": "true or false or null",
    **dict.fromkeys(("rope_type?", "type?"), "a string or null"),
}
_COUNTS = "sliding_window no_rope_layer_interval n_inner word_embed_proj_dim num_labels"
_COUNTS += " num_experts original_max_position_embeddings full_attention_interval"
_POSITIVE = "rope_theta rope_local_base_freq rotary_emb_base rotary_pct partial_rotary_factor query_pre_attn_scalar"
_POSITIVE += " logit_scale"
_FLAGS = "use_sliding_window use_parallel_residual attention_bias enable_bias norm_topk_prob"
CONFIG_JSON: Shape = {
    **{f"{name}?": "a count or null" for name in _COUNTS.split()},
    **{f"{name}?": "a positive number or null" for name in _POSITIVE.split()},
    **{f"{name}?": "true or false or null" for name in _FLAGS.split()},
    **{f"{name}?": "a string or null" for name in ("hidden_act", "hidden_activation", "activation_function")},
    **{f"{name}?": ("null", ["a string"]) for name in ("architectures", "layer_types")},
    "no_rope_layers?": ("null", ["an integer"]),
    "sliding_window_pattern?": "a count or a string or null",
    "num_local_experts?": "a count or zero or null",
    "max_window_layers?": "an integer or null",
    "id2label?": "an object or null",
    # One for all layers, or one for each kind of layer.
    **{
        f"{name}?": ("null", {**_ROPE, **{f"{kind}?": ("null", _ROPE) for kind in LAYER_TYPES}})
        for name in ("rope_scaling", "rope_parameters")
    },
}
# The type of a field of DecoderConfig -> the shape of the field of config.json that it is read from.
_OF_TYPE = {"int": "a count", "float": "a number", "float | None": "a positive number", "bool": "true or false"}


def check_shapes(hf: Mapping[str, Any], fields: Mapping[str, str]) -> None:
    """Checks that the fields of a config.json are numbers where numbers are due, and so on.

    Args:
      hf: its content.
      fields: DecoderConfig field -> config.json field.

    Raises:
      UserError: naming the field.
    """
    types = {field.name: field.type for field in dataclasses.fields(DecoderConfig)}
    table = {f"{theirs}?": f"{_OF_TYPE[types[ours]]} or null" for ours, theirs in fields.items()}
    shaped(dict(hf), {**CONFIG_JSON, **table}, where="config.json")


def unsupported(name: str, value: Any, supported: str) -> UserError:
    """The error for a field of config.json with a value that the decoder does not compute."""
    return UserError(f"config.json: {name}={value!r} is not supported; supported: {supported}")


def layer_kinds(hf: Mapping[str, Any], known: Collection[str]) -> list[str] | None:
    """`layer_types`, the kind of every layer, where config.json has it.

    Raises:
      UserError: it names a kind that is not known, or does not name one for each layer.
    """
    kinds, layers = hf.get("layer_types") or None, hf["num_hidden_layers"]
    for kind in kinds or ():
        if kind not in known:
            raise unsupported("layer_types", kind, ", ".join(known))
    if kinds and len(kinds) != layers:
        raise unsupported("layer_types", f"{len(kinds)} of them", f"one for each of the {layers} layers")
    return kinds


def windows(hf: Mapping[str, Any], sliding: Callable[[int], bool] = lambda layer: True) -> tuple[int, ...]:
    """The window of every layer from `sliding_window`, () if none hides anything.

    Args:
      hf: config.json.
      sliding: layer number -> whether it has a window, where `layer_types` does not tell.

    Raises:
      UserError: `layer_types` names another kind of layer, or does not name one for each.
    """
    layers, kinds = range(hf["num_hidden_layers"]), layer_kinds(hf, LAYER_TYPES)
    window = hf.get("sliding_window")
    if window is None or window >= hf["max_position_embeddings"]:
        return ()
    has = [kinds[n] == "sliding_attention" for n in layers] if kinds else [sliding(n) for n in layers]
    return tuple(window if one else 0 for one in has) if any(has) else ()


def window_of(config: DecoderConfig) -> int | None:
    """The one window of a decoder's layers, None if there is none."""
    return max(config.windows, default=0) or None


def layer_types(config: DecoderConfig) -> list[str]:
    """Hugging Face's list of which layers have a window."""
    windows = config.windows or (0,) * config.num_layers
    return ["sliding_attention" if window else "full_attention" for window in windows]


def windows_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The fields that tell transformers of windows in some layers; it asks for a number, used or not."""
    return {"sliding_window": window_of(config) or config.max_position, "layer_types": layer_types(config)}


# Rope type -> (RopeScaling fields it needs, fields it may have).
_ROPE_KINDS = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position"), ()),
    "yarn": (("factor", "original_max_position"), ("beta_fast", "beta_slow", "truncate", "attention_factor")),
    "dynamic": (("factor",), ()),
    "longrope": (("factor", "original_max_position", "short_factor", "long_factor"), ("attention_factor",)),
}
_ROPE_NAMES = {"original_max_position": "original_max_position_embeddings"}  # the others are the same on both sides


def rope_from_hf(hf: Mapping[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """rope_theta, rope_scaling and rope_fraction from rope_parameters (transformers 5) or the fields before it.

    Args:
      hf: config.json.
      partial: whether the family may rotate only part of each head.

    Raises:
      UserError: a kind of scaling, or a part, that the decoder does not compute.
    """
    section = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"  # transformers prefers them in this order
    rope = {key: value for key, value in (hf.get(section) or {}).items() if value is not None}
    theta = float(rope.get("rope_theta", hf["rope_theta"]))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise unsupported(section, "one per layer type", "one for all layers")
    fraction = float(rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)))
    if not 0 < fraction <= 1 or (fraction != 1.0 and not partial):
        raise unsupported("partial_rotary_factor", fraction, "1.0")
    plain = {"rope_theta": theta, "rope_scaling": None, "rope_fraction": fraction}
    if kind == "default":
        return plain
    if kind not in _ROPE_KINDS:
        raise unsupported(f"{section}.rope_type", kind, ", ".join(["default", *_ROPE_KINDS]))
    original = hf.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    rope["original_max_position"] = original or hf["max_position_embeddings"]
    if kind in ("yarn", "longrope"):
        rope.setdefault("factor", hf["max_position_embeddings"] / rope["original_max_position"])
        if kind == "yarn" and rope.get("mscale") and rope.get("mscale_all_dim") and rope["factor"] > 1:
            up, down = (0.1 * rope[name] * math.log(rope["factor"]) + 1 for name in ("mscale", "mscale_all_dim"))
            rope.setdefault("attention_factor", up / down)
    needed, optional = _ROPE_KINDS[kind]
    for name in needed:
        if name not in rope:
            raise UserError(f"config.json: {section} has no {name}; rope type {kind!r} needs {', '.join(needed)}")
    if kind == "longrope":
        head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        count = int(head_dim * fraction) // 2
        for name in ("short_factor", "long_factor"):
            if not isinstance(rope[name], list) or len(rope[name]) != count:
                raise unsupported(f"{section}.{name}", rope[name], f"{count} numbers, one for each frequency")
            rope[name] = tuple(map(float, rope[name]))
    scaling = RopeScaling(kind, **{name: rope[name] for name in needed + optional if name in rope})
    return {**plain, "rope_scaling": scaling}


def rope_to_hf(config: DecoderConfig, *, partial: bool = False) -> dict[str, Any]:
    """The fields that tell transformers 4 and 5 of the rotation; either generation ignores the other's.

    Args:
      config: the decoder's shape.
      partial: whether to name the part that is rotated even if that is all, where silence would mean another.
    """
    rope = {"rope_type": "default"}
    if config.rope_scaling is not None:
        fields = dataclasses.asdict(config.rope_scaling)
        rope = {"rope_type": fields.pop("kind")}
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        if fields["truncate"]:  # where silence means it
            del fields["truncate"]
        rope |= {_ROPE_NAMES.get(name, name): value for name, value in fields.items() if value is not None}
    part = {"partial_rotary_factor": config.rope_fraction} if partial or config.rope_fraction != 1.0 else {}
    return {
        "rope_parameters": {**rope, "rope_theta": config.rope_theta, **part},
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
        **part,
    }


def windowed(hf: Mapping[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """`rope_from_hf` and `windows`, of a family whose layers all have the window."""
    return {**rope_from_hf(hf, partial=partial), "windows": windows(hf)}


def windowed_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The other way round."""
    return {**rope_to_hf(config), "sliding_window": window_of(config)}


def local_and_full(hf: Mapping[str, Any], *, every: int, local_theta: float) -> dict[str, Any]:
    """Windows and rotations of a family whose layers with a window rotate apart from the others, and are not scaled.

    Args:
      hf: config.json. transformers 5 has a rotation for each kind of layer; before it, rope_scaling was the full
        layers' alone.
      every: which layers have no window, where `layer_types` does not tell.
      local_theta: base of the layers with a window, where `rope_parameters` does not tell.

    Raises:
      UserError: layers with a window have a scaled rotation, or there is no window.
    """
    nested = hf.get("rope_parameters") or {}
    if not nested.keys() <= set(LAYER_TYPES):
        raise unsupported("rope_parameters", nested, "one for each of " + ", ".join(LAYER_TYPES))
    local, full = ({**(nested.get(name) or {})} for name in LAYER_TYPES)
    full |= hf.get("rope_scaling") or {}
    flat = {**hf, "rope_scaling": None, "rope_parameters": full}
    near = rope_from_hf({**flat, "rope_parameters": local, "rope_theta": local_theta})
    if near["rope_scaling"] is not None:
        raise unsupported("rope_parameters.sliding_attention.rope_type", near["rope_scaling"].kind, "default")
    if hf["sliding_window"] is None:
        raise unsupported("sliding_window", None, "a number")
    if not isinstance(every, int):
        raise unsupported("sliding_window_pattern", every, "a count")
    # A window that hides nothing still decides by which rotation its layer turns.
    sized = windows({**hf, "max_position_embeddings": math.inf}, lambda layer: (layer + 1) % every != 0)
    return {**rope_from_hf(flat), "windows": sized, "local_rope_theta": near["rope_theta"] if sized else None}


def local_and_full_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The other way round."""
    rope = rope_to_hf(config)
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta or config.rope_theta}
    nested = {"full_attention": rope["rope_parameters"], "sliding_attention": local}
    return {**rope, "rope_parameters": nested, **windows_to_hf(config)}


def rotating_windows(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Windows and `rope_layers` of a family whose layers rotate where they have a window, even one that hides nothing.

    Raises:
      UserError: neither `layer_types` nor a count in `sliding_window_pattern` tells which layers have one.
    """
    every = hf["sliding_window_pattern"]
    if not hf.get("layer_types") and not isinstance(every, int):
        raise unsupported("sliding_window_pattern", every, "a count, or layer_types")
    sized = windows({**hf, "max_position_embeddings": math.inf}, lambda layer: (layer + 1) % every != 0)
    turns = tuple(map(bool, sized or (0,) * hf["num_hidden_layers"]))
    return {"windows": sized, "rope_layers": () if all(turns) else turns}
