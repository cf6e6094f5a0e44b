"""Ragged paged attention on GPUs from Ampere on (Pallas Triton): the cache is updated in place, and decodes split their context.

1. write_kernel: the new keys and values into their pages.
2. decode_kernel: rows of few tokens, each split of their context by a program of its own, to partial results (flash-decoding).
3. prefill_kernel: rows of more tokens, in tiles on tensor cores; zeros for padding. There is another one for Hopper, in hopper_kernel.py.
4. combine_kernel: the partial results into the output.
Every kernel that sees the cache takes it and returns it, aliased, so that their order leaves XLA no reason for a copy.

The cache is [R, num_pages, 2K, page_size, H]: row 2h of a page holds the keys of head h, row 2h + 1 its values. A program attends with one
KV head, so what it reads of a page is one piece of memory, keys and values; and a page's heads lie together, as its programs run together.

Grids are fixed when the step is compiled. A program finds its work in the batch's arrays, and one without work ends at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import tuning
from pallas_kernels.ragged_paged_attention import gpu_kernel, hopper_kernel
from pallas_kernels.ragged_paged_attention.gpu_plan import TILE_ALIGNMENT, WRITE_TOKENS, Plan, cdiv, make_plan
from pallas_kernels.ragged_paged_attention.reference import encode, token_rows

Shape = jax.ShapeDtypeStruct


def cache_shape(num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
    """Rows of a page: 2h is the keys of head h, [page_size, head_size]; 2h + 1 its values."""
    return num_layers, num_pages, 2 * num_kv_heads, page_size, head_size


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
    mosaic: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See reference.py; the pages are updated in place. On a CPU the kernels are interpreted, which is for tests.

    Args:
      pages: [R, num_pages, 2K, page_size, H], see above.
      mosaic: prompts in the kernel for Hopper; otherwise where it was measured to be the faster one.
    Raises: NotImplementedError for head sizes above 256, other dtypes, and caches whose rows 31 bits do not count.
    """
    if distance_bias is not None:
        raise NotImplementedError("a bias for each distance: there is one in plain XLA")
    plan = make_plan(
        q, k, v, pages, page_table=page_table, sm_scale=sm_scale, causal=causal, windowed=window is not None, softcap=softcap,
        alibi=alibi_slopes is not None, sinks=sinks is not None, k_scale=k_scale, v_scale=v_scale, one_token_rows=one_token_rows,
        limits=tuning.gpu_limits(), mosaic=mosaic,
    )  # fmt: skip
    scalars = jnp.stack([jnp.asarray(layer, jnp.int32), jnp.asarray(0 if window is None else window, jnp.int32)])
    heads = [x.astype(jnp.float32) for x in (alibi_slopes, sinks) if x is not None]
    rows = write(plan, scalars, _new_rows(plan, k, v, pages, k_scale, v_scale), _words(plan, pages), page_table, query_start, kv_len)
    batch = [scalars, query_start, kv_len, page_table.reshape(-1), q.reshape(-1, plan.head_size), *heads]
    out, rows = attend(plan, batch, rows)
    return out.reshape(*q.shape[:2], plan.value_size), _unwords(plan, rows, pages)


def _new_rows(plan: Plan, k: jax.Array, v: jax.Array, pages: jax.Array, k_scale: float, v_scale: float) -> list[jax.Array]:
    """The new keys and values as the cache has them."""
    if plan.paired:
        v = jnp.pad(v, ((0, 0), (0, 0), (0, plan.head_size - plan.value_size)))
    return [_words(plan, encode(k, k_scale, pages.dtype)), _words(plan, encode(v, v_scale, pages.dtype))]


