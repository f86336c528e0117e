"""Every family of models against transformers: logits, packed log-probabilities, gradients and the way back.

A new family, or a variant of one, is a line in CASES and a run of tests/goldens/families/make.py. Where torch is not
installed the golden logits that it wrote stand for transformers, and the rest of the comparison is skipped.
"""

import copy
import functools
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import longer
from prefalign_jax.logps import preference_logps
from prefalign_jax.losses.dpo import dpo
from prefalign_jax.losses.ratios import batch_mean
from prefalign_jax.models import families, hf_io
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.types import PairLogps
from small import FULL, first, make_pairs, packed

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "families"
# Every case has these, in the names that all configs of transformers understand; a case adds to them or replaces them.
SMALL = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
IDS = {name: value for name, value in SMALL.items() if name.endswith("_token_id")}  # `export` adds them
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
LONGROPE = dict(
    rope_type="longrope", short_factor=[1.0, 1.1, 1.3, 2.0], long_factor=[1.5, 4.0, 9.0, 20.0], rope_theta=500.0
)
YARN = dict(rope_type="yarn", factor=8.0, beta_fast=4.0, beta_slow=1.0, original_max_position_embeddings=16)
GEMMA = dict(head_dim=12, query_pre_attn_scalar=16, sliding_window=5)
GEMMA3 = GEMMA | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"])
GRANITE = dict(embedding_multiplier=3.0, residual_multiplier=0.7, attention_multiplier=0.4, logits_scaling=0.6)
QWEN3_5 = dict(
    layer_types=["linear_attention", "linear_attention", "full_attention"],
    head_dim=16,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_num_value_heads=4,
    linear_value_head_dim=12,
    rms_norm_eps=0.03,  # heads that read next to nothing would magnify every rounding
)
# 'model_type' or 'model_type variant' -> arguments of its config.
CASES = {
    "llama": {},
    "llama llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}, "head_dim": 12},
    "llama dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}},
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen2 window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 12},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    # A limit that is often reached.
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5, "head_dim": 12}
    | {"rope_parameters": {**YARN, "truncate": False, "rope_theta": 500.0}, "swiglu_limit": 0.8},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 5},
    # Every text of these tests is within the original context, or every one is beyond it.
    "phi3 longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    "phi3 longrope long": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 2},
    "starcoder2": {"sliding_window": 5},
    "gpt2": {"n_inner": 40},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_neox sequential": {"rotary_pct": 0.25, "use_parallel_residual": False},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 32},
    "gemma": {"head_dim": 12},
    "gemma2": GEMMA | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0},
    "gemma3_text": GEMMA3,
    "olmo2": {},
    "olmo3": {
        "sliding_window": 5,
        "layer_types": GEMMA3["layer_types"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {**YARN, "rope_theta": 500.0},
        },
    },
}
CASES |= {
    "granite": GRANITE,
    "granitemoehybrid": GRANITE
    | {
        "num_local_experts": 0,
        "shared_intermediate_size": 40,
        "layer_types": ["full_attention"] * 3,
        "position_embedding_type": "rope",
        "attention_bias": True,
        "mamba_n_heads": 4,
    },
    "ministral": {"head_dim": 12, "sliding_window": 5, "layer_types": GEMMA3["layer_types"]},
    "ministral3": {
        "head_dim": 12,
        "rope_parameters": {
            **YARN,
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 7,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "seed_oss": {"head_dim": 12, "attention_out_bias": True},
    "exaone4": {"sliding_window": 5, "layer_types": GEMMA3["layer_types"]},
    "cohere2": {"sliding_window": 5, "layer_types": GEMMA3["layer_types"], "logit_scale": 0.8},
    "qwen3_5_text": QWEN3_5,
    "qwen3_5_text periods": QWEN3_5
    | {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2, "tie_word_embeddings": True},
    "glm": {"head_dim": 12, "attention_bias": False, "partial_rotary_factor": 1.0},
    "glm4": {"head_dim": 12, "partial_rotary_factor": 0.5},
}
# One of each way to store, turn, normalise and route; the others are compared with torch where --everything is.
CORE = ("llama llama3", "gemma2", "gpt_neox", "mixtral")
# What each of these has, another case has too.
REPEATED = ("llama biases", "glm", "granitemoehybrid", "ministral", "seed_oss", "olmo3", "exaone4", "qwen3_5_text")
WITH_TORCH = [case if case in CORE else longer(case) for case in CASES]
REWARDS = [case for case in CASES if families.FAMILIES[case.split()[0]].reward_architecture]
BETA = 0.5
LENGTHS = (24, 13, 6)
TOKENS = (np.arange(72, dtype=np.int32).reshape(3, 24) ** 2 * 7 + 5) % 58 + 3  # no special ids
REAL = np.arange(24) < np.array(LENGTHS)[:, None]
# One row of two segments with both branches and a token of padding.
SEGMENTS = np.repeat([1, 2, 0], [16, 7, 1]).astype(np.int32)
BRANCHES = np.repeat([0, 1, 2, 0, 1, 2, 0], [8, 4, 4, 2, 2, 3, 1]).astype(np.int32)
POSITIONS = np.array([*range(12), *range(8, 12), 0, 1, 2, 3, 2, 3, 4, 0], np.int32)


# What make.py uses as well.


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A value for every tensor, by its name and shape alone: no mapping to a wrong place or axis gives the same."""
    tensors = {}
    for name, shape in shapes.items():
        normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)  # numpy keeps this stream
        if len(shape) > 1:
            value = 1.5 * normal / shape[-1] ** 0.5
        else:
            value = 0.3 * normal + (0.0 if name.endswith("bias") else 1.0)
        tensors[name] = value.astype(np.float32)
    return tensors


def write_theirs(case: str, directory: pathlib.Path, kind: str = "CausalLM", **more) -> dict[str, tuple[int, ...]]:
    """A directory as transformers writes it, but for the values; gives the shapes of its tensors."""
    import transformers

    arguments = copy.deepcopy({**SMALL, **CASES[case], **more})  # transformers writes into the rotation's
    config = transformers.AutoConfig.for_model(case.split()[0], **arguments)
    getattr(transformers, f"AutoModelFor{kind}").from_config(config).save_pretrained(directory)
    shapes = {name: value.shape for name, value in sorted(load_file(directory / hf_io.SINGLE).items())}
    save_file(draw(shapes), directory / hf_io.SINGLE, metadata={"format": "pt"})
    return shapes


def load_theirs(directory: pathlib.Path, kind: str = "CausalLM"):
    """transformers' model; every tensor must find its place."""
    import torch
    import transformers

    model, info = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def their_logits(model) -> np.ndarray:
    """[tokens, V] of the ragged rows, padded on the right; of a reward model [rows, 1]."""
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(np.where(REAL, TOKENS, 0)).long(), attention_mask=torch.from_numpy(REAL * 1))
    return out.logits.numpy()[REAL] if out.logits.ndim == 3 else out.logits.numpy()


def golden_file(case: str) -> pathlib.Path:
    return GOLDENS / f"{case.replace(' ', '_')}.npz"


# Ours.


@functools.cache
def programs(config):
    """(hidden states and logits, loss with its gradient), each compiled once for a configuration."""
    model = make_decoder(config)

    def forward(params, tokens, segments, branches, positions):
        hidden = model.hidden(params, tokens, positions, segments, branches)
        logits = jnp.einsum("rld,vd->rlv", hidden, model.head(params))
        if model.softcap is not None and not config.reward:
            logits = model.softcap * jnp.tanh(logits / model.softcap)
        return hidden, logits

    def loss(params, batch, reference):
        policy = preference_logps(model, params, batch)
        return batch_mean(dpo(policy, reference, beta=BETA)[0], policy), policy

    # The tests wait for the compiler more than for anything else.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return tuple(jax.jit(f, compiler_options=quick) for f in (forward, jax.value_and_grad(loss, has_aux=True)))


def our_logits(config, params) -> np.ndarray:
    rows = [np.zeros((24, 24), np.int32) for _ in range(4)]  # the shape of the tests on isolation: compiled once
    for row, values in zip(rows, (TOKENS, REAL, np.zeros_like(TOKENS), np.arange(24)), strict=True):
        row[:3] = np.where(REAL, values, 0)
    return np.asarray(programs(config)[0](params, *rows)[1])[:3][REAL]


def close(ours, theirs, relative=1e-4) -> float:
    """The largest deviation as a share of the largest value, once it is found to be small."""
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=relative * scale)
    return float(np.abs(np.asarray(ours) - theirs).max() / scale)


