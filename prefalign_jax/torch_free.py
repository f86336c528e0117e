"""Imports of libraries that load PyTorch wherever it is installed, though nothing that is used of them needs it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def without_torch(library: str) -> Iterator[None]:
    """Inside, an import of PyTorch fails as if it were not installed, where USE_TORCH=0 asks for that.

    Commands set that variable, since importing PyTorch takes 2 s; USE_TORCH=1 of a user's stays. In a program that
    imports this package nothing is hidden unless it has set the variable.

    Args:
      library: what is imported. One that is imported already may count on PyTorch, and finds it.
    """
    hidden = os.environ.get("USE_TORCH") == "0" and not {"torch", library} & sys.modules.keys()
    if hidden:
        sys.modules["torch"] = None
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]


def tokenizer_library() -> ModuleType:
    """The package transformers, of which nothing but tokenizers is used."""
    with without_torch("transformers"):
        import transformers

        transformers.utils.is_torch_available()  # looks now, and remembers what it finds
    return transformers
