from __future__ import annotations

import pathlib

import gguf
import pytest

from jaxserve.errors import ConfigError
from jaxserve.text.gguf_metadata import read_gguf_metadata

VALUES = {
    "a.u8": (200, "add_uint8"), "a.i8": (-3, "add_int8"), "a.u16": (60000, "add_uint16"),
    "a.i16": (-300, "add_int16"), "a.u32": (7, "add_uint32"),
    "a.i32": (-7, "add_int32"), "a.u64": (1 << 40, "add_uint64"), "a.i64": (-(1 << 40), "add_int64"), "a.f32": (0.5, "add_float32"),
    "a.f64": (0.1, "add_float64"), "a.bool": (True, "add_bool"), "a.text": ("né 🦙", "add_string"), "a.ints": ([1, 2, 3], "add_array"),
    "a.floats": ([0.5, -1.0], "add_array"), "a.bools": ([True, False], "add_array"), "a.texts": (["x", "", "日本"], "add_array"),
}  # fmt: skip


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "mpt")
    for key, (value, method) in VALUES.items():
        getattr(writer, method)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_every_kind_of_value_is_read_as_it_was_written(file: pathlib.Path) -> None:
    assert read_gguf_metadata(file) == {"general.architecture": "mpt", **{key: value for key, (value, _) in VALUES.items()}}


def test_metadata_equals_what_the_gguf_package_reads(file: pathlib.Path) -> None:
    fields = gguf.GGUFReader(file).fields
    assert read_gguf_metadata(file) == {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}


def test_unwanted_values_are_stepped_over(file: pathlib.Path) -> None:
    assert read_gguf_metadata(file, lambda key: key == "a.texts") == {"a.texts": ["x", "", "日本"]}


def test_every_truncation_is_refused(file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = file.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in range(0, len(data) - 1, 3):
        cut.write_bytes(data[:size])
        with pytest.raises(ConfigError, match="cannot read GGUF metadata"):
            read_gguf_metadata(cut)


@pytest.mark.parametrize(
    ("place", "byte", "message"), [(0, 0x58, "begin with 'GGUF'"), (4, 1, "version 1"), (20, 0xFF, "metadata keys"), (63, 99, "value type")]
)
def test_files_of_other_formats_are_refused_by_name(file: pathlib.Path, place: int, byte: int, message: str) -> None:
    data = bytearray(file.read_bytes())
    if place == 63:  # the type of the first value follows its 20-letter key
        place = 24 + 8 + len("general.architecture")
    data[place] = byte
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        read_gguf_metadata(file)


def test_missing_file_is_a_config_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_gguf_metadata(tmp_path / "none.gguf")
