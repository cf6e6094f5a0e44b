"""What loading costs in memory beside the parameters, measured on a checkpoint of many times that size."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "bench_loading.py"


def test_memory_beside_the_parameters_is_below_a_few_tensors_when_loading() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--megabytes", "200", "--repeats", "1"], capture_output=True, text=True, check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["above_parameters_mb"] <= found["allowed_mb"] < found["megabytes"] / 4, found
    assert found["load_mb_s"] > 0 and found["plain_mb_s"] > 0, found
