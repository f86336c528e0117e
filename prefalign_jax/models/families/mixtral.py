"""Llamas with a mixture of experts: Mixtral and Qwen 3 MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.models.families.family import (
    DEFAULTS,
    FIELDS,
    Family,
    Weight,
    rope_from_hf,
    rope_to_hf,
    unsupported,
    windowed,
    windowed_to_hf,
)
from prefalign_jax.models.families.llama import QK_NORMS, weights


def _experts(layer: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """The rows of a layer's router and experts; the second {} is the expert's number."""
    names = {"gate": gate, "up": up, "down": down}
    return (
        Weight(f"{layer}.gate.weight", "layers/experts/router/kernel", transpose=True),
        *(
            Weight(f"{layer}.experts.{{}}.{theirs}.weight", f"layers/experts/{ours}/kernel", transpose=True)
            for ours, theirs in names.items()
        ),
    )


def _without_mlp(rows: tuple[Weight, ...], *experts: Weight) -> tuple[Weight, ...]:
    """A table whose MLP's rows are replaced by experts'."""
    first = next(i for i, row in enumerate(rows) if row.path.startswith("layers/mlp/"))
    rest = (row for row in rows[first:] if not row.path.startswith("layers/mlp/"))
    return (*rows[:first], *experts, *rest)


def _qwen(hf: Mapping[str, Any]) -> dict[str, Any]:
    experts = hf.get("num_local_experts") or hf.get("num_experts")
    if not experts:
        raise unsupported("num_experts", experts, "a positive number")
    if hf.get("mlp_only_layers"):
        raise unsupported("mlp_only_layers", hf["mlp_only_layers"], "[], experts in every layer")
    if hf.get("use_sliding_window"):
        raise unsupported("use_sliding_window", True, "False")
    return {**rope_from_hf(hf), "num_experts": experts, "renormalise_router": bool(hf.get("norm_topk_prob", False))}


def _qwen_to_hf(config: DecoderConfig) -> dict[str, Any]:
    # Releases of transformers differ in the name of the first.
    experts = {"num_experts": config.num_experts, "num_local_experts": config.num_experts}
    return {
        **rope_to_hf(config),
        **experts,
        "norm_topk_prob": config.renormalise_router,
        "mlp_only_layers": [],
        "sliding_window": None,
    }


FAMILIES = {
    "mixtral": Family(
        "MixtralForCausalLM",
        "MixtralForSequenceClassification",
        _without_mlp(weights(), *_experts("model.layers.{}.block_sparse_moe", "w1", "w3", "w2")),
        {**FIELDS, "num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
        fixed={"hidden_act": "silu"},
        defaults={
            **DEFAULTS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        read=windowed,
        write=windowed_to_hf,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeForSequenceClassification",
        _without_mlp(weights(*QK_NORMS), *_experts("model.layers.{}.mlp", "gate_proj", "up_proj", "down_proj")),
        {**FIELDS, "intermediate_size": "moe_intermediate_size", "experts_per_token": "num_experts_per_tok"},
        constant={"qk_norm": "head"},
        fixed={"hidden_act": "silu", "attention_bias": False, "decoder_sparse_step": 1},
        defaults={
            **DEFAULTS,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
        },
        read=_qwen,
        write=_qwen_to_hf,
    ),
}
