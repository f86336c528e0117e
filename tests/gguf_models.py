"""Small GGUF files as llama.cpp's converter writes them, made without our own tables of names."""

import pathlib

import gguf
import jax
import numpy as np

from prefalign_jax.models import families, hf_io
from prefalign_jax.models.decoder import DecoderConfig, make_decoder

# What a tensor is called within a layer, in most families.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# Family -> (architecture, names of its own).
FAMILIES = {
    "llama": ("llama", {}),
    "smollm3": ("smollm3", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", SANDWICH),
    "gemma3_text": ("gemma3", SANDWICH),
    "olmo2": ("olmo2", SANDWICH),
    "phi": ("phi2", {"self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}),
    "phi3": ("phi3", {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}),
    "starcoder2": ("starcoder2", {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}),
    "mixtral": (
        "llama",
        {"block_sparse_moe.gate": "ffn_gate_inp"}
        | {
            f"block_sparse_moe.experts.{w}": f"ffn_{to}_exps"
            for w, to in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
        },
    ),
    "qwen3_moe": (
        "qwen3moe",
        {"mlp.gate": "ffn_gate_inp"} | {f"mlp.experts.{to}_proj": f"ffn_{to}_exps" for to in ("gate", "up", "down")},
    ),
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
OUTER["model.final_layernorm"] = "output_norm"


def draw(config: DecoderConfig, seed: int = 0) -> dict:
    """Parameters of which none, biases and norms included, is what it begins as."""
    params, rng = make_decoder(config).init(jax.random.key(seed)), np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype), params)


def hf_tensors(config: DecoderConfig, params: dict, directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Hugging Face's names and tensors of a model."""
    hf_io.save_params(params, config, directory)
    return {name: tensor.view() for name, tensor in hf_io._open(directory).items()}


def named(name: str, family: str) -> tuple[str, int | None]:
    """(GGUF's name of a tensor, the number of its expert)."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}", None
    _, _, layer, within = stem.split(".", 3)
    expert = None
    if ".experts." in within:
        before, _, after = within.partition(".experts.")
        number, _, last = after.partition(".")
        within, expert = f"{before}.experts.{last}", int(number)
    return f"blk.{layer}.{({**NAMES, **FAMILIES[family][1]})[within]}.{kind}", expert


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k as llama.cpp's first architecture stores them: both halves of a head interleaved."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def gguf_tensors(config: DecoderConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """GGUF's names and tensors of a model."""
    out, experts = {}, {}
    for name, tensor in tensors.items():
        theirs, expert = named(name, config.family)
        if config.family in ("llama", "mistral", "mixtral", "smollm3") and ".attn_q." in theirs:
            tensor = paired(tensor, config.num_heads)
        if config.family in ("llama", "mistral", "mixtral", "smollm3") and ".attn_k." in theirs:
            tensor = paired(tensor, config.num_kv_heads)
        if config.family.startswith("gemma") and theirs.endswith("norm.weight"):
            tensor = tensor + 1
        if expert is None:
            out[theirs] = np.ascontiguousarray(tensor)
        else:
            experts.setdefault(theirs, {})[expert] = tensor
    return out | {name: np.stack([parts[n] for n in sorted(parts)]) for name, parts in experts.items()}


def add_shape(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    """The metadata of the shape."""
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(round(config.head_dim * config.rope_fraction))
    (writer.add_layer_norm_eps if config.norm == "layer" else writer.add_layer_norm_rms_eps)(config.norm_eps)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.experts_per_token)
    if config.family == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if config.windows:
        writer.add_sliding_window(max(config.windows))
    if config.attention_softcap:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap:
        writer.add_final_logit_softcapping(config.logit_softcap)


def write_gguf(path, config, tensors, *, kind="F32", change=lambda writer: None, shaped=True) -> pathlib.Path:
    """Writes a file.

    Args:
      path: of the file.
      config: the decoder's shape.
      tensors: by GGUF's names.
      kind: the type of every matrix; vectors are F32.
      change: adds to the metadata, such as a tokenizer.
      shaped: whether the metadata tells the shape.
    """
    writer = gguf.GGUFWriter(path, FAMILIES[config.family][0])
    if shaped:
        add_shape(writer, config)
    change(writer)
    for name, tensor in tensors.items():
        quant = gguf.GGMLQuantizationType[kind if tensor.ndim > 1 else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(tensor), quant)
        writer.add_tensor(name, data, raw_dtype=None if quant.name in ("F32", "F16") else quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return pathlib.Path(path)


def config_of(family: str, **changes) -> DecoderConfig:
    """A small decoder of a family, as its config.json would make it."""
    hf = dict(
        model_type=family,
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4 if family == "phi" else 2,
        max_position_embeddings=64,
        num_local_experts=4,
        sliding_window=5 if family in ("gemma2", "gemma3_text", "starcoder2") else None,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        rope_theta=500.0,
    )
    if family.startswith("gemma"):
        hf |= dict(head_dim=12, query_pre_attn_scalar=12)
    if family == "phi":
        hf["partial_rotary_factor"] = 0.5
    return DecoderConfig(**families.from_hf({**hf, **changes}))
