"""The bodies of the GPU kernels of paged attention (Pallas Triton). See gpu.py for their order and gpu_plan.py for their sizes.

Triton knows arrays of powers of two and pointers, so every ref is a matrix or a vector that is indexed by arrays of rows and columns:

  q, out      [T * N, H]                                        row t * N + n
  k, v        [T * K, H]                                        row t * K + h
  pages       [R * num_pages * 2K * page_size, H]               row ((layer * num_pages + page) * 2K + 2h + which) * page_size + offset
              where values lie in the keys (mla_attention): [R * num_pages * K * page_size, H]
  sums        f32[num_slots * num_splits * N, Hv], top and total: the same without Hv

A head size that is no power of two is covered by two of them (Plan.key_chunks), and what hangs over is masked.
Scores are kept in base 2: exp2 is what the hardware has.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.ragged_paged_attention.gpu_plan import WRITE_TOKENS, Blocks, Plan, cdiv, chunks, power_of_two
from pallas_kernels.ragged_paged_attention.reference import MASKED

LOG2_E = math.log2(math.e)
EMPTY = MASKED / 2  # maximum over no keys: finite, and far enough above MASKED for exp2(MASKED - EMPTY) to be 0

Ref = Any
State = tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Refs that every attending program reads."""

    scalars: Ref  # i32[2]: layer, window
    query_start: Ref  # i32[S + 1]
    kv_len: Ref  # i32[S]
    table: Ref  # i32[S * P]
    q: Ref
    pages: Ref
    slopes: Ref | None  # f32[N]
    sinks: Ref | None  # f32[N]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """The queries that a program holds: i32[M] each, tokens of one row times heads of one KV head."""

    row: jax.Array  # of the batch
    kv_head: jax.Array
    first: jax.Array  # position of its first token
    last: jax.Array  # and of its last
    token: jax.Array
    position: jax.Array
    head: jax.Array
    valid: jax.Array

    def rows(self, plan: Plan) -> jax.Array:
        """Of q and out."""
        return self.token * plan.num_heads + self.head


def write_kernel(plan: Plan, scalars: Ref, slots: Ref, new: list[Ref], pages: Ref) -> None:
    """Program (i, h): WRITE_TOKENS tokens of KV head h, keys and values if these have rows of their own, into their slots.

    Args: i32[T] slots; negative ones hold no token.
    """
    h = pl.program_id(1)
    token = pl.program_id(0) * WRITE_TOKENS + jnp.arange(WRITE_TOKENS, dtype=jnp.int32)
    inside = token < plan.num_tokens
    slot = plgpu.load(slots.at[token], mask=inside, other=-1)
    valid = inside & (slot >= 0)
    slot = jnp.maximum(slot, 0)
    row = page_row(plan, scalars[0], jax.lax.div(slot, plan.page_size), h) + jax.lax.rem(slot, plan.page_size)
    row = jnp.where(valid, row, pages.shape[0])  # the interpreter writes masked numbers back: to nowhere
    for which, source in enumerate(new):
        for start, width in chunks(pages.shape[1]):
            x = _load(source, token * plan.num_kv_heads + h, start, width, source.shape[1], valid)
            _store(pages, row + which * plan.page_size, start, width, pages.shape[1], valid, x)


def decode_kernel(plan: Plan, batch: Batch, sums: Ref, tops: Ref, totals: Ref) -> None:
    """Program (heads, row, split): the partial result of a row of few tokens over one split of its context."""
    blocks, heads, row, split = plan.decode, pl.program_id(0), pl.program_id(1), pl.program_id(2)
    start, length = batch.query_start[row], batch.kv_len[row]
    count = batch.query_start[row + 1] - start
    begin, size = split_of(plan, length, count, batch.scalars[1])
    begin += split * size

    @pl.when((count > 0) & (count <= plan.short_tokens) & (begin < length))
    def _() -> None:
        tile = _tile(plan, blocks, heads, row, start, start + count, length - count)
        end = jnp.minimum(begin + size, length)
        context = blocks.context
        walk = _Walk(plan, batch, tile, blocks, end)
        first, last = jax.lax.div(begin, context), jax.lax.div(end + (context - 1), context)
        top, total, parts = walk.over(first, last, walk.start(), masked=True)
        slot = tile.token if plan.slot_is_token else row * plan.short_tokens + tile.token - start
        partial = (slot * plan.num_splits + split) * plan.num_heads + tile.head
        place = jnp.where(tile.valid, partial, tops.shape[0])
        plgpu.store(tops.at[place], top, mask=tile.valid)
        plgpu.store(totals.at[place], total, mask=tile.valid)
        for (chunk, width), part in zip(plan.value_chunks, parts, strict=True):
            _store(sums, place, chunk, width, plan.value_size, tile.valid, part)


