"""The static plan of the GPU kernels: tiles, splits of the context, warps and stages, and which arguments they refuse.

The kernels are those of ragged_paged_attention with one KV head, and so is their plan. What is particular is the size of a value, 512 in
DeepSeek V2 and V3: a tile's sums fill the registers, and a row's partial results are as large as what some hundred keys take.

As there, tiles and splits are a function of the row's own context, the model and the chip, never of the batch.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.ragged_paged_attention.gpu_plan import (
    LEAST_SPLIT,
    LEAST_STAGES,
    LEAST_TILE,
    LONE_ROW_PROGRAMS,
    MOST_SHORT_TOKENS,
    Blocks,
    Plan,
    cdiv,
    chunks,
    fit,
    power_of_two,
)

DTYPES = ("float32", "bfloat16")
MAX_LATENT_SIZE = 512  # of sums of a tile's rows in registers
MAX_ROPE_SIZE = 128  # with such a latent; a tile's vectors fit every chip's shared memory
MOST_PARTIALS = 1024  # splits times heads: 2 MB of partial results for a row with C = 512
CONTEXT = 32  # keys that meet a tile at a time: 36 KB of C + Hr = 576 in bfloat16


def make_plan(
    q_latent: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    *,
    sm_scale: float,
    causal: bool,
    one_token_rows: bool,
    limits: tuning.GpuLimits | None,
) -> Plan:
    """Choose tiles and splits for these arguments on this chip (None: the kernels are interpreted).

    Args: shapes as in reference.mla_attention.
    Raises: NotImplementedError if the kernels cannot take them.
    """
    T, N, C = q_latent.shape
    _, num_pages, page_size, width = pages.shape
    _refuse(q_latent, pages, interpreted=limits is None)
    chip = limits or tuning.SMALLEST_GPU
    query_dtype, cache_dtype = jnp.dtype(q_latent.dtype), jnp.dtype(pages.dtype)
    decode, prefill, split = _blocks(chip, N, C, width, query_dtype, cache_dtype, f"N{N} C{C}+{width - C} page{page_size}")
    max_splits = max(min(LONE_ROW_PROGRAMS // cdiv(N, decode.heads), MOST_PARTIALS // N, 64), 4)
    return Plan(
        op="mla_attention", num_tokens=T, num_rows=page_table.shape[0], num_heads=N, num_kv_heads=1, head_size=width, value_size=C,
        values_in_keys=True, page_size=page_size, num_pages=num_pages, table_width=page_table.shape[1], query_dtype=query_dtype,
        cache_dtype=cache_dtype, paired=False, decode=decode, prefill=prefill, least_split=split, max_splits=max_splits,
        short_tokens=1 if one_token_rows else max(min(decode.rows // N, MOST_SHORT_TOKENS), 1), one_token_rows=one_token_rows,
        causal=causal, windowed=False, softcap=None, alibi=False, sinks=False, score_scale=sm_scale, value_scale=1.0,
        converts_float8=chip.converts_float8, interpret=limits is None,
    )  # fmt: skip


def _refuse(q_latent: jax.Array, pages: jax.Array, *, interpreted: bool) -> None:
    C, rows = q_latent.shape[2], math.prod(pages.shape[:3])
    if str(pages.dtype) not in DTYPES:
        raise NotImplementedError(f"cache of {pages.dtype}: needs one of {', '.join(DTYPES)}")
    if str(q_latent.dtype) not in DTYPES:
        raise NotImplementedError(f"queries of {q_latent.dtype}: needs one of {', '.join(DTYPES)}")
    if not interpreted and "float32" in (str(pages.dtype), str(q_latent.dtype)):  # no tensor cores: unrolled, minutes to compile
        raise NotImplementedError(f"queries of {q_latent.dtype}, cache of {pages.dtype}: needs bfloat16 for both")
    if C > MAX_LATENT_SIZE:
        raise NotImplementedError(f"latents of {C} numbers: needs at most {MAX_LATENT_SIZE}")
    if not 0 < pages.shape[3] - C <= MAX_ROPE_SIZE:
        raise NotImplementedError(f"rope keys of {pages.shape[3] - C} numbers: needs 1 to {MAX_ROPE_SIZE}")
    queries = math.prod(q_latent.shape[:2]) * pages.shape[3]
    if rows >= 1 << 31 or queries >= 1 << 31:
        raise NotImplementedError(f"{rows} vectors in the cache, {queries} numbers of queries: both need to be below 2 ** 31")


def _blocks(
    chip: tuning.GpuLimits, N: int, C: int, width: int, query_dtype: jnp.dtype, cache_dtype: jnp.dtype, shape: str
) -> tuple[Blocks, Blocks, int]:
    """Of decode and of prefill, and the keys of the shortest split: measured or else by rule, made to fit shared memory."""
    compute_dtype = jnp.dtype(jnp.promote_types(query_dtype, cache_dtype))
    # Hopper's products are of 64 rows.
    most = LEAST_TILE if compute_dtype == jnp.float32 else 64 if chip.shared_bytes >= 200 * tuning.KIB else 32
    rows = min(max(power_of_two(N), LEAST_TILE), most)
    decode = Blocks(rows=rows, heads=min(N, rows), context=CONTEXT, warps=_warps(rows), stages=LEAST_STAGES)
    prefill = Blocks(rows=most, heads=math.gcd(N, LEAST_TILE), context=CONTEXT, warps=_warps(most), stages=LEAST_STAGES)

    names = [f"{kind} {query_dtype}/{cache_dtype} {shape}" for kind in ("decode", "prefill")]
    found = [dict(tuning.tuned(chip.name, "mla_attention", name) or {}) for name in names]
    split = found[0].pop("split", LEAST_SPLIT)
    vector = sum(size for _, size in (*chunks(C), *chunks(width - C)))
    sizes = (vector, vector, cache_dtype.itemsize, compute_dtype.itemsize)
    # Two decode programs of few rows share a multiprocessor: while one waits for its first keys, the other one computes.
    decode = fit(dataclasses.replace(decode, **found[0]), sizes, chip.shared_bytes // (2 if decode.warps == 4 else 1))
    prefill = fit(dataclasses.replace(prefill, **found[1]), sizes, chip.shared_bytes)
    return decode, prefill, cdiv(split, decode.context) * decode.context


def _warps(rows: int) -> int:
    """At most 128 of a thread's 255 registers hold sums of up to 64 rows."""
    return 4 if rows == LEAST_TILE else 8
