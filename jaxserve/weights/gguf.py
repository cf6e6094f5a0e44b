"""Checkpoints in GGUF files, dequantized as they are read.

1. The metadata says which architecture it is and which rows llama.cpp reordered; the tensor table says where the tensors lie.
2. Tensors go by llama.cpp's names, one for each part of a model whatever its architecture, their rows in Hugging Face's order.
3. A tensor is dequantized out of the mapped file when asked for, a piece that fits the processor's cache at a time.
"""

from __future__ import annotations

import contextlib
import mmap
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.models.hf_config import HfConfig
from jaxserve.text.gguf_metadata import read_gguf_metadata
from jaxserve.weights.gguf_config import ROPE_TENSORS, check_architecture, common_name, gguf_config, has_added_one, rotated_heads
from jaxserve.weights.gguf_header import GgufTensor, read_tensor_table
from jaxserve.weights.tensors import Checkpoint, TensorInfo, raise_problems

_Kind = gguf.GGMLQuantizationType
# Types that numpy has, read as they are.
_PLAIN: dict[_Kind, np.dtype[Any]] = {
    _Kind.F32: np.dtype(np.float32), _Kind.F16: np.dtype(np.float16), _Kind.BF16: np.dtype(ml_dtypes.bfloat16),
    _Kind.F64: np.dtype(np.float64), _Kind.I8: np.dtype(np.int8), _Kind.I16: np.dtype(np.int16), _Kind.I32: np.dtype(np.int32),
    _Kind.I64: np.dtype(np.int64),
}  # fmt: skip
# Elements dequantized at a time: 0.5 MB as float32. On a 2-core Xeon, Q4_1 took 2.2 ns an element, and 4.7 ns in gguf's own rows of 16.
_PIECE = 1 << 17
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf")
_IDS = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


class _File:
    """One mapped GGUF file and its table."""

    def __init__(self, path: pathlib.Path, alignment: int, problems: list[str]) -> None:
        with path.open("rb") as file:
            self.view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.tensors = read_tensor_table(self.view, alignment=alignment, problems=problems)
        except BaseException:
            self.view.close()
            raise

    def close(self) -> None:
        # An array over the map lives on in the traceback of an error; then the map goes when that does.
        with contextlib.suppress(BufferError):
            self.view.close()


