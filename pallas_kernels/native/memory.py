"""Memory by address, and atomic numbers, in functions that numba compiles. Addresses are int64, in bytes."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

intrinsic: Any = _intrinsic  # what it makes of a function has other parameters than the function

INT64 = types.int64
_WORD = ir.IntType(64)


def _pointer_to(element: types.Type) -> Any:
    pointer = types.CPointer(element)

    @intrinsic
    def cast(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(pointer))

        return pointer(INT64), codegen

    return cast


floats = _pointer_to(types.float32)  # floats(address)[i]
ints = _pointer_to(types.int32)
words = _pointer_to(types.int64)

malloc = types.ExternalFunction("malloc", INT64(INT64))
free = types.ExternalFunction("free", types.void(INT64))
sched_yield = types.ExternalFunction("sched_yield", types.int32())


def load_word(builder: ir.IRBuilder, address: Any, index: Any) -> Any:
    """For intrinsics: the index-th int64 from an address."""
    place = builder.add(address, builder.mul(index, ir.Constant(_WORD, 8)))
    return builder.load(builder.inttoptr(place, _WORD.as_pointer()))


@intrinsic
def fetch_add(typing_context: Any, address: Any, value: Any) -> Any:
    """Adds to the int64 at an address, atomically; what was there before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _WORD.as_pointer()), args[1], "seq_cst")

    return INT64(INT64, INT64), codegen


def _emit_call(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    function, *values = args
    pointer = ir.FunctionType(_WORD, [_WORD] * len(values)).as_pointer()
    return builder.call(builder.inttoptr(function, pointer), values)


@intrinsic
def call(typing_context: Any, function: Any, argument: Any) -> Any:
    """Calls the C function `int64 f(int64)` at an address."""
    return INT64(INT64, INT64), _emit_call


@intrinsic
def call_item(typing_context: Any, function: Any, operands: Any, results: Any, index: Any) -> Any:
    """Calls the C function `int64 f(int64, int64, int64)` at an address."""
    return INT64(*[INT64] * 4), _emit_call


def address_of(symbol: str) -> Any:
    """A function of no arguments that numba compiles: the address of a symbol of this process, resolved when the code is loaded."""

    @intrinsic
    def address(typing_context: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            existing = builder.module.globals.get(symbol)
            target = existing or ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [_WORD]), symbol)
            return builder.ptrtoint(target, _WORD)

        return INT64(), codegen

    return address


def emit_prefetch(builder: ir.IRBuilder, pointer: Any) -> None:
    """For intrinsics: code that asks for the cache line of an i8 pointer."""
    number = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, keep, data = (ir.Constant(number, value) for value in (0, 2, 1))
    builder.call(function, [pointer, read, keep, data])


@intrinsic
def times_power_of_two(typing_context: Any, value: Any, exponent: Any) -> Any:
    """value * 2**exponent, for exponents of normal numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = ir.IntType(32)
        biased = builder.shl(builder.add(args[1], ir.Constant(bits, 127)), ir.Constant(bits, 23))
        return builder.fmul(args[0], builder.bitcast(biased, ir.FloatType()))

    return types.float32(types.float32, types.int32), codegen


@intrinsic
def stay_apart(typing_context: Any) -> Any:
    """Has the function that calls this compiled once, not again in each place that calls it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen
