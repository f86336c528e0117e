"""Models of images and text, of which the text model is read: their names and what they omit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# model_type -> what its text_config means where it is silent, and the family does not say.
TEXT: dict[str, Mapping[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
    },
    "mistral3": {"model_type": "mistral"},
    "qwen3_5": {
        "model_type": "qwen3_5_text",
        "vocab_size": 248320,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
    },
}
# Fields of the whole that are the text model's too.
SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "quantization_config")
# How tensors begin -> how the text model's own do: transformers 4 wrote the first two, and 5 has the third in memory.
_TEXT = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model."}
_IMAGES = ("vision_tower", "multi_modal_projector", "visual")
AHEAD = "mtp."  # of layers that predict several tokens at once
# Text models whose checkpoints may hold such layers.
PREDICT_AHEAD = ("qwen3_5_text",)
# What is no part of the text model.
_OTHERS = (AHEAD, *(f"{prefix}{name}." for prefix in ("", "model.") for name in _IMAGES))


def name_of(name: str) -> str | None:
    """A tensor's name in the text model, None if it is no part of that."""
    if name.startswith(_OTHERS):
        return None
    prefix = next((prefix for prefix in _TEXT if name.startswith(prefix)), "")
    return _TEXT.get(prefix, "") + name.removeprefix(prefix)
