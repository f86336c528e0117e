"""GLM-4, as its first models have it (`glm`) and as those of 2025 (`glm4`), which have norms on the outputs too."""

from __future__ import annotations

import functools

from prefalign_jax.models.families.family import DEFAULTS, FIELDS, Family, rope_from_hf, rope_to_hf
from prefalign_jax.models.families.llama import QKV_BIASES, fused_mlp, weights

_MLP = fused_mlp("mlp", "gate_up_proj", "down_proj")
_FIELDS = {**FIELDS, "qkv_bias": "attention_bias"}
_CONSTANT = {"rope_interleaved": True}
_FIXED = {"hidden_act": "silu"}
_DEFAULTS = {
    **DEFAULTS,
    "rms_norm_eps": 1.5625e-07,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}
_READ = functools.partial(rope_from_hf, partial=True)
_WRITE = functools.partial(rope_to_hf, partial=True)

FAMILIES = {
    "glm": Family(
        "GlmForCausalLM",
        "GlmForSequenceClassification",
        weights(*QKV_BIASES, mlp=_MLP),
        _FIELDS,
        constant=_CONSTANT,
        fixed=_FIXED,
        defaults=_DEFAULTS,
        read=_READ,
        write=_WRITE,
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        "Glm4ForSequenceClassification",
        weights(
            *QKV_BIASES,
            mlp=_MLP,
            norms={
                "input_layernorm": "attention_norm",
                "post_self_attn_layernorm": "post_attention_norm",
                "post_attention_layernorm": "mlp_norm",
                "post_mlp_layernorm": "post_mlp_norm",
            },
        ),
        _FIELDS,
        constant={**_CONSTANT, "residual": "sandwich"},
        fixed=_FIXED,
        defaults=_DEFAULTS,
        read=_READ,
        write=_WRITE,
    ),
}
