"""Whole runs: TRL's reproduced, killed and resumed, on eight devices, and what a run refuses."""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import FAST_TO_COMPILE, longer
from prefalign_jax import assemble
from prefalign_jax import train as module
from prefalign_jax.analysis.runs import read_run
from prefalign_jax.callbacks import Callbacks
from prefalign_jax.config import defaults
from prefalign_jax.files import locked
from prefalign_jax.kept import export_kept
from prefalign_jax.losses import LOSSES
from prefalign_jax.models.lora import Lora
from prefalign_jax.models.quantize import quantize_params
from prefalign_jax.pages import plots
from prefalign_jax.sharding import make_mesh, param_shardings
from prefalign_jax.train import train
from prefalign_jax.types import UserError

TRL = pathlib.Path(__file__).parent / "goldens" / "trl"
ROOT = pathlib.Path(__file__).parents[1]


def config_of(loss: str = "dpo", **fields):
    """TRL's reference run as a config; fields with dots for those in a group."""
    c = defaults(loss)
    c.model.path, c.data.path = str(TRL), str(TRL / "pairs.jsonl")
    c.update(
        {"batch_size": 4, "steps": 10, "max_length": 256, "learning_rate": 1e-3, "schedule": "constant", "log_steps": 1}
    )
    c.data.shuffle = False
    c.tensorboard, c.accuracy_ties = False, "trl"
    c.mesh.data = -1
    if loss == "orpo":
        c.loss.nll_over, c.loss.nll_mean = "prompt+chosen", "batch"
    c.update_from_flattened_dict(fields)
    return c


