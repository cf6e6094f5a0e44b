"""The prefill kernel for Hopper (Pallas Mosaic GPU): copies, products and softmax run beside each other, in warpgroups of their own.

A program attends with 128 tokens of one row and one query head. Three warpgroups share its work:

  loader      page ids -> copies of keys and values into a ring of buffers, as soon as both computers have left one
  computers   two, of 64 tokens each: products on tensor cores, softmax in registers. They take turns: while the products of one keep the
              tensor cores busy, the other one computes its weights

  keys, values [stages, context, H]:   loader --filled[i]--> computers --left[i]--> loader
  turns:                               both computers meet twice in each block of keys, the second one a meeting behind

A tile begins at a multiple of 8 tokens, as the hardware copies whole tiles of 8 rows. What lies before its row or behind it is computed and
not stored. A token's numbers depend on neither: it meets the same blocks of keys wherever its tile begins.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention.gpu_kernel import EMPTY, LOG2_E, Batch, base_2_scores, page_row, sees
from pallas_kernels.ragged_paged_attention.gpu_plan import Plan, cdiv
from pallas_kernels.ragged_paged_attention.reference import MASKED

COMPUTERS = 2
TILE_ROWS = 64  # of a computer: what a warpgroup multiplies at a time
# Of each thread. A program starts with as many for all, multiples of 8 of the multiprocessor's 65,536; a computer waits for what it takes
# beyond until the loader has given it up, so that both takings together may be no more.
COMPUTER_REGISTERS, LOADER_REGISTERS = 232, 40

Ref = Any
State = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What the warpgroups of a program share."""

    queries: Ref  # [COMPUTERS, TILE_ROWS, H]
    keys: Ref  # [stages, context, H]
    values: Ref
    results: Ref  # [COMPUTERS, TILE_ROWS, H], row-major
    queries_filled: Ref
    keys_filled: Ref
    values_filled: Ref
    keys_left: Ref
    values_left: Ref
    turns: Ref


def shared_types(plan: Plan) -> dict[str, Any]:
    """Shapes, layouts and barriers, by field of Shared."""
    blocks, H, dtype = plan.prefill, plan.head_size, plan.query_dtype
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # as tensor cores read their operands
    ring = plgpu.SMEM((blocks.stages, blocks.context, H), dtype, transforms=tiled)
    filled = plgpu.Barrier(num_arrivals=cdiv(blocks.context, plan.page_size), num_barriers=blocks.stages)
    left = plgpu.Barrier(num_arrivals=COMPUTERS, num_barriers=blocks.stages)
    return {
        "queries": plgpu.SMEM((COMPUTERS, TILE_ROWS, H), dtype, transforms=tiled), "keys": ring, "values": ring,
        "results": plgpu.SMEM((COMPUTERS, TILE_ROWS, H), dtype), "queries_filled": plgpu.Barrier(num_barriers=COMPUTERS),
        "keys_filled": filled, "values_filled": filled, "keys_left": left, "values_left": left,
        "turns": plgpu.Barrier(num_arrivals=COMPUTERS),
    }  # fmt: skip


def prefill_kernel(plan: Plan, batch: Batch, block_row: Ref, block_start: Ref, block_end: Ref, out: Ref, shared: Shared) -> None:
    """Program (head, i): tokens block_start[i], a multiple of 8, .. block_end[i] of row block_row[i]; of row S, the padding: zeros.

    Args:
      batch: queries [T rounded up to 8, N, H], otherwise as in gpu_kernel.py.
      out: [T, N, H].
    """
    head, block, warpgroup = (jax.lax.axis_index(name) for name in ("head", "block", "warpgroup"))
    begin, end = block_start[block], block_end[block]

    @pl.when(begin < end)
    def _() -> None:
        walk = _Walk(plan, batch, shared, head, block_row[block], begin, end)

        @pl.when(warpgroup == COMPUTERS)
        def _() -> None:
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
            walk.load()

        @pl.when(warpgroup < COMPUTERS)
        def _() -> None:
            plgpu.set_max_registers(COMPUTER_REGISTERS, action="increase")
            walk.compute(warpgroup, out)


