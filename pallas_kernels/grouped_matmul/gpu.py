"""The grouped matrix product on GPUs from Ampere on (Pallas Triton): tiles of rows of one expert, which read only the experts with rows.

1. From group_sizes, in plain jnp: the expert, first row and end of each row block. Padding is one more expert, without a matrix.
2. kernel: program i multiplies the rows of one block by some columns of its expert's matrix, on tensor cores unless they are float32.
The grid holds as many row blocks as T rows can need; programs of those that the batch lacks end at once.

jax 0.10.2 has nothing to wrap. jax.lax.ragged_dot becomes one dense product of [T, E * D] with all experts' matrices: E times the products,
reading experts without rows, x E times over as a temporary. jax.experimental.pallas.ops.gpu has one kernel for sm_90 alone and one for
sm_100 alone, and both want D in whole tiles.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import tuning

DTYPES = ("float32", "bfloat16", "float16")
LEAST_TILE = 16  # rows of the smallest product on tensor cores
LEAST_STAGES = 3  # two tiles are loaded while a third one is multiplied
BUSY_PROGRAMS = 256  # about two for each multiprocessor of the largest chips; with fewer, narrower tiles load more at a time
BLOCKS_TOGETHER = 8  # row blocks that go through the columns together: their rows, and the columns that they share, stay in the L2 cache

Ref = Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How the product is cut, and what runs a tile."""

    rows: int
    columns: int
    depth: int  # numbers of a row that meet a tile at a time; the same for every number of rows
    warps: int
    stages: int  # of the software pipeline that loads them

    def shared_bytes(self, itemsize: int) -> int:
        """What the pipeline keeps in shared memory."""
        return self.stages * (self.rows + self.columns) * self.depth * itemsize


