"""What is written can be read back, survives a killed run, and says the right things."""

import json
import math
import resource
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefalign_jax import metrics
from prefalign_jax.types import WriteError


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_weighted_sum_is_its_formula():
    x, w = jnp.array([1.0, -2.0, 5.0]), jnp.array([0.5, 2.0, 1.0])
    np.testing.assert_allclose(metrics.weighted_sum(x, w), 0.5 - 4.0 + 5.0, rtol=1e-6)


def test_weight_zero_hides_nan_from_value_and_gradient():
    x, w = jnp.array([1.0, jnp.nan, 3.0, jnp.inf]), jnp.array([1.0, 0.0, 3.0, 0.0])
    value, grad = jax.value_and_grad(metrics.weighted_sum)(x, w)
    np.testing.assert_allclose(value, 10.0)
    np.testing.assert_allclose(grad, [1.0, 0.0, 3.0, 0.0])
    assert math.isnan(metrics.weighted_sum(x, jnp.ones(4)))  # where it has weight it must show


def test_sum_of_nothing_is_zero():
    value, grad = jax.value_and_grad(metrics.weighted_sum)(jnp.array([jnp.nan, 1.0]), jnp.zeros(2))
    assert value == 0 and not grad.any()


def test_lines_have_step_first_and_exact_numbers(tmp_path):
    third = np.float32(1) / np.float32(3)
    writer = metrics.open_writer(tmp_path / "new" / "run", tensorboard=False)
    writer.write(3, {"loss": jnp.asarray(third), "tokens": 7, "rewards/margins": 1e-30})
    on_disk = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()  # before it is closed
    writer.close()
    assert on_disk.startswith('{"step": 3, "loss": ') and on_disk.endswith("\n")
    row = json.loads(on_disk)
    assert list(row) == ["step", "loss", "tokens", "rewards/margins"]
    assert np.float32(row["loss"]) == third and row["tokens"] == 7 and row["rewards/margins"] == 1e-30


def test_not_finite_is_null_and_what_does_not_apply_is_left_out(tmp_path):
    writer = metrics.open_writer(tmp_path, tensorboard=False)
    writer.write(1, {"loss": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0, "of_none": math.nan})
    writer.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "b": None, "c": None, "d": 0.0}]


@pytest.mark.parametrize("cut", ['{"step": 5, "lo', '{"step"', "\x00\x00", '"text"', "3"])
def test_a_resumed_run_continues_where_its_checkpoint_was(tmp_path, cut):
    writer = metrics.open_writer(tmp_path, tensorboard=False)
    for step in range(1, 5):
        writer.write(step, {"loss": float(step)})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write(cut)
    writer = metrics.open_writer(tmp_path, tensorboard=False, resume_step=2)
    writer.write(3, {"loss": 30.0})
    writer.close()
    assert [(row["step"], row["loss"]) for row in rows(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_the_start_keeps_no_old_line(tmp_path):
    for _ in range(2):
        writer = metrics.open_writer(tmp_path, "eval", tensorboard=False)
        writer.write(0, {"eval/loss": 1.0})
        writer.close()
    assert rows(tmp_path / "eval.jsonl") == [{"step": 0, "eval/loss": 1.0}]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = metrics.open_writer(tmp_path)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def events(directory):
    """(tag, step, value) of every scalar, and the steps from which earlier events are void, in TensorBoard's files."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, voids = [], []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:  # a record is its length, a checksum of that, the event, a checksum of that
            size = struct.unpack("<Q", data[:8])[0]
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("session_log"):
                voids.append(event.step)
            scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return scalars, voids


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    writers = {name: metrics.open_writer(tmp_path, name, resume_step=4) for name in ("metrics", "eval")}
    for name, writer in writers.items():
        writer.write(5, {f"{name}/loss": 0.5, f"{name}/bad": math.nan})
        writer.close()
    for name in writers:
        assert events(tmp_path / "tensorboard" / name) == ([(f"{name}/loss", 5, 0.5)], [5])


def test_a_writer_of_the_same_second_has_a_file_of_its_own(tmp_path):
    pytest.importorskip("tensorboardX")
    for step in (1, 2):
        writer = metrics.open_writer(tmp_path, resume_step=step - 1)
        writer.write(step, {"loss": step})
        writer.close()
    scalars, _ = events(tmp_path / "tensorboard" / "metrics")
    assert sorted(scalars) == [("loss", 1, 1.0), ("loss", 2, 2.0)]


@pytest.mark.parametrize("tensorboard", [True, False])
def test_a_full_disk_is_one_line_at_once(tmp_path, tensorboard):
    if tensorboard:
        pytest.importorskip("tensorboardX")
    writer = metrics.open_writer(tmp_path, tensorboard=tensorboard)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))
    try:
        with pytest.raises(WriteError, match=r"(tensorboard/metrics|metrics\.jsonl) cannot be written: File too large"):
            for step in range(1000):  # a point takes more room in TensorBoard's file
                writer.write(step, {"loss": 0.5})
        with pytest.raises(WriteError):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert step < 300


def test_memory_is_in_gib():
    memory = metrics.device_memory()
    assert list(memory) == ["memory/host_peak_gib"]  # jax's CPU devices report none
    assert 0.05 < memory["memory/host_peak_gib"] < 500


def test_memory_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, used):
            self.used = used

        def memory_stats(self):
            return {"bytes_in_use": self.used * 2**30, "peak_bytes_in_use": 2 * self.used * 2**30}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(1), Device(3)])
    assert metrics.device_memory() == {"memory/device_gib": 3.0, "memory/device_peak_gib": 6.0}
