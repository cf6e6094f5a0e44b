"""The static plan of the GPU kernels: tiles, splits of the context, warps and stages, and which arguments they refuse.

A tile is some tokens of one row times some query heads of one KV head. Rows of few tokens (decodes, drafts) split their context over
programs, so that one long row fills the chip; the others (prompts) have tokens enough for that.

Splits are a function of the row's own context and of the model, never of the batch: a row's result is the same, bit for bit, in any
company.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels import tuning

CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
QUERY_DTYPES = ("float32", "bfloat16", "float16")
LEAST_TILE = 16  # rows, columns and depth of the smallest product on tensor cores
LEAST_STAGES = 3  # with fewer, no load is under way while a program computes
MOST_DECODE_ROWS = 64
MOST_SHORT_TOKENS = 4  # tokens of a row that still splits its context: a decode with some drafts
LONE_ROW_PROGRAMS = 256  # into which the longest context is split, over all KV heads: two for each multiprocessor of the largest chips
LEAST_SPLIT = 256  # keys: shorter ones write partial results of more than a few percent of what they read
WRITE_TOKENS = 16
MAX_HEAD_SIZE = 256
MOSAIC_DTYPES = ("bfloat16", "float16")
MOSAIC_HEAD_SIZES = (64, 128)  # of larger ones, sums and weights do not fit the registers
MOSAIC_BYTES = 226 * tuning.KIB  # of shared memory, beside its barriers
TILE_ALIGNMENT = 8  # tokens: Hopper's copies are of whole tiles of so many rows
MOST_COMBINED = 1 << 14  # numbers: half the registers of four warps


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How one kernel cuts its work."""

    rows: int  # of a tile: tokens times heads
    heads: int  # query heads of a tile
    context: int  # keys that meet a tile at a time
    warps: int
    stages: int  # of the software pipeline that loads them: (stages - 1) // 2 loads are under way, as each waits for its page's id
    mosaic: bool = False  # hopper_kernel.py; its rows, heads and warps are fixed, and its stages are the buffers that it fills in turn