pytestmark = pytest.mark.usefixtures("light_runs")
draw_curves = plots.plot_curves


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """A mesh of as many devices as there are is one of one here: eight take longer and matter to few tests."""
    made = module.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module, "make_mesh", lambda sizes: made(sizes, jax.devices()[:1] if -1 in sizes.values() else None)
        )
        yield


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def column(workdir, name="loss"):
    return [row[name] for row in rows(workdir / "metrics.jsonl")]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The DPO and the ORPO run of TRL, made here: {name: (workdir, Result)}."""
    made = {}
    for loss in ("dpo", "orpo"):
        workdir = tmp_path_factory.mktemp(loss)
        # One device's worth of rows on each of eight: fsdp 4 x tensor 2 for ORPO, data 8 for DPO.
        mesh = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2} if loss == "orpo" else {"mesh.data": 8}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plots, "plot_curves", draw_curves)
            made[loss] = workdir, train(config_of(loss, **mesh), workdir)
    return made


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_ten_steps_of_trl_are_reproduced(runs, loss):
    workdir, _ = runs[loss]
    ours, theirs = rows(workdir / "metrics.jsonl"), rows(TRL / f"{loss}.jsonl")
    assert [row["step"] for row in ours] == list(range(1, 11))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert abs(mine["loss"] - wanted["loss"]) < 1e-5
        assert abs(mine["grad_norm"] - wanted["grad_norm"]) < 1e-4
        for name in wanted.keys() - {"step", "loss", "grad_norm"}:
            np.testing.assert_allclose(mine[name], wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)
    final, wanted = load_file(workdir / "export" / "model.safetensors"), load_file(TRL / f"final_{loss}.safetensors")
    assert final.keys() == wanted.keys()
    moved = load_file(TRL / "model.safetensors")
    for name, weights in wanted.items():
        assert np.abs(final[name] - weights).max() < 1e-4, name
        assert np.abs(moved[name] - weights).max() > 1e-3, name  # the bar is far below what training changes


def test_dpo_starts_at_log_2(runs):
    assert abs(column(runs["dpo"][0])[0] - np.log(2)) < 1e-6


def test_a_run_leaves_its_curves_checkpoint_and_model_card(runs):
    workdir, _ = runs["dpo"]
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert any((workdir / "checkpoints").iterdir())
    config = json.loads((workdir / "config.json").read_text())
    assert (config["steps"], config["loss"]["name"], config["loss"]["beta"]) == (10, "dpo", 0.1)
    card = (workdir / "export" / "README.md").read_text()
    assert "dpo" in card and "64" in card
    for name in ("step_time", "tokens_per_second", "pairs_per_second", "packing_efficiency"):
        assert rows(workdir / "metrics.jsonl")[-1][name] > 0


@pytest.mark.parametrize(
    "fields",
    [
        longer({"micro_steps": 2}),
        longer({"data.layout": "ordinary"}),
        {"reference.kind": "cached"},
        longer({"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}),
    ],
    ids=str,
)
def test_how_it_is_computed_changes_no_number(runs, fields, tmp_path):
    train(config_of(**{"steps": 4, "export.enabled": False, **fields}), tmp_path)
    np.testing.assert_allclose(column(tmp_path), column(runs["dpo"][0])[:4], atol=1e-5)
    np.testing.assert_allclose(column(tmp_path, "grad_norm"), column(runs["dpo"][0], "grad_norm")[:4], atol=1e-4)


@pytest.mark.everything
def test_chosen_steps_are_traced(tmp_path, capsys):
    with pytest.raises(UserError, match="profile_steps='2:9' ends after the 3 steps"):
        train(config_of(**{"steps": 3, "export.enabled": False, "profile_steps": "2:9"}), tmp_path / "a")
    train(config_of(**{"steps": 3, "export.enabled": False, "profile_steps": "2:3"}), tmp_path / "b")
    assert "steps 2 to 3 traced" in capsys.readouterr().err
    traces = [path.name for path in (tmp_path / "b" / "profile").rglob("*")]
    assert "perfetto_trace.json.gz" in traces and any(name.endswith(".xplane.pb") for name in traces)


@pytest.mark.everything
def test_bfloat16_weights_with_stochastic_rounding_train_like_float32(runs, tmp_path):
    fields = {"steps": 6, "export.enabled": False, "model.param_dtype": "bfloat16", "model.stochastic_rounding": True}
    result = train(config_of(**fields), tmp_path)
    assert {x.dtype.name for x in jax.tree.leaves(result.params)} == {"bfloat16"}
    np.testing.assert_allclose(column(tmp_path), column(runs["dpo"][0])[:6], atol=0.03)
    again = train(config_of(**fields), tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, result.params, again.params)


def test_the_reference_cache_is_used_and_belongs_to_one_model(tmp_path):
    fields = {
        "steps": 1,
        "reference.kind": "cached",
        "reference.cache_dir": str(tmp_path / "cache"),
        "export.enabled": False,
    }
    train(config_of(**fields), tmp_path / "a")
    (made,) = (tmp_path / "cache").glob("*.npz")
    before = made.stat().st_mtime_ns
    train(config_of(**fields), tmp_path / "b")
    assert made.stat().st_mtime_ns == before
    train(config_of(**fields, max_length=40), tmp_path / "c")  # other pairs stay, so other numbers
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 2


COMMAND = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_train import config_of
from prefalign_jax.train import train
fields = {{"steps": 16, "save_steps": 3, "eval_steps": 6, "data.shuffle": True, "data.eval_fraction": 0.2}}
result = train(config_of(**fields), Path(sys.argv[1]))
sys.exit(143 if result.stopped else 0)
"""


