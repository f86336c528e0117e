"""What a start need not import is not imported: each import is asked for in a process of its own."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from prefalign_jax.torch_free import without_torch

# Each takes a tenth of a second to two seconds.
SLOW = ("torch", "transformers", "pandas", "matplotlib", "scipy.special", "pyarrow", "datasets")
START = """
import json, sys
{code}
print(json.dumps([name for name in {slow} if name in sys.modules]))
"""
TOKENIZER = """
from prefalign_jax.data.chat import load_tokenizer
load_tokenizer({path!r})
"""
TOKENS = """
import pathlib, numpy
from prefalign_jax.data import token_cache
from prefalign_jax.data.pairs import from_list
from prefalign_jax.types import Pair
pairs = from_list([Pair(*numpy.arange(1, 4, dtype=numpy.int32)[:, None])])
token_cache.cached_tokens(pathlib.Path({path!r}) / "tokens.arrow", lambda: ([pairs], dict))
"""


def loaded(code, **variables):
    """Which of SLOW a process has imported after this code."""
    command = [sys.executable, "-c", START.format(code=code, slow=SLOW)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """A PyTorch, and a library that looks for it."""
    (tmp_path / "torch.py").write_text("here = True")
    (tmp_path / "library.py").write_text("try:\n    from torch import here\nexcept ImportError:\n    here = False")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    for name in ("torch", "library"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield monkeypatch
    for name in ("torch", "library"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("variable", "finds"), [("0", False), ("1", True), (None, True)])
def test_torch_is_hidden_from_one_import_where_that_is_asked_for(libraries, variable, finds):
    libraries.delenv("USE_TORCH", raising=False)
    if variable:
        libraries.setenv("USE_TORCH", variable)
    with without_torch("library"):
        import library
    import torch

    assert (library.here, torch.here) == (finds, True)


@pytest.mark.parametrize("before", ["torch", "library"])
def test_what_is_imported_already_finds_torch(libraries, before):
    importlib.import_module(before)
    libraries.setenv("USE_TORCH", "0")
    with without_torch("library"):
        import torch
    assert torch.here


def test_training_is_imported_without_what_only_some_runs_need():
    assert loaded("import prefalign_jax.train") == []


def test_tokenizer_and_kept_tokens_are_read_without_torch_and_pandas(tiny_tokenizer, tmp_path):
    code = TOKENIZER.format(path=tiny_tokenizer.name_or_path) + 2 * TOKENS.format(path=str(tmp_path))
    assert set(loaded(code, USE_TORCH="0")) == {"transformers", "pyarrow"}
