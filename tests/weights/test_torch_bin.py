"""Files of torch.save: every tensor as torch reads it, and nothing but tensors."""

from __future__ import annotations

import io
import json
import os
import pathlib
import pickle
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.tensor_pickle import PickleError, read_tensor_pickle
from jaxserve.weights.torch_bin import BIN_INDEX_NAME, open_torch

RANDOM = torch.Generator().manual_seed(0)
WIDE = torch.randn(7, 5, 3, generator=RANDOM)
TENSORS: dict[str, torch.Tensor] = {
    "float32": WIDE, "float16": WIDE.half(), "bfloat16": WIDE.bfloat16(), "float64": WIDE.double(), "int64": torch.arange(11),
    "int8": torch.arange(-4, 4, dtype=torch.int8), "bool": torch.tensor([True, False]), "view of the first": WIDE[2:5, 1:],
    "transposed": WIDE.permute(2, 0, 1), "parameter": torch.nn.Parameter(WIDE[0]), "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4), "expanded": torch.tensor([3.0]).expand(4, 6),
}  # fmt: skip


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def test_every_tensor_equals_torchs(tmp_path: pathlib.Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(TENSORS)
        for name, tensor in TENSORS.items():
            expected, found = as_numpy(tensor), checkpoint.read(name)
            assert (checkpoint.tensors[name].shape, checkpoint.tensors[name].dtype) == (expected.shape, expected.dtype.name)
            np.testing.assert_array_equal(found, expected)
            assert found.flags.owndata
            if expected.ndim and len(expected) > 2:
                np.testing.assert_array_equal(checkpoint.read_rows(name, 1, len(expected) - 1), expected[1:-1])
    checkpoint.close()


def test_state_dict_of_a_module_is_read_with_its_metadata(tmp_path: pathlib.Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    for content, name in ((module.state_dict(), "a.bin"), ({"state_dict": module.state_dict(), "epoch": 3}, "b.bin")):
        torch.save(content, tmp_path / name)
        with open_torch(tmp_path / name) as checkpoint:
            assert {key: checkpoint.read(key).tolist() for key in checkpoint.tensors} == {
                key: tensor.tolist() for key, tensor in module.state_dict().items()
            }


def test_shards_are_found_through_their_index_or_without_one(tmp_path: pathlib.Path) -> None:
    shards = {"pytorch_model-00001-of-00002.bin": {"a": WIDE}, "pytorch_model-00002-of-00002.bin": {"b": WIDE * 2, "c": WIDE[0]}}
    for shard, tensors in shards.items():
        torch.save(tensors, tmp_path / shard)
    torch.save({"lr": WIDE}, tmp_path / "optimizer.bin")
    for indexed in (False, True):
        if indexed:
            places = {name: shard for shard, tensors in shards.items() for name in tensors}
            (tmp_path / BIN_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))
        with open_checkpoint(tmp_path) as checkpoint:
            assert set(checkpoint.tensors) == {"a", "b", "c"}
            np.testing.assert_array_equal(checkpoint.read("b"), as_numpy(WIDE * 2))


def test_all_that_is_wrong_with_shards_is_listed(tmp_path: pathlib.Path) -> None:
    torch.save({"a": WIDE}, tmp_path / "x.bin")
    (tmp_path / "y.bin").write_bytes(b"no archive")
    places = {"a": "x.bin", "gone": "x.bin", "b": "y.bin", "c": "z.bin", "d": "../w.bin"}
    (tmp_path / BIN_INDEX_NAME).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ConfigError) as caught:
        open_torch(tmp_path)
    for part in ("x.bin has no tensor gone", "y.bin cannot be read", "missing shard: z.bin", "../w.bin"):
        assert part in str(caught.value)


class Runs:
    """What runs a command when it is unpickled."""

    def __init__(self, mark: pathlib.Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._mark}",)


@pytest.mark.parametrize("wrap", [lambda runs: runs, lambda runs: {"a": runs}, lambda runs: {"a": [runs]}], ids=["all", "value", "list"])
def test_pickle_that_would_run_code_is_refused_and_does_not(wrap: Any, tmp_path: pathlib.Path) -> None:
    torch.save(wrap(Runs(tmp_path / "ran")), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"system, which could run code"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[WIDE], {"a": 3}, {3: WIDE}, WIDE, "text", {"a": {"b": WIDE}}, {"a": {1, 2}}, {"a": torch.float32}])
def test_what_is_no_dict_of_tensors_is_refused(content: Any, tmp_path: pathlib.Path) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ConfigError, match=r"x\.bin cannot be read"):
        open_torch(tmp_path / "x.bin")


def test_file_of_an_old_torch_is_refused_saying_what_to_do(tmp_path: pathlib.Path) -> None:
    torch.save({"a": WIDE}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError, match=r"torch before 1\.6"):
        open_torch(tmp_path / "x.bin")


def rezipped(source: bytes, changed: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with members of other content, or without them."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(result, "w", compression) as new:
        for item in old.infolist():
            content = changed.get(pathlib.PurePosixPath(item.filename).name, old.read(item))
            if content is not None:
                new.writestr(item.filename, content)
    return result.getvalue()


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


SMALL = saved({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no zip archive"),
        (SMALL[:-30], "no zip archive"),
        (rezipped(SMALL, {"data.pkl": None}), "no data.pkl"),
        (rezipped(SMALL, {"byteorder": b"big"}), "little-endian"),
        (rezipped(SMALL, {"data.pkl": b"\x80\x02"}), "the pickle"),
        (rezipped(SMALL, {"data.pkl": pickle.dumps({"a": 1})}), "not a tensor"),
        (rezipped(SMALL, {"0": None}), "missing"),
        (rezipped(SMALL, {"0": b"1234"}), "too few"),
        (rezipped(SMALL, {}, compression=zipfile.ZIP_DEFLATED), "compressed"),
    ],
)
def test_damaged_archive_is_refused_by_what_is_wrong(content: bytes, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        open_torch(tmp_path / "x.bin")


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, len(SMALL)))
def test_archive_with_any_bytes_changed_is_read_or_refused(tmp_path_factory: Any, changes: list[tuple[int, int]], length: int) -> None:
    content = bytearray(SMALL)
    for place, value in changes:
        content[place] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"
    for damaged in (content, content[:length]):
        path.write_bytes(damaged)
        try:
            with open_torch(path) as checkpoint:
                for name in checkpoint.tensors:
                    checkpoint.read(name)
        except ConfigError as error:
            assert "fuzz.bin" in str(error)


with zipfile.ZipFile(io.BytesIO(SMALL)) as _archive:
    PICKLE = _archive.read(next(name for name in _archive.namelist() if name.endswith("data.pkl")))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(PICKLE) - 1), st.integers(0, 255)), max_size=6), st.binary(max_size=20))
def test_any_pickle_is_tensors_or_an_error(changes: list[tuple[int, int]], tail: bytes) -> None:
    content = bytearray(PICKLE)
    for place, value in changes:
        content[place] = value
    for data in (bytes(content), tail, bytes(content[:-1]) + tail):
        try:
            tensors = read_tensor_pickle(data)
        except PickleError:
            continue
        for tensor in tensors.values():
            last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
            assert not all(tensor.shape) or last < tensor.storage_count
