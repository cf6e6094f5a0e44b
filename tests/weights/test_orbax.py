"""Orbax checkpoints: round trips, other people's trees, damage, and the conversion script."""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from jaxserve.errors import ConfigError
from jaxserve.weights.checkpoint import open_checkpoint, read_config
from jaxserve.weights.orbax import save_orbax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
script: Any = importlib.import_module("convert")

TENSORS = {
    "model.embed_tokens.weight": np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32),
    "model.layers.0.mlp.up_proj.weight": np.arange(24).reshape(6, 4).astype(ml_dtypes.bfloat16),
    "model.norm.weight": np.arange(11, dtype=np.float16),
    "zeros": np.zeros((3, 2), np.float32),
}


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory of safetensors with everything beside them."""
    directory = tmp_path / "model"
    directory.mkdir()
    save_file(TENSORS, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 5}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(directory / "tokenizer.json"))
    return directory


def check_tensors(directory: pathlib.Path) -> None:
    with open_checkpoint(directory) as checkpoint:
        assert {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()} == {
            name: (array.shape, array.dtype.name) for name, array in TENSORS.items()
        }
        for name, expected in TENSORS.items():
            assert checkpoint.read(name).dtype == expected.dtype
            np.testing.assert_array_equal(checkpoint.read(name), expected)
            np.testing.assert_array_equal(checkpoint.read_rows(name, 1, 3), expected[1:3])
            assert checkpoint.read_rows(name, 2, 2).shape == (0, *expected.shape[1:])


def test_saved_checkpoint_gives_the_same_tensors(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    calls: list[tuple[int, int]] = []
    with open_checkpoint(model) as checkpoint:
        save_orbax(checkpoint, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, len(TENSORS)) for i in range(len(TENSORS))]
    check_tensors(tmp_path)


def test_tree_of_standard_checkpointer_is_read_in_the_directory_itself(tmp_path: pathlib.Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", {name: jnp.asarray(array) for name, array in TENSORS.items()})
    check_tensors(tmp_path / "tree")


def test_nested_tree_gives_names_joined_by_dots(tmp_path: pathlib.Path) -> None:
    nested: dict[str, Any] = {}
    for name, array in TENSORS.items():
        *parents, last = name.split(".")
        node = nested
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = array
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", nested)
    check_tensors(tmp_path)


def test_tree_without_ocdbt_is_read(tmp_path: pathlib.Path) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "params", TENSORS)
    check_tensors(tmp_path)


def test_damage_is_refused_naming_the_tensor(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with open_checkpoint(model) as checkpoint:
        save_orbax(checkpoint, tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        for file in (tmp_path / "params").rglob("d/*"):
            file.write_bytes(b"")
        with pytest.raises(ConfigError, match=r"cannot read model\.norm\.weight"):
            checkpoint.read("model.norm.weight")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"tree_metadata": 3}', "[" * 100_000])
def test_garbled_metadata_are_refused(text: str, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with open_checkpoint(model) as checkpoint:
        save_orbax(checkpoint, tmp_path)
    (tmp_path / "params" / "_METADATA").write_text(text)
    with pytest.raises(ConfigError, match="params"):
        open_checkpoint(tmp_path)


def test_conversion_keeps_weights_config_and_tokenizer(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "out" / "converted"
    assert script.main([str(model), str(target)]) == 0
    check_tensors(target)
    assert read_config(target).values == read_config(model).values
    assert read_config(target).generation == {"eos_token_id": [2, 3]}
    assert (target / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["converted"]


def test_conversion_is_refused_when_the_target_is_taken(model: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(model), str(model)]) == 1
    assert "exists" in capsys.readouterr().err


def test_nothing_is_left_when_a_conversion_fails(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (model / "model.safetensors").write_bytes(b"short")
    assert script.main([str(model), str(tmp_path / "out" / "converted")]) == 1
    assert list((tmp_path / "out").iterdir()) == []
