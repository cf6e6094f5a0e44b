"""Which implementation of an op runs: the one asked for, else the platform's own, else plain XLA."""

from __future__ import annotations

from collections.abc import Container

import jax

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
