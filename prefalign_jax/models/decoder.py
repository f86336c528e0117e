"""The package's decoder: a Llama-shaped Flax NNX transformer, used functionally through `LanguageModel`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prefalign_jax.models import moe, quantize, rope
from prefalign_jax.models.attention import (
    KERNELS,
    Tiles,
    attend,
    cudnn,
    sequence_attend,
    splash,
    tiled_attend,
    tree_mask,
    tree_tiles,
)
from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.models.dropout import Dropout, drop, fork
from prefalign_jax.models.gated_delta import causal_convolution, earlier, gated_delta_rule, gated_delta_steps
from prefalign_jax.models.lora import Lora, adapter_shapes, delta, join, stretch
from prefalign_jax.options import choose
from prefalign_jax.types import Cached, LanguageModel, Params, Sequences, UserError

# How a batch's tokens attend, tile by tile in XLA or text by text in a fused kernel -> `LanguageModel.attends`.
ATTENTION = {"tiles": "tiles"} | dict.fromkeys(KERNELS, "sequences")
MATRICES = ("kernel", "embedding")  # the parameters that products and look-ups read in the type of the computation
# What the backward pass keeps of a layer: everything, the results of matrix products, or only the layer's input.
REMAT: dict[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x W, with the gradient of W as x' g.

    Autodiff has it as (g' x)', for which XLA's CPU backend writes g once more, transposed, and with it whatever g is
    fused with. Differentiable in reverse mode, once.

    Args:
      x: [..., in].
      kernel: [in, out].

    Returns:
      [..., out].
    """
    return x @ kernel


def _matmul_backward(residuals, g):
    x, kernel = residuals
    tokens = tuple(range(x.ndim - 1))
    return g @ kernel.T, jax.lax.dot_general(x, g, ((tokens, tokens), ((), ())))


matmul.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _matmul_backward)


class Linear(nnx.Module):
    """x W (+ b), with W cast to x's type."""

    def __init__(
        self, features_in: int, features_out: int, std: float, rngs: nnx.Rngs, param_dtype, bias: bool = False
    ):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (features_in, features_out), param_dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros((features_out,), param_dtype))

    def weight(self, dtype: jnp.dtype) -> jax.Array:
        """W [in, out], whatever it is stored as."""
        kind = next((kind for kind in quantize.QUANTIZATIONS if hasattr(self, kind)), None)
        if kind is None:
            return self.kernel[...].astype(dtype)
        return quantize.dequantize(getattr(self, kind)[...], self.scales[...], dtype)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[..., in] -> [..., out]; the key is of the adapter's dropout."""
        kernel = self.weight(x.dtype)
        out = matmul(x, kernel)
        if hasattr(self, "lora_a"):
            seen = drop(x, self.lora.dropout, key)
            out = out + delta(seen, self.lora_a[...], self.lora_b[...], self.lora.scale)
        if hasattr(self, "lora_magnitude"):  # peft's DoRA drops the kernel's inputs too where it has dropout
            a, b, magnitude = (x[...] for x in (self.lora_a, self.lora_b, self.lora_magnitude))
            out = out * _broadcast(stretch(kernel, a, b, magnitude, self.lora.scale), out)
        return out + _broadcast(self.bias[...], out) if hasattr(self, "bias") else out