# Without torch.


@pytest.fixture(scope="module", params=[longer(case) if case in REPEATED else case for case in CASES])
def golden(request, tmp_path_factory):
    """(config, parameters, transformers' logits)"""
    file = golden_file(request.param)
    assert file.exists(), f"{file.name} is missing: run tests/goldens/families/make.py"
    directory = tmp_path_factory.mktemp("golden")
    with np.load(file) as stored:
        kwargs, shapes = json.loads(str(stored["kwargs"])), json.loads(str(stored["shapes"]))
        assert kwargs == json.loads(json.dumps({**SMALL, **CASES[request.param]})), "run tests/goldens/families/make.py"
        np.testing.assert_array_equal(stored["tokens"], np.where(REAL, TOKENS, 0))
        logits = stored["logits"]
        (directory / "config.json").write_text(str(stored["config"]))
    save_file(draw({name: tuple(shape) for name, shape in shapes.items()}), directory / hf_io.SINGLE)
    config = hf_io.load_config(directory)
    assert config.family == request.param.split()[0]
    return config, hf_io.load_params(directory, config), logits


def test_every_family_is_compared():
    assert {case.split()[0] for case in CASES} == set(families.FAMILIES)
    assert {golden_file(case).name for case in CASES} == {file.name for file in GOLDENS.glob("*.npz")}


