"""PEFT's files: out, in, and what `peft` itself computes from them."""

import concurrent.futures
import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from conftest import longer
from prefalign_jax.limits import time_limit
from prefalign_jax.models import families, peft_io
from prefalign_jax.models.decoder import DecoderConfig, make_decoder
from prefalign_jax.models.hf_io import load_config, load_params
from prefalign_jax.models.lora import Lora, init_adapters, join, merge
from prefalign_jax.models.peft_io import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapters, save_adapters
from prefalign_jax.types import UserError
from small import CONFIG, DELTA, decoder, hidden_of
from test_families_parity import load_theirs, write_theirs

LORA = Lora(rank=4, alpha=8.0)
LORAS = {
    "all": LORA,
    "all, rank-stabilised": Lora(rank=3, alpha=4.0, rank_stabilised=True, dropout=0.1),
    "DoRA": Lora(rank=3, alpha=4.0, dora=True),
    "q and v, rank-stabilised": Lora(targets="layers/attention/[qv]", rank=2, alpha=2.0, rank_stabilised=True),
    "o": Lora(targets="layers/attention/o", rank=2, alpha=2.0),
}
# Families that store layers in every way: apart, head by head, one after the other, as [in, out].
FAMILIES = {
    "llama": {},
    "gpt_neox": {"num_kv_heads": 4},
    "phi3": {},
    "gpt2": {"num_kv_heads": 4, "positions": "learned"},
}


def shape_of(family, **more) -> DecoderConfig:
    constant = families.FAMILIES[family].constant
    return dataclasses.replace(CONFIG, family=family, **{**constant, **FAMILIES[family], **more})


def drawn(config, lora, params=None, seed=3):
    """Adapters whose B is not zero any more."""
    params = make_decoder(config).init(jax.random.key(seed)) if params is None else params
    rng = np.random.default_rng(seed)
    noise = lambda x: np.asarray(x + 0.1 * rng.normal(size=x.shape), np.float32)  # noqa: E731
    return jax.tree.map(noise, init_adapters(jax.random.key(seed), params, lora))


def edit(directory, **settings):
    file = directory / ADAPTER_CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "lora", [LORA, longer(LORAS["all, rank-stabilised"]), LORAS["DoRA"], *map(longer, [*LORAS.values()][3:])], ids=LORAS
)
def test_adapters_survive_their_files(family, lora, tmp_path):
    config = shape_of(family)
    adapters = drawn(config, lora)
    save_adapters(adapters, config, lora, tmp_path, base="x")
    assert {file.name for file in tmp_path.iterdir()} == {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    again, read = load_adapters(tmp_path, config)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), again, adapters)
    assert dataclasses.replace(read, targets=lora.targets) == lora
    base = make_decoder(config).init(jax.random.key(0))
    assert jax.tree.structure(init_adapters(jax.random.key(0), base, read)) == jax.tree.structure(adapters)


@pytest.mark.everything
def test_dora_of_layers_of_two_kinds_survives_its_files(tmp_path):
    """All layers of a kind have adapters, which are fewer than all layers."""
    constant = families.FAMILIES["qwen3_5_text"].constant
    config = dataclasses.replace(CONFIG, family="qwen3_5_text", **{**constant, **DELTA})
    adapters = drawn(config, LORAS["DoRA"])
    save_adapters(adapters, config, LORAS["DoRA"], tmp_path, base="x")
    again, _ = load_adapters(tmp_path, config)
    assert set(again["layers"]) == {"attention", "delta", "mlp"}
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), again, adapters)


def test_a_shared_tensors_adapter_is_the_sum_of_its_parts(tmp_path):
    """W + scale [Aq Av] blockdiag(Bq, Bv) by hand, in the order in which each family keeps q, k and v."""
    lora = LORAS["q and v, rank-stabilised"]
    for family, name in (
        ("gpt2", "transformer.h.1.attn.c_attn"),
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value"),
    ):
        config = shape_of(family)
        adapters = drawn(config, lora)
        save_adapters(adapters, config, lora, tmp_path, base="x")
        settings, tensors = json.loads((tmp_path / ADAPTER_CONFIG).read_text()), load_file(tmp_path / ADAPTER_WEIGHTS)
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        module = ".".join(name.split(".")[-2:])
        assert settings["r"] == 2 and settings["rank_pattern"] == {module: 4} and a.shape[0] == 4
        change = (settings["alpha_pattern"][module] / 2) * (b @ a).T  # alpha / sqrt(4)
        attention = adapters["layers"]["attention"]
        q, v = (lora.scale * attention[x]["lora_a"][1] @ attention[x]["lora_b"][1] for x in "qv")
        parts = [q, np.zeros_like(q), v]
        if family == "gpt_neox":
            parts = [part[:, 8 * head : 8 * head + 8] for head in range(4) for part in parts]
        np.testing.assert_allclose(change, np.concatenate(parts, axis=1), rtol=1e-5, atol=1e-6)
        assert settings["fan_in_fan_out"] == (family == "gpt2")


