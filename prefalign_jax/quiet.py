"""What libraries say that a user can do nothing about, and that is therefore not shown.

The package sets this before anything else of it is imported. A variable that is set already keeps its value, so
whoever wants to see these lines sets it: TF_CPP_MIN_LOG_LEVEL=1, for one.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SILENCED = {
    # XLA's alarm at every compilation of more than two minutes, with its advice to file a bug, and its complaints about
    # constants that take long to fold. Failures of XLA are exceptions, which are shown.
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # Transformers says at its import that PyTorch is missing. Only its tokenizers are used here.
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    # The hub's client tells of every retry, and of requests without an account. What fails in the end is an exception.
    "HF_HUB_VERBOSITY": "error",
}


def silence() -> None:
    """Sets the variables that nobody has set; works for what is imported afterwards."""
    for name, value in SILENCED.items():
        os.environ.setdefault(name, value)
    # tqdm asks for ipywidgets in notebooks. Bars of text do.
    warnings.filterwarnings("ignore", "IProgress not found")


# Loggers by which Orbax's threads tell of a failed write over hundreds of lines. It is raised too.
_TALKATIVE = ("absl", "asyncio", "concurrent.futures")


def hush_failed_writes() -> None:
    """Drops from now on what Orbax's threads say of a write that failed; what anybody else says is shown."""
    for name in _TALKATIVE:
        logging.getLogger(name).addFilter(_is_news)
    if not hasattr(sys.unraisablehook, "quieter"):
        sys.unraisablehook = _quieter(sys.unraisablehook)


def _is_news(record: logging.LogRecord) -> bool:
    return not _of_orbax(record.exc_info[1] if record.exc_info else None)


def _quieter(show: Callable[[Any], Any]) -> Callable[[Any], None]:
    def show_news(unraisable: Any) -> None:
        if not _of_orbax(unraisable.exc_value):
            show(unraisable)

    show_news.quieter = True
    return show_news


def _of_orbax(error: BaseException | None) -> bool:
    """Whether an exception comes from Orbax, or from a callback to an event loop of its that has ended."""
    if error is None:
        return False
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    late = bool(frames) and frames[-1].co_name == "_check_closed" and "asyncio" in Path(frames[-1].co_filename).parts
    return late or any("orbax" in Path(code.co_filename).parts for code in frames)
