"""EXAONE 4: norms on the outputs as in OLMo 2, over each head of queries and keys, and only some layers rotate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.models.families.family import (
    DEFAULTS,
    FIELDS,
    Family,
    rope_from_hf,
    rope_to_hf,
    rotating_windows,
    windows_to_hf,
)
from prefalign_jax.models.families.llama import QK_NORMS, weights
from prefalign_jax.models.families.olmo import NORMS


def _exaone4(hf: Mapping[str, Any]) -> dict[str, Any]:
    rope = rope_from_hf(hf)  # all layers rotate where there is no window
    return {**rope, **rotating_windows(hf)} if hf.get("sliding_window") else rope


def _exaone4_to_hf(config: DecoderConfig) -> dict[str, Any]:
    windows = windows_to_hf(config)
    if not config.windows and not config.rope_layers:
        windows["sliding_window"] = None
    return {**rope_to_hf(config), **windows}


FAMILIES = {
    "exaone4": Family(
        "Exaone4ForCausalLM",
        "Exaone4ForSequenceClassification",
        weights(*QK_NORMS, norms=NORMS),
        FIELDS,
        constant={"residual": "post", "qk_norm": "head"},
        fixed={"hidden_act": "silu"},
        defaults={
            **DEFAULTS,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        read=_exaone4,
        write=_exaone4_to_hf,
    ),
}
