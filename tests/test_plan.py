"""A plan against what then runs: the memory of a step, and what the shapes and chips that it knows say."""

import pathlib

import jax
import numpy as np
import optax
import pytest

from prefalign_jax import commands
from prefalign_jax.assemble import decoder_of, optimizer_of, step_of
from prefalign_jax.config import defaults
from prefalign_jax.cost import plan as module
from prefalign_jax.cost.plan import (
    CHIPS,
    SHAPES,
    advice,
    blank_state,
    days,
    held_of,
    plan,
    report,
    seconds,
    shape_of,
    step_time,
    table,
)
from prefalign_jax.data.pipeline import batch_of, make_pair_set
from prefalign_jax.experiment import read
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.families import FAMILIES
from prefalign_jax.models.lora import Lora
from prefalign_jax.sharding import born, make_mesh, packing_of, place_batch, state_shardings
from prefalign_jax.train_step import init_state
from prefalign_jax.types import Pair, UserError
from small import CONFIG

ROOT = pathlib.Path(__file__).parents[1]
MESH = make_mesh({"fsdp": 4, "tensor": 2})


@pytest.fixture(scope="module")
def config():
    c = defaults("dpo")
    c.batch_size, c.max_length, c.vocabulary_chunk = 32, 512, 32
    return c


@pytest.fixture(scope="module")
def found(config):
    return plan(config, CONFIG, MESH, prompt=80, response=60)


def test_the_memory_is_what_the_step_then_takes(config, found):
    """Of ragged pairs, of these lengths on average."""
    experiment = read(config, complete=False)
    model = decoder_of(config, CONFIG, MESH)
    optimizer, step = step_of(experiment, model, MESH, lambda step: 1e-3)
    params, reference = (born(MESH, model.init, jax.random.key(seed)) for seed in (0, 1))
    state = init_state(params, optimizer, MESH, reference, experiment.loss.running)
    rng = np.random.default_rng(0)
    ids = lambda mean: np.ones(rng.integers(mean - 20, mean + 21), np.int32)  # noqa: E731
    pairs = [Pair(ids(80), ids(60), ids(60)) for _ in range(config.batch_size)]
    data = make_pair_set(pairs, config.batch_size, layout=experiment.layout, **packing_of(MESH))
    batch = place_batch(MESH, batch_of(data, np.arange(config.batch_size)))

    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state, batch)))
    assert sum(found.memory[name] for name in ("parameters", "reference", "optimizer", "batch")) == pytest.approx(
        held, rel=0.1
    )
    analysis = step.lower(state, batch).compile().memory_analysis()
    total = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    total += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    assert found.total == pytest.approx(total, rel=0.1)
    assert min(found.memory.values()) > 0


def test_the_parts_have_closed_forms(found):
    params = jax.eval_shape(make_decoder(CONFIG).init, jax.random.key(0))
    kernels = sum(x.size for x in jax.tree.leaves(params["layers"]) if x.ndim == 3) / 8  # over all eight
    tables = sum(x.size for x in jax.tree.leaves((params["embed"], params["head"]))) / 4  # 61 rows: not over tensor
    scales = sum(x.size for x in jax.tree.leaves(params) if x.ndim < 3) - 4 * tables
    assert found.memory["parameters"] == 4 * (kernels + tables + scales)
    assert found.memory["reference"] == found.memory["parameters"] == found.memory["gradients"]
    assert found.memory["optimizer"] == pytest.approx(2 * found.memory["parameters"], rel=0.01)
    assert found.tokens == 32 * (80 + 2 * 60)


@pytest.mark.parametrize(
    ("name", "of_matrices", "of_others"),
    [
        ("adamw", 2, 2),
        ("rmsprop", 1, 1),
        ("lion", 1, 1),
        ("muon", 1, 2),
        ("schedule_free_adamw", 2, 2),
        ("adafactor", 0, 1),
    ],
)
def test_the_state_of_every_optimizer_and_an_average_are_counted(name, of_matrices, of_others, config):
    """Copies of the layers' matrices, and of the rest; Adafactor keeps two vectors of a matrix."""
    fields = config.copy_and_resolve_references()
    fields.optimizer.name, fields.ema.decay = name, None if name.startswith("schedule") else 0.999
    fields.schedule = "constant"
    if name == "adafactor":
        fields.optimizer.factor_from = 8
    experiment = read(fields, complete=False)
    optimizer = optimizer_of(experiment, lambda step: 1e-3)
    state = blank_state(experiment, CONFIG, optimizer, None)
    held = held_of(state, state_shardings(MESH, state))
    shardings = state_shardings(MESH, state).params
    sizes = jax.tree.map(lambda x, s: 4 * int(np.prod(s.shard_shape(x.shape))), state.params, shardings)
    pairs = zip(jax.tree.leaves(sizes["layers"]), jax.tree.leaves(state.params["layers"]), strict=True)
    matrices = sum(size for size, x in pairs if x.ndim > 2)
    everything = sum(jax.tree.leaves(sizes))
    if name == "adafactor":
        assert held["optimizer"] < 0.4 * everything  # matrices of 16 x 32 are small beside their norms
    else:
        wanted = of_matrices * matrices + of_others * (everything - matrices)
        assert held["optimizer"] == pytest.approx(wanted, abs=64)
    assert held.get("average") == (None if name.startswith("schedule") else everything)


