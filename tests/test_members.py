"""Several runs in one program: each member is what it is alone, in its own order, and knows nothing of the others."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import longer
from prefalign_jax.assemble import step_of
from prefalign_jax.config import defaults
from prefalign_jax.data.pipeline import alike, batches_of, make_pair_set, mismatched, train_batches, train_order
from prefalign_jax.experiment import read
from prefalign_jax.losses import LOSSES, make_loss
from prefalign_jax.members import loss_numbers, make_program, numbers_of, shared_fields
from prefalign_jax.models.dropout import Dropout
from prefalign_jax.models.lora import Lora, init_adapters
from prefalign_jax.sharding import make_mesh, place_batch
from prefalign_jax.train_step import init_state
from prefalign_jax.types import PairLogps, Responses, Sides
from small import CONFIG, decoder, make_pairs, make_params

STEPS = 30
MESH = make_mesh({"data": 1}, jax.devices()[:1])
LORA = Lora(rank=2, alpha=4.0)
SHAPE = dataclasses.replace(CONFIG, init_std=0.1)
MODEL, ADAPTED = decoder(SHAPE), decoder(SHAPE, lora=LORA)
# Of each loss two points that differ in all that may differ.
POINTS = [
    {"seed": 0, "learning_rate": 1e-3, "warmup_steps": 0},
    {"seed": 1, "learning_rate": 5e-4, "warmup_steps": 7, "optimizer.weight_decay": 0.1},
]
STRENGTHS = {
    "dpo": {"loss.beta": (0.1, 0.5), "loss.label_smoothing": (0.0, 0.1)},
    "orpo": {"loss.lam": (0.1, 1.0)},
    "kto": {"loss.beta": (0.1, 0.5), "loss.desirable_weight": (1.0, 2.0)},
    "simpo": {"loss.beta": (2.0, 10.0), "loss.gamma": (0.5, 1.0)},
    "bco": {"loss.beta": (0.1, 0.5)},  # which carries something from step to step
}


DROPOUT = {"model.dropout": (0.0, 0.3), "model.attention_dropout": (0.1, 0.0)}


def experiments_of(loss, points=2, differing=types.MappingProxyType({}), **fields):
    made = []
    for number in range(points):
        c = defaults(loss)
        c.steps, c.batch_size, c.schedule = STEPS, 4, "cosine"
        own = {name: values[number] for name, values in {**STRENGTHS[loss], **differing}.items()}
        c.update_from_flattened_dict({**POINTS[number], **own, **fields})
        made.append(read(c, complete=False))
    return made


def pairs_of(loss):
    pairs = make_pairs(22, seed=3, longest=20)
    if "label" not in loss.needs:
        return pairs
    return mismatched([dataclasses.replace(pair, label=number % 3 > 0) for number, pair in enumerate(pairs)], 200)


def began(experiment, data, model, mesh):
    """A state at the first step; adapters are drawn by the experiment's seed."""
    optimizer, step = step_of(experiment, model, mesh, experiment.learning_rate(len(data.pairs)))
    params, reference = make_params(0, MODEL), make_params(1, MODEL) if "reference" in experiment.loss.needs else None
    if model.join:
        params, reference = init_adapters(jax.random.key(experiment.config.seed), params, LORA), params
    return step, init_state(
        params, optimizer, mesh, reference, experiment.loss.running, model.rules, experiment.averaged
    )


def order_of(experiment):
    return dict(seed=experiment.config.seed, shuffle=True, stop=STEPS)


def alone(experiment, data, model, mesh, batches):
    """(metrics of every step, the last parameters) of a run by itself, and which pairs it saw."""
    step, state = began(experiment, data, model, mesh)
    rows, seen = [], []
    for batch in batches:
        seen.append(batch.index)
        state, metrics = step(state, place_batch(mesh, batch))
        rows.append(jax.device_get(metrics))
    return rows, seen, jax.device_get(state.params)


