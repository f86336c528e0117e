"""Ministral (windows in some layers) and Ministral 3 (queries that grow with the position)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.models.families.family import (
    DEFAULTS,
    FIELDS,
    Family,
    layer_types,
    unsupported,
    windowed,
    windowed_to_hf,
)
from prefalign_jax.models.families.llama import weights

# What transformers assumes of a Ministral 3 that says nothing of its rotation.
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_BETA = "llama_4_scaling_beta"


def _ministral3(hf: Mapping[str, Any]) -> dict[str, Any]:
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or _ROPE
    fields = windowed({**hf, "rope_scaling": None, "rope_parameters": rope})
    if fields["rope_scaling"] is None or fields["rope_scaling"].original_max_position is None:
        raise unsupported("rope_parameters.rope_type", rope.get("rope_type"), "yarn")
    if rope.get(_BETA) is None:
        raise unsupported(f"rope_parameters.{_BETA}", None, "a number")
    return {**fields, "query_growth": float(rope[_BETA])}


def _ministral3_to_hf(config: DecoderConfig) -> dict[str, Any]:
    fields = windowed_to_hf(config)
    grows = {_BETA: config.query_growth}
    return {**fields, **{name: {**(fields[name] or {}), **grows} for name in ("rope_parameters", "rope_scaling")}}


FAMILIES = {
    "ministral": Family(
        "MinistralForCausalLM",
        "MinistralForSequenceClassification",
        weights(),
        FIELDS,
        fixed={"hidden_act": "silu"},
        defaults={
            **DEFAULTS,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        read=windowed,
        write=lambda config: {**windowed_to_hf(config), "layer_types": layer_types(config)},
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        "Ministral3ForSequenceClassification",
        weights(),
        FIELDS,
        fixed={"hidden_act": "silu"},
        defaults={
            **DEFAULTS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 262144,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        read=_ministral3,
        write=_ministral3_to_hf,
    ),
}