class _Walk:
    """A tile's way over its context, in blocks of keys."""

    def __init__(
        self, plan: Plan, batch: Batch, shared: Shared, head: jax.Array, row: jax.Array, begin: jax.Array, row_end: jax.Array
    ) -> None:
        self.plan, self.batch, self.shared, self.head, self.begin, self.row_end = plan, batch, shared, head, begin, row_end
        context = plan.prefill.context
        self.row = jnp.minimum(row, plan.num_rows - 1)
        self.row_start = batch.query_start[row]
        self.length = jnp.where(row == plan.num_rows, 0, batch.kv_len[self.row])  # the padding sees no keys
        self.shift = self.length - row_end  # from a token to its position
        self.window = batch.scalars[1]
        first = jnp.maximum(begin, self.row_start) + self.shift
        last = jnp.minimum(begin + COMPUTERS * TILE_ROWS, row_end) + self.shift - 1
        keys = last + 1 if plan.causal else self.length
        # Keys that all queries see need no mask: between those that the window hides from some, and the causal ones.
        self.last = jax.lax.div(jnp.maximum(keys, 0) + (context - 1), context)
        whole_to = jax.lax.div(jnp.minimum(first + 1, self.length) if plan.causal else self.length, context)
        self.first_key, self.first, whole_from = jnp.int32(0), jnp.int32(0), jnp.int32(0)
        if plan.windowed:
            self.first_key = jnp.maximum(first - self.window + 1, 0)
            self.first = jax.lax.div(self.first_key, context)
            whole_from = jax.lax.div(jnp.maximum(last - self.window + context, 0), context)
            if not plan.causal:
                whole_to = jax.lax.div(jnp.minimum(first + self.window, self.length), context)
        self.whole_from = jnp.minimum(jnp.maximum(whole_from, self.first), self.last)
        self.whole_to = jnp.minimum(jnp.maximum(whole_to, self.whole_from), self.last)

    def load(self) -> None:
        """Fill the buffers, block after block, and see the last ones left."""
        plan, shared, stages = self.plan, self.shared, self.plan.prefill.stages
        kv_head, count = jax.lax.div(self.head, plan.group), self.last - self.first

        def body(i: jax.Array, rows: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            slot = jax.lax.rem(i, stages)
            following = self._page_rows(i + 1, kv_head)  # asked for a block ahead: an answer takes as long as half a block
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(shared.keys_left.at[slot]))
            pl.when(i < count)(lambda: self._copy(rows, shared.keys.at[slot], shared.keys_filled.at[slot]))
            rows = tuple(row + plan.page_size for row in rows)
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(shared.values_left.at[slot]))
            pl.when(i < count)(lambda: self._copy(rows, shared.values.at[slot], shared.values_filled.at[slot]))
            return following

        @pl.when(count > 0)
        def _() -> None:
            jax.lax.fori_loop(0, count + stages, body, self._page_rows(jnp.int32(0), kv_head))

    def _copy(self, rows: tuple[jax.Array, ...], buffer: Ref, filled: Ref) -> None:
        """Some rows of the cache from each of these on, into a buffer [context, H]."""
        size = min(self.plan.page_size, self.plan.prefill.context)
        for index, row in enumerate(rows):
            plgpu.copy_gmem_to_smem(self.batch.pages.at[pl.ds(row, size)], buffer.at[pl.ds(index * size, size)], filled)

    def _page_rows(self, i: jax.Array, kv_head: jax.Array) -> tuple[jax.Array, ...]:
        """Where the keys of the i-th block lie, page after page; of pages outside the row's context, those of one inside."""
        plan, rows = self.plan, []
        for place in range(0, plan.prefill.context, plan.page_size):
            key = (self.first + i) * plan.prefill.context + place
            inside = jnp.clip(key, self.first_key, self.length - 1)
            page = self.batch.table[self.row * plan.table_width + jax.lax.div(inside, plan.page_size)]
            offset = jax.lax.rem(key, plan.page_size) if plan.page_size > plan.prefill.context else 0
            rows.append(page_row(plan, self.batch.scalars[0], page, kv_head) + offset)
        return tuple(rows)

    def compute(self, computer: jax.Array, out: Ref) -> None:
        """The results of the tokens of one computer."""
        plan, shared = self.plan, self.shared
        token = self.begin + computer * TILE_ROWS
        queries = shared.queries.at[computer]
        plgpu.copy_gmem_to_smem(self.batch.q.at[pl.ds(token, TILE_ROWS), self.head], queries, shared.queries_filled.at[computer])
        plgpu.barrier_wait(shared.queries_filled.at[computer])
        top, total = jnp.full((TILE_ROWS,), EMPTY, jnp.float32), jnp.zeros((TILE_ROWS,), jnp.float32)
        sums = jnp.zeros((TILE_ROWS, plan.value_size), jnp.float32)
        state = self._laid(top), self._laid(total), self._laid(sums)
        pl.when(computer == 1)(self._meet)
        if plan.windowed:
            state = self._over(self.first, self.whole_from, state, computer, masked=True)
        state = self._over(self.whole_from, self.whole_to, state, computer, masked=False)
        state = self._over(self.whole_to, self.last, state, computer, masked=True)
        pl.when(computer == 0)(self._meet)
        self._store(state, computer, token, out)

    def _laid(self, x: jax.Array) -> jax.Array:
        """An array of rows of a product, or of numbers of such rows, where a warpgroup has them in its registers."""
        layout = plgpu.Layout.WGMMA if x.ndim == 2 else plgpu.Layout.WGMMA.reduce(1)
        return x if self.plan.interpret else plgpu.layout_cast(x, layout)  # the interpreter has no registers

    def _meet(self) -> None:
        plgpu.barrier_arrive(self.shared.turns)
        plgpu.barrier_wait(self.shared.turns)

    def _over(self, first: jax.Array, last: jax.Array, state: State, computer: jax.Array, *, masked: bool) -> State:
        """Fold in the blocks of keys first .. last; masked says that some keys are hidden from some queries."""
        plan, shared = self.plan, self.shared

        def body(index: jax.Array, state: State) -> State:
            slot = jax.lax.rem(index - self.first, plan.prefill.stages)
            plgpu.barrier_wait(shared.keys_filled.at[slot])
            products = self._products(computer, slot)
            plgpu.barrier_arrive(shared.keys_left.at[slot])
            top, total, sums = state
            scores = self._scores(products, index, computer, masked=masked)
            new_top = jnp.maximum(top, scores.max(axis=1))
            shrink = jnp.exp2(top - new_top)
            weights = jnp.exp2(scores - jax.lax.broadcast_in_dim(new_top, scores.shape, [0]))  # 0 where masked: new_top is at least EMPTY
            total = total * shrink + weights.sum(axis=1)
            weights = weights.astype(plan.query_dtype)
            plgpu.barrier_arrive(shared.turns)
            plgpu.barrier_wait(shared.values_filled.at[slot])
            if masked:
                self._clear(index, slot, computer)
            plgpu.barrier_wait(shared.turns)
            sums = sums * jax.lax.broadcast_in_dim(shrink, sums.shape, [0]) + self._weighted(weights, slot)
            plgpu.barrier_arrive(shared.values_left.at[slot])
            return new_top, total, sums

        return jax.lax.fori_loop(first, last, body, state)

    def _scores(self, products: jax.Array, index: jax.Array, computer: jax.Array, *, masked: bool) -> jax.Array:
        """In base 2, MASKED where hidden."""
        plan = self.plan
        scores = base_2_scores(plan, products)
        if not masked and self.batch.slopes is None:
            return scores
        key, query = (self._laid(jax.lax.broadcasted_iota(jnp.int32, products.shape, axis)) for axis in (1, 0))
        distance = key - query + (index * plan.prefill.context - (self.begin + computer * TILE_ROWS + self.shift))
        if self.batch.slopes is not None:
            scores += distance.astype(jnp.float32) * (self.batch.slopes[self.head] * LOG2_E)
        if not masked:
            return scores
        inside = key < self.length - index * plan.prefill.context
        return jnp.where(inside & sees(plan, distance, self.window), scores, MASKED)

    def _clear(self, index: jax.Array, slot: jax.Array, computer: jax.Array) -> None:
        """Zero the values behind the end of the row, which may be anything: 0 * NaN is NaN.

        The first computer does it for both: the second one has its turn with these values a meeting later.
        """
        plan, shared = self.plan, self.shared
        behind = self.length - index * plan.prefill.context

        @pl.when((computer == 0) & (behind < plan.prefill.context))
        def _() -> None:
            values = shared.values[slot]
            key = self._laid(jax.lax.broadcasted_iota(jnp.int32, values.shape, 0))
            shared.values[slot] = jnp.where(key < behind, values, jnp.zeros_like(values))
            plgpu.commit_smem()

    def _products(self, computer: jax.Array, slot: jax.Array) -> jax.Array:
        """Of queries and keys [TILE_ROWS, context]; the other computer has its turn when they are under way."""
        queries, keys = self.shared.queries.at[computer], self.shared.keys.at[slot]
        if self.plan.interpret:  # which knows no products of transposed matrices
            products = jax.lax.dot_general(queries[...], keys[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            self._meet()
            return products

        def multiply(sums: Ref) -> jax.Array:
            plgpu.wgmma(sums, queries, plgpu.transpose_ref(keys, (1, 0)))
            self._meet()
            return sums[...]

        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((TILE_ROWS, self.plan.prefill.context), jnp.float32))

    def _weighted(self, weights: jax.Array, slot: jax.Array) -> jax.Array:
        """Sums of the values of a block [TILE_ROWS, H]."""
        values = self.shared.values.at[slot]
        if self.plan.interpret:  # which knows no products of registers
            return jax.lax.dot(weights, values[...], preferred_element_type=jnp.float32)

        def multiply(sums: Ref) -> jax.Array:
            plgpu.wgmma(sums, weights, values)
            return sums[...]

        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((TILE_ROWS, self.plan.value_size), jnp.float32))

    def _store(self, state: State, computer: jax.Array, token: jax.Array, out: Ref) -> None:
        """Divide by the denominator, in which sinks take part, and store what belongs to the row."""
        top, total, sums = state
        scale = jnp.full_like(total, self.plan.value_scale)
        if self.batch.sinks is not None:
            sink = self.batch.sinks[self.head] * LOG2_E
            highest = jnp.maximum(top, sink)
            shrink = jnp.exp2(top - highest)
            scale, total = scale * shrink, total * shrink + jnp.exp2(sink - highest)
        factor = scale / jnp.maximum(total, 1e-30)
        results = self.shared.results.at[computer]
        results[...] = (sums * jax.lax.broadcast_in_dim(factor, sums.shape, [0])).astype(self.plan.query_dtype)
        plgpu.commit_smem()
        start, end = jnp.clip(self.row_start - token, 0, TILE_ROWS), jnp.clip(self.row_end - token, 0, TILE_ROWS)
        is_whole = end - start == TILE_ROWS

        @pl.when(is_whole)
        def _() -> None:
            plgpu.copy_smem_to_gmem(results, out.at[pl.ds(token, TILE_ROWS), self.head])

        @pl.when(jnp.logical_not(is_whole))
        def _() -> None:
            @pl.loop(start, end)
            def _(i: jax.Array) -> None:
                plgpu.copy_smem_to_gmem(results.at[i], out.at[token + i, self.head])

        plgpu.wait_smem_to_gmem(0)
