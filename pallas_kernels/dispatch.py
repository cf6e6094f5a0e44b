"""Which implementation of an op runs: the one asked for, else the platform's own, else plain XLA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

PLATFORM_NAMES = {"tpu": "tpu", "cuda": "gpu", "gpu": "gpu", "rocm": "gpu"}


def call(implementations: Mapping[str, Callable[..., Any]], implementation: str | None, *args: Any, **kwargs: Any) -> Any:
    """Call the implementation named, or the default of the platform with a fall back to "xla".

    Raises: NotImplementedError if the one asked for cannot take these arguments; ValueError if there is none of that name.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(f"no implementation {implementation!r}; there are {', '.join(implementations)}")
        return implementations[implementation](*args, **kwargs)
    native = PLATFORM_NAMES.get(jax.default_backend(), "xla")
    if native in implementations:
        try:
            return implementations[native](*args, **kwargs)
        except NotImplementedError:
            pass  # the native kernel refuses this case by design; XLA takes every case
    return implementations["xla"](*args, **kwargs)
