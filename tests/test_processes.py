"""Real processes on this machine: two train as one, stop together, and go on bit for bit."""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import socket
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from conftest import FAST_TO_COMPILE
from prefalign_jax import processes
from prefalign_jax.processes import LAUNCHERS, STOPPED, agreed, all_have, by_first, fetch, join_processes
from prefalign_jax.types import UserError

TRL = pathlib.Path(__file__).parent / "goldens" / "trl"
FIELDS = {"data.eval_path": str(TRL / "pairs.jsonl"), "data.eval_limit": 9, "eval_steps": 5, "save_steps": 3}
SAMPLES = {"samples.limit": 4, "samples.max_new_tokens": 6, "samples.reward": "kindness", "steps": 10}
HEARTBEAT = 30


def config_of(workdir, **fields):
    """TRL's reference run, with evaluations, samples and checkpoints."""
    from test_train import config_of

    prompts = workdir.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"The number {n} is"}) + "\n" for n in range(4)))
    return config_of(**FIELDS, **SAMPLES | {"samples.prompts": str(prompts)} | fields)


def take_part(process, count, port, workdir, fields, at, number, other):
    """One of the processes. The last one sends itself the signal `number` where it reads the metrics of step `at`, or
    while it writes the checkpoint of that step if `at` is a string."""
    log = workdir.with_suffix(f".{process}.log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {FAST_TO_COMPILE}"
    from prefalign_jax import checkpoint, train
    from prefalign_jax.exits import status_of
    from prefalign_jax.jobs import run_train

    flush = train.Log.flush

    def flush_and_stop(log):
        if log.waiting and log.waiting[0] == at and process == count - 1:
            while number == signal.SIGKILL and not (workdir / "checkpoints" / "3").exists():
                time.sleep(0.05)  # until there is something to go on from
            os.kill(os.getpid(), number)
        return flush(log)

    train.Log.flush = flush_and_stop
    finish = checkpoint.Checkpoints.finish

    def stop_or_finish(checkpoints, step, *rest):
        if str(step) == at and process == count - 1:
            os.kill(os.getpid(), number)
        return finish(checkpoints, step, *rest)

    checkpoint.Checkpoints.finish = stop_or_finish

    def run():
        join_processes(f"127.0.0.1:{port}", str(count), process, HEARTBEAT)
        return run_train(config_of(workdir, **fields, **(other if process else {})), workdir)

    sys.exit(status_of(run))


def launch(workdir, count=2, at=None, number=None, other=None, **fields):
    """The exit status of each process and what it said; `other` has fields of all but the first."""
    context = multiprocessing.get_context("forkserver")  # imports once what all of them need
    context.set_forkserver_preload(["conftest", "prefalign_jax.jobs", "transformers.models.auto.tokenization_auto"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=take_part, args=(process, count, port, workdir, fields, at, number, other or {}))
        for process in range(count)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
        said = [workdir.with_suffix(f".{process}.log").read_text() for process in range(count)]
        return [process.exitcode for process in processes], said
    finally:
        for process in processes:
            process.kill()


def rows(workdir, name):
    measured = re.compile("step_time|per_second|memory|input_wait")
    lines = (workdir / f"{name}.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not measured.search(k)} for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with eight devices."""
    from prefalign_jax.train import train

    workdir = tmp_path_factory.mktemp("processes") / "alone"
    train(config_of(workdir), workdir)
    return workdir


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two processes with two devices each, which nothing disturbs."""
    workdir = tmp_path_factory.mktemp("processes") / "whole"
    statuses, said = launch(workdir)
    assert statuses == [0, 0], said
    return workdir


def same(ours, theirs, tolerance):
    for name in ("metrics", "eval"):
        assert [row["step"] for row in rows(ours, name)] == [row["step"] for row in rows(theirs, name)]
        for mine, wanted in zip(rows(ours, name), rows(theirs, name), strict=True):
            assert mine.keys() == wanted.keys()
            for key, value in wanted.items():
                if value is not None and key not in ("packing_efficiency", "flops"):  # of other rows
                    bar = 10 * tolerance if key.startswith("samples/kl") else tolerance  # differences of sums
                    np.testing.assert_allclose(mine[key], value, rtol=bar, atol=bar, err_msg=key)


@pytest.mark.everything
def test_two_processes_train_evaluate_generate_and_export_as_one_does(whole, alone):
    """As one process with eight devices, whose rows are other ones; both train as TRL does."""
    same(whole, alone, 1e-5)
    ours, theirs = (load_file(workdir / "export" / "model.safetensors") for workdir in (whole, alone))
    assert ours.keys() == theirs.keys()
    for name, weights in theirs.items():
        # Adam makes steps of one size even of gradients that are rounding alone.
        np.testing.assert_allclose(ours[name], weights, atol=1e-4, err_msg=name)
    losses = [json.loads(line)["loss"] for line in (TRL / "dpo.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([row["loss"] for row in rows(whole, "metrics")], losses, atol=1e-5)
    drawn = [(workdir / "samples" / "10.jsonl").read_text().replace("whole", "alone") for workdir in (whole, alone)]
    assert drawn[0] == drawn[1]


@pytest.fixture(scope="module")
def killed(whole):
    """{directory's name: (it, exit statuses, what was said)}; at once, since most of it waits for a sign of life."""
    moments = {"broken": 5, "half_saved": "6"}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        launches = {
            name: pool.submit(launch, whole.with_name(name), at=at, number=signal.SIGKILL)
            for name, at in moments.items()
        }
    return {name: (whole.with_name(name), *one.result()) for name, one in launches.items()}


@pytest.mark.everything
def test_a_killed_process_stops_the_others_and_the_same_command_goes_on_bit_for_bit(whole, killed):
    broken, statuses, (said, _) = killed["broken"]
    assert statuses == [STOPPED, -signal.SIGKILL], said
    assert said.splitlines()[-1].startswith("error: another process of this run stopped")
    assert "Traceback" not in said
    statuses, (said, _) = launch(broken)
    assert statuses == [0, 0], said
    assert "resumed at step 3" in said
    for name in ("metrics", "eval"):
        assert rows(broken, name) == rows(whole, name)
    ours, theirs = (workdir / "export" / "model.safetensors" for workdir in (broken, whole))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.everything
def test_a_process_killed_while_a_checkpoint_is_written_stops_the_others_in_one_line(whole, killed):
    broken, statuses, (said, _) = killed["half_saved"]
    assert statuses == [STOPPED, -signal.SIGKILL], said
    assert said.count("error: ") == 1 and said.splitlines()[-1].startswith("error: another process of this run stopped")
    assert "Traceback" not in said
    statuses, (said, _) = launch(broken)
    assert statuses == [0, 0], said
    assert "resumed at step 3" in said
    assert rows(broken, "metrics") == rows(whole, "metrics")


@pytest.mark.everything
def test_a_checkpoint_of_eight_devices_is_resumed_on_two_by_two_and_sigterm_stops_all_at_one_step(alone, tmp_path):
    from prefalign_jax.train import train

    longer, wanted = tmp_path / "longer", tmp_path / "wanted"
    for workdir in (longer, wanted):
        shutil.copytree(alone, workdir)
    statuses, said = launch(longer, at=12, number=signal.SIGTERM, steps=5000)
    assert statuses == [STOPPED, STOPPED], said
    assert "resumed at step 10" in said[0]
    ended = re.search(r"stopped at step (\d+) of 5000, saved", said[0])
    assert ended, said
    stopped = int(ended[1])
    assert stopped >= 12
    assert (longer / "checkpoints" / str(stopped)).is_dir()  # which both had to write
    train(config_of(wanted, steps=11), wanted)
    (mine,), (theirs,) = (
        [row for row in rows(workdir, "metrics") if row["step"] == 11] for workdir in (longer, wanted)
    )
    np.testing.assert_allclose(mine["loss"], theirs["loss"], atol=1e-6)


@pytest.mark.everything
def test_processes_that_are_not_one_run_are_all_refused_before_the_first_step(tmp_path):
    statuses, said = launch(tmp_path / "run", other={"learning_rate": 2e-3})
    assert statuses == [2, 2], said
    lines = [text.splitlines()[-1] for text in said]
    assert lines[0] == lines[1] and not (tmp_path / "run").exists()
    assert lines[0].startswith("error: the processes of this run differ in learning_rate: ")
    assert "0.002 in process 1; start all with the same options, files and code" in lines[0]


@pytest.mark.everything
def test_four_processes_train_as_two_do(whole):
    four = whole.with_name("four")
    statuses, said = launch(four, count=4)
    assert statuses == [0] * 4, said
    same(four, whole, 1e-5)


# One process


@pytest.mark.parametrize(
    ("given", "environment", "says"),
    [
        (
            ("host:1", "2", None),
            {},
            "--process is missing: set --coordinator, --processes, --process, or JAX_PROCESS_ID",
        ),
        ((None, None, None), {"JAX_NUM_PROCESSES": "2"}, "--coordinator is missing"),
        (("host", "2", 0), {}, "--coordinator='host': write HOST:PORT"),
        (("host:1", "2", 2), {}, "--processes=2 and --process=2: write their count, and a number below it"),
        (("host:1", "two", 0), {}, "--processes=two"),
    ],
)
def test_what_is_missing_to_join_is_named(given, environment, says):
    with pytest.raises(UserError) as error:
        join_processes(*given, environment=environment)
    assert says in str(error.value)


def test_without_a_launcher_nothing_is_joined():
    join_processes(environment={"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"})
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("SLURM", {"SLURM_STEP_NUM_TASKS": "16"}),
        ("Open MPI", {"OMPI_COMM_WORLD_SIZE": "16"}),
        ("TPU pods on GKE", {"TPU_WORKER_HOSTNAMES": ",".join(f"host-{n}" for n in range(16))}),
    ],
)
def test_a_launcher_says_how_many_there_are(name, environment):
    assert {other: count(environment) for other, count in LAUNCHERS.items()} == {
        **dict.fromkeys(LAUNCHERS, 1),
        name: 16,
    }


def test_what_differs_between_processes_is_named_in_their_order(monkeypatch):
    same = {"a": 1, "b": [2]}
    processes.check_alike(same)
    for other, says in (({"a": 1, "b": [3]}, r"differ in b: \[2\] in process 0, \[3\] in process 2"),
                        ({"a": 1}, "differ in b"), ({**same, "c": 0}, "differ in c: None in process 0")):  # fmt: skip
        monkeypatch.setattr(processes, "gathered", lambda value, other=other: [value, value, other])
        with pytest.raises(UserError, match=says):
            processes.check_alike(same)


def test_one_process_agrees_with_itself():
    assert agreed({"a": [1, None]}) == {"a": [1, None]}
    assert all_have(True) and not all_have(False)
    with pytest.raises(UserError, match="no"):
        by_first(lambda: (_ for _ in ()).throw(UserError("no")))
    done = []
    by_first(lambda: done.append(1))
    assert done == [1]
    np.testing.assert_array_equal(fetch({"x": jax.numpy.arange(3)})["x"], np.arange(3))
