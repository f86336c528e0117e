"""Decoders with LayerNorms, biases and an ungated MLP: GPT-2, GPT-NeoX (Pythia) and OPT.

Their configs name rates of dropout; none is applied here, in training either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.models.families.family import (
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
)

_QKV = tuple(f"attention/{x}" for x in "qkv")
_CONSTANT = {"norm": "layer", "gated": False, "qkv_bias": True, "output_bias": True, "mlp_bias": True}

# GPT-2: the linear maps are stored as [in, out].

_GPT2_LAYER = "transformer.h.{}."
_GPT2_WEIGHTS = (
    Weight("transformer.wte.weight", "embed/embedding"),
    Weight("transformer.wpe.weight", "position/embedding"),
    *layer_norm(f"{_GPT2_LAYER}ln_1", "layers/attention_norm"),
    *linear(f"{_GPT2_LAYER}attn.c_attn", *_QKV, transpose=False),
    *linear(f"{_GPT2_LAYER}attn.c_proj", "attention/o", transpose=False),
    *layer_norm(f"{_GPT2_LAYER}ln_2", "layers/mlp_norm"),
    *linear(f"{_GPT2_LAYER}mlp.c_fc", "mlp/up", transpose=False),
    *linear(f"{_GPT2_LAYER}mlp.c_proj", "mlp/down", transpose=False),
    *layer_norm("transformer.ln_f", "final_norm"),
    Weight("lm_head.weight", "head/kernel"),
    Weight(SCORE, "score/kernel"),
)


def _gpt2(hf: Mapping[str, Any]) -> dict[str, Any]:
    inner = hf.get("n_inner")
    return {
        "intermediate_size": 4 * hf["n_embd"] if inner is None else inner,
        "activation": activation(hf, "activation_function"),
    }


def _gpt2_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {"n_inner": config.intermediate_size, "activation_function": activation_to_hf(config, "gelu_new")}


# GPT-NeoX: queries, keys and values are stored head by head.

_NEOX_LAYER = "gpt_neox.layers.{}."
_NEOX_WEIGHTS = (
    Weight("gpt_neox.embed_in.weight", "embed/embedding"),
    *layer_norm(f"{_NEOX_LAYER}input_layernorm", "layers/attention_norm"),
    *layer_norm(f"{_NEOX_LAYER}post_attention_layernorm", "layers/mlp_norm"),
    *linear(f"{_NEOX_LAYER}attention.query_key_value", *_QKV, interleaved="heads"),
    *linear(f"{_NEOX_LAYER}attention.dense", "attention/o"),
    *linear(f"{_NEOX_LAYER}mlp.dense_h_to_4h", "mlp/up"),
    *linear(f"{_NEOX_LAYER}mlp.dense_4h_to_h", "mlp/down"),
    *layer_norm("gpt_neox.final_layer_norm", "final_norm"),
    Weight("embed_out.weight", "head/kernel"),
    Weight(SCORE, "score/kernel"),
)


def _neox(hf: Mapping[str, Any]) -> dict[str, Any]:
    # Outside rope_parameters, both generations of transformers read the older names only.
    rope = {"rope_theta": hf["rotary_emb_base"], "partial_rotary_factor": hf["rotary_pct"]}
    return {
        **rope_from_hf({**hf, **rope}, partial=True),
        "residual": "parallel" if hf["use_parallel_residual"] else "pre",
        "qkv_bias": hf["attention_bias"],
        "output_bias": hf["attention_bias"],
        "activation": activation(hf, "hidden_act"),
    }


def _neox_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {
        **rope_to_hf(config),
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": config.rope_fraction,
        "use_parallel_residual": config.residual == "parallel",
        "attention_bias": config.qkv_bias,
        "hidden_act": activation_to_hf(config, "gelu_new"),
    }


# OPT.

_OPT_LAYER = "model.decoder.layers.{}."
_OPT_WEIGHTS = (
    Weight("model.decoder.embed_tokens.weight", "embed/embedding"),
    Weight("model.decoder.embed_positions.weight", "position/embedding"),
    *layer_norm(f"{_OPT_LAYER}self_attn_layer_norm", "layers/attention_norm"),
    *(row for x in "qkv" for row in linear(f"{_OPT_LAYER}self_attn.{x}_proj", f"attention/{x}")),
    *linear(f"{_OPT_LAYER}self_attn.out_proj", "attention/o"),
    *layer_norm(f"{_OPT_LAYER}final_layer_norm", "layers/mlp_norm"),
    *linear(f"{_OPT_LAYER}fc1", "mlp/up"),
    *linear(f"{_OPT_LAYER}fc2", "mlp/down"),
    *layer_norm("model.decoder.final_layer_norm", "final_norm"),
    Weight("lm_head.weight", "head/kernel"),
    Weight(SCORE, "score/kernel"),
)


def _opt(hf: Mapping[str, Any]) -> dict[str, Any]:
    width = hf.get("word_embed_proj_dim")
    if width not in (None, hf["hidden_size"]):
        raise unsupported("word_embed_proj_dim", width, f"hidden_size, {hf['hidden_size']}")
    biases = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), hf["enable_bias"])
    return {**biases, "activation": activation(hf, "activation_function")}


def _opt_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {"enable_bias": config.mlp_bias, "activation_function": activation_to_hf(config, "gelu_new")}


_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "tie_embeddings": "tie_word_embeddings",
    "max_position": "max_position_embeddings",
}

FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
        _GPT2_WEIGHTS,
        {
            "vocab_size": "vocab_size",
            "hidden_size": "n_embd",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
            "max_position": "n_positions",
            "init_std": "initializer_range",
        },
        constant={**_CONSTANT, "positions": "learned"},
        fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        defaults={
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "n_positions": 1024,
            "initializer_range": 0.02,
            "activation_function": "gelu_new",
        },
        read=_gpt2,
        write=_gpt2_to_hf,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        "GPTNeoXForSequenceClassification",
        _NEOX_WEIGHTS,
        {
            **_FIELDS,
            "intermediate_size": "intermediate_size",
            "norm_eps": "layer_norm_eps",
            "init_std": "initializer_range",
        },
        constant=_CONSTANT,
        defaults={
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "max_position_embeddings": 2048,
            "initializer_range": 0.02,
            "hidden_act": "gelu",
            "rotary_emb_base": 10000.0,
            "rotary_pct": 0.25,
            "use_parallel_residual": True,
            "attention_bias": True,
        },
        read=_neox,
        write=_neox_to_hf,
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTForSequenceClassification",
        _OPT_WEIGHTS,
        {**_FIELDS, "intermediate_size": "ffn_dim", "init_std": "init_std"},
        constant={**_CONSTANT, "positions": "learned", "position_offset": 2, "norm_eps": 1e-5},
        fixed={
            "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
        },
        defaults={
            "tie_word_embeddings": True,
            "max_position_embeddings": 2048,
            "init_std": 0.02,
            "activation_function": "relu",
            "enable_bias": True,
        },
        read=_opt,
        write=_opt_to_hf,
    ),
}
