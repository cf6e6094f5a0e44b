"""Safetensors checkpoints: round trips, shards, and files that lie."""

from __future__ import annotations

import json
import pathlib
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from jaxserve.errors import ConfigError
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.safetensors import open_safetensors
from jaxserve.weights.tensors import TensorInfo

TENSORS = {
    "a.weight": np.arange(35, dtype=np.float32).reshape(7, 5),
    "b.weight": np.arange(24).reshape(2, 3, 4).astype(ml_dtypes.bfloat16),
    "c.bias": np.arange(11, dtype=np.float16),
    "scalar": np.array(3, np.int32),
    "empty": np.zeros((0, 9), np.float32),
}
WHOLE = save(TENSORS)


def write_sharded(directory: pathlib.Path, places: dict[str, str]) -> None:
    for shard in set(places.values()):
        save_file({name: TENSORS[name] for name in places if places[name] == shard}, directory / shard)
    write_index(directory, places)


def write_index(directory: pathlib.Path, places: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def check_tensors(path: pathlib.Path, names: set[str]) -> None:
    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint.tensors) == names
        for name in names:
            found, expected = checkpoint.read(name), TENSORS[name]
            assert checkpoint.tensors[name] == TensorInfo(shape=expected.shape, dtype=expected.dtype.name)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)
            for start, stop in ((0, 0), (0, 1), (1, len(expected)), (0, len(expected))) if expected.size > 1 else ():
                np.testing.assert_array_equal(checkpoint.read_rows(name, start, stop), expected[start:stop])


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_single_file_gives_its_tensors_by_path_and_by_directory(name: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / name).write_bytes(WHOLE)
    check_tensors(tmp_path, set(TENSORS))
    check_tensors(tmp_path / name, set(TENSORS))


def test_shards_give_their_tensors_when_there_is_an_index(tmp_path: pathlib.Path) -> None:
    places = {"a.weight": "x-1.safetensors", "b.weight": "x-2.safetensors", "c.bias": "x-1.safetensors"}
    write_sharded(tmp_path, places)
    check_tensors(tmp_path, set(places))


def test_index_decides_when_a_tensor_is_in_two_shards(tmp_path: pathlib.Path) -> None:
    write_sharded(tmp_path, {"a.weight": "x-1.safetensors", "c.bias": "x-2.safetensors"})
    save_file({"c.bias": TENSORS["c.bias"], "a.weight": np.zeros(3, np.float32)}, tmp_path / "x-2.safetensors")
    check_tensors(tmp_path, {"a.weight", "c.bias"})


def test_every_problem_is_listed_when_shards_are_missing_damaged_or_incomplete(tmp_path: pathlib.Path) -> None:
    write_sharded(tmp_path, {"a.weight": "x-1.safetensors", "c.bias": "x-2.safetensors"})
    (tmp_path / "x-2.safetensors").write_bytes(WHOLE[:-1])
    write_index(tmp_path, {"a.weight": "x-1.safetensors", "lost": "x-1.safetensors", "c.bias": "x-2.safetensors", "d": "x-3.safetensors"})
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(tmp_path)
    assert "x-1.safetensors has no tensor lost" in str(caught.value)
    assert "x-2.safetensors is damaged" in str(caught.value)
    assert "missing shard: x-3.safetensors" in str(caught.value)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b", "..", "", "a\0b", 7, None, ["x"]])
def test_index_is_refused_when_it_leads_out_of_the_directory(shard: object, tmp_path: pathlib.Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "secret.safetensors")
    write_index(inside, {"a": shard})
    with pytest.raises(ConfigError, match="not the name of a file beside it"):
        open_checkpoint(inside)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_index_is_refused_when_it_is_garbled(text: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match=r"index\.json"):
        open_checkpoint(tmp_path)


def test_dtype_is_refused_by_name_when_it_is_not_supported(tmp_path: pathlib.Path) -> None:
    save_file({"a": np.zeros(3, ml_dtypes.float8_e5m2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="a has dtype F8_E5M2"):
        open_checkpoint(tmp_path)


def test_array_outlives_the_checkpoint(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(WHOLE)
    with open_checkpoint(tmp_path) as checkpoint:
        array = checkpoint.read("a.weight")
    array += 1
    np.testing.assert_array_equal(array, TENSORS["a.weight"] + 1)


@given(cut=st.integers(0, len(WHOLE) - 1))
def test_truncated_file_is_refused(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    path.write_bytes(WHOLE[:cut])
    with pytest.raises(ConfigError):
        open_safetensors(path)


@given(header=st.binary(max_size=80), size=st.integers(0, 2**64 - 1))
def test_hostile_header_is_refused(header: bytes, size: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("hostile") / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + header)
    with pytest.raises(ConfigError):
        open_safetensors(path)


@given(position=st.integers(0, 500), value=st.integers(0, 255))
def test_corrupted_header_is_refused_or_reads_within_the_file(position: int, value: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = bytearray(WHOLE)
    content[position % struct.unpack_from("<Q", WHOLE)[0]] = value
    path = tmp_path_factory.mktemp("corrupt") / "model.safetensors"
    path.write_bytes(content)
    try:
        with open_safetensors(path) as checkpoint:
            total = sum(checkpoint.read(name).nbytes for name in checkpoint.tensors)
    except ConfigError:
        return
    assert total <= len(content)
