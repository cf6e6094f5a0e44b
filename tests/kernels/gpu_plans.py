"""Plans of the GPU kernels for abstract arguments."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels import tuning
from pallas_kernels.ragged_paged_attention import gpu, gpu_plan


def plan_for(
    *,
    T: int = 64,
    S: int = 8,
    K: int = 2,
    G: int = 4,
    H: int = 128,
    value_size: int | None = None,
    P: int = 64,
    page_size: int = 16,
    num_pages: int = 99,
    dtypes: tuple[str, str] = ("bfloat16", "bfloat16"),
    limits: tuning.GpuLimits | None = None,
    mosaic: bool = False,
) -> gpu_plan.Plan:
    """Of queries and a cache of these dtypes."""

    def array(dtype: str, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    query, cache = dtypes
    k, v = array(query, T, K, H), array(query, T, K, value_size or H)
    return gpu_plan.make_plan(
        array(query, T, K * G, H), k, v, array(cache, *gpu.cache_shape(1, num_pages, page_size, K, H)), page_table=array("int32", S, P),
        sm_scale=1.0, causal=True, windowed=False, softcap=None, alibi=True, sinks=True, k_scale=1.0, v_scale=1.0, one_token_rows=False,
        limits=limits, mosaic=mosaic,
    )  # fmt: skip