def grouped_matmul(x: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See reference.py; float16 too. On a CPU the kernel is interpreted, which is for tests.

    A row's result is the same, bit for bit, whatever the other T - 1 rows are and however they are shared out among the experts.
    Raises: NotImplementedError for other dtypes, two of them, and more rows or numbers than 31 bits count.
    """
    _refuse(x, weights)
    T, D = x.shape
    E, _, F = weights.shape
    limits = tuning.gpu_limits()
    tiles = choose_tiles(T, E, F, jnp.dtype(x.dtype), limits or tuning.SMALLEST_GPU)
    blocks = num_row_blocks(T, E, tiles.rows)

    def kernel(expert: Ref, first: Ref, end: Ref, x: Ref, weights: Ref, out: Ref) -> None:
        _kernel(tiles, D, expert, first, end, x, weights, out)

    kernel.__name__ = "grouped_matmul"  # what profilers show
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((T, F), x.dtype),
        grid=(blocks * pl.cdiv(F, tiles.columns),),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=limits is None,
        name="grouped_matmul",
    )
    return call(*_row_blocks(T, group_sizes, tiles.rows, blocks), x, weights.reshape(E * D, F))


def choose_tiles(T: int, E: int, F: int, dtype: jnp.dtype, chip: tuning.GpuLimits) -> Tiles:
    """Tiles for T rows of E experts and F columns, made to fit the chip's shared memory.

    Twice the mean rows of an expert fit a tile's rows, so that few experts need two and read their matrix again.
    """
    rows = min(max(pl.next_power_of_2(pl.cdiv(2 * T, E)), LEAST_TILE), 128)
    if dtype == jnp.float32:  # no tensor cores: products unrolled into registers
        tiles = Tiles(rows=min(rows, 32), columns=64, depth=32, warps=4, stages=3)
    else:
        tiles = Tiles(rows=rows, columns=128, depth=64, warps=8 if rows == 128 else 4, stages=4)
    if num_row_blocks(T, E, rows) * pl.cdiv(F, tiles.columns) < BUSY_PROGRAMS:
        tiles = dataclasses.replace(tiles, columns=tiles.columns // 2)
    # Two programs of four warps share a multiprocessor: one computes or stores while the other one waits for its loads.
    budget = chip.shared_bytes // (2 if tiles.warps == 4 else 1)
    while tiles.shared_bytes(dtype.itemsize) > budget:
        if tiles.stages > LEAST_STAGES:
            tiles = dataclasses.replace(tiles, stages=tiles.stages - 1)
        else:
            tiles = dataclasses.replace(tiles, columns=tiles.columns // 2)
    return tiles


def num_row_blocks(T: int, E: int, rows: int) -> int:
    """Blocks of so many rows that T rows of E experts, padding among them, can need at most: each may leave one that is not full."""
    return (T + min(E + 1, T) * (rows - 1)) // rows


def _refuse(x: jax.Array, weights: jax.Array) -> None:
    (T, D), (E, _, F) = x.shape, weights.shape
    if str(x.dtype) not in DTYPES:
        raise NotImplementedError(f"rows of {x.dtype}: needs one of {', '.join(DTYPES)}")
    if weights.dtype != x.dtype:
        raise NotImplementedError(f"weights of {weights.dtype} for rows of {x.dtype}: needs one dtype")
    if not T * D * E * F:
        raise NotImplementedError(f"{T=} {D=} {E=} {F=}: needs at least 1 of each")
    if max(E * D, T * D, T * F) >= 1 << 31:
        raise NotImplementedError(f"{E * D} rows of weights, {T * D} numbers of rows, {T * F} of results: each needs to be below 2 ** 31")


def _row_blocks(T: int, group_sizes: jax.Array, rows: int, blocks: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Expert, first row and end of each block, i32[blocks]; expert E is the padding, and blocks to spare end at row 0."""
    group_sizes = group_sizes.astype(jnp.int32)
    sizes = jnp.append(group_sizes, T - jnp.sum(group_sizes))
    ends = jnp.cumsum(sizes)
    of_expert = (sizes + (rows - 1)) // rows
    last = jnp.cumsum(of_expert)
    index = jnp.arange(blocks, dtype=jnp.int32)
    expert = jnp.searchsorted(last, index, side="right", method="compare_all").astype(jnp.int32)
    expert = jnp.minimum(expert, group_sizes.shape[0])
    first = (ends - sizes)[expert] + (index - (last - of_expert)[expert]) * rows
    return expert, first, jnp.where(index < last[-1], ends[expert], 0)


def _kernel(tiles: Tiles, D: int, block_expert: Ref, block_first: Ref, block_end: Ref, x: Ref, weights: Ref, out: Ref) -> None:
    """One tile. block_expert, block_first, block_end: i32[blocks]; x: [T, D]; weights: [E * D, F]; out: [T, F]."""
    T, F = out.shape
    E = weights.shape[0] // D
    block, column = _place(pl.program_id(0), block_expert.shape[0], pl.cdiv(F, tiles.columns))
    expert, first, end = block_expert[block], block_first[block], block_end[block]
    row = first + jnp.arange(tiles.rows, dtype=jnp.int32)
    column = column * tiles.columns + jnp.arange(tiles.columns, dtype=jnp.int32)
    mine, inside = row < end, column < F

    def fold(step: jax.Array | int, total: jax.Array, *, whole: bool) -> jax.Array:
        depth = step * tiles.depth + jnp.arange(tiles.depth, dtype=jnp.int32)
        held = None if whole else depth < D
        a = _load(x, row, depth, mine, held)
        b = _load(weights, expert * D + depth, column, held, None if F % tiles.columns == 0 else inside)
        # float32 as it is: the default rounds it to fewer digits
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        return total + jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)

    def store(total: jax.Array) -> None:
        shape = (tiles.rows, tiles.columns)
        # The interpreter writes masked numbers back: to nowhere.
        at = out.at[jnp.broadcast_to(jnp.where(mine, row, T)[:, None], shape), jnp.broadcast_to(column[None, :], shape)]
        plgpu.store(at, total.astype(out.dtype), mask=mine[:, None] & inside[None, :])

    @pl.when((expert < E) & (first < end))
    def _() -> None:
        total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        total = jax.lax.fori_loop(0, D // tiles.depth, lambda step, total: fold(step, total, whole=True), total)
        store(fold(D // tiles.depth, total, whole=False) if D % tiles.depth else total)

    @pl.when((expert == E) & (first < end))
    def _() -> None:
        store(jnp.zeros((tiles.rows, tiles.columns), jnp.float32))


def _place(program: jax.Array, blocks: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """Row block and column block of a program: BLOCKS_TOGETHER row blocks go through all columns before the next ones do."""
    together = jax.lax.div(program, BLOCKS_TOGETHER * columns)
    rest = jax.lax.rem(program, BLOCKS_TOGETHER * columns)
    size = jnp.minimum(blocks - together * BLOCKS_TOGETHER, BLOCKS_TOGETHER)
    return together * BLOCKS_TOGETHER + jax.lax.rem(rest, size), jax.lax.div(rest, size)


def _load(ref: Ref, row: jax.Array, column: jax.Array, rows: jax.Array | None, columns: jax.Array | None) -> jax.Array:
    """[len(row), len(column)] numbers; zero in the rows and columns that bool masks exclude, as 0 * NaN is NaN."""
    shape = (row.shape[0], column.shape[0])
    at = ref.at[jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(column[None, :], shape)]
    mask = None if rows is None else jnp.broadcast_to(rows[:, None], shape)
    if columns is not None:
        wide = jnp.broadcast_to(columns[None, :], shape)
        mask = wide if mask is None else mask & wide
    return plgpu.load(at) if mask is None else plgpu.load(at, mask=mask, other=0)
