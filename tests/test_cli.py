"""What every command does with its command line; tests/test_trl_mistakes.py has what users of TRL type."""

import configparser
import gc
import glob
import importlib
import os
import pathlib
import subprocess
import sys

import pytest
import yaml

from prefalign_jax import commands
from prefalign_jax.cli import experiments, parser
from prefalign_jax.exits import STOPPED
from prefalign_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("launch_leaves_no_trace")
DPO = f"--config={ROOT}/experiments/dpo.py:model=m,data=d"


@pytest.fixture
def launch(monkeypatch, capsys):
    """launch(*arguments, main) -> (status, stdout, stderr, [(config, workdir) that main was called with])."""

    def run(*arguments, main=lambda config, workdir: None):
        calls = []

        def called(config, workdir):
            calls.append((config, workdir))
            return main(config, workdir)

        monkeypatch.setattr("prefalign_jax.commands.train.run_job", called)
        status = commands.main(["train", *arguments])
        return status, *capsys.readouterr(), calls

    return run


@pytest.fixture
def fails(launch):
    """fails(*arguments) -> what the one line says; main is not reached and the status is 2."""

    def run(*arguments, **options):
        status, out, err, calls = launch(*arguments, **options)
        assert (status, out) == (2, "")
        lines = err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1
        assert [line for line in lines if line not in errors and not line.startswith("workdir: ")] == []
        if "main" not in options:
            assert calls == []
        assert "Traceback" not in err
        assert len(errors[0]) < 250
        return errors[0]

    return run


def write(path: pathlib.Path, body: str) -> str:
    path.write_text("from prefalign_jax import config, types\n\n\ndef get_config(arg=''):\n" + body)
    return f"--config={path}"


# What works


def test_config_overrides_and_workdir_reach_main(launch):
    status, out, err, [(config, workdir)] = launch(
        DPO, "--config.batch_size=8", "--config.loss.beta=0.5", "--config.data.limit", "9", "--workdir=here"
    )
    assert (status, out, err, workdir) == (0, "", "", pathlib.Path("here"))
    assert (config.model.path, config.data.path) == ("m", "d")
    assert (config.batch_size, config.loss.beta, config.data.limit, config.seed) == (8, 0.5, 9, 0)


@pytest.mark.parametrize("words", ["data.shuffle=false", "data.shuffle=0", "data.shuffle False"])
def test_a_boolean_is_set_either_way(launch, words):
    *_, [(config, _)] = launch(DPO, "--config.data.keep_end", *f"--config.{words}".split(), "--noconfig.tensorboard")
    assert (config.data.keep_end, config.data.shuffle, config.tensorboard) == (True, False, False)


def test_fields_are_read_by_their_types(launch):
    words = ["--config.learning_rate=1", "--config.data.mix=({'path': 'a, b'},)", "--config.loss.name=dpo + 0.2*sft"]
    *_, [(config, _)] = launch(f"--config={ROOT}/experiments/dpo.py", *words, "--config.data.eval_fraction", "1e-1")
    assert (config.learning_rate, type(config.learning_rate), config.data.eval_fraction) == (1.0, float, 0.1)
    assert (config.data.mix[0]["path"], config.loss.name) == ("a, b", "dpo + 0.2*sft")


def test_the_last_of_two_settings_counts_and_what_is_derived_follows(launch, tmp_path):
    body = "    c = config.defaults()\n    c.steps = 9\n    c.eval_steps = c.get_ref('steps') // 3\n    return c\n"
    *_, [(config, _)] = launch(write(tmp_path / "mine.py", body), "--config.steps=30", "--config.steps=60")
    assert (config.steps, config.eval_steps) == (60, 20)


def test_an_experiment_of_the_package_is_found_by_its_name(launch):
    *_, [(config, workdir)] = launch("--config=orpo:model=m,data=Anthropic/hh-rlhf:harmless-base")
    assert (config.loss.name, config.data.path) == ("orpo", "Anthropic/hh-rlhf:harmless-base")
    assert workdir == pathlib.Path("runs/orpo")
    assert launch("--config=handbook/zephyr_7b_dpo:qlora")[3][0][0].lora.rank == 128


