"""The metadata of a GGUF file's architecture, read with suspicion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.errors import ConfigError

# Derived from other keys, or about how the file was made.
_HARMLESS = ("vocab_size", "tensor_data_layout")


class GgufReader:
    """The metadata of one architecture, read by key and type, with what was read.

    Args:
      architecture: what the keys begin with.
      shapes: of the file's tensors, some of which say more than the metadata.
    """

    def __init__(self, metadata: Mapping[str, Any], architecture: str, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self._metadata = metadata
        self._prefix = f"{architecture}."
        self._shapes = shapes or {}
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the file has the key; looking does not count as reading."""
        return self._prefix + key in self._metadata

    def has_tensor(self, name: str) -> bool:
        """Whether the file has a tensor of this name."""
        return name in self._shapes

    def num_rows(self, name: str) -> int:
        """Of a tensor; 0 if the file has none of this name."""
        shape = self._shapes.get(name, ())
        return shape[0] if shape else 0

    def count(self, key: str, default: int | None = None) -> int:
        """A number of things; a list of equal ones, one a layer, counts as one."""
        value = self._get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise self._error(key, value, "a count, the same for all layers")
        if value == 0 and default is None:
            raise self._error(key, value, "positive")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; of a float32, the shortest decimal that it stands for, as config.json would have it."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self._error(key, value, "a positive number")
        return float(str(np.float32(value)))

    def number_or_none(self, key: str) -> float | None:
        """A positive number; None if the file has none, or 0 for it."""
        return self.number(key) if self._get(key, 0) else None

    def flag(self, key: str, default: bool) -> bool:
        """Whether something is so."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._error(key, value, "true or false")
        return value

    def flags(self, key: str, count: int) -> list[bool]:
        """Whether something is so, for each of `count` layers."""
        value = self._get(key, None)
        if not isinstance(value, list) or len(value) != count or not all(isinstance(item, bool) for item in value):
            raise self._error(key, value, f"a list of {count} times true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A word, or a flag as one."""
        return str(self._get(key, default))

    def refuse_unread(self, source: str) -> None:
        """Raise ConfigError if the architecture has a key that nobody read."""
        left = {
            key: value
            for key, value in self._metadata.items()
            if key.startswith(self._prefix) and key.removeprefix(self._prefix) not in (*self._read, *_HARMLESS)
        }
        if left:
            shown = ", ".join(f"{key}={value!r:.80}" for key, value in left.items())
            raise ConfigError(f"{source} has metadata that is not understood: {shown}")

    def _get(self, key: str, default: Any) -> Any:
        self._read.add(key)
        value = self._metadata.get(self._prefix + key, default)
        if value is None:
            raise ConfigError(f"the metadata has no {self._prefix}{key}")
        return value

    def _error(self, key: str, value: Any, wanted: str) -> ConfigError:
        return ConfigError(f"metadata {self._prefix}{key}={value!r:.80} is not {wanted}")
