import dataclasses
import json
import math

import pytest

from prefalign_jax.models import families
from prefalign_jax.models.decoder import DecoderConfig
from prefalign_jax.models.families import llama
from prefalign_jax.models.families.family import CONFIG_JSON
from prefalign_jax.models.loading import load_decoder
from prefalign_jax.models.rope import RopeScaling
from prefalign_jax.types import UserError

CONFIG = DecoderConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=5000.0,
    norm_eps=1e-4,
    max_position=64,
    init_std=0.1,
)
SCALINGS = (
    None,
    RopeScaling("linear", 2.0),
    RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16),
    RopeScaling("yarn", 4.0, original_max_position=16),
    RopeScaling("yarn", 4.0, original_max_position=16, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5),
    RopeScaling("yarn", 4.0, original_max_position=16, truncate=False),
    RopeScaling("dynamic", 2.0),
    RopeScaling("longrope", 4.0, original_max_position=16, short_factor=(1.0, 1.5, 2.0), long_factor=(3.0, 4.0, 5.0)),
)
MINIMAL = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


WITH_REWARDS = [name for name, known in families.FAMILIES.items() if known.reward_architecture]
# What a family's default config.json must say otherwise, or it is of a model with experts and Mamba.
DENSE = {"granitemoehybrid": {"num_local_experts": 0, "layer_types": ["full_attention"] * 32}}


def its_own(model_type: str) -> dict:
    """transformers' default config.json of a family."""
    fields = DENSE.get(model_type, {})
    return pytest.importorskip("transformers").AutoConfig.for_model(model_type, **fields).to_dict()


def round_trip(config: DecoderConfig) -> DecoderConfig:
    return DecoderConfig(**families.from_hf(json.loads(json.dumps(families.to_hf(config)))))


@pytest.mark.parametrize("model_type", llama.FAMILIES)
@pytest.mark.parametrize("reward", [False, True], ids=["language", "reward"])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.kind if s else "default")
def test_config_survives_the_round_trip(model_type, reward, scaling):
    constant = families.FAMILIES[model_type].constant
    config = dataclasses.replace(CONFIG, rope_scaling=scaling, tie_embeddings=True, reward=reward, **constant)
    config = dataclasses.replace(config, family=model_type)
    assert round_trip(config) == config


@pytest.mark.parametrize("model_type", families.FAMILIES)
@pytest.mark.parametrize("reward", [False, True], ids=["language", "reward"])
def test_every_field_of_a_familys_own_config_survives(model_type, reward):
    config = DecoderConfig(**families.from_hf(its_own(model_type)))
    assert (config.family, config.reward) == (model_type, False)
    assert round_trip(config) == config
    other = dict(vocab_size=50, intermediate_size=24, norm_eps=1e-4, init_std=0.1, max_position=2**18, reward=reward)
    other["tie_embeddings"] = not config.tie_embeddings
    if config.positions == "rope":
        other["rope_theta"] = 5000.0
    known = {*families.FAMILIES[model_type].fields, "reward", "rope_theta"}
    config = dataclasses.replace(config, **{name: value for name, value in other.items() if name in known})
    if reward and families.FAMILIES[model_type].reward_architecture is None:
        with pytest.raises(UserError, match=f"transformers has no reward model of model_type='{model_type}'; take"):
            families.to_hf(config)
        return
    assert round_trip(config) == config


def test_windows_and_layers_without_rotation_survive_the_round_trip():
    for changes in (
        dict(family="mistral", windows=(5, 5)),
        dict(family="qwen2", qkv_bias=True, windows=(0, 5)),
        dict(family="qwen3", qk_norm="head", windows=(5, 0)),
        dict(family="smollm3", rope_layers=(False, True), windows=(0, 5)),
        dict(family="olmo3", residual="post", qk_norm="width", windows=(0, 5), local_rope_theta=700.0),
        dict(family="llama", qkv_bias=True, output_bias=True),
        dict(family="llama", mlp_bias=True),
        dict(family="seed_oss", qkv_bias=True),
        dict(family="seed_oss", output_bias=True),
        dict(family="exaone4", residual="post", qk_norm="head"),
        dict(family="exaone4", residual="post", qk_norm="head", windows=(5, 0), rope_layers=(True, False)),
        dict(family="exaone4", residual="post", qk_norm="head", rope_layers=(False, False)),
        dict(family="granite", query_scale=0.3, embedding_scale=3.0, residual_scale=0.2, logit_divisor=7.0),
        dict(family="glm4", residual="sandwich", rope_interleaved=True, rope_fraction=1.0),
    ):
        config = dataclasses.replace(CONFIG, **changes)
        assert round_trip(config) == config


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_without_token_ids_of_its_own_a_model_has_none(model_type):
    """Those of the family's first model may lie beyond a smaller vocabulary."""
    transformers = pytest.importorskip("transformers")
    fields = {**families.from_hf(its_own(model_type)), "vocab_size": 61}
    read = transformers.AutoConfig.for_model(**families.to_hf(DecoderConfig(**fields)))
    ends = [151329, 151336, 151338] if model_type in ("glm", "glm4") else None  # as transformers reads null
    assert [getattr(read, f"{name}_token_id") for name in ("bos", "eos", "pad")] == [None, ends, None]


