"""Command R7B and A: attention and MLP side by side after one norm, and only layers with a window rotate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.models.families.family import (
    DEFAULTS,
    FIELDS,
    Family,
    rope_to_hf,
    rotating_windows,
    unsupported,
    windows_to_hf,
)
from prefalign_jax.models.families.llama import BIASES, biased, weights

_SCALE = "logit_scale"


def _cohere2(hf: Mapping[str, Any]) -> dict[str, Any]:
    if hf["sliding_window"] is None:
        raise unsupported("sliding_window", None, "a number")
    return {**biased(hf), **rotating_windows(hf), "logit_divisor": 1 / hf[_SCALE]}


def _cohere2_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {**rope_to_hf(config), **windows_to_hf(config), _SCALE: 1 / (config.logit_divisor or 1.0)}


FAMILIES = {
    "cohere2": Family(
        "Cohere2ForCausalLM",
        None,
        weights(*BIASES, norms={"input_layernorm": "attention_norm"}),
        {name: field for name, field in FIELDS.items() if name != "head_dim"}
        | {"qkv_bias": "attention_bias", "norm_eps": "layer_norm_eps"},
        constant={"norm": "centred", "residual": "parallel_shared", "rope_interleaved": True},
        fixed={"hidden_act": "silu"},
        defaults={
            **{name: value for name, value in DEFAULTS.items() if name != "rms_norm_eps"},
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            _SCALE: 0.0625,
        },
        read=_cohere2,
        write=_cohere2_to_hf,
    ),
}
