"""Checkpoints in block-scaled FP8: numbers, parts of them, and what is refused."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from jaxserve.errors import ConfigError
from jaxserve.models.families import find_family
from jaxserve.models.hf_config import HfConfig
from jaxserve.weights.checkpoint import open_checkpoint
from tests.models.moe_variants import MOE_VARIANTS
from tests.models.paged import PagedModel, assert_same
from tests.models.variants import VARIANTS

BLOCK = (16, 20)


def quantize(matrix: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 and the scales of its blocks, as the published checkpoints have them."""
    rows, columns = matrix.shape
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    packed = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = matrix[part].abs().max() / 448
            packed[part] = (matrix[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return packed, scales


def numbers(packed: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """What they stand for."""
    spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return packed.float() * spread[: packed.shape[0], : packed.shape[1]]


def save(directory: pathlib.Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> pathlib.Path:
    directory.mkdir(exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config or {"quantization_config": {"weight_block_size": list(BLOCK)}}))
    return directory


@given(rows=st.integers(1, 40), columns=st.integers(1, 50), start=st.integers(0, 40), count=st.integers(0, 40))
def test_any_rows_are_those_of_the_whole(rows: int, columns: int, start: int, count: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    packed, scales = quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)), BLOCK)
    tensors = {"x.weight": packed, "x.weight_scale_inv": scales, "x.activation_scale": torch.ones(1), "norm.weight": torch.ones(3)}
    start = min(start, rows)
    stop = min(start + count, rows)
    with open_checkpoint(save(tmp_path_factory.mktemp("fp8"), tensors)) as checkpoint:
        assert set(checkpoint.tensors) == {"x.weight", "norm.weight"}
        assert checkpoint.tensors["x.weight"].dtype == "float32"
        expected = numbers(packed, scales, BLOCK).numpy()
        np.testing.assert_array_equal(checkpoint.read("x.weight"), expected)
        np.testing.assert_array_equal(checkpoint.read_rows("x.weight", start, stop), expected[start:stop])


def test_one_scale_is_that_of_the_whole_matrix_and_experts_have_their_own(tmp_path: pathlib.Path) -> None:
    packed = torch.randn(3, 20, 30).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, 2)
    tensors = {"one.weight": packed[0], "one.weight_scale_inv": torch.tensor(0.5), "e.weight": packed, "e.weight_scale_inv": scales}
    with open_checkpoint(save(tmp_path / "m", tensors)) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("one.weight"), packed[0].float().numpy() / 2)
        expected = np.stack([numbers(packed[e], scales[e], BLOCK).numpy() for e in range(3)])
        np.testing.assert_array_equal(checkpoint.read("e.weight"), expected)
        np.testing.assert_array_equal(checkpoint.read_rows("e.weight", 1, 3), expected[1:])


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_parameters_of_an_fp8_checkpoint_are_the_numbers_that_it_stands_for(name: str, tmp_path: pathlib.Path) -> None:
    variant = (VARIANTS | MOE_VARIANTS)[name]
    config = json.loads((variant.path / "config.json").read_text())
    plain: dict[str, torch.Tensor] = {}
    packed: dict[str, torch.Tensor] = {}
    for tensor, value in variant.reference.state_dict().items():
        if value.ndim == 2 and tensor.endswith("proj.weight"):
            packed[tensor], packed[f"{tensor}_scale_inv"] = quantize(value, BLOCK)
            plain[tensor] = numbers(packed[tensor], packed[f"{tensor}_scale_inv"], BLOCK)
        else:
            plain[tensor] = packed[tensor] = value
    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
    paths = save(tmp_path / "fp8", packed, config | {"quantization_config": how}), save(tmp_path / "plain", plain, config)
    assert_same(*(PagedModel(path, scan=False) for path in paths))


def test_matrices_without_fitting_scales_are_listed(tmp_path: pathlib.Path) -> None:
    packed = torch.zeros(20, 30).to(torch.float8_e4m3fn)
    tensors = {"a.weight": packed, "b.weight": packed, "b.weight_scale_inv": torch.ones(1, 1)}
    with pytest.raises(
        ConfigError, match=r"a\.weight.*has no scales[\s\S]*b\.weight.*has scales \(1, 1\), not b\.weight_scale_inv \(2, 2\)"
    ):
        open_checkpoint(save(tmp_path / "m", tensors))


@pytest.mark.parametrize("block", [[128], ["a", 1], [0, 128], 128])
def test_blocks_of_no_size_are_refused(block: object, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="weight_block_size="):
        open_checkpoint(save(tmp_path / "m", {"x": torch.ones(1)}, {"quantization_config": {"weight_block_size": block}}))


@pytest.mark.parametrize(
    "given_", [{"quant_method": "awq", "bits": 4}, {"quant_method": "compressed-tensors"}, {"quant_method": "fp8", "fmt": "e5m2"}]
)
def test_other_quantizations_are_refused_by_name(given_: dict[str, Any]) -> None:
    config = HfConfig({"architectures": ["LlamaForCausalLM"], "quantization_config": given_})
    with pytest.raises(
        ConfigError, match=f"{given_.get('fmt', given_['quant_method'])}.* is not supported; there (are fp8, mxfp4|is e4m3)"
    ):
        find_family(config)