@pytest.mark.parametrize("dropped", [("rope_parameters",), ("rope_theta", "rope_scaling")], ids=["v4", "v5"])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.kind if s else "default")
def test_each_generation_of_transformers_finds_the_rope_in_its_own_fields(dropped, scaling):
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    hf = {name: value for name, value in families.to_hf(config).items() if name not in dropped}
    assert DecoderConfig(**families.from_hf(hf)) == config


def test_transformers_own_config_reads_what_we_write():
    transformers = pytest.importorskip("transformers")
    hf = families.to_hf(dataclasses.replace(CONFIG, rope_scaling=SCALINGS[2]))
    read = transformers.LlamaConfig(**hf)
    assert (read.head_dim, read.num_key_value_heads, read.rms_norm_eps) == (6, 2, 1e-4)
    assert read.rope_parameters == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 5000.0,
    }
    assert families.from_hf(read.to_dict()) == families.from_hf(hf)


@pytest.mark.parametrize("model_type", WITH_REWARDS)
def test_the_architecture_says_whether_it_is_a_reward_model(model_type):
    transformers = pytest.importorskip("transformers")
    hf = {name: value for name, value in its_own(model_type).items() if name not in ("id2label", "label2id")}
    fields = families.from_hf(hf)
    assert not fields["reward"]
    assert not families.from_hf({**hf, "architectures": None, "num_labels": 3})["reward"]
    language, reward = (families.to_hf(DecoderConfig(**{**fields, "reward": r})) for r in (False, True))
    assert [hf["architectures"][0].endswith("ForSequenceClassification") for hf in (language, reward)] == [False, True]
    assert "id2label" not in language
    read = transformers.AutoConfig.for_model(**reward)
    assert (read.num_labels, read.id2label, read.label2id) == (1, {0: "reward"}, {"reward": 0})
    for labels in ({}, {"num_labels": 1}, {"id2label": {"0": "LABEL_0"}}, {"id2label": None, "num_labels": None}):
        assert families.from_hf({**hf, "architectures": reward["architectures"], **labels})["reward"]


@pytest.mark.parity
@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_the_architectures_are_transformers_own(model_type):
    pytest.importorskip("torch")
    from transformers.models.auto import modeling_auto as auto

    known = families.FAMILIES[model_type]
    assert known.architecture == auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    assert known.reward_architecture == auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model_type)


@pytest.mark.parametrize("labels", [{"num_labels": 3}, {"id2label": {"0": "a", "1": "b", "2": "c"}}])
def test_a_classifier_of_several_labels_is_no_reward_model(labels):
    hf = {**MINIMAL, "architectures": ["LlamaForSequenceClassification"], **labels}
    with pytest.raises(UserError, match="^config.json: num_labels=3 is not supported; supported: 1, a reward model$"):
        families.from_hf(hf)


def test_silent_fields_take_the_familys_defaults():
    llama = families.from_hf(MINIMAL)
    assert (llama["num_kv_heads"], llama["head_dim"], llama["norm_eps"], llama["max_position"]) == (4, 4, 1e-6, 2048)
    assert (llama["rope_theta"], llama["rope_scaling"], llama["tie_embeddings"]) == (10000.0, None, False)
    mistral = {**MINIMAL, "model_type": "mistral", "num_attention_heads": 8, "sliding_window": None}
    assert families.from_hf(mistral)["num_kv_heads"] == 8