MOSAIC_BLOCKS = Blocks(rows=128, heads=1, context=128, warps=12, stages=2, mosaic=True)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything about one call that is known when it is traced."""

    op: str  # whose kernels these are, for profilers
    num_tokens: int
    num_rows: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    value_size: int
    values_in_keys: bool  # a value is the first value_size numbers of its key, and has no row of its own in the cache
    page_size: int
    num_pages: int
    table_width: int
    query_dtype: jnp.dtype
    cache_dtype: jnp.dtype
    paired: bool  # two bytes of the cache are addressed as one number
    decode: Blocks
    prefill: Blocks
    least_split: int
    max_splits: int  # of the longest context
    short_tokens: int
    one_token_rows: bool
    causal: bool
    windowed: bool
    softcap: float | None
    alibi: bool
    sinks: bool
    score_scale: float
    value_scale: float
    converts_float8: bool
    interpret: bool

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Of the products' operands."""
        return _compute_dtype(self.query_dtype, self.cache_dtype)

    @property
    def key_chunks(self) -> tuple[tuple[int, int, int], ...]:
        """Start and size of the powers of two that cover a key, those of a value in it first, and where the numbers that count end."""
        if not self.values_in_keys:
            return tuple((start, width, self.head_size) for start, width in chunks(self.head_size))
        rest = chunks(self.head_size - self.value_size)
        return (
            *((start, width, self.value_size) for start, width in self.value_chunks),
            *((self.value_size + start, width, self.head_size) for start, width in rest),
        )

    @property
    def value_chunks(self) -> tuple[tuple[int, int], ...]:
        """The same for a value."""
        return chunks(self.value_size)

    @property
    def combined_chunks(self) -> tuple[tuple[int, int], ...]:
        """Start and size of what the last kernel combines of a value at a time, so that all splits of it are in registers."""
        most = MOST_COMBINED // power_of_two(self.max_splits)
        pieces = [(start, width, min(width, most)) for start, width in self.value_chunks]
        return tuple((start + i, piece) for start, width, piece in pieces for i in range(0, width, piece))

    @property
    def num_splits(self) -> int:
        """Of the longest context that the page table can hold."""
        return min(self.max_splits, cdiv(self.table_width * self.page_size, self.least_split))

    @property
    def num_slots(self) -> int:
        """Tokens that may have partial results."""
        return min(self.num_tokens, self.num_rows * self.short_tokens)

    @property
    def slot_is_token(self) -> bool:
        """Whether partial results lie in the order of tokens; else each row has short_tokens of them."""
        return self.num_slots == self.num_tokens

    @property
    def prefill_tokens(self) -> int:
        """Tokens of one row in a tile."""
        return self.prefill.rows // self.prefill.heads

    @property
    def prefill_blocks(self) -> int:
        """Tiles that the rows of more than short_tokens, and the padding, can need at most."""
        long_rows = min(self.num_rows, self.num_tokens // (self.short_tokens + 1))
        block = self.prefill_tokens
        return (self.num_tokens + (long_rows + 1) * (block - 1 + self.prefill_alignment - 1)) // block

    @property
    def prefill_alignment(self) -> int:
        """A tile begins at a multiple of so many tokens."""
        return TILE_ALIGNMENT if self.prefill.mosaic else 1


def make_plan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    *,
    page_table: jax.Array,
    sm_scale: float,
    causal: bool,
    windowed: bool,
    softcap: float | None,
    alibi: bool,
    sinks: bool,
    k_scale: float,
    v_scale: float,
    one_token_rows: bool,
    limits: tuning.GpuLimits | None,
    mosaic: bool = False,
) -> Plan:
    """Choose tiles and splits for these arguments on this chip (None: the kernels are interpreted).

    Args:
      mosaic: attend with prompts in the kernel for Hopper; otherwise it does where it was measured to be the faster one.
      The shapes are as in reference.ragged_paged_attention, but for pages: [R, num_pages, 2K, page_size, H].
    Raises: NotImplementedError if the kernels cannot take them.
    """
    _refuse(q, k, pages)
    _, N, H = q.shape
    K, Hv = k.shape[1], v.shape[2]
    _, num_pages, _, page_size, _ = pages.shape
    chip = limits or tuning.SMALLEST_GPU
    cache_dtype, query_dtype = jnp.dtype(pages.dtype), jnp.dtype(q.dtype)
    shape = f"K{K} G{N // K} H{H if Hv == H else f'{H}/{Hv}'} page{page_size}"
    decode, prefill, split = _blocks(chip, N // K, H, Hv, query_dtype, cache_dtype, shape, mosaic=mosaic)
    if prefill.mosaic:
        _refuse_mosaic(limits, prefill, H, Hv, page_size, query_dtype, cache_dtype)
    return Plan(
        op="ragged_paged_attention", num_tokens=q.shape[0], num_rows=page_table.shape[0], num_heads=N, num_kv_heads=K, head_size=H,
        value_size=Hv, values_in_keys=False, page_size=page_size, num_pages=num_pages, table_width=page_table.shape[1],
        query_dtype=query_dtype, cache_dtype=cache_dtype, paired=_needs_pairs(pages), decode=decode, prefill=prefill, least_split=split,
        max_splits=min(max(LONE_ROW_PROGRAMS // K, 4), 64),
        short_tokens=1 if one_token_rows else max(min(decode.rows // (N // K), MOST_SHORT_TOKENS), 1), one_token_rows=one_token_rows,
        causal=causal, windowed=windowed, softcap=softcap, alibi=alibi, sinks=sinks, score_scale=sm_scale * k_scale, value_scale=v_scale,
        converts_float8=chip.converts_float8, interpret=limits is None,
    )  # fmt: skip


def chunks(size: int) -> tuple[tuple[int, int], ...]:
    """Start and size of the one or two powers of two, each at least LEAST_TILE, that cover so many numbers with the least to spare."""
    whole = max(1 << (size.bit_length() - 1), LEAST_TILE)
    if size <= whole:
        return ((0, whole),)
    return ((0, whole), (whole, max(power_of_two(size - whole), LEAST_TILE)))


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _refuse(q: jax.Array, k: jax.Array, pages: jax.Array) -> None:
    H, rows = q.shape[2], math.prod(pages.shape[:4])
    if str(pages.dtype) not in CACHE_DTYPES:
        raise NotImplementedError(f"cache of {pages.dtype}: needs one of {', '.join(CACHE_DTYPES)}")
    if str(q.dtype) not in QUERY_DTYPES:
        raise NotImplementedError(f"queries of {q.dtype}: needs one of {', '.join(QUERY_DTYPES)}")
    if H > MAX_HEAD_SIZE:
        raise NotImplementedError(f"head size {H}: needs at most {MAX_HEAD_SIZE}")
    if H % 2 and _needs_pairs(pages):
        raise NotImplementedError(f"head size {H} in a cache of {pages.size} bytes: needs an even one, or a cache of at most 2 GiB")
    if rows >= 1 << 31 or q.size >= 1 << 31:
        raise NotImplementedError(f"{rows} keys and values in the cache, {q.size} numbers of queries: both need to be below 2 ** 31")


def _refuse_mosaic(
    limits: tuning.GpuLimits | None, blocks: Blocks, H: int, Hv: int, page_size: int, query_dtype: jnp.dtype, cache_dtype: jnp.dtype
) -> None:
    if limits is not None and not limits.is_hopper:
        raise NotImplementedError(f"{limits.name}: this kernel is for Hopper")
    if str(query_dtype) not in MOSAIC_DTYPES or cache_dtype != query_dtype:
        raise NotImplementedError(f"queries of {query_dtype}, cache of {cache_dtype}: needs one of {', '.join(MOSAIC_DTYPES)} for both")
    if H not in MOSAIC_HEAD_SIZES or Hv != H:
        raise NotImplementedError(f"head size {H}, values of {Hv}: needs one of {', '.join(map(str, MOSAIC_HEAD_SIZES))} for both")
    if page_size < TILE_ALIGNMENT or page_size & (page_size - 1):
        raise NotImplementedError(f"pages of {page_size} tokens: needs a power of two, at least {TILE_ALIGNMENT}")
    shared_bytes = 2 * query_dtype.itemsize * H * (blocks.rows + blocks.stages * blocks.context)  # queries and results, keys and values
    if shared_bytes > MOSAIC_BYTES:
        raise NotImplementedError(f"{blocks.stages} buffers of {blocks.context} keys take {shared_bytes} bytes, Hopper has {MOSAIC_BYTES}")


def _compute_dtype(query: jnp.dtype, cache: jnp.dtype) -> jnp.dtype:
    """The least in which both are exact; int8 and float8 are in bfloat16 and float16."""
    return query if cache.itemsize == 1 else jnp.dtype(jnp.promote_types(query, cache))


def _needs_pairs(pages: jax.Array) -> bool:
    """Whether 32 bits are too few for addressing single bytes: Pallas takes 64 for arrays above 4 GiB, but its 32 are signed."""
    return jnp.dtype(pages.dtype).itemsize == 1 and 1 << 31 < pages.size <= 1 << 32


def _blocks(
    chip: tuning.GpuLimits, G: int, H: int, Hv: int, query_dtype: jnp.dtype, cache_dtype: jnp.dtype, shape: str, *, mosaic: bool
) -> tuple[Blocks, Blocks, int]:
    """Of decode and of prefill, and the keys of the shortest split: measured or else by rule, made to fit shared memory."""
    compute_dtype = _compute_dtype(query_dtype, cache_dtype)
    exact = compute_dtype == jnp.float32  # no tensor cores: products unrolled into registers
    context = 32 if exact or H > 128 else 64
    rows = min(max(power_of_two(G), LEAST_TILE), MOST_DECODE_ROWS // 2 if exact else MOST_DECODE_ROWS)
    decode = Blocks(rows=rows, heads=min(G, rows), context=context, warps=4, stages=LEAST_STAGES)
    rows = 32 if exact else 128 if H <= 128 else 64
    deep = chip.shared_bytes >= 200 * tuning.KIB  # from Hopper on; for Ampere the compiler runs out of registers with two loads under way
    prefill = Blocks(
        rows=rows, heads=math.gcd(G, LEAST_TILE), context=context, warps=8 if rows == 128 else 4, stages=5 if deep else LEAST_STAGES
    )

    names = [f"{kind} {query_dtype}/{cache_dtype} {shape}" for kind in ("decode", "prefill")]
    found = [dict(tuning.tuned(chip.name, "ragged_paged_attention", name) or {}) for name in names]
    split = found[0].pop("split", LEAST_SPLIT)
    key_size = sum(size for _, size in (*chunks(H), *chunks(Hv)))
    sizes = (key_size, power_of_two(H), cache_dtype.itemsize, compute_dtype.itemsize)
    # Two decode programs share a multiprocessor: while one waits for its first keys, the other one computes.
    decode = fit(dataclasses.replace(decode, **found[0]), sizes, chip.shared_bytes // 2)
    if mosaic or found[1].get("mosaic"):
        measured = found[1] if "mosaic" in found[1] else {}
        prefill = dataclasses.replace(MOSAIC_BLOCKS, **{"stages": max(2 * 128 // H, 2)} | measured)
    else:
        prefill = fit(dataclasses.replace(prefill, **found[1]), sizes, chip.shared_bytes)
    return decode, prefill, cdiv(split, decode.context) * decode.context


def fit(blocks: Blocks, sizes: tuple[int, int, int, int], shared_bytes: int) -> Blocks:
    """The blocks with fewer stages, then fewer keys, then fewer rows, as far as they need to be to fit.

    Args:
      sizes: numbers of a key with its value, numbers of a query, bytes of a number in the cache, bytes of an operand.
    """
    key_size, query_size, cached, operand = sizes

    def fits(x: Blocks) -> bool:
        # One buffer more than there are loads under way: Hopper's products read theirs while the next one is filled.
        buffers = (x.stages - 1) // 2 + 1
        key_bytes = buffers * cached + (operand if operand != cached else 0)
        return x.context * key_size * key_bytes + x.rows * (query_size + x.context) * operand <= shared_bytes

    while not fits(blocks):
        if blocks.stages > LEAST_STAGES:
            blocks = dataclasses.replace(blocks, stages=max(blocks.stages - 2, LEAST_STAGES))
        elif blocks.context > LEAST_TILE:
            blocks = dataclasses.replace(blocks, context=blocks.context // 2)
        elif blocks.rows // 2 >= max(blocks.heads, LEAST_TILE):
            blocks = dataclasses.replace(blocks, rows=blocks.rows // 2)
        else:
            break
    return blocks
