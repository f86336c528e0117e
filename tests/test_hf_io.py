"""Hugging Face directories in and out. `python tests/test_hf_io.py` writes the golden logits anew (needs torch)."""

import dataclasses
import json
import pathlib
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from conftest import longer
from prefalign_jax import sharding
from prefalign_jax.models import families, hf_io
from prefalign_jax.models.decoder import DecoderConfig, make_decoder
from prefalign_jax.models.quantize import QUANTIZATIONS, quantize_params
from prefalign_jax.models.rope import RopeScaling
from prefalign_jax.reference import params_digest
from prefalign_jax.types import UserError
from small import decoder, hidden_of

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "llama_logits.npz"
# Every width differs from every other, so that no mapping to the wrong place or axis fits.
CONFIG = DecoderConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    max_position=64,
)
CASES = {
    "default": CONFIG,
    "tied": dataclasses.replace(CONFIG, tie_embeddings=True, rope_theta=500.0),
    "linear": dataclasses.replace(CONFIG, rope_scaling=RopeScaling("linear", 2.0)),
    "llama3": dataclasses.replace(
        CONFIG,
        rope_scaling=RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=32),
    ),
    "yarn": dataclasses.replace(CONFIG, rope_scaling=RopeScaling("yarn", 4.0, original_max_position=16)),
}
# Divisible by 8 devices, and with several blocks of a scale each.
WIDE = dataclasses.replace(CONFIG, vocab_size=64, hidden_size=128, intermediate_size=320, num_layers=6)
REWARD = dataclasses.replace(CONFIG, reward=True)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = (np.arange(40, dtype=np.int32).reshape(2, 20) * 7 + 3) % CONFIG.vocab_size