def combine_kernel(
    plan: Plan, scalars: Ref, query_start: Ref, kv_len: Ref, sinks: Ref | None, sums: Ref, tops: Ref, totals: Ref, out: Ref
) -> None:
    """Program (head, token, row): the result of a token of a short row from its partial ones."""
    head, offset, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    start, length = query_start[row], kv_len[row]
    count = query_start[row + 1] - start

    @pl.when((offset < count) & (count <= plan.short_tokens))
    def _() -> None:
        begin, size = split_of(plan, length, count, scalars[1])
        split = jnp.arange(power_of_two(plan.num_splits), dtype=jnp.int32)
        used = split * size < length - begin
        slot = start + offset if plan.slot_is_token else row * plan.short_tokens + offset
        partial = (slot * plan.num_splits + split) * plan.num_heads + head
        top = plgpu.load(tops.at[partial], mask=used, other=EMPTY)
        total = plgpu.load(totals.at[partial], mask=used, other=0.0)
        sink = None if sinks is None else sinks[head] * LOG2_E
        highest = jnp.max(top) if sink is None else jnp.maximum(jnp.max(top), sink)
        weight = jnp.exp2(top - highest)
        denominator = jnp.sum(weight * total)
        if sink is not None:
            denominator += jnp.exp2(sink - highest)
        for chunk, width in plan.combined_chunks:
            parts = _load(sums, partial, chunk, width, plan.value_size, used)
            value = jnp.sum(parts * weight[:, None], axis=0) * plan.value_scale / jnp.maximum(denominator, 1e-30)
            _store_row(plan, out, (start + offset) * plan.num_heads + head, chunk, width, value)

    if plan.one_token_rows:

        @pl.when(count == 0)
        def _() -> None:
            for chunk, width in plan.value_chunks:
                _store_row(plan, out, row * plan.num_heads + head, chunk, width, jnp.zeros((width,), jnp.float32))


def prefill_kernel(plan: Plan, batch: Batch, block_row: Ref, block_start: Ref, block_end: Ref, out: Ref) -> None:
    """Program (heads, i): tokens block_start[i] .. block_end[i] of row block_row[i]; of row S, which is the padding: zeros."""
    blocks, context = plan.prefill, plan.prefill.context
    heads, block = pl.program_id(0), pl.program_id(1)
    row, start = block_row[block], block_start[block]
    end = jnp.minimum(block_end[block], start + plan.prefill_tokens)

    @pl.when((row < plan.num_rows) & (start < end))
    def _() -> None:
        length = batch.kv_len[row]
        tile = _tile(plan, blocks, heads, row, start, end, length - batch.query_start[row + 1] + start)
        walk = _Walk(plan, batch, tile, blocks, jnp.minimum(length, tile.last + 1) if plan.causal else length)
        # Keys that all queries of the tile see need no mask: between those that the window hides from some and the causal ones.
        last = jax.lax.div(walk.end + (context - 1), context)
        whole_to = jax.lax.div(jnp.minimum(tile.first + 1, length) if plan.causal else length, context)
        first, whole_from = jnp.int32(0), jnp.int32(0)
        if plan.windowed:
            window = batch.scalars[1]
            first = jax.lax.div(jnp.maximum(tile.first - window + 1, 0), context)
            whole_from = jax.lax.div(jnp.maximum(tile.last - window + context, 0), context)
            if not plan.causal:
                whole_to = jax.lax.div(jnp.minimum(tile.first + window, length), context)
        whole_from = jnp.minimum(jnp.maximum(whole_from, first), last)
        whole_to = jnp.minimum(jnp.maximum(whole_to, whole_from), last)
        state = walk.start()
        if plan.windowed:
            state = walk.over(first, whole_from, state, masked=True)
        state = walk.over(whole_from, whole_to, state, masked=False)
        state = walk.over(whole_to, last, state, masked=True)
        _finish(plan, batch, tile, state, out)

    @pl.when((row == plan.num_rows) & (start < end))
    def _() -> None:
        tile = _tile(plan, blocks, heads, row, start, end, jnp.int32(0))
        for chunk, width in plan.value_chunks:
            zeros = jnp.zeros((blocks.rows, width), plan.query_dtype)
            place = jnp.where(tile.valid, tile.rows(plan), out.shape[0])
            _store(out, place, chunk, width, plan.value_size, tile.valid, zeros)


