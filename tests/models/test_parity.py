"""Tiny random models against transformers in float32: config reader, names, loader and mathematics together."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.paged import logits_of

VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {"num_key_value_heads": 2},
    "tied, mha": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mqa, biases, wide heads": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "head_dim": 24},
    "llama3 rope": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "linear rope": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    "gelu": {"num_key_value_heads": 2, "hidden_act": "gelu"},
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, pathlib.Path]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=130, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256,
        initializer_range=0.3, **VARIANTS[request.param],
    )  # fmt: skip
    reference = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    path = tmp_path_factory.mktemp("llama")
    reference.save_pretrained(path, max_shard_size="60KB")
    return reference, path


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_logits_equal_transformers_however_the_prompt_is_cut(model: tuple[LlamaForCausalLM, pathlib.Path], scan: bool) -> None:
    reference, path = model
    prompt = np.random.default_rng(1).integers(0, 130, 61)
    with torch.no_grad():
        expected = reference(torch.tensor(prompt)[None]).logits[0].numpy()
    for cuts in ([40, 1, 20],) if scan else ([61], [40, 1, 20]):
        found = logits_of(path, prompt, cuts, scan=scan)
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
