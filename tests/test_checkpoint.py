import errno
import logging
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conftest import longer
from prefalign_jax import checkpoint
from prefalign_jax.sharding import make_mesh, param_shardings
from prefalign_jax.train_step import init_state
from prefalign_jax.types import UserError, WriteError
from small import make_params

OPTIMIZER = optax.adamw(1e-3)
DIGESTS = {"training pairs": "a"}
CONFIG = {"loss": {"name": "dpo", "beta": 0.1}, "steps": 10, "data": {"path": "a", "eval_path": None}}


OTHER_PATH = {**CONFIG, "data": {"path": "a", "eval_path": "b"}}
LONG = pytest.mark.everything


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


@pytest.mark.parametrize(
    ("before", "now", "config", "names"),
    [
        ("a" * 64, "b" * 64, CONFIG, [checkpoint.HELD_OUT]),
        pytest.param("a" * 64, "a" * 64, CONFIG, [], marks=LONG),
        pytest.param(None, "b" * 64, CONFIG, [], marks=LONG),  # saved by a version that kept no digest
        pytest.param("a" * 64, "b" * 64, OTHER_PATH, ["data.eval_path"], marks=LONG),
    ],
    ids=["other pairs", "the same", "not known", "another path"],
)
def test_other_held_out_pairs_under_the_same_path_are_told(before, now, config, names, tmp_path):
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        kept = DIGESTS | ({checkpoint.HELD_OUT: before} if before else {})
        checkpoint.save(checkpoints, state_of()._replace(step=jnp.int32(1)), CONFIG, kept)
    digests = DIGESTS | {checkpoint.HELD_OUT: now}
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        assert int(checkpoint.restore(checkpoints, state_of(), config, digests).step) == 1
        assert [*checkpoint.changes(checkpoints, config, digests)] == names


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


def saved(directory, *steps, metrics=None, **options):
    with checkpoint.open_checkpoints(directory, **options) as checkpoints:
        for step in steps:
            state = state_of(seed=step)._replace(step=jnp.int32(step))
            checkpoint.save(checkpoints, state, CONFIG, DIGESTS, metrics and {"eval/loss": metrics[step]})


def on_disk(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(("mode", "best"), [("min", 2), longer("max", 3)])
def test_the_best_stays_beside_the_latest(tmp_path, mode, best):
    losses = {1: 0.5, 2: 0.1, 3: 0.9, 4: 0.4, 5: 0.3, 6: 0.3}
    saved(tmp_path, *losses, metrics=losses, keep=1, best_metric="eval/loss", best_mode=mode)
    assert on_disk(tmp_path) == [str(best), "6"]
    with checkpoint.open_checkpoints(tmp_path, best_metric="eval/loss", best_mode=mode) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best(), checkpoints.latest) == ([best, 6], best, 6)
        assert checkpoints.metrics(6) == {"eval/loss": 0.3}
        better = checkpoint.better_one(
            checkpoints, best, [{"step": step, "eval/loss": losses[step]} for step in losses]
        )
        assert better == ""
        for step, value, words in [(0, 0.0, "before the first step"), (7, 1.0, "at step 7")]:
            better = checkpoint.better_one(checkpoints, best, [{"step": step, "eval/loss": value}, {"step": 8}])
            assert bool(better) == (mode == ("max" if step else "min")) and (not better or words in better)


def test_what_is_evaluated_after_it_was_saved_can_be_the_best(tmp_path):
    options = dict(best_metric="eval/loss", best_mode="min")
    saved(tmp_path, 1, metrics={1: 0.5}, **options)
    saved(tmp_path, 2, **options)
    with checkpoint.open_checkpoints(tmp_path, **options) as checkpoints:
        checkpoints.measured(1, {"eval/loss": 0.0})  # which is known already
        checkpoints.measured(3, {"eval/loss": 0.0})  # which is not there
        assert checkpoints.best() == 1 and checkpoints.metrics(1) == {"eval/loss": 0.5}
        checkpoints.measured(2, {"eval/loss": 0.25})
        assert checkpoints.best() == 2 and checkpoint.newest(checkpoints) == 2
        (tmp_path / "2" / checkpoint.MEASURED).write_text("{}")  # broken, it is not believed; the arrays are sound
        assert checkpoints.best() == 1 and checkpoint.newest(checkpoints) == 2


def test_the_config_as_it_was_saved_has_every_field_that_may_change(tmp_path):
    before = {**CONFIG, "ema": {"decay": 0.9, "evaluate": True}, "early_stopping": {"patience": 3}, "eval_steps": 2}
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state_of()._replace(step=jnp.int32(1)), before, DIGESTS)
    now = {**before, "ema": {"decay": 0.9, "evaluate": False}, "early_stopping": {"patience": 5}, "eval_steps": 7}
    with checkpoint.open_checkpoints(tmp_path) as checkpoints:
        assert checkpoint.as_saved(checkpoints, 1, {**now, "log_steps": 3}) == {**before, "log_steps": 3}


