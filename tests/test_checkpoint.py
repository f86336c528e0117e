import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prefalign_jax import checkpoint
from prefalign_jax.sharding import make_mesh, param_shardings
from prefalign_jax.train_step import init_state
from prefalign_jax.types import UserError
from small import make_params

OPTIMIZER = optax.adamw(1e-3)
DIGESTS = {"training pairs": "a"}
CONFIG = {"loss": {"name": "dpo", "beta": 0.1}, "steps": 10, "data": {"path": "a", "eval_path": None}}


def state_of(seed=0, **mesh):
    mesh = make_mesh({"data": 1, **mesh} if mesh else {"data": -1})
    params = make_params(seed)
    return init_state(jax.device_put(params, param_shardings(mesh, params)), OPTIMIZER, mesh)


def test_a_state_comes_back_bit_for_bit_onto_another_mesh(tmp_path):
    state = state_of(seed=3, fsdp=4, tensor=2)._replace(step=jnp.int32(7))
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state, CONFIG, DIGESTS, {"eval/loss": 0.5})
    fresh = state_of(seed=0, fsdp=2, tensor=4)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        back = checkpoint.restore(checkpoints, fresh, CONFIG, DIGESTS)
    assert int(back.step) == 7
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(back.params), jax.device_get(state.params))
    jax.tree.map(lambda x, y: x.sharding == y.sharding or pytest.fail("sharding"), back.params, fresh.params)


def test_without_a_checkpoint_the_fresh_state_stays(tmp_path):
    state = state_of()
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        assert checkpoint.restore(checkpoints, state, CONFIG, DIGESTS) is state


def test_what_is_saved_does_not_follow_the_donated_buffers(tmp_path):
    state = state_of()
    wanted = jax.device_get(jax.tree.map(jnp.copy, state.params))
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 9, tree), donate_argnums=0)
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state._replace(step=jnp.int32(1)), CONFIG, DIGESTS)
        change(state.params)  # while the writer may still be at work
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        back = checkpoint.restore(checkpoints, state_of(seed=1), CONFIG, DIGESTS)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(back.params), wanted)


@pytest.mark.parametrize(
    ("config", "digests", "says"),
    [
        ({**CONFIG, "loss": {"name": "dpo", "beta": 0.5}}, DIGESTS, "loss.beta=0.1, not 0.5"),
        ({**CONFIG, "loss": {"name": "orpo"}}, DIGESTS, "loss"),
        (CONFIG, {"training pairs": "b"}, "training pairs have changed"),
    ],
)
def test_another_run_is_refused(config, digests, says, tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state_of()._replace(step=jnp.int32(1)), CONFIG, DIGESTS)
    with (
        checkpoint.open_checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=says) as error,
    ):
        checkpoint.restore(checkpoints, state_of(), config, digests)
    assert "\n" not in str(error.value)


def test_what_does_not_make_the_run_may_change(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state_of()._replace(step=jnp.int32(1)), CONFIG, DIGESTS)
    changed = {**CONFIG, "steps": 20, "data": {"path": "a", "eval_path": "b"}}
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        assert int(checkpoint.restore(checkpoints, state_of(), changed, DIGESTS).step) == 1


def test_other_shapes_are_refused_in_one_line(tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state_of()._replace(step=jnp.int32(1)), CONFIG, DIGESTS)
    state = state_of()
    params = jax.tree.map(lambda x: x, state.params)
    params["final_norm"] = {"scale": jnp.ones(99)}
    with (
        checkpoint.open_checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=r"final_norm/scale is \(16,\) there and \(99,\) in this model") as error,
    ):
        checkpoint.restore(checkpoints, state._replace(params=params), CONFIG, DIGESTS)
    assert "\n" not in str(error.value)


def test_only_the_latest_stay(tmp_path):
    with checkpoint.open_checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoint.save(checkpoints, state_of()._replace(step=jnp.int32(step)), CONFIG, DIGESTS)
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [3, 4]
