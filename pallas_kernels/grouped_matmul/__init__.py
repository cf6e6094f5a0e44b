"""Grouped matrix product: rows sorted by expert, each times its expert's matrix."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import jax

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import gpu, reference, tpu, xla

IMPLEMENTATIONS = {"tpu": tpu, "gpu": gpu, "xla": xla, "reference": reference}


@functools.wraps(reference.grouped_matmul)
def grouped_matmul(
    x: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, implementation: str | None = None, platform: str | None = None
) -> jax.Array:
    def call(module: ModuleType) -> Any:
        return module.grouped_matmul(x, weights, group_sizes)

    return dispatch.run(IMPLEMENTATIONS, call, implementation, platform=platform, yields="gpu")
