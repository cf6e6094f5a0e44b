"""The contract of determinism: a request's tokens are its own, whatever the engine's settings and whoever shares its steps."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams, StructuredOutputs
from tests.tiny import tiny_model

SHAPES = {
    "max_rows": 4,
    "max_step_tokens": 32,
    "max_mixed_tokens": 16,
    "decode_rows": (4,),
    "prefill_tokens": (32,),
    "cache_bytes": 1 << 20,
    "reasoning_parser": "qwen3",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "one row at a time": {"max_rows": 1},
    "other buckets": {"decode_rows": (1, 2, 3, 4), "prefill_tokens": (8, 24, 32)},
    "short chunks": {"max_step_tokens": 5, "prefill_tokens": (5,)},
    "prompts in steps of their own": {"max_mixed_tokens": 0},
    "no prefix cache": {"prefix_cache": False},
    "one sampler for all steps": {"max_rows": 20, "decode_rows": (20,)},
    "no overlap": {"overlap": False},
    "scan over layers": {"layer_loop": "scan"},
    "small pages": {"page_size": 4},
    "large pages": {"page_size": 64},
    "forced preemption": {"num_pages": 14, "page_size": 8, "cache_bytes": None},
}
PREFIX = "the quick brown fox jumps over the lazy dog, "
PROMPTS = [PREFIX + "a city", PREFIX + "a country", "日本語", "x", PREFIX * 3, "a capital of a country is", "text " * 9, PREFIX + "words:"]
PROMPTS += ["the lazy dog", PREFIX + "a b c", "over", PREFIX + "<think>"]


def params() -> list[SamplingParams]:
    common: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
    return [
        SamplingParams(temperature=0, **common),
        SamplingParams(temperature=0.9, seed=5, **common),
        SamplingParams(temperature=0, repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=0.2, **common),
        SamplingParams(temperature=1.2, top_k=30, top_p=0.9, min_p=0.01, seed=2**40 + 1, **common),
        SamplingParams(temperature=0, logit_bias={7: 3.0, 300: -50.0}, min_tokens=10, **common),
        SamplingParams(temperature=1.0, seed=9, frequency_penalty=1.0, logprobs=2, **common),
        SamplingParams(temperature=0, prompt_logprobs=1, **common),
        SamplingParams(temperature=1.0, seed=4, structured_outputs=StructuredOutputs(regex="[a-z ]*"), **common),
        SamplingParams(temperature=1.0, seed=6, bad_words=["e", "quick", "o"], logprob_token_ids=[5, 9], **common),
        SamplingParams(temperature=1.5, seed=7, allowed_token_ids=range(40, 120), bad_words=["ab"], **common),
        SamplingParams(
            temperature=1.0, seed=8, allowed_token_ids=range(1, 200), structured_outputs=StructuredOutputs(regex="[a-z ]*"), **common
        ),
        SamplingParams(temperature=1.0, seed=3, thinking_token_budget=9, **common),
    ]


def tokens_of(llm: LLM, indices: list[int]) -> list[tuple[int, ...]]:
    results = llm.generate([PROMPTS[i] for i in indices], [params()[i] for i in indices], use_tqdm=False)
    return [tuple(result.outputs[0].token_ids) for result in results]


@functools.cache
def alone() -> list[tuple[int, ...]]:
    llm = LLM(str(tiny_model()), **SHAPES)
    return [tokens_of(llm, [i])[0] for i in range(len(PROMPTS))]


@pytest.mark.parametrize("option", OPTIONS)
def test_tokens_are_the_same(option: str) -> None:
    llm = LLM(str(tiny_model()), **{**SHAPES, **OPTIONS[option]})
    everyone = list(range(len(PROMPTS)))
    assert tokens_of(llm, everyone) == alone()
    assert tokens_of(llm, everyone[::-1]) == alone()[::-1]  # and from a warm cache, in other company
    if option == "forced preemption":
        assert b"num_preemptions_total{" in llm.metrics.render()
        assert llm.metrics.preemptions._value.get() > 0


def test_all_answers_differ_enough_to_mean_something() -> None:
    assert len(set(alone())) == len(PROMPTS)
    assert all(len(tokens) == 24 for tokens in alone())