@pytest.mark.parametrize(
    ("family", "targets", "names"),
    [
        ("llama", "layers/attention/[qv]", ["q_proj", "v_proj"]),
        ("phi3", "layers/(attention/q|mlp/.*)", ["down_proj", "gate_up_proj", "qkv_proj"]),
        ("gpt2", "layers/attention/o", ["attn.c_proj"]),  # mlp.c_proj is another layer
        ("gpt2", "layers/(attention/o|mlp/down)", ["c_proj"]),
        ("gpt_neox", "layers/attention/o", ["dense"]),
    ],
)
def test_the_target_modules_are_those_with_an_adapter(family, targets, names, tmp_path):
    config, lora = shape_of(family), Lora(targets=targets, rank=2)
    save_adapters(drawn(config, lora), config, lora, tmp_path, base="x")
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["target_modules"] == names


def test_patterns_of_rank_and_alpha_are_folded_into_b(tmp_path):
    config = shape_of("llama")
    base = make_decoder(config).init(jax.random.key(0))
    adapters = drawn(config, LORA, base)
    save_adapters(adapters, config, LORA, tmp_path, base="x")
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    tensors[name.format("A")] = np.vstack([tensors[name.format("A")], np.ones((1, 16), np.float32)])
    tensors[name.format("B")] = np.hstack([tensors[name.format("B")], np.ones((32, 1), np.float32)])
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    edit(
        tmp_path, rank_pattern={r"layers\.1\.self_attn.q_proj": 5}, alpha_pattern={"q_proj": 3.0, "1.mlp.up_proj": 1.0}
    )
    again, lora = load_adapters(tmp_path, config)
    found, before = (merge(base, tree, one)["layers"] for tree, one in ((again, lora), (adapters, LORA)))
    changes = traverse_util.flatten_dict(jax.tree.map(np.subtract, found, before), sep="/")
    moved = {(path, n) for path, change in changes.items() for n in range(2) if np.abs(change[n]).max() > 1e-5}
    assert moved == {("attention/q/kernel", 0), ("attention/q/kernel", 1), ("mlp/up/kernel", 1)}
    a, b = (adapters["layers"]["attention"]["q"][x] for x in ("lora_a", "lora_b"))
    plain = base["layers"]["attention"]["q"]["kernel"]
    wanted = [plain[0] + 3 / 4 * a[0] @ b[0], plain[1] + 3 / 5 * (a[1] @ b[1] + np.ones((16, 32)))]
    np.testing.assert_allclose(found["attention"]["q"]["kernel"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_dora_needs_all_parts_of_a_shared_tensor(family, tmp_path):
    config, lora = shape_of(family), Lora(targets="layers/attention/[qv]", rank=2, dora=True)
    with pytest.raises(UserError, match="DoRA adapters of layers/attention/q .* without one of layers/attention/k"):
        save_adapters(drawn(config, lora), config, lora, tmp_path, base="x")


def test_with_dora_a_part_whose_b_is_zero_keeps_its_lengths(tmp_path):
    config, lora = shape_of("gpt_neox"), LORAS["DoRA"]
    base = make_decoder(config).init(jax.random.key(0))
    adapters = drawn(config, lora, base)
    adapters["layers"]["attention"]["k"]["lora_b"] = np.zeros((2, 3, 32), np.float32)
    save_adapters(adapters, config, lora, tmp_path, base="x")
    again, read = load_adapters(tmp_path, config)
    found, wanted = merge(base, again, read), merge(base, adapters, lora)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, wanted)


def test_fresh_adapters_of_a_shared_tensor_still_change_nothing(tmp_path):
    config = shape_of("gpt_neox")
    base = make_decoder(config).init(jax.random.key(0))
    save_adapters(init_adapters(jax.random.key(1), base, LORA), config, LORA, tmp_path, base="x")
    again, lora = load_adapters(tmp_path, config)
    assert again["layers"]["attention"]["q"]["lora_a"].shape[-1] == 3 * LORA.rank
    jax.tree.map(np.testing.assert_array_equal, merge(base, again, lora), base)


SCORED = dataclasses.replace(LORA, full=("score",))


def test_the_score_of_a_reward_model_travels_with_its_adapters(tmp_path):
    config = shape_of("llama", reward=True)
    adapters = drawn(config, SCORED)
    assert np.any(adapters["score"]["kernel"])
    save_adapters(adapters, config, SCORED, tmp_path, base="x")
    settings = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["score"])
    again, lora = load_adapters(tmp_path, config)
    np.testing.assert_array_equal(again["score"]["kernel"], adapters["score"]["kernel"])
    assert "score" not in lora.targets and lora.full == ("score",)
    with pytest.raises(UserError, match="score.weight has no place in a llama model"):
        load_adapters(tmp_path, dataclasses.replace(config, reward=False))