class Norm(nnx.Module):
    """x / rms(x) * scale, or (x - mean) / std * scale + bias; the statistics in float32."""

    def __init__(self, width: int, config: DecoderConfig, param_dtype):
        start = jnp.zeros if config.norm == "rms_unit" else jnp.ones
        self.scale = nnx.Param(start((width,), param_dtype))
        if config.norm == "layer":
            self.bias = nnx.Param(jnp.zeros((width,), param_dtype))
        self.eps, self.unit = config.norm_eps, config.norm == "rms_unit"
        self.centred = config.norm in ("layer", "centred")

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]. The backward pass keeps no more than x."""
        parts = (self.scale[...], *((self.bias[...],) if hasattr(self, "bias") else ()))
        return jax.checkpoint(self._normed, prevent_cse=False)(x, *parts)

    def _normed(self, x: jax.Array, scale: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        x32 = x.astype(jnp.float32)
        if self.centred:
            x32 = x32 - x32.mean(-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        if self.unit:  # Gemma's product is in float32
            return (normed * _broadcast(1.0 + scale.astype(jnp.float32), normed)).astype(x.dtype)
        out = normed.astype(x.dtype) * _broadcast(scale.astype(x.dtype), x)
        return out if bias is None else out + _broadcast(bias, out)


def _broadcast(vector: jax.Array, like: jax.Array) -> jax.Array:
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + vector.shape)


def in_place(function: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    """function(*args), dealt to devices as XLA likes."""
    return function(*args)


class Placement(NamedTuple):
    """How parts of the computation are dealt to devices: (function, *args) -> function(*args).

    Attributes:
      look_up: of tokens and positions, [R, L] each, in the embedding; see `sharding.spread`.
      experts: of `moe.experts`; see `sharding.deal_experts`.
      texts: of a kernel of attention that XLA cannot divide; see `sharding.deal_texts`.
    """

    look_up: Callable[..., jax.Array] = in_place
    experts: Callable[..., jax.Array] = in_place
    texts: Callable[..., jax.Array] = in_place


class Layer(NamedTuple):
    """What is known of one layer besides its parameters.

    Attributes:
      mask: who sees whom before the window is taken into account: [R, L, S] bool, without a cache S is L; or `Tiles`,
        or `Sequences`.
      positions, segments, branches: [R, L] int32; with a cache a token's segment is 0 or 1, and nothing branches.
      cos, sin: [R, L, rotated / 2] float32; 1 and 0 in a layer that does not rotate.
      window: [] int32; 0 for none.
      earlier: [taps, R, L] int32 of `gated_delta.earlier`, for a `GatedDelta` without a cache.
      dropout: how much is dropped.
      key: of this layer's draws; None drops nothing.
      cache: (keys, values), each [R, S, kv_heads, head_dim], of which those of the tokens at hand are to be written at
        slot `at`; of a `GatedDelta` what its last token left; None where the tokens at hand are all there is.
      at: [] int32.
      seen: [R, S] int32, the cache's positions.
      kernel: one of `attention.KERNELS` with its options, for `Sequences`.
      experts: of a `Placement`.
    """

    mask: jax.Array | Tiles | Sequences
    positions: jax.Array
    segments: jax.Array
    branches: jax.Array
    cos: jax.Array
    sin: jax.Array
    window: jax.Array
    earlier: jax.Array | None = None
    dropout: Dropout = Dropout()
    key: jax.Array | None = None
    cache: tuple[jax.Array, jax.Array] | None = None
    at: jax.Array | None = None
    seen: jax.Array | None = None
    kernel: Callable[..., jax.Array] | None = None
    experts: Callable[..., jax.Array] = in_place


class Attention(nnx.Module):
    """Grouped-query attention."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, param_dtype):
        c, std = config, config.init_std
        width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q = Linear(c.hidden_size, width, std, rngs, param_dtype, c.qkv_bias)
        self.k = Linear(c.hidden_size, kv_width, std, rngs, param_dtype, c.qkv_bias)
        self.v = Linear(c.hidden_size, kv_width, std, rngs, param_dtype, c.qkv_bias)
        self.o = Linear(width, c.hidden_size, std, rngs, param_dtype, c.output_bias)
        if c.attention_gate:
            self.gate = Linear(c.hidden_size, width, std, rngs, param_dtype, c.qkv_bias)
        if c.qk_norm != "none":
            over_heads = c.qk_norm == "width"
            self.q_norm = Norm(width if over_heads else c.head_dim, c, param_dtype)
            self.k_norm = Norm(kv_width if over_heads else c.head_dim, c, param_dtype)
        if c.sinks:
            self.sinks = nnx.Param(std * jax.random.normal(rngs.params(), (c.num_heads,), param_dtype))
        self.config = config

    def __call__(
        self, x: jax.Array, layer: Layer, key: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """[R, L, D] -> [R, L, D], and the keys and values that were seen, [R, S, kv_heads, head_dim] each."""
        c = self.config
        *of_products, of_output, of_weights = fork(key, 5)
        q, k, v = (linear(x, one) for linear, one in zip((self.q, self.k, self.v), of_products, strict=True))
        if c.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*x.shape[:2], -1, c.head_dim) for y in (q, k, v))
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if c.positions == "rope":
            q, k = (rope.rotate(y, layer.cos, layer.sin, interleaved=c.rope_interleaved) for y in (q, k))
        if c.query_growth is not None:
            grown = rope.growth(layer.positions, c.query_growth, c.rope_scaling.original_max_position)
            q = q * grown[..., None, None].astype(q.dtype)
        if layer.cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice(old, new, (0, layer.at, 0, 0))
                for old, new in zip(layer.cache, (k, v), strict=True)
            )
        attended = self.attended(q, k, v, layer, of_weights).reshape(*x.shape[:2], -1)
        if c.attention_gate:
            of_gate, of_output = fork(of_output, 2)
            attended = attended * nnx.sigmoid(self.gate(x, of_gate))
        return self.o(attended, of_output), (k, v)

    def attended(self, q, k, v, layer: Layer, key: jax.Array | None) -> jax.Array:
        """What the queries read of the values, [R, L, heads, head_dim], by whatever computes it here."""
        c = self.config
        window = layer.window if any(c.windows) else None
        options = dict(scale=c.query_scale, sinks=self.sinks[...] if c.sinks else None)
        if isinstance(layer.mask, Sequences):
            windowed = {} if window is None else {"window": window}  # cuDNN's kernel has none
            return sequence_attend(q, k, v, layer.mask, kernel=layer.kernel, **options, **windowed)
        options |= dict(softcap=c.attention_softcap)
        options |= dict(dropout=layer.dropout.attention, key=key)
        if isinstance(layer.mask, Tiles):
            return tiled_attend(q, k, v, layer.mask, window=window, **options)
        mask = layer.mask
        if any(c.windows):
            seen = layer.positions if layer.cache is None else layer.seen
            distance = layer.positions[:, :, None] - seen[:, None, :]
            mask = mask & ((layer.window == 0) | (distance < layer.window))
        return attend(q, k, v, mask, **options)


