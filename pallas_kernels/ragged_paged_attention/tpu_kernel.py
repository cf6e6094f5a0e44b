"""The body of the TPU kernel: page writes, page fetches, and attention of one block of queries per grid step.

1. The first step starts a DMA for each run of new tokens into its page and waits for all.
2. Then each step goes over items and their context as tpu_walk.py says.
3. Fetched pages are unpacked once, so that a head's keys can be loaded; what lies beyond the context becomes zero there.
   Loads with a stride of 8 rows or a multiple meet the same VMEM banks again and again, so such heads are transposed apart instead.

    fetched    [2 slots, pages, page_size, 2K, H]    as in the cache
    unpacked   [lane chunks, K, context, 128]        uint32: key in the low half, value in the high half of each word
               [lane chunks, 1, context * K, 128]    the same where K is no multiple of 8: row = position * K + head
    float32 caches have no halves: 2K stands for K there, with index 2 * head + (0 for the key, 1 for the value)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.reference import MASKED
from pallas_kernels.ragged_paged_attention.tpu_plan import Plan
from pallas_kernels.tpu_walk import LANES, SUBLANES, Item, Ref, Scalar, Walk, widen

LOG2_E = math.log2(math.e)
LOWEST = MASKED / 2  # of the running maximum: masked scores lie so far below it that their weight is exactly zero


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Refs:
    """The kernel's memory; shapes beside each."""

    scalars: Ref  # SMEM i32[2]: layer, window
    query_start: Ref  # SMEM i32[S + 1]
    kv_len: Ref  # SMEM i32[S]
    table: Ref  # SMEM i32[S * P], or HBM i32[S, chunks, 8, 128]
    q: Ref  # VMEM [K, block * group, H]
    new: Ref  # HBM [T, 2K, H]
    slopes: Ref | None  # VMEM f32[K, unit * group, 128], times log2(e)
    sinks: Ref | None  # VMEM f32[K, unit * group, 128], times log2(e)
    out: Ref  # VMEM [K, block * group, H]
    pages: Ref  # HBM [R, num_pages, page_size, 2K, H]
    state: Ref  # SMEM i32[2]: the row of the next item, the slot that its first pages go to
    fetched: Ref  # VMEM [2, pages_per_block, page_size, 2K, H]
    unpacked: Ref  # VMEM, see above
    top: Ref  # VMEM f32[K, tile * group, 128]: running maximum, the same in every lane
    total: Ref  # VMEM f32[K, tile * group, 128]: running denominator
    sums: Ref  # VMEM f32[K, tile * group, H]: running numerator
    fetch_done: Ref  # DMA semaphores [2]
    write_done: Ref  # DMA semaphore
    chunk: Ref  # SMEM i32[8, 128]: part of a table in HBM; this and the next two are None for a table in SMEM
    chunk_of: Ref  # SMEM i32[2]: its row and number
    chunk_done: Ref  # DMA semaphore


def attention_kernel(plan: Plan, r: Refs) -> None:
    """One grid step; everything it changes is in the refs."""
    window = r.scalars[1] if plan.windowed else None
    walk = Walk(plan, r, layer=r.scalars[0], window=window, place=lambda slot, index: r.fetched.at[slot, index])
    walk.over_items(lambda: _write_new(plan, r, walk), lambda item: _attend(plan, r, walk, item))


# --- pages


def _powers_of_two(limit: int) -> list[int]:
    return [1 << bit for bit in range(limit.bit_length()) if 1 << bit <= limit]


def _write_new(plan: Plan, r: Refs, walk: Walk) -> None:
    """Copy this step's keys and values into their slots, a run within a page at a time, and wait until they are there."""
    page_size, layer = plan.page_size, r.scalars[0]
    sizes = [1] if plan.one_token_rows else _powers_of_two(page_size)

    def write_row(row: Scalar, _: None) -> None:
        begin, end = r.query_start[row], r.query_start[row + 1]
        offset = r.kv_len[row] - end
        first = lax.div(offset + begin, page_size)
        count = jnp.where(end > begin, pl.cdiv(offset + end, page_size) - first, 0)

        def write_page(index: Scalar, _: None) -> None:
            page = first + index
            low = jnp.maximum(page * page_size, offset + begin)
            count = jnp.minimum((page + 1) * page_size, offset + end) - low
            page_id = walk.page_id(row, page)
            for size in sizes:  # a run of 13 is copied as 1, 4 and 8: a DMA's size is static
                done = lax.rem(count, size)

                @pl.when((count & size) != 0)
                def _(size: int = size, done: Scalar = done) -> None:
                    source = r.new.at[pl.ds(low - offset + done, size)]
                    slots = r.pages.at[layer, page_id, pl.ds(low - page * page_size + done, size)]
                    pltpu.make_async_copy(source, slots, r.write_done).start()

        lax.fori_loop(0, count, write_page, None)

    lax.fori_loop(0, plan.num_rows, write_row, None)
    written = r.query_start[plan.num_rows]
    for size in _powers_of_two(plan.num_tokens):

        @pl.when((written & size) != 0)
        def _(size: int = size) -> None:
            tokens = r.new.at[pl.ds(0, size)]  # a wait needs only the number of bytes
            pltpu.make_async_copy(tokens, tokens, r.write_done).wait()