def test_older_spelling_of_the_rope_type():
    hf = {**MINIMAL, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    fields = families.from_hf(hf)
    assert (fields["rope_theta"], fields["rope_scaling"]) == (500.0, RopeScaling("linear", 2.0))


def test_rope_original_context_defaults_to_the_models():
    hf = {**MINIMAL, "max_position_embeddings": 128, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    assert families.from_hf(hf)["rope_scaling"].original_max_position == 128
    hf["original_max_position_embeddings"] = 32
    assert families.from_hf(hf)["rope_scaling"].original_max_position == 32


def test_yarns_two_scales_are_one_factor_of_attention():
    yarn = {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0}

    def factor(**more):
        return families.from_hf({**MINIMAL, "rope_scaling": {**yarn, **more}})["rope_scaling"].attention_factor

    assert factor() is factor(mscale_all_dim=0) is None  # which is 0.1 ln 8 + 1
    assert factor(mscale_all_dim=1.0) == 1.0
    assert factor(mscale_all_dim=0.5) == pytest.approx((0.1 * math.log(8) + 1) / (0.05 * math.log(8) + 1))
    assert factor(mscale_all_dim=0.5, attention_factor=1.5) == 1.5


def test_olmo_3_turns_its_layers_with_a_window_unscaled():
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
    hf = {**MINIMAL, "model_type": "olmo3", "num_hidden_layers": 5, "sliding_window": 8}
    older = DecoderConfig(**families.from_hf({**hf, "rope_theta": 700.0, "rope_scaling": yarn}))
    assert older.windows == (8, 8, 8, 0, 8)  # every fourth has none
    assert (older.rope_theta, older.local_rope_theta, older.rope_scaling.kind) == (700.0, 700.0, "yarn")
    assert round_trip(older) == older
    nested = {"full_attention": {**yarn, "rope_theta": 700.0}, "sliding_attention": {"rope_theta": 600.0}}
    newer = DecoderConfig(**families.from_hf({**hf, "rope_parameters": nested}))
    assert newer == dataclasses.replace(older, local_rope_theta=600.0)


def test_a_reward_model_that_transformers_lacks_is_refused_before_its_weights_are_read(tmp_path):
    config = dataclasses.replace(CONFIG, family="cohere2", logit_divisor=4.0)
    (tmp_path / "config.json").write_text(json.dumps(families.to_hf(config)))
    with pytest.raises(UserError, match="transformers has no reward model of model_type='cohere2'; take"):
        load_decoder(tmp_path, reward=True)


def test_granite_4_may_have_no_rotation():
    hf = {**MINIMAL, "model_type": "granitemoehybrid", "num_local_experts": 0, "layer_types": ["attention"] * 2}
    config = DecoderConfig(**families.from_hf({**hf, "position_embedding_type": "nope"}))
    assert config.rope_layers == (False, False) and round_trip(config) == config
    config = DecoderConfig(**families.from_hf({**hf, "position_embedding_type": "rope"}))
    assert config.rope_layers == () and round_trip(config) == config


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_phi3_calls_longrope_by_three_names_and_derives_its_factor_from_two_lengths(kind):
    factors = {"short_factor": [1.0, 2.0], "long_factor": [3, 4]}
    hf = {**MINIMAL, "model_type": "phi3", "max_position_embeddings": 128, "rope_scaling": {"type": kind, **factors}}
    scaling = RopeScaling("longrope", 8.0, original_max_position=16, short_factor=(1.0, 2.0), long_factor=(3.0, 4.0))
    config = DecoderConfig(**families.from_hf({**hf, "original_max_position_embeddings": 16}))
    assert config.rope_scaling == scaling and config.max_position == 128 and hash(config)
    assert families.from_hf(hf)["rope_scaling"].original_max_position == 4096  # as transformers reads silence
    written = families.to_hf(config)
    assert written["original_max_position_embeddings"] == 16
    assert written["rope_scaling"].keys() == {"type", *factors}  # transformers 4 refuses other fields
    given = dataclasses.replace(config, rope_scaling=dataclasses.replace(scaling, attention_factor=1.5))
    for one in (config, given, dataclasses.replace(config, rope_scaling=None)):
        assert round_trip(one) == one
        transformers = pytest.importorskip("transformers")
        read = transformers.Phi3Config(**families.to_hf(one)).to_dict()
        assert DecoderConfig(**families.from_hf(read)) == one
    with pytest.raises(UserError, match="rope_type='linear' is not supported; supported: default, longrope"):
        families.from_hf({**hf, "rope_scaling": {"type": "linear", "factor": 2.0}})


def test_a_sliding_window_counts_only_where_it_hides_something():
    mistral = {**MINIMAL, "model_type": "mistral", "num_key_value_heads": 4, "max_position_embeddings": 8192}
    for window in ({"sliding_window": None}, {"sliding_window": 8192}):
        assert families.from_hf({**mistral, **window})["windows"] == ()
    for window in ({"sliding_window": 4096}, {}):  # transformers reads silence as 4096
        assert families.from_hf({**mistral, **window})["windows"] == (4096, 4096)
    assert "windows" not in families.from_hf({**MINIMAL, "sliding_window": 4})  # Llama has none


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "smollm3"])
def test_which_layers_have_a_window(model_type):
    hf = {**MINIMAL, "model_type": model_type, "num_key_value_heads": 4, "num_hidden_layers": 4, "sliding_window": 8}

    def windows(**more):
        return DecoderConfig(**families.from_hf({**hf, **more})).windows

    assert windows() == windows(use_sliding_window=False, max_window_layers=0) == ()
    assert windows(use_sliding_window=True, max_window_layers=1) == (0, 8, 8, 8)
    assert windows(use_sliding_window=True, max_window_layers=0) == (8, 8, 8, 8)
    assert windows(use_sliding_window=True) == ()  # the first 28 have none
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    assert windows(use_sliding_window=True, max_window_layers=1, layer_types=kinds) == (8, 0, 8, 0)


