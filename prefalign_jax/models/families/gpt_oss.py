"""gpt-oss: a mixture of experts with biases, attention sinks, and a window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.models.families.family import (
    DEFAULTS,
    FIELDS,
    SCORE,
    Family,
    Weight,
    layer_types,
    linear,
    rope_from_hf,
    rope_to_hf,
    window_of,
    windows,
)

_LAYER = "model.layers.{}."
_EXPERTS = f"{_LAYER}mlp.experts."
# What silence means. The class that reads files of transformers 4 takes it for a missing rotation too.
_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_YARN |= {"original_max_position_embeddings": 4096}


def _together(name: str, kind: str, *paths: str) -> tuple[Weight, ...]:
    """The rows of a tensor of all experts, [E, in, out], in which outputs of several products may take turns."""
    return tuple(Weight(f"{_EXPERTS}{name}", f"layers/experts/{path}/{kind}", interleaved="outputs") for path in paths)


_WEIGHTS = (
    Weight("model.embed_tokens.weight", "embed/embedding"),
    *(row for x in "qkvo" for row in linear(f"{_LAYER}self_attn.{x}_proj", f"attention/{x}")),
    Weight(f"{_LAYER}self_attn.sinks", "layers/attention/sinks"),
    *linear(f"{_LAYER}mlp.router", "experts/router"),
    *_together("gate_up_proj", "kernel", "gate", "up"),
    *_together("gate_up_proj_bias", "bias", "gate", "up"),
    *_together("down_proj", "kernel", "down"),
    *_together("down_proj_bias", "bias", "down"),
    Weight(f"{_LAYER}input_layernorm.weight", "layers/attention_norm/scale"),
    Weight(f"{_LAYER}post_attention_layernorm.weight", "layers/mlp_norm/scale"),
    Weight("model.norm.weight", "final_norm/scale"),
    Weight("lm_head.weight", "head/kernel"),
    Weight(SCORE, "score/kernel"),
)


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    if not hf.get("rope_scaling") and not hf.get("rope_parameters"):
        hf = {**hf, "rope_parameters": _YARN}
    biased = bool(hf["attention_bias"])
    sliding = windows(hf, lambda layer: layer % 2 == 0)
    return {**rope_from_hf(hf), "qkv_bias": biased, "output_bias": biased, "windows": sliding}


def _write(config: DecoderConfig) -> dict[str, Any]:
    attention = {"attention_bias": config.qkv_bias, "sliding_window": window_of(config)}
    return {**rope_to_hf(config), **attention, "layer_types": layer_types(config)}


FAMILIES = {
    "gpt_oss": Family(
        "GptOssForCausalLM",
        "GptOssForSequenceClassification",
        _WEIGHTS,
        {
            **FIELDS,
            "num_experts": "num_local_experts",
            "experts_per_token": "num_experts_per_tok",
            "swiglu_limit": "swiglu_limit",
            "swiglu_alpha": "swiglu_alpha",
        },
        constant={"sinks": True, "mlp_bias": True},
        fixed={"hidden_act": "silu"},
        defaults={
            **DEFAULTS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
            "sliding_window": 128,
            "attention_bias": True,
        },
        read=_read,
        write=_write,
        quantizations=("mxfp4",),
    ),
}