def _unpack(plan: Plan, r: Refs, slot: Scalar, seen: Scalar) -> None:
    """Lay a slot's pages out for strided loads; keys from `seen` on, counted from the slot's first, become zero, as 0 * NaN is NaN."""
    K, H, pages = plan.num_kv_heads, plan.head_size, plan.unpack_pages
    tokens = pages * plan.page_size
    heads = K if plan.packed else 2 * K

    def unpack(index: Scalar, _: None) -> None:
        x = r.fetched[slot, pl.ds(index * pages, pages)].reshape(tokens, 2 * K, H)
        if x.dtype == jnp.int8:
            x = x.astype(jnp.int32)  # Mosaic has no direct conversion to floats
        if plan.cache_dtype.itemsize == 1:
            x = x.astype(jnp.float32).astype(jnp.bfloat16)
        if plan.packed:
            x = pltpu.bitcast(x, jnp.uint32)  # [tokens, K, H]
        token = index * tokens + lax.broadcasted_iota(jnp.int32, x.shape, 0)
        x = jnp.where(token < seen, x, jnp.zeros_like(x))
        if plan.heads_apart:
            x, height = jnp.swapaxes(x, 0, 1), tokens
        else:
            x, height = x.reshape(1, tokens * heads, H), tokens * heads
        rows = pl.ds(pl.multiple_of(index * height, SUBLANES), height)
        for chunk, low in enumerate(range(0, H, LANES)):
            width = min(LANES, H - low)
            r.unpacked[chunk, :, rows, pl.ds(0, width)] = x[:, :, low : low + width]

    lax.fori_loop(0, plan.pages_per_block // pages, unpack, None)


def _head(plan: Plan, r: Refs, head: Scalar) -> tuple[jax.Array, jax.Array]:
    """Keys and values [context, H] of one head, in the compute dtype."""

    def load(first: Scalar, stride: int) -> jax.Array:
        if plan.heads_apart:
            chunks = [r.unpacked[chunk, first] for chunk in range(r.unpacked.shape[0])]
        else:
            rows = pl.ds(first, plan.context, stride=stride) if stride > 1 else pl.ds(0, plan.context)
            chunks = [r.unpacked[chunk, 0, rows] for chunk in range(r.unpacked.shape[0])]
        x = chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=1)
        return x[:, : plan.head_size]

    if not plan.packed:
        stride = 2 * plan.num_kv_heads
        return load(2 * head, stride), load(2 * head + 1, stride)
    both = load(head, plan.num_kv_heads)
    key = pltpu.bitcast(both << 16, jnp.float32)  # bfloat16 is the upper half of float32
    value = pltpu.bitcast(both & jnp.uint32(0xFFFF0000), jnp.float32)
    return key.astype(plan.compute_dtype), value.astype(plan.compute_dtype)


# --- attention


def _attend(plan: Plan, r: Refs, walk: Walk, item: Item) -> None:
    """Attend with one item."""
    step = walk.step

    def fold(page: Scalar, slot: Scalar) -> None:
        start = page * plan.page_size
        _unpack(plan, r, slot, item.limit - start)
        _with_tile(plan, item, step, lambda tokens, first: _accumulate(plan, r, item, step, tokens, first, start))

    _with_tile(plan, item, step, lambda tokens, first: _begin(plan, r, tokens))
    walk.over_context(item, fold)
    _with_tile(plan, item, step, lambda tokens, first: _finish(plan, r, item, step, tokens, first))


def _with_tile(plan: Plan, item: Item, step: Scalar, run: Callable[[int, Scalar], None]) -> None:
    """Run with the smallest tile that covers the item: its tokens, and its first token counted from the block's."""
    begin, end = item.begin - step * plan.block_tokens, item.end - step * plan.block_tokens
    covered = jnp.bool_(False)
    for tokens in plan.tiles:
        first = jnp.minimum(lax.div(begin, plan.unit) * plan.unit, plan.block_tokens - tokens)
        fits = (end <= first + tokens) if tokens < plan.tiles[-1] else jnp.bool_(True)

        @pl.when(fits & jnp.logical_not(covered))
        def _(tokens: int = tokens, first: Scalar = first) -> None:
            run(tokens, first)

        covered |= fits


def _pattern(ref: Ref, head: Scalar, copies: int) -> jax.Array:
    """A per-head value for each row of a tile, [rows, 128]: the pattern of one unit, repeated."""
    x = ref[head]
    return x if copies == 1 else jnp.concatenate([x] * copies, axis=0)


