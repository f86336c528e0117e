"""The suite itself: the flags that it sets, and its two tiers."""

import os
import pathlib
import subprocess
import sys

import pytest

import conftest

pytest_plugins = "pytester"

TIERS = """
import pytest

def test_core():
    pass

@pytest.mark.everything
@pytest.mark.parametrize("n", range(3))
def test_longer(n):
    pass
"""


@pytest.mark.everything
def test_a_flag_that_xla_does_not_know_is_left_out():
    known = "--xla_cpu_enable_fast_math=false"
    assert conftest.known(["--xla_no_such_flag=1", known]) == [known]


def test_what_makes_compiling_fast_is_known_to_this_version():
    assert "--xla_backend_optimization_level=0" in conftest.FAST_TO_COMPILE


@pytest.mark.parametrize(("options", "passed", "left_out"), [([], 1, 3), (["--everything"], 4, 0)])
def test_what_only_takes_longer_is_left_out_and_counted(pytester, options, passed, left_out):
    pytester.makeini("[pytest]\nmarkers = everything")
    pytester.makepyfile(TIERS)
    found = pytester.inline_run("-p", "no:cacheprovider", *options, plugins=[conftest])
    found.assertoutcome(passed=passed)
    assert sum(len(call.items) for call in found.getcalls("pytest_deselected")) == left_out


@pytest.mark.everything
def test_workers_count_it_too(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = everything")
    (tmp_path / "test_tiers.py").write_text(TIERS)
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "-p", "conftest"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])}
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "1 passed, 3 deselected" in out.stdout, out.stdout + out.stderr
