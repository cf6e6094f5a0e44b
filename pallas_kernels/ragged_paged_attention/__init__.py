"""Ragged paged attention: write new keys and values into pages, then attend; prefill, decode and any mix of both."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import jax

from pallas_kernels import dispatch
from pallas_kernels.ragged_paged_attention import cpu, gpu, hopper, reference, tpu, xla

IMPLEMENTATIONS = {"tpu": tpu, "gpu": gpu, "hopper": hopper, "cpu": cpu, "xla": xla, "reference": reference}


def cache_shape(
    num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_size: int,
    *, implementation: str | None = None, platform: str | None = None,
) -> tuple[int, ...]:  # fmt: skip
    """Shape of the cache as the implementation, or the platform's own, wants it: num_layers and num_pages first, the rest its own."""
    module = IMPLEMENTATIONS[dispatch.choose(IMPLEMENTATIONS, implementation, platform=platform)]
    return module.cache_shape(num_layers, num_pages, page_size, num_kv_heads, head_size)


@functools.wraps(reference.ragged_paged_attention)
def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    layer: jax.Array | int,
    *,
    implementation: str | None = None,
    platform: str | None = None,
    **features: Any,
) -> tuple[jax.Array, jax.Array]:
    def call(module: ModuleType) -> Any:
        return module.ragged_paged_attention(q, k, v, pages, layer, **features)

    return dispatch.run(IMPLEMENTATIONS, call, implementation, platform=platform, yields="cpu")