# What `record_property` keeps is what scripts/models_page.py makes docs/models.md of.


def test_logits_equal_the_golden_ones(golden):
    config, params, logits = golden
    assert logits.std() > 0.5  # or the comparison would see nothing
    close(our_logits(config, params), logits)


def reach(config) -> np.ndarray:
    """[24, 24] bool: which hidden state depends on which token, through all layers; by loops."""
    through = np.eye(24, dtype=bool)
    for window in config.windows or (0,) * config.num_layers:
        sees = np.zeros((24, 24), bool)
        for i in range(24):
            for j in range(i + 1):
                near = not window or POSITIONS[i] - POSITIONS[j] < window
                sees[i, j] = SEGMENTS[i] == SEGMENTS[j] and BRANCHES[j] in (0, BRANCHES[i]) and near
        through = (sees.astype(int) @ through.astype(int)) > 0
    return through


def test_a_token_changes_what_sees_it_and_nothing_else(golden):
    """Not what is before it, in another segment, on the sibling's branch, or beyond all windows."""
    config, params, _ = golden
    forward, _ = programs(config)
    rows = [np.tile(row, (24, 1)) for row in (TOKENS[0], SEGMENTS, BRANCHES, POSITIONS)]
    before, _ = forward(params, *rows)
    rows[0] = rows[0] + 7 * np.eye(24, dtype=np.int32)  # row t has another token at t
    rows[0] = np.where(rows[0] > 60, rows[0] - 50, rows[0])
    after, _ = forward(params, *rows)
    difference = np.abs(np.asarray(after) - np.asarray(before)).max(-1).T  # [hidden state, token]
    expected = reach(config)
    assert 24 < expected.sum() < 300
    assert difference[~expected].max() <= 1e-6 * np.abs(before).max()
    assert difference[expected].min() > 0


# With torch.


@pytest.fixture(scope="module", params=WITH_TORCH)
def pair(request, tmp_path_factory):
    """(transformers' model, config, parameters) of one directory."""
    pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp("theirs")
    write_theirs(request.param, directory)
    config = hf_io.load_config(directory)
    return load_theirs(directory), config, hf_io.load_params(directory, config)


@pytest.mark.parity
def test_logits_equal_transformers(pair, record_property):
    model, config, params = pair
    record_property("logits", close(our_logits(config, params), their_logits(model)))


