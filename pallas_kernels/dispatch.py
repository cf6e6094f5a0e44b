"""Which implementation of an op runs: the one asked for, else the platform's own, else plain XLA."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import TypeVar

import jax

_M = TypeVar("_M")
_R = TypeVar("_R")
_NAMES = {"cuda": "gpu", "rocm": "gpu"}


def choose(implementations: Container[str], implementation: str | None = None, *, platform: str | None = None) -> str:
    """The implementation named, or else the one of the platform ("cpu", "tpu", "gpu"; default: jax's), or else "xla".

    Raises: ValueError if there is none of that name.
    """
    if implementation is None:
        platform = platform or jax.default_backend()
        native = _NAMES.get(platform, platform)
        return native if native in implementations else "xla"
    if implementation not in implementations:
        raise ValueError(f"no implementation {implementation!r}")
    return implementation


def run(
    implementations: Mapping[str, _M], call: Callable[[_M], _R], implementation: str | None, *, platform: str | None, yields: str
) -> _R:
    """What `call` gives for the implementation that `choose` names.

    Args:
      yields: the one that gives way to "xla", which has the same cache, if it raises NotImplementedError and was not asked for by name.
    Raises: NotImplementedError of any other.
    """
    chosen = choose(implementations, implementation, platform=platform)
    if chosen == yields and implementation is None:
        try:
            return call(implementations[chosen])
        except NotImplementedError:
            chosen = "xla"
    return call(implementations[chosen])
