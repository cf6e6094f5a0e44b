"""Ragged paged attention: write new keys and values into pages, then attend; prefill, decode and any mix of both."""

from __future__ import annotations

import functools
from typing import Any

import jax

from pallas_kernels import dispatch
from pallas_kernels.ragged_paged_attention import reference, xla


@functools.wraps(reference.ragged_paged_attention)
def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    layer: jax.Array | int,
    *,
    implementation: str | None = None,
    **features: Any,
) -> tuple[jax.Array, jax.Array]:
    return dispatch.call(
        {"xla": xla.ragged_paged_attention, "reference": reference.ragged_paged_attention},
        implementation,
        q,
        k,
        v,
        pages,
        layer,
        **features,
    )