def stored_weights(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Hugging Face's tensors, drawn in the order of their names: matrices N(0, 1/fan_in) times 2, norms around 1."""
    random = np.random.RandomState(0)  # whose stream numpy promises never to change
    shapes = hf_io.param_shapes(config)
    tensors = {}
    for name, (row,), layer in sorted(families.weights(config)):
        shape = shapes[row.path] if layer is None else shapes[row.path][1:]
        shape = shape[::-1] if row.transpose else shape
        draw = random.standard_normal(shape)
        tensors[name] = (1 + 0.5 * draw if len(shape) == 1 else 2 * draw / shape[-1] ** 0.5).astype(np.float32)
    return tensors


def write_directory(directory: pathlib.Path, config: DecoderConfig, tensors=None) -> pathlib.Path:
    """A model directory as transformers writes it, without our own writer."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(families.to_hf(config)))
    save_file(stored_weights(config) if tensors is None else tensors, directory / hf_io.SINGLE)
    return directory


def logits(config: DecoderConfig, params, tokens=TOKENS) -> np.ndarray:
    model = decoder(config)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    hidden = hidden_of(model, params, tokens, positions, np.ones_like(tokens), np.zeros_like(tokens))
    return np.asarray(jnp.einsum("rld,vd->rlv", hidden, model.head(params), precision="highest"))


def torch_logits(config: DecoderConfig) -> np.ndarray:
    import torch
    import transformers

    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**families.to_hf(config), attn_implementation="eager")
    )
    state = {name: torch.from_numpy(value) for name, value in stored_weights(config).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tie_embeddings else [])
    model.tie_weights()
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS).long()).logits.numpy()


def assert_trees_equal(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def directory(tmp_path):
    return write_directory(tmp_path / "model", CONFIG)


@pytest.fixture
def params(directory):
    return hf_io.load_params(directory, CONFIG)


def refused(directory, config=CONFIG, *words) -> None:
    with pytest.raises(UserError) as caught:
        hf_io.load_params(directory, config)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


# Loading.


def test_each_tensor_lands_in_its_place(params):
    stored = stored_weights(CONFIG)
    for layer in range(CONFIG.num_layers):
        down = stored[f"model.layers.{layer}.mlp.down_proj.weight"]
        np.testing.assert_array_equal(params["layers"]["mlp"]["down"]["kernel"][layer], down.T)
        norm = stored[f"model.layers.{layer}.post_attention_layernorm.weight"]
        np.testing.assert_array_equal(params["layers"]["mlp_norm"]["scale"][layer], norm)
    np.testing.assert_array_equal(params["head"]["kernel"], stored["lm_head.weight"])
    abstract = jax.eval_shape(make_decoder(CONFIG).init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_golden(case, tmp_path):
    config = CASES[case]
    directory = write_directory(tmp_path / "model", config)
    assert hf_io.load_config(directory) == config
    with np.load(GOLDEN) as golden:
        expected = golden[case]
    assert expected.std() > 1  # or the comparison would see nothing
    np.testing.assert_allclose(logits(config, hf_io.load_params(directory, config)), expected, rtol=0, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    pytest.importorskip("torch")
    config = CASES[case]
    params = hf_io.load_params(write_directory(tmp_path / "model", config), config)
    np.testing.assert_allclose(logits(config, params), torch_logits(config), rtol=0, atol=1e-4)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64], ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_stored_float_becomes_the_type_asked_for(stored, dtype, tmp_path):
    tensors = {name: value.astype(stored) for name, value in stored_weights(CONFIG).items()}
    params = hf_io.load_params(write_directory(tmp_path / "model", CONFIG, tensors), CONFIG, dtype=dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    gate = tensors["model.layers.1.mlp.gate_proj.weight"].T.astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(params["layers"]["mlp"]["gate"]["kernel"][1]), gate)


def half_weights(config=CONFIG):
    return {name: value.astype(ml_dtypes.bfloat16) for name, value in stored_weights(config).items()}


def test_the_stored_type_is_kept_and_of_layers_that_differ_the_wider(tmp_path):
    tensors = half_weights()
    tensors["model.layers.1.mlp.gate_proj.weight"] = tensors["model.layers.1.mlp.gate_proj.weight"].astype(np.float32)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
    directory = write_directory(tmp_path / "model", CONFIG, tensors)
    params = hf_io.load_params(directory, REWARD, dtype="stored")
    kept = {path: leaf.dtype.name for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}
    wide = {path for path, name in kept.items() if name == "float32"}
    assert wide == {"layers/mlp/gate/kernel", "final_norm/scale", "score/kernel"}
    assert {kept[path] for path in kept.keys() - wide} == {"bfloat16"}
    assert_trees_equal(params, hf_io.load_params(directory, REWARD))  # nothing is rounded


# Where the memory goes.


@pytest.fixture
def held(monkeypatch):
    """(shape, type) of every array that a tensor is read into, in a list of those that are alive together."""
    alive, most = {}, []

    def read(tensor, index):
        part = np.array(tensor.view()[index])
        alive[id(part)] = part.nbytes
        weakref.finalize(part, alive.pop, id(part))
        most.append(sum(alive.values()))
        return part

    monkeypatch.setattr(hf_io._Tensor, "__getitem__", read)
    return most


def shardings_of(tree, sizes):
    return sharding.param_shardings(sharding.make_mesh(sizes), tree)


@pytest.mark.parametrize(
    "sizes", [None, longer({"data": 8}), longer({"data": 4, "fsdp": 2}), {"fsdp": 4, "tensor": 2}], ids=str
)
@pytest.mark.parametrize("kind", [None, *(kind if kind == "int8" else longer(kind) for kind in QUANTIZATIONS)])
def test_the_host_holds_one_tensor_at_a_time(kind, sizes, held, tmp_path):
    tensors = half_weights(WIDE)
    directory = write_directory(tmp_path / "model", WIDE, tensors)
    tree = jax.eval_shape(make_decoder(WIDE).init, jax.random.key(0))
    if kind:
        tree = jax.eval_shape(lambda params: quantize_params(params, kind), tree)
    shardings = sizes and shardings_of(tree, sizes)
    params = hf_io.load_params(directory, WIDE, quantize=kind, shardings=shardings)
    largest = max(value.nbytes for value in tensors.values())
    # jax lets go of a host array only when its copy is made, which may be while the next tensor is read.
    assert largest <= max(held) <= 2 * largest < sum(value.nbytes for value in tensors.values()) / 4
    if sizes:
        assert jax.tree.map(lambda x: x.sharding, params) == shardings


def test_what_is_mapped_of_the_files_is_let_go_of(tmp_path):
    directory = write_directory(tmp_path / "model", WIDE)
    params = hf_io.load_params(directory, WIDE)
    mapped = pathlib.Path("/proc/self/maps")
    if mapped.exists():
        assert str(directory) not in mapped.read_text()
    (directory / hf_io.SINGLE).write_bytes(b"")  # so this reaches nothing that is in use
    assert np.isfinite(np.asarray(params["embed"]["embedding"])).all()


FSDP, ALL_AXES = {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("kind", [kind if kind == "int8" else longer(kind) for kind in QUANTIZATIONS])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [("stored", FSDP)]
    + [
        longer(*more)
        for more in (
            ("float32", None),
            ("stored", None),
            ("float32", FSDP),
            ("stored", ALL_AXES),
            ("float32", ALL_AXES),
        )
    ],
    ids=str,
)
def test_kernels_quantized_on_the_way_are_those_quantized_afterwards(kind, sizes, dtype, tmp_path):
    directory = write_directory(tmp_path / "model", WIDE, half_weights(WIDE))
    afterwards = quantize_params(hf_io.load_params(directory, WIDE, dtype=dtype), kind)
    shardings = sizes and shardings_of(afterwards, sizes)
    params = hf_io.load_params(directory, WIDE, dtype=dtype, quantize=kind, shardings=shardings)
    assert_trees_equal(params, afterwards)
    assert params_digest(params) == params_digest(afterwards)  # types too
    if sizes:
        assert jax.tree.map(lambda x: x.sharding, params) == shardings
        codes = params["layers"]["mlp"]["down"][kind]
        assert codes.addressable_shards[0].data.size * mesh_size(sizes) == codes.size


def mesh_size(sizes):
    return sizes.get("fsdp", 1) * sizes.get("tensor", 1)


def test_an_unknown_quantization_is_refused(directory):
    with pytest.raises(UserError, match="quantize='nf5' is unknown; did you mean 'nf4'"):
        hf_io.load_params(directory, CONFIG, quantize="nf5")


def test_tied_table_under_either_name_or_both(tmp_path):
    config = CASES["tied"]
    tensors = stored_weights(config)
    table = tensors[EMBEDDING]
    expected = hf_io.load_params(write_directory(tmp_path / "a", config, tensors), config)
    assert "head" not in expected
    both = {**tensors, HEAD: table}
    head_only = {name: value for name, value in both.items() if name != EMBEDDING}
    for number, stored in enumerate((both, head_only)):
        directory = write_directory(tmp_path / f"b{number}", config, stored)
        assert_trees_equal(hf_io.load_params(directory, config), expected)
    differing = write_directory(tmp_path / "c", config, {**tensors, HEAD: table + 1})
    refused(differing, config, EMBEDDING, HEAD, "differ")


def test_rotary_buffers_are_passed_over(directory, params):
    tensors = stored_weights(CONFIG) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert_trees_equal(hf_io.load_params(write_directory(directory, CONFIG, tensors), CONFIG), params)


@pytest.mark.parametrize(("count", "which"), [(8, -1), (3, 0)], ids=["last axis", "layers"])
def test_each_device_gets_its_part(count, which, directory, params):
    mesh = jax.make_mesh((count,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count])

    def sharding(leaf):
        divides = [i for i, size in enumerate(leaf.shape) if size % count == 0]
        axis = divides[which] if divides else None
        return jax.NamedSharding(mesh, jax.P(*["x" if i == axis else None for i in range(leaf.ndim)]))

    shardings = jax.tree.map(sharding, params)
    placed = hf_io.load_params(directory, CONFIG, shardings=shardings)
    assert_trees_equal(placed, params)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings
    with pytest.raises(ValueError, match="head/kernel"):
        hf_io.load_params(directory, CONFIG, shardings={k: v for k, v in shardings.items() if k != "head"})


# Reward models.


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("max_shard_bytes", [5e9, 8_000], ids=["single", "shards"])
def test_reward_model_round_trip(tied, max_shard_bytes, tmp_path):
    config = dataclasses.replace(REWARD, tie_embeddings=tied)
    original = stored_weights(config)
    directory = write_directory(tmp_path / "in", config, original)
    assert hf_io.load_config(directory) == config
    params = hf_io.load_params(directory, config)
    np.testing.assert_array_equal(params["score"]["kernel"], original[families.SCORE])
    assert np.abs(original[families.SCORE]).min() > 0 and "head" not in params
    hf_io.save_params(params, config, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    assert hf_io.load_config(tmp_path / "out") == config
    assert_trees_equal(hf_io.load_params(tmp_path / "out", config), params)
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == original.keys() and HEAD not in written
    assert all(np.array_equal(written[name], original[name]) for name in original)


@pytest.mark.parametrize("case", ["default", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reward_model_starts_from_a_language_model_and_zeros(case, dtype, tmp_path):
    directory = write_directory(tmp_path / "model", CASES[case])
    found = hf_io.load_config(directory)
    assert not found.reward
    language = hf_io.load_params(directory, found, dtype=dtype)
    params = hf_io.load_params(directory, dataclasses.replace(found, reward=True), dtype=dtype)
    score = params.pop("score")["kernel"]
    np.testing.assert_array_equal(score, np.zeros((1, CONFIG.hidden_size)))
    assert score.dtype == jnp.dtype(dtype)
    assert_trees_equal(params, {name: part for name, part in language.items() if name != "head"})


def test_a_reward_model_starts_from_a_tied_table_under_the_heads_name(tmp_path):
    config = CASES["tied"]
    tensors = stored_weights(config)
    tensors[HEAD] = table = tensors.pop(EMBEDDING)
    directory = write_directory(tmp_path / "model", config, tensors)
    params = hf_io.load_params(directory, dataclasses.replace(config, reward=True))
    np.testing.assert_array_equal(params["embed"]["embedding"], table)


@pytest.mark.parametrize("start", [CONFIG, REWARD], ids=["language", "reward"])
def test_the_score_is_placed_where_it_is_asked_for(start, tmp_path):
    directory = write_directory(tmp_path / "model", start)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), hf_io.load_params(directory, REWARD))
    shardings["score"]["kernel"] = jax.NamedSharding(mesh, jax.P(None, "x"))
    placed = hf_io.load_params(directory, REWARD, shardings=shardings)
    assert_trees_equal(placed, hf_io.load_params(directory, REWARD))
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings


def test_a_reward_model_is_no_language_model(tmp_path):
    directory = write_directory(tmp_path / "model", REWARD)
    refused(directory, CONFIG, str(directory), "is a reward model", "loss.name=bradley_terry", "a language model")


def test_a_reward_model_without_its_score(tmp_path):
    tensors = stored_weights(REWARD)
    del tensors[families.SCORE]
    refused(write_directory(tmp_path / "model", REWARD, tensors), REWARD, "tensor score.weight is missing")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_reward_model_with_a_head_is_not_understood(tied, tmp_path):
    config = dataclasses.replace(REWARD, tie_embeddings=tied)
    tensors = stored_weights(config)
    tensors[HEAD] = tensors[EMBEDDING]
    refused(write_directory(tmp_path / "model", config, tensors), config, "tensor lm_head.weight has no place")


@pytest.mark.parametrize("config", [CONFIG, REWARD], ids=["language", "reward"])
def test_a_score_that_the_config_does_not_tell_of_is_not_dropped(config, tmp_path):
    tensors = stored_weights(CONFIG) | {families.SCORE: np.ones((1, 24), np.float32)}
    directory = write_directory(tmp_path / "model", CONFIG, tensors)
    refused(directory, config, "tensor score.weight is a reward model's", '["LlamaForSequenceClassification"]')


def test_two_labels_that_the_config_is_silent_about(tmp_path):
    tensors = stored_weights(REWARD)
    tensors[families.SCORE] = np.ones((2, 24), np.float32)
    directory = write_directory(tmp_path / "model", REWARD, tensors)
    hf = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({k: v for k, v in hf.items() if k[-5:] != "label"}))
    refused(directory, hf_io.load_config(directory), "score.weight has 2 labels where a reward model has 1")


@pytest.mark.parametrize(("shape", "words"), [((1, 23), "(1, 23)"), ((24,), "(24,)")], ids=["width", "axes"])
def test_a_score_of_another_shape(shape, words, tmp_path):
    tensors = stored_weights(REWARD) | {families.SCORE: np.ones(shape, np.float32)}
    refused(write_directory(tmp_path / "model", REWARD, tensors), REWARD, "score.weight", words, "(1, 24)")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resizing_leaves_the_score_alone(tied, tmp_path):
    config = dataclasses.replace(REWARD, tie_embeddings=tied)
    params = hf_io.load_params(write_directory(tmp_path / "model", config), config)
    resized, bigger = hf_io.resize_embeddings(params, config, 53)
    assert bigger == dataclasses.replace(config, vocab_size=53)
    assert resized.keys() == params.keys() and resized["score"] is params["score"]
    np.testing.assert_array_equal(resized["embed"]["embedding"][:50], params["embed"]["embedding"])
    assert resized["embed"]["embedding"].shape == (53, 24)
    hf_io.save_params(resized, bigger, tmp_path / "out")


# What cannot be loaded says so.


def test_missing_tensor(directory):
    tensors = stored_weights(CONFIG)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    refused(write_directory(directory, CONFIG, tensors), CONFIG, "model.layers.2.mlp.up_proj.weight is missing")


def test_unknown_tensor(directory):
    tensors = stored_weights(CONFIG) | {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}
    refused(write_directory(directory, CONFIG, tensors), CONFIG, "model.layers.0.self_attn.q_proj.bias", "no place")


def test_more_layers_than_the_config_has(directory):
    config = dataclasses.replace(CONFIG, num_layers=2)
    refused(directory, config, "model.layers.2.", "2 layers", "(9 such)")


def test_wrong_shape_is_given_as_stored(directory):
    config = dataclasses.replace(CONFIG, num_kv_heads=1)
    refused(directory, config, "model.layers.0.self_attn.k_proj.weight", "(16, 24)", "(8, 24)")


def test_integer_tensor(directory):
    tensors = stored_weights(CONFIG)
    tensors["model.norm.weight"] = np.ones(24, np.int8)
    refused(write_directory(directory, CONFIG, tensors), CONFIG, "model.norm.weight", "I8")


def test_pickle_only(directory):
    (directory / hf_io.SINGLE).rename(directory / "pytorch_model.bin")
    refused(directory, CONFIG, "pytorch_model.bin", "pickle", "convert")


def test_no_weights_at_all(directory):
    (directory / hf_io.SINGLE).unlink()
    refused(directory, CONFIG, "neither model.safetensors nor")


def test_truncated_file(directory):
    file = directory / hf_io.SINGLE
    file.write_bytes(file.read_bytes()[:-10])
    refused(directory, CONFIG, "model.safetensors is not a whole safetensors file")


def test_missing_shard_and_lying_index(directory, params):
    hf_io.save_params(params, CONFIG, directory, max_shard_bytes=10_000)
    index = json.loads((directory / hf_io.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (directory / hf_io.INDEX).write_text(json.dumps(index))
    refused(directory, CONFIG, "does not hold tensor model.norm.weight")
    next(directory.glob("model-00002-*")).unlink()
    refused(directory, CONFIG, "model-00002-of-", "is missing")


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", ""])
def test_an_index_may_not_name_files_elsewhere(directory, params, name):
    hf_io.save_params(params, CONFIG, directory, max_shard_bytes=10_000)
    index = json.loads((directory / hf_io.INDEX).read_text())
    for tensor in list(index["weight_map"])[:1]:
        index["weight_map"][tensor] = name
    (directory / hf_io.INDEX).write_text(json.dumps(index))
    refused(directory, CONFIG, f"index.json names {name!r}; a model's files lie beside it")


INDICES = ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 5000 + "]" * 5000]


@pytest.mark.parametrize("index", INDICES, ids=lambda x: x[:20])
def test_an_index_of_another_shape_is_refused(directory, params, index):
    hf_io.save_params(params, CONFIG, directory, max_shard_bytes=10_000)
    (directory / hf_io.INDEX).write_text(index)
    refused(directory, CONFIG, "index.json")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [EMBEDDING, "model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("stored", [np.float32, np.float16, jnp.bfloat16])
def test_a_tensor_that_is_not_finite_is_refused_by_name(tmp_path, value, name, stored):
    weights = {key: tensor.astype(stored) for key, tensor in stored_weights(CONFIG).items()}
    weights[name] = weights[name].copy()
    weights[name].reshape(-1)[-1] = value
    refused(write_directory(tmp_path / "model", CONFIG, weights), CONFIG, f"tensor {name} holds NaN or infinity")


@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
def test_that_it_is_not_finite_is_known_wherever_its_part_lies(tmp_path, kind):
    weights = stored_weights(CONFIG)
    weights["model.layers.0.mlp.up_proj.weight"][3, 1] = np.nan
    directory = write_directory(tmp_path / "model", CONFIG, weights)
    blank = jax.eval_shape(make_decoder(CONFIG).init, jax.random.key(0))
    blank = jax.eval_shape(lambda params: hf_io.quantize_params(params, kind), blank) if kind else blank
    where = shardings_of(blank, {"fsdp": 4, "tensor": 2})
    with pytest.raises(UserError, match="tensor model.layers.0.mlp.up_proj.weight holds NaN"):
        hf_io.load_params(directory, CONFIG, shardings=where, quantize=kind)


def test_a_fingerprint_depends_on_every_kind_of_file(directory, tmp_path):
    seen = {hf_io.fingerprint(directory)}
    assert hf_io.fingerprint(str(directory)) in seen
    for name, byte in (("config.json", 3), (hf_io.SINGLE, 20), (hf_io.SINGLE, -1)):
        data = bytearray((directory / name).read_bytes())
        data[byte] ^= 1
        (directory / name).write_bytes(data)
        seen.add(hf_io.fingerprint(directory))
    (directory / "README.md").write_text("of no matter")
    assert len(seen | {hf_io.fingerprint(directory)}) == 4


def test_directory_without_readable_config(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        hf_io.load_config(tmp_path)
    for text, says in (("{", "config.json: expected JSON"), ("[]", "config.json: expected an object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=says):
            hf_io.load_config(tmp_path)


def test_resolve(tmp_path, monkeypatch):
    asked = {}

    def snapshot(name, **options):
        asked.update(options, name=name)
        if name == "some/absent":
            raise OSError("404 Client Error\nRepository Not Found")
        return str(tmp_path)

    monkeypatch.setattr(hf_io.huggingface_hub, "snapshot_download", snapshot)
    assert hf_io.resolve(tmp_path) == tmp_path and not asked
    assert hf_io.resolve("some/model") == tmp_path and asked["name"] == "some/model"
    with pytest.raises(UserError, match="^model 'some/absent' is neither .*: 404 Client Error$"):
        hf_io.resolve("some/absent")


def test_the_download_takes_no_code_and_no_second_copy():
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model-00001-of-00002.safetensors", hf_io.INDEX, "tokenizer.json", "tokenizer.model"]
    wanted += ["chat_template.jinja", "merges.txt"]
    left = ["pytorch_model.bin", "modeling_x.py", "tokenization_x.py", "consolidated.safetensors", "onnx/model.onnx"]
    left += ["original/consolidated.00.pth", "original/params.json", "README.md"]
    taken = filter_repo_objects(wanted + left, allow_patterns=hf_io._DOWNLOAD, ignore_patterns=hf_io._IGNORE)
    assert list(taken) == wanted


# Saving.


@pytest.mark.parametrize("case", ["default", "tied", "llama3"])
@pytest.mark.parametrize("max_shard_bytes", [5e9, 8_000, 1], ids=["single", "shards", "one-each"])
def test_round_trip(case, max_shard_bytes, tmp_path):
    config = CASES[case]
    params = hf_io.load_params(write_directory(tmp_path / "in", config), config)
    out = tmp_path / "deep" / "out"
    hf_io.save_params(params, config, out, max_shard_bytes=max_shard_bytes, extra={"eos_token_id": 2})
    assert hf_io.load_config(out) == config
    assert_trees_equal(hf_io.load_params(out, config), params)
    written = {}
    for file in out.glob("*.safetensors"):
        assert len(load_file(file)) == 1 or file.stat().st_size < max_shard_bytes + 4096
        written |= load_file(file)
    original = stored_weights(config)
    assert written.keys() == original.keys()
    assert all(np.array_equal(written[name], original[name]) for name in original)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 2
    if max_shard_bytes < 5e9:
        index = json.loads((out / hf_io.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in original.values())
        assert len(set(index["weight_map"].values())) == len(list(out.glob("*.safetensors"))) > 1
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # nothing temporary is left


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_round_trip(dtype, params, tmp_path):
    half = jax.tree.map(lambda x: x.astype(dtype), params)
    hf_io.save_params(params, CONFIG, tmp_path / "out", dtype=dtype)
    assert_trees_equal(hf_io.load_params(tmp_path / "out", CONFIG, dtype=dtype), half)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("max_shard_bytes", [5e9, 8_000], ids=["single", "shards"])
@pytest.mark.parametrize("dtype", ["stored", "float32"])
def test_a_bfloat16_model_comes_out_bit_for_bit(dtype, max_shard_bytes, tmp_path):
    original = half_weights()
    for value in original.values():  # subnormal numbers, and zeros of both signs
        value.reshape(-1)[:4] = np.array([0x0001, 0x807F, 0x8000, 0x0000], np.uint16).view(ml_dtypes.bfloat16)
    params = hf_io.load_params(write_directory(tmp_path / "in", CONFIG, original), CONFIG, dtype=dtype)
    hf_io.save_params(params, CONFIG, tmp_path / "out", dtype="bfloat16", max_shard_bytes=max_shard_bytes)
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == original.keys()
    for name, value in original.items():
        assert written[name].dtype == value.dtype
        np.testing.assert_array_equal(written[name].view(np.uint16), value.view(np.uint16), err_msg=name)


def test_metadata_names_the_format(params, tmp_path):
    hf_io.save_params(params, CONFIG, tmp_path / "out")
    with hf_io.safe_open(tmp_path / "out" / hf_io.SINGLE, "np") as file:
        assert file.metadata() == {"format": "pt"}
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [(1e5, "float16", "finite in float16"), (np.nan, "float32", "finite in float32"), (1.0, "int8", "dtype='int8'")],
)
def test_what_cannot_be_stored_leaves_the_old_directory_alone(value, dtype, words, directory, params):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    broken = {**params, "final_norm": {"scale": params["final_norm"]["scale"].at[3].set(value)}}
    with pytest.raises(UserError, match=words):
        hf_io.save_params(broken, CONFIG, directory, dtype=dtype)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert list(directory.parent.iterdir()) == [directory]


def test_a_tree_of_another_model_is_refused(params, tmp_path):
    for tree, name in (
        ({**params, "lora": {"a": jnp.ones(3)}}, "lora/a"),
        ({k: v for k, v in params.items() if k != "head"}, "head/kernel"),
        ({**params, "final_norm": {"scale": jnp.ones(7)}}, "final_norm/scale"),
    ):
        with pytest.raises(UserError, match=name):
            hf_io.save_params(tree, CONFIG, tmp_path / "out")
    assert list(tmp_path.glob("*out*")) == []


def test_only_a_model_directory_is_replaced(params, directory):
    (directory / "stale.txt").touch()
    hf_io.save_params(params, CONFIG, directory)
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", hf_io.SINGLE]
    (directory / "checkpoints").mkdir()
    with pytest.raises(UserError, match="more than an exported model"):
        hf_io.save_params(params, CONFIG, directory)
    run = directory.parent / "run"
    run.mkdir()
    (run / "config.json").write_text('{"seed": 0}')
    with pytest.raises(UserError, match="more than an exported model"):
        hf_io.save_params(params, CONFIG, run)
    assert (run / "config.json").exists() and (directory / "checkpoints").exists()


# Vocabulary.


@pytest.mark.parametrize("case", ["default", "tied"])
def test_new_rows_are_the_mean_of_the_old(case, tmp_path):
    config = CASES[case]
    params = hf_io.load_params(write_directory(tmp_path / "model", config), config)
    resized, bigger = hf_io.resize_embeddings(params, config, 53)
    assert bigger == dataclasses.replace(config, vocab_size=53)
    for group, name in [("embed", "embedding")] + ([] if config.tie_embeddings else [("head", "kernel")]):
        old, new = params[group][name], resized[group][name]
        np.testing.assert_array_equal(new[:50], old)
        np.testing.assert_allclose(new[50:], np.tile(np.asarray(old).mean(0), (3, 1)), atol=1e-6)
    assert logits(bigger, resized).shape == (2, 20, 53)
    np.testing.assert_allclose(logits(bigger, resized)[..., :50], logits(config, params), atol=1e-5)
    assert params["embed"]["embedding"].shape == (50, 24)
    back, same = hf_io.resize_embeddings(resized, bigger, 50, used=50)
    assert same == config
    assert_trees_equal(back, params)


def test_rows_in_use_are_never_cut_off(params):
    for used in (None, 49):
        with pytest.raises(UserError, match=f"vocab_size=48 .*{used or 50} are needed"):
            hf_io.resize_embeddings(params, CONFIG, 48, used=used)
    unchanged, config = hf_io.resize_embeddings(params, CONFIG, 50)
    assert unchanged is params and config is CONFIG


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **{case: torch_logits(config) for case, config in CASES.items()})
