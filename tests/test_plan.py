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
from prefalign_jax.cost.plan import CHIPS, SHAPES, advice, blank_state, held_of, plan, report, seconds, shape_of
from prefalign_jax.data.pipeline import batch_of, make_pair_set
from prefalign_jax.experiment import read
from prefalign_jax.models.decoder import make_decoder
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


@pytest.mark.parametrize(("name", "billions"), [("llama-3-8b", 8.03), ("llama-3-70b", 70.55), ("mistral-7b", 7.24)])
def test_named_shapes_have_the_size_of_their_model(name, billions):
    params = jax.eval_shape(make_decoder(shape_of(name)).init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) / 1e9 == pytest.approx(billions, abs=0.01)
    assert name in SHAPES


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
