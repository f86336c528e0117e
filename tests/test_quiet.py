"""Each library is asked, in a process of its own, whether it is silent: what it reads is its business."""

import asyncio
import logging
import os
import subprocess
import sys
import types

import pytest

from prefalign_jax import quiet

ADVICE = "import transformers; transformers.utils.logging.get_logger('transformers').warning_advice('said')"
HUB = "import huggingface_hub.utils._http as http; http.logger.warning('said')"


def output(code, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in quiet.SILENCED}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("says", [ADVICE, HUB], ids=["transformers", "hub"])
def test_a_library_is_silent_after_the_package_is_imported(says):
    assert "said" in output(says)  # as it is without
    assert "said" not in output(f"import prefalign_jax; {says}")


def test_xla_is_silent_before_jax_gives_it_a_level_of_its_own():
    assert output("import prefalign_jax.types, jax, os; print(os.environ['TF_CPP_MIN_LOG_LEVEL'])") == "3\n"


def test_what_a_user_has_set_stays(monkeypatch):
    for name in quiet.SILENCED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    quiet.silence()
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"
    assert os.environ["HF_HUB_VERBOSITY"] == quiet.SILENCED["HF_HUB_VERBOSITY"]


def test_only_what_orbax_says_of_a_failed_write_is_dropped(monkeypatch, caplog):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    for _ in range(2):
        quiet.hush_failed_writes()
    loop = asyncio.new_event_loop()
    loop.close()
    late, own = (
        pytest.raises(RuntimeError, loop.call_soon, print).value,
        pytest.raises(ZeroDivisionError, eval, "1/0").value,
    )
    theirs = pytest.raises(ValueError, exec, compile("raise ValueError", "/lib/orbax/future.py", "exec")).value
    for error in (late, theirs, own):
        logging.getLogger("asyncio").error("%s", type(error).__name__, exc_info=error)
        sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    assert [record.message for record in caplog.records] == ["ZeroDivisionError"]
    assert [unraisable.exc_value for unraisable in shown] == [own]
