"""Shapes of models by name, as config.json has them, for plans where the model is not at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "num_key_value_heads": 8}
_LLAMA_3 = _LLAMA | {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192}
SHAPES: dict[str, Mapping[str, Any]] = {
    "llama-3-8b": _LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3-70b": _LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "mistral-7b": _LLAMA
    | {"model_type": "mistral", "vocab_size": 32000, "rope_theta": 10000.0, "max_position_embeddings": 32768}
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
