"""The kernels that programs for a CPU call by name. A program that was compiled by another process needs them defined in this one."""

from __future__ import annotations

from pallas_kernels.matmul import cpu as matmul
from pallas_kernels.native import empty
from pallas_kernels.ragged_paged_attention import cpu as ragged_paged_attention

_KERNELS = (matmul, ragged_paged_attention, empty)


def define_kernels_in(program: bytes) -> None:
    """Define every kernel whose name is in a serialized program."""
    for kernel in _KERNELS:
        if kernel.TARGET.encode() in program:
            kernel.define()
