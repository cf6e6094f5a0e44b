"""Tiny models of every kind of layer, dealt out to fake CPU devices with real collectives: the logits are those of one device."""

from __future__ import annotations

import functools
import json
import os
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


@functools.cache
def errors() -> dict[str, list[float]]:
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
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLITS)
def test_logits_are_the_same_on_many_devices(name: str) -> None:
    assert max(errors()[name]) < 2e-5, dict(zip(SPLITS[name], errors()[name], strict=True))
