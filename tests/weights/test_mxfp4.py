"""Matrices in MXFP4: against transformers' conversion, and a whole GPT-OSS with them."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from jaxserve.errors import ConfigError
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.mxfp4 import dequantize
from tests.models.paged import PagedModel
from tests.models.variants import SIZES, VOCAB, Variant


def random_pair(rng: np.random.Generator, *dims: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and scales of [*dims, 32 * the last of dims] numbers of about 0.1."""
    return rng.integers(0, 256, (*dims, 16), np.uint8), rng.integers(121, 125, dims, np.uint8)


def test_numbers_are_those_of_transformers() -> None:
    blocks = np.arange(256, dtype=np.uint8).repeat(6).reshape(3, 4, 8, 16)
    scales = np.random.default_rng(0).integers(1, 250, (3, 4, 8), np.uint8)
    expected = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
    np.testing.assert_array_equal(dequantize(blocks, scales).swapaxes(1, 2), expected.numpy())


def save_packed(folder: pathlib.Path, **tensors: np.ndarray) -> pathlib.Path:
    save_file({name: torch.tensor(array) for name, array in tensors.items()}, folder / "model.safetensors")
    return folder


def test_rows_are_read_without_the_others(tmp_path: pathlib.Path) -> None:
    blocks, scales = random_pair(np.random.default_rng(1), 4, 3, 2)
    save_packed(tmp_path, x_blocks=blocks, x_scales=scales, bias=np.ones(3, np.float32))
    with open_checkpoint(tmp_path) as checkpoint:
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {"x_blocks": (4, 3, 64), "bias": (3,)}
        np.testing.assert_array_equal(checkpoint.read_rows("x_blocks", 1, 3), checkpoint.read("x_blocks")[1:3])
        np.testing.assert_array_equal(checkpoint.read("x_blocks"), dequantize(blocks, scales))
        assert checkpoint.read("bias").tolist() == [1, 1, 1]


def test_scales_that_do_not_fit_are_refused(tmp_path: pathlib.Path) -> None:
    blocks, _ = random_pair(np.random.default_rng(1), 4, 3, 2)
    with pytest.raises(ConfigError, match=r"x_blocks.*\(4, 3, 2, 16\).*\(4, 3, 5\)"):
        open_checkpoint(save_packed(tmp_path, x_blocks=blocks, x_scales=np.zeros((4, 3, 5), np.uint8)))


def test_gpt_oss_in_mxfp4_equals_its_dequantized_self(tmp_path: pathlib.Path) -> None:
    sizes: dict[str, Any] = SIZES | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    variant = Variant("GptOssConfig", sizes | {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 9})
    rng, model = np.random.default_rng(2), variant.reference
    packed: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        for name, (rows, numbers) in {"gate_up_proj": (2 * 96, 64), "down_proj": (64, 96)}.items():
            blocks, scales = (torch.tensor(array) for array in random_pair(rng, 3, rows, numbers // 32))
            at = f"model.layers.{i}.mlp.experts.{name}"
            packed |= {f"{at}_blocks": blocks, f"{at}_scales": scales}
            getattr(layer.mlp.experts, name).data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items() if f"{name}_blocks" not in packed}
    save_file(plain | packed, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    prompt = rng.integers(0, VOCAB, 21)
    with torch.no_grad():
        expected = model(torch.tensor(prompt)[None]).logits[0].numpy()
    found = PagedModel(tmp_path, scan=True).logits(prompt, [20, 1])
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