@pytest.mark.parametrize("config", [[DPO], ["--config", DPO.partition("=")[2]], [DPO[1:]]])
def test_the_working_directory_is_named_after_the_experiment(launch, config):
    status, _, err, [(_, workdir)] = launch(*config)
    assert (status, workdir) == (0, pathlib.Path("runs/dpo"))
    assert err == "workdir: runs/dpo\n"


def test_the_status_of_main_is_passed_on(launch):
    assert [launch(DPO, main=lambda config, workdir, s=s: s)[0] for s in (None, 0, 1, STOPPED)] == [
        0,
        0,
        1,
        143,
    ]


def test_print_config_prints_what_a_run_would_use_and_runs_nothing(launch):
    status, out, err, calls = launch(DPO, "--config.loss.beta=0.3", "--print_config")
    assert (status, err, calls) == (0, "", [])
    plain = yaml.safe_load(out)
    assert plain["loss"] == dict(name="dpo", beta=0.3, label_smoothing=0.0, reference_free=False)
    assert plain["data"]["path"] == "d"


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], [DPO, "--help"], ["--help", "--workdir=x"]])
def test_help_names_the_options(launch, arguments):
    status, out, err, calls = launch(*arguments)
    assert (status, err, calls) == (0, "", [])
    assert all(option in out for option in ("usage: prefalign train", "--config", "--workdir", "print_config"))


# Mistakes


@pytest.mark.parametrize(
    ("override", "wrong", "right"),
    [
        ("--config.batchsize=4", "batchsize", "batch_size"),
        ("--config.loss.bta=1", "loss.bta", "loss.beta"),
        ("--config.mesh.dataa=1", "mesh.dataa", "mesh.data"),
        ("--config.optimizer.rank=1", "optimizer.rank", "lora.rank"),
        ("--config.datas.path=x", "datas.path", "data.path"),
        ("--config.data.eval_frac=0.1", "data.eval_frac", "data.eval_fraction"),  # no option eval_* of TRL's
        ("--config.eval_frac=0.1", "eval_frac", "data.eval_fraction"),
        ("--config.save_step=5", "save_step", "save_steps"),
    ],
)
def test_a_mistyped_field_names_the_nearest(fails, override, wrong, right):
    said = fails(DPO, override)
    assert f"no field {wrong!r}" in said
    assert f"did you mean {right!r}" in said


@pytest.mark.parametrize("word", ["--confg.steps=5", "--cofnig.steps=5", "--conf.steps=5"])
def test_a_mistyped_config_is_no_option_of_its_fields_name(fails, word):
    assert "did you mean '--config.steps'?" in fails(DPO, word)


def test_a_field_unlike_any_other_is_named(fails):
    assert "no field 'zzzzz'" in fails(DPO, "--config.zzzzz=4")


def test_a_mistyped_argument_names_the_nearest(fails):
    assert "'modle' is unknown; did you mean 'model'" in fails(f"--config={ROOT}/experiments/dpo.py:modle=m")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import jax.numpy as jnp\njnp.log1pp", "line 2: AttributeError: module 'jax.numpy' has no attribute 'log1pp'"),
        ("{}['foo']", "line 1: KeyError: 'foo'"),
        ("from prefalign_jax.losses import Losss", "line 1: ImportError: cannot import name 'Losss'"),
        ("1 + ''", "line 1: TypeError: unsupported operand"),
    ],
)
def test_an_experiment_file_that_fails_is_named_with_its_line(fails, tmp_path, code, says):
    file = tmp_path / "my_loss.py"
    file.write_text(code)
    assert f"error: {file}, {says}" in fails(f"--config={file}")


def test_commas_in_the_brackets_of_a_loss_are_its_own(launch):
    loss = "0.5*dpo(beta=0.3,label_smoothing=0.1)+sft"
    status, out, *_ = launch(f"--config={ROOT}/experiments/dpo.py:loss={loss},model=m,data=d", "--print_config")
    assert status == 0
    plain = yaml.safe_load(out)["loss"]
    assert (plain["name"], plain["dpo.beta"], plain["dpo.label_smoothing"]) == (loss, 0.3, 0.1)


