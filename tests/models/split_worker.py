"""Runs tiny models on fake CPU devices, in a process of its own: jax takes their number from the environment, once.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.models.split_worker < {"name": {"path": ..., "splits": [[1, 8]]}}

Prints one JSON line a model: for each split (expert, tensor) how far its logits are from those on one device, over the largest; and how
many tokens would be others.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np

from jaxserve.sharding import WHOLE, Split
from tests.models.paged import PagedModel

CUTS = [20, 1, 1, 15]

if __name__ == "__main__":
    for name, model in json.load(sys.stdin).items():
        prompt = np.random.default_rng(1).integers(0, model["vocab_size"], sum(CUTS))
        path = pathlib.Path(model["path"])
        expected = PagedModel(path, scan=True, max_len=model["max_len"]).logits(prompt, CUTS)
        errors, others = [], 0
        for expert, tensor in model["splits"]:
            split = Split(expert=expert, tensor=tensor)
            assert split != WHOLE, name
            found = PagedModel(path, scan=True, max_len=model["max_len"], split=split).logits(prompt, CUTS)
            errors.append(float(np.abs(found - expected).max() / np.abs(expected).max()))
            others += int((found.argmax(-1) != expected.argmax(-1)).sum())
        print(json.dumps([name, errors, others]), flush=True)
