"""The tensor table of a GGUF file: where each tensor lies, checked before anything is read.

The `gguf` package's reader makes numpy views of every part of every string, more than a second for a vocabulary; this steps over them.

    "GGUF" | version u32 | tensors u64 | keys u64 | keys and values ... | tensor table ... | padding | tensors, each aligned
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct

import gguf

from jaxserve.errors import ConfigError

_MAX_DIMS = 4  # GGML_MAX_DIMS
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_STRING, _ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
_SIZES: dict[int, int] = {
    gguf.GGUFValueType.UINT8: 1, gguf.GGUFValueType.INT8: 1, gguf.GGUFValueType.BOOL: 1, gguf.GGUFValueType.UINT16: 2,
    gguf.GGUFValueType.INT16: 2, gguf.GGUFValueType.UINT32: 4, gguf.GGUFValueType.INT32: 4, gguf.GGUFValueType.FLOAT32: 4,
    gguf.GGUFValueType.UINT64: 8, gguf.GGUFValueType.INT64: 8, gguf.GGUFValueType.FLOAT64: 8,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One entry of the table: num_bytes at `offset` of the file hold the blocks of its rows, last axis contiguous."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


def read_tensor_table(view: mmap.mmap, *, alignment: object, problems: list[str]) -> dict[str, GgufTensor]:
    """The tensors of a mapped GGUF file by their names in it.

    Args:
      alignment: of the tensors in bytes; general.alignment of the metadata.
      problems: is extended by a line for each tensor that cannot be.
    Raises: ConfigError if the file is cut short or garbled, so that nothing after that place has a meaning.
    """
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ConfigError(f"general.alignment={alignment!r:.40} is not a power of two")
    try:
        return _read(_Cursor(view), alignment, problems)
    except (struct.error, OverflowError):
        raise ConfigError("it is cut short or garbled: the list of tensors runs past its end") from None


def _read(cursor: _Cursor, alignment: int, problems: list[str]) -> dict[str, GgufTensor]:
    cursor.at = 8
    num_tensors, num_keys = cursor.u64(), cursor.u64()
    for _ in range(num_keys):
        cursor.skip_string()
        cursor.skip_value(cursor.u32())
    entries = [_read_entry(cursor) for _ in range(num_tensors)]
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in entries:
        tensor = _check(name, shape, kind, start + offset, cursor.end, problems)
        if name in tensors:
            problems.append(f"{name} is there twice")
        elif tensor is not None:
            tensors[name] = tensor
    return tensors


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string().decode("utf-8", "replace")
    num_dims = cursor.u32()
    if num_dims > _MAX_DIMS:
        raise ConfigError(f"{name:.80} has {num_dims} dimensions; at most {_MAX_DIMS} are possible, so it is garbled")
    shape = tuple(cursor.u64() for _ in range(num_dims))[::-1]  # the file has the fastest axis first
    return name, shape, cursor.u32(), cursor.u64()


def _check(name: str, shape: tuple[int, ...], kind: int, offset: int, end: int, problems: list[str]) -> GgufTensor | None:
    if kind not in gguf.GGML_QUANT_SIZES or not shape:
        what = f"has type {kind}, which the gguf package does not know" if shape else "has no dimensions"
        problems.append(f"{name:.80} {what}")
        return None
    typed = gguf.GGMLQuantizationType(kind)
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[typed]
    if shape[-1] % block_len:
        problems.append(f"{name:.80} has rows of {shape[-1]} elements, which is no multiple of {typed.name}'s blocks of {block_len}")
        return None
    num_bytes = math.prod(shape) // block_len * block_bytes
    if offset + num_bytes > end:
        problems.append(f"{name:.80} of shape {shape} would end at byte {offset + num_bytes}, but the file has {end}")
        return None
    return GgufTensor(shape=shape, kind=typed, offset=offset, num_bytes=num_bytes)


class _Cursor:
    """A place in the mapped file; what runs past the end raises struct.error."""

    def __init__(self, view: mmap.mmap) -> None:
        self._view = view
        self.end = len(view)
        self.at = 0

    def u32(self) -> int:
        self.at += 4
        return _U32.unpack_from(self._view, self.at - 4)[0]

    def u64(self) -> int:
        self.at += 8
        return _U64.unpack_from(self._view, self.at - 8)[0]

    def string(self) -> bytes:
        size = self.u64()
        self._skip(size)
        return self._view[self.at - size : self.at]

    def skip_string(self) -> None:
        self._skip(self.u64())

    def skip_value(self, kind: int) -> None:
        """Step over a value of metadata."""
        if kind == _STRING:
            self.skip_string()
        elif kind == _ARRAY:
            self._skip_array(self.u32(), self.u64())
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise ConfigError(f"its metadata has a value of type {kind}, which is not known; it is garbled")

    def _skip_array(self, kind: int, count: int) -> None:
        if kind in _SIZES:
            self._skip(count * _SIZES[kind])
        elif kind == _STRING:
            view, at, unpack = self._view, self.at, _U64.unpack_from
            for _ in range(count):  # runs past the end, and raises, long before an absurd count is reached
                at += 8 + unpack(view, at)[0]
            self.at = at
            self._skip(0)
        else:
            raise ConfigError(f"its metadata has an array of type {kind}, which is not known; it is garbled")

    def _skip(self, size: int) -> None:
        self.at += size
        if self.at > self.end:
            raise struct.error("past the end")
