"""Attention over DeepSeek's compressed cache: write new latents into pages, then attend; prefill, decode and any mix of both."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import jax

from pallas_kernels import dispatch
from pallas_kernels.mla_attention import gpu, reference, tpu, xla
from pallas_kernels.mla_attention.reference import cache_shape

__all__ = ["IMPLEMENTATIONS", "cache_shape", "mla_attention"]

IMPLEMENTATIONS = {"tpu": tpu, "gpu": gpu, "xla": xla, "reference": reference}


@functools.wraps(reference.mla_attention)
def mla_attention(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    rope_key: jax.Array,
    pages: jax.Array,
    layer: jax.Array | int,
    *,
    implementation: str | None = None,
    platform: str | None = None,
    **batch: Any,
) -> tuple[jax.Array, jax.Array]:
    def call(module: ModuleType) -> Any:
        return module.mla_attention(q_latent, q_rope, latent, rope_key, pages, layer, **batch)

    return dispatch.run(IMPLEMENTATIONS, call, implementation, platform=platform, yields="gpu")
