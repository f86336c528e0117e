"""Gemma 1 and 2, and the text part of Gemma 3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.models.families.family import (
    DEFAULTS,
    FIELDS,
    Family,
    local_and_full,
    local_and_full_to_hf,
    rope_from_hf,
    rope_to_hf,
    unsupported,
    windows,
    windows_to_hf,
)
from prefalign_jax.models.families.llama import QK_NORMS, weights

_TANH = "gelu_pytorch_tanh"
_CONSTANT = {"norm": "rms_unit", "activation": "gelu_tanh"}
_FIXED = {"hidden_activation": _TANH, "attention_bias": False, "use_bidirectional_attention": False}
_DEFAULTS = {**DEFAULTS, "max_position_embeddings": 8192, "head_dim": 256, "tie_word_embeddings": True}
_SANDWICH = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "post_mlp_norm",
}


def _embedding(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"embedding_scale": math.sqrt(hf["hidden_size"])}


def _gemma(hf: Mapping[str, Any]) -> dict[str, Any]:
    if hf.get("hidden_act") not in (None, "gelu", _TANH):  # the first files say gelu and mean its approximation
        raise unsupported("hidden_act", hf["hidden_act"], repr(_TANH))
    return {**_embedding(hf), **rope_from_hf(hf)}


def _gemma_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {**rope_to_hf(config), "hidden_act": _TANH}


def _query_scale(hf: Mapping[str, Any]) -> dict[str, Any]:
    scalar = hf["query_pre_attn_scalar"]
    if not isinstance(scalar, (int, float)) or scalar <= 0 or scalar != int(scalar):
        raise unsupported("query_pre_attn_scalar", scalar, "a positive whole number")
    return {"query_scale": int(scalar) ** -0.5}


def _query_scale_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {"query_pre_attn_scalar": round((config.query_scale or config.head_dim**-0.5) ** -2)}


def _gemma2(hf: Mapping[str, Any]) -> dict[str, Any]:
    fields = {**_embedding(hf), **rope_from_hf(hf), **_query_scale(hf)}
    return {**fields, "windows": windows(hf, lambda layer: (layer + 1) % 2 != 0)}


def _gemma2_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {**rope_to_hf(config), **_query_scale_to_hf(config), **windows_to_hf(config)}


def _gemma3(hf: Mapping[str, Any]) -> dict[str, Any]:
    every, local = hf["sliding_window_pattern"], hf["rope_local_base_freq"]
    return {**_embedding(hf), **_query_scale(hf), **local_and_full(hf, every=every, local_theta=local)}


def _gemma3_to_hf(config: DecoderConfig) -> dict[str, Any]:
    local = config.local_rope_theta or config.rope_theta
    return {**local_and_full_to_hf(config), "rope_local_base_freq": local, **_query_scale_to_hf(config)}


FAMILIES = {
    "gemma": Family(
        "GemmaForCausalLM",
        "GemmaForSequenceClassification",
        weights(),
        FIELDS,
        constant=_CONSTANT,
        fixed=_FIXED,
        defaults={**_DEFAULTS, "num_key_value_heads": 16},
        read=_gemma,
        write=_gemma_to_hf,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2ForSequenceClassification",
        weights(norms=_SANDWICH),
        {**FIELDS, "attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"},
        constant={**_CONSTANT, "residual": "sandwich"},
        fixed=_FIXED,
        defaults={
            **_DEFAULTS,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
        read=_gemma2,
        write=_gemma2_to_hf,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextForSequenceClassification",
        weights(*QK_NORMS, norms=_SANDWICH),
        {**FIELDS, "logit_softcap": "final_logit_softcapping"},
        constant={**_CONSTANT, "residual": "sandwich", "qk_norm": "head"},
        fixed={**_FIXED, "attn_logit_softcapping": None},  # transformers has the field and does not compute it
        defaults={
            **_DEFAULTS,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
        read=_gemma3,
        write=_gemma3_to_hf,
    ),
}