def split_of(plan: Plan, length: jax.Array, count: jax.Array, window: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The key at which the splits of a row of few tokens begin, and their size: whole tiles of keys both."""
    context = plan.decode.context
    begin = jnp.int32(0)
    if plan.windowed:
        begin = jax.lax.div(jnp.maximum(length - count - window + 1, 0), context) * context
    tiles = jax.lax.div(length - begin + (plan.max_splits * context - 1), plan.max_splits * context)
    return begin, jnp.maximum(tiles * context, plan.least_split)


def _tile(plan: Plan, blocks: Blocks, program: jax.Array, row: jax.Array, start: jax.Array, end: jax.Array, position: jax.Array) -> Tile:
    """Tokens start .. end of a row, the first at the position given, for the heads of program: KV heads, and in each the tiles of heads."""
    tiles = cdiv(plan.group, blocks.heads)
    kv_head = jax.lax.div(program, tiles)
    index = jnp.arange(blocks.rows, dtype=jnp.int32)
    offset, member = jax.lax.div(index, blocks.heads), jax.lax.rem(index, blocks.heads) + jax.lax.rem(program, tiles) * blocks.heads
    return Tile(
        row=row, kv_head=kv_head, first=position, last=position + (end - start) - 1, token=start + offset, position=position + offset,
        head=kv_head * plan.group + member, valid=(start + offset < end) & (member < plan.group),
    )  # fmt: skip


class _Walk:
    """A tile's way over its context, keys after keys folded into an online softmax."""

    def __init__(self, plan: Plan, batch: Batch, tile: Tile, blocks: Blocks, end: jax.Array) -> None:
        self.plan, self.batch, self.tile, self.blocks, self.end = plan, batch, tile, blocks, end
        rows = jnp.where(tile.valid, tile.rows(plan), 0)
        self.queries = [
            _load(batch.q, rows, chunk, width, end, tile.valid).astype(plan.compute_dtype) for chunk, width, end in plan.key_chunks
        ]
        self.window = batch.scalars[1]
        self.layer = batch.scalars[0]
        self.slopes = None
        if batch.slopes is not None:
            self.slopes = plgpu.load(batch.slopes.at[jnp.where(tile.valid, tile.head, 0)]) * LOG2_E

    def start(self) -> State:
        """Maximum, denominator and numerators over no keys."""
        rows = self.blocks.rows
        parts = tuple(jnp.zeros((rows, width), jnp.float32) for _, width in self.plan.value_chunks)
        return jnp.full((rows,), EMPTY, jnp.float32), jnp.zeros((rows,), jnp.float32), parts

    def over(self, first: jax.Array, last: jax.Array, state: State, *, masked: bool) -> State:
        """Fold in the keys first * context .. last * context; masked says that some of them are hidden from some queries."""

        def body(index: jax.Array, state: State) -> State:
            key = index * self.blocks.context + jnp.arange(self.blocks.context, dtype=jnp.int32)
            inside = self._inside(key) if masked else None
            row = self._key_rows(key, inside)
            products, keys = self._products(row, inside)
            scores = self._scores(products, key)
            if inside is not None:
                scores = jnp.where(self._visible(key, inside), scores, MASKED)
            return self._fold(state, scores, self._values(row, keys, inside))

        return jax.lax.fori_loop(first, last, body, state)

    def _inside(self, key: jax.Array) -> jax.Array:
        """Keys that some query may see: others may hold anything, and pages outside the window may be gone."""
        inside = key < self.end
        return inside & (key > self.tile.first - self.window) if self.plan.windowed else inside

    def _visible(self, key: jax.Array, inside: jax.Array) -> jax.Array:
        return inside[None, :] & sees(self.plan, key[None, :] - self.tile.position[:, None], self.window)

    def _key_rows(self, key: jax.Array, inside: jax.Array | None) -> jax.Array:
        """Rows of the cache that hold keys i32[context]; their values lie page_size further."""
        plan = self.plan
        entry = self.tile.row * plan.table_width + jax.lax.div(key, plan.page_size)
        page = _load_vector(self.batch.table, entry, inside)
        return page_row(plan, self.layer, page, self.tile.kv_head) + jax.lax.rem(key, plan.page_size)

    def _products(self, row: jax.Array, inside: jax.Array | None) -> tuple[jax.Array, list[jax.Array]]:
        """Of the queries with the keys in some rows of the cache; and these keys, in chunks."""
        keys, products = [], []
        for (chunk, width, end), query in zip(self.plan.key_chunks, self.queries, strict=True):
            keys.append(self._cached(row, chunk, width, end, inside))
            products.append(_dot(query, keys[-1], 1))
        return sum(products[1:], products[0]), keys

    def _values(self, row: jax.Array, keys: list[jax.Array], inside: jax.Array | None) -> Iterator[jax.Array]:
        """Of the keys in some rows of the cache, in chunks; each is loaded when it is asked for."""
        plan = self.plan
        if plan.values_in_keys:
            yield from keys[: len(plan.value_chunks)]
            return
        for chunk, width in plan.value_chunks:
            yield self._cached(row + plan.page_size, chunk, width, plan.value_size, inside)

    def _cached(self, row: jax.Array, chunk: int, width: int, size: int, inside: jax.Array | None) -> jax.Array:
        """Numbers of the cache as operands of products; keys that nobody sees are zero, as 0 * NaN is NaN."""
        if self.plan.paired:
            chunk, width, size = chunk // 2, width // 2, cdiv(size, 2)
        return _decoded(self.plan, _load(self.batch.pages, row, chunk, width, size, inside))

    def _scores(self, products: jax.Array, key: jax.Array) -> jax.Array:
        """In base 2, before the mask."""
        scores = base_2_scores(self.plan, products)
        if self.slopes is not None:
            distance = key[None, :] - self.tile.position[:, None]  # i32: bfloat16 holds integers only up to 256
            scores += self.slopes[:, None] * distance.astype(jnp.float32)
        return scores

    def _fold(self, state: State, scores: jax.Array, values: Iterator[jax.Array]) -> State:
        top, total, parts = state
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - new_top[:, None])  # 0 where masked: new_top is at least EMPTY
        total = total * shrink + jnp.sum(weights, axis=1)
        weights = weights.astype(self.plan.compute_dtype)
        parts = tuple(part * shrink[:, None] + _dot(weights, value, 0) for part, value in zip(parts, values, strict=True))
        return new_top, total, parts