@contextlib.contextmanager
def running(workdir):
    """The run as a process of its own, on one device; what it says goes to WORKDIR.log."""
    command = [sys.executable, "-c", COMMAND.format(tests=str(ROOT / "tests")), str(workdir)]
    with workdir.with_suffix(".log").open("w") as log:
        env = {**os.environ, "XLA_FLAGS": FAST_TO_COMPILE, "PYTHONWARNINGS": "ignore"}
        process = subprocess.Popen(command, env=env, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def said(workdir) -> str:
    return workdir.with_suffix(".log").read_text()


def wait_for_step(workdir, step, process):
    """Blocks until the run has written that step."""
    path = workdir / "metrics.jsonl"
    for _ in range(6000):
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, said(workdir)
        time.sleep(0.02)
    raise AssertionError("the run does not get on")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    with running(workdir) as process:
        assert process.wait() == 0, said(workdir)
    return workdir


UNDISTURBED = {"data.eval_fraction": 0.3, "data.shuffle": True, "steps": 5, "export.enabled": False}
UNDISTURBED |= {"eval_steps": 2, "save_steps": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(workdir, Result) of a run that nothing disturbs, in this process."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, train(config_of(**UNDISTURBED), workdir)


@pytest.mark.everything
def test_killed_and_resumed_is_bit_for_bit_the_run_that_was_not(whole, tmp_path):
    """First by SIGTERM, on which it saves; gone on with, by SIGKILL; then to its end."""
    broken = tmp_path / "broken"
    at = np.random.default_rng().integers([4, 10], [7, 14])  # a save every 3 steps waits for the one before to be whole
    for step, number, status in zip(at.tolist(), (signal.SIGTERM, signal.SIGKILL), (143, -9), strict=True):
        with running(broken) as process:
            wait_for_step(broken, step, process)
            process.send_signal(number)
            assert process.wait() == status, said(broken)
    with running(broken) as process:
        assert process.wait() == 0, said(broken)
    resumed = int(re.search(r"resumed at step (\d+)", said(broken))[1])
    assert resumed >= at[0]
    measured = re.compile("step_time|per_second|memory|input_wait")
    for name in ("metrics.jsonl", "eval.jsonl"):
        ours, theirs = (
            [{k: v for k, v in row.items() if not measured.search(k)} for row in rows(workdir / name)]
            for workdir in (broken, whole)
        )
        assert ours == theirs, f"stopped and killed at steps {at}, resumed at {resumed}"
    ours, theirs = (workdir / "export" / "model.safetensors" for workdir in (broken, whole))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"loss.beta": 0.5}, "loss.beta=0.1, not 0.5"),
        ({"seed": 1}, "seed=0, not 1"),
        ({"data.limit": 32}, "data.limit"),
    ],
    ids=str,
)
def test_another_run_is_not_resumed(runs, fields, says, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(runs["dpo"][0] / "checkpoints", workdir / "checkpoints")
    with pytest.raises(UserError, match=says) as error:
        train(config_of(**fields), workdir)
    assert "\n" not in str(error.value)
    assert not (workdir / "config.json").exists()  # the refused config is not this run's


def test_changed_data_are_not_resumed(runs, tmp_path):
    workdir, data = tmp_path / "run", tmp_path / "pairs.jsonl"
    lines = (TRL / "pairs.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines))
    train(config_of(**{"steps": 1, "data.path": str(data), "export.enabled": False}), workdir)
    data.write_text("".join(lines[::-1]))
    with pytest.raises(UserError, match="training pairs have changed"):
        train(config_of(**{"steps": 2, "data.path": str(data), "export.enabled": False}), workdir)


@pytest.mark.everything
def test_rows_in_memory_train_and_are_resumed_as_those_of_a_file_are(tmp_path):
    import datasets

    fields, held_out = {"export.enabled": False, "eval_steps": 2}, rows(TRL / "pairs.jsonl")[:9]
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in held_out))
    train(config_of(**fields, steps=3, **{"data.eval_path": str(file)}), tmp_path / "file")
    pairs = rows(TRL / "pairs.jsonl")
    given = {"data": datasets.Dataset.from_list(pairs), "eval_data": held_out}
    fields["data.path"] = None
    for steps in (2, 3):
        train(config_of(**fields, steps=steps), tmp_path / "memory", **given)
    for name in ("loss", "grad_norm"):
        np.testing.assert_array_equal(column(tmp_path / "memory", name), column(tmp_path / "file", name))
    assert rows(tmp_path / "memory" / "eval.jsonl")[-1] == rows(tmp_path / "file" / "eval.jsonl")[-1]
    sources = json.loads((tmp_path / "memory" / "datasheet.json").read_text())["sources"]
    assert [(one["name"], one["records"], one["of"]) for one in sources] == [
        ("data", 64, "content"),
        ("eval_data", 9, "content"),
    ]
    with pytest.raises(UserError, match="training pairs have changed"):
        train(config_of(**fields, steps=5), tmp_path / "memory", data=pairs[::-1], eval_data=held_out)
    with pytest.raises(UserError, match="data= and data.path='x' are both given"):
        train(config_of(**{**fields, "data.path": "x"}), tmp_path / "memory", data=pairs)


class Cut(BaseException):
    """What no part of a run catches."""


