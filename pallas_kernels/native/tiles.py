"""Two products of small tiles, which hold their results in vector registers; all other code can be plain loops.

A result depends on its own row and column alone, bit for bit, whatever the tile it is computed in.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from pallas_kernels.native.memory import INT64, emit_prefetch, intrinsic

LINE = 16  # numbers in a cache line; what the kernels want lengths to be multiples of, whatever the processor
_WIDE = bool(binding.get_host_cpu_features().get("avx512f"))  # 32 registers of 16 numbers, not 16 of 8
LANES = 16 if _WIDE else 8
DOT_ROWS, DOT_COLUMNS = (8, 3) if _WIDE else (4, 3)
OUTER_SHAPES = ((6, 4), (3, 8)) if _WIDE else ((6, 2), (2, 4))  # (rows, vectors): the most of each

_FLOAT, _INT, _WORD = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)


def _word(value: int) -> ir.Constant:
    return ir.Constant(_WORD, value)


def _at(builder: ir.IRBuilder, address: Any, index: Any, kind: ir.Type) -> Any:
    """Pointer to the index-th float32 from an address."""
    return builder.inttoptr(builder.add(address, builder.mul(_word(4), index)), kind.as_pointer())


def _load(builder: ir.IRBuilder, address: Any, index: Any) -> Any:
    return builder.load(_at(builder, address, index, _VECTOR), align=4)


def _fma(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), [a, b, c])


def _loop(builder: ir.IRBuilder, end: Any, step: int, start: list[Any], body: Any) -> list[Any]:
    """for (k = 0; k < end; k += step) state = body(k, state), with end > 0; the last state."""
    before = builder.block
    inside, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
    builder.branch(inside)
    builder.position_at_end(inside)
    k = builder.phi(_WORD)
    state = [builder.phi(value.type) for value in start]
    new = body(k, state)
    following = builder.add(k, _word(step))
    for phi, first, later in zip([k, *state], [_word(0), *start], [following, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, end), inside, after)
    builder.position_at_end(after)
    return new


def _switch(builder: ir.IRBuilder, value: Any, cases: dict[int, Any]) -> None:
    """Runs cases[value](), each of which emits code; nothing if there is no such case."""
    end = builder.append_basic_block("end")
    switch = builder.switch(value, end)
    for number, emit in cases.items():
        block = builder.append_basic_block(f"case{number}")
        switch.add_case(_word(number), block)
        builder.position_at_end(block)
        emit()
        builder.branch(end)
    builder.position_at_end(end)


@intrinsic
def dot_tile(typing_context: Any, rows: Any, columns: Any, x: Any, w: Any, y: Any, depth: Any, stride: Any, ahead: Any) -> Any:
    """y[r, c] = x[r] . w[c] for up to DOT_ROWS rows; columns is DOT_COLUMNS or 1.

    Args:
      x, w: addresses of [rows, depth] and [columns, depth]; depth is a multiple of LINE.
      y: address of the result, whose rows are `stride` numbers apart.
      ahead: numbers after w from which columns to come are fetched meanwhile; 0 for none.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        rows, columns, *rest = args

        def of_width(width: int) -> None:
            _switch(builder, rows, {n: lambda n=n: _dot(builder, n, width, *rest) for n in range(1, DOT_ROWS + 1)})

        _switch(builder, columns, {width: lambda width=width: of_width(width) for width in (1, DOT_COLUMNS)})
        return context.get_dummy_value()

    return types.void(*[INT64] * 8), codegen


def _dot(builder: ir.IRBuilder, rows: int, columns: int, x: Any, w: Any, y: Any, depth: Any, stride: Any, ahead: Any) -> None:
    size = builder.mul(_word(4), depth)
    x_rows = [builder.add(x, builder.mul(size, _word(r))) for r in range(rows)]
    w_rows = [builder.add(w, builder.mul(size, _word(c))) for c in range(columns)]

    def body(k: Any, sums: list[Any]) -> list[Any]:
        for row in w_rows:
            emit_prefetch(builder, _at(builder, row, builder.add(k, ahead), ir.IntType(8)))
        for part in range(0, LINE, LANES):
            place = builder.add(k, _word(part))
            weights = [_load(builder, row, place) for row in w_rows]
            new: list[Any] = []
            for r, row in enumerate(x_rows):
                values = _load(builder, row, place)
                new += [_fma(builder, weight, values, sums[r * columns + c]) for c, weight in enumerate(weights)]
            sums = new
        return sums

    sums = _loop(builder, depth, LINE, [ir.Constant(_VECTOR, [0.0] * LANES)] * (rows * columns), body)
    places = [(builder.add(builder.mul(stride, _word(r)), _word(c))) for r in range(rows) for c in range(columns)]
    for first in range(0, len(sums), LANES):
        _store_sums(builder, sums[first : first + LANES], y, places[first : first + LANES])


