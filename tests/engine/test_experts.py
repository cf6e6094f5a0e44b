"""Models with experts, latent attention and chunks on the whole engine: greedy tokens are those of transformers, whatever the settings."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch

from jaxserve import LLM, SamplingParams
from tests.models.moe_variants import MOE_VARIANTS
from tests.models.variants import Variant
from tests.tiny import EOS, VOCAB, save_tokenizer

SHAPES = {"max_rows": 3, "max_step_tokens": 24, "decode_rows": (3,), "prefill_tokens": (24,), "cache_bytes": 1 << 20, "page_size": 8}
# Short chunks, preemption, and prompts that share pages.
HARD: dict[str, Any] = {"max_step_tokens": 5, "prefill_tokens": (5,), "num_pages": 14, "cache_bytes": None}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "shared expert": ("qwen2_moe", HARD),
    "sinks and windows": ("gpt_oss", HARD),
    "latent attention": ("deepseek_v3", HARD),
    "latent attention, whole prompts, scan": ("deepseek_v3", {"layer_loop": "scan", "prefix_cache": False}),
    "chunked attention": ("llama4", HARD),
}
PREFIX = list(range(40, 75))
PROMPTS = [[*PREFIX, 7, 8], [*PREFIX, 9], [5], list(range(100, 122)), [*PREFIX, 7, 8, 11, 12]]
ANSWER_LEN = 12


@functools.cache
def model(name: str) -> Variant:
    """The variant with the tokenizer's vocabulary."""
    found = MOE_VARIANTS[name]
    return dataclasses.replace(found, options=found.options | {"vocab_size": VOCAB})


def greedy(name: str, prompt: list[int], answer: list[int]) -> list[int]:
    """The likeliest token after the prompt and each beginning of the answer: the answer itself if it is greedy.

    One pass over the whole, as a model that is causal needs no pass a token; a test would be luck if the best two tokens were close.
    """
    with torch.no_grad():
        logits = model(name).reference(torch.tensor([*prompt, *answer[:-1]])[None]).logits[0, len(prompt) - 1 :].numpy()
    second, best = np.sort(logits, axis=-1)[:, -2:].T
    assert (best - second > 1e-3).all(), f"{name=} {prompt=} {answer=}"
    return logits.argmax(-1).tolist()


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers(case: str) -> None:
    name, options = CASES[case]
    path = model(name).path
    if not (path / "tokenizer.json").exists():
        save_tokenizer(path, eos=EOS, chat_template=None)
    llm = LLM(str(path), **{**SHAPES, **options})
    params = SamplingParams(temperature=0, max_tokens=ANSWER_LEN, ignore_eos=True)
    answers: list[list[list[int]]] = []
    for _ in range(2):  # the second time from a warm cache
        results = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
        answers.append([list(result.outputs[0].token_ids) for result in results])
    assert [len(answer) for answer in answers[0]] == [ANSWER_LEN] * len(PROMPTS)
    assert answers[0] == answers[1] == [greedy(name, *texts) for texts in zip(PROMPTS, answers[0], strict=True)]