def whole_vocabulary(config) -> Lora:
    return dataclasses.replace(LORA, full=("embed",) if config.tie_embeddings else ("embed", "head"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_trained_in_full_survives_its_files(family, tied, tmp_path):
    config = shape_of(family, tie_embeddings=tied, vocab_padding=3)
    lora, plain = whole_vocabulary(config), dataclasses.replace(config, vocab_padding=0)
    adapters = drawn(config, lora)
    save_adapters(adapters, config, lora, tmp_path, base="x", quantized="nf4")
    again, read = load_adapters(tmp_path, plain)
    assert read.full == lora.full
    for name in lora.full:
        rows = jax.tree.map(lambda x: x[: plain.vocab_size], adapters[name])
        jax.tree.map(np.testing.assert_array_equal, again[name], rows)
    with safe_open(tmp_path / ADAPTER_WEIGHTS, "np") as file:
        assert file.metadata()["base_quantization"] == "nf4"
    with pytest.raises(UserError, match="it needs the tokenizer that the adapters were trained with"):
        load_adapters(tmp_path, dataclasses.replace(plain, vocab_size=plain.vocab_size - 1))


def test_a_tied_head_that_differs_is_refused(tmp_path):
    config = shape_of("llama", tie_embeddings=True)
    lora = whole_vocabulary(config)
    save_adapters(drawn(config, lora), config, lora, tmp_path, base="x")
    stored = load_file(tmp_path / ADAPTER_WEIGHTS)
    stored["base_model.model.lm_head.weight"] += 1
    save_file(stored, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match="lm_head.weight differs from the embedding"):
        load_adapters(tmp_path, config)


UP = "base_model.model.model.layers.1.mlp.up_proj."


@pytest.mark.parametrize(
    ("lora", "settings", "tensors", "says"),
    [
        (LORA, {"bias": "all"}, {}, "bias='all' is not supported; supported: 'none'"),
        (
            LORA,
            {"init_lora_weights": "pissa"},
            {},
            "init_lora_weights='pissa' is not supported; supported: True, False",
        ),
        (LORA, {"layer_replication": [[0, 2]]}, {}, "layer_replication=.* is not supported"),
        (LORA, {"r": 5}, {}, r"lora_A.weight has shape \(4, 16\) where \(5, 16\) is due"),
        (LORA, {"use_dora": True}, {}, "q_proj has no lora_magnitude_vector"),
        (LORA, {}, {f"{UP}lora_B.weight": None}, "layers.1.mlp.up_proj has no lora_B.weight"),
        (LORA, {}, {f"{UP}lora_magnitude_vector": np.ones(32)}, "up_proj has a lora_magnitude_vector"),
        (LORA, {}, {"base_model.model.lm_head.lora_A.weight": np.ones((4, 16))}, "lm_head.* has no place in a llama"),
        (
            LORAS["DoRA"],
            {},
            dict.fromkeys((f"{UP}lora_A.weight", f"{UP}lora_B.weight", f"{UP}lora_magnitude_vector")),
            "mlp.up_proj has DoRA adapters in 1 of 2 layers",
        ),
    ],
    ids=lambda x: next(iter(x), "") if isinstance(x, dict) else "",
)
def test_what_is_no_lora_of_this_model_is_refused_by_name(lora, settings, tensors, says, tmp_path):
    config = shape_of("llama")
    save_adapters(drawn(config, lora), config, lora, tmp_path, base="x")
    stored = load_file(tmp_path / ADAPTER_WEIGHTS) | tensors
    save_file({name: value for name, value in stored.items() if value is not None}, tmp_path / ADAPTER_WEIGHTS)
    edit(tmp_path, **settings)
    with pytest.raises(UserError, match=says):
        load_adapters(tmp_path, config)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": "4"}, "field 'r': expected a count, found '4'"),
        ({"r": -4}, "field 'r': expected a count, found -4"),
        ({"lora_alpha": []}, "field 'lora_alpha': expected a positive number"),
        ({"use_dora": 5}, "field 'use_dora': expected true or false"),
        ({"rank_pattern": ["q_proj"]}, "field 'rank_pattern': expected an object"),
        ({"rank_pattern": {"q_proj": "4"}}, "field 'rank_pattern', field 'q_proj': expected a count"),
        ({"alpha_pattern": {"q_proj": 0}}, "field 'alpha_pattern', field 'q_proj': expected a positive number"),
        ({"rank_pattern": {"(q_proj": 4}}, "rank_pattern, alpha_pattern: missing \\)"),
        ({"rank_pattern": {"(.*)*$z": 4}}, "rank_pattern, alpha_pattern: it takes more than 0.2 seconds"),
        (
            {"alpha_pattern": {r"(.|\w)(\w|.)" * 13 + "$z": 4.0}},
            "rank_pattern, alpha_pattern: it takes more than 0.2 s",
        ),
    ],
)
def test_settings_that_make_no_sense_or_have_no_end_are_one_line(settings, says, tmp_path, monkeypatch):
    monkeypatch.setattr(peft_io, "time_limit", functools.partial(time_limit, 0.2))
    config = shape_of("llama")
    save_adapters(drawn(config, LORA), config, LORA, tmp_path, base="x")
    edit(tmp_path, **settings)
    with pytest.raises(UserError, match=says) as told:
        load_adapters(tmp_path, config)
    assert "\n" not in str(told.value) and ADAPTER_CONFIG in str(told.value)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match="field|rank_pattern"):
        pool.submit(load_adapters, tmp_path, config).result(20)


