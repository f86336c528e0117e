import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prefalign_jax.models import hf_io, mxfp4
from prefalign_jax.models.decoder import DecoderConfig, make_decoder
from prefalign_jax.sharding import make_mesh, param_shardings
from prefalign_jax.types import UserError
from small import decoder, hidden_of

RNG = np.random.default_rng(0)
CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_bias=True,
    sinks=True,
    swiglu_limit=7.0,
    num_experts=4,
    family="gpt_oss",
)


def by_hand(code: int, exponent: int) -> float:
    """A sign, two bits of exponent with bias 1, one bit of mantissa; exponent 0 is without the leading 1."""
    sign, power, mantissa = code >> 3, code >> 1 & 3, code & 1
    value = mantissa / 2 if power == 0 else (1 + mantissa / 2) * 2.0 ** (power - 1)
    return (-1) ** sign * value * 2.0 ** (exponent - 127)


def drawn(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks [..., n, 16] and scales [..., n] of numbers up to 6."""
    return (
        RNG.integers(0, 256, (*shape, 16)).astype(np.uint8),
        RNG.integers(120, 128, shape).astype(np.uint8),
    )


def test_every_byte_under_every_scale_is_what_the_standard_says():
    scales = np.array([0, 1, 100, 127, 128, 250], np.uint8)
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (6, 16, 16))
    found = mxfp4.dequantize(blocks, np.repeat(scales[:, None], 16, 1)).reshape(6, 256, 2)
    for scale, row in zip(scales, found, strict=True):
        wanted = [[by_hand(byte & 15, int(scale)), by_hand(byte >> 4, int(scale))] for byte in range(256)]
        np.testing.assert_array_equal(row, np.float32(wanted))
    np.testing.assert_array_equal(found.astype(jax.numpy.bfloat16).astype(np.float32), found)  # nothing is rounded
    assert np.isnan(mxfp4.dequantize(np.zeros((1, 16), np.uint8), np.array([255], np.uint8))).all()


def test_any_part_is_that_part_of_the_whole():
    """A device's share, which may begin and end within a block."""
    parts = [types.SimpleNamespace(shape=x.shape, view=lambda x=x: x) for x in drawn(3, 10, 2)]
    tensor = mxfp4.Tensor("x", *parts)
    values = mxfp4.dequantize(*(part.view() for part in parts)).swapaxes(1, 2)
    everything = (slice(None),) * 3
    assert tensor.shape == values.shape == (3, 64, 10) and tensor.turn(1, 2).shape == (3, 64, 5)
    for index in (everything, (slice(1, 3), slice(8, 40), slice(2, 7)), (slice(0, 1), slice(32, 64), slice(None))):
        np.testing.assert_array_equal(tensor[index], values[index])
        for turn in (0, 1):
            np.testing.assert_array_equal(tensor.turn(turn, 2)[index], values[..., turn::2][index])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(directory as gpt-oss is published, the values of its experts' kernels by name)."""
    directory = tmp_path_factory.mktemp("published")
    shapes = jax.eval_shape(make_decoder(CONFIG).init, jax.random.key(0))
    params = jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), shapes)
    hf_io.save_params(params, CONFIG, directory)
    tensors, values = load_file(directory / hf_io.SINGLE), {}
    for name in [name for name in tensors if name.endswith("_proj")]:
        experts, features_in, features_out = tensors.pop(name).shape
        blocks, scales = drawn(experts, features_out, features_in // 32)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values[name] = mxfp4.dequantize(blocks, scales).swapaxes(1, 2)
    save_file(tensors, directory / hf_io.SINGLE, metadata={"format": "pt"})
    hf = json.loads((directory / "config.json").read_text())
    hf["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(hf))
    return directory, values


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 4}], ids=["one", "eight"])
def test_a_published_model_is_read_as_the_numbers_that_it_stands_for(published, mesh):
    directory, values = published
    assert hf_io.load_config(directory) == CONFIG
    shapes = jax.eval_shape(make_decoder(CONFIG).init, jax.random.key(0))
    where = param_shardings(make_mesh(mesh), shapes) if mesh else None
    experts = hf_io.load_params(directory, CONFIG, shardings=where)["layers"]["experts"]
    for layer in range(CONFIG.num_layers):
        fused = values[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        np.testing.assert_array_equal(experts["gate"]["kernel"][layer], fused[..., ::2])
        np.testing.assert_array_equal(experts["up"]["kernel"][layer], fused[..., 1::2])
        down = values[f"model.layers.{layer}.mlp.experts.down_proj"]
        np.testing.assert_array_equal(experts["down"]["kernel"][layer], down)


def test_the_export_is_plain_and_says_so(published, tmp_path):
    directory, values = published
    assert hf_io.stored_dtype(directory) == "float32"  # of bfloat16's values and float32's
    params = hf_io.load_params(directory, CONFIG)
    hf_io.save_params(params, CONFIG, tmp_path / "out", dtype="bfloat16", base=directory)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    stored = load_file(tmp_path / "out" / hf_io.SINGLE)
    for name, value in values.items():
        np.testing.assert_array_equal(stored[name].astype(np.float32), value)


def test_bytes_that_do_not_fit_are_named(published, tmp_path):
    directory, _ = published
    tensors = load_file(directory / hf_io.SINGLE)
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[f"{name}_scales"] = tensors[f"{name}_scales"][:, :1]
    save_file(tensors, tmp_path / hf_io.SINGLE)
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    with pytest.raises(UserError, match=rf"tensor {name} is missing"):
        hf_io.load_params(tmp_path, CONFIG)
    wide = dataclasses.replace(CONFIG, intermediate_size=64)
    with pytest.raises(
        UserError, match=r"gate_up_proj has shape \(4, 64, 64\) where config.json asks for \(4, 64, 128\)"
    ):
        hf_io.load_params(directory, wide)


@pytest.mark.everything
@pytest.mark.parity
def test_the_values_are_transformers_own():
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = drawn(2, 6, 3)
    theirs = convert_moe_packed_tensors(*map(torch.from_numpy, (blocks, scales)), dtype=torch.float32)
    np.testing.assert_array_equal(mxfp4.dequantize(blocks, scales).swapaxes(1, 2), theirs.numpy())


@pytest.mark.everything
@pytest.mark.parity
def test_transformers_computes_the_same_from_the_same_files(published):
    """It unpacks them on a CPU too."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    directory, _ = published
    options = dict(dtype=torch.float32, attn_implementation="eager")
    options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    tokens = np.arange(3, 23, dtype=np.int32)[None]
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    model, params = decoder(CONFIG), hf_io.load_params(directory, CONFIG)
    zeros = np.zeros_like(tokens)
    hidden = hidden_of(model, params, tokens, zeros + np.arange(20, dtype=np.int32), zeros + 1, zeros)
    found = np.einsum("rld,vd->rlv", hidden, model.head(params))
    np.testing.assert_allclose(found, logits, atol=1e-4 * np.abs(logits).max())