class GgufCheckpoint(Checkpoint):
    """Tensors of a GGUF file or of its shards, by common names; `own_shapes` has them by the names in the file."""

    def __init__(self, path: pathlib.Path, files: list[_File], metadata: Mapping[str, Any], problems: list[str]) -> None:
        self._files = files
        self.own_shapes = {own_name: tensor.shape for file in files for own_name, tensor in file.tensors.items()}
        self._places: dict[str, tuple[_File, GgufTensor]] = {}
        self._orders: dict[str, np.ndarray] = {}
        self._one_too_much: set[str] = set()
        supported = {kind: _can_read(kind) for kind in {tensor.kind for file in files for tensor in file.tensors.values()}}
        for file in files:
            for own_name, tensor in file.tensors.items():
                name = common_name(own_name, metadata, self.own_shapes)
                if not supported[tensor.kind]:
                    problems.append(f"{own_name} has type {tensor.kind.name}, which the gguf package cannot dequantize")
                if name in self._places:
                    problems.append(f"{own_name} is in two shards, or under two names")
                num_heads = rotated_heads(own_name, metadata)
                if num_heads is not None and tensor.shape[0] % (2 * max(num_heads, 1)):
                    problems.append(f"{own_name} has {tensor.shape[0]} rows, which {num_heads} heads with rotary positions cannot share")
                elif num_heads:
                    self._orders[name] = _half_layout(tensor.shape[0], num_heads)
                if has_added_one(own_name, metadata):
                    self._one_too_much.add(name)
                self._places[name] = file, tensor
        tensors = {
            name: TensorInfo(shape=tensor.shape, dtype=_PLAIN.get(tensor.kind, np.dtype(np.float32)).name)
            for name, (_, tensor) in self._places.items()
        }
        super().__init__(path, tensors)

    def read(self, name: str) -> np.ndarray:
        shape = self.tensors[name].shape
        return self.read_rows(name, 0, shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        self._check_rows(name, start, stop)
        file, tensor = self._places[name]
        num_rows, order = tensor.shape[0], self._orders.get(name)
        if len(tensor.shape) == 1 and tensor.kind not in _PLAIN:  # blocks lie along the only axis
            values = _decode(self._bytes(file, tensor, 1), tensor.kind)[0, start:stop]
        else:
            stored = self._bytes(file, tensor, max(num_rows, 1))[:num_rows]
            rows = stored[start:stop] if order is None else stored[order[start:stop]]
            values = _decode(rows, tensor.kind).reshape(stop - start, *tensor.shape[1:])
        return values - np.ones((), values.dtype) if name in self._one_too_much else values

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _bytes(self, file: _File, tensor: GgufTensor, num_rows: int) -> np.ndarray:
        assert not file.view.closed, f"{self.path} is closed"
        return np.frombuffer(file.view, np.uint8, tensor.num_bytes, tensor.offset).reshape(num_rows, -1)


def is_gguf(path: pathlib.Path) -> bool:
    """Whether the path names a GGUF file."""
    return path.suffix == ".gguf" and path.is_file()


def open_gguf(path: pathlib.Path) -> GgufCheckpoint:
    """Open a GGUF file, with the shards beside it if it is the first of several.

    Raises: ConfigError listing every missing shard, damaged file, and tensor that cannot be read.
    """
    metadata = _metadata(path)
    check_architecture(metadata)
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    problems: list[str] = []
    files: list[_File] = []
    with contextlib.ExitStack() as opened:
        for shard in _shards(path, metadata):
            found: list[str] = []
            try:
                files.append(_File(shard, alignment, found))
                opened.callback(files[-1].close)
            except FileNotFoundError:
                found.append("missing shard")
            except (OSError, ValueError) as error:  # a ConfigError, or a file of no bytes that cannot be mapped
                found.append(str(error))
            problems += [f"{shard.name}: {problem}" for problem in found]
        checkpoint = None if problems else GgufCheckpoint(path, files, metadata, problems)
        raise_problems(path, problems)
        opened.pop_all()  # they stay open: the checkpoint closes them
    assert checkpoint is not None, f"{path=} {problems=}"
    return checkpoint


def read_gguf_config(path: pathlib.Path) -> HfConfig:
    """The configuration that the metadata of a GGUF file stands for, as config.json would have it.

    Raises: ConfigError on a damaged file, an architecture that is not supported, and metadata that is not understood.
    """
    metadata = _metadata(path)
    with open_gguf(path) as checkpoint:
        rope = {name: checkpoint.read(name).astype(np.float32) for name in ROPE_TENSORS if name in checkpoint.tensors}
    return gguf_config(metadata, checkpoint.own_shapes, rope, path.name)


def _metadata(path: pathlib.Path) -> dict[str, Any]:
    return read_gguf_metadata(path, lambda key: not key.startswith("tokenizer.") or key in _IDS)


def _shards(path: pathlib.Path, metadata: Mapping[str, Any]) -> list[pathlib.Path]:
    count = metadata.get("split.count", 1)
    match = _SHARD.search(path.name)
    if not isinstance(count, int) or count < 2:
        return [path]
    if match is None or int(match[2]) != count:
        raise ConfigError(
            f"{path} is one of {count} shards, but its name does not end in -00001-of-{count:05}.gguf, so the others are unknown"
        )
    if int(match[1]) != 1:
        raise ConfigError(f"{path} is a later shard of {count}; name the first, which ends in -00001-of-{count:05}.gguf")
    stem = path.name[: match.start()]
    return [path.with_name(f"{stem}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]


def _half_layout(num_rows: int, num_heads: int) -> np.ndarray:
    """For each row of Hugging Face's order (halves of a head rotate together), its row in the file (neighbours do)."""
    return np.arange(num_rows).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _can_read(kind: _Kind) -> bool:
    block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    try:
        return kind in _PLAIN or gguf.quants.dequantize(block, kind) is not None
    except NotImplementedError:
        return False


def _decode(rows: np.ndarray, kind: _Kind) -> np.ndarray:
    """The elements of rows u8[R, bytes] of whole blocks, in an array of its own."""
    R, row_bytes = rows.shape
    if kind in _PLAIN:
        return np.array(rows, order="C").view(_PLAIN[kind])
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rows.reshape(-1, block_bytes)
    out = np.empty((len(blocks), block_len), np.float32)
    step = _PIECE // block_len
    for start in range(0, len(blocks), step):
        piece = blocks[start : start + step].reshape(1, -1)  # one row: gguf would cut more into groups of 16
        out[start : start + step] = gguf.quants.dequantize(piece, kind).reshape(-1, block_len)
    return out.reshape(R, row_bytes // block_bytes * block_len)
