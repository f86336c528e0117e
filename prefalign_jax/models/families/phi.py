"""Phi (1, 1.5 and 2) and Phi-3, which Phi-4 is too."""

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
    activation,
    activation_to_hf,
    layer_norm,
    linear,
    rope_from_hf,
    rope_to_hf,
    unsupported,
    windowed,
    windowed_to_hf,
)

_LAYER = "model.layers.{}."
_EMBEDDING = Weight("model.embed_tokens.weight", "embed/embedding")


_PHI_PRODUCTS = {f"self_attn.{x}_proj": f"attention/{x}" for x in "qkv"}
_PHI_PRODUCTS |= {"self_attn.dense": "attention/o", "mlp.fc1": "mlp/up", "mlp.fc2": "mlp/down"}
_PHI_WEIGHTS = (
    _EMBEDDING,
    *(row for theirs, ours in _PHI_PRODUCTS.items() for row in linear(f"{_LAYER}{theirs}", ours)),
    *layer_norm(f"{_LAYER}input_layernorm", "layers/attention_norm"),
    *layer_norm("model.final_layernorm", "final_norm"),
    Weight("lm_head.weight", "head/kernel"),
    Weight("lm_head.bias", "head/bias"),
    Weight(SCORE, "score/kernel"),
)


def _phi3_weights() -> tuple[Weight, ...]:
    attention, mlp = f"{_LAYER}self_attn.", f"{_LAYER}mlp."
    return (
        _EMBEDDING,
        *(Weight(f"{attention}qkv_proj.weight", f"layers/attention/{x}/kernel", transpose=True) for x in "qkv"),
        Weight(f"{attention}o_proj.weight", "layers/attention/o/kernel", transpose=True),
        *(Weight(f"{mlp}gate_up_proj.weight", f"layers/mlp/{x}/kernel", transpose=True) for x in ("gate", "up")),
        Weight(f"{mlp}down_proj.weight", "layers/mlp/down/kernel", transpose=True),
        Weight(f"{_LAYER}input_layernorm.weight", "layers/attention_norm/scale"),
        Weight(f"{_LAYER}post_attention_layernorm.weight", "layers/mlp_norm/scale"),
        Weight("model.norm.weight", "final_norm/scale"),
        Weight("lm_head.weight", "head/kernel"),
        Weight(SCORE, "score/kernel"),
    )


def _phi(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {**rope_from_hf(hf, partial=True), "activation": activation(hf, "hidden_act")}


def _phi_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {**rope_to_hf(config, partial=True), "hidden_act": activation_to_hf(config, "gelu_new")}


def _phi3(hf: Mapping[str, Any]) -> dict[str, Any]:
    for section in ("rope_scaling", "rope_parameters"):
        rope = hf.get(section) or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind in ("su", "yarn"):  # older names of the same, as transformers reads them
            hf = {**hf, section: {**rope, "rope_type": "longrope"}}
        elif kind not in ("default", "longrope"):
            raise unsupported(f"{section}.rope_type", kind, "default, longrope")
    return windowed(hf, partial=True)


def _phi3_to_hf(config: DecoderConfig) -> dict[str, Any]:
    fields, scaling = windowed_to_hf(config), config.rope_scaling
    original = config.max_position
    if scaling is not None:
        original = scaling.original_max_position
        if scaling.attention_factor is None and scaling.factor == config.max_position / original:
            # transformers 4 refuses any other field, and derives the rest from the two lengths.
            factors = {name: list(getattr(scaling, name)) for name in ("short_factor", "long_factor")}
            fields["rope_scaling"] = {"type": "longrope", **factors}
    return {**fields, "original_max_position_embeddings": original}


FAMILIES = {
    "phi": Family(
        "PhiForCausalLM",
        "PhiForSequenceClassification",
        _PHI_WEIGHTS,
        {ours: theirs for ours, theirs in FIELDS.items() if ours != "tie_embeddings"} | {"norm_eps": "layer_norm_eps"},
        constant={
            "norm": "layer",
            "residual": "parallel_shared",
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
            "head_bias": True,
            "gated": False,
        },
        fixed={"qk_layernorm": False, "tie_word_embeddings": False},  # a tied head would have a bias all the same
        defaults={
            "layer_norm_eps": 1e-5,
            "initializer_range": 0.02,
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
            "partial_rotary_factor": 0.5,
            "hidden_act": "gelu_new",
        },
        read=_phi,
        write=_phi_to_hf,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        "Phi3ForSequenceClassification",
        _phi3_weights(),
        FIELDS,
        fixed={"hidden_act": "silu"},
        defaults={
            **DEFAULTS,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        read=_phi3,
        write=_phi3_to_hf,
    ),
}
