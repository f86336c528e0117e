"""Qwen 3.5, its dense text models: three layers of the gated delta rule for each layer of gated attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.models.families.family import (
    DEFAULTS,
    FIELDS,
    Family,
    Weight,
    layer_kinds,
    rope_from_hf,
    rope_to_hf,
    unsupported,
)
from prefalign_jax.models.families.llama import QK_NORMS, weights

_LAYER = "model.layers.{}."
_KINDS = {"linear_attention": True, "full_attention": False}


def _delta(theirs: str, ours: str, transpose: bool = False) -> Weight:
    return Weight(f"{_LAYER}linear_attn.{theirs}", f"layers/delta/{ours}", transpose)


_ATTENTION = (
    *(Weight(f"{_LAYER}self_attn.q_proj.weight", f"layers/attention/{x}/kernel", True, "heads") for x in ("q", "gate")),
    *(Weight(f"{_LAYER}self_attn.{x}_proj.weight", f"layers/attention/{x}/kernel", True) for x in "kvo"),
    *QK_NORMS,
)
_DELTA = (
    *(_delta(f"in_proj_{x}.weight", f"{x}/kernel", transpose=True) for x in ("qkv", "z", "b", "a")),
    _delta("conv1d.weight", "taps"),
    _delta("A_log", "a_log"),
    _delta("dt_bias", "dt_bias"),
    _delta("norm.weight", "norm/scale"),
    _delta("out_proj.weight", "o/kernel", transpose=True),
)


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    every = hf.get("full_attention_interval") or 4
    layers = range(hf["num_hidden_layers"])
    kinds = layer_kinds(hf, _KINDS)
    kinds = kinds or ["linear_attention" if (n + 1) % every else "full_attention" for n in layers]
    if len(set(kinds)) < len(_KINDS):
        raise unsupported("layer_types", f"nothing but {kinds[0]}", " and ".join(_KINDS))
    keys, values = (hf[f"linear_num_{x}_heads"] for x in ("key", "value"))
    if values % keys:
        raise unsupported("linear_num_value_heads", values, "a multiple of linear_num_key_heads")
    return {**rope_from_hf(hf, partial=True), "delta_layers": tuple(_KINDS[kind] for kind in kinds)}


def _write(config: DecoderConfig) -> dict[str, Any]:
    kinds = {ours: theirs for theirs, ours in _KINDS.items()}
    return {**rope_to_hf(config, partial=True), "layer_types": [kinds[one] for one in config.delta_layers]}


FAMILIES = {
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextForSequenceClassification",
        weights(*_DELTA, attention=_ATTENTION),
        {
            **FIELDS,
            "delta_key_heads": "linear_num_key_heads",
            "delta_key_dim": "linear_key_head_dim",
            "delta_value_heads": "linear_num_value_heads",
            "delta_value_dim": "linear_value_head_dim",
            "delta_taps": "linear_conv_kernel_dim",
        },
        constant={"norm": "rms_unit", "qk_norm": "head", "attention_gate": True},
        fixed={"hidden_act": "silu", "attention_bias": False},
        defaults={
            **DEFAULTS,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "partial_rotary_factor": 0.25,
            "linear_num_key_heads": 16,
            "linear_key_head_dim": 128,
            "linear_num_value_heads": 32,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
        },
        read=_read,
        write=_write,
    ),
}