class GatedDelta(nnx.Module):
    """The gated delta rule behind a short convolution, in the place of attention."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, param_dtype):
        c, std = config, config.init_std
        width, (_, _, values) = sum(c.delta_widths), c.delta_widths
        self.qkv = Linear(c.hidden_size, width, std, rngs, param_dtype)
        self.z = Linear(c.hidden_size, values, std, rngs, param_dtype)
        self.a = Linear(c.hidden_size, c.delta_value_heads, std, rngs, param_dtype)
        self.b = Linear(c.hidden_size, c.delta_value_heads, std, rngs, param_dtype)
        self.o = Linear(values, c.hidden_size, std, rngs, param_dtype)
        self.taps = nnx.Param(std * jax.random.normal(rngs.params(), (width, 1, c.delta_taps), param_dtype))
        fade = jax.random.uniform(rngs.params(), (c.delta_value_heads,), param_dtype, 0.01, 16.0)
        self.a_log = nnx.Param(jnp.log(fade))
        self.dt_bias = nnx.Param(jnp.ones((c.delta_value_heads,), param_dtype))
        self.norm = Norm(c.delta_value_dim, dataclasses.replace(c, norm="rms"), param_dtype)
        self.config = config

    def __call__(
        self, x: jax.Array, layer: Layer, key: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """[R, L, D] -> [R, L, D], and with a cache what the last token leaves to the next.

        That is the state [R, heads, key_dim, value_dim], and what the convolution reads of the last tokens.
        """
        c = self.config
        of_qkv, of_z, of_a, of_b, of_output = fork(key, 5)
        mixed, tree = self.qkv(x, of_qkv), (layer.segments, layer.branches)
        taps = self.taps[...][:, 0, ::-1].T.astype(x.dtype)
        if layer.cache is None:
            mixed = causal_convolution(mixed, taps, layer.earlier)
        else:
            state, before = layer.cache
            read = jnp.concatenate([before, jnp.where(layer.segments[..., None] > 0, mixed, 0)], axis=1)
            ends = (read[:, len(taps) - 1 - n : read.shape[1] - n] for n in range(len(taps)))
            mixed = sum(_broadcast(tap, one) * one for tap, one in zip(taps, ends, strict=True))
        parts = jnp.split(nnx.silu(mixed), np.cumsum(c.delta_widths)[:-1], axis=-1)
        dims = (c.delta_key_dim, c.delta_key_dim, c.delta_value_dim)
        q, k, v = (y.reshape(*y.shape[:2], -1, dim) for y, dim in zip(parts, dims, strict=True))
        q, k = (jnp.repeat(_unit(y), c.delta_value_heads // c.delta_key_heads, axis=2) for y in (q, k))
        step = self.a(x, of_a).astype(jnp.float32)
        step = nnx.softplus(step + _broadcast(self.dt_bias[...], step))
        g = -step * _broadcast(jnp.exp(self.a_log[...].astype(jnp.float32)), step)
        inputs = (q * c.delta_key_dim**-0.5, k, v, g, nnx.sigmoid(self.b(x, of_b)))
        if layer.cache is None:
            out, left = gated_delta_rule(*inputs, *tree), None
        else:
            out, state = gated_delta_steps(*inputs, layer.segments, state)
            left = state, read[:, read.shape[1] - before.shape[1] :]
        z = self.z(x, of_z).reshape(out.shape)
        out = self.norm(out.astype(x.dtype)) * nnx.silu(z.astype(jnp.float32))
        return self.o(out.astype(x.dtype).reshape(*x.shape[:2], -1), of_output), left


def _unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


ACTIVATIONS = {
    "silu": nnx.silu,
    "gelu": lambda x: nnx.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nnx.gelu(x, approximate=True),
    "relu": nnx.relu,
}


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x)))."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, param_dtype):
        c = config
        if c.gated:
            self.gate = Linear(c.hidden_size, c.intermediate_size, c.init_std, rngs, param_dtype, c.mlp_bias)
        self.up = Linear(c.hidden_size, c.intermediate_size, c.init_std, rngs, param_dtype, c.mlp_bias)
        self.down = Linear(c.intermediate_size, c.hidden_size, c.init_std, rngs, param_dtype, c.mlp_bias)
        self.config = config

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[R, L, D] -> [R, L, D]."""
        act = ACTIVATIONS[self.config.activation]
        of_gate, of_up, of_down = fork(key, 3)
        up = self.up(x, of_up)
        # The backward pass computes the activation again from what the products gave: less to keep, and faster.
        if self.config.gated:
            gated = jax.checkpoint(lambda gate, up: act(gate) * up, prevent_cse=False)
            return self.down(gated(self.gate(x, of_gate), up), of_down)
        return self.down(jax.checkpoint(act, prevent_cse=False)(up), of_down)


