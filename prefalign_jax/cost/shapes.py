"""Shapes of published models by name, as config.json has them, for plans where the model is not at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]


def _shapes(common: Fields, sizes: Mapping[str, tuple[int, ...]], **more: Fields) -> dict[str, dict[str, Any]]:
    """Shapes of one family by name.

    Args:
      common: fields that all of them have.
      sizes: (width, MLP's width, layers, heads, heads of keys and values) of each.
      **more: what else some of them have, by name with _ for - and point.
    """
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {
        name: {**common, **dict(zip(names, size, strict=False)), **more.get(name.translate(_PLAIN), {})}
        for name, size in sizes.items()
    }


_PLAIN = str.maketrans("-.", "__")
_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_LLAMA_2 = _LLAMA | {"vocab_size": 32000, "max_position_embeddings": 4096}
_LLAMA_3 = _LLAMA | {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192}
_LLAMA_32 = _LLAMA_3 | {"max_position_embeddings": 131072, "tie_word_embeddings": True}
_SMOLLM2 = _LLAMA | {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
_MISTRAL = _LLAMA | {"model_type": "mistral", "vocab_size": 32000}
_MIXTRAL = _LLAMA | {"model_type": "mixtral", "vocab_size": 32000, "rope_theta": 1e6, "num_local_experts": 8}
_MINISTRAL = {"vocab_size": 131072, "head_dim": 128}
_QWEN = {"vocab_size": 151936, "rope_theta": 1e6, "max_position_embeddings": 32768}
_QWEN_25 = _QWEN | {"model_type": "qwen2", "tie_word_embeddings": True}
_QWEN_25_UNTIED = _QWEN_25 | {"vocab_size": 152064, "tie_word_embeddings": False}
_QWEN_3 = _QWEN | {"model_type": "qwen3", "max_position_embeddings": 40960, "head_dim": 128}
_QWEN_35 = {"model_type": "qwen3_5_text", "vocab_size": 248320, "rope_theta": 1e7, "max_position_embeddings": 262144}
_GPT_OSS = {"model_type": "gpt_oss", "vocab_size": 201088, "tie_word_embeddings": False}
_GEMMA = {"max_position_embeddings": 8192, "head_dim": 256, "vocab_size": 256000}
_GEMMA_2 = _GEMMA | {"model_type": "gemma2", "query_pre_attn_scalar": 256}
_GEMMA_3 = _GEMMA | {"model_type": "gemma3_text", "vocab_size": 262208, "max_position_embeddings": 131072}
_GEMMA_3 |= {"query_pre_attn_scalar": 256, "sliding_window": 1024}
_OLMO_2 = {"model_type": "olmo2", "vocab_size": 100352, "rope_theta": 500000.0, "max_position_embeddings": 4096}
_OLMO_3 = {"model_type": "olmo3", "vocab_size": 100278, "max_position_embeddings": 65536, "sliding_window": 4096}
_GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "tie_word_embeddings": True}
_GRANITE_3 = _GRANITE | {"model_type": "granite", "vocab_size": 49159, "rope_theta": 1e7}
_GRANITE_3 |= {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
_GRANITE_4 = _GRANITE | {"model_type": "granitemoehybrid", "vocab_size": 100352, "rope_theta": 1e7}
_GRANITE_4 |= {"num_local_experts": 0, "position_embedding_type": "rope", "max_position_embeddings": 131072}
_GLM_4 = {"vocab_size": 151552, "head_dim": 128, "max_position_embeddings": 32768}
_PHI_3 = {"model_type": "phi3", "vocab_size": 32064, "max_position_embeddings": 4096}
_STARCODER = {"model_type": "starcoder2", "vocab_size": 49152, "max_position_embeddings": 16384}
_PYTHIA = {"model_type": "gpt_neox", "vocab_size": 50304}
_OPT = {"model_type": "opt", "vocab_size": 50272}
_GPT2 = {"model_type": "gpt2", "vocab_size": 50257}

SHAPES: dict[str, Fields] = {
    **_shapes(
        _LLAMA_2,
        {
            "llama-2-7b": (4096, 11008, 32, 32, 32),
            "llama-2-13b": (5120, 13824, 40, 40, 40),
            "llama-2-70b": (8192, 28672, 80, 64, 8),
        },
    ),
    **_shapes(_LLAMA_3, {"llama-3-8b": (4096, 14336, 32, 32, 8), "llama-3-70b": (8192, 28672, 80, 64, 8)}),
    **_shapes(
        _LLAMA_32,
        {"llama-3.2-1b": (2048, 8192, 16, 32, 8), "llama-3.2-3b": (3072, 8192, 28, 24, 8)},
        llama_3_2_1b={"head_dim": 64},
        llama_3_2_3b={"head_dim": 128},
    ),
    **_shapes(
        _SMOLLM2,
        {
            "smollm2-135m": (576, 1536, 30, 9, 3),
            "smollm2-360m": (960, 2560, 32, 15, 5),
            "smollm2-1.7b": (2048, 8192, 24, 32, 32),
        },
        smollm2_135m={"rope_theta": 1e5},
        smollm2_360m={"rope_theta": 1e5},
        smollm2_1_7b={"rope_theta": 130000.0},
    ),
    "smollm3-3b": {
        "model_type": "smollm3",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "max_position_embeddings": 65536,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    **_shapes(
        _MISTRAL,
        {
            "mistral-7b": (4096, 14336, 32, 32, 8),
            "mistral-nemo-12b": (5120, 14336, 40, 32, 8),
            "mistral-small-24b": (5120, 32768, 40, 32, 8),
        },
        mistral_7b={"rope_theta": 10000.0, "max_position_embeddings": 32768, "sliding_window": 4096},
        mistral_nemo_12b={
            "vocab_size": 131072,
            "head_dim": 128,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "sliding_window": None,
        },
        mistral_small_24b=_MINISTRAL | {"rope_theta": 1e9, "max_position_embeddings": 131072, "sliding_window": None},
    ),
    **_shapes(
        _MINISTRAL | {"model_type": "ministral", "max_position_embeddings": 32768, "sliding_window": 32768},
        {"ministral-8b": (4096, 12288, 36, 32, 8)},
        ministral_8b={"rope_theta": 1e8, "rms_norm_eps": 1e-5},
    ),
    **_shapes(
        _MINISTRAL | {"model_type": "ministral3"},
        {
            "ministral-3-3b": (3072, 9216, 26, 32, 8),
            "ministral-3-8b": (4096, 14336, 34, 32, 8),
            "ministral-3-14b": (5120, 16384, 40, 32, 8),
        },
        ministral_3_3b={"tie_word_embeddings": True},
    ),
    **_shapes(
        _MIXTRAL | {"num_experts_per_tok": 2, "sliding_window": None},
        {"mixtral-8x7b": (4096, 14336, 32, 32, 8), "mixtral-8x22b": (6144, 16384, 56, 48, 8)},
        mixtral_8x7b={"max_position_embeddings": 32768},
        mixtral_8x22b={"max_position_embeddings": 65536},
    ),
    **_shapes(
        _QWEN_25,
        {
            "qwen2.5-0.5b": (896, 4864, 24, 14, 2),
            "qwen2.5-1.5b": (1536, 8960, 28, 12, 2),
            "qwen2.5-3b": (2048, 11008, 36, 16, 2),
        },
    ),
    **_shapes(
        _QWEN_25_UNTIED,
        {
            "qwen2.5-7b": (3584, 18944, 28, 28, 4),
            "qwen2.5-14b": (5120, 13824, 48, 40, 8),
            "qwen2.5-32b": (5120, 27648, 64, 40, 8),
            "qwen2.5-72b": (8192, 29568, 80, 64, 8),
        },
    ),
    **_shapes(
        _QWEN_3 | {"tie_word_embeddings": True},
        {
            "qwen3-0.6b": (1024, 3072, 28, 16, 8),
            "qwen3-1.7b": (2048, 6144, 28, 16, 8),
            "qwen3-4b": (2560, 9728, 36, 32, 8),
        },
    ),
    **_shapes(
        _QWEN_3 | {"tie_word_embeddings": False},
        {
            "qwen3-8b": (4096, 12288, 36, 32, 8),
            "qwen3-14b": (5120, 17408, 40, 40, 8),
            "qwen3-32b": (5120, 25600, 64, 64, 8),
        },
    ),
    **_shapes(
        _QWEN_3 | {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
        {"qwen3-30b-a3b": (2048, 6144, 48, 32, 4)},
        qwen3_30b_a3b={"moe_intermediate_size": 768, "tie_word_embeddings": False},
    ),
    **_shapes(
        _GPT_OSS,
        {"gpt-oss-20b": (2880, 2880, 24, 64, 8), "gpt-oss-120b": (2880, 2880, 36, 64, 8)},
        gpt_oss_20b={"num_local_experts": 32},
        gpt_oss_120b={"num_local_experts": 128},
    ),
    **_shapes(
        _GEMMA | {"model_type": "gemma", "hidden_act": "gelu"},
        {"gemma-2b": (2048, 16384, 18, 8, 1), "gemma-7b": (3072, 24576, 28, 16, 16)},
    ),
    **_shapes(
        _GEMMA_2,
        {
            "gemma-2-2b": (2304, 9216, 26, 8, 4),
            "gemma-2-9b": (3584, 14336, 42, 16, 8),
            "gemma-2-27b": (4608, 36864, 46, 32, 16),
        },
        gemma_2_27b={"head_dim": 128, "query_pre_attn_scalar": 144},
    ),
    **_shapes(
        _GEMMA_3,
        {
            "gemma-3-1b": (1152, 6912, 26, 4, 1),
            "gemma-3-4b": (2560, 10240, 34, 8, 4),
            "gemma-3-12b": (3840, 15360, 48, 16, 8),
            "gemma-3-27b": (5376, 21504, 62, 32, 16),
        },
        gemma_3_1b={"vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512},
        gemma_3_27b={"head_dim": 128, "query_pre_attn_scalar": 168},
    ),
    **_shapes(
        _OLMO_2,
        {
            "olmo-2-1b": (2048, 8192, 16, 16, 16),
            "olmo-2-7b": (4096, 11008, 32, 32, 32),
            "olmo-2-13b": (5120, 13824, 40, 40, 40),
            "olmo-2-32b": (5120, 27648, 64, 40, 8),
        },
    ),
    **_shapes(_OLMO_3, {"olmo-3-7b": (4096, 11008, 32, 32, 32), "olmo-3-32b": (5120, 27648, 64, 40, 8)}),
    **_shapes(
        _GRANITE_3,
        {"granite-3.3-2b": (2048, 8192, 40, 32, 8), "granite-3.3-8b": (4096, 12800, 40, 32, 8)},
        granite_3_3_2b={"attention_multiplier": 0.015625, "logits_scaling": 8.0},
        granite_3_3_8b={"attention_multiplier": 0.0078125, "logits_scaling": 16.0},
    ),
    **{
        name: _GRANITE_4
        | {"hidden_size": w, "shared_intermediate_size": mlp, "num_hidden_layers": n, **heads}
        | {"layer_types": ["attention"] * n}
        for name, (w, mlp, n, heads) in {
            "granite-4.0-350m": (1024, 2048, 28, {"num_attention_heads": 16, "num_key_value_heads": 4}),
            "granite-4.0-1b": (2048, 4096, 40, {"num_attention_heads": 16, "num_key_value_heads": 4}),
            "granite-4.0-micro": (2560, 8192, 40, {"num_attention_heads": 40, "num_key_value_heads": 8}),
        }.items()
    },
    **_shapes(_GLM_4 | {"model_type": "glm"}, {"glm-4-9b": (4096, 13696, 40, 32, 2)}),
    **_shapes(
        _GLM_4 | {"model_type": "glm4"},
        {"glm-4-9b-0414": (4096, 13696, 40, 32, 2), "glm-4-32b-0414": (6144, 23040, 61, 48, 2)},
    ),
    **_shapes(
        {"model_type": "seed_oss", "vocab_size": 155136, "head_dim": 128, "rope_theta": 1e7},
        {"seed-oss-36b": (5120, 27648, 64, 80, 8)},
    ),
    **_shapes(
        {"model_type": "exaone4", "vocab_size": 102400, "rope_theta": 1e6},
        {"exaone-4.0-1.2b": (2048, 4096, 30, 32, 8), "exaone-4.0-32b": (5120, 27392, 64, 40, 8)},
        exaone_4_0_1_2b={"tie_word_embeddings": True, "sliding_window": None, "max_position_embeddings": 65536},
        exaone_4_0_32b={"sliding_window": 4096, "max_position_embeddings": 131072},
    ),
    **_shapes(
        _QWEN_35,
        {"qwen3.5-9b": (4096, 12288, 32, 16, 4), "qwen3.5-27b": (5120, 17408, 64, 24, 4)},
        qwen3_5_27b={"linear_num_value_heads": 48},
    ),
    **_shapes(
        {"model_type": "cohere2", "vocab_size": 256000, "rope_theta": 50000.0, "logit_scale": 0.25},
        {"command-r7b": (4096, 14336, 32, 32, 8), "command-a": (12288, 36864, 64, 96, 8)},
        command_r7b={"max_position_embeddings": 132096},
        command_a={"max_position_embeddings": 131072},
    ),
    **_shapes(
        {"model_type": "phi", "vocab_size": 51200, "partial_rotary_factor": 0.4},
        {"phi-2": (2560, 10240, 32, 32, 32)},
    ),
    **_shapes(
        _PHI_3,
        {
            "phi-3-mini": (3072, 8192, 32, 32, 32),
            "phi-3-medium": (5120, 17920, 40, 40, 10),
            "phi-4": (5120, 17920, 40, 40, 10),
        },
        phi_4={"vocab_size": 100352, "max_position_embeddings": 16384, "rope_theta": 250000.0},
    ),
    **_shapes(
        _STARCODER,
        {"starcoder2-3b": (3072, 12288, 30, 24, 2), "starcoder2-7b": (4608, 18432, 32, 36, 4)},
    ),
    **_shapes(
        _PYTHIA,
        {
            "pythia-160m": (768, 3072, 12, 12),
            "pythia-410m": (1024, 4096, 24, 16),
            "pythia-1b": (2048, 8192, 16, 8),
            "pythia-1.4b": (2048, 8192, 24, 16),
            "pythia-2.8b": (2560, 10240, 32, 32),
            "pythia-6.9b": (4096, 16384, 32, 32),
            "pythia-12b": (5120, 20480, 36, 40),
        },
        pythia_6_9b={"vocab_size": 50432},
        pythia_12b={"vocab_size": 50688},
    ),
    **{
        name: _OPT | {"hidden_size": w, "ffn_dim": 4 * w, "num_hidden_layers": layers, "num_attention_heads": heads}
        for name, (w, layers, heads) in {
            "opt-125m": (768, 12, 12),
            "opt-1.3b": (2048, 24, 32),
            "opt-2.7b": (2560, 32, 32),
            "opt-6.7b": (4096, 32, 32),
            "opt-13b": (5120, 40, 40),
        }.items()
    },
    **{
        name: _GPT2 | {"n_embd": width, "n_layer": layers, "n_head": heads}
        for name, (width, layers, heads) in {
            "gpt2": (768, 12, 12),
            "gpt2-medium": (1024, 24, 16),
            "gpt2-large": (1280, 36, 20),
            "gpt2-xl": (1600, 48, 25),
        }.items()
    },
}