def test_a_mistyped_loss_names_the_nearest(fails):
    said = fails(f"--config={ROOT}/experiments/dpo.py:model=m,loss=dppo")
    assert "'dppo'" in said
    assert "did you mean 'dpo'" in said


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_size", "many"), ("batch_size", "1.5"), ("steps", "x"), ("learning_rate", "low"), ("data.shuffle", "maybe")]
    + [("optimizer.b1", "x"), ("loss", "ipo"), ("model", "5")],
)
def test_a_value_of_the_wrong_type_names_the_field(fails, field, value):
    said = fails(DPO, f"--config.{field}={value}")
    assert f"config.{field}" in said
    assert value in said


def test_a_field_of_a_field_that_has_none_is_one_line(fails):
    assert "loss.name" in fails(DPO, "--config.loss.name.first=1")


@pytest.mark.parametrize("more", [[], ["--print_config"], ["--config.seed=1"], ["--config.seed=1", "--print_config"]])
def test_a_missing_file_is_named(fails, more):
    assert "--config=missing.py: no such file" in fails("--config=missing.py:model=m", *more)


def test_a_directory_is_no_experiment(fails, tmp_path):
    assert f"--config={tmp_path} is a directory" in fails(f"--config={tmp_path}")


@pytest.mark.parametrize("arguments", [[], ["--config="], ["--workdir=x"]])
def test_no_experiment_says_what_to_write(fails, arguments):
    assert "--config=" in fails(*arguments)


@pytest.mark.parametrize(("wrong", "right"), [("wrkdir=x", "workdir"), ("print_confg", "print_config")])
def test_an_unknown_flag_names_the_nearest(fails, wrong, right):
    said = fails(DPO, f"--{wrong}")
    assert wrong.split("=")[0] in said
    assert right in said


@pytest.mark.parametrize("arguments", [[DPO, "extra"], ["extra", DPO]])
def test_a_stray_word_is_named(fails, arguments):
    assert "'extra'" in fails(*arguments)


def test_a_flag_without_its_value_is_named(fails):
    assert "workdir" in fails(DPO, "--workdir")
    assert "config.seed" in fails(DPO, "--config.seed")


def test_a_contradiction_is_found_before_anything_is_printed(fails):
    assert "'lam'" in fails(DPO, "--config.loss.lam=3", "--print_config")


def test_what_an_experiment_refuses_is_one_line(fails, tmp_path):
    body = "    raise types.UserError(f'no such world: {arg}')\n"
    assert fails(write(tmp_path / "mine.py", body) + ":mars") == "error: no such world: mars"


def test_a_mistyped_field_in_an_experiment_names_the_nearest(fails, tmp_path):
    said = fails(write(tmp_path / "mine.py", "    c = config.defaults()\n    c.learning_ratee = 1\n    return c\n"))
    assert "no field 'learning_ratee'" in said
    assert "did you mean 'learning_rate'" in said


def test_a_wrong_type_in_an_experiment_is_one_line(fails, tmp_path):
    body = "    c = config.defaults()\n    c.batch_size = 'x'\n    return c\n"
    assert "batch_size" in fails(write(tmp_path / "mine.py", body))


def test_an_experiment_that_returns_nothing_is_refused(launch, tmp_path):
    status, _, err, calls = launch(write(tmp_path / "mine.py", "    config.defaults()\n"))
    assert (status, calls) == (2, [])
    assert "error: " in err


def test_a_mistake_found_by_main_is_one_line(fails):
    def main(config, workdir):
        raise UserError("row 3 of d: no prompt")

    assert fails(DPO, main=main) == "error: row 3 of d: no prompt"


def test_a_fault_of_the_program_keeps_its_traceback(launch):
    def main(config, workdir):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        launch(DPO, main=main)


def test_an_interrupt_ends_with_130(launch):
    def main(config, workdir):
        raise KeyboardInterrupt

    status, out, err, _ = launch(DPO, "--workdir=w", main=main)
    assert (status, out) == (130, "")
    assert err == "interrupted\n"


# The compilation cache


@pytest.mark.parametrize(("mine", "kept"), [(None, "/somewhere/prefalign_jax/xla"), ("/my/place", "/my/place")])
def test_compiled_programs_are_kept_where_the_user_says(monkeypatch, mine, kept):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    if mine:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", mine)
    parser.set_environment()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == kept