class ExpertLinear(nnx.Module):
    """A kernel for each expert, [E, in, out], and perhaps a bias, [E, out]."""

    def __init__(self, features_in: int, features_out: int, config: DecoderConfig, rngs: nnx.Rngs, param_dtype):
        shape = (config.num_experts, features_in, features_out)
        self.kernel = nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape, param_dtype))
        if config.mlp_bias:
            self.bias = nnx.Param(jnp.zeros((config.num_experts, features_out), param_dtype))


class Experts(nnx.Module):
    """A router and the MLPs that it chooses from."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, param_dtype):
        c = config
        self.router = Linear(c.hidden_size, c.num_experts, c.init_std, rngs, param_dtype, c.mlp_bias)
        self.gate = ExpertLinear(c.hidden_size, c.intermediate_size, c, rngs, param_dtype)
        self.up = ExpertLinear(c.hidden_size, c.intermediate_size, c, rngs, param_dtype)
        self.down = ExpertLinear(c.intermediate_size, c.hidden_size, c, rngs, param_dtype)
        self.config = config

    def __call__(self, x: jax.Array, layer: Layer) -> tuple[jax.Array, moe.Routing]:
        """[R, L, D] -> [R, L, D] and how the tokens that are no padding were spread."""
        c, flat = self.config, x.reshape(-1, x.shape[-1])
        weights, chosen, probabilities = moe.route(
            self.router(flat), c.experts_per_token, renormalise=c.renormalise_router
        )
        linears = (self.gate, self.up, self.down)
        kernels, biases = (linear.kernel[...] for linear in linears), None
        if c.mlp_bias:
            biases = tuple(linear.bias[...] for linear in linears)
        experts = moe.experts
        if c.swiglu_limit is not None:
            act = functools.partial(moe.clamped_swiglu, limit=c.swiglu_limit, alpha=c.swiglu_alpha)
            experts = functools.partial(experts, act=act)
        out = layer.experts(experts, flat, *kernels, weights, chosen, biases)
        active = layer.segments.reshape(-1) > 0
        return out.reshape(x.shape), moe.routing(chosen, probabilities, active)


# Where the norms stand: (norms before, norms after, whether attention and MLP read the same input).
RESIDUALS = {
    "pre": (("attention_norm", "mlp_norm"), (), False),
    "post": ((), ("post_attention_norm", "post_mlp_norm"), False),
    "sandwich": (("attention_norm", "mlp_norm"), ("post_attention_norm", "post_mlp_norm"), False),
    "parallel": (("attention_norm", "mlp_norm"), (), True),
    "parallel_shared": (("attention_norm", "attention_norm"), (), True),
}


MIXERS: dict[str, type[Attention | GatedDelta]] = {"attention": Attention, "delta": GatedDelta}


class Block(nnx.Module):
    """One layer; `mixer` is the name of the part by which its tokens read each other, a key of MIXERS."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, param_dtype, mixer: str | None = "attention"):
        before, after, _ = RESIDUALS[config.residual]
        for name in dict.fromkeys(before + after):
            setattr(self, name, Norm(config.hidden_size, config, param_dtype))
        if mixer is not None:
            setattr(self, mixer, MIXERS[mixer](config, rngs, param_dtype))
        if config.num_experts:
            self.experts = Experts(config, rngs, param_dtype)
        else:
            self.mlp = MLP(config, rngs, param_dtype)
        self.residual, self.scale = config.residual, config.residual_scale

    def __call__(self, x: jax.Array, layer: Layer) -> tuple[jax.Array, moe.Routing | None, Any]:
        """[R, L, D] -> [R, L, D], how a mixture's tokens were spread over its experts, what a cache keeps."""
        before, after, parallel = RESIDUALS[self.residual]
        into = [getattr(self, name) for name in before] or [lambda x: x] * 2
        out_of = [getattr(self, name) for name in after] or [lambda x: x] * 2
        rate = layer.dropout.residual
        of_attention, of_mlp, *of_outputs = fork(layer.key, 4)
        mix = self.delta if hasattr(self, "delta") else self.attention
        attended, seen = mix(into[0](x), layer, of_attention)
        attended = self.scaled(drop(out_of[0](attended), rate, of_outputs[0]))
        y = into[1](x if parallel else x + attended)
        y, routing = self.experts(y, layer) if hasattr(self, "experts") else (self.mlp(y, of_mlp), None)
        return x + attended + self.scaled(drop(out_of[1](y), rate, of_outputs[1])), routing, seen

    def scaled(self, x: jax.Array) -> jax.Array:
        """What is added to the hidden states, by the family's multiplier."""
        return x if self.scale is None else x * jnp.asarray(self.scale, x.dtype)


