"""Ragged paged attention on TPUs (Pallas Mosaic): new keys and values are written and the context attended to by one kernel, in place.

The plan (tpu_plan.py) fixes tiles and blocks from shapes and chip; the body is in tpu_kernel.py. Around the kernel XLA only interleaves
the new keys and values and brings the queries of a KV head together: [T, N, H] -> [K, T * group, H].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.ragged_paged_attention.reference import cache_shape, encode
from pallas_kernels.ragged_paged_attention.tpu_kernel import LOG2_E, Refs, attention_kernel
from pallas_kernels.ragged_paged_attention.tpu_plan import Plan, make_plan
from pallas_kernels.tpu_walk import LANES, SUBLANES, lay_out_table

__all__ = ["cache_shape", "ragged_paged_attention"]  # the contract's cache: a token's keys and values are one write


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    layer: jax.Array | int,
    *,
    page_table: jax.Array,
    query_start: jax.Array,
    kv_len: jax.Array,
    sm_scale: float,
    causal: bool = True,
    window: jax.Array | int | None = None,
    softcap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    distance_bias: jax.Array | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    one_token_rows: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See reference.py; the pages returned are the ones given, updated in place.

    Raises: NotImplementedError for values narrower than keys, head sizes above 256, other dtypes, and blocks that do not fit the chip.
    """
    if distance_bias is not None:
        raise NotImplementedError("a bias for each distance: there is one in plain XLA")
    plan = make_plan(
        q, k, v, pages, page_table=page_table, sm_scale=sm_scale, causal=causal, windowed=window is not None, softcap=softcap,
        alibi=alibi_slopes is not None, sinks=sinks is not None, k_scale=k_scale, v_scale=v_scale, one_token_rows=one_token_rows,
        limits=tuning.tpu_limits(),
    )  # fmt: skip
    T, K, H = k.shape
    new = jnp.stack([encode(k, k_scale, pages.dtype), encode(v, v_scale, pages.dtype)], axis=2).reshape(T, 2 * K, H)
    scalars = jnp.stack([jnp.asarray(layer, jnp.int32), jnp.asarray(0 if window is None else window, jnp.int32)])
    patterns = [_pattern(plan, x * LOG2_E) for x in (alibi_slopes, sinks) if x is not None]
    out, pages = _call(
        plan, scalars, query_start, kv_len, lay_out_table(page_table, in_smem=plan.table_in_smem), _group(plan, q), new, patterns, pages
    )
    return _ungroup(plan, out, q.shape), pages


def _group(plan: Plan, q: jax.Array) -> jax.Array:
    """[T, N, H] -> [K, T * group, H]."""
    T, N, H = q.shape
    K = plan.num_kv_heads
    q = q.reshape(T, K, N // K, H)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, plan.group - N // K), (0, 0)))
    return q.transpose(1, 0, 2, 3).reshape(K, T * plan.group, H)


def _ungroup(plan: Plan, out: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[K, T * group, H] -> [T, N, H]."""
    T, N, H = shape
    K = plan.num_kv_heads
    return out.reshape(K, T, plan.group, H)[:, :, : N // K].transpose(1, 0, 2, 3).reshape(T, N, H)


def _pattern(plan: Plan, x: jax.Array) -> jax.Array:
    """f32[N] -> f32[K, unit * group, 128]: the value of each row of a unit, in every lane."""
    K = plan.num_kv_heads
    x = x.astype(jnp.float32).reshape(K, 1, -1, 1)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, plan.group - x.shape[2]), (0, 0)))
    return jnp.broadcast_to(x, (K, plan.unit, plan.group, LANES)).reshape(K, plan.unit * plan.group, LANES)


def _call(
    plan: Plan, scalars: jax.Array, query_start: jax.Array, kv_len: jax.Array, table: jax.Array, q: jax.Array, new: jax.Array,
    patterns: list[jax.Array], pages: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    K, H, rows = plan.num_kv_heads, plan.head_size, plan.block_tokens * plan.group
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    queries = pl.BlockSpec((K, rows, H), lambda step, *_: (0, step, 0))
    prefetched = [scalars, query_start, kv_len] + ([table] if plan.table_in_smem else [])
    inputs = ([] if plan.table_in_smem else [table]) + [q, new, *patterns, pages]
    specs = ([] if plan.table_in_smem else [in_hbm]) + [queries, in_hbm] + [_whole(x) for x in patterns] + [in_hbm]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(prefetched), grid=(pl.cdiv(plan.num_tokens, plan.block_tokens),), in_specs=specs,
        out_specs=[queries, in_hbm], scratch_shapes=_scratch(plan),
    )  # fmt: skip

    def kernel(*refs: Any) -> None:
        attention_kernel(plan, _name(plan, iter(refs)))

    return pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(pages.shape, pages.dtype)],
        input_output_aliases={len(prefetched) + len(inputs) - 1: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=tuning.tpu_limits().vmem_limit,
            disable_bounds_checks=True,  # they take longer than starting a DMA; page ids are valid by contract
        ),
        cost_estimate=_cost(plan, q, new),
        name="ragged_paged_attention",
    )(*prefetched, *inputs)


def _cost(plan: Plan, q: jax.Array, new: jax.Array) -> pl.CostEstimate:
    """What is known while compiling: queries, outputs and new tokens. Contexts are data; without this the whole cache would count."""
    moved = 2 * (q.size * q.dtype.itemsize + new.size * new.dtype.itemsize)
    keys = plan.num_tokens if plan.one_token_rows else plan.context
    return pl.CostEstimate(flops=4 * q.size * keys, transcendentals=q.size // plan.head_size * keys, bytes_accessed=moved)


def _whole(x: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)


def _scratch(plan: Plan) -> list[Any]:
    K, H, rows = plan.num_kv_heads, plan.head_size, plan.tiles[-1] * plan.group
    scratch = [
        pltpu.SMEM((2,), jnp.int32),
        pltpu.VMEM((2, plan.pages_per_block, plan.page_size, 2 * K, H), plan.cache_dtype),
        pltpu.VMEM(plan.unpacked_shape, jnp.uint32 if plan.packed else jnp.float32),
        pltpu.VMEM((K, rows, LANES), jnp.float32),
        pltpu.VMEM((K, rows, LANES), jnp.float32),
        pltpu.VMEM((K, rows, H), jnp.float32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA,
    ]
    if plan.table_in_smem:
        return scratch
    return [*scratch, pltpu.SMEM((SUBLANES, LANES), jnp.int32), pltpu.SMEM((2,), jnp.int32), pltpu.SemaphoreType.DMA]


def _name(plan: Plan, refs: Iterator[Any]) -> Refs:
    """Names for the kernel's positional refs: scalars, inputs, outputs, scratch."""
    named = {name: next(refs) for name in ("scalars", "query_start", "kv_len", "table", "q", "new")}
    named["slopes"] = next(refs) if plan.alibi else None
    named["sinks"] = next(refs) if plan.sinks else None
    next(refs)  # the cache as an input: the output is the same memory
    for name in ("out", "pages", "state", "fetched", "unpacked", "top", "total", "sums", "fetch_done", "write_done"):
        named[name] = next(refs)
    for name in ("chunk", "chunk_of", "chunk_done"):
        named[name] = None if plan.table_in_smem else next(refs)
    return Refs(**named)