@pytest.mark.parametrize(("mine", "kept"), [(700, 500_000), (10**9, 10**9), (0, 0)])
def test_garbage_is_looked_for_seldom_and_as_the_user_says_where_that_is_seldomer(monkeypatch, mine, kept):
    before = gc.get_threshold()
    try:
        gc.set_threshold(mine)
        parser.set_environment()
        assert gc.get_threshold()[0] == kept
    finally:
        gc.set_threshold(*before)


# Every command


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_a_command_says_what_it_does_and_hints(command, capsys):
    for word in ("-h", "--help"):
        assert commands.main([command, word]) == 0
        assert f"usage: prefalign {command}" in capsys.readouterr().out
    assert commands.main([command, "--hepl"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("trian", "no command 'trian'; did you mean 'train'?"),
        ("--config=dpo", "prefalign train --config=dpo"),
        ("dpo", "prefalign train --config=dpo"),
        ("list loss", "list='loss' is unknown; did you mean 'losses'?"),
        ("sweep --config=quickstart", "--workdir must be given"),
        ("sweep --config=quickstart --workdir=w --jobs=two", "--jobs: invalid int value: 'two'"),
        ("report d --metric=loss", "--metric: no such option; did you mean '--metrics'?"),
        ("sweep --config=quickstart --work-dir=w", "--work-dir: no such option; did you mean '--workdir'?"),
        ("report", "DIR must be given"),
        ("generate --model_name_or_path=m --prompts=p --out=o", "--model_name_or_path: no such option"),
    ],
)
def test_a_mistyped_command_is_one_line(words, says, capsys):
    assert commands.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_no_command_lists_them(capsys):
    assert commands.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said and what in said for name, what in commands.COMMANDS.items())


def test_list_names_everything(capsys):
    from prefalign_jax.losses import LOSSES

    assert commands.main(["list"]) == 0
    said = capsys.readouterr().out
    for name in (*LOSSES, *experiments.experiments(), "qwen3_moe", "ultrafeedback", "chatml"):
        assert f" {name}" in said, name
    assert "DPO of any model on any preference data." in said
    assert commands.main(["list", "templates"]) == 0
    names = capsys.readouterr().out.splitlines()[1].split(", ")
    assert names == ["  chatml", "chatml_tools", "llama3", "zephyr"]


def test_every_experiment_comes_with_the_package_and_says_what_it_is():
    files = {path for path in (ROOT / "experiments").rglob("*.py") if path.parent.name != "notebooks"}
    known = experiments.experiments()
    assert {path.relative_to(ROOT / "experiments").with_suffix("").as_posix() for path in files} == set(known)
    assert all(experiments.summary(file).endswith(".") for file in known.values())


def test_the_wheel_has_the_experiments_and_the_command():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["prefalign_jax"].split()
    packed = {
        file for pattern in patterns for file in glob.glob(pattern, root_dir=ROOT / "prefalign_jax", recursive=True)
    }
    files = [path for path in (ROOT / "experiments").rglob("*.*") if "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in files} <= packed
    name, target = setup["options.entry_points"]["console_scripts"].strip().split(" = ")
    module, _, function = target.partition(":")
    assert (name, getattr(importlib.import_module(module), function)) == ("prefalign", commands.main)


HEAVY = ("jax", "flax", "transformers", "datasets", "matplotlib", "orbax", "grain")
QUICK = ["--help", *(f"{name} --help" for name in commands.COMMANDS), "train --workdri=w", "train --learning_rate=1"]


RUN = f"""
import sys
from prefalign_jax import commands
for words in sys.argv[1:]:
    commands.main(words.split())
    print(">", *({set(HEAVY)} & set(sys.modules)))
"""


def test_help_and_a_mistyped_option_import_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", RUN, *QUICK], capture_output=True, text=True, check=True)
    loaded = [line for line in done.stdout.splitlines() if line.startswith(">")]
    assert loaded == [">"] * len(QUICK), dict(zip(QUICK, loaded, strict=True))


def test_a_closed_pipe_is_no_fault():
    command = f"{sys.executable} -m prefalign_jax list experiments | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode in (0, 141) and done.stderr == ""


def test_scripts_are_a_name_and_one_call():
    for path in (ROOT / "scripts").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 25, path