@pytest.mark.parametrize("how", ["SIGTERM", longer("cut off")])
def test_a_run_that_ended_early_goes_on_bit_for_bit_with_its_evaluations(how, undisturbed, tmp_path, monkeypatch):
    """SIGTERM at the very step that is to be evaluated, and an end two steps after the last checkpoint."""

    class Log(module.Log):
        def flush(self):
            number = self.waiting and self.waiting[0]
            if (number, how) == (1, "SIGTERM"):  # read while step 2 runs
                os.kill(os.getpid(), signal.SIGTERM)
            if (number, how) == (4, "cut off"):
                raise Cut
            super().flush()

    with monkeypatch.context() as patch:
        patch.setattr(module, "Log", Log)
        if how == "SIGTERM":
            assert train(config_of(**UNDISTURBED), tmp_path / "broken").step == 2
        else:
            with pytest.raises(Cut):
                train(config_of(**UNDISTURBED), tmp_path / "broken")
    result = train(config_of(**UNDISTURBED), tmp_path / "broken")
    assert not result.stopped
    for name in ("loss", "grad_norm"):
        assert column(tmp_path / "broken", name) == column(undisturbed[0], name)
    assert rows(tmp_path / "broken" / "eval.jsonl") == rows(undisturbed[0] / "eval.jsonl")
    jax.tree.map(np.testing.assert_array_equal, result.params, undisturbed[1].params)


@pytest.mark.everything
def test_early_stopping_and_callbacks_end_a_run_that_can_go_on_bit_for_bit(undisturbed, tmp_path):
    calls = []

    def run(end=lambda name, step: None, **fields):
        """The run, which `end` may end; notes (name, step, what) of each call of a callback."""

        def noted(name):
            return lambda step, what: calls.append((name, step, what)) or end(name, step)

        names = ("on_step", "on_eval", "on_save")
        callbacks = Callbacks(**{name: noted(name) for name in names})
        return train(config_of(**UNDISTURBED | fields), tmp_path, callbacks=callbacks)

    def cut_off(name, step):
        if (name, step) == ("on_step", 2):
            raise Cut

    # Nothing improves by so much: the run ends after two evaluations, of which the second comes after a cut.
    never = {"early_stopping.metric": "eval/loss", "early_stopping.min_delta": 9.0, "early_stopping.patience": 2}
    with pytest.raises(Cut):
        run(cut_off, **never, eval_steps=1)
    assert [call[:2] for call in calls[-4:]] == [("on_step", 1), ("on_eval", 1), ("on_save", 1), ("on_step", 2)]
    assert {"step": 1, **calls[-4][2]} == rows(tmp_path / "metrics.jsonl")[0]
    assert {"step": 1, **calls[-3][2]} == rows(tmp_path / "eval.jsonl")[1]
    assert (calls[-2][2] / "manifest.json").exists()
    result = run(**never, eval_steps=1)
    assert (result.step, result.stopped) == (2, False) and read_run(tmp_path, "").finished
    assert [row["step"] for row in rows(tmp_path / "eval.jsonl")] == [0, 1, 2]
    result = run(lambda name, step: (name, step) == ("on_step", 3))
    assert (result.step, result.stopped) == (4, False)  # step 4 was running by then
    assert column(tmp_path) == column(undisturbed[0])[:4]
    assert rows(tmp_path / "eval.jsonl")[-1] == rows(undisturbed[0] / "eval.jsonl")[-2]


EARLY = {"data.eval_fraction": 0.3, "data.shuffle": True, "steps": 12, "eval_steps": 1, "learning_rate": 0.05}
EARLY |= {"early_stopping.metric": "eval/loss", "early_stopping.patience": 2}
EARLY |= {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}


@pytest.mark.everything
def test_early_stopping_on_eight_devices_ends_a_resumed_run_where_it_ends_the_undisturbed_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = train(config_of(**EARLY), whole)
    evaluated = {row["step"]: row["eval/loss"] for row in rows(whole / "eval.jsonl")}
    best = min(evaluated, key=evaluated.get)
    assert 0 < best and [*evaluated][-1] == result.step == best + 2 < 12 and not result.stopped
    assert read_run(whole, "").finished
    exported = (whole / "export" / "model.safetensors").read_bytes()
    assert exported == (export_kept(whole, str(best)) / "model.safetensors").read_bytes()
    assert exported != (export_kept(whole, "last") / "model.safetensors").read_bytes()

    def cut_off(step, metrics):
        if step == best + 1:
            raise Cut  # one evaluation has been waited for, and the next one comes

    with pytest.raises(Cut):
        train(config_of(**EARLY), broken, callbacks=Callbacks(on_step=cut_off))
    for _ in range(2):  # the second time it is complete
        again = train(config_of(**EARLY), broken)
        assert again.step == result.step and not again.stopped and again.after == result.after
        assert rows(broken / "eval.jsonl") == rows(whole / "eval.jsonl")
        for name in ("loss", "grad_norm"):
            assert column(broken, name) == column(whole, name)
        assert (broken / "export" / "model.safetensors").read_bytes() == exported


