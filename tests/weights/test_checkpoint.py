"""What is opened at a path, and the configuration beside it."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.errors import ConfigError
from jaxserve.weights.checkpoint import open_checkpoint, read_config


def test_config_and_generation_are_read_from_a_directory(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 5}))
    assert read_config(tmp_path).generation == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    assert read_config(tmp_path).values == {"hidden_size": 5}
    assert read_config(tmp_path).generation == {"eos_token_id": [2, 3]}


def test_config_beside_a_safetensors_file_is_its_config(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 5}))
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    assert read_config(tmp_path / "x.safetensors").values == {"hidden_size": 5}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 200_000, b"3"])
def test_garbled_config_is_refused_naming_the_file(name: str, content: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        read_config(tmp_path)


def test_config_of_absurd_size_is_refused_unread(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="1099511627776 bytes"):
        read_config(tmp_path)


def test_missing_config_is_refused_naming_the_directory(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ((), "neither model.safetensors.index.json nor a .safetensors file nor an Orbax checkpoint"),
        (("training_args.bin",), "nor a .bin file"),
        (("consolidated.00.pth",), "consolidated.00.pth is not in Hugging Face's layout: convert it"),
        (("m-Q4_0.gguf", "m-Q8_0.gguf"), "m-Q4_0.gguf"),
    ],
)
def test_directory_without_weights_is_refused_saying_what_to_do(files: tuple[str, ...], hint: str, tmp_path: pathlib.Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(tmp_path)
    assert hint in str(caught.value)


@pytest.mark.parametrize("name", ["missing", "missing.gguf", "notes.txt"])
def test_path_that_is_no_model_is_refused(name: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="neither a directory nor"):
        open_checkpoint(tmp_path / name)


def test_problems_are_cut_when_there_are_too_many_to_show(tmp_path: pathlib.Path) -> None:
    places = {f"t{i}": f"x-{i}.safetensors" for i in range(99)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ConfigError, match="and 59 more"):
        open_checkpoint(tmp_path)
