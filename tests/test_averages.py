"""Averages of weights: their formulas, what is evaluated and exported of them; that every optimizer resumes."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conftest import longer
from prefalign_jax import averages, checkpoint
from prefalign_jax.kept import load_kept
from prefalign_jax.members import AXES
from prefalign_jax.optim import OPTIMIZERS, make_optimizer, make_schedule
from prefalign_jax.policy import load
from prefalign_jax.sharding import make_mesh, param_shardings, state_shardings
from prefalign_jax.train import train
from prefalign_jax.train_step import init_state
from prefalign_jax.types import TrainState
from small import make_params
from test_train import TRL, column, config_of, one_device  # noqa: F401 (one_device is a fixture)

pytestmark = pytest.mark.usefixtures("light_runs")
OWN = {"adafactor": {"factor_from": 8}, "sgd": {"momentum": 0.9}}  # what makes their state of interest


def optimizer_of(name):
    schedule = make_schedule("constant" if name == "schedule_free_adamw" else "wsd", 0.01, 2, 9)
    return make_optimizer({"name": name, **OWN.get(name, {})}, schedule, 1.0)


def grads_at(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), make_params())


def stepper(tx, shardings):
    """An update with a moving average, compiled for its shardings as a run's is."""

    def step(state, grads):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = averages.moved(state.ema, params, 0.9)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)

    return jax.jit(step, out_shardings=shardings, donate_argnums=0)


MESHES = {"one device": {"data": 1}, "eight devices": {"data": 1, "fsdp": 4, "tensor": 2}}


@functools.cache
def mesh_of(where):
    sizes = MESHES[where]
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


@pytest.mark.parametrize(
    ("name", "where"),
    [(name, "one device") for name in OPTIMIZERS]
    + [longer(name, "eight devices") for name in OPTIMIZERS if name not in ("rmsprop", "sgd")],
)
def test_every_optimizer_and_the_average_resume_bit_for_bit(name, where, tmp_path):
    mesh, tx = mesh_of(where), optimizer_of(name)

    def begin():
        params = make_params()
        return init_state(jax.device_put(params, param_shardings(mesh, params)), tx, mesh, ema=True)

    step = stepper(tx, state_shardings(mesh, begin()))
    whole = begin()
    for number in range(5):
        whole = step(whole, grads_at(number))
    part = begin()
    for number in range(3):
        part = step(part, grads_at(number))
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, part, {}, {})
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        back = checkpoint.restore(checkpoints, begin(), {}, {})
    assert int(back.step) == 3
    for number in range(3, 5):
        back = step(back, grads_at(number))
    assert jax.tree.structure(back) == jax.tree.structure(whole)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(back), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=jax.tree_util.keystr(path))
        assert one.sharding == other.sharding


def saved(workdir, step, like, *names):
    """Parts of a checkpoint's state."""
    with checkpoint.open_checkpoints(workdir / "checkpoints", keep=9) as checkpoints:
        return checkpoint.load_parts(checkpoints, step, {name: getattr(like, name) for name in names})


def same(one, other, **tolerance):
    compare = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    jax.tree.map(lambda x, y: compare(np.asarray(x), np.asarray(y), **tolerance), one, other)


AVERAGED = {"steps": 3, "data.eval_fraction": 0.2, "save_steps": 1, "checkpoint.keep": 9}
EMA = {"ema.decay": 0.5}
SCHEDULE_FREE = {"optimizer.name": "schedule_free_adamw", "warmup_steps": 1}


@pytest.mark.everything
def test_an_average_that_hardly_moves_is_evaluated_and_exported_as_the_model_was(tmp_path):
    result = train(config_of(**{**AVERAGED, "ema.decay": 1 - 1e-6, "save_steps": None}), tmp_path)
    assert column(tmp_path)[2] < column(tmp_path)[0] - 0.1  # what is trained moves
    for name in ("eval/loss", "eval/logps/chosen"):
        assert result.after[name] == pytest.approx(result.before[name], abs=1e-3)
    base = load(TRL).params
    same(result.params, base, atol=1e-5)
    same(load(tmp_path / "export").params, base, atol=1e-5)
    assert '"decay": 0.999999' in (tmp_path / "export" / "README.md").read_text()