def test_two_runs_do_not_write_in_one_directory(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="another run is writing there"):
        train(config_of(), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_changed_weights_are_not_resumed(tmp_path):
    model = shutil.copytree(TRL, tmp_path / "model")
    fields = {"model.path": str(model), "export.enabled": False}
    train(config_of(**fields, steps=1), tmp_path / "run")
    weights = load_file(model / "model.safetensors")
    save_file({name: x * 1.5 for name, x in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="weights in model.path have changed"):
        train(config_of(**fields, steps=2), tmp_path / "run")


def test_random_weights_have_a_row_for_every_token_and_another_reference_is_read(tmp_path):
    model = shutil.copytree(TRL, tmp_path / "model")
    shape = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**shape, "vocab_size": 300}))
    fields = {"model.path": str(model), "model.random_init": True, "reference.path": str(TRL), "steps": 1}
    result = train(config_of(**fields), tmp_path / "run")
    assert result.model.config.vocab_size == 512  # the tokenizer's
    assert abs(column(tmp_path / "run")[0] - np.log(2)) > 1e-3  # policy and reference differ from the start


@pytest.mark.everything
def test_a_longer_run_goes_on_where_the_shorter_ended(runs, tmp_path):
    fields = {"export.enabled": False, "mesh.data": 8}
    train(config_of(**fields, steps=3), tmp_path)
    train(config_of(**fields, steps=5), tmp_path)
    np.testing.assert_array_equal(column(tmp_path), column(runs["dpo"][0])[:5])


@pytest.mark.parametrize(
    ("loss", "fields"),
    [
        longer("bco", {}),
        longer("dpo", {"reference.kind": "moving", "reference.mixup": 0.5, "reference.every": 2}),
        longer("mpo", {"micro_steps": 2}),
    ],
    ids=["running shift", "moving reference", "mixture in micro-steps"],
)
def test_what_a_run_carries_besides_its_weights_is_resumed_too(loss, fields, tmp_path):
    usual = {"export.enabled": False, "data.eval_fraction": 0.2}
    train(config_of(loss, **usual, **fields, steps=5), tmp_path / "whole")
    for steps in (3, 5):
        train(config_of(loss, **usual, **fields, steps=steps), tmp_path / "parts")
    for name in ("loss", "grad_norm"):
        np.testing.assert_array_equal(column(tmp_path / "parts", name), column(tmp_path / "whole", name))
    assert rows(tmp_path / "parts" / "eval.jsonl")[-1] == rows(tmp_path / "whole" / "eval.jsonl")[-1]


def test_a_moving_reference_makes_the_margin_small_again(runs, tmp_path):
    fields = {"reference.kind": "moving", "reference.mixup": 1.0, "reference.every": 2, "export.enabled": False}
    train(config_of(**fields, steps=4), tmp_path)
    frozen = column(runs["dpo"][0])
    np.testing.assert_allclose(column(tmp_path)[:2], frozen[:2], atol=1e-6)
    np.testing.assert_allclose(column(tmp_path)[2], np.log(2), atol=1e-6)  # it is the policy's copy after step 2
    assert frozen[2] < np.log(2) - 0.01


@pytest.mark.parametrize("loss", [longer("kto"), longer("bco_unpaired"), longer("apo_zero_unpaired")])
def test_preference_rows_train_a_loss_of_single_completions(loss, tmp_path, capfd):
    fields = {"export.enabled": False, "data.eval_fraction": 0.2, "micro_steps": 2, "learning_rate": 1e-2}
    train(config_of(loss, **fields, **{"data.shuffle": True}), tmp_path)
    first, last = rows(tmp_path / "eval.jsonl")[0], rows(tmp_path / "eval.jsonl")[-1]
    assert abs(first["eval/loss"] - (np.log(2) if loss == "bco_unpaired" else 0.5)) < 1e-6
    assert last["eval/loss"] < first["eval/loss"]
    assert last["eval/rewards/chosen"] > last["eval/rewards/rejected"]
    assert "completions" in capfd.readouterr().err
    if loss == "kto":
        assert last["eval/kl"] >= 0


