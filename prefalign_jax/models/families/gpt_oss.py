"""gpt-oss: a mixture of experts with biases, attention sinks, and a window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.models.families.family import (
    DEFAULTS,
    FIELDS,
    Family,
    Weight,
    linear,
    rope_to_hf,
    windows,
    windows_to_hf,
)
from prefalign_jax.models.families.llama import QKV_BIASES, biased, weights

# What a file means that says nothing of the rotation.
_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_YARN |= {"original_max_position_embeddings": 4096}
_LAYER = "model.layers.{}."


def _experts(name: str, kind: str, *products: str) -> tuple[Weight, ...]:
    """The rows of a tensor of all experts, [E, in, out], in which the outputs of several products take turns."""
    name = f"{_LAYER}mlp.experts.{name}"
    return tuple(Weight(name, f"layers/experts/{product}/{kind}", interleaved="outputs") for product in products)


_MLP = (
    *linear(f"{_LAYER}mlp.router", "experts/router"),
    *_experts("gate_up_proj", "kernel", "gate", "up"),
    *_experts("gate_up_proj_bias", "bias", "gate", "up"),
    *_experts("down_proj", "kernel", "down"),
    *_experts("down_proj_bias", "bias", "down"),
)
_ATTENTION = (
    *QKV_BIASES,
    Weight(f"{_LAYER}self_attn.o_proj.bias", "layers/attention/o/bias"),
    Weight(f"{_LAYER}self_attn.sinks", "layers/attention/sinks"),
)


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    if not hf.get("rope_scaling") and not hf.get("rope_parameters"):
        hf = {**hf, "rope_parameters": _YARN}
    return {**biased(hf), "windows": windows(hf, lambda layer: layer % 2 == 0)}


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {**rope_to_hf(config), **windows_to_hf(config)}


FAMILIES = {
    "gpt_oss": Family(
        "GptOssForCausalLM",
        "GptOssForSequenceClassification",
        weights(*_ATTENTION, mlp=_MLP),
        {
            **FIELDS,
            "qkv_bias": "attention_bias",
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
