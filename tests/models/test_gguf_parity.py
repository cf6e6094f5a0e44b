"""GGUF files of each architecture, written as llama.cpp's converter writes them, against transformers in float32."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from jaxserve.weights.gguf_families import GGUF_FAMILIES
from tests.models.moe_variants import MOE_VARIANTS
from tests.models.paged import PagedModel
from tests.models.variants import VARIANTS, VOCAB, Variant


def of_head_size(name: str) -> Variant:
    """The variant with scores divided by the root of the head size: the file cannot say otherwise."""
    variant = VARIANTS[name]
    return dataclasses.replace(variant, options=variant.options | {"query_pre_attn_scalar": 16})


MODELS: dict[str, tuple[Variant, dict[str, Any]]] = {
    "llama": (VARIANTS["llama, gqa"], {}),
    "qwen2": (VARIANTS["qwen2"], {}),
    "qwen3": (VARIANTS["qwen3"], {}),
    "gemma": (VARIANTS["gemma"], {}),
    "gemma2": (
        of_head_size("gemma2"),
        {"attn_logit_softcapping": 6.0, "final_logit_softcapping": 5.0, "attention.sliding_window": 9},
    ),
    "gemma3": (
        of_head_size("gemma3"),
        {
            "attention.sliding_window": 9, "attention.sliding_window_pattern": 2, "rope.freq_base_swa": 100.0,
            "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
        },
    ),
}  # fmt: skip


EXPERTS = {"expert_count": 7, "expert_used_count": 3, "expert_feed_forward_length": 20}
# Name -> architecture of the file, model, metadata.
WITH_EXPERTS: dict[str, tuple[str, Variant, dict[str, Any]]] = {
    "mixtral": ("llama", MOE_VARIANTS["mixtral"], {"expert_count": 5, "expert_used_count": 2, "rope.freq_base": 1_000_000.0}),
    "qwen2moe": (
        "qwen2moe",
        dataclasses.replace(
            MOE_VARIANTS["qwen2_moe"], options=MOE_VARIANTS["qwen2_moe"].options | {"norm_topk_prob": False}
        ),
        EXPERTS | {"expert_shared_feed_forward_length": 28},
    ),
    "qwen3moe": ("qwen3moe", MOE_VARIANTS["qwen3_moe"], EXPERTS),
}  # fmt: skip


def as_converted(name: str, tensor: torch.Tensor) -> dict[str, np.ndarray]:
    """A tensor of transformers as the converter meets it: matrices of experts each in a tensor, the shared expert's gate a vector."""
    array = tensor.numpy()
    if name.endswith("experts.gate_up_proj"):
        gate, up = np.split(array, 2, axis=1)
        stem = name.removesuffix("gate_up_proj")
        return {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
    if name.endswith("experts.down_proj"):
        return {f"{name}.weight": array}
    return {name: array[0] if name.endswith("shared_expert_gate.weight") else array}


def write_gguf(path: pathlib.Path, arch: str, model: Any, more: dict[str, Any]) -> None:
    """What convert_hf_to_gguf.py does with these families: names, Llama's row order, Gemma's norms plus one."""
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, arch)
    numbers: dict[str, Any] = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads, "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_size, "attention.value_length": head_size, "rope.freq_base": 10_000.0,
    }  # fmt: skip
    for key, value in (numbers | more).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{arch}.{key}", value)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        arrays |= as_converted(name, tensor)
    for name, array in arrays.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if arch == "llama" and heads:
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        own_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own_name is not None, name
        writer.add_tensor(own_name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_architecture_is_compared() -> None:
    assert {*MODELS, *(arch for arch, _, _ in WITH_EXPERTS.values())} == set(GGUF_FAMILIES)


@pytest.mark.parametrize("name", [*MODELS, *WITH_EXPERTS])
def test_logits_of_a_gguf_file_equal_transformers(name: str, tmp_path: pathlib.Path) -> None:
    arch, variant, more = WITH_EXPERTS[name] if name in WITH_EXPERTS else (name, *MODELS[name])
    write_gguf(tmp_path / "m.gguf", arch, variant.reference, more)
    prompt = np.random.default_rng(1).integers(0, VOCAB, 37)
    with torch.no_grad():
        expected = variant.reference(torch.tensor(prompt)[None]).logits[0].numpy()
    found = PagedModel(tmp_path / "m.gguf", scan=True).logits(prompt, [37])
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
