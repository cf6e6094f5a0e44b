"""The bodies of the TPU kernels: one writes new vectors into pages, the other attends to them, a block of queries per grid step.

1. A step walks the items of its block: an item is the tokens that one row of the batch has in the block.
2. An item walks its context a block of pages at a time, to the last one it may see. While a block is attended to, the DMAs of the next one
   run, be it the same item's, the next item's, or the next step's. A page is fetched once: its vectors are the keys, and their first C
   numbers the values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_attention.tpu_plan import LANES, TABLE_CHUNK, Plan
from pallas_kernels.ragged_paged_attention.reference import MASKED

Ref: TypeAlias = Any
Scalar: TypeAlias = jax.Array
LOG2_E = math.log2(math.e)
LOWEST = MASKED / 2  # of the running maximum: masked scores lie so far below it that their weight is exactly zero


class Item(NamedTuple):
    """The tokens [begin, end) that a row has in a block of queries, and the context they see."""

    row: Scalar
    begin: Scalar
    end: Scalar
    offset: Scalar  # position of a token minus its index
    limit: Scalar  # keys from here on are not seen, or do not exist
    end_page: Scalar


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Refs:
    """The attention kernel's memory; shapes beside each."""

    layer: Ref  # SMEM i32[1]
    query_start: Ref  # SMEM i32[S + 1]
    kv_len: Ref  # SMEM i32[S]
    table: Ref  # SMEM i32[S * P], or HBM i32[S, chunks, 8, 128]
    q: Ref  # VMEM [block * N, C + Hr]
    pages: Ref  # HBM [R, num_pages, page_size, C + Hr]
    out: Ref  # VMEM [block * N, C]
    state: Ref  # SMEM i32[2]: the row of the next item, the slot that its first pages go to
    fetched: Ref  # VMEM [2, context, C + Hr]
    top: Ref  # VMEM f32[tile * N, 128]: running maximum, the same in every lane
    total: Ref  # VMEM f32[tile * N, 128]: running denominator
    sums: Ref  # VMEM f32[tile * N, C]: running numerator
    fetch_done: Ref  # DMA semaphores [2]
    chunk: Ref  # SMEM i32[8, 128]: part of a table in HBM; this and the next two are None for a table in SMEM
    chunk_of: Ref  # SMEM i32[2]: its row and number
    chunk_done: Ref  # DMA semaphore


def write_kernel(layer: Ref, page_id: Ref, low: Ref, high: Ref, new: Ref, page: Ref, out: Ref) -> None:
    """One page per grid step: slots low .. high take the new vectors, [page_size, C + Hr] or one for all slots, the others stay."""
    del layer, page_id  # they choose the page
    step = pl.program_id(0)
    slot = lax.broadcasted_iota(jnp.int32, page.shape, 0)
    is_new = (slot >= low[step]) & (slot < high[step])
    # float32: not every chip selects narrower numbers.
    out[...] = jnp.where(is_new, new[...].astype(jnp.float32), page[...].astype(jnp.float32)).astype(out.dtype)


def attention_kernel(plan: Plan, r: Refs) -> None:
    """One grid step; everything it changes is in the refs."""
    step = pl.program_id(0)

    @pl.when(step == 0)
    def _() -> None:
        if not plan.table_in_smem:
            r.chunk_of[0] = -1
        row = _row_with_tokens(plan, r, jnp.int32(0))
        r.state[0], r.state[1] = row, 0

        @pl.when(row < plan.num_rows)
        def _() -> None:
            _fetch(plan, r, _item(plan, r, row, step), jnp.int32(0), jnp.int32(0))

    r.out[...] = jnp.zeros(r.out.shape, r.out.dtype)

    def is_in_block(row: Scalar) -> Scalar:
        begin = r.query_start[jnp.minimum(row, plan.num_rows)]
        return (row < plan.num_rows) & (begin < (step + 1) * plan.block_tokens)

    def attend(row: Scalar) -> Scalar:
        _attend(plan, r, _item(plan, r, row, step), step)
        continues = r.query_start[row + 1] > (step + 1) * plan.block_tokens
        following = _row_with_tokens(plan, r, row + 1)
        r.state[0] = jnp.where(continues, row, following)
        return jnp.where(continues, plan.num_rows, following)  # out of the loop; the next step goes on with this row

    lax.while_loop(is_in_block, attend, r.state[0])


# --- items


def _row_with_tokens(plan: Plan, r: Refs, row: Scalar) -> Scalar:
    """The first row from this one on that has tokens in the step, or S."""

    def is_empty(row: Scalar) -> Scalar:
        index = jnp.minimum(row, plan.num_rows - 1)
        return (row < plan.num_rows) & (r.query_start[index] == r.query_start[index + 1])

    return lax.while_loop(is_empty, lambda row: row + 1, row)


