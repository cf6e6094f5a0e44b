"""The static plan of the TPU kernel: tiles and blocks, what they take of VMEM and SMEM, and which arguments it refuses.

Queries lie as [K, T * group, H], so that the rows of one KV head are consecutive. A grid step owns `block_tokens` tokens. Each row of
the batch attends with the smallest of `tiles` that covers its tokens in the block: a decode takes the first, a long prompt the last.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.tpu_walk import LANES, SUBLANES, TABLE_CHUNK, round_up

CACHE_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
QUERY_DTYPES = ("float32", "bfloat16")
PREFILL_ROWS = 512  # query rows per KV head of a long prompt's tile: KV bytes are read once for that many rows
MIDDLE_ROWS = 64  # for drafts and the ends of prompts
DECODE_TOKENS = 64
BLOCK_BYTES = 2 * tuning.MIB  # of context in one buffer: long enough to hide a DMA's latency


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything about one call that is known when it is traced."""

    num_tokens: int
    num_rows: int
    num_kv_heads: int
    head_size: int
    page_size: int
    table_width: int
    query_dtype: jnp.dtype
    cache_dtype: jnp.dtype
    group: int  # query heads per KV head, padded where a tile would not align
    unit: int  # tokens: tiles begin at multiples of it
    block_tokens: int  # of one grid step
    tiles: tuple[int, ...]  # tokens, ascending; the last covers all that one row can have in a block
    pages_per_block: int
    table_in_smem: bool
    one_token_rows: bool
    causal: bool
    windowed: bool
    softcap: float | None
    alibi: bool
    sinks: bool
    score_scale: float
    value_scale: float

    @property
    def context(self) -> int:
        """Keys of one block of pages."""
        return self.pages_per_block * self.page_size

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Of the matrix products' operands; int8 and float8 are exact in bfloat16."""
        narrow = self.query_dtype == jnp.bfloat16 and self.cache_dtype != jnp.float32
        return jnp.dtype(jnp.bfloat16 if narrow else jnp.float32)

    @property
    def packed(self) -> bool:
        """Whether a key and its value share 32-bit words after loading; 8-bit caches do after widening."""
        return self.cache_dtype != jnp.float32

    @property
    def unpack_pages(self) -> int:
        """Pages unpacked at a time: a divisor of the block with about 512 rows of words, a multiple of 8 tokens."""
        n, tokens = self.pages_per_block, max(512 // self.unpacked_heads, SUBLANES)
        fitting = [d for d in range(1, n + 1) if n % d == 0 and d * self.page_size >= tokens and d * self.page_size % SUBLANES == 0]
        return fitting[0] if fitting else n

    @property
    def heads_apart(self) -> bool:
        """Whether unpacking transposes [tokens, heads] to [heads, tokens]; else heads stay interleaved and are loaded with a stride.

        A load with a stride of 8, 16 or 32 rows takes 2, 4 or 8 times as long as one without, for the banks of VMEM it meets; a
        transpose takes twice the time of a copy. Counted in bundles of the v6e compiler for 512 tokens of 8 heads: 2295 and 2700.
        """
        return self.unpacked_heads % (2 * SUBLANES) == 0

    @property
    def unpacked_heads(self) -> int:
        """Rows of 32-bit words per token."""
        return self.num_kv_heads * (1 if self.packed else 2)

    @property
    def unpacked_shape(self) -> tuple[int, int, int, int]:
        """See tpu_kernel.py."""
        heads, chunks, lanes = self.unpacked_heads, -(-self.head_size // LANES), min(self.head_size, LANES)
        return (chunks, heads, self.context, lanes) if self.heads_apart else (chunks, 1, self.context * heads, lanes)

    @property
    def vmem_bytes(self) -> int:
        """Scratch, double-buffered blocks, and the temporaries of the largest tile."""
        K, H = self.num_kv_heads, round_up(self.head_size, LANES)
        rows, tile_rows = self.block_tokens * self.group, self.tiles[-1] * self.group
        item = self.cache_dtype.itemsize
        cached = 2 * self.context * _padded_heads(2 * K, item) * H * item
        unpacked = math.prod(self.unpacked_shape[:3]) * LANES * 4
        blocks = 2 * 2 * K * rows * H * self.query_dtype.itemsize
        state = K * tile_rows * (2 * LANES + H) * 4
        patterns = 2 * 2 * K * round_up(self.unit * self.group, SUBLANES) * LANES * 4
        temporaries = 4 * tile_rows * self.context * 4 + 4 * self.context * H * 4 + 3 * tile_rows * H * 4
        return cached + unpacked + blocks + state + patterns + temporaries

    @property
    def smem_bytes(self) -> int:
        """Prefetched scalars."""
        table = self.num_rows * self.table_width if self.table_in_smem else TABLE_CHUNK
        return 4 * (2 * self.num_rows + table + 64)


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
    limits: tuning.TpuLimits,
) -> Plan:
    """Choose tiles and blocks for these arguments on this chip; shapes as in reference.ragged_paged_attention.

    Raises: NotImplementedError if the kernel cannot take them.
    """
    _refuse(q, k, v, pages)
    T, N, H = q.shape
    S, P = page_table.shape
    K, page_size = k.shape[1], pages.shape[2]
    group, unit = _group_and_unit(N // K, SUBLANES * 4 // q.dtype.itemsize)
    plan = Plan(
        num_tokens=T, num_rows=S, num_kv_heads=K, head_size=H, page_size=page_size, table_width=P, query_dtype=jnp.dtype(q.dtype),
        cache_dtype=jnp.dtype(pages.dtype), group=group, unit=unit, block_tokens=unit, tiles=(unit,), pages_per_block=1, table_in_smem=True,
        one_token_rows=one_token_rows, causal=causal, windowed=windowed, softcap=softcap, alibi=alibi, sinks=sinks,
        score_scale=sm_scale * k_scale, value_scale=v_scale,
    )  # fmt: skip
    if plan.smem_bytes > limits.smem_budget:
        plan = dataclasses.replace(plan, table_in_smem=False)
    if plan.smem_bytes > limits.smem_budget:
        raise NotImplementedError(f"{S} rows: their scalars take {plan.smem_bytes} bytes of SMEM, {limits.smem_budget} are allowed")
    return _fit(plan, limits)


def key(plan: Plan) -> str:
    """The name under which block sizes for such calls are tuned."""
    kind = "decode" if plan.one_token_rows else "mixed"
    shape = f"K{plan.num_kv_heads} G{plan.group} H{plan.head_size} page{plan.page_size}"
    return f"{kind} {plan.query_dtype}/{plan.cache_dtype} {shape}"


def _refuse(q: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array) -> None:
    if v.shape != k.shape:
        raise NotImplementedError(f"values of size {v.shape[2]} beside keys of size {k.shape[2]}: needs them equal")
    if str(pages.dtype) not in CACHE_DTYPES:
        raise NotImplementedError(f"cache of {pages.dtype}: needs one of {', '.join(CACHE_DTYPES)}")
    if str(q.dtype) not in QUERY_DTYPES:
        raise NotImplementedError(f"queries of {q.dtype}: needs one of {', '.join(QUERY_DTYPES)}")
    if q.shape[2] > 2 * LANES:
        raise NotImplementedError(f"head size {q.shape[2]}: needs at most {2 * LANES}")


def _group_and_unit(G: int, packing: int) -> tuple[int, int]:
    """Rows per token and the tokens whose rows fill whole tiles of `packing`; an awkward large group is padded instead."""
    unit = packing // math.gcd(packing, G)
    if unit * G <= 4 * packing:
        return G, unit
    return round_up(G, packing), 1


def _fit(plan: Plan, limits: tuning.TpuLimits) -> Plan:
    """The largest blocks, from the measured or the heuristic ones downwards, that fit into VMEM."""
    found = tuning.tuned(limits.name, "ragged_paged_attention", key(plan)) or {}
    tokens = found.get("block_tokens", DECODE_TOKENS if plan.one_token_rows else PREFILL_ROWS // plan.group)
    context = found.get("context", _heuristic_context(plan))
    while True:
        candidate = _with_blocks(plan, tokens, context)
        if candidate.vmem_bytes <= limits.vmem_budget:
            return candidate
        smaller_tokens = tokens // 2 >= plan.unit and candidate.block_tokens > plan.unit
        if smaller_tokens and (tokens * plan.group > context or not candidate.pages_per_block > _least_pages(plan)):
            tokens //= 2
        elif candidate.pages_per_block > _least_pages(plan):
            context //= 2
        else:
            raise NotImplementedError(
                f"{plan.num_kv_heads} KV heads of size {plan.head_size}, pages of {plan.page_size}: the smallest blocks take "
                f"{candidate.vmem_bytes} bytes of VMEM, {limits.vmem_budget} are allowed"
            )


def _heuristic_context(plan: Plan) -> int:
    """Keys per block: about BLOCK_BYTES, between 128 and 512 of them."""
    key_bytes = (
        _padded_heads(2 * plan.num_kv_heads, plan.cache_dtype.itemsize) * round_up(plan.head_size, LANES) * plan.cache_dtype.itemsize
    )
    return min(max(BLOCK_BYTES // key_bytes, LANES), 4 * LANES)


def _least_pages(plan: Plan) -> int:
    """The fewest pages whose tokens fill whole lanes."""
    return LANES // math.gcd(LANES, plan.page_size)


def _with_blocks(plan: Plan, tokens: int, context: int) -> Plan:
    """The plan with blocks near these sizes, in whole tiles and lanes, and no larger than the batch."""
    least = _least_pages(plan)
    pages = min(context // plan.page_size, plan.table_width)
    block = min(max(tokens // plan.unit, 1) * plan.unit, round_up(plan.num_tokens, plan.unit))
    middle = round_up(-(-MIDDLE_ROWS // plan.group), plan.unit)
    tiles = (plan.unit,) if plan.one_token_rows else tuple(sorted({plan.unit, min(middle, block), block}))
    return dataclasses.replace(plan, block_tokens=block, tiles=tiles, pages_per_block=max(pages // least, 1) * least)


def _padded_heads(heads: int, itemsize: int) -> int:
    """Rows that [heads, H] takes in memory: a power of two of whole words up to one tile, then whole tiles."""
    packing = 4 // itemsize
    return max(packing, 1 << (heads - 1).bit_length()) if heads < SUBLANES * packing else round_up(heads, SUBLANES * packing)
