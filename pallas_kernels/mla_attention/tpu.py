"""Attention over the compressed cache on TPUs (Pallas Mosaic): one kernel writes new vectors into their pages, in place, one attends.

A token's vector is one row of a page, and pages are tiles of 8 or 16 rows in which a DMA can address no single row. So pages that take new
vectors are read, merged and written back, by a pipelined kernel of their own: twice one page's bytes for a decode.
The plan (tpu_plan.py) fixes blocks from shapes and chip; the bodies are in tpu_kernel.py.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.mla_attention.reference import cache_shape
from pallas_kernels.mla_attention.tpu_kernel import Refs, attention_kernel, write_kernel
from pallas_kernels.mla_attention.tpu_plan import Plan, make_plan
from pallas_kernels.tpu_walk import LANES, SUBLANES, lay_out_table

__all__ = ["cache_shape", "mla_attention"]

Shape = jax.ShapeDtypeStruct


def mla_attention(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    rope_key: jax.Array,
    pages: jax.Array,
    layer: jax.Array | int,
    *,
    page_table: jax.Array,
    query_start: jax.Array,
    kv_len: jax.Array,
    sm_scale: float,
    causal: bool = True,
    one_token_rows: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See reference.py; the pages returned are the ones given, updated in place.

    Raises: NotImplementedError for pages that are no multiple of 8 tokens, other dtypes, and blocks that do not fit the chip.
    """
    T, N, C = q_latent.shape
    plan = make_plan(
        q_latent, pages, page_table, sm_scale=sm_scale, causal=causal, one_token_rows=one_token_rows, limits=tuning.tpu_limits()
    )
    index = jnp.asarray(layer, jnp.int32)[None]
    new = jnp.concatenate([latent, rope_key], axis=-1).astype(pages.dtype)
    pages = _write(plan, index, new, pages, page_table, query_start, kv_len)
    q = jnp.concatenate([q_latent, q_rope], axis=-1)
    q = jnp.pad(q, ((0, 0), (0, plan.num_heads - N), (0, 0))).reshape(T * plan.num_heads, plan.width)
    out = _attend(plan, [index, query_start, kv_len], lay_out_table(page_table, in_smem=plan.table_in_smem), q, pages)
    return out.reshape(T, plan.num_heads, C)[:, :N], pages


# --- writing


def _write(
    plan: Plan, layer: jax.Array, new: jax.Array, pages: jax.Array, page_table: jax.Array, query_start: jax.Array, kv_len: jax.Array
) -> jax.Array:
    """The pages with the new vectors [T, C + Hr] in their slots, a page per grid step."""
    page_of = _one_page_each if plan.one_token_rows else _pages_of_rows
    num_pages, row, page, low, high, new = page_of(plan, new, query_start, kv_len)
    page_id = page_table[row, page]
    held = pl.BlockSpec((None, None, plan.page_size, plan.width), lambda i, layer, page_id, *_: (layer[0], page_id[i], 0, 0))
    return pl.pallas_call(
        write_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(jnp.maximum(num_pages, 1),),  # where there is none, the first step changes nothing
            in_specs=[pl.BlockSpec((None, new.shape[1], plan.width), lambda i, *_: (i, 0, 0)), held],
            out_specs=held,
        ),
        out_shape=Shape(pages.shape, pages.dtype),
        input_output_aliases={5: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=(new.size + 2 * len(row) * plan.page_size * plan.width) * new.dtype.itemsize
        ),
        name="mla_write",
    )(layer, page_id, low, high, new, pages)


def _one_page_each(plan: Plan, new: jax.Array, query_start: jax.Array, kv_len: jax.Array) -> tuple[jax.Array, ...]:
    """As _pages_of_rows, for rows that own one token each, and empty ones at the end; the new vector is one for all slots."""
    last = jnp.maximum(kv_len - 1, 0)
    page, low = last // plan.page_size, last % plan.page_size
    row = jnp.arange(plan.num_rows, dtype=jnp.int32)
    num_pages = query_start[plan.num_rows]
    return num_pages, row, page, low, jnp.where(row < num_pages, low + 1, low), new[:, None]