def test_a_reward_model_starts_at_log_2_learns_and_is_exported_as_a_classifier(tmp_path):
    fields = {"data.eval_fraction": 0.2, "loss.centre": 0.01, "learning_rate": 1e-2, "data.layout": "ordinary"}
    result = train(config_of("bradley_terry", **fields), tmp_path)
    assert abs(column(tmp_path)[0] - np.log(2)) < 1e-6
    assert result.after["eval/loss"] < result.before["eval/loss"]
    exported = json.loads((tmp_path / "export" / "config.json").read_text())
    assert exported["architectures"] == ["LlamaForSequenceClassification"]
    again = train(config_of("bradley_terry", **{"model.path": str(tmp_path / "export"), "steps": 1}), tmp_path / "on")
    assert column(tmp_path / "on")[0] < np.log(2) and again.step == 1  # it goes on from what was learned


@pytest.mark.parametrize(
    "fields", [longer({}), longer({"model.quantize": "nf4", "lora.dora": True})], ids=["LoRA", "DoRA over nf4"]
)
def test_adapters_are_trained_resumed_and_exported_and_the_base_stays_as_it_is(fields, tmp_path):
    fields = {**fields, "lora.rank": 4, "learning_rate": 5e-3, "data.eval_fraction": 0.2}
    train(config_of(**fields, steps=5), tmp_path / "whole")
    train(config_of(**fields, steps=3), tmp_path / "parts")
    result = train(config_of(**fields, steps=5), tmp_path / "parts")
    np.testing.assert_array_equal(column(tmp_path / "parts"), column(tmp_path / "whole"))
    assert abs(column(tmp_path / "whole")[0] - np.log(2)) < 1e-5  # the reference is the base, quantized or not
    assert result.after["eval/loss"] < result.before["eval/loss"] - 0.05
    (saved,) = (tmp_path / "whole" / "adapters").glob("*.safetensors")
    names = load_file(saved)
    assert all(".lora_" in name for name in names) and any(np.any(x) for n, x in names.items() if "lora_B" in n)
    merged, base = load_file(tmp_path / "whole" / "export" / "model.safetensors"), load_file(TRL / "model.safetensors")
    for name, weights in base.items():
        assert np.any(merged[name] != weights) == ("proj" in name), name
    stored = sum(file.stat().st_size for file in (tmp_path / "whole" / "checkpoints").rglob("*") if file.is_file())
    assert stored < sum(weights.nbytes for weights in base.values())  # adapters and their moments alone