def _slots(plan: Plan, page_table: jax.Array, query_start: jax.Array, kv_len: jax.Array) -> jax.Array:
    """Where each token's key and value go, i32[T]: page * page_size + offset, or -1 for padding."""
    row, position, valid = token_rows(plan.num_tokens, query_start, kv_len)
    page = page_table[row, position // plan.page_size]
    return jnp.where(valid, page * plan.page_size + position % plan.page_size, -1)


def _words(plan: Plan, x: jax.Array) -> jax.Array:
    """[..., H] of the cache's dtype -> [rows, columns] as the kernels address it: float8 as bytes, bytes in pairs where they must."""
    x = x.reshape(-1, x.shape[-1])
    if plan.paired:
        return jax.lax.bitcast_convert_type(x.reshape(x.shape[0], -1, 2), jnp.int16)
    return jax.lax.bitcast_convert_type(x, jnp.uint8) if plan.cache_dtype == jnp.float8_e4m3fn else x


def _unwords(plan: Plan, rows: jax.Array, pages: jax.Array) -> jax.Array:
    """The other way; same width or not, XLA sees that the bytes are the same."""
    return jax.lax.bitcast_convert_type(rows, plan.cache_dtype).reshape(pages.shape)


def write(
    plan: Plan, scalars: jax.Array, new: list[jax.Array], rows: jax.Array,
    page_table: jax.Array, query_start: jax.Array, kv_len: jax.Array,
) -> jax.Array:  # fmt: skip
    """The cache with the new keys, and values if they have rows of their own, in their slots; refs as in gpu_kernel.py."""

    def kernel(scalars: Any, slots: Any, *refs: Any) -> None:
        *sources, _, out = refs  # the cache that comes in is the same memory as out
        gpu_kernel.write_kernel(plan, scalars, slots, sources, out)

    grid, inputs = (cdiv(plan.num_tokens, WRITE_TOKENS), plan.num_kv_heads), [scalars, _slots(plan, page_table, query_start, kv_len), *new]
    return _call(plan, kernel, "write", grid, [Shape(rows.shape, rows.dtype)], {len(inputs): 0}, (4, 1))(*inputs, rows)[0]


def attend(plan: Plan, batch: list[jax.Array], rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output [T * N, Hv], and the cache.

    Args:
      batch: scalars, query_start, kv_len, the page table, queries [T * N, H], slopes and sinks where there are; refs as in gpu_kernel.py.
      rows: the cache with the new keys and values in it.
    """
    partial, rows = _decode(plan, batch, rows)
    out = None
    if not plan.one_token_rows:
        out, rows = _prefill(plan, batch, rows)
    sinks = batch[-1:] if plan.sinks else []
    return _combine(plan, [*batch[:3], *sinks, *partial], out), rows


def _decode(plan: Plan, batch: list[jax.Array], rows: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Partial results of the rows of few tokens (sums, maxima, denominators), and the cache."""
    size, blocks = plan.num_slots * plan.num_splits * plan.num_heads, plan.decode

    def kernel(*refs: Any) -> None:
        *inputs, sums, tops, totals, _ = refs
        gpu_kernel.decode_kernel(plan, _name(plan, inputs), sums, tops, totals)

    outputs = [Shape((size, plan.value_size), jnp.float32), Shape((size,), jnp.float32), Shape((size,), jnp.float32)]
    grid = (plan.num_kv_heads * cdiv(plan.group, blocks.heads), plan.num_rows, plan.num_splits)
    outputs.append(Shape(rows.shape, rows.dtype))
    call = _call(plan, kernel, "decode", grid, outputs, {len(batch): 3}, (blocks.warps, blocks.stages))
    *partial, rows = call(*batch, rows)
    return partial, rows


def _prefill(plan: Plan, batch: list[jax.Array], rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output [T * N, Hv] without the rows of few tokens, and the cache."""
    blocks = plan.prefill
    if blocks.mosaic:
        return _mosaic_prefill(plan, batch, rows), rows

    def kernel(*refs: Any) -> None:
        *inputs, block_row, block_start, block_end, rows, out, _ = refs
        gpu_kernel.prefill_kernel(plan, _name(plan, [*inputs, rows]), block_row, block_start, block_end, out)

    grid = (plan.num_kv_heads * cdiv(plan.group, blocks.heads), plan.prefill_blocks)
    outputs = [Shape((plan.num_tokens * plan.num_heads, plan.value_size), plan.query_dtype), Shape(rows.shape, rows.dtype)]
    call = _call(plan, kernel, "prefill", grid, outputs, {len(batch) + 3: 1}, (blocks.warps, blocks.stages))
    out, rows = call(*batch, *_prefill_blocks(plan, batch[1]), rows)
    return out, rows


def _mosaic_prefill(plan: Plan, batch: list[jax.Array], rows: jax.Array) -> jax.Array:
    """The same, from the kernel for Hopper, which only reads the cache."""
    scalars, query_start, kv_len, table, q, *heads = batch
    N, H = plan.num_heads, plan.head_size
    q = jnp.pad(q.reshape(-1, N, H), ((0, -plan.num_tokens % TILE_ALIGNMENT), (0, 0), (0, 0)))

    def kernel(*refs: Any, **shared: Any) -> None:
        *inputs, block_row, block_start, block_end, rows, out = refs
        inputs = _name(plan, [*inputs, rows])
        hopper_kernel.prefill_kernel(plan, inputs, block_row, block_start, block_end, out, hopper_kernel.Shared(**shared))

    kernel.__name__ = f"{plan.op}_prefill_hopper"
    call = mosaic_gpu.kernel(
        kernel, out_type=Shape((plan.num_tokens, N, H), plan.query_dtype), grid=(plan.prefill_blocks, N), grid_names=("block", "head"),
        num_threads=hopper_kernel.COMPUTERS + 1, thread_name="warpgroup", scratch_types=hopper_kernel.shared_types(plan),
        compiler_params=mosaic_gpu.CompilerParams(approx_math=True), interpret=_interpreter() if plan.interpret else False,
    )  # fmt: skip
    return call(scalars, query_start, kv_len, table, q, *heads, *_prefill_blocks(plan, query_start), rows).reshape(-1, H)


def _interpreter() -> Any:
    """Parameters of the interpreter for Mosaic GPU, to which jax gives no public name."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=True, out_of_bounds_reads="uninitialized")


def _prefill_blocks(plan: Plan, query_start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row, first token and row's end of each prefill tile; the padding counts as row S. Last ones first: they see the most keys."""
    counts = query_start[1:] - query_start[:-1]
    ends = jnp.append(query_start[1:], plan.num_tokens)
    starts = query_start // plan.prefill_alignment * plan.prefill_alignment
    taken = jnp.append(counts > plan.short_tokens, query_start[-1] < plan.num_tokens)
    blocks = jnp.where(taken, (ends - starts + plan.prefill_tokens - 1) // plan.prefill_tokens, 0)
    last = jnp.cumsum(blocks)
    index = jnp.arange(plan.prefill_blocks - 1, -1, -1, dtype=jnp.int32)
    row = jnp.searchsorted(last, index, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, plan.num_rows)
    start = starts[row] + (index - (last - blocks)[row]) * plan.prefill_tokens
    return row, start, jnp.where(index < last[-1], ends[row], 0)


def _combine(plan: Plan, inputs: list[jax.Array], out: jax.Array | None) -> jax.Array:
    """The output [T * N, Hv]: the one given, with the rows of few tokens in it."""

    def kernel(scalars: Any, query_start: Any, kv_len: Any, *refs: Any) -> None:
        sinks, refs = (refs[0], refs[1:]) if plan.sinks else (None, refs)
        sums, tops, totals, result = *refs[:3], refs[-1]
        gpu_kernel.combine_kernel(plan, scalars, query_start, kv_len, sinks, sums, tops, totals, result)

    grid = (plan.num_heads, plan.short_tokens, plan.num_rows)
    output = Shape((plan.num_tokens * plan.num_heads, plan.value_size), plan.query_dtype)
    aliases = {} if out is None else {len(inputs): 0}
    return _call(plan, kernel, "combine", grid, [output], aliases, (4, 1))(*inputs, *([] if out is None else [out]))[0]


def _name(plan: Plan, refs: list[Any]) -> gpu_kernel.Batch:
    """Names for the refs of the batch, the cache last."""
    scalars, query_start, kv_len, table, q, *heads, pages = refs
    return gpu_kernel.Batch(
        scalars=scalars, query_start=query_start, kv_len=kv_len, table=table, q=q, pages=pages,
        slopes=heads[0] if plan.alibi else None, sinks=heads[-1] if plan.sinks else None,
    )  # fmt: skip


def _call(
    plan: Plan, kernel: Callable[..., None], name: str, grid: tuple[int, ...], outputs: list[Shape], aliases: dict[int, int],
    warps_and_stages: tuple[int, int],
) -> Callable[..., list[jax.Array]]:  # fmt: skip
    warps, stages = warps_and_stages
    name = f"{plan.op}_{name}"
    kernel.__name__ = name  # what profilers show
    return pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=grid,
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=plan.interpret,
        name=name,
    )
