"""The static plan of the TPU kernel: blocks, what they take of VMEM and SMEM, and which arguments it refuses.

Queries lie as [T * heads, C + Hr]: with one KV head a token's heads are rows of one matrix. A grid step owns `block_tokens` tokens. A row
of the batch with one token in the block attends with that token's heads alone, else with the whole block.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.tpu_walk import LANES, SUBLANES, TABLE_CHUNK, round_up

DTYPES = ("float32", "bfloat16")
PREFILL_ROWS = 512  # queries times heads of a block: a page's bytes are read once for that many rows
DECODE_ROWS = 1024  # the same for decodes, that share nothing: as many as spread the cost of a grid step
CONTEXT = 512  # keys of one buffer: 0.6 MB of C + Hr = 576 in bfloat16, long enough to hide a DMA's latency


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything about one call that is known when it is traced."""

    num_tokens: int
    num_rows: int
    num_heads: int  # padded to whole tiles
    latent_size: int
    width: int  # C + Hr
    page_size: int
    table_width: int
    dtype: jnp.dtype
    cache_dtype: jnp.dtype
    block_tokens: int
    pages_per_block: int
    table_in_smem: bool
    one_token_rows: bool
    causal: bool
    sm_scale: float

    @property
    def context(self) -> int:
        """Keys of one block of pages."""
        return self.pages_per_block * self.page_size

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Of the matrix products' operands."""
        return jnp.dtype(jnp.bfloat16 if self.dtype == self.cache_dtype == jnp.bfloat16 else jnp.float32)

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tokens that attend together."""
        return (1,) if self.one_token_rows or self.block_tokens == 1 else (1, self.block_tokens)

    @property
    def vmem_bytes(self) -> int:
        """Scratch, double-buffered blocks, and the temporaries of the largest tile."""
        C, width = round_up(self.latent_size, LANES), round_up(self.width, LANES)
        rows, tile_rows = self.block_tokens * self.num_heads, self.tiles[-1] * self.num_heads
        fetched = 2 * self.context * width * self.cache_dtype.itemsize
        blocks = 2 * rows * (width + C) * self.dtype.itemsize
        state = tile_rows * (2 * LANES + C) * 4
        temporaries = 4 * tile_rows * self.context * 4 + self.context * width * 4 + 2 * tile_rows * C * 4
        return fetched + blocks + state + temporaries

    @property
    def smem_bytes(self) -> int:
        """Prefetched scalars."""
        table = self.num_rows * self.table_width if self.table_in_smem else TABLE_CHUNK
        return 4 * (2 * self.num_rows + table + 64)


def make_plan(
    q_latent: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    *,
    sm_scale: float,
    causal: bool,
    one_token_rows: bool,
    limits: tuning.TpuLimits,
) -> Plan:
    """Choose blocks for these arguments on this chip; shapes as in reference.mla_attention.

    Raises: NotImplementedError if the kernel cannot take them.
    """
    T, N, C = q_latent.shape
    S, P = page_table.shape
    page_size, width = pages.shape[2:]
    for name, dtype in (("cache", pages.dtype), ("queries", q_latent.dtype)):
        if str(dtype) not in DTYPES:
            raise NotImplementedError(f"{name} of {dtype}: needs one of {', '.join(DTYPES)}")
    if page_size % SUBLANES:
        raise NotImplementedError(f"pages of {page_size} tokens: needs a multiple of {SUBLANES}")
    plan = Plan(
        num_tokens=T, num_rows=S, num_heads=round_up(N, SUBLANES * 4 // q_latent.dtype.itemsize), latent_size=C, width=width,
        page_size=page_size, table_width=P, dtype=jnp.dtype(q_latent.dtype), cache_dtype=jnp.dtype(pages.dtype), block_tokens=1,
        pages_per_block=1, table_in_smem=True, one_token_rows=one_token_rows, causal=causal, sm_scale=sm_scale,
    )  # fmt: skip
    if plan.smem_bytes > limits.smem_budget:
        plan = dataclasses.replace(plan, table_in_smem=False)
    if plan.smem_bytes > limits.smem_budget:
        raise NotImplementedError(f"{S} rows: their scalars take {plan.smem_bytes} bytes of SMEM, {limits.smem_budget} are allowed")
    return _fit(plan, limits)


def key(plan: Plan) -> str:
    """The name under which block sizes for such calls are tuned."""
    kind = "decode" if plan.one_token_rows else "mixed"
    return f"{kind} {plan.dtype}/{plan.cache_dtype} N{plan.num_heads} C{plan.latent_size} page{plan.page_size}"


def _fit(plan: Plan, limits: tuning.TpuLimits) -> Plan:
    """The largest blocks, from the measured or the heuristic ones downwards, that fit into VMEM."""
    found = tuning.tuned(limits.name, "mla_attention", key(plan)) or {}
    rows = DECODE_ROWS if plan.one_token_rows else PREFILL_ROWS
    tokens, context = found.get("block_tokens", max(rows // plan.num_heads, 1)), found.get("context", CONTEXT)
    least = LANES // math.gcd(LANES, plan.page_size)  # the fewest pages whose tokens fill whole lanes
    while True:
        wanted = min(context // plan.page_size, round_up(plan.table_width, least))
        pages = max(wanted // least, 1) * least
        candidate = dataclasses.replace(plan, block_tokens=min(tokens, plan.num_tokens), pages_per_block=pages)
        if candidate.vmem_bytes <= limits.vmem_budget:
            return candidate
        if tokens > 1 and (tokens * plan.num_heads >= context or pages == least):
            tokens = min(tokens, plan.num_tokens) // 2
        elif pages > least:
            context //= 2
        else:
            raise NotImplementedError(
                f"{plan.num_heads} heads, vectors of {plan.width}, pages of {plan.page_size}: the smallest blocks take "
                f"{candidate.vmem_bytes} bytes of VMEM, {limits.vmem_budget} are allowed"
            )
