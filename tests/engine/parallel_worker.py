"""Serves prompts on fake CPU devices, in a process of its own: jax takes their number from the environment, once.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.engine.parallel_worker < {"model": path, "runs": [options, ...]}

Prints one JSON line a run: the answers' token ids, or what was wrong with the options.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from jaxserve import LLM, SamplingParams, StructuredOutputs
from jaxserve.errors import ConfigError

SHAPES = {
    "max_rows": 4, "max_step_tokens": 16, "max_mixed_tokens": 8, "decode_rows": (4,), "prefill_tokens": (16,), "page_size": 8,
    "num_pages": 24, "max_len": 64,
}  # fmt: skip
PREFIX = "the quick brown fox jumps over"
PROMPTS = [PREFIX + " a city", PREFIX + " a country", "日本語", "x", "a capital of a country is"]


def params() -> list[SamplingParams]:
    """Greedy, random, penalized, constrained, with log-probabilities: one for each prompt."""
    common: dict[str, Any] = {"max_tokens": 14, "ignore_eos": True}
    return [
        SamplingParams(temperature=0, **common),
        SamplingParams(temperature=0.9, seed=5, top_k=30, top_p=0.9, **common),
        SamplingParams(temperature=0, repetition_penalty=1.4, frequency_penalty=0.3, logprobs=2, **common),
        SamplingParams(temperature=1.0, seed=4, structured_outputs=StructuredOutputs(regex="[a-z ]*"), **common),
        SamplingParams(temperature=0, prompt_logprobs=1, **common),
    ]


def answers(model: str, options: dict[str, Any]) -> Any:
    """Token ids of the answers, twice: with a cold cache, and with a warm one in another order."""
    try:
        llm = LLM(model, **{**SHAPES, **options})
    except ConfigError as error:
        return str(error)
    cold = llm.generate(PROMPTS, params(), use_tqdm=False)
    warm = llm.generate(PROMPTS[::-1], params()[::-1], use_tqdm=False)[::-1]
    tokens = [[list(result.outputs[0].token_ids) for result in results] for results in (cold, warm)]
    assert tokens[0] == tokens[1], tokens
    return tokens[0]


def answers_on(num_devices: int, model: str, runs: list[dict[str, Any]]) -> list[Any]:
    """What `answers` gives for each of some options, in a process with so many devices."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"}
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps({"model": model, "runs": runs}), text=True, env=environment,
        capture_output=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    for run in asked["runs"]:
        print(json.dumps(answers(asked["model"], run)), flush=True)