def together(experiments, data, model, mesh, steps=STEPS):
    count = len(data.pairs)
    states = [began(experiment, data, model, mesh)[1] for experiment in experiments]
    numbers = numbers_of(experiments, [count] * len(experiments))
    seeds = [one.config.seed for one in experiments]
    streams = list(dict.fromkeys(seeds))
    stream_of = [streams.index(seed) for seed in seeds]
    program = make_program(experiments, numbers, model, mesh, states[0], stream_of)
    state = program.empty(states[0].reference)
    for k, one in enumerate(states):
        state = program.put(state, k, one)
    firsts = [experiments[seeds.index(seed)] for seed in streams]
    sets, orders = alike([data] * len(firsts)), [train_order(data, **order_of(one)) for one in firsts]
    rows, seen = [], []
    for n in range(steps):
        batch = batches_of(sets, [order(n) for order in orders])
        seen.append(batch.index[stream_of])
        state, metrics = program.step(state, program.place(batch))
        rows.append(jax.device_get(metrics))
    return rows, seen, [jax.device_get(program.take(state, k).params) for k in range(len(experiments))]


def set_of(experiment, model):
    options = dict(layout=experiment.layout, attends=model.attends)
    return make_pair_set(pairs_of(experiment.loss), 4, **options)


@pytest.mark.everything  # tests/test_together.py compares whole runs
@pytest.mark.parametrize(
    "name",
    [
        "dpo",
        "kto",
        "orpo",
        "simpo",
        "bco",
        "dpo with adapters",
        "dpo with dropout",
        "dpo by muon",
        "dpo in one order",
        "kto in one order",
    ],
)
def test_a_member_is_the_run_that_it_is_alone(name):
    loss, _, adapted = name.partition(" ")
    model, dropping = ADAPTED if adapted == "with adapters" else MODEL, adapted == "with dropout"
    fields = {"seed": 0} if adapted == "in one order" else {}
    if adapted == "by muon":  # whose weight decay differs, with a moving average and a warm-up as a ratio
        fields = {"optimizer.name": "muon", "ema.decay": 0.9, "warmup_steps": 0, "warmup_ratio": 0.25}
    experiments = experiments_of(loss, differing=DROPOUT if dropping else {}, **fields)
    data = set_of(experiments[0], model)
    assert len(data.shapes) > 1
    if name not in ("dpo", "dpo with adapters"):  # these have batches of several shapes, the others one program
        data = data._replace(shapes=data.shapes[-1:])
    rows, seen, params = together(experiments, data, model, MESH)
    for k, experiment in enumerate(experiments):
        batches = list(train_batches(data, **order_of(experiment), start=0))
        fields = experiment.config.model
        own = model.dropping(Dropout(fields.dropout, fields.attention_dropout)) if dropping else model
        wanted, theirs, last = alone(experiment, data, own, MESH, batches)
        np.testing.assert_array_equal([index[k] for index in seen], theirs)
        for name in wanted[0]:
            got = [row[name][k] for row in rows]
            # Differences of log-probabilities of many tokens are rounded accordingly.
            bar = dict(rtol=1e-5) if name in ("loss", "grad_norm", "learning_rate") else dict(rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(got, [row[name] for row in wanted], **bar, err_msg=name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), params[k], last)
    one, other = np.transpose([row["loss"] for row in rows])
    assert not np.allclose(one, other, rtol=1e-3)


@pytest.mark.everything
def test_a_member_that_diverges_changes_no_other():
    experiments = experiments_of("dpo")
    data = set_of(experiments[0], MODEL)
    sound, _, params = together(experiments, data, MODEL, MESH, steps=3)
    broken = [experiments[0], read_with(experiments[1], learning_rate=1e38, warmup_steps=0)]
    rows, _, others = together(broken, data, MODEL, MESH, steps=3)
    assert not np.isfinite(rows[-1]["loss"][1])
    for one, other in zip(rows, sound, strict=True):
        assert one["loss"][0] == other["loss"][0] and one["grad_norm"][0] == other["grad_norm"][0]
    jax.tree.map(np.testing.assert_array_equal, others[0], params[0])