@pytest.mark.everything
def test_adapters_go_on_from_their_files_and_what_they_began_as_is_the_reference(tmp_path):
    fields = {"learning_rate": 5e-3, "data.eval_fraction": 0.2, "steps": 4}
    fields |= {"reference.kind": "cached", "reference.cache_dir": str(tmp_path / "cache")}  # one for both references
    first = train(config_of(**fields, **{"lora.rank": 4}), tmp_path / "first")
    fields |= {"lora.path": str(tmp_path / "first" / "adapters"), "lora.dropout": 0.1}
    second = train(config_of(**fields), tmp_path / "second")
    assert second.before["eval/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert second.before["eval/logps/chosen"] == pytest.approx(first.after["eval/logps/chosen"], rel=1e-5)
    assert second.after["eval/loss"] < second.before["eval/loss"] - 0.02
    both = [load_file(tmp_path / run / "adapters" / "adapter_model.safetensors") for run in ("first", "second")]
    assert both[0].keys() == both[1].keys() and any(np.any(both[0][name] != both[1][name]) for name in both[0])
    assert (
        load_file(tmp_path / "second" / "export" / "model.safetensors").keys()
        == load_file(TRL / "model.safetensors").keys()
    )


@pytest.fixture(scope="module")
def new_tokens(tmp_path_factory):
    """Adapters trained with a chat template whose tokens the base lacks: (workdir, Result)."""
    workdir = tmp_path_factory.mktemp("new_tokens")
    pairs = [json.loads(line) for line in (TRL / "pairs.jsonl").read_text().splitlines()[:8]]
    chats = [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        for row in pairs
    ]
    (workdir / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    fields = {"data.path": str(workdir / "chats.jsonl"), "data.chat_template": "llama3", "lora.rank": 4, "steps": 3}
    return workdir, train(config_of(**fields), workdir / "run")


@pytest.mark.everything
def test_tokens_that_a_template_adds_are_trained_beside_adapters(new_tokens):
    workdir, result = new_tokens
    old = load_file(TRL / "model.safetensors")["model.embed_tokens.weight"]
    stored = load_file(workdir / "run" / "adapters" / "adapter_model.safetensors")
    embedding, head = (stored[f"base_model.model.{name}.weight"] for name in ("model.embed_tokens", "lm_head"))
    assert len(embedding) == len(head) == len(result.tokenizer) > len(old)
    ids = result.tokenizer.convert_tokens_to_ids(["<|start_header_id|>", "<|eot_id|>"])
    assert np.any(embedding[ids[0]] != embedding[ids[1]]) and np.any(head[ids[0]] != head[ids[1]])  # no longer alike
    merged = load_file(workdir / "run" / "export" / "model.safetensors")
    np.testing.assert_array_equal(merged["model.embed_tokens.weight"], embedding)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_peft_takes_adapters_with_new_tokens(new_tokens):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    workdir, result = new_tokens
    base = AutoModelForCausalLM.from_pretrained(TRL, dtype=torch.float32)
    base.resize_token_embeddings(len(result.tokenizer))
    adapted = peft.PeftModel.from_pretrained(base, workdir / "run" / "adapters").eval()
    merged = AutoModelForCausalLM.from_pretrained(workdir / "run" / "export", dtype=torch.float32).eval()
    tokens = torch.arange(len(result.tokenizer) - 20, len(result.tokenizer))[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """TRL's model rounded to bfloat16, stored so and in float32: {type: directory}."""
    made = {}
    for name in ("bfloat16", "float32"):
        made[name] = tmp_path_factory.mktemp(name) / "model"
        shutil.copytree(TRL, made[name])
        rounded = {key: x.astype(ml_dtypes.bfloat16) for key, x in load_file(TRL / "model.safetensors").items()}
        save_file({key: x.astype(name) for key, x in rounded.items()}, made[name] / "model.safetensors")
    return made


def types_of(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


@pytest.mark.everything
def test_weights_are_trained_in_param_dtype_and_a_frozen_base_keeps_its_stored_type(halves):
    mesh = make_mesh({"data": -1})
    for param_dtype, trained in (("float32", "float32"), ("bfloat16", "bfloat16"), ("stored", "bfloat16")):
        config = config_of(**{"model.param_dtype": param_dtype})
        load = functools.partial(assemble.load_model, config, str(halves["bfloat16"]), mesh, 0)
        assert types_of(load()[1]) == {trained}
        assert types_of(load(lora=Lora())[1]) == {"bfloat16"}
        drawn = "bfloat16" if param_dtype == "bfloat16" else "float32"
        assert types_of(load(random_init=True)[1]) == {drawn}
        assert assemble.drawn_dtype(config) == drawn


@pytest.mark.everything
def test_a_base_in_bfloat16_gives_the_numbers_of_its_widened_copy(halves, tmp_path):
    for name, path in halves.items():
        fields = {"model.path": str(path), "lora.rank": 4, "learning_rate": 5e-3, "steps": 3, "mesh.data": 8}
        fields["export.dtype"] = "float32"
        train(config_of(**fields), tmp_path / name)
    for metric in ("loss", "grad_norm"):
        assert column(tmp_path / "bfloat16", metric) == column(tmp_path / "float32", metric)
    for file in ("adapters/adapter_model.safetensors", "export/model.safetensors"):  # merged in float32
        found, wanted = (load_file(tmp_path / name / file) for name in ("bfloat16", "float32"))
        assert {x.dtype.name for x in found.values()} == {"float32"}
        for key in wanted:
            np.testing.assert_array_equal(found[key], wanted[key], err_msg=key)


@pytest.mark.everything
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_is_quantized_on_its_way_whether_read_or_drawn(kind, halves):
    mesh = make_mesh({"fsdp": -1})
    load = functools.partial(assemble.load_model, mesh=mesh, tokens=0, lora=Lora())
    config = config_of(**{"model.quantize": kind, "lora.rank": 16})
    for options in ({"path": str(halves["float32"])}, {"path": str(TRL), "random_init": True}):
        _, found = load(config, **options)
        _, plain = load(config_of(), **options)
        wanted = quantize_params(plain, kind)
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        if "random_init" not in options:
            jax.tree.map(np.testing.assert_array_equal, found, wanted)
        assert jax.tree.map(lambda x: x.sharding, found) == param_shardings(mesh, wanted)


def test_adapters_of_a_reward_model_train_its_score_as_well(tmp_path):
    fields = {"lora.rank": 4, "learning_rate": 5e-3, "data.eval_fraction": 0.2, "steps": 6}
    result = train(config_of("bradley_terry", **fields), tmp_path / "run")
    assert result.before["eval/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert result.after["eval/loss"] < np.log(2) - 0.02
    merged = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert np.any(merged["score.weight"]) and "lm_head.weight" not in merged


@pytest.mark.everything
@pytest.mark.parametrize("name", ["ld_dpo", "sampo"])
def test_cached_sums_over_parts_of_responses_are_those_of_a_frozen_copy(name, tmp_path):
    for kind in ("copy", "cached"):
        fields = {"steps": 2, "reference.kind": kind, "reference.path": str(TRL), "export.enabled": False}
        fields |= {
            "model.random_init": True,
            "reference.cache_dir": None if kind == "copy" else str(tmp_path / "cache"),
        }
        config = config_of(name, **{key: value for key, value in fields.items() if value is not None})
        train(config, tmp_path / kind)
    np.testing.assert_allclose(column(tmp_path / "cached"), column(tmp_path / "copy"), atol=1e-5)
    assert abs(column(tmp_path / "copy")[0] - np.log(2)) > 1e-3


@pytest.mark.everything
def test_the_own_loss_of_the_docs_trains_from_a_config_of_its_own(tmp_path):
    page = (ROOT / "docs" / "own_losses.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "get_config" in block)
    assert len([line for line in code.splitlines() if line.strip()]) < 20 and code.count("def ") == 2
    file = tmp_path / "my_loss.py"
    file.write_text(code.replace("MODEL", str(TRL)).replace("DATA", str(TRL / "pairs.jsonl")))
    command = [sys.executable, "scripts/train.py", f"--config={file}", "--config.steps=2", "--config.max_length=256"]
    out = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}", "--config.loss.beta=0.2"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": FAST_TO_COMPILE},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert abs(column(tmp_path / "run")[0] - np.log(2)) < 1e-6
    assert LOSSES.keys().isdisjoint({"cauchy"})  # the package was not touched
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "`cauchy`: log(1 + (1 - beta h)^2)" in card and "| beta | 0.2 |" in card


@pytest.mark.everything
def test_the_best_checkpoint_by_a_held_out_metric_stays(tmp_path):
    fields = {
        "data.eval_fraction": 0.3,
        "eval_steps": 1,
        "save_steps": 1,
        "checkpoint.keep": 1,
        "export.enabled": False,
    }
    # A rate that soon does harm, so that the best is not the last.
    train(config_of(**fields, **{"steps": 6, "checkpoint.best_metric": "eval/loss", "learning_rate": 0.05}), tmp_path)
    losses = {row["step"]: row["eval/loss"] for row in rows(tmp_path / "eval.jsonl") if row["step"] > 0}
    best = min(losses, key=losses.get)
    assert best != 6
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()} == {best, 6}


def test_nothing_left_to_train_on_says_what_was_dropped(tmp_path):
    with pytest.raises(UserError, match="64"):
        train(config_of(max_length=3), tmp_path)


def test_a_max_length_beyond_the_models_positions_is_said_before_data_are_read(tmp_path):
    fields = {"max_length": 10**6, "data.path": str(tmp_path / "nowhere.jsonl")}
    with pytest.raises(UserError, match="max_length=1000000 exceeds the model's"):
        train(config_of(**fields), tmp_path)
    with pytest.raises(UserError, match="nowhere.jsonl: no such file"):
        train(config_of(**{**fields, "max_length": None}), tmp_path)


def test_divergence_stops_the_run(tmp_path):
    with pytest.raises(UserError, match="diverged at step"):
        train(config_of(learning_rate=1e30), tmp_path)