def _pages_of_rows(plan: Plan, new: jax.Array, query_start: jax.Array, kv_len: jax.Array) -> tuple[jax.Array, ...]:
    """The pages that take new vectors.

    Returns: how many they are; for as many as there may be: row, index into its pages, first and last slot, [page_size, C + Hr] vectors.
    """
    T, size = plan.num_tokens, plan.page_size
    most = min(T, T // size + 2 * plan.num_rows)
    count = query_start[1:] - query_start[:-1]
    begin = kv_len - count
    pages = jnp.where(count > 0, (kv_len - 1) // size - begin // size + 1, 0)
    end = jnp.cumsum(pages)
    item = jnp.arange(most, dtype=jnp.int32)
    row = jnp.searchsorted(end, item, side="right", method="compare_all").astype(jnp.int32)
    is_real = row < plan.num_rows
    row = jnp.minimum(row, plan.num_rows - 1)
    page = jnp.where(is_real, begin[row] // size + item - (end - pages)[row], 0)
    low = jnp.maximum(begin[row] - page * size, 0)
    high = jnp.where(is_real, jnp.minimum(kv_len[row] - page * size, size), low)
    token = (query_start[row] + page * size - begin[row])[:, None] + jnp.arange(size)
    return end[-1], row, page, low, high, new[jnp.clip(token, 0, T - 1)]


# --- attending


def _attend(plan: Plan, scalars: list[jax.Array], table: jax.Array, q: jax.Array, pages: jax.Array) -> jax.Array:
    rows, C, width = plan.block_tokens * plan.num_heads, plan.latent_size, plan.width
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    prefetched = [*scalars, table] if plan.table_in_smem else scalars
    inputs = [q, pages] if plan.table_in_smem else [table, q, pages]
    specs = [pl.BlockSpec((rows, width), lambda step, *_: (step, 0)), in_hbm]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(prefetched), grid=(pl.cdiv(plan.num_tokens, plan.block_tokens),),
        in_specs=specs if plan.table_in_smem else [in_hbm, *specs],
        out_specs=pl.BlockSpec((rows, C), lambda step, *_: (step, 0)), scratch_shapes=_scratch(plan),
    )  # fmt: skip

    def kernel(*refs: Any) -> None:
        names = ("layer", "query_start", "kv_len", "table", "q", "pages", "out", "state", "fetched", "top", "total", "sums", "fetch_done")
        chunk = (None,) * 3 if plan.table_in_smem else refs[len(names) :]
        named = dict(zip((*names, "chunk", "chunk_of", "chunk_done"), (*refs[: len(names)], *chunk), strict=True))
        attention_kernel(plan, Refs(**named))

    keys = plan.num_tokens if plan.one_token_rows else plan.context
    return pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=Shape((q.shape[0], C), q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=tuning.tpu_limits().vmem_limit,
            disable_bounds_checks=True,  # they take longer than starting a DMA; page ids are valid by contract
        ),
        cost_estimate=pl.CostEstimate(  # contexts are data; without this the whole cache would count
            flops=2 * q.shape[0] * keys * (width + C), transcendentals=q.shape[0] * keys, bytes_accessed=2 * q.size * q.dtype.itemsize
        ),
        name="mla_attention",
    )(*prefetched, *inputs)


def _scratch(plan: Plan) -> list[Any]:
    rows = plan.tiles[-1] * plan.num_heads
    scratch = [
        pltpu.SMEM((2,), jnp.int32),
        pltpu.VMEM((2, plan.context, plan.width), plan.cache_dtype),
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, plan.latent_size), jnp.float32),
        pltpu.SemaphoreType.DMA((2,)),
    ]
    if plan.table_in_smem:
        return scratch
    return [*scratch, pltpu.SMEM((SUBLANES, LANES), jnp.int32), pltpu.SMEM((2,), jnp.int32), pltpu.SemaphoreType.DMA]
