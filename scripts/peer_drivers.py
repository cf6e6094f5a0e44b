"""Runs one engine under its own interpreter for bench_peers.py: loads it, then answers one JSON line with another until stdin ends.

1. In: {"rows", "input_len", "output_len", "seed"}. Out: {"elapsed_s", "answers"}, answers being a checksum of each row's tokens.
2. Every engine gets the same random ids, float32 weights and arithmetic, greedy sampling, no end of sequence, no prefix cache.
3. Only the engine's own packages are needed; they are imported when their driver is chosen.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import pathlib
import random
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

from bench_serving import random_prompt

Generate = Callable[[list[list[int]], int], list[list[int]]]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a driver is told at its start.

    Args:
      hf_dir: safetensors, config and tokenizer.
      openvino_dir, gguf: the same model as OpenVINO IR and as GGUF, for the engines that read no safetensors.
      model: what jaxserve is to load.
    """

    model: str
    hf_dir: str
    openvino_dir: str
    gguf: str
    binary: str
    threads: int
    vocab: int
    max_rows: int
    max_len: int


def load_jaxserve(setup: Setup) -> Generate:
    """This project's engine, from the tree that this file lies in."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    jaxserve: Any = importlib.import_module("jaxserve")
    engine = jaxserve.LLM(setup.model, dtype="float32", max_rows=setup.max_rows, max_len=setup.max_len, prefix_cache=False)

    def generate(prompts: list[list[int]], output_len: int) -> list[list[int]]:
        params = jaxserve.SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        return [list(result.outputs[0].token_ids) for result in engine.generate(prompts, params, use_tqdm=False)]

    return generate


def load_vllm(setup: Setup) -> Generate:
    """vLLM, in this process, its own defaults otherwise (torch.compile included)."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "WARNING"}
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
    vllm: Any = importlib.import_module("vllm")
    engine = vllm.LLM(
        model=setup.hf_dir, dtype="float32", max_model_len=setup.max_len, max_num_seqs=setup.max_rows, enable_prefix_caching=False
    )

    def generate(prompts: list[list[int]], output_len: int) -> list[list[int]]:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        results = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]

    return generate


def load_transformers(setup: Setup) -> Generate:
    """transformers' generate on one batch without padding."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(setup.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(setup.hf_dir, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], output_len: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, max_new_tokens=output_len, **options)[:, ids.shape[1] :].tolist()

    return generate


def load_openvino(setup: Setup) -> Generate:
    """OpenVINO GenAI with continuous batching; float32 arithmetic and cache asked for, since some CPUs default to less."""
    genai: Any = importlib.import_module("openvino_genai")
    openvino: Any = importlib.import_module("openvino")
    numpy: Any = importlib.import_module("numpy")
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs, scheduler.enable_prefix_caching = 2, setup.max_rows, False
    precision = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": setup.threads}
    engine = genai.ContinuousBatchingPipeline(setup.openvino_dir, scheduler, "CPU", precision)

    def generate(prompts: list[list[int]], output_len: int) -> list[list[int]]:
        config = genai.GenerationConfig(max_new_tokens=output_len, ignore_eos=True, do_sample=False)
        tensors = [openvino.Tensor(numpy.array([ids], dtype=numpy.int64)) for ids in prompts]
        return [list(result.m_generation_ids[0]) for result in engine.generate(tensors, [config] * len(tensors))]

    return generate


def time_llama_cpp(setup: Setup, rows: int, input_len: int, output_len: int) -> float:
    """Seconds that llama.cpp's own llama-batched-bench needs for as many steps (random ids of its own); loading is not counted."""
    flags = {"-m": setup.gguf, "-npp": input_len, "-ntg": max(output_len - 1, 1), "-npl": rows, "-c": rows * (input_len + output_len)}
    flags |= {"-t": setup.threads, "-tb": setup.threads, "-b": 2048, "-ub": 512, "--output-format": "jsonl", "-ctk": "f32", "-ctv": "f32"}
    command = [setup.binary, *(str(part) for pair in flags.items() for part in pair)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures = next(json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    return figures["t_pp"] + (figures["t_tg"] if output_len > 1 else 0.0)


LOADERS: dict[str, Callable[[Setup], Generate]] = {
    "jaxserve": load_jaxserve,
    "vllm": load_vllm,
    "transformers": load_transformers,
    "openvino": load_openvino,
}
PACKAGES = {"jaxserve": "jax", "vllm": "vllm-cpu", "transformers": "transformers", "openvino": "openvino-genai"}


def run_point(name: str, setup: Setup, generate: Generate | None, rows: int, input_len: int, output_len: int, seed: str) -> dict[str, Any]:
    """Answer one line of the parent's."""
    if generate is None:
        return {"elapsed_s": time_llama_cpp(setup, rows, input_len, output_len), "answers": []}
    rng = random.Random(seed)
    prompts = [random_prompt(rng, input_len, setup.vocab) for _ in range(rows)]
    start_s = time.perf_counter()
    answers = generate(prompts, output_len)
    elapsed_s = time.perf_counter() - start_s
    lengths = [len(answer) for answer in answers]
    assert lengths == [output_len] * rows, f"{name}: {lengths=} but {output_len=} {rows=}"
    return {"elapsed_s": elapsed_s, "answers": [zlib.crc32(json.dumps([int(token) for token in answer]).encode()) for answer in answers]}


def main() -> None:
    """Load the engine that argv names and serve lines; stdout carries nothing but answers, whatever the engine prints."""
    name, setup = sys.argv[1], Setup(**json.loads(sys.argv[2]))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setup.threads])
    start_s = time.perf_counter()
    generate = LOADERS[name](setup) if name in LOADERS else None
    version = importlib.metadata.version(PACKAGES[name]) if name in PACKAGES else pathlib.Path(setup.binary).name
    print(json.dumps({"ready_s": round(time.perf_counter() - start_s, 1), "version": version}), file=replies)
    for line in sys.stdin:
        print(json.dumps(run_point(name, setup, generate, **json.loads(line))), file=replies)


if __name__ == "__main__":
    main()