def _finish(plan: Plan, batch: Batch, tile: Tile, state: State, out: Ref) -> None:
    """Divide by the denominator, in which sinks take part, and store."""
    top, total, parts = state
    scale = jnp.full(top.shape, plan.value_scale, jnp.float32)
    if batch.sinks is not None:
        sink = plgpu.load(batch.sinks.at[jnp.where(tile.valid, tile.head, 0)]) * LOG2_E
        highest = jnp.maximum(top, sink)
        scale *= jnp.exp2(top - highest)
        total = total * jnp.exp2(top - highest) + jnp.exp2(sink - highest)
    factor = scale / jnp.maximum(total, 1e-30)
    place = jnp.where(tile.valid, tile.rows(plan), out.shape[0])
    for (chunk, width), part in zip(plan.value_chunks, parts, strict=True):
        _store(out, place, chunk, width, plan.value_size, tile.valid, (part * factor[:, None]).astype(plan.query_dtype))


def base_2_scores(plan: Plan, products: jax.Array) -> jax.Array:
    """Scaled products of queries and keys, capped if the plan says so."""
    if plan.softcap is None:
        return products * (plan.score_scale * LOG2_E)
    # tanh(x) = 1 - 2 / (1 + exp(2 x))
    return (plan.softcap * LOG2_E) * (1 - 2 / (1 + jnp.exp2(products * (2 * LOG2_E * plan.score_scale / plan.softcap))))