def read_with(experiment, **fields):
    c = defaults(experiment.loss.name)
    c.update({**experiment.config.to_dict(), "epochs": None, **fields})
    return read(c, complete=False)


@pytest.mark.parametrize("name", [name if name in STRENGTHS else longer(name) for name in LOSSES if loss_numbers(name)])
def test_what_may_differ_may_be_traced(name):
    """Every number of every loss: the loss of a number that is not known yet is that of the number."""
    x = jnp.array([-3.0, -5.0, -4.0])
    sides, ones = Sides(x, x - 1), jnp.ones(3)
    group = Responses(jnp.stack([x, x - 1], 1), jnp.full((3, 2), 4.0), jnp.array([[2.0, 1.0]] * 3), jnp.ones((3, 2)))
    fields = dict(prompt=x, prompt_tokens=4 * ones, mean_tokens=jnp.array([4.0, 4.0]), weight=ones, margin=ones)
    fields |= dict(label=jnp.array([1.0, 0.0, 1.0]), responses=group, after=sides, text=x, text_tokens=3 * ones)
    fields |= {key: sides for key in ("shared", "sampled", "token_kl", "sum_squares")}
    policy = PairLogps(x, x - 1, 4 * ones, 5 * ones, **fields)
    loss = make_loss(name)
    policy = policy._replace(running=loss.running or None)
    frozen = policy._replace(chosen=x - 0.5, rejected=x - 0.7) if "reference" in loss.needs else None
    values = {key: jnp.float32(loss.hyper[key]) for key in loss_numbers(name)}

    def losses(values):
        bound = make_loss(name, **values)
        running = dict(bound.advance(policy, frozen)) if bound.running else None
        return bound(policy._replace(running=running), frozen)[0]

    running = dict(loss.advance(policy, frozen)) if loss.running else None
    wanted = loss(policy._replace(running=running), frozen)[0]
    np.testing.assert_allclose(jax.jit(losses)(values), wanted, rtol=1e-5)


def test_what_members_have_in_common():
    one = read(defaults("dpo"), complete=False).fields
    same = {"seed": 3, "learning_rate": 1.0, "loss.beta": 0.7, "data.flip_labels": 0.1, "warmup_steps": 4}
    assert shared_fields({**one, **same}) == shared_fields(one)
    for field, value in {"batch_size": 2, "loss.ld_alpha": 0.5, "loss.reference_free": True, "lora.rank": 2}.items():
        assert shared_fields({**one, field: value}) != shared_fields(one), field
    drawn = {**one, "model.random_init": True}
    assert shared_fields({**drawn, "seed": 1}) != shared_fields({**drawn, "seed": 2})
    for field, value in {
        "job": "rounds",
        "reference.kind": "moving",
        "model.attention": "cudnn",
        "seed": 2**31,
    }.items():
        assert shared_fields({**one, field: value}) is None, field


def test_sets_of_other_pairs_take_one_shape_a_step():
    sets = [make_pair_set(make_pairs(20, seed, longest), 4) for seed, longest in ((0, 12), (1, 70))]
    both = alike(sets)
    assert both[0].shapes == both[1].shapes and all(np.greater_equal(both[0].shapes[-1], sets[1].shapes[-1]))
    numbers = [np.arange(4), np.arange(4)]
    batch = batches_of(both, numbers)
    assert batch.tokens.shape[:2] == (2, 1)
    np.testing.assert_array_equal(batch.index, [[numbers[0]], [numbers[1]]])
    for k, one in enumerate(sets):
        assert (batch.segments[k] > 0).sum() == one.laid_out(numbers[k]).pieces.sum()
