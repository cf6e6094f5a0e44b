"""Bytes that a compiled TPU program moves to and from HBM, counted from its text.

The compiler's own "bytes accessed" also counts traffic within the chip (VMEM, written S(1) in layouts), such as weights that are fetched
ahead, and every loop body and branch. Here only the entry computation counts, with its loops written out.
"""

from __future__ import annotations

import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "s16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:,|$)")
# Names for something that exists already, or the end of a transfer whose start has been counted.
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy-done", "slice-done", "async-done", "async-update"}
# Branches are taken by batches with penalties, random sampling or log-probabilities; the plain step has none.
_BRANCHES = {"conditional"}


def hbm_bytes(text: str, *, but_not: tuple[int, ...] = ()) -> dict[str, int]:
    """Instruction of the entry computation -> bytes it reads from and writes to HBM.

    Args:
      text: Compiled.as_text().
      but_not: shape of arrays that do not count: a cache that is passed on in place, of which a kernel reads what it needs.
    """
    entry = text[text.index("\nENTRY ") :]
    sizes: dict[str, int] = {}
    moved: dict[str, int] = {}
    for line in entry.splitlines():
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        name, type_, op, operands = found.groups()
        sizes[name] = _in_hbm(type_, but_not)
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


def _in_hbm(type_: str, but_not: tuple[int, ...]) -> int:
    return sum(_size(*array) for array in _ARRAY.findall(type_) if "S(" not in array[2] and _dims(array[1]) != but_not)


def _size(dtype: str, dims: str, _: str) -> int:
    return _BYTES[dtype] * math.prod(_dims(dims))


def _dims(dims: str) -> tuple[int, ...]:
    return tuple(int(dim) for dim in dims.split(",") if dim)
