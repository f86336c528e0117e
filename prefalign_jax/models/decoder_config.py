"""The shape of a decoder, apart from the decoder: what only reads a config.json needs no Flax."""

from __future__ import annotations

import dataclasses

from prefalign_jax.models import rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder, and by which of the known variations its family computes. The defaults are Llama's.

    Attributes:
      norm: 'rms'; 'rms_unit', whose stored scale counts from 1 (Gemma); 'layer', with mean and bias; 'centred', with
        mean alone (Command).
      residual: where the norms stand. 'pre': before attention and MLP. 'post': on their outputs (OLMo 2). 'sandwich':
        both (Gemma 2, 3). 'parallel': attention and MLP read the same input, each through a norm of its own (NeoX).
        'parallel_shared': through one norm (Phi 2, Command).
      qk_norm: 'none'; 'head', over each head (Qwen 3, Gemma 3); 'width', over all heads at once (OLMo 2).
      qkv_bias, output_bias, mlp_bias, head_bias: which products add a bias; of a mixture the router and the experts.
      query_scale: multiplier of the scores; None is head_dim^-1/2.
      query_growth: b in 1 + b ln(1 + floor(position / original context)), which multiplies the queries of positions
        that `rope_scaling` reaches (Ministral 3); None for none.
      attention_softcap, logit_softcap: c in c tanh(x / c), of scores and of logits (Gemma 2); None for none.
      sinks: whether each head has one more score, which takes part in every softmax and reads no value (gpt-oss).
      attention_gate: whether what a head attends to is multiplied by the sigmoid of a gate (Qwen 3.5).
      delta_layers: for each layer whether the gated delta rule stands in the place of attention (Qwen 3.5); () is
        nowhere.
      delta_key_heads, delta_key_dim, delta_value_heads, delta_value_dim: its heads, and how many numbers each has.
      delta_taps: tokens that its convolution reads, the one at hand included.
      windows: for each layer how many positions a token sees, itself included, 0 for all; () is 0 everywhere.
      positions: 'rope', or 'learned' absolute ones, of which the first `position_offset` rows are not used (OPT).
      rope_fraction: part of each head that is rotated.
      rope_interleaved: whether neighbours in a head turn together (GLM), rather than its two halves.
      rope_layers: for each layer whether it rotates; () is everywhere (SmolLM 3 skips some).
      local_rope_theta: base in the layers with a window, where these rotate apart (Gemma 3, OLMo 3); not scaled.
      activation, gated: act(gate(x)) * up(x), or act(up(x)).
      swiglu_limit, swiglu_alpha: of experts whose gate and up are clamped, see `moe.clamped_swiglu`; None for SiLU.
      embedding_scale: multiplier of the token embedding (Gemma: hidden_size^1/2).
      residual_scale: multiplier of what attention and MLP add to the hidden states (Granite); None for none.
      logit_divisor: what the logits are divided by (Granite); None for none.
      num_experts, experts_per_token: a mixture of experts in place of the MLP, 0 for none; `intermediate_size` is then
        an expert's.
      renormalise_router: let the weights of a token's experts sum to 1.
      vocab_padding: rows of the embedding and the head beyond the vocabulary, so that they can be dealt evenly to
        devices; they get no probability and are not exported.
      reward: one number for a text in place of logits.
      family: the Hugging Face model_type, which names the tensors and decides what config.json says.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    residual: str = "pre"
    qk_norm: str = "none"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    query_scale: float | None = None
    query_growth: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    sinks: bool = False
    attention_gate: bool = False
    delta_layers: tuple[bool, ...] = ()
    delta_key_heads: int = 0
    delta_key_dim: int = 0
    delta_value_heads: int = 0
    delta_value_dim: int = 0
    delta_taps: int = 4
    windows: tuple[int, ...] = ()
    positions: str = "rope"
    position_offset: int = 0
    rope_theta: float = 10000.0
    rope_scaling: rope.RopeScaling | None = None
    rope_fraction: float = 1.0
    rope_interleaved: bool = False
    rope_layers: tuple[bool, ...] = ()
    local_rope_theta: float | None = None
    activation: str = "silu"
    gated: bool = True
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    embedding_scale: float | None = None
    residual_scale: float | None = None
    logit_divisor: float | None = None
    num_experts: int = 0
    experts_per_token: int = 2
    renormalise_router: bool = True
    tie_embeddings: bool = False
    max_position: int = 2048
    init_std: float = 0.02
    vocab_padding: int = 0
    reward: bool = False
    family: str = "llama"

    @property
    def told(self) -> str:
        """What tells it from others, for keys of what is kept: a new field at its default changes none of them.

        Example:
          >>> DecoderConfig(9, 8, 16, 2, 4, 4, 2, norm="layer", norm_eps=1e-5).told[-38:]
          "num_kv_heads=4 head_dim=2 norm='layer'"
        """
        fields = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return " ".join(f"{field.name}={value!r}" for field, value in fields if value != field.default)

    @property
    def delta_widths(self) -> tuple[int, int, int]:
        """Over all heads of the gated delta rule, how many numbers queries, keys and values have."""
        keys = self.delta_key_heads * self.delta_key_dim
        return keys, keys, self.delta_value_heads * self.delta_value_dim

    @property
    def head_path(self) -> str:
        """Path of the parameter that `LanguageModel.head` gives."""
        if self.reward:
            return "score/kernel"
        return "embed/embedding" if self.tie_embeddings else "head/kernel"
