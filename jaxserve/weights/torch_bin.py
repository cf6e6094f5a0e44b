"""Checkpoints that torch.save wrote, in one .bin file or in shards listed by an index, read without torch.

1. Each file is a zip archive, uncompressed: a pickle of what the tensors are, and a file for each storage.
2. The pickle is read as data (see tensor_pickle.py); tensors must lie within their storages, storages within the file.
3. A tensor is copied out of the mapped file when asked for.
"""

from __future__ import annotations

import contextlib
import mmap
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Mapping

import ml_dtypes  # noqa: F401  # registers bfloat16 with numpy
import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.weights.safetensors import find_shards
from jaxserve.weights.tensor_pickle import PickledTensor, PickleError, read_tensor_pickle
from jaxserve.weights.tensors import Checkpoint, TensorInfo, raise_problems

BIN_INDEX_NAME = "pytorch_model.bin.index.json"
# What training leaves beside the weights under the same ending.
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "random_states", "rng_state", "scaler")
_MAX_PICKLE_BYTES = 256 << 20  # a pickle takes about 200 bytes a tensor
_LOCAL_HEADER = struct.Struct("<26xHH")


class _File:
    """One mapped archive, its tensors, and where each storage begins."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            with zipfile.ZipFile(path) as archive:
                self.tensors, self._starts = self._read_tables(archive)
        except BaseException:
            self.close()
            raise

    def array(self, name: str) -> np.ndarray:
        """The tensor, as a view of the file."""
        tensor = self.tensors[name]
        dtype = np.dtype(tensor.dtype)
        return np.ndarray(
            tensor.shape, dtype, buffer=self.view, offset=self._starts[tensor.storage] + tensor.offset * dtype.itemsize,
            strides=tuple(stride * dtype.itemsize for stride in tensor.strides),
        )  # fmt: skip

    def close(self) -> None:
        # An array over the map lives on in the traceback of an error; then the map goes when that does.
        with contextlib.suppress(BufferError):
            self.view.close()

    def _read_tables(self, archive: zipfile.ZipFile) -> tuple[dict[str, PickledTensor], dict[str, int]]:
        members = {item.filename: item for item in archive.infolist()}
        pickles = [name for name in members if name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)]
        if len(pickles) != 1:
            raise PickleError("the archive has no data.pkl, as torch.save writes it")
        root = pickles[0].removesuffix("data.pkl")
        if members[pickles[0]].file_size > _MAX_PICKLE_BYTES:
            raise PickleError(f"data.pkl has {members[pickles[0]].file_size} bytes; at most {_MAX_PICKLE_BYTES} are believable")
        order = members.get(f"{root}byteorder")
        if order is not None and (order.file_size > 16 or archive.read(order).strip() != b"little"):
            raise PickleError("the tensors are not little-endian")
        tensors = read_tensor_pickle(archive.read(pickles[0]))
        starts: dict[str, int] = {}
        for name, tensor in tensors.items():
            member = members.get(f"{root}data/{tensor.storage}")
            if member is None:
                raise PickleError(f"{name} is in a storage {tensor.storage!r:.40} that is missing")
            if tensor.storage_count * np.dtype(tensor.dtype).itemsize > member.file_size:
                raise PickleError(f"the storage of {name} has {member.file_size} bytes, too few for {tensor.storage_count} elements")
            starts.setdefault(tensor.storage, self._start(member))
        return tensors, starts

    def _start(self, member: zipfile.ZipInfo) -> int:
        """Where a member's bytes begin in the file."""
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.compress_size != member.file_size:
            raise PickleError(f"{member.filename} is compressed or encrypted, which torch.save does not do")
        header = member.header_offset
        if not 0 <= header <= len(self.view) - _LOCAL_HEADER.size or self.view[header : header + 4] != b"PK\x03\x04":
            raise PickleError(f"{member.filename} is not where the archive says")
        start = header + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack_from(self.view, header))
        if start + member.file_size > len(self.view):
            raise PickleError(f"{member.filename} ends beyond the file, which is truncated")
        return start


class TorchCheckpoint(Checkpoint):
    """Tensors of .bin files."""

    def __init__(self, path: pathlib.Path, files: Mapping[str, _File], places: Mapping[str, str]) -> None:
        self._files = dict(files)
        self._places = dict(places)
        infos = {
            name: TensorInfo(shape=files[shard].tensors[name].shape, dtype=files[shard].tensors[name].dtype)
            for name, shard in places.items()
        }
        super().__init__(path, infos)

    def read(self, name: str) -> np.ndarray:
        return self._array(name).copy()

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        self._check_rows(name, start, stop)
        return self._array(name)[start:stop].copy()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _array(self, name: str) -> np.ndarray:
        file = self._files[self._places[name]]
        assert not file.view.closed, f"{self.path} is closed"
        return file.array(name)


def weight_files(directory: pathlib.Path) -> list[str]:
    """Names of the .bin files of a directory that may hold weights."""
    if (directory / "pytorch_model.bin").exists():
        return ["pytorch_model.bin"]
    return sorted(file.name for file in directory.glob("*.bin") if not file.name.startswith(_NOT_WEIGHTS))


def open_torch(path: pathlib.Path) -> TorchCheckpoint:
    """Open a .bin file, or a directory with an index or with .bin files.

    Raises: ConfigError listing every missing or damaged shard, what is in them beside tensors, and what the index has wrong.
    """
    problems: list[str] = []
    folder, names, places = find_shards(path, BIN_INDEX_NAME, weight_files, problems)
    files: dict[str, _File] = {}
    with contextlib.ExitStack() as opened:
        for name in names:
            file = _open(folder / name, problems)
            if file is not None:
                files[name] = file
                opened.callback(file.close)
        indexed = dict(places)
        for shard, file in files.items():
            for name in file.tensors:
                if places.setdefault(name, shard) != shard and indexed.get(name) is None:
                    problems.append(f"{name} is in two shards, {places[name]} and {shard}")
        missing = ((name, shard) for name, shard in indexed.items() if shard in files and name not in files[shard].tensors)
        problems += [f"{shard} has no tensor {name}, though the index says so" for name, shard in missing]
        raise_problems(path, problems)
        opened.pop_all()  # they stay open: the checkpoint closes them
    return TorchCheckpoint(path, files, places)


def _open(path: pathlib.Path, problems: list[str]) -> _File | None:
    try:
        if path.is_file() and not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                is_old = file.read(1) == b"\x80"
            hint = (
                "; torch before 1.6 wrote such files: torch.load it and torch.save it again, or convert it to safetensors" if is_old else ""
            )
            raise PickleError(f"it is no zip archive, or a truncated one{hint}")
        return _File(path)
    except FileNotFoundError:
        problems.append(f"missing shard: {path.name}")
    except (
        ConfigError,
        ValueError,
        OSError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
        EOFError,
        struct.error,
    ) as error:
        problems.append(f"{path.name} cannot be read: {error}")
    return None
