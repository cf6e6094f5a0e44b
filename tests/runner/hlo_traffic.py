"""Bytes that a compiled program moves to and from a device's memory, counted from its text.

The compiler's own "bytes accessed" also counts traffic within the chip (VMEM, written S(1) in layouts), such as weights that are fetched
ahead, and every loop body and branch. Here only the entry computation counts, with its loops written out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "s16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:,|$)")
# Names for something that exists already, or the end of a transfer whose start has been counted.
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy-done", "slice-done", "async-done", "async-update"}
# Taken by batches with penalties, random sampling or log-probabilities, or as often as there are rows: nothing that a step has to move.
_BRANCHES = {"conditional", "while"}


def hbm_bytes(text: str, *, but_not: int = 0) -> dict[str, int]:
    """Instruction of the entry computation -> bytes it reads from and writes to HBM.

    Args:
      text: Compiled.as_text().
      but_not: numbers of an array that does not count: a cache that is passed on in place, of which a kernel reads what it needs.
    """
    return _bytes_of(text[text.index("\nENTRY ") :], but_not)


def layer_bytes(text: str, *, repeats: int, stacked: Collection[int], cache: int) -> dict[str, int]:
    """Instruction in the body of the loop over the layers -> bytes it reads from and writes to HBM, for one layer.

    Args:
      repeats: of the loop.
      stacked: numbers of arrays that hold all layers, of which one is read.
      cache: numbers of the cache, which the loop carries and which does not count.
    """
    loops = [line for line in text.splitlines() if " while(" in line]
    (loop,) = (line for line in loops if any(math.prod(_dims(array[1])) == cache for array in _ARRAY.findall(line)))
    start = text.index(f"\n%{loop.partition('body=%')[2].partition(',')[0]} (")
    return _bytes_of(text[start : text.index("\n}", start)], cache, repeats, stacked)


def _bytes_of(computation: str, but_not: int, repeats: int = 1, stacked: Collection[int] = ()) -> dict[str, int]:
    sizes: dict[str, int] = {}
    moved: dict[str, int] = {}
    for line in computation.splitlines():
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        name, type_, op, operands = found.groups()
        sizes[name] = _in_hbm(type_, but_not) // (repeats if _numbers(type_) in stacked else 1)
        if op in _FREE or op in _BRANCHES:
            continue
        read = sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", operands))
        if op == "slice-start":  # a part of its operand, and its type names source, target and a token
            moved[name] = sum(_size(*array) for array in _ARRAY.findall(type_) if "S(1)" in array[2])
        elif op == "copy-start":
            moved[name] = read
        elif "gather" in name or op in ("gather", "dynamic-slice"):
            moved[name] = 2 * sizes[name]
        else:
            moved[name] = read + sizes[name]
    return moved


def _in_hbm(type_: str, but_not: int) -> int:
    return sum(_size(*array) for array in _ARRAY.findall(type_) if "S(" not in array[2] and math.prod(_dims(array[1])) != but_not)


def _numbers(type_: str) -> int:
    """Of an array; the sum for several."""
    return sum(math.prod(_dims(array[1])) for array in _ARRAY.findall(type_))


def _size(dtype: str, dims: str, _: str) -> int:
    return _BYTES[dtype] * math.prod(_dims(dims))


def _dims(dims: str) -> tuple[int, ...]:
    return tuple(int(dim) for dim in dims.split(",") if dim)
