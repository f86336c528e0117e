"""A model from a GGUF file is the model that the file was written from; what it does not map is refused by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

import prefalign_jax as pa
from conftest import longer
from gguf_models import FAMILIES, config_of, draw, gguf_tensors, hf_tensors, write_gguf
from prefalign_jax.models import gguf_io, hf_io
from prefalign_jax.models.decoder import DecoderConfig
from prefalign_jax.models.rope import RopeScaling
from prefalign_jax.types import UserError
from test_hf_io import logits

TOKENS = (np.arange(40, dtype=np.int32).reshape(2, 20) * 7 + 3) % 61


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(config, GGUF's tensors of a small Llama)."""
    config = config_of("llama")
    return config, gguf_tensors(config, hf_tensors(config, draw(config), tmp_path_factory.mktemp("llama") / "hf"))


def assert_same(ours, theirs, **tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 0, "atol": 0, **tolerance}), ours, theirs)


# Rows of q and k change places in Llama, norms of Gemma are stored plus one, Mixtral's experts lie together.
CORE = ("llama", "gemma2", "mixtral")


@pytest.mark.parametrize("family", [name if name in CORE else longer(name) for name in FAMILIES])
def test_a_file_holds_the_model_that_it_was_written_from(family, tmp_path):
    config = config_of(family)
    params = draw(config)
    path = write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config, hf_tensors(config, params, tmp_path / "hf")))
    assert hf_io.load_config(path) == config
    # The 1 that is added to Gemma's norms and taken away again costs a rounding.
    assert_same(hf_io.load_params(path, config), params, atol=2e-7 if family.startswith("gemma") else 0)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_its_logits_are_those_of_its_source(family, kind, tmp_path):
    config = config_of(family, tie_word_embeddings=True)
    params = draw(config)
    tensors = hf_tensors(config, params, tmp_path / "hf")
    path = write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config, tensors), kind=kind)
    stored = {"F32": np.float32, "F16": np.float16, "BF16": jax.numpy.bfloat16}[kind]
    rounded = {name: x.astype(stored).astype(np.float32) if x.ndim > 1 else x for name, x in tensors.items()}
    save_file(rounded, tmp_path / "hf" / hf_io.SINGLE)
    source = hf_io.load_params(tmp_path / "hf", config)
    ours = hf_io.load_params(path, hf_io.load_config(path))
    np.testing.assert_array_equal(logits(config, ours, TOKENS), logits(config, source, TOKENS))
    kept = hf_io.load_params(path, config, dtype="stored")
    assert kept["layers"]["mlp"]["up"]["kernel"].dtype == stored and kept["final_norm"]["scale"].dtype == np.float32


def test_blocks_become_the_values_that_the_package_says(tmp_path):
    config = config_of("llama", hidden_size=64, intermediate_size=96)
    tensors = gguf_tensors(config, hf_tensors(config, draw(config), tmp_path / "hf"))
    path = write_gguf(tmp_path / "m.gguf", config, tensors, kind="Q4_1")
    kind = gguf.GGMLQuantizationType.Q4_1
    quants = gguf.quants
    rounded = {n: quants.dequantize(quants.quantize(x, kind), kind) if x.ndim > 1 else x for n, x in tensors.items()}
    same = write_gguf(tmp_path / "same.gguf", config, rounded)
    assert_same(*(hf_io.load_params(one, config) for one in (path, same)))
    tensor = gguf_io.open_tensors(path)["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(tensor[3:9, 5:40], tensor.view()[3:9, 5:40])  # a device's part


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", 4.0),
        RopeScaling("yarn", 4.0, original_max_position=16),
        RopeScaling("yarn", 4.0, original_max_position=16, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5),
    ],
    ids=["linear", "yarn", "yarn in full"],
)
def test_rotations_that_the_metadata_tells(scaling, llama, tmp_path):
    def change(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling.factor)
        if scaling.original_max_position:
            writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position)
        if scaling.beta_fast:
            writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
            writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
            writer.add_rope_scaling_yarn_attn_factor(scaling.attention_factor)

    config, tensors = llama
    path = write_gguf(tmp_path / "m.gguf", config, tensors, change=change)
    assert hf_io.load_config(path) == dataclasses.replace(config, rope_scaling=scaling)