# Damage


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_steps")
    saved(directory, 1, 2)
    return directory


@pytest.fixture
def damaged(two_steps, tmp_path):
    """damaged(change) -> a copy whose step 2 has been changed."""

    def copy(change):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(two_steps, tmp_path / "copy")
        change(tmp_path / "copy" / "2")
        return tmp_path / "copy"

    return copy


def newest(directory):
    with checkpoint.open_checkpoints(directory) as checkpoints:
        return checkpoint.newest(checkpoints)


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


@pytest.mark.everything
def test_one_flipped_bit_in_any_file_is_found_and_the_checkpoint_before_is_used(two_steps, damaged, capsys):
    files = [path.relative_to(two_steps / "2") for path in (two_steps / "2").rglob("*")
             if path.is_file() and path.stat().st_size]  # fmt: skip
    assert len(files) > 5 and newest(two_steps) == 2
    rng = np.random.default_rng(0)
    for file in files:
        size = 8 * (two_steps / "2" / file).stat().st_size
        many = 40 if file.name == checkpoint.MANIFEST else 3
        for bit in {0, *rng.integers(size, size=many).tolist()}:
            directory = damaged(lambda path, file=file, bit=bit: flip(path / file, bit))
            capsys.readouterr()
            assert newest(directory) == 1, (file, bit)
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("the checkpoint of step 2 is damaged (") and line.endswith(on_disk(directory)[-1])
            assert [name.split("-")[0] for name in on_disk(directory)] == ["1", "2.damaged"]


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", checkpoint.MANIFEST, "state/_METADATA", None])
@pytest.mark.parametrize("change", ["cut", "removed", "more"])
def test_a_file_cut_short_missing_or_added_is_found(damaged, name, change):
    def apply(path):
        file = path / name if name else max(path.rglob("*"), key=lambda file: file.stat().st_size)
        if change == "more":
            file.with_name("new").write_text("")
        elif change == "cut":
            os.truncate(file, file.stat().st_size // 2)
        else:
            file.unlink()

    assert newest(damaged(apply)) == 1


def test_a_checkpoint_of_an_earlier_version_has_no_checksums_which_is_said(damaged, capsys):
    assert newest(damaged(lambda path: [file.unlink() for file in path.glob(f"{checkpoint.MANIFEST}*")])) == 2
    assert capsys.readouterr().err.startswith("the checkpoint of step 2 has no checksums")


def test_without_a_manifest_what_orbax_cannot_read_is_damaged_too(damaged):
    def apply(path):
        for file in path.glob(f"{checkpoint.MANIFEST}*"):
            file.unlink()
        os.truncate(path / "_CHECKPOINT_METADATA", 40)

    assert newest(damaged(apply)) == 1


def test_a_run_whose_every_checkpoint_is_damaged_begins_anew(damaged, capsys):
    directory = damaged(lambda path: [flip(at / checkpoint.MANIFEST, 9) for at in (path, path.with_name("1"))])
    state = state_of()
    with checkpoint.open_checkpoints(directory) as checkpoints:
        assert checkpoint.restore(checkpoints, state, CONFIG, DIGESTS) is state
        assert len(capsys.readouterr().err.splitlines()) == 2
        checkpoint.save(checkpoints, state._replace(step=jnp.int32(1)), CONFIG, DIGESTS)
    assert newest(directory) == 1


def test_what_a_killed_run_left_unfinished_goes(two_steps, damaged):
    directory = damaged(lambda path: [shutil.copytree(path, path.with_name(name)) for name in
                                      (".3.unfinished", "3.orbax-checkpoint-tmp")])  # fmt: skip
    assert newest(directory) == 2 and on_disk(directory) == ["1", "2"]


@pytest.mark.parametrize("where", ["arrays", "manifest"])
def test_a_checkpoint_that_cannot_be_written_is_one_line_and_the_one_before_stays(tmp_path, monkeypatch, where):
    saved(tmp_path, 1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Written:
        result = full

    if where == "arrays":
        monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", lambda *_, **__: Written())
    else:
        monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(WriteError, match=r"2.* cannot be written: No space left on device; make") as error:
        saved(tmp_path, 2)
    assert "\n" not in str(error.value)
    assert on_disk(tmp_path) == ["1"] and newest(tmp_path) == 1


def test_what_orbax_logs_of_a_failed_write_is_not_shown_and_what_others_log_is(tmp_path, caplog):
    saved(tmp_path, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
        with pytest.raises(WriteError, match=r"2 cannot be written: File too large; raise the limit"):
            saved(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not caplog.records and newest(tmp_path) == 1
    with checkpoint.open_checkpoints(tmp_path):
        logging.getLogger("absl").error("one's own")
        logging.getLogger("asyncio").error("another", exc_info=ValueError("x"))
    assert [record.message for record in caplog.records] == ["one's own", "another"]
