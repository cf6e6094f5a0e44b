"""The files beside a model: read as sentence-transformers means them, refused by name where they ask for something else."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import gguf
import numpy as np
import pytest

from jaxserve.errors import ConfigError
from jaxserve.models.families import find_family
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.spec import PoolLayerSpec
from jaxserve.weights.checkpoint import read_config
from jaxserve.weights.sentence_transformers import WithModules, makes_vectors, read_modules, with_pooling
from tests.tiny_vectors import MAX_LEN, PROMPTS, dense_weights, tiny_classifier, tiny_encoder


def write(directory: pathlib.Path, modules: list[tuple[str, str]], **configs: dict[str, Any]) -> pathlib.Path:
    for folder, values in configs.items():
        (directory / folder).mkdir()
        (directory / folder / "config.json").write_text(json.dumps(values))
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(modules)
    ]
    (directory / "modules.json").write_text(json.dumps(listed))
    return directory


def test_model_without_modules_has_none(tmp_path: pathlib.Path) -> None:
    assert read_modules(tmp_path) is None


def test_modules_are_read() -> None:
    path = tiny_encoder(dense=24)
    config = read_config(path)
    family, pooling = with_pooling(path, config, find_family(config), matryoshka=False)
    spec = family.spec(config)
    assert spec.pool is not None
    assert spec.pool.method == "mean"
    assert spec.pool.layers == (PoolLayerSpec(width=24, activation="tanh"),)
    assert (pooling.task, pooling.width, pooling.normalize, pooling.max_len) == ("embed", 24, True, MAX_LEN)
    assert pooling.prompts == PROMPTS
    assert config.unread() == {}
    with WithModules(path, pooling.modules) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("2_Dense.linear.weight"), dense_weights(24)["linear.weight"].numpy())
        np.testing.assert_array_equal(checkpoint.read_rows("2_Dense.linear.bias", 3, 5), dense_weights(24)["linear.bias"].numpy()[3:5])
        assert checkpoint.read("embeddings.LayerNorm.weight").shape == (32,)


@pytest.mark.parametrize(("kind", "method"), [(None, None), (0, None), (1, "mean"), (2, "cls"), (3, "last")])
def test_gguf_file_says_by_a_number_how_it_pools(kind: int | None, method: str | None, tmp_path: pathlib.Path) -> None:
    path = write_pooling(tmp_path / "m.gguf", kind)
    modules = read_modules(path)
    assert (modules.method if modules else None) == method
    assert makes_vectors(path) == (modules is not None)


def test_gguf_file_of_a_reranker_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"pooling_type=4 is not supported"):
        read_modules(write_pooling(tmp_path / "m.gguf", 4))


def write_pooling(path: pathlib.Path, kind: int | None) -> pathlib.Path:
    writer = gguf.GGUFWriter(path, "bert")
    if kind is not None:
        writer.add_uint32("bert.pooling_type", kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken", "weightedmean", "max", "mean_sqrt_len"])
def test_pooling_may_be_named_by_one_word(mode: str, tmp_path: pathlib.Path) -> None:
    modules = read_modules(write(tmp_path, [("1_Pooling", "Pooling")], **{"1_Pooling": {"pooling_mode": mode}}))
    assert modules is not None
    assert modules.method is not None
    assert not modules.normalize


REFUSED: list[tuple[list[tuple[str, str]], dict[str, dict[str, Any]], str]] = [
    ([("1_LSTM", "LSTM")], {}, "LSTM"),
    ([("../evil", "Pooling")], {}, "not the name of a folder"),
    ([("", "Pooling")], {}, "not the name of a folder"),
    (
        [("1_Pooling", "Pooling")],
        {"1_Pooling": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}},
        "mean_tokens, cls_token",
    ),
    ([("1_Pooling", "Pooling")], {"1_Pooling": {"pooling_mode_mean_tokens": False}}, "by nothing"),
    ([("1_Pooling", "Pooling")], {"1_Pooling": {"pooling_mode_mean_tokens": True, "include_prompt": False}}, "include_prompt"),
    ([("2_Dense", "Dense")], {"2_Dense": {"out_features": 0}}, "out_features=0"),
    ([("2_Dense", "Dense")], {"2_Dense": {"out_features": 4, "activation_function": "torch.nn.Mish"}}, "Mish"),
    ([("1_Pooling", "Pooling")], {}, "1_Pooling"),
]


@pytest.mark.parametrize(("modules", "configs", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_what_is_not_understood_is_refused(
    modules: list[tuple[str, str]], configs: dict[str, dict[str, Any]], message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_modules(write(tmp_path, modules, **configs))


def test_modules_file_that_is_no_list_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "modules.json").write_text('{"type": "Pooling"}')
    with pytest.raises(ConfigError, match="not an array of objects"):
        read_modules(tmp_path)


@pytest.mark.parametrize(
    ("values", "activation"),
    [
        ({}, "sigmoid"), ({"problem_type": "regression"}, "identity"), ({"id2label": {"0": "a", "1": "b"}}, "softmax"),
        ({"id2label": {"0": "a", "1": "b"}, "problem_type": "multi_label_classification"}, "sigmoid"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, "identity"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh", "version": "4.1"}}, "tanh"),
    ],
)  # fmt: skip
def test_scores_go_through_the_activation_of_the_config(values: dict[str, Any], activation: str, tmp_path: pathlib.Path) -> None:
    config = HfConfig({**read_config(tiny_classifier()).values, **values})
    _, pooling = with_pooling(tmp_path, config, find_family(config), matryoshka=False)
    assert pooling.activation == activation
    assert config.unread() == {}


def test_activation_that_is_not_known_is_refused(tmp_path: pathlib.Path) -> None:
    config = HfConfig({**read_config(tiny_classifier()).values, "sbert_ce_default_activation_function": "os.system"})
    with pytest.raises(ConfigError, match=r"os\.system"):
        with_pooling(tmp_path, config, find_family(config), matryoshka=False)
