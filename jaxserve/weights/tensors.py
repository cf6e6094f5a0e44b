"""What a checkpoint is to the loader: named tensors on disk, read one at a time."""

from __future__ import annotations

import abc
import dataclasses
import math
import pathlib
import types
from collections.abc import Mapping, Sequence, Set
from typing import Self

import numpy as np
import numpy.typing

from jaxserve.errors import ConfigError

_MAX_SHOWN = 40
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Shape of a tensor and the name of the dtype that reading it gives, such as "float32" or "bfloat16"."""

    shape: tuple[int, ...]
    dtype: str


class Checkpoint(abc.ABC):
    """The weights of one model on disk, under Hugging Face's names or llama.cpp's; a context manager that closes its files.

    Reading is thread-safe, returns an array of its own, and keeps nothing of what was read.

    Args:
      path: the file or directory.
      tensors: everything there is to read.
    """

    def __init__(self, path: pathlib.Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.tensors = types.MappingProxyType(dict(tensors))

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """The whole tensor; quantized formats as float32.

        Raises: ConfigError naming file and tensor if it cannot be read.
        """

    @abc.abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop of the first axis, without reading the others.

        Raises: ConfigError naming file and tensor if it cannot be read.
        """

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with as many rows from `start` on, as numbers of its dtype.

        Raises: ConfigError naming file and tensor if it cannot be read.
        """
        out[...] = self.read_rows(name, start, start + len(out))

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the files; reading is over. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_rows(self, name: str, start: int, stop: int) -> None:
        shape = self.tensors[name].shape
        assert 0 <= start <= stop <= (*shape, -1)[0], f"{name=} {shape=} {start=} {stop=}"


class CheckpointView(Checkpoint):
    """Another checkpoint, some of whose tensors have other names here, or are stored as something else than the numbers they stand for.

    Args:
      names: tensor -> its name in the other checkpoint, where that differs.
      packed: tensors that `_unpack` reads.
    """

    def __init__(
        self,
        stored: Checkpoint,
        tensors: Mapping[str, TensorInfo],
        *,
        names: Mapping[str, str] | None = None,
        packed: Set[str] = frozenset(),
    ) -> None:
        super().__init__(stored.path, tensors)
        self._stored, self._names, self._packed = stored, names or {}, packed

    def read(self, name: str) -> np.ndarray:
        if name in self._packed:
            return self._unpack(name, 0, self.tensors[name].shape[0])
        return self._stored.read(self._names.get(name, name))

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        self._check_rows(name, start, stop)
        if name in self._packed:
            return self._unpack(name, start, stop)
        return self._stored.read_rows(self._names.get(name, name), start, stop)

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        if name in self._packed:
            super().read_into(name, start, out)
        else:
            self._stored.read_into(self._names.get(name, name), start, out)

    def close(self) -> None:
        self._stored.close()

    def _unpack(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a packed tensor, as numbers."""
        raise AssertionError(f"{name} is packed in no way that is known here")


def empty(shape: Sequence[int], dtype: numpy.typing.DTypeLike) -> np.ndarray:
    """An array that a CPU device can take over as it is, without a copy: jax asks for addresses that are multiples of 64."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def raise_problems(path: pathlib.Path, problems: Sequence[str]) -> None:
    """Raise one ConfigError for all problems of a checkpoint; with none, do nothing."""
    if problems:
        more = [f"... and {len(problems) - _MAX_SHOWN} more"] if len(problems) > _MAX_SHOWN else []
        raise ConfigError(f"cannot read the checkpoint {path}:\n  " + "\n  ".join([*problems[:_MAX_SHOWN], *more]))
