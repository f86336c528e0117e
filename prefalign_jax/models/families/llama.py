"""Llama and its nearest relatives: Mistral, Qwen 2 and 3, SmolLM 3. SmolLM 2 and TinyStories are plain Llamas."""

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
    rope_from_hf,
    rope_to_hf,
    unsupported,
    windowed,
    windowed_to_hf,
    windows,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = "model.layers.{}."
_ATTENTION = tuple(
    Weight(f"{_LAYER}self_attn.{x}_proj.weight", f"layers/attention/{x}/kernel", transpose=True) for x in "qkvo"
)
_MLP = tuple(
    Weight(f"{_LAYER}mlp.{x}_proj.weight", f"layers/mlp/{x}/kernel", transpose=True) for x in ("gate", "up", "down")
)
QKV_BIASES = tuple(Weight(f"{_LAYER}self_attn.{x}_proj.bias", f"layers/attention/{x}/bias") for x in "qkv")
QK_NORMS = tuple(Weight(f"{_LAYER}self_attn.{x}_norm.weight", f"layers/attention/{x}_norm/scale") for x in "qk")


def weights(*attention: Weight, norms: Mapping[str, str] | None = None) -> tuple[Weight, ...]:
    """Llama's table, with more rows for the attention, or other norms around it (Hugging Face's name -> ours)."""
    norms = norms or {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    return (
        Weight(EMBEDDING, "embed/embedding"),
        *_ATTENTION,
        *attention,
        *_MLP,
        *(Weight(f"{_LAYER}{theirs}.weight", f"layers/{ours}/scale") for theirs, ours in norms.items()),
        Weight("model.norm.weight", "final_norm/scale"),
        Weight(HEAD, "head/kernel"),
        Weight(SCORE, "score/kernel"),
    )


def _qwen_windows(hf: Mapping[str, Any]) -> dict[str, Any]:
    if not hf.get("use_sliding_window"):
        return rope_from_hf(hf)
    first = hf.get("max_window_layers", 28)
    return {**rope_from_hf(hf), "windows": windows(hf, lambda layer: layer >= first)}


def _qwen_to_hf(config: DecoderConfig) -> dict[str, Any]:
    more = {"layer_types": layer_types(config)} if config.windows else {}
    return {**windowed_to_hf(config), "use_sliding_window": bool(config.windows), **more}


def _smollm3(hf: Mapping[str, Any]) -> dict[str, Any]:
    layers = hf["num_hidden_layers"]
    every = hf.get("no_rope_layer_interval", 4)
    turns = hf.get("no_rope_layers") or [(n + 1) % every != 0 for n in range(layers)]  # their 1 means that it rotates
    if len(turns) != layers:
        raise unsupported("no_rope_layers", f"{len(turns)} of them", f"one for each of the {layers} layers")
    fields = _qwen_windows(hf)
    return {**fields, "rope_layers": () if all(turns) else tuple(map(bool, turns))}


def _smollm3_to_hf(config: DecoderConfig) -> dict[str, Any]:
    turns = config.rope_layers or (True,) * config.num_layers
    return {**_qwen_to_hf(config), "no_rope_layers": [int(one) for one in turns]}


_GATED_SILU = {"hidden_act": "silu"}

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        weights(),
        FIELDS,
        fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        defaults={**DEFAULTS, "max_position_embeddings": 2048},
        read=rope_from_hf,
        write=rope_to_hf,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "MistralForSequenceClassification",
        weights(),
        FIELDS,
        fixed=_GATED_SILU,
        defaults={
            **DEFAULTS,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        read=windowed,
        write=windowed_to_hf,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "Qwen2ForSequenceClassification",
        weights(*QKV_BIASES),
        FIELDS,
        constant={"qkv_bias": True},
        fixed=_GATED_SILU,
        defaults={**DEFAULTS, "max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
        read=_qwen_windows,
        write=_qwen_to_hf,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3ForSequenceClassification",
        weights(*QK_NORMS),
        FIELDS,
        constant={"qk_norm": "head"},
        fixed={**_GATED_SILU, "attention_bias": False},
        defaults={
            **DEFAULTS,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
        },
        read=_qwen_windows,
        write=_qwen_to_hf,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        "SmolLM3ForSequenceClassification",
        weights(),
        FIELDS,
        fixed={**_GATED_SILU, "attention_bias": False, "mlp_bias": False},
        defaults={
            **DEFAULTS,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
        },
        read=_smollm3,
        write=_smollm3_to_hf,
    ),
}