@pytest.mark.everything
@pytest.mark.parametrize("fields", [EMA, SCHEDULE_FREE], ids=["moving average", "schedule-free"])
def test_the_average_is_what_is_evaluated_exported_and_read_again(fields, tmp_path):
    result = train(config_of(**AVERAGED, **fields), tmp_path / "run")
    params = result.params
    if fields is EMA:
        average = load(TRL).params
        for step in (1, 2, 3):
            parts = saved(tmp_path / "run", step, TrainState(0, params, None, ema=params), "params", "ema")
            average = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, average, parts["params"])
            same(parts["ema"], average, rtol=1e-6, atol=1e-7)
    else:
        tx = make_optimizer({"name": "schedule_free_adamw"}, lambda step: 0.0, 1.0)
        like = init_state(params, tx, mesh_of("one device"))
        parts = saved(tmp_path / "run", 3, like, "params", "opt_state")
        average = jax.tree.map(lambda y, z: (y - 0.1 * z) / 0.9, parts["params"], parts["opt_state"][1].z)
    same(params, average, rtol=1e-5, atol=1e-6)
    assert np.abs(params["head"]["kernel"] - parts["params"]["head"]["kernel"]).max() > 1e-5  # it is not the last
    same(load(tmp_path / "run" / "export").params, params)
    same(load_kept(tmp_path / "run").params, params)
    if fields is EMA:  # the finished run is asked for its last weights
        last = train(config_of(**AVERAGED, **fields, **{"ema.evaluate": False}), tmp_path / "run")
        same(last.params, parts["params"])
        same(load(tmp_path / "run" / "export").params, parts["params"])
        assert last.after["eval/loss"] != result.after["eval/loss"]
        train(config_of(**AVERAGED, **fields), tmp_path / "run")
    # A run that begins with what was exported measures at its start what the first one measured at its end.
    begun = {"model.path": str(tmp_path / "run" / "export"), "reference.path": str(TRL), "steps": 1}
    again = train(config_of(**{**AVERAGED, **begun, "export.enabled": False}), tmp_path / "again")
    for name in ("eval/loss", "eval/logps/chosen"):
        np.testing.assert_allclose(again.before[name], result.after[name], rtol=1e-5)
    assert abs(result.after["eval/loss"] - result.before["eval/loss"]) > 1e-3


@pytest.mark.everything
@pytest.mark.parametrize("name", ["adafactor", "muon", "schedule_free_adamw"])
def test_runs_on_eight_devices_resume_bit_for_bit(name, tmp_path):
    fields = {f"mesh.{axis}": size for axis, size in MESHES["eight devices"].items()}
    fields |= {"optimizer.name": name, "save_steps": 2, "steps": 3, "export.enabled": False, "warmup_ratio": 0.4}
    fields |= {"optimizer.factor_from": 64} if name == "adafactor" else {}
    fields |= {"schedule": "wsd", **EMA} if name != "schedule_free_adamw" else {}
    whole = train(config_of(**fields), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "3")
    part = train(config_of(**fields), tmp_path / "part")
    same(part.params, whole.params)
    for name in ("loss", "grad_norm", "learning_rate"):
        assert column(tmp_path / "part", name) == column(tmp_path / "whole", name)


def test_members_average_by_themselves():
    tx = make_optimizer({"name": "schedule_free_adamw"}, 0.1)
    params = {"w": jnp.arange(12.0).reshape(2, 6)}
    opt_state = jax.vmap(tx.init)({"w": params["w"] + 1})
    shown = jax.vmap(averages.evaluated, in_axes=(AXES,), out_axes=AXES)(TrainState(0, params, opt_state))
    np.testing.assert_allclose(shown.params["w"], params["w"] - 1 / 9, rtol=1e-5, atol=1e-6)


def test_what_is_evaluated_at_the_start_is_the_model_to_the_bit():
    for name in ("adamw", "schedule_free_adamw"):
        state = init_state(make_params(), optimizer_of(name), mesh_of("one device"), ema=name != "schedule_free_adamw")
        same(averages.evaluated(state).params, make_params())
