"""Modules that can be called: where a module and a function share their name, both are what is expected of them.

`import prefalign_jax.train as m` gives the module, whatever was imported before, and `prefalign_jax.train(config, DIR)`
calls its function. Of two objects under one name Python would keep the one that was bound last.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import inspect


class CallableModule(types.ModuleType):
    """A module that is called as a function. `make_callable` says which."""

    _find: Callable[[], Callable[..., Any]]

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self._find()

    @property
    def __signature__(self) -> inspect.Signature:
        import inspect

        return inspect.signature(self._find())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self._find()(*args, **kwargs)


def make_callable(module: types.ModuleType, find: Callable[[], Callable[..., Any]]) -> None:
    """Lets a module be called.

    Args:
      module: it stays the module that it is.
      find: gives the function; it is asked at each call, so that what the function needs is imported no earlier.
    """
    module.__class__ = CallableModule
    module._find = find