def _for_heads(plan: Plan, rows: int, run: Callable[[Scalar], None]) -> None:
    unroll = next(n for n in (8, 4, 2, 1) if plan.num_kv_heads % n == 0 and (n == 1 or n * rows * plan.context <= 2 * 16 * 512))
    lax.fori_loop(0, plan.num_kv_heads, lambda head, _: run(head), None, unroll=unroll)


def _begin(plan: Plan, r: Refs, tokens: int) -> None:
    rows = tokens * plan.group

    def begin(head: Scalar) -> None:
        tile = pl.ds(0, rows)
        if r.sinks is None:
            r.top[head, tile] = jnp.full((rows, LANES), LOWEST, jnp.float32)
            r.total[head, tile] = jnp.zeros((rows, LANES), jnp.float32)
        else:
            r.top[head, tile] = _pattern(r.sinks, head, tokens // plan.unit)
            r.total[head, tile] = jnp.ones((rows, LANES), jnp.float32)
        r.sums[head, tile] = jnp.zeros((rows, plan.head_size), jnp.float32)

    _for_heads(plan, rows, begin)


def _accumulate(plan: Plan, r: Refs, item: Item, step: Scalar, tokens: int, first: Scalar, start: Scalar) -> None:
    """Fold the unpacked keys and values, from position `start` on, into the online softmax of a tile."""
    rows, context = tokens * plan.group, plan.context
    precision = lax.Precision.HIGHEST if plan.compute_dtype == jnp.float32 else None
    token = lax.div(lax.broadcasted_iota(jnp.int32, (rows, LANES), 0), plan.group)
    query = item.offset + step * plan.block_tokens + first + token  # positions [rows, 128]

    def accumulate(head: Scalar) -> None:
        tile = pl.ds(0, rows)
        q = r.q[head, pl.ds(pl.multiple_of(first * plan.group, SUBLANES), rows)].astype(plan.compute_dtype)
        keys, values = _head(plan, r, head)
        scores = lax.dot_general(q, keys, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
        slopes = None if r.slopes is None else widen(_pattern(r.slopes, head, tokens // plan.unit), context)
        scores = _biased(plan, scores, slopes, widen(query, context), start, item.limit, r.scalars[1])
        top = r.top[head, tile]
        new_top = jnp.maximum(top, scores.max(axis=1, keepdims=True))
        weights = jnp.exp2(scores - widen(new_top, context))
        shrink = jnp.exp2(top - new_top)
        r.top[head, tile] = new_top
        r.total[head, tile] = r.total[head, tile] * shrink + weights.sum(axis=1, keepdims=True)
        added = lax.dot(weights.astype(plan.compute_dtype), values, precision=precision, preferred_element_type=jnp.float32)
        r.sums[head, tile] = r.sums[head, tile] * widen(shrink, plan.head_size) + added

    _for_heads(plan, rows, accumulate)


def _biased(
    plan: Plan, products: jax.Array, slopes: jax.Array | None, query: jax.Array, start: Scalar, limit: Scalar, window: Scalar
) -> jax.Array:
    """Scores [rows, context] in base 2, so that their exponential takes one multiplication less: those of q . k, times log2(e)."""
    if plan.softcap is None:
        scores = products * (plan.score_scale * LOG2_E)
    else:
        scores = (plan.softcap * LOG2_E) * jnp.tanh(products * (plan.score_scale / plan.softcap))
    key = start + lax.broadcasted_iota(jnp.int32, products.shape, 1)
    if slopes is not None:  # times log2(e) already
        scores += slopes * (key - query).astype(jnp.float32)
    visible = key <= query if plan.causal else key < limit
    if plan.windowed:
        visible &= key > query - window
        if not plan.causal:
            visible &= key < query + window
    return jnp.where(visible, scores, MASKED)


def _finish(plan: Plan, r: Refs, item: Item, step: Scalar, tokens: int, first: Scalar) -> None:
    """Write the item's rows of a tile; the other rows belong to other items."""
    rows, H = tokens * plan.group, plan.head_size
    token = step * plan.block_tokens + first + lax.div(lax.broadcasted_iota(jnp.int32, (rows, H), 0), plan.group)
    is_own = (token >= item.begin) & (token < item.end)

    def finish(head: Scalar) -> None:
        tile = pl.ds(pl.multiple_of(first * plan.group, SUBLANES), rows)
        total = widen(jnp.maximum(r.total[head, pl.ds(0, rows)], 1e-30), H)
        out = r.sums[head, pl.ds(0, rows)] / total * plan.value_scale
        out = jnp.where(is_own, out, r.out[head, tile].astype(jnp.float32))
        r.out[head, tile] = out.astype(r.out.dtype)

    _for_heads(plan, rows, finish)
