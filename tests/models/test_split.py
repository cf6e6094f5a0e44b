"""Tiny models of every kind of layer, dealt out to fake CPU devices with real collectives: the logits are those of one device."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.models.moe_variants import MOE_VARIANTS
from tests.models.variants import VARIANTS, VOCAB

DENSE = ((1, 2), (1, 4), (1, 8))  # devices along expert and tensor
SPLITS: dict[str, tuple[tuple[int, int], ...]] = {
    "llama, gqa": DENSE,  # 2 KV heads
    "llama, mqa, biases, wide heads": ((1, 8),),
    "mpt": DENSE,  # ALiBi, 6 heads: some devices have padding
    "qwen3": ((1, 4),),  # norms of each head
    "gemma3": ((1, 4),),
    "gpt2": ((1, 8),),
    "opt, like 350m": ((1, 4),),
    "falcon, new": ((1, 2),),
    "stablelm, parallel, norms of heads": ((1, 4),),
    "mixtral": (*DENSE, (4, 2), (8, 1)),
    "gpt_oss": ((1, 4), (2, 2)),  # sinks, biases of experts
    "deepseek_v3": (*DENSE, (2, 2)),
    "llama4": ((2, 2),),
}


@pytest.mark.slow
def test_logits_and_tokens_are_the_same_on_many_devices() -> None:
    """One test, as one process computes all of it: test workers that share the cases would each start one."""
    both = VARIANTS | MOE_VARIANTS
    models = {
        name: {"path": str(both[name].path), "max_len": both[name].max_len, "vocab_size": VOCAB, "splits": splits}
        for name, splits in SPLITS.items()
    }
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.split_worker"], input=json.dumps(models), text=True, env=environment, capture_output=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: (errors, others) for name, errors, others in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == SPLITS.keys()
    assert {name: result for name, result in found.items() if max(result[0]) > 2e-5 or result[1]} == {}


def test_documented_table_is_the_one_that_is_tested() -> None:
    page = (pathlib.Path(__file__).parents[2] / "docs" / "parallelism.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    documented = {row[0]: row[1] for row in rows if row[0] in SPLITS}
    assert documented == {name: ", ".join(f"{expert}x{tensor}" for expert, tensor in splits) for name, splits in SPLITS.items()}