def their_logps(model, pairs):
    """[3, B]: chosen, rejected and prompt, one sequence at a time."""
    import torch

    def alone(prompt, response):
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()
        logps = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        return logps[len(prompt) - 1 :].sum(), logps[: len(prompt) - 1].sum()

    chosen, rejected = ([alone(p.prompt, getattr(p, side)) for p in pairs] for side in ("chosen", "rejected"))
    columns = ([logps for logps, _ in chosen], [logps for logps, _ in rejected], [prompt for _, prompt in chosen])
    return torch.stack([torch.stack(column) for column in columns])


@pytest.mark.parity
def test_packed_rows_give_the_same_logps_and_gradients(pair, tmp_path, record_property):
    import torch

    model, config, params = pair
    pairs = make_pairs(5, seed=1)
    for one in pairs:
        for ids in (one.prompt, one.chosen, one.rejected):
            np.maximum(ids, 3, out=ids)  # torch's embedding may have no gradient at the padding's id
    theirs = their_logps(model, pairs)
    # Near the policy, or the sigmoid would be flat.
    reference = theirs[:2].detach() + torch.from_numpy(np.random.RandomState(0).standard_normal((2, 5)))
    ratios = theirs[:2] - reference
    their_loss = -torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1])).mean()
    model.zero_grad()
    their_loss.backward()

    batch = first(packed(pairs, layout=FULL))
    assert batch.segments.max() > 1 and set(batch.branches.flat) == {0, 1, 2}
    held = PairLogps(*reference.numpy().astype(np.float32), np.ones(5, np.float32), np.ones(5, np.float32))
    (our_loss, policy), grads = programs(config)[1](params, batch, held)
    logps = [policy.chosen, policy.rejected, policy.prompt]
    record_property("logps", close(logps, theirs.detach().numpy(), 2e-5))
    np.testing.assert_allclose(our_loss, their_loss.item(), rtol=1e-4)

    # Both gradients are written as if they were models, so that they are compared by the names of the tensors.
    hf_io.save_params(grads, config, tmp_path / "ours")
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(tmp_path / "theirs")
    model.load_state_dict(state)
    ours, theirs = (load_file(tmp_path / side / hf_io.SINGLE) for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(value).max() for value in theirs.values())
    worst = 0.0
    for name, value in theirs.items():
        # A bias of keys that are not rotated shifts all scores alike: its gradient is rounding alone.
        scale = max(np.abs(value).max(), 2e-3 * largest)
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-4 * scale, err_msg=name)
        worst = max(worst, float(np.abs(ours[name] - value).max() / scale))
    record_property("gradient", worst)
    assert sum(np.abs(value).max() < 1e-3 * largest for value in theirs.values()) <= config.num_layers


@pytest.mark.parity
def test_the_export_is_the_same_model(pair, tmp_path, record_property):
    model, config, params = pair
    hf_io.save_params(params, config, tmp_path / "out")
    assert hf_io.load_config(tmp_path / "out") == config
    again = hf_io.load_params(tmp_path / "out", config)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    record_property("export", close(their_logits(load_theirs(tmp_path / "out")), their_logits(model), 1e-6))


@pytest.mark.parity
@pytest.mark.parametrize("case", [case if case in CORE else longer(case) for case in REWARDS])
def test_a_reward_model_gives_the_same_rewards_and_comes_back(case, tmp_path, record_property):
    pytest.importorskip("torch")
    kind = "SequenceClassification"
    write_theirs(case, tmp_path / "in", kind, num_labels=1)
    rewards = their_logits(load_theirs(tmp_path / "in", kind))
    config = hf_io.load_config(tmp_path / "in")
    assert config.reward and rewards.std() > 0.1
    params = hf_io.load_params(tmp_path / "in", config)
    ends = np.cumsum(LENGTHS) - 1
    record_property("rewards", close(our_logits(config, params)[ends], rewards))
    hf_io.save_params(params, config, tmp_path / "out", extra=IDS)
    assert hf_io.load_config(tmp_path / "out") == config
    np.testing.assert_array_equal(their_logits(load_theirs(tmp_path / "out", kind)), rewards)
