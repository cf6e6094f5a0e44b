"""The bodies of the TPU kernels: one writes new vectors into pages, the other attends to them, a block of queries per grid step.

Each step goes over items and their context as tpu_walk.py says. A page is fetched once: its vectors are the keys, and their first C numbers
the values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mla_attention.tpu_plan import Plan
from pallas_kernels.ragged_paged_attention.reference import MASKED
from pallas_kernels.tpu_walk import LANES, Item, Ref, Scalar, Walk, widen

LOG2_E = math.log2(math.e)
LOWEST = MASKED / 2  # of the running maximum: masked scores lie so far below it that their weight is exactly zero


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

    def place(slot: Scalar, index: Scalar) -> Ref:
        return r.fetched.at[slot, pl.ds(pl.multiple_of(index * plan.page_size, plan.page_size), plan.page_size)]

    walk = Walk(plan, r, layer=r.layer[0], window=None, place=place)
    walk.over_items(lambda: None, lambda item: _attend(plan, r, walk, item))


def _attend(plan: Plan, r: Refs, walk: Walk, item: Item) -> None:
    """Attend with one item."""
    step = walk.step

    def fold(page: Scalar, slot: Scalar) -> None:
        start = page * plan.page_size

        @pl.when(start + plan.context > item.limit)
        def _() -> None:  # what lies beyond the context becomes zero, as 0 * NaN is NaN
            keys = r.fetched[slot].astype(jnp.float32)
            key = start + lax.broadcasted_iota(jnp.int32, keys.shape, 0)
            r.fetched[slot] = jnp.where(key < item.limit, keys, 0).astype(r.fetched.dtype)

        _with_tile(plan, item, step, lambda tokens, first: _accumulate(plan, r, item, step, slot, tokens, first, start))

    _with_tile(plan, item, step, lambda tokens, first: _begin(plan, r, tokens))
    walk.over_context(item, fold)
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
        visible = key <= widen(item.offset + step * plan.block_tokens + first + token, context)
    else:
        visible = key < item.limit
    scores = jnp.where(visible, scores * (plan.sm_scale * LOG2_E), MASKED)
    top = r.top[tile]
    new_top = jnp.maximum(top, scores.max(axis=1, keepdims=True))
    weights = jnp.exp2(scores - widen(new_top, context))
    shrink = jnp.exp2(top - new_top)
    r.top[tile] = new_top
    r.total[tile] = r.total[tile] * shrink + weights.sum(axis=1, keepdims=True)
    added = lax.dot(weights.astype(plan.compute_dtype), keys[:, :C], precision=precision, preferred_element_type=jnp.float32)
    r.sums[tile] = r.sums[tile] * widen(shrink, C) + added


def _finish(plan: Plan, r: Refs, item: Item, step: Scalar, tokens: int, first: Scalar) -> None:
    """Write the item's rows of a tile; the other rows belong to other items."""
    N, C = plan.num_heads, plan.latent_size
    tile = pl.ds(pl.multiple_of(first * N, N), tokens * N)
    token = step * plan.block_tokens + first + lax.div(lax.broadcasted_iota(jnp.int32, (tokens * N, C), 0), N)
    is_own = (token >= item.begin) & (token < item.end)
    out = r.sums[pl.ds(0, tokens * N)] / widen(jnp.maximum(r.total[pl.ds(0, tokens * N)], 1e-30), C)
    r.out[tile] = jnp.where(is_own, out, r.out[tile].astype(jnp.float32)).astype(r.out.dtype)
