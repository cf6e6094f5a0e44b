"""Many devices, the same tokens: each family of layers, over meshes of fake CPU devices with real collectives."""

from __future__ import annotations

import functools
import pathlib
import tempfile
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.engine.parallel_worker import answers_on
from tests.tiny import EOS, VOCAB, save_tokenizer

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "max_position_embeddings": 64,
    "initializer_range": 0.4, "eos_token_id": 0, "bos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
LATENT = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "fewer KV heads than devices": ("LlamaConfig", SIZES | {"num_attention_heads": 6, "num_key_value_heads": 2}),
    "three KV heads, tied, biases": (
        "Qwen2Config", SIZES | {"num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "alibi": (
        "MptConfig", {"d_model": 48, "n_heads": 6, "n_layers": 2, "vocab_size": VOCAB, "max_seq_len": 64, "initializer_range": 0.4},
    ),
    "experts": ("MixtralConfig", SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2} | EXPERTS),
    "latent attention": (
        "DeepseekV3Config",
        SIZES | LATENT | {
            "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
            "moe_intermediate_size": 24, "first_k_dense_replace": 1,
        },
    ),
}  # fmt: skip
MESHES = {
    "fewer KV heads than devices": ("tensor=2", "tensor=4", "tensor=8", "data=2,tensor=2"),
    "three KV heads, tied, biases": ("tensor=2",),
    "alibi": ("tensor=2", "tensor=4", "tensor=8"),
    "experts": ("expert=2", "expert=2,tensor=2", "expert=2,tensor=4"),
    "latent attention": ("tensor=2", "tensor=4", "tensor=8"),
}
# Taken in every run, to the same end; but two copies have room for all requests.
WAYS = ("preempted", "chunked", "prefix cache", "abort")


@functools.cache
def model(name: str) -> pathlib.Path:
    kind, options = MODELS[name]
    directory = pathlib.Path(tempfile.mkdtemp(prefix="jaxserve-parallel-"))
    torch.manual_seed(3)
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases too
    made.save_pretrained(directory)
    save_tokenizer(directory, eos=EOS, chat_template=None)
    return directory


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_the_same_over_any_mesh(name: str) -> None:
    meshes = ("tensor=1", *MESHES[name])
    found = dict(zip(meshes, answers_on(8, str(model(name)), [{"mesh": mesh} for mesh in meshes]), strict=True))
    tokens, logprobs = found["tensor=1"]["tokens"], found["tensor=1"]["logprobs"]
    assert len({tuple(answer) for answer in tokens}) == 5, tokens
    for mesh, run in found.items():
        assert run["tokens"] == tokens, mesh
        assert [way for way in WAYS if not run[way] and (way, "data" in mesh) != ("preempted", True)] == [], mesh
        np.testing.assert_allclose(np.concatenate(run["logprobs"]), np.concatenate(logprobs), atol=2e-4, err_msg=mesh)


def test_documented_table_is_the_one_that_is_tested() -> None:
    page = (pathlib.Path(__file__).parents[2] / "docs" / "parallelism.md").read_text("utf-8")
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in page.splitlines()]
    assert {row[0]: row[1] for row in rows if row[0] in MESHES} == {name: "; ".join(meshes) for name, meshes in MESHES.items()}
