"""The default model, with its real weights, against transformers in float32. Fetched on first use, as `scripts/serve` would."""

from __future__ import annotations

import functools
import pathlib

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.weights.source import resolve_model
from tests.models.paged import logits_of

PARIS = [504, 3575, 282, 4649, 314, 7042, 30, 2]  # "The capital of France is Paris.<|im_end|>"
SUBJECTS = ["the sea", "bread", "a small town", "prime numbers", "winter", "the moon", "an old clock", "rivers", "music", "a lost key"]
FORMS = ["Write a short story about {}.", "Explain {} to a child.", "List three facts about {}:", "Once upon a time, {}"]


@functools.cache
def model_path() -> pathlib.Path:
    config = EngineConfig()
    return resolve_model(config.model.model, revision=None, cache_dir=config.cache_path)


@functools.cache
def reference() -> torch.nn.Module:
    path = model_path()
    source = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    return AutoModelForCausalLM.from_pretrained(path.parent if source else path, dtype=torch.float32, **source).eval()


def test_logits_equal_transformers() -> None:
    prompt = np.random.default_rng(0).integers(0, 49_000, 48)
    with torch.no_grad():
        expected = reference()(torch.tensor(prompt)[None]).logits[0].numpy()
    found = logits_of(model_path(), prompt, [32, 16], scan=True)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_forty_greedy_continuations_equal_transformers() -> None:
    llm = LLM(max_rows=20, max_len=128, max_step_tokens=128, decode_rows=(20,), prefill_tokens=(128,), cache_bytes=300 << 20)
    prompts = [form.format(subject) for form in FORMS for subject in SUBJECTS]
    greedy = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    found = llm.generate(prompts, greedy, use_tqdm=False)
    for length in sorted({len(result.prompt_token_ids) for result in found}):  # same lengths together: no padding in the reference
        group = [result for result in found if len(result.prompt_token_ids) == length]
        ids = torch.tensor([result.prompt_token_ids for result in group])
        with torch.no_grad():
            expected = reference().generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=2)[:, length:]
        assert [list(result.outputs[0].token_ids) for result in group] == expected.tolist()
    paris = llm.chat([{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    assert list(paris[0].outputs[0].token_ids) == PARIS


@pytest.fixture(autouse=True, scope="module")
def _free_models():  # type: ignore[no-untyped-def]
    yield
    reference.cache_clear()
