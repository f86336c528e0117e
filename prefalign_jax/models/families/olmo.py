"""OLMo 2 and 3: norms on the outputs of attention and MLP, and over all heads at once of queries and keys."""

from __future__ import annotations

from prefalign_jax.models.families.family import (
    DEFAULTS,
    FIELDS,
    Family,
    local_and_full,
    local_and_full_to_hf,
    rope_from_hf,
    rope_to_hf,
)
from prefalign_jax.models.families.llama import QK_NORMS, weights

NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_mlp_norm"}
_WEIGHTS = weights(*QK_NORMS, norms=NORMS)
_CONSTANT = {"residual": "post", "qk_norm": "width"}
_FIXED = {"hidden_act": "silu", "attention_bias": False}
_DEFAULTS = {**DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}

FAMILIES = {
    "olmo2": Family(
        "Olmo2ForCausalLM",
        "Olmo2ForSequenceClassification",
        _WEIGHTS,
        FIELDS,
        constant=_CONSTANT,
        fixed=_FIXED,
        defaults=_DEFAULTS,
        read=rope_from_hf,
        write=rope_to_hf,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        "Olmo3ForSequenceClassification",
        _WEIGHTS,
        FIELDS,
        constant=_CONSTANT,
        fixed=_FIXED,
        defaults={**_DEFAULTS, "rope_theta": 500000.0, "sliding_window": 4096},
        read=lambda hf: local_and_full(hf, every=4, local_theta=hf["rope_theta"]),
        write=local_and_full_to_hf,
    ),
}