def test_which_layers_rotate():
    hf = {**MINIMAL, "model_type": "smollm3", "num_key_value_heads": 4, "num_hidden_layers": 5}
    assert families.from_hf(hf)["rope_layers"] == (True, True, True, False, True)
    assert families.from_hf({**hf, "no_rope_layer_interval": 2})["rope_layers"] == (True, False, True, False, True)
    assert families.from_hf({**hf, "no_rope_layers": [0, 1, 1, 1, 1]})["rope_layers"] == (False, *[True] * 4)
    assert families.from_hf({**hf, "no_rope_layers": [1] * 5})["rope_layers"] == ()


def test_gpt_oss_reads_its_published_config_and_what_silence_means():
    hf = {**MINIMAL, "model_type": "gpt_oss", "num_attention_heads": 8}
    hf |= {"num_local_experts": 8, "quantization_config": {"quant_method": "mxfp4"}}
    config = DecoderConfig(**families.from_hf(hf))
    yarn = RopeScaling("yarn", 32.0, original_max_position=4096, beta_fast=32.0, beta_slow=1.0, truncate=False)
    assert (config.rope_scaling, config.rope_theta, config.windows) == (yarn, 150000.0, (128, 0))
    assert (config.num_kv_heads, config.head_dim, config.experts_per_token) == (8, 64, 4)
    assert config.sinks and config.mlp_bias and config.qkv_bias and config.output_bias
    assert (config.swiglu_limit, config.swiglu_alpha) == (7.0, 1.702)
    read = pytest.importorskip("transformers").GptOssConfig(**{k: v for k, v in hf.items() if k != "model_type"})
    assert DecoderConfig(**families.from_hf(read.to_dict())) == config
    unbiased = dataclasses.replace(config, qkv_bias=False, output_bias=False, windows=())
    for one in (config, unbiased):
        assert round_trip(one) == one
    with pytest.raises(UserError, match="quant_method='gptq' is not supported; supported: mxfp4, None"):
        families.from_hf({**hf, "quantization_config": {"quant_method": "gptq"}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, ("model_type='mamba'", "llama, mistral")),
        ({"model_type": None}, ("model_type=None", "llama, mistral")),
        ({"attention_bias": True, "model_type": "qwen3"}, ("attention_bias=True", "False")),
        ({"mlp_bias": True, "model_type": "smollm3"}, ("mlp_bias=True", "False")),
        ({"model_type": "granitemoehybrid"}, ("num_local_experts=8", "0, a dense model")),
        (
            {"model_type": "granitemoehybrid", "num_local_experts": 0, "layer_types": ["attention", "mamba"]},
            ("layer_types='mamba'", "attention in every layer, no Mamba"),
        ),
        ({"model_type": "granitemoehybrid", "num_local_experts": 0}, ("layer_types='mamba'",)),
        (
            {"model_type": "exaone4", "num_key_value_heads": 4, "sliding_window_pattern": "LLLG"},
            ("sliding_window_pattern='LLLG'", "a count, or layer_types"),
        ),
        ({"model_type": "gemma3_text", "sliding_window_pattern": "LLLG"}, ("sliding_window_pattern='LLLG'", "a count")),
        ({"model_type": "cohere2", "sliding_window": None}, ("sliding_window=None", "a number")),
        ({"model_type": "olmo3", "sliding_window": None}, ("sliding_window=None", "a number")),
        ({"hidden_act": "gelu"}, ("hidden_act='gelu'", "'silu'")),
        ({"quantization_config": {"bits": 4}}, ("quantization_config", "None")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quant_method='gptq'", "supported: None")),
        ({"quantization_config": {"quant_method": "mxfp4"}}, ("quant_method='mxfp4'", "supported: None")),
        ({"num_key_value_heads": 3}, ("num_key_value_heads=3", "divisor")),
        ({"head_dim": 5}, ("head_dim=5", "even")),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor=0.5", "1.0")),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, ("rope_scaling.rope_type='ntk'", "llama3, yarn")),
        ({"rope_parameters": {"rope_type": "axial"}}, ("rope_parameters.rope_type='axial'", "default, linear")),
        ({"rope_parameters": {"rope_type": "dynamic"}}, ("rope_parameters has no factor",)),
        (
            {"rope_parameters": {"rope_type": "longrope", "long_factor": [1, 2]}},
            ("rope_parameters has no short_factor",),
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1, 2], "long_factor": [1, 2, 3]}},
            ("rope_scaling.long_factor=[1, 2, 3]", "2 numbers, one for each frequency"),
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, ("rope_scaling has no factor",)),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ("low_freq_factor",)),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ("one for all layers",)),
        ({"vocab_size": None}, ("no vocab_size",)),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(change, words):
    with pytest.raises(UserError) as caught:
        families.from_hf({**MINIMAL, **change})
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message