def _item(plan: Plan, r: Refs, row: Scalar, step: Scalar) -> Item:
    begin = jnp.maximum(r.query_start[row], step * plan.block_tokens)
    end = jnp.minimum(r.query_start[row + 1], (step + 1) * plan.block_tokens)
    offset = r.kv_len[row] - r.query_start[row + 1]
    limit = offset + end if plan.causal else r.kv_len[row]
    return Item(row, begin, end, offset, limit, pl.cdiv(limit, plan.page_size))


def _following(plan: Plan, r: Refs, item: Item, step: Scalar) -> tuple[Scalar, Scalar]:
    """Row and step of the item after this one; row S if there is none."""
    continues = r.query_start[item.row + 1] > (step + 1) * plan.block_tokens
    row = jnp.where(continues, item.row, _row_with_tokens(plan, r, item.row + 1))
    begins = lax.div(r.query_start[jnp.minimum(row, plan.num_rows)], plan.block_tokens)
    return row, jnp.where(continues, step + 1, jnp.maximum(begins, step))


# --- pages


def _page_id(plan: Plan, r: Refs, row: Scalar, page: Scalar) -> Scalar:
    """Entry of the page table; a table in HBM is read a chunk at a time."""
    if plan.table_in_smem:
        return r.table[row * plan.table_width + page]
    number, within = lax.div(page, TABLE_CHUNK), lax.rem(page, TABLE_CHUNK)

    @pl.when((r.chunk_of[0] != row) | (r.chunk_of[1] != number))
    def _() -> None:
        copy = pltpu.make_async_copy(r.table.at[row, number], r.chunk, r.chunk_done)
        copy.start()
        r.chunk_of[0], r.chunk_of[1] = row, number
        copy.wait()

    return r.chunk[lax.div(within, LANES), lax.rem(within, LANES)]


def _slots(plan: Plan, r: Refs, slot: Scalar, index: Scalar) -> Ref:
    """Where the index-th page of a block is fetched to."""
    return r.fetched.at[slot, pl.ds(pl.multiple_of(index * plan.page_size, plan.page_size), plan.page_size)]


def _fetch(plan: Plan, r: Refs, item: Item, first_page: Scalar, slot: Scalar) -> None:
    """Start the DMAs of a block of the item's pages into a slot."""
    count = item.end_page - first_page

    def start(index: Scalar, _: None) -> None:
        page = r.pages.at[r.layer[0], _page_id(plan, r, item.row, first_page + index)]
        pltpu.make_async_copy(page, _slots(plan, r, slot, index), r.fetch_done.at[slot]).start()

    @pl.when(count >= plan.pages_per_block)
    def _() -> None:  # the trip count is static, so that DMAs can be started in one go
        lax.fori_loop(0, plan.pages_per_block, start, None, unroll=math.gcd(plan.pages_per_block, 8))

    @pl.when(count < plan.pages_per_block)
    def _() -> None:
        lax.fori_loop(0, count, start, None)


def _await(plan: Plan, r: Refs, item: Item, first_page: Scalar, slot: Scalar) -> None:
    """Wait until the pages that _fetch started are there."""
    count = item.end_page - first_page

    def wait(target: Ref) -> None:
        pltpu.make_async_copy(target, target, r.fetch_done.at[slot]).wait()  # a wait needs only the number of bytes

    @pl.when(count >= plan.pages_per_block)
    def _() -> None:
        wait(r.fetched.at[slot])

    @pl.when(count < plan.pages_per_block)
    def _() -> None:
        lax.fori_loop(0, count, lambda index, _: wait(_slots(plan, r, slot, index)), None)


# --- attention


def _attend(plan: Plan, r: Refs, item: Item, step: Scalar) -> None:
    """Attend with one item; its first pages are on their way, and the following item's are when this returns."""
    next_row, next_step = _following(plan, r, item, step)
    _with_tile(plan, item, step, lambda tokens, first: _begin(plan, r, tokens))

    def body(index: Scalar, slot: Scalar) -> Scalar:
        page = index * plan.pages_per_block
        is_last = page + plan.pages_per_block >= item.end_page

        @pl.when(jnp.logical_not(is_last))
        def _() -> None:
            _fetch(plan, r, item, page + plan.pages_per_block, 1 - slot)

        @pl.when(is_last & (next_row < plan.num_rows))
        def _() -> None:
            _fetch(plan, r, _item(plan, r, next_row, next_step), jnp.int32(0), 1 - slot)

        _await(plan, r, item, page, slot)
        start = index * plan.context

        @pl.when(start + plan.context > item.limit)
        def _() -> None:  # what lies beyond the context becomes zero, as 0 * NaN is NaN
            keys = r.fetched[slot].astype(jnp.float32)
            key = start + lax.broadcasted_iota(jnp.int32, keys.shape, 0)
            r.fetched[slot] = jnp.where(key < item.limit, keys, 0).astype(r.fetched.dtype)

        _with_tile(plan, item, step, lambda tokens, first: _accumulate(plan, r, item, step, slot, tokens, first, start))
        return 1 - slot

    r.state[1] = lax.fori_loop(0, pl.cdiv(item.end_page, plan.pages_per_block), body, r.state[1])
    _with_tile(plan, item, step, lambda tokens, first: _finish(plan, r, item, step, tokens, first))