def test_rotations_that_tensors_tell(llama, tmp_path):
    config, tensors = llama
    config = dataclasses.replace(config, rope_theta=500000.0)
    # Wavelengths 6.3, 167, 4443, 118143 tokens: the third is in the band of 2048 to 8192, by 0.28 of its way.
    blend = (8192 / (2 * np.pi * 500000 ** (4 / 8)) - 1) / 3
    divisors = np.array([1, 1, 1 / ((1 - blend) / 8 + blend), 8], np.float32)
    path = write_gguf(tmp_path / "m.gguf", config, {**tensors, "rope_freqs.weight": divisors})
    scaling = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
    assert hf_io.load_config(path) == dataclasses.replace(config, rope_scaling=scaling)
    assert hf_io.load_params(path, hf_io.load_config(path))
    path = write_gguf(tmp_path / "other.gguf", config, {**tensors, "rope_freqs.weight": divisors[::-1]})
    with pytest.raises(UserError, match="tensor rope_freqs.weight is not Llama 3's scaling by 8"):
        hf_io.load_config(path)

    phi = config_of("phi3")
    stored = gguf_tensors(phi, hf_tensors(phi, draw(phi), tmp_path / "phi"))
    factors = {"short": np.array([1, 1.1, 1.3, 2], np.float32), "long": np.array([1.5, 4, 9, 20], np.float32)}
    stored |= {f"rope_factors_{name}.weight": values for name, values in factors.items()}
    path = write_gguf(tmp_path / "long.gguf", phi, stored, change=lambda w: w.add_rope_scaling_orig_ctx_len(16))
    read = hf_io.load_config(path).rope_scaling
    assert (read.kind, read.factor, read.attention_factor) == ("longrope", 4.0, None)
    assert (read.short_factor, read.long_factor) == ((1.0, 1.1, 1.3, 2.0), (1.5, 4.0, 9.0, 20.0))


def test_windows_and_what_only_large_gemmas_have(tmp_path):
    config = config_of("mistral", sliding_window=5)
    like = dataclasses.replace(config, family="llama")
    tensors = gguf_tensors(like, hf_tensors(like, draw(like), tmp_path / "hf"))
    assert hf_io.load_config(write_gguf(tmp_path / "m.gguf", like, tensors)) == config
    config = config_of("gemma3_text", num_hidden_layers=62, sliding_window=5)
    tensors = {"token_embd.weight": np.zeros((61, 32), np.float32)}
    read = hf_io.load_config(write_gguf(tmp_path / "large.gguf", config, tensors))
    assert (read.query_scale, read.windows) == (8**-0.5, config.windows)  # 32 / 4 heads, not the 12 of a head


def refused(path, says):
    with pytest.raises(UserError, match=says) as caught:
        hf_io.load_params(path, hf_io.load_config(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.add_string("llama.new_thing", "x"), "llama.new_thing='x' is not supported"),
        (lambda w: w.add_causal_attention(False), "llama.attention.causal=False is not supported"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "rope.scaling.type='longrope' is not supp"),
        (lambda w: w.add_array("llama.attention.sliding_window", [1, 2]), "expected an integer, found .1, 2."),
        (lambda w: w.add_eos_token_id(99), "tokenizer.ggml.eos_token_id: 99 is not the id of one of 0 tokens"),
        (lambda w: w.add_expert_count(4), "its metadata has no llama.expert_used_count"),
        (lambda w: w.add_uint16("split.count", 3), "is one of 3 parts; join them"),
    ],
)
def test_metadata_that_is_not_known_is_refused(change, says, llama, tmp_path):
    refused(write_gguf(tmp_path / "m.gguf", *llama, change=change), says)