# How many parameters the models' pages count.
COUNTED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "mistral-7b": 7_241_732_096,
    "mistral-nemo-12b": 12_247_782_400,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936,
    "phi-2": 2_779_683_840,
    "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080,
    "phi-4": 14_659_507_200,
    "starcoder2-3b": 3_030_371_328,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
# One for each place of a field: ties, widths of heads, experts, norms, biases, padding, learned positions.
CORE = {"smollm2-360m", "qwen2.5-7b", "gpt-oss-20b", "gemma-2-27b", "olmo-2-32b", "phi-2", "opt-125m", "gpt2"}


@pytest.mark.parametrize("name", [n if n in CORE else pytest.param(n, marks=pytest.mark.everything) for n in COUNTED])
def test_a_named_shape_has_the_published_number_of_parameters(name):
    params = jax.eval_shape(make_decoder(shape_of(name)).init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == COUNTED[name]


def test_every_family_has_a_named_shape():
    assert {shape["model_type"] for shape in SHAPES.values()} == set(FAMILIES)
    assert COUNTED.keys() <= SHAPES.keys()


def test_what_does_not_fit_says_what_to_change_and_the_report_says_all(found, config, monkeypatch):
    text = report(found, config, "h200")
    assert "It fits." in text and "fsdp 4 x tensor 2" in text and "all-gather, in a host" in text
    assert advice(found, config, CHIPS["h200"]) == []
    computing, sending = seconds(found, CHIPS["h200"])
    assert computing > 0 and sending > 0
    weights = dict(parameters=10, reference=10, optimizer=20, gradients=10, activations=30, temporaries=20)
    large = found._replace(memory={name: round(size * 1e9) for name, size in weights.items()})
    small = CHIPS["h200"]._replace(memory=50e9, host=4)
    monkeypatch.setitem(module.CHIPS, "small", small)
    text = report(large, config, "small")
    assert "by 54.0 GB" in text and "--config.reference.kind=cached: 90.0 GB a device" in text
    assert "It does not fit" in text and "between hosts" in text
    for change in ("remat=full", "micro_steps=2", "reference.kind=cached", "param_dtype=bfloat16", "lora.rank=16"):
        assert change in text
    assert seconds(found, small)[1] > sending  # the network is slower


def test_rates_and_days_follow_from_the_time_of_a_step(found, config, monkeypatch):
    """At 32 pairs and 6400 tokens a step; one epoch of 3200 pairs is 100 steps."""
    slow = CHIPS["h200"]._replace(flops=1e6, link=1e5)
    computing, sending = seconds(found, slow)
    assert step_time(found, slow) == (max(computing, sending), computing + sending)
    steps, took = days(found, config, slow, 3200)
    assert steps == 100 and took.apart == pytest.approx(100 * (computing + sending) / 86400)
    monkeypatch.setitem(module.CHIPS, "slow", slow)
    text = report(found, config, "slow", 3200)
    rates = [f"{32 / (computing + sending):.1f}", f"{6400 / (computing + sending):,.0f}"]
    assert text.split("do not")[1].split()[1:3] == rates and "3,200 pairs, 100 steps" in text
    both = table([found, found._replace(mesh={"fsdp": 8}, traffic=[])], config, "slow", 3200)
    first, second = (line.split() for line in both.splitlines()[-2:])
    assert first[:3] == ["fsdp", "4", "x"] and second[:2] == ["fsdp", "8"]
    assert float(first[-1]) == pytest.approx(100 * (computing + sending) / 86400, rel=0.01)
    assert float(second[-1]) == pytest.approx(100 * computing / 86400, rel=0.01)


def test_adapters_are_planned_with_their_base_as_the_reference(config):
    adapted = config.copy_and_resolve_references()
    adapted.lora.rank, adapted.dtype = 4, "bfloat16"
    state = blank_state(read(adapted, complete=False), CONFIG, optax.adamw(1e-3), Lora(rank=4))
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.params)} == {"lora_a", "lora_b"}
    kernel = state.reference["layers"]["attention"]["q"]["kernel"]
    assert (kernel.shape, kernel.dtype) == ((2, 16, 32), "bfloat16")
    assert len(jax.tree.leaves(state.opt_state)) == 1 + 2 * len(jax.tree.leaves(state.params))


def test_every_chip_has_a_source():
    for name, chip in CHIPS.items():
        assert chip.source and 1e9 < chip.network < chip.link < chip.flops, name


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--devices=8 --device=h300", "device='h300' is unknown; did you mean"),
        ("--devices=0 --device=h200", "--devices=0 must be at least 1"),
        ("--device=h200", "--devices"),
        ("--devices=8 --device=h200", "no experiment given"),
        ("--devices=8 --device=h200 --mesh=fsdp", "write AXIS=N with commas"),
        ("--devices=8 --device=h200 --pairs=0", "--pairs=0 must be at least 1"),
        ("--devices=8 --device=h200 --model=llama-3-80b", "did you mean 'llama-3-8b'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words, says, capsys):
    assert commands.main(["plan", *words.split()]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_what_a_plan_does_not_read_is_refused(config):
    other = config.copy_and_resolve_references()
    other.lora.path = "adapters"
    with pytest.raises(UserError, match="lora.path='adapters' is not read"):
        plan(other, CONFIG, MESH, prompt=8, response=8)