def sees(plan: Plan, distance: jax.Array, window: jax.Array) -> jax.Array:
    """Whether queries see keys so many tokens after them (i32, negative: before them), as far as causality and the window say."""
    visible = distance <= 0 if plan.causal else jnp.full(distance.shape, True)
    if plan.windowed:
        visible = visible & (distance > -window)
        if not plan.causal:
            visible = visible & (distance < window)
    return visible


def page_row(plan: Plan, layer: jax.Array, page: jax.Array, head: jax.Array) -> jax.Array:
    """The row of the cache where the keys of a head of a page begin."""
    rows = plan.page_size if plan.values_in_keys else 2 * plan.page_size
    return ((layer * plan.num_pages + page) * plan.num_kv_heads + head) * rows


def _dot(a: jax.Array, b: jax.Array, contracted: int) -> jax.Array:
    """a [M, n] times b, whose axis `contracted` is n; float32 sums, and for float32 operands float32 products."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((1,), (contracted,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _load_vector(ref: Ref, index: jax.Array, mask: jax.Array | None) -> jax.Array:
    return plgpu.load(ref.at[index]) if mask is None else plgpu.load(ref.at[index], mask=mask, other=0)


def _load(ref: Ref, rows: jax.Array, start: int, width: int, size: int, mask: jax.Array | None) -> jax.Array:
    """Columns start .. start + width of some rows, [len(rows), width]; zero beyond size and in rows that the mask excludes."""
    at, mask = _at(ref, rows, start, width, size, mask)
    return plgpu.load(at) if mask is None else plgpu.load(at, mask=mask, other=0)


def _store(ref: Ref, rows: jax.Array, start: int, width: int, size: int, mask: jax.Array, x: jax.Array) -> None:
    """Columns start .. start + width of some rows, as far as they are below size, where the mask says so."""
    at, mask = _at(ref, rows, start, width, size, mask)
    plgpu.store(at, x, mask=mask)


def _at(ref: Ref, rows: jax.Array, start: int, width: int, size: int, mask: jax.Array | None) -> tuple[Ref, Any]:
    """A view of columns of some rows, and a mask for it, if it needs one."""
    shape = (rows.shape[0], width)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + start
    if mask is not None:
        mask = jnp.broadcast_to(mask[:, None], shape)
    if start + width > size:
        mask = column < size if mask is None else mask & (column < size)
    return ref.at[jnp.broadcast_to(rows[:, None], shape), column], mask


def _store_row(plan: Plan, ref: Ref, row: jax.Array, start: int, width: int, x: jax.Array) -> None:
    """Columns start .. start + width of one row of the output, as far as it has them."""
    column = jnp.arange(width, dtype=jnp.int32) + start
    plgpu.store(ref.at[jnp.full((width,), row), column], x.astype(plan.query_dtype), mask=column < plan.value_size)


def _decoded(plan: Plan, x: jax.Array) -> jax.Array:
    """Numbers of the cache in the dtype of products, unscaled.

    Args:
      x: [n, width] of a float or int8 cache; float8 as the uint8 of its bits; or [n, width / 2] of pairs of either, in int16.
    """
    if plan.cache_dtype.itemsize > 1:
        return x.astype(plan.compute_dtype)
    float8 = plan.cache_dtype != jnp.int8
    if plan.paired:
        words = x.astype(jnp.int32)
        x = jnp.stack([words & 0xFF, (words >> 8) & 0xFF], axis=-1).reshape(x.shape[0], 2 * x.shape[1])
        if not float8:
            x = (x ^ 0x80) - 0x80
    if not float8:
        return x.astype(plan.compute_dtype)
    if plan.converts_float8:
        return jax.lax.bitcast_convert_type(x.astype(jnp.uint8), jnp.float8_e4m3fn).astype(plan.compute_dtype)
    # Shifted to where float32 has exponent and mantissa; the exponent's bias is 7 there and 127 here. Without an exponent the mantissa
    # has no leading one; no step meets a subnormal float32, which hardware may flush to zero.
    bits = x.astype(jnp.int32)
    size = bits & 0x7F
    one = jax.lax.bitcast_convert_type((size << 20) + ((127 - 7) << 23), jnp.float32)
    number = jnp.where(size < 8, 2 * one - 2.0**-6, jnp.where(size == 0x7F, jnp.nan, one))
    return jnp.where(bits >= 0x80, -number, number).astype(plan.compute_dtype)