def test_adapters_that_are_not_finite_are_refused_by_name(tmp_path):
    config = shape_of("llama")
    save_adapters(drawn(config, LORA), config, LORA, tmp_path, base="x")
    stored = load_file(tmp_path / ADAPTER_WEIGHTS)
    stored[f"{UP}lora_B.weight"][1, 2] = np.inf
    save_file(stored, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match="up_proj.lora_B.weight holds NaN or infinity"):
        load_adapters(tmp_path, config)


def test_a_layer_without_an_adapter_has_one_that_is_zero(tmp_path):
    config = shape_of("llama")
    adapters = drawn(config, LORA)
    save_adapters(adapters, config, LORA, tmp_path, base="x")
    stored = load_file(tmp_path / ADAPTER_WEIGHTS)
    save_file({name: x for name, x in stored.items() if not name.startswith(UP)}, tmp_path / ADAPTER_WEIGHTS)
    up = load_adapters(tmp_path, config)[0]["layers"]["mlp"]["up"]
    np.testing.assert_array_equal(up["lora_b"][0], adapters["layers"]["mlp"]["up"]["lora_b"][0])
    assert not up["lora_b"][1].any()


# With peft.

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 12))


def logits(config, base, adapters, lora):
    """[2, 12, V], of a reward model the reward at every token."""
    model, zeros = decoder(config, lora=lora), np.zeros_like(TOKENS)
    params = join(base, adapters)
    return hidden_of(model, params, TOKENS, np.tile(np.arange(12), (2, 1)), zeros + 1, zeros) @ model.head(params).T


def peft_logits(model) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


quiet = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # between peft and transformers


