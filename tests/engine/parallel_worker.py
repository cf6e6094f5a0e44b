"""Serves prompts on fake CPU devices, in a process of its own: jax takes their number from the environment, once.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.engine.parallel_worker < {"model": path, "runs": [options, ...]}

Prints one JSON line a run: what `serve_prompts` gives.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from jaxserve import LLM, SamplingParams, StructuredOutputs
from jaxserve.errors import ConfigError
from jaxserve.llm import ids_of
from tests.compiling import COMPILER_OPTIONS

SHAPES = {
    "max_rows": 4, "max_step_tokens": 16, "max_mixed_tokens": 8, "decode_rows": (4,), "prefill_tokens": (16,), "page_size": 8,
    "num_pages": 9, "max_len": 64,
}  # fmt: skip
CHEAP_TO_COMPILE = " ".join(f"--{name}={str(value).lower()}" for name, value in COMPILER_OPTIONS.items())
PREFIX = "the quick brown fox jumps over the lazy dog, words:"
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


def serve_prompts(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """What comes of the prompts on one mesh, and which ways of the scheduler they took.

    Returns: "refused", or the "tokens" of each answer, "logprobs" of those that want them, and whether something was "preempted", "chunked"
      and found in the "prefix cache", and whether it was all the same from a warm cache, and after an "abort".
    """
    try:
        llm = LLM(model, **{**SHAPES, **options})
    except ConfigError as error:
        return {"refused": str(error)}
    cold = llm.generate(PROMPTS, params(), use_tqdm=False)
    preempted = llm.metrics.preemptions._value.get()
    warm = llm.generate(PROMPTS[::-1], params()[::-1], use_tqdm=False)[::-1]
    tokens = [[list(result.outputs[0].token_ids) for result in results] for results in (cold, warm)]
    wanted = [*(cold[2].outputs[0].logprobs or ()), *(cold[4].prompt_logprobs or ())[1:]]
    logprobs = [[entry.logprob for entry in found.values()] for found in wanted if found is not None]
    return {
        "tokens": tokens[0],
        "logprobs": logprobs,
        "preempted": preempted > 0,
        "chunked": max(len(result.prompt_token_ids) for result in cold) > SHAPES["max_step_tokens"],
        "prefix cache": tokens[1] == tokens[0] and llm.metrics.prefix_hits._value.get() > 0,
        "abort": aborted(llm, tokens[0]),
    }


def aborted(llm: LLM, expected: list[list[int]]) -> bool:
    """Whether a request that is given up half way leaves the others as they were."""
    requests = [llm._admission.make_request(ids_of(llm._served, PROMPTS[i]), params()[i]) for i in (0, 1, 2)]
    for request in requests:
        llm._engine.add(request)
    found: dict[str, list[int]] = {request.id: [] for request in requests}
    while llm._engine.has_work:
        for output in llm._engine.step():
            found[output.id] += output.token_ids
        if 0 < len(found[requests[1].id]) < 5:
            llm._engine.abort(requests[1].id)
    lost = found.pop(requests[1].id)
    return list(found.values()) == [expected[0], expected[2]] and 0 < len(lost) < 14


def answers_on(num_devices: int, model: str, runs: list[dict[str, Any]]) -> list[Any]:
    """What `serve_prompts` gives for each of some options, in a process with so many devices."""
    flags = f"--xla_force_host_platform_device_count={num_devices} {CHEAP_TO_COMPILE}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps({"model": model, "runs": runs}), text=True, env=environment,
        capture_output=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    for run in asked["runs"]:
        print(json.dumps(serve_prompts(asked["model"], run)), flush=True)
