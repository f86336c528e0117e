"""Granite 3, and of Granite 4 the dense models: Llamas with four multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.models.families.family import DEFAULTS, Family, rope_to_hf, unsupported
from prefalign_jax.models.families.llama import BIASES, WITH_BIASES, biased, fused_mlp, weights

_MULTIPLIERS = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "query_scale": "attention_multiplier",
    "logit_divisor": "logits_scaling",
}
_FIELDS = {**WITH_BIASES, **_MULTIPLIERS}
_DEFAULTS = {**DEFAULTS, **dict.fromkeys(_MULTIPLIERS.values(), 1.0), "max_position_embeddings": 2048}
_ATTENTION = ("attention", "full_attention")  # transformers 4's name and 5's


def _hybrid(hf: Mapping[str, Any]) -> dict[str, Any]:
    if hf["num_local_experts"]:
        raise unsupported("num_local_experts", hf["num_local_experts"], "0, a dense model")
    kinds = hf.get("layer_types") or ["mamba"]
    for kind in kinds:
        if kind not in _ATTENTION:
            raise unsupported("layer_types", kind, "attention in every layer, no Mamba")
    if len(kinds) != hf["num_hidden_layers"]:
        raise unsupported("layer_types", f"{len(kinds)} of them", f"one for each of {hf['num_hidden_layers']} layers")
    turns = hf.get("position_embedding_type") == "rope"
    return {**biased(hf), "rope_layers": () if turns else (False,) * hf["num_hidden_layers"]}


def _hybrid_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {
        **rope_to_hf(config),
        "num_local_experts": 0,
        "layer_types": ["attention"] * config.num_layers,
        "position_embedding_type": None if config.rope_layers else "rope",
        # transformers checks these of a model without Mamba too.
        "mamba_n_heads": 1,
        "mamba_d_head": "auto",
    }


FAMILIES = {
    "granite": Family(
        "GraniteForCausalLM",
        None,
        weights(*BIASES),
        _FIELDS,
        fixed={"hidden_act": "silu"},
        defaults=_DEFAULTS,
        read=biased,
        write=rope_to_hf,
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        None,
        weights(*BIASES, mlp=fused_mlp("shared_mlp", "input_linear", "output_linear")),
        {ours: theirs for ours, theirs in _FIELDS.items() if ours != "mlp_bias"}
        | {"intermediate_size": "shared_intermediate_size"},
        fixed={"hidden_act": "silu"},
        defaults={**_DEFAULTS, "num_local_experts": 8, "shared_intermediate_size": 1024},
        read=_hybrid,
        write=_hybrid_to_hf,
    ),
}
