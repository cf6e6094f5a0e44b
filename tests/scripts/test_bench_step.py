"""What a decode step has to read, by the count of published sizes."""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
bench_step: Any = importlib.import_module("bench_step")


def values_of(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "configs" / "models" / f"{name}.json").read_text())


def test_step_reads_weights_once_and_contexts() -> None:
    options = {"dtype": "bfloat16", "max_len": 4096, "max_rows": 8}
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096 + 2 * 4096
    weights = 2 * (32 * layer + 4096 + 128256 * 4096)  # the embedding is looked up
    token = 2 * 32 * 2 * 8 * 128
    values = values_of("llama-3.1-8b")
    assert bench_step.step_bytes(values, options, 1, 1024) == weights + 1024 * token
    assert bench_step.step_bytes(values, options, 8, 4096) == weights + 8 * 4096 * token


def test_tied_embedding_is_read_as_the_head() -> None:
    options = {"dtype": "bfloat16", "max_len": 2048, "max_rows": 8}
    layer = 12 * 4096 * 4096 + 2 * 4096
    assert bench_step.step_bytes(values_of("mpt-7b"), options, 0, 0) == 2 * (32 * layer + 4096 + 50432 * 4096)
