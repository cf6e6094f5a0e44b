"""The key-value section of a GGUF file, read in one pass over the mapped file.

The `gguf` package builds numpy views of every part of every string, which takes seconds for a vocabulary; this takes tens of milliseconds.
"""

from __future__ import annotations

import array
import mmap
import pathlib
import struct
import sys
from collections.abc import Callable
from typing import Any

from jaxserve.errors import ConfigError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_KEYS = 1 << 16
_STRING, _ARRAY, _BOOL = 8, 9, 7
# GGUF value type -> struct code; bool (7) is one byte.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")


def read_gguf_metadata(path: str | pathlib.Path, wanted: Callable[[str], bool] = lambda key: True) -> dict[str, Any]:
    """The metadata of a GGUF file: numbers, booleans, strings (as str), and lists of these.

    Args:
      wanted: says by its key whether a value is kept; the others are stepped over.
    Raises: ConfigError if the file cannot be read or is not a little-endian GGUF file of version 2 or 3.
    Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _Reader(view).metadata(wanted)
    except (OSError, ValueError, struct.error) as error:
        raise ConfigError(f"cannot read GGUF metadata of {path}: {error}") from None


class _Reader:
    """A cursor over the mapped file; every read checks the end of the file."""

    def __init__(self, view: mmap.mmap) -> None:
        self._view = view
        self._at = 0

    def metadata(self, wanted: Callable[[str], bool]) -> dict[str, Any]:
        if self._view[:4] != _MAGIC:
            raise ValueError("it does not begin with 'GGUF'")
        version = _U32.unpack_from(self._view, 4)[0]
        if version not in _VERSIONS:
            raise ValueError(f"version {version} of the format is not known; versions 2 and 3, little-endian, are")
        num_keys = _U64.unpack_from(self._view, 16)[0]
        if num_keys > _MAX_KEYS:
            raise ValueError(f"{num_keys} metadata keys; at most {_MAX_KEYS} are believable")
        self._at = 24
        found: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._text()
            kind = self._u32()
            value = self._value(kind, keep=wanted(key))
            if value is not None:
                found[key] = value
        return found

    def _u32(self) -> int:
        value = _U32.unpack_from(self._view, self._at)[0]
        self._at += 4
        return value

    def _u64(self) -> int:
        value = _U64.unpack_from(self._view, self._at)[0]
        self._at += 8
        return value

    def _take(self, size: int) -> bytes:
        if size > len(self._view) - self._at:
            raise ValueError(f"it ends within a value of {size} bytes at offset {self._at}")
        data = self._view[self._at : self._at + size]
        self._at += size
        return data

    def _text(self) -> str:
        return self._take(self._u64()).decode("utf-8", "replace")

    def _value(self, kind: int, *, keep: bool) -> Any:
        if kind == _STRING:
            text = self._text()
            return text if keep else None
        if kind == _ARRAY:
            return self._items(self._u32(), self._u64(), keep=keep)
        code = _scalar(kind)
        value = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]
        return value if keep else None

    def _items(self, kind: int, count: int, *, keep: bool) -> list[Any] | None:
        if kind == _STRING:
            return self._texts(count, keep=keep)
        if kind == _ARRAY:
            raise ValueError("an array of arrays is not known in model files")
        code = _scalar(kind)
        data = self._take(count * struct.calcsize("<" + code))
        if not keep:
            return None
        if kind == _BOOL:
            return [byte != 0 for byte in data]
        items: array.array[Any] = array.array(code)
        items.frombytes(data)
        if sys.byteorder == "big":
            items.byteswap()
        return items.tolist()

    def _texts(self, count: int, *, keep: bool) -> list[str] | None:
        view, at, end = self._view, self._at, len(self._view)
        if count * 8 > end - at:
            raise ValueError(f"it ends within an array of {count} strings at offset {at}")
        unpack = _U64.unpack_from
        texts: list[str] = []
        for _ in range(count):
            start = at + 8
            at = start + unpack(view, at)[0]
            if at > end:
                raise ValueError(f"it ends within a string at offset {start}")
            if keep:
                texts.append(view[start:at].decode("utf-8", "replace"))
        self._at = at
        return texts if keep else None


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"value type {kind} is not known")
    return _SCALARS[kind]