class Table(nnx.Module):
    """A matrix of rows of width D, looked up on the way in or multiplied by on the way out."""

    def __init__(self, rows: int, config: DecoderConfig, name: str, rngs: nnx.Rngs, param_dtype, bias: bool = False):
        shape = (rows, config.hidden_size)
        setattr(self, name, nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape, param_dtype)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((rows,), param_dtype))


class Score(nnx.Module):
    """The reward as a direction of the hidden states, [1, D]. Zeros at first.

    A fresh reward model so gives every response the reward 0, whatever its text and the seed: the Bradley-Terry loss
    starts at log 2 exactly, which is a number to check a run by, and no preference is there before the data teach it.
    It learns nevertheless: at zeros the gradient of the score is not zero, only that of the layers below is.
    """

    def __init__(self, config: DecoderConfig, param_dtype):
        self.kernel = nnx.Param(jnp.zeros((1, config.hidden_size), param_dtype))


class Decoder(nnx.Module):
    """Embedding, a stack of layers stored as one layer with a leading axis, final norm, head (unless tied) or score."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, param_dtype):
        self.config = config
        rows = config.vocab_size + config.vocab_padding
        self.embed = Table(rows, config, "embedding", rngs, param_dtype)
        if config.positions == "learned":
            places = config.max_position + config.position_offset
            self.position = Table(places, config, "embedding", rngs, param_dtype)

        def stack(count: int, kind: type[nnx.Module], *mixer: str | None) -> nnx.Module:
            make = nnx.vmap(
                lambda r: kind(config, r, param_dtype, *mixer),
                in_axes=0,
                out_axes=0,
                transform_metadata={nnx.PARTITION_NAME: None},
            )
            return make(rngs.split(count))

        deltas = sum(config.delta_layers)
        self.layers = stack(config.num_layers, Block, None if deltas else "attention")
        if deltas:  # each kind is stacked by itself
            self.layers.attention = stack(config.num_layers - deltas, Attention)
            self.layers.delta = stack(deltas, GatedDelta)
        self.final_norm = Norm(config.hidden_size, config, param_dtype)
        if config.reward:
            self.score = Score(config, param_dtype)
        elif not config.tie_embeddings:
            self.head = Table(rows, config, "kernel", rngs, param_dtype, config.head_bias)

    def __call__(
        self,
        tokens,
        positions,
        segments,
        branches,
        *,
        tiles,
        sequences,
        dtype,
        remat: str,
        dropout: Dropout,
        key,
        kernel: Callable[..., jax.Array] | None,
        placement: Placement,
    ) -> tuple[jax.Array, moe.Routing | None]:
        """Tokens, positions, segments and branches, each [R, L] -> hidden states [R, L, D], routing [layers, E]."""
        c = self.config
        turns, kinds = _rotations(c, positions, segments)
        if sequences is not None:
            mask = sequences
        elif tiles is not None:
            mask = tree_tiles(tiles, segments, branches, positions)
        else:
            mask = tree_mask(segments, branches)

        places = earlier(segments, branches, c.delta_taps) if c.delta_layers else None

        def layer(x, block_and_kind):
            block, kind, window, key = block_and_kind
            cos, sin = (turn[kind] for turn in turns)
            of_layer = Layer(mask, positions, segments, branches, cos, sin, window, places, dropout, key)
            return block(x, of_layer._replace(kernel=kernel, experts=placement.experts))[:2]

        if REMAT[remat] is not None:
            layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False)
        x = placement.look_up(lambda *ids: self.embedded(*ids, dtype), tokens, positions)
        of_embedding, of_layers = fork(key, 2)
        x = drop(x, dropout.residual, of_embedding)
        keys = None if of_layers is None else jax.random.split(of_layers, c.num_layers)
        windows = jnp.asarray(c.windows or (0,) * c.num_layers, jnp.int32)
        kinds = jnp.asarray(kinds, jnp.int32)
        of_layers = (self.layers, kinds, windows, keys)
        if not c.delta_layers:
            x, routing = jax.lax.scan(layer, x, of_layers)
            return self.finished(x), routing
        count = period(c.delta_layers)

        def some_layers(x, of_layers):
            layers, *others = of_layers
            for n in range(count):
                one = layer_at(layers, n, c.delta_layers[:count])
                x, _ = layer(x, (one, *jax.tree.map(lambda x, n=n: x[n], others)))
            return x, None

        of_layers = jax.tree.map(lambda x: x.reshape(c.num_layers // count, -1, *x.shape[1:]), of_layers)
        return self.finished(jax.lax.scan(some_layers, x, of_layers)[0]), None

    def embedded(self, tokens, positions, dtype) -> jax.Array:
        """Tokens and positions, each [R, L] -> what the first layer reads [R, L, D]."""
        c = self.config
        x = self.embed.embedding[...][tokens].astype(dtype)
        if c.embedding_scale is not None:
            x = x * jnp.asarray(c.embedding_scale, dtype)
        if c.positions == "learned":
            x = x + self.position.embedding[...][positions + c.position_offset].astype(dtype)
        return x

    def finished(self, x: jax.Array) -> jax.Array:
        """What the last layer gives -> what the head or the score reads, [R, L, D] each."""
        c, x = self.config, self.final_norm(x)
        return x if c.logit_divisor is None or c.reward else x / jnp.asarray(c.logit_divisor, x.dtype)

    def unstacked(self) -> Decoder:
        """With the layers one by one, as `extend` reads them.

        Layers that lie in one array have to be cut out of it for every token, which costs as much as reading them.
        """
        c = self.config
        self.layers = nnx.List([layer_at(self.layers, n, c.delta_layers) for n in range(c.num_layers)])
        return self

    def extend(self, tokens, at, start, limit, cache, dtype) -> tuple[jax.Array, Any]:
        """As `types.Cached.extend`; the cache is for each layer what a `Layer` says of it."""
        c = self.config
        slots = at + jnp.arange(tokens.shape[1])[None, :]
        attention = c.delta_layers.index(False) if c.delta_layers else 0
        places = jnp.arange(cache[attention][0].shape[1])[None, :]
        active = slots >= start[:, None]
        positions = jnp.where(active, slots - start[:, None], 0)
        mask = (places[:, None, :] <= slots[:, :, None]) & (places >= start[:, None])[:, None, :]
        # longrope asks for the last position of a text, which is none of those at hand.
        reach = jnp.concatenate([positions, limit[:, None] - 1], axis=1)
        turns, kinds = _rotations(c, reach, jnp.ones_like(reach))
        cos, sin = (turn[:, :, :-1] for turn in turns)
        windows = c.windows or (0,) * c.num_layers
        x, seen = self.embedded(tokens, positions, dtype), []
        for block, kind, window, old in zip(self.layers, kinds, windows, cache, strict=True):
            tree = (active.astype(jnp.int32), jnp.zeros_like(slots + start[:, None]))
            layer = Layer(mask, positions, *tree, cos[kind], sin[kind], window)
            x, _, new = block(x, layer._replace(cache=old, at=at, seen=places - start[:, None]))
            seen.append(new)
        return self.finished(x), tuple(seen)


def layer_at(layers: Block, number: int, deltas: Sequence[bool]) -> Block:
    """A layer out of several that are stacked; of its kind of mixer there are as many as `deltas` has of it."""
    if not deltas:
        return jax.tree.map(lambda x: x[number], layers)
    one = jax.tree.map(lambda x: x, layers)  # other objects, of which parts can be taken away
    mixers = {name: getattr(one, name) for name in MIXERS}
    for name in MIXERS:
        delattr(one, name)
    one = jax.tree.map(lambda x: x[number], one)
    mixer, place = "delta" if deltas[number] else "attention", deltas[:number].count(deltas[number])
    setattr(one, mixer, jax.tree.map(lambda x: x[place], mixers[mixer]))
    return one


def period(pattern: Sequence[bool]) -> int:
    """After how many layers a pattern of them begins anew; all of them if it never does.

    Example:
      >>> period((True, True, False) * 2), period((True, False, False, True))
      (3, 4)
    """
    lengths = (n for n in range(1, len(pattern)) if len(pattern) % n == 0)
    return next((n for n in lengths if pattern[:n] * (len(pattern) // n) == pattern), len(pattern))


def _rotations(
    c: DecoderConfig, positions: jax.Array, segments: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], list[int]]:
    """((cos, sin) of each kind of layer, [kinds, R, L, rotated / 2] each; the kind of every layer)."""
    width = int(c.head_dim * c.rope_fraction) if c.positions == "rope" else 0
    tables = [rope.rotation(positions, segments, width, c.rope_theta, c.rope_scaling)]
    kinds = [0] * c.num_layers
    if c.local_rope_theta is not None:
        tables.append(rope.rotation(positions, segments, width, c.local_rope_theta, None))
        kinds = [1 if window else 0 for window in c.windows]
    if not all(c.rope_layers):
        tables.append((jnp.ones_like(tables[0][0]), jnp.zeros_like(tables[0][1])))
        kinds = [kind if turns else len(tables) - 1 for kind, turns in zip(kinds, c.rope_layers, strict=True)]
    cos, sin = (jnp.stack(parts) for parts in zip(*tables, strict=True))
    return (cos, sin), kinds


def cast(params: Params, dtype: str, names: tuple[str, ...] = MATRICES) -> Params:
    """The parameters with those matrices in the type of the computation: the decoder computes the same from them."""

    def one(path, x: jax.Array) -> jax.Array:
        return x.astype(dtype) if path[-1].key in names else x

    return jax.tree_util.tree_map_with_path(one, params)


def _kernel(
    attention: str, config: DecoderConfig, dtype: str, dropout: Dropout, placement: Placement
) -> Callable[..., jax.Array] | None:
    """The kernel of KERNELS with its options; None for tiles.

    Raises:
      UserError: it cannot compute what the model asks for.
    """
    if attention not in KERNELS:
        return None
    reasons = {"dropout of attention weights": dropout.attention > 0}
    if attention == "cudnn":
        reasons |= {
            f"dtype={dtype}": dtype == "float32",
            "soft-capped scores": config.attention_softcap is not None,
            "attention sinks": config.sinks,
            "sliding windows": any(config.windows),
            f"heads of {config.head_dim} numbers": config.head_dim % 8 != 0 or config.head_dim > 128,
        }
    against = [reason for reason, holds in reasons.items() if holds]
    if against:
        raise UserError(f"attention={attention!r} is not for {', '.join(against)}; write 'tiles'")
    if attention == "cudnn":
        return cudnn
    options = dict(softcap=config.attention_softcap, windows=tuple(config.windows), deal=placement.texts)
    return functools.partial(splash, **options)


def make_decoder(
    config: DecoderConfig,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str = "none",
    attention: str = "tiles",
    lora: Lora | None = None,
    dropout: Dropout = Dropout(),  # noqa: B008 (frozen)
    placement: Placement = Placement(),  # noqa: B008 (immutable)
) -> LanguageModel:
    """The decoder as pure functions of a nested dict of parameters.

    The tree: embed/embedding [V, D]; layers/{attention_norm, mlp_norm}/scale and layers/{attention/{q, k, v, o},
    mlp/{gate, up, down}}/kernel, each with the layers as leading axis and kernels as [in, out]; final_norm/scale;
    head/kernel [V, D] unless the embedding is tied, or, of a reward model, score/kernel [1, D] in any case. Families
    add biases, norms after, q_norm and k_norm, attention/gate and position/embedding. Where some layers have a gated
    delta rule in the place of attention, layers/delta is stacked over these and layers/attention over the others.

    Args:
      config: the shape.
      dtype: type of the activations and matrix products; norms, rotations and softmax stay float32 inside.
      param_dtype: type of freshly initialised parameters.
      remat: one of REMAT: what the backward pass keeps of each layer.
      attention: one of ATTENTION: how the rows of a batch attend.
      lora: of the adapters that the parameters may have, see lora.py. The same functions take them without: that is the
        reference.
      dropout: in passes that are given a key; what Hugging Face's config.json says of dropout is not read.
      placement: of what XLA deals to devices badly.

    Returns:
      A `LanguageModel`; its functions trace under jit, grad and vmap.

    Raises:
      UserError: if `remat` or `attention` is unknown, or a kernel cannot compute the latter.
    """
    if remat not in REMAT:
        raise UserError(f"remat={remat!r} is unknown; write one of {', '.join(REMAT)}")
    attends = choose("attention", attention, ATTENTION)
    options = dict(dtype=dtype, param_dtype=param_dtype, remat=remat, attention=attention, lora=lora)
    options["placement"] = placement
    kernel = _kernel(attention, config, dtype, dropout, placement)

    def build(key: jax.Array) -> Decoder:
        return Decoder(config, nnx.Rngs(params=key), jnp.dtype(param_dtype))

    with_bias = config.head_bias and config.head_path == "head/kernel"
    padded = config.vocab_padding > 0 and not config.reward
    biased = with_bias or padded

    @functools.cache
    def structure(adapters: tuple[tuple[str, str, tuple[int, ...]], ...]):
        """(graphdef, abstract state) of the decoder with adapters or quantized kernels at these paths."""

        def with_adapters(key: jax.Array) -> Decoder:
            decoder = build(key)
            for path, name, shape in adapters:
                linear = functools.reduce(getattr, path.split("/"), decoder)
                setattr(linear, name, nnx.Param(jnp.zeros(shape)))
                linear.lora = lora
                if name in quantize.QUANTIZATIONS:
                    del linear.kernel
            return decoder

        return nnx.split(nnx.eval_shape(with_adapters, jax.random.key(0)))

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(build(key)))

    def filled(params: Params) -> Decoder:
        graphdef, blank = structure(adapter_shapes(params) if lora else ())
        state = jax.tree.map(lambda x: x, blank)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)

    def widened(out: jax.Array) -> jax.Array:
        return jnp.concatenate([out, jnp.ones_like(out[..., :1])], axis=-1) if biased else out

    def routed(params: Params, tokens, positions, segments, branches, *, tiles=None, sequences=None, key=None):
        options = dict(tiles=tiles, sequences=sequences, dtype=jnp.dtype(dtype), remat=remat, dropout=dropout, key=key)
        options |= dict(kernel=kernel, placement=placement)
        # Kernels are cast once, not in every layer's forward and again in its backward pass.
        out, routing = filled(cast(params, dtype, ("kernel",)))(tokens, positions, segments, branches, **options)
        out = widened(out)
        return out, None if routing is None else moe.balance(routing)

    def hidden(params: Params, tokens, positions, segments, branches, **options: jax.Array | None) -> jax.Array:
        return routed(params, tokens, positions, segments, branches, **options)[0]

    def head(params: Params) -> jax.Array:
        group, name = config.head_path.split("/")
        table = params[group][name]
        if not biased:
            return table
        # A bias is one more column of the head, for a hidden state that is 1 there; padding's leaves it no chance.
        bias = params[group]["bias"] if with_bias else jnp.zeros(table.shape[:1], table.dtype)
        bias = jnp.where(jnp.arange(table.shape[0]) < config.vocab_size, bias, -1e30)
        return jnp.concatenate([table, bias[:, None].astype(table.dtype)], axis=-1)

    def prepare(params: Params) -> tuple[Decoder, jax.Array]:
        params = cast(params, dtype)
        return filled(params).unstacked(), head(params)

    def init_cache(rows: int, length: int) -> tuple[tuple[jax.Array, jax.Array], ...]:
        c = config
        shape = (rows, length, c.num_kv_heads, c.head_dim)
        state = (rows, c.delta_value_heads, c.delta_key_dim, c.delta_value_dim)
        return tuple(
            (jnp.zeros(state, jnp.float32), jnp.zeros((rows, c.delta_taps - 1, sum(c.delta_widths)), dtype))
            if delta
            else (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
            for delta in c.delta_layers or (False,) * c.num_layers
        )

    def extend(decoder: Decoder, tokens, at, start, limit, cache):
        out, cache = decoder.extend(tokens, at, start, limit, cache, jnp.dtype(dtype))
        return widened(out), cache

    return LanguageModel(
        config,
        init,
        hidden,
        head,
        softcap=config.logit_softcap,
        routed=routed if config.num_experts else None,
        join=join if lora else None,
        drops=dropout.draws or (lora is not None and lora.dropout > 0),
        attends=attends,
        dropping=lambda dropout: make_decoder(config, **options, dropout=dropout),
        cached=Cached(prepare, init_cache, extend),
    )
