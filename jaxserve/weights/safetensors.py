"""Checkpoints in the safetensors format, in one file or in shards listed by an index.

1. The index, if there is one, says which shard holds a tensor; a shard is a file beside it, never elsewhere.
2. Every shard's header is read and checked by the safetensors library; what is wrong with any of them is reported at once.
3. A tensor is copied out of the mapped file when asked for.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes  # noqa: F401  # registers bfloat16 with numpy, which safetensors looks up by name
import numpy as np
import safetensors

from jaxserve.errors import ConfigError
from jaxserve.weights.json_file import read_json
from jaxserve.weights.tensors import Checkpoint, TensorInfo, raise_problems

INDEX_NAME = "model.safetensors.index.json"
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_MAX_INDEX_BYTES = 64 << 20  # the largest published index, of 60,000 tensors, has 6 MB


class SafetensorsCheckpoint(Checkpoint):
    """Tensors of safetensors files."""

    def __init__(self, path: pathlib.Path, files: dict[str, Any], places: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
        super().__init__(path, tensors)
        self._files = files
        self._places = places

    def read(self, name: str) -> np.ndarray:
        with self._errors(name):
            return self._files[self._places[name]].get_tensor(name)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        self._check_rows(name, start, stop)
        info = self.tensors[name]
        if start == stop:  # the library refuses empty slices
            return np.empty((0, *info.shape[1:]), np.dtype(info.dtype))
        with self._errors(name):
            return self._files[self._places[name]].get_slice(name)[start:stop]

    def close(self) -> None:
        for file in self._files.values():
            file.__exit__(None, None, None)
        self._files.clear()

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        assert self._files, f"{self.path} is closed"
        try:
            yield
        except (safetensors.SafetensorError, OSError) as error:
            raise ConfigError(f"cannot read {name} from {self._places[name]} of {self.path}: {error}") from None


def open_safetensors(path: pathlib.Path) -> SafetensorsCheckpoint:
    """Open a .safetensors file, or a directory with an index or with .safetensors files.

    Raises: ConfigError listing every missing or damaged shard and every tensor that cannot be read.
    """
    problems: list[str] = []
    folder, names, places = find_shards(path, INDEX_NAME, _unindexed, problems)
    files: dict[str, Any] = {}
    with contextlib.ExitStack() as opened:
        for name in names:
            file = _open(folder / name, problems)
            if file is not None:
                files[name] = opened.enter_context(file)
        tensors = _list_tensors(files, places, problems)
        raise_problems(path, problems)
        opened.pop_all()  # they stay open: the checkpoint closes them
    return SafetensorsCheckpoint(path, files, places, tensors)


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
