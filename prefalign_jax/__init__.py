"""prefalign_jax: aligning language models with human preferences in JAX (DPO, ORPO and relatives).

    import prefalign_jax as pa

    policy = pa.load("HuggingFaceTB/SmolLM2-135M-Instruct")
    pairs = pa.tokenize([{"prompt": "Hi", "chosen": " Hello!", "rejected": " Go away."}], policy.tokenizer)
    logps = pa.logps(policy, pairs)
    values, metrics = pa.losses.dpo(logps, logps, beta=0.1)

docs/library.md has the rest. Importing the package imports neither JAX nor anything else that takes time: what is
asked for is imported then.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from prefalign_jax import quiet
from prefalign_jax.callable_module import make_callable

if TYPE_CHECKING:
    from prefalign_jax import losses as losses
    from prefalign_jax.callbacks import Callbacks as Callbacks
    from prefalign_jax.data.chat import load_tokenizer as load_tokenizer
    from prefalign_jax.data.pairs import Pairs as Pairs
    from prefalign_jax.library import experiment as experiment
    from prefalign_jax.library import logps as logps
    from prefalign_jax.library import sample as sample
    from prefalign_jax.library import tokenize as tokenize
    from prefalign_jax.policy import Policy as Policy
    from prefalign_jax.policy import load as load
    from prefalign_jax.train import Result as Result
    from prefalign_jax.train import train as train
    from prefalign_jax.types import PairLogps as PairLogps
    from prefalign_jax.types import UserError as UserError

quiet.silence()  # before any library is imported
__version__ = "0.1.0"

# What is offered, and the module that has it; type checkers read the imports above.
FACE = {
    "load": "policy",
    "load_tokenizer": "data.chat",
    "tokenize": "library",
    "logps": "library",
    "losses": "",
    "experiment": "library",
    "train": "train",
    "sample": "library",
    "Callbacks": "callbacks",
    "Policy": "policy",
    "Pairs": "data.pairs",
    "PairLogps": "types",
    "Result": "train",
    "UserError": "types",
}
__all__ = ["__version__", *FACE]


def _find(name: str) -> Any:
    return getattr(importlib.import_module(f"{__name__}.{FACE[name]}"), name)


class _Package(ModuleType):
    """This package: what it offers is imported when it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name not in FACE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=self)
        if importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")  # a module, which can be called as well
        value = _find(name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a module here when it was first imported, by whatever way.
        if FACE.get(name) and isinstance(value, ModuleType):
            make_callable(value, functools.partial(_find, name))
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *FACE})


sys.modules[__name__].__class__ = _Package
