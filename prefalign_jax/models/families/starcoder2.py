"""StarCoder 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.models.families.family import (
    FIELDS,
    SCORE,
    Family,
    Weight,
    activation,
    activation_to_hf,
    layer_norm,
    linear,
    windowed,
    windowed_to_hf,
)

_LAYER = "model.layers.{}."


_PRODUCTS = {f"self_attn.{x}_proj": f"attention/{x}" for x in "qkvo"} | {"mlp.c_fc": "mlp/up", "mlp.c_proj": "mlp/down"}
_WEIGHTS = (
    Weight("model.embed_tokens.weight", "embed/embedding"),
    *(row for theirs, ours in _PRODUCTS.items() for row in linear(f"{_LAYER}{theirs}", ours)),
    *layer_norm(f"{_LAYER}input_layernorm", "layers/attention_norm"),
    *layer_norm(f"{_LAYER}post_attention_layernorm", "layers/mlp_norm"),
    *layer_norm("model.norm", "final_norm"),
    Weight("lm_head.weight", "head/kernel"),
    Weight(SCORE, "score/kernel"),
)


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {**windowed(hf), "activation": activation(hf, "hidden_act")}


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {**windowed_to_hf(config), "hidden_act": activation_to_hf(config, "gelu_pytorch_tanh")}


FAMILIES = {
    "starcoder2": Family(
        "Starcoder2ForCausalLM",
        "Starcoder2ForSequenceClassification",
        _WEIGHTS,
        {**FIELDS, "norm_eps": "norm_epsilon"},
        constant={"norm": "layer", "qkv_bias": True, "output_bias": True, "mlp_bias": True, "gated": False},
        fixed={"use_bias": True, "norm_type": "layer_norm", "mlp_type": "default"},
        defaults={
            "norm_epsilon": 1e-5,
            "initializer_range": 0.018042,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
            "num_key_value_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
        },
        read=_read,
        write=_write,
    ),
}
