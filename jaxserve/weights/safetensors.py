"""Checkpoints in the safetensors format, in one file or in shards listed by an index.

1. The index, if there is one, says which shard holds a tensor; a shard is a file beside it, never elsewhere.
2. Every shard's header is read and checked by the safetensors library; what is wrong with any of them is reported at once.
3. The bytes of a tensor, or of some of its rows, are read straight to where they are wanted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401  # registers bfloat16 and FP8 with numpy, which looks them up by name
import numpy as np
import safetensors

from jaxserve.errors import ConfigError
from jaxserve.weights.json_file import read_json
from jaxserve.weights.tensors import Checkpoint, TensorInfo, empty, raise_problems

INDEX_NAME = "model.safetensors.index.json"
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
}  # fmt: skip
_MAX_INDEX_BYTES = 64 << 20  # the largest published index, of 60,000 tensors, has 6 MB


class SafetensorsCheckpoint(Checkpoint):
    """Tensors of safetensors files.

    Args:
      places: tensor -> the file that holds it, beside `path` or `path` itself.
      starts: tensor -> the byte of the file at which it begins.
    """

    def __init__(self, path: pathlib.Path, places: dict[str, str], starts: dict[str, int], tensors: dict[str, TensorInfo]) -> None:
        super().__init__(path, tensors)
        self._places, self._starts = places, starts
        folder = path.parent if path.is_file() else path
        self._files: dict[str, int] = {name: os.open(folder / name, os.O_RDONLY) for name in {places[tensor] for tensor in tensors}}

    def read(self, name: str) -> np.ndarray:
        info = self.tensors[name]
        out = empty(info.shape, info.dtype)
        self._fill(name, 0, out)
        return out

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        self._check_rows(name, start, stop)
        info = self.tensors[name]
        out = empty((stop - start, *info.shape[1:]), info.dtype)
        self._fill(name, start, out)
        return out

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        if out.dtype == np.dtype(self.tensors[name].dtype) and out.flags.c_contiguous:
            self._check_rows(name, start, start + len(out))
            self._fill(name, start, out)
        else:
            super().read_into(name, start, out)

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _fill(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill a contiguous array of the tensor's dtype with its bytes from a row on."""
        assert self._files, f"{self.path} is closed"
        info, file = self.tensors[name], self._places[name]
        at = self._starts[name] + start * math.prod(info.shape[1:]) * out.itemsize
        left: memoryview = out.reshape(-1).view(np.uint8).data
        while left:  # one call reads 2 GB at most
            try:
                count = os.preadv(self._files[file], [left], at)
            except OSError as error:
                raise ConfigError(f"cannot read {name} from {file} of {self.path}: {error}") from None
            if not count:
                raise ConfigError(f"cannot read {name} from {file} of {self.path}: it has been cut since it was opened")
            at, left = at + count, left[count:]


def open_safetensors(path: pathlib.Path) -> SafetensorsCheckpoint:
    """Open a .safetensors file, or a directory with an index or with .safetensors files.

    Raises: ConfigError listing every missing or damaged shard and every tensor that cannot be read.
    """
    problems: list[str] = []
    folder, names, places = find_shards(path, INDEX_NAME, _unindexed, problems)
    with contextlib.ExitStack() as opened:
        files = {name: opened.enter_context(file) for name in names if (file := _open(folder / name, problems)) is not None}
        tensors = _list_tensors(files, places, problems)
        raise_problems(path, problems)
    starts: dict[str, int] = {}
    for name in files:
        starts |= {tensor: start for tensor, start in _starts(folder / name).items() if places[tensor] == name}
    return SafetensorsCheckpoint(path, places, starts, tensors)


def find_shards(
    path: pathlib.Path, index_name: str, unindexed: Callable[[pathlib.Path], list[str]], problems: list[str]
) -> tuple[pathlib.Path, list[str], dict[str, str]]:
    """Of a file or a directory: the folder, the names of its weight files, and tensor -> file where an index says so."""
    if path.is_file():
        return path.parent, [path.name], {}
    places = read_index(path / index_name, problems) if (path / index_name).exists() else {}
    return path, sorted(set(places.values())) if places or problems else unindexed(path), places


def _unindexed(directory: pathlib.Path) -> list[str]:
    if (directory / "model.safetensors").exists():
        return ["model.safetensors"]
    return sorted(file.name for file in directory.glob("*.safetensors"))


def read_index(path: pathlib.Path, problems: list[str]) -> dict[str, str]:
    """Tensor -> the file beside the index that holds it; what is wrong with the index is added to `problems`."""
    places = read_json(path, max_bytes=_MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places:
        problems.append(f'{path.name} has no "weight_map" of tensors to files')
        return {}
    kept: dict[str, str] = {}
    for name, shard in places.items():
        # A shard named ../x or /x would read files that are none of the checkpoint's.
        if not isinstance(shard, str) or shard in ("", ".", "..") or any(mark in shard for mark in "/\\\0"):
            problems.append(f"{path.name}: {name} is said to be in {shard!r}, which is not the name of a file beside it")
        else:
            kept[name] = shard
    return kept


def _open(path: pathlib.Path, problems: list[str]) -> Any | None:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except FileNotFoundError:
        problems.append(f"missing shard: {path.name}")
    except (safetensors.SafetensorError, OSError) as error:
        problems.append(f"{path.name} is damaged or not a safetensors file: {error}")
    return None


def _starts(path: pathlib.Path) -> dict[str, int]:
    """Where the tensors of a file begin; the library has checked its header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _list_tensors(files: dict[str, Any], places: dict[str, str], problems: list[str]) -> dict[str, TensorInfo]:
    """Fill in `places` for tensors that the index does not know; a tensor in two shards is where the index says."""
    tensors: dict[str, TensorInfo] = {}
    present: set[str] = set()
    for shard, file in files.items():
        for name in file.keys():  # noqa: SIM118  # the file is no mapping
            if places.setdefault(name, shard) != shard:
                continue
            present.add(name)
            header = file.get_slice(name)
            dtype = _DTYPES.get(header.get_dtype())
            if dtype is None:
                problems.append(f"{shard}: {name} has dtype {header.get_dtype()}, which is not supported; there are {', '.join(_DTYPES)}")
            else:
                tensors[name] = TensorInfo(shape=tuple(header.get_shape()), dtype=dtype)
    problems += [
        f"{shard} has no tensor {name}, though the index says so"
        for name, shard in places.items()
        if shard in files and name not in present
    ]
    return tensors