def test_names_are_in_file_order_and_unique():
    names = [name for name, _, _ in families.weights(CONFIG)]
    assert len(names) == len(set(names)) == 3 + 9 * CONFIG.num_layers
    assert names[0] == "model.embed_tokens.weight" and names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert names.index("model.layers.0.mlp.down_proj.weight") < names.index("model.layers.1.input_layernorm.weight")
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    assert [name for name, _, _ in families.weights(tied)] == names[:-1]
    for config in (CONFIG, tied):
        reward = dataclasses.replace(config, reward=True)
        assert [name for name, _, _ in families.weights(reward)] == [*names[:-1], "score.weight"]


# Values of config.json that no model has.

WRONG = [5, -1, 0, 0.5, "5", [], {}, [1], ["a"], True, 10**30, 1e400, math.nan, 2**31 - 1, [5, "a"], {"type": 5}]
WRONG += [
    {"rope_type": kind, "factor": factor} for kind in ([], "yarn", "llama3", "longrope") for factor in ([], "8", -1)
]
NAMED = ["architectures", "hidden_size", "num_attention_heads", "num_key_value_heads", "rope_scaling", "rope_theta"]


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_whatever_a_field_holds_is_read_or_refused_in_one_line(model_type):
    known, config = families.FAMILIES[model_type], dataclasses.replace(CONFIG, num_experts=4)
    hf = json.loads(json.dumps(families.to_hf(dataclasses.replace(config, family=model_type))))
    names = {*hf, *known.fields.values(), *(name.removesuffix("?") for name in CONFIG_JSON), "quantization_config"}
    for field in sorted(names):
        for value in WRONG:
            try:
                hash(DecoderConfig(**families.from_hf({**hf, field: value})))
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 400, (field, value)


@pytest.mark.parametrize("field", NAMED)
def test_a_value_of_the_wrong_kind_is_named(field):
    for value in ("5", -1, {"a": [1]}):
        if field != "rope_scaling" or not isinstance(value, dict):
            with pytest.raises(UserError, match=f"config.json, field '{field}': expected .*, found"):
                families.from_hf({**MINIMAL, field: value})


@pytest.mark.parametrize("model_type", [[], 5, {}, None, "mamba"])
def test_a_model_type_that_is_none_is_refused(model_type):
    with pytest.raises(UserError, match="model_type=.* is not supported"):
        families.from_hf({**MINIMAL, "model_type": model_type})


def test_a_config_without_a_model_type_may_be_that_of_a_run():
    with pytest.raises(
        UserError, match="model_type=None is not supported; of a run name the directory WORKDIR/export; "
    ):
        families.family(None)
