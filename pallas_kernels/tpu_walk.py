"""How a paged attention kernel for TPUs goes over its batch: items of a block of queries, their pages fetched ahead.

1. A grid step walks the items of its block: an item is the tokens that one row of the batch has in the block.
2. An item walks its context a block of pages at a time, from the first page in its window to the last one it may see. While a block is
   attended to, the DMAs of the next one run, be it the same item's, the next item's, or the next step's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
TABLE_CHUNK = 1024  # page ids that one DMA brings from a page table in HBM: one tile of int32

Ref: TypeAlias = Any
Scalar: TypeAlias = jax.Array


class Item(NamedTuple):
    """The tokens [begin, end) that a row has in a block of queries, and the context they see."""

    row: Scalar
    begin: Scalar
    end: Scalar
    offset: Scalar  # position of a token minus its index
    limit: Scalar  # keys from here on are not seen, or do not exist
    first_page: Scalar
    end_page: Scalar


class WalkPlan(Protocol):
    """What is known of a walk when it is traced."""

    @property
    def num_rows(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def pages_per_block(self) -> int: ...
    @property
    def table_width(self) -> int: ...
    @property
    def table_in_smem(self) -> bool: ...
    @property
    def causal(self) -> bool: ...


class WalkRefs(Protocol):
    """The memory of a walk; shapes beside each."""

    @property
    def query_start(self) -> Ref: ...  # SMEM i32[S + 1]
    @property
    def kv_len(self) -> Ref: ...  # SMEM i32[S]
    @property
    def table(self) -> Ref: ...  # SMEM i32[S * P], or HBM i32[S, chunks, 8, 128]
    @property
    def pages(self) -> Ref: ...  # HBM [R, num_pages, ...]
    @property
    def out(self) -> Ref: ...  # VMEM, the block's
    @property
    def state(self) -> Ref: ...  # SMEM i32[2]: the row of the next item, the slot that its first pages go to
    @property
    def fetched(self) -> Ref: ...  # VMEM [2, ...]: a block of pages in each slot
    @property
    def fetch_done(self) -> Ref: ...  # DMA semaphores [2]
    @property
    def chunk(self) -> Ref: ...  # SMEM i32[8, 128]: part of a table in HBM; this and the next two are None for a table in SMEM
    @property
    def chunk_of(self) -> Ref: ...  # SMEM i32[2]: its row and number
    @property
    def chunk_done(self) -> Ref: ...  # DMA semaphore


class Walk:
    """One grid step's way over its items.

    Args:
      layer: index into the first axis of the pages.
      window: a query at p sees keys above p - window; None is unlimited.
      place: where in `fetched` a page goes, by slot and index in its block.
    """

    def __init__(
        self, plan: WalkPlan, r: WalkRefs, *, layer: Scalar, window: Scalar | None, place: Callable[[Scalar, Scalar], Ref]
    ) -> None:
        self._plan, self._r, self._layer, self._window, self._place = plan, r, layer, window, place
        self.step = pl.program_id(0)

    def over_items(self, prepare: Callable[[], None], attend: Callable[[Item], None]) -> None:
        """Attend with each item of the block; `prepare` runs once, in the first step, before any page is fetched."""
        plan, r, step = self._plan, self._r, self.step

        @pl.when(step == 0)
        def _() -> None:
            if not plan.table_in_smem:
                r.chunk_of[0] = -1
            prepare()
            row = self._row_with_tokens(jnp.int32(0))
            r.state[0], r.state[1] = row, 0

            @pl.when(row < plan.num_rows)
            def _() -> None:
                item = self._item(row, step)
                self._fetch(item, item.first_page, jnp.int32(0))

        r.out[...] = jnp.zeros(r.out.shape, r.out.dtype)

        def is_in_block(row: Scalar) -> Scalar:
            begin = r.query_start[jnp.minimum(row, plan.num_rows)]
            return (row < plan.num_rows) & (begin < (step + 1) * plan.block_tokens)

        def visit(row: Scalar) -> Scalar:
            attend(self._item(row, step))
            continues = r.query_start[row + 1] > (step + 1) * plan.block_tokens
            following = self._row_with_tokens(row + 1)
            r.state[0] = jnp.where(continues, row, following)
            return jnp.where(continues, plan.num_rows, following)  # out of the loop; the next step goes on with this row

        lax.while_loop(is_in_block, visit, r.state[0])

    def over_context(self, item: Item, fold: Callable[[Scalar, Scalar], None]) -> None:
        """Call fold(first page, slot) for each block of the item's pages, and leave the following item's first ones on their way."""
        plan, r, width = self._plan, self._r, self._plan.pages_per_block
        next_row, next_step = self._following(item)

        def body(index: Scalar, slot: Scalar) -> Scalar:
            page = item.first_page + index * width
            is_last = page + width >= item.end_page

            @pl.when(jnp.logical_not(is_last))
            def _() -> None:
                self._fetch(item, page + width, 1 - slot)

            @pl.when(is_last & (next_row < plan.num_rows))
            def _() -> None:
                following = self._item(next_row, next_step)
                self._fetch(following, following.first_page, 1 - slot)

            self._await(item, page, slot)
            fold(page, slot)
            return 1 - slot

        r.state[1] = lax.fori_loop(0, pl.cdiv(item.end_page - item.first_page, width), body, r.state[1])

    def page_id(self, row: Scalar, page: Scalar) -> Scalar:
        """Entry of the page table; a table in HBM is read a chunk at a time."""
        plan, r = self._plan, self._r
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

    def _row_with_tokens(self, row: Scalar) -> Scalar:
        """The first row from this one on that has tokens in the step, or S."""
        query_start, num_rows = self._r.query_start, self._plan.num_rows

        def is_empty(row: Scalar) -> Scalar:
            index = jnp.minimum(row, num_rows - 1)
            return (row < num_rows) & (query_start[index] == query_start[index + 1])

        return lax.while_loop(is_empty, lambda row: row + 1, row)

    def _item(self, row: Scalar, step: Scalar) -> Item:
        plan, r = self._plan, self._r
        begin = jnp.maximum(r.query_start[row], step * plan.block_tokens)
        end = jnp.minimum(r.query_start[row + 1], (step + 1) * plan.block_tokens)
        offset = r.kv_len[row] - r.query_start[row + 1]
        limit = offset + end if plan.causal else r.kv_len[row]
        low = jnp.int32(0)
        if self._window is not None:  # at least one page, so that every item has a fetch to wait for
            low = jnp.clip(offset + begin - self._window + 1, 0, limit - 1)
        return Item(row, begin, end, offset, limit, lax.div(low, plan.page_size), pl.cdiv(limit, plan.page_size))

    def _following(self, item: Item) -> tuple[Scalar, Scalar]:
        """Row and step of the item after this one; row S if there is none."""
        plan, r, step = self._plan, self._r, self.step
        continues = r.query_start[item.row + 1] > (step + 1) * plan.block_tokens
        row = jnp.where(continues, item.row, self._row_with_tokens(item.row + 1))
        begins = lax.div(r.query_start[jnp.minimum(row, plan.num_rows)], plan.block_tokens)
        return row, jnp.where(continues, step + 1, jnp.maximum(begins, step))

    def _fetch(self, item: Item, first_page: Scalar, slot: Scalar) -> None:
        """Start the DMAs of a block of the item's pages into a slot."""
        r, width, count = self._r, self._plan.pages_per_block, item.end_page - first_page

        def start(index: Scalar, _: None) -> None:
            page = r.pages.at[self._layer, self.page_id(item.row, first_page + index)]
            pltpu.make_async_copy(page, self._place(slot, index), r.fetch_done.at[slot]).start()

        @pl.when(count >= width)
        def _() -> None:  # the trip count is static, so that DMAs can be started in one go
            lax.fori_loop(0, width, start, None, unroll=math.gcd(width, 8))

        @pl.when(count < width)
        def _() -> None:
            lax.fori_loop(0, count, start, None)

    def _await(self, item: Item, first_page: Scalar, slot: Scalar) -> None:
        """Wait until the pages that _fetch started are there."""
        r, width, count = self._r, self._plan.pages_per_block, item.end_page - first_page

        def wait(target: Ref) -> None:
            pltpu.make_async_copy(target, target, r.fetch_done.at[slot]).wait()  # a wait needs only the number of bytes

        @pl.when(count >= width)
        def _() -> None:
            wait(r.fetched.at[slot])

        @pl.when(count < width)
        def _() -> None:
            lax.fori_loop(0, count, lambda index, _: wait(self._place(slot, index)), None)


def lay_out_table(page_table: jax.Array, *, in_smem: bool) -> jax.Array:
    """Flat for SMEM, where rows would be padded to whole lanes; in whole tiles for HBM, from where DMAs take tiles."""
    S, P = page_table.shape
    if in_smem:
        return page_table.reshape(-1)
    return jnp.pad(page_table, ((0, 0), (0, -P % TABLE_CHUNK))).reshape(S, -1, SUBLANES, LANES)


def widen(x: jax.Array, width: int) -> jax.Array:
    """[rows, 128] with equal lanes -> [rows, width]."""
    copies = -(-width // LANES)
    return (x if copies == 1 else jnp.concatenate([x] * copies, axis=1))[:, :width]


def round_up(n: int, multiple: int) -> int:
    """The next multiple from n on."""
    return -(-n // multiple) * multiple