@quiet
@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        pytest.param(
            family, lora, marks=[pytest.mark.everything] * (number % len(LORAS) != place), id=f"{name}-{family}"
        )
        for number, family in enumerate(FAMILIES)
        for place, (name, lora) in enumerate(LORAS.items())
    ],
)
def test_peft_computes_the_same_from_our_adapters_and_we_from_its_own(family, lora, tmp_path):
    peft = pytest.importorskip("peft")
    write_theirs(family, tmp_path / "base")
    config = load_config(tmp_path / "base")
    base = load_params(tmp_path / "base", config)
    adapters = drawn(config, lora, base)
    save_adapters(adapters, config, lora, tmp_path / "ours", base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(load_theirs(tmp_path / "base"), tmp_path / "ours")
    wanted = peft_logits(theirs)
    ours = logits(config, base, adapters, lora)
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(wanted - np.asarray(logits(config, base, {}, None))).max() > 1e-2
    theirs.save_pretrained(tmp_path / "theirs")
    ours, saved = (load_file(tmp_path / side / ADAPTER_WEIGHTS) for side in ("ours", "theirs"))
    assert ours.keys() == saved.keys()  # no adapter is peft's alone
    np.testing.assert_allclose(
        logits(config, base, *load_adapters(tmp_path / "theirs", config)), wanted, rtol=1e-4, atol=1e-4
    )


@quiet
@pytest.mark.parity
@pytest.mark.parametrize(
    ("stabilised", "dora"),
    [(True, True)] + [longer(*more) for more in ((False, False), (False, True), (True, False))],
)
@pytest.mark.parametrize(
    ("family", "target"),
    [("gpt2", "c_attn"), ("gpt_neox", "query_key_value"), ("phi3", "qkv_proj"), ("llama", "q_proj")],
)
def test_an_adapter_made_by_peft_on_a_shared_tensor_computes_the_same(family, target, stabilised, dora, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    write_theirs(family, tmp_path / "base")
    made = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=[target],
        use_rslora=stabilised,
        use_dora=dora,
        fan_in_fan_out=family == "gpt2",
        rank_pattern={rf"1\..*{target}": 2},
        alpha_pattern={rf"2\..*{target}": 7},
        lora_dropout=0.25,
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(load_theirs(tmp_path / "base"), made)
    for name, value in theirs.named_parameters():
        if "lora" in name:
            value.data += 0.1 * torch.randn_like(value)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = peft_logits(theirs)
    config = load_config(tmp_path / "base")
    base = load_params(tmp_path / "base", config)
    adapters, lora = load_adapters(tmp_path / "theirs", config)
    assert lora.dropout == 0.25 and set(adapters["layers"]) == {"attention"}
    np.testing.assert_allclose(logits(config, base, adapters, lora), wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(wanted - np.asarray(logits(config, base, {}, None))).max() > 1e-2
    # And back, with the ranks that it now has.
    save_adapters(adapters, config, lora, tmp_path / "ours", base=str(tmp_path / "base"))
    again = peft.PeftModel.from_pretrained(load_theirs(tmp_path / "base"), tmp_path / "ours")
    np.testing.assert_allclose(peft_logits(again), wanted, rtol=1e-4, atol=1e-4)


@quiet
@pytest.mark.parity
def test_peft_gives_the_same_rewards(tmp_path):
    peft = pytest.importorskip("peft")
    kind = "SequenceClassification"
    write_theirs("llama", tmp_path / "base", kind, num_labels=1)
    config = load_config(tmp_path / "base")
    base = load_params(tmp_path / "base", config)
    adapters = drawn(config, SCORED, base)
    save_adapters(adapters, config, SCORED, tmp_path / "ours", base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(load_theirs(tmp_path / "base", kind), tmp_path / "ours")
    wanted = peft_logits(theirs)
    np.testing.assert_allclose(logits(config, base, adapters, SCORED)[:, -1], wanted, rtol=1e-4, atol=1e-4)
    plain = join(base, {"score": adapters["score"]})
    assert np.abs(wanted - np.asarray(logits(config, plain, {}, None))[:, -1]).max() > 1e-2
    theirs.save_pretrained(tmp_path / "theirs")
    again = logits(config, base, *load_adapters(tmp_path / "theirs", config))
    np.testing.assert_allclose(again[:, -1], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # peft's about tied weights
@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False])
def test_peft_computes_the_same_with_an_embedding_trained_in_full(tied, tmp_path):
    peft = pytest.importorskip("peft")
    write_theirs("llama", tmp_path / "base", tie_word_embeddings=tied)
    config = load_config(tmp_path / "base")
    assert config.tie_embeddings == tied
    base, lora = load_params(tmp_path / "base", config), whole_vocabulary(config)
    adapters = drawn(config, lora, base)
    save_adapters(adapters, config, lora, tmp_path / "ours", base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(load_theirs(tmp_path / "base"), tmp_path / "ours")
    wanted = peft_logits(theirs)
    np.testing.assert_allclose(logits(config, base, adapters, lora), wanted, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again, read = load_adapters(tmp_path / "theirs", config)
    assert read.full == lora.full
    np.testing.assert_allclose(logits(config, base, again, read), wanted, rtol=1e-4, atol=1e-4)
