"""Llama and its nearest: Mistral, Qwen 2 and 3, SmolLM 3, Seed-OSS. SmolLM 2 and TinyStories are plain Llamas."""

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
BIASES = (
    *QKV_BIASES,
    Weight(f"{_LAYER}self_attn.o_proj.bias", "layers/attention/o/bias"),
    *(Weight(f"{_LAYER}mlp.{x}_proj.bias", f"layers/mlp/{x}/bias") for x in ("gate", "up", "down")),
)
QK_NORMS = tuple(Weight(f"{_LAYER}self_attn.{x}_norm.weight", f"layers/attention/{x}_norm/scale") for x in "qk")


def fused_mlp(name: str, gate_and_up: str, down: str) -> tuple[Weight, ...]:
    """The rows of a layer's MLP whose gate and up share a tensor."""
    both = (Weight(f"{_LAYER}{name}.{gate_and_up}.weight", f"layers/mlp/{x}/kernel", True) for x in ("gate", "up"))
    return (*both, Weight(f"{_LAYER}{name}.{down}.weight", "layers/mlp/down/kernel", transpose=True))


def weights(
    *more: Weight,
    norms: Mapping[str, str] | None = None,
    mlp: tuple[Weight, ...] = _MLP,
    attention: tuple[Weight, ...] = _ATTENTION,
) -> tuple[Weight, ...]:
    """Llama's table, with more rows, other norms (Hugging Face's name -> ours), another MLP or another attention."""
    norms = norms or {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    return (
        Weight(EMBEDDING, "embed/embedding"),
        *attention,
        *more,
        *mlp,
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


def biased(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_from_hf`, of a family whose four products of attention have biases or none has."""
    return {**rope_from_hf(hf), "output_bias": bool(hf.get("attention_bias"))}


_GATED_SILU = {"hidden_act": "silu"}
WITH_BIASES = {**FIELDS, "qkv_bias": "attention_bias", "mlp_bias": "mlp_bias"}

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        weights(*BIASES),
        WITH_BIASES,
        fixed=_GATED_SILU,
        defaults={**DEFAULTS, "max_position_embeddings": 2048},
        read=biased,
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
    "seed_oss": Family(
        "SeedOssForCausalLM",
        "SeedOssForSequenceClassification",
        weights(*BIASES),
        {**WITH_BIASES, "output_bias": "attention_out_bias"},
        fixed=_GATED_SILU,
        defaults={
            **DEFAULTS,
            "max_position_embeddings": 524288,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
        },
        read=rope_from_hf,
        write=rope_to_hf,
    ),
}
