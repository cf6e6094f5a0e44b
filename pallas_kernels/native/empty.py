"""Arrays on a CPU that hold whatever their memory held: they cost nothing until they are used, a page of memory at a time."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.native import ffi

TARGET = "jaxserve_empty"


def empty(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An array of any numbers, NaN too; to be called while tracing for a CPU."""
    define()
    return jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(shape, dtype))()


def _handler(frame: int) -> int:
    ffi.executes(frame)  # answers what version of the interface it speaks
    return 0


@ffi.once
def define() -> Any:
    """Make the kernel known to XLA; see ffi.define."""
    return ffi.define(TARGET, None, _handler)