def test_other_models_and_tensors_are_refused(llama, tmp_path):
    config, tensors = llama
    refused(write_gguf(tmp_path / "a.gguf", config, tensors, shaped=False), "its metadata has no llama.context_length")
    without = {name: x for name, x in tensors.items() if name != "blk.1.ffn_up.weight"}
    refused(write_gguf(tmp_path / "b.gguf", config, without), "b.gguf: tensor blk.1.ffn_up.weight is missing")
    more = {**tensors, "blk.0.ffn_gate_shexp.weight": tensors["blk.0.ffn_up.weight"]}
    refused(write_gguf(tmp_path / "c.gguf", config, more), "tensor blk.0.ffn_gate_shexp.weight has no place in a llama")
    other = {**tensors, "blk.0.ffn_up.weight": tensors["blk.0.ffn_up.weight"][:-1]}
    refused(write_gguf(tmp_path / "d.gguf", config, other), "where its metadata asks for .40, 32.")
    broken = {**tensors, "blk.0.ffn_up.weight": np.full((40, 32), np.nan, np.float32)}
    refused(write_gguf(tmp_path / "e.gguf", config, broken), "tensor blk.0.ffn_up.weight holds NaN or infinity")
    writer = gguf.GGUFWriter(tmp_path / "f.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(tmp_path / "f.gguf", "general.architecture='mamba' is not supported; supported are llama, ")


def test_a_file_in_a_directory_is_named_and_a_digest_covers_every_byte(llama, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", *llama)
    with pytest.raises(UserError, match=r"it has no config.json; name the file, .*m\.gguf"):
        hf_io.load_config(tmp_path)
    before = hf_io.fingerprint(path), hf_io.fingerprint(path, whole=True)
    with path.open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"\x01")
    after = hf_io.fingerprint(path), hf_io.fingerprint(path, whole=True)
    assert before[0] != after[0] and before[1] != after[1]


def test_an_export_keeps_what_the_file_says(llama, tmp_path):
    config, tensors = llama

    def change(writer):
        writer.add_token_list([f"<{n}>" for n in range(61)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(5)

    path = write_gguf(tmp_path / "m.gguf", config, tensors, change=change)
    hf_io.save_params(hf_io.load_params(path, config), config, tmp_path / "out", base=path)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stored["model_type"], stored["bos_token_id"], stored["eos_token_id"]) == ("llama", 1, [2, 5])
    assert stored["rms_norm_eps"] == config.norm_eps  # the decimal, not its float32
    assert DecoderConfig(**hf_io.families.from_hf(stored)) == config


@pytest.mark.everything
def test_a_run_trains_from_a_file_and_exports_a_directory(tmp_path):
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    config = config_of("llama", vocab_size=len(tokens))

    def change(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([3] + [1] * (len(tokens) - 1))
        writer.add_token_merges(["t h"])
        writer.add_eos_token_id(0)
        writer.add_license("mit")

    tensors = gguf_tensors(config, hf_tensors(config, draw(config), tmp_path / "hf"))
    path = write_gguf(tmp_path / "tiny.F32.gguf", config, tensors, change=change)
    rows = [{"prompt": f"Is {n} odd?", "chosen": " The answer.", "rejected": " Who cares."} for n in range(2)]
    fields = {"model.path": str(path), "lora.rank": 2, "learning_rate": 1e-2}
    pa.train(pa.experiment("dpo", steps=1, batch_size=2, **fields), tmp_path / "run", data=rows)
    out = tmp_path / "run" / "export"
    stored = json.loads((out / "config.json").read_text())
    assert (stored["model_type"], stored["eos_token_id"], stored["dtype"]) == ("llama", 0, "float32")
    card = (out / "README.md").read_text()
    assert (
        "starting from tiny (from F32)." in card and "license: mit" in card and "base_model" not in card.split("---")[1]
    )
    assert "for tiny (from F32)." in (tmp_path / "run" / "adapters" / "README.md").read_text()
    before, after = pa.load(path), pa.load(out)
    assert before.tokenizer("the").input_ids == after.tokenizer("the").input_ids
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before.params, after.params)
    assert moved["layers"]["attention"]["q"]["kernel"] and not moved["embed"]["embedding"]