def _store_sums(builder: ir.IRBuilder, vectors: list[Any], y: Any, places: list[Any]) -> None:
    """y[places[i]] = the sum of vectors[i], halved step by step, two vectors becoming one at a time; at most LANES of them."""
    owners = [[index] * LANES for index in range(len(vectors))]
    half = LANES // 2
    while half:
        low = [lane for lane in range(2 * LANES) if lane // half % 2 == 0]
        if len(vectors) % 2:
            vectors, owners = [*vectors, ir.Constant(_VECTOR, ir.Undefined)], [*owners, [-1] * LANES]
        merged, merged_owners = [], []
        for a, b, a_owners, b_owners in zip(vectors[::2], vectors[1::2], owners[::2], owners[1::2], strict=True):
            masks = [ir.Constant(ir.VectorType(_INT, LANES), [lane + more for lane in low]) for more in (0, half)]
            low_half, high_half = (builder.shuffle_vector(a, b, mask) for mask in masks)
            merged.append(builder.fadd(low_half, high_half))
            merged_owners.append([(a_owners + b_owners)[lane] for lane in low])
        vectors, owners, half = merged, merged_owners, half // 2
    for index, place in enumerate(places):
        value = builder.extract_element(vectors[0], ir.Constant(_INT, owners[0].index(index)))
        builder.store(value, _at(builder, y, place, _FLOAT))


@intrinsic
def outer_tile(
    typing_context: Any, rows: Any, vectors: Any, a: Any, a_stride: Any, b: Any, b_stride: Any, c: Any, c_stride: Any, depth: Any
) -> Any:
    """c[r, n] += sum over k < depth (at least 1) of a[r, k] * b[k, n], for rows and vectors of columns that one of OUTER_SHAPES allows.

    Args:
      a, b, c: addresses; rows of each are its stride, in numbers, apart.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        rows, vectors, *rest = args

        def of_rows(count: int) -> None:
            most = max(v for r, v in OUTER_SHAPES if count <= r)
            _switch(builder, vectors, {n: lambda n=n: _outer(builder, count, n, *rest) for n in range(1, most + 1)})

        _switch(builder, rows, {count: lambda count=count: of_rows(count) for count in range(1, OUTER_SHAPES[0][0] + 1)})
        return context.get_dummy_value()

    return types.void(*[INT64] * 9), codegen


def _outer(
    builder: ir.IRBuilder, rows: int, vectors: int, a: Any, a_stride: Any, b: Any, b_stride: Any, c: Any, c_stride: Any, depth: Any
) -> None:
    a_rows = [builder.add(a, builder.mul(_word(4 * r), a_stride)) for r in range(rows)]
    c_rows = [builder.add(c, builder.mul(_word(4 * r), c_stride)) for r in range(rows)]

    def body(k: Any, sums: list[Any]) -> list[Any]:
        columns = [_load(builder, b, builder.add(builder.mul(k, b_stride), _word(n * LANES))) for n in range(vectors)]
        new: list[Any] = []
        for r, row in enumerate(a_rows):
            number = builder.load(_at(builder, row, k, _FLOAT))
            single = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.Constant(_INT, 0))
            same = builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES))
            new += [_fma(builder, same, column, sums[r * vectors + n]) for n, column in enumerate(columns)]
        return new

    start = [_load(builder, row, _word(n * LANES)) for row in c_rows for n in range(vectors)]
    sums = _loop(builder, depth, 1, start, body)
    for r, row in enumerate(c_rows):
        for n in range(vectors):
            builder.store(sums[r * vectors + n], _at(builder, row, _word(n * LANES), _VECTOR), align=4)
