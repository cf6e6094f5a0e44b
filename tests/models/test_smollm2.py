"""The default model, with its real weights, against transformers in float32. Fetched on first use, as `scripts/serve` would."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.weights.checkpoint import open_checkpoint, read_config
from jaxserve.weights.source import resolve_model
from tests.models.paged import logits_of

# "The capital of France is Paris.<|im_end|>", computed with transformers 5.23.0 on weights dequantized by the gguf package.
PARIS = [504, 3575, 282, 4649, 314, 7042, 30, 2]
SUBJECTS = ["the sea", "bread", "a small town", "prime numbers", "winter", "the moon", "an old clock", "rivers", "music", "a lost key"]
FORMS = ["About {}, in short: a story", "Is {} a thing that", "{} and three facts about it", "Then {} was what they"]


@functools.cache
def model_path() -> pathlib.Path:
    config = EngineConfig()
    return resolve_model(config.model.model, revision=None, cache_dir=config.cache_path)


HF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk.": "model.layers.", "attn_norm": "input_layernorm",
    "attn_output": "self_attn.o_proj", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def hf_name(name: str) -> str:
    """transformers' name of a tensor of the file."""
    for old, new in HF_NAMES.items():
        name = name.replace(old, new)
    return name


@functools.cache
def reference() -> Any:
    """transformers' Llama with the weights that our reader finds; the golden ids below do not depend on our reader."""
    with open_checkpoint(model_path()) as checkpoint:
        weights = {hf_name(name): torch.from_numpy(np.array(checkpoint.read(name), np.float32)) for name in checkpoint.tensors}
    model = LlamaForCausalLM(LlamaConfig(**read_config(model_path()).values))
    model.load_state_dict(weights, strict=False)
    assert set(weights) == {name for name, _ in model.named_parameters()}
    return model.eval()


def test_logits_equal_transformers() -> None:
    prompt = np.random.default_rng(0).integers(0, 49_000, 48)
    with torch.no_grad():
        expected = reference()(torch.tensor(prompt)[None]).logits[0].numpy()
    found = logits_of(model_path(), prompt, [32, 16], scan=True)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_forty_greedy_continuations_equal_transformers() -> None:
    llm = LLM(max_rows=40, max_len=128, max_step_tokens=128, decode_rows=(40,), prefill_tokens=(128,), cache_bytes=300 << 20)
    texts = [form.format(subject) for form in FORMS for subject in SUBJECTS]
    prompts = [llm.tokenizer.encode(text, add_special_tokens=True)[:5] for text in texts]  # of one length: no padding in the reference
    greedy = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    found = llm.generate(prompts, greedy, use_tqdm=False)
    with torch.no_grad():
        expected = reference().generate(torch.tensor(prompts), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=2)[:, 5:]
    assert [list(result.outputs[0].token_ids) for result in found] == expected.tolist()
    paris = llm.chat(
        [{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0, max_tokens=20), use_tqdm=False
    )
    assert list(paris[0].outputs[0].token_ids) == PARIS


@pytest.fixture(autouse=True, scope="module")
def _free_models() -> Iterator[None]:
    yield
    reference.cache_clear()