def _with_tile(plan: Plan, item: Item, step: Scalar, run: Callable[[int, Scalar], None]) -> None:
    """Run with the smallest tile that covers the item: its tokens, and its first token counted from the block's."""
    first = item.begin - step * plan.block_tokens
    if len(plan.tiles) == 1:
        run(1, first)
        return
    is_single = item.end - item.begin == 1

    @pl.when(is_single)
    def _() -> None:
        run(1, first)

    @pl.when(jnp.logical_not(is_single))
    def _() -> None:
        run(plan.block_tokens, jnp.int32(0))


def _lanes(x: jax.Array, width: int) -> jax.Array:
    """[rows, 128] with equal lanes -> [rows, width]."""
    copies = -(-width // LANES)
    return (x if copies == 1 else jnp.concatenate([x] * copies, axis=1))[:, :width]


def _begin(plan: Plan, r: Refs, tokens: int) -> None:
    rows = tokens * plan.num_heads
    r.top[pl.ds(0, rows)] = jnp.full((rows, LANES), LOWEST, jnp.float32)
    r.total[pl.ds(0, rows)] = jnp.zeros((rows, LANES), jnp.float32)
    r.sums[pl.ds(0, rows)] = jnp.zeros((rows, plan.latent_size), jnp.float32)


def _accumulate(plan: Plan, r: Refs, item: Item, step: Scalar, slot: Scalar, tokens: int, first: Scalar, start: Scalar) -> None:
    """Fold the fetched vectors, from position `start` on, into the online softmax of a tile; scores are in base 2."""
    N, context, C = plan.num_heads, plan.context, plan.latent_size
    tile = pl.ds(0, tokens * N)
    precision = lax.Precision.HIGHEST if plan.compute_dtype == jnp.float32 else None
    q = r.q[pl.ds(pl.multiple_of(first * N, N), tokens * N)].astype(plan.compute_dtype)
    keys = r.fetched[slot].astype(plan.compute_dtype)  # [context, C + Hr]
    scores = lax.dot_general(q, keys, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
    key = start + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    if plan.causal:
        token = lax.div(lax.broadcasted_iota(jnp.int32, (tokens * N, LANES), 0), N)
        visible = key <= _lanes(item.offset + step * plan.block_tokens + first + token, context)
    else:
        visible = key < item.limit
    scores = jnp.where(visible, scores * (plan.sm_scale * LOG2_E), MASKED)
    top = r.top[tile]
    new_top = jnp.maximum(top, scores.max(axis=1, keepdims=True))
    weights = jnp.exp2(scores - _lanes(new_top, context))
    shrink = jnp.exp2(top - new_top)
    r.top[tile] = new_top
    r.total[tile] = r.total[tile] * shrink + weights.sum(axis=1, keepdims=True)
    added = lax.dot(weights.astype(plan.compute_dtype), keys[:, :C], precision=precision, preferred_element_type=jnp.float32)
    r.sums[tile] = r.sums[tile] * _lanes(shrink, C) + added


def _finish(plan: Plan, r: Refs, item: Item, step: Scalar, tokens: int, first: Scalar) -> None:
    """Write the item's rows of a tile; the other rows belong to other items."""
    N, C = plan.num_heads, plan.latent_size
    tile = pl.ds(pl.multiple_of(first * N, N), tokens * N)
    token = step * plan.block_tokens + first + lax.div(lax.broadcasted_iota(jnp.int32, (tokens * N, C), 0), N)
    is_own = (token >= item.begin) & (token < item.end)
    out = r.sums[pl.ds(0, tokens * N)] / _lanes(jnp.maximum(r.total[pl.ds(0, tokens * N)], 1e-30), C)
    r.out[tile] = jnp.where(is_own, out, r.out[tile].astype(jnp.float32)).astype(r.out.dtype)
