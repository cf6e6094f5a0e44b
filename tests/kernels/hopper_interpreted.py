"""Runs cases of the Hopper kernel in jax's interpreter for Mosaic GPU: python -m tests.kernels.hopper_interpreted CASE

A process of its own: each of the kernel's three warpgroups takes a thread of XLA's and may wait in it for the others, so that there need to
be more of these threads than a machine has cores.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # before jax is imported
    os.environ["NPROC"] = "8"

import dataclasses
import json
import sys
import threading
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels.ragged_paged_attention import gpu, hopper, reference
from pallas_kernels.ragged_paged_attention.cases import FEATURES, Case, make_inputs, pad_inputs

ARRAYS = ("q", "k", "v", "pages")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A case with features; T and S as in pad_inputs."""

    case: Case
    feature: str = "plain"
    T: int = 0
    S: int = 0


PROMPT = Case(name="prompt", rows=((170, 1001),), num_heads=2, num_kv_heads=1, head_size=64, page_size=16, padding=9)
MIXED = Case(
    name="mixed", rows=((70, 90), (1, 64), (0, 0), (5, 261), (1, 8)), num_heads=1, num_kv_heads=1, head_size=64, page_size=32, padding=3
)


def random_run(seed: int) -> Run:
    """Five rows of any length, some of them empty or decodes, with every feature."""
    rng = np.random.default_rng(seed)
    counts = rng.choice([0, 1, 3, 20, 140], 5)
    rows = tuple((int(count), int(count + (count > 0) * rng.integers(0, 300))) for count in counts)
    case = Case(name="random", rows=rows, num_heads=1, num_kv_heads=1, head_size=64, page_size=int(2 ** rng.integers(3, 9)))
    return Run(case=dataclasses.replace(case, padding=int(rng.integers(0, 20))), feature="all")


RUNS = {
    "a prompt, more blocks than buffers, two heads on one": Run(case=PROMPT),
    "a prompt, every feature": Run(case=PROMPT, feature="all"),
    "a prompt, wide window": Run(case=PROMPT, feature="wide window"),
    "a prompt, not causal": Run(case=PROMPT, feature="not causal"),
    "a prompt, not causal, window": Run(case=PROMPT, feature="not causal, window"),
    "mixed rows, one of them empty": Run(case=MIXED),
    "mixed rows, sinks": Run(case=MIXED, feature="sinks"),
    "heads of 128, pages of 256": Run(
        case=Case(name="large", rows=((9, 300), (140, 140)), num_heads=1, num_kv_heads=1, head_size=128, page_size=256)
    ),
    "pages of 8": Run(case=Case(name="small", rows=((30, 41),), num_heads=1, num_kv_heads=1, head_size=64, page_size=8)),
    **{f"random rows {seed}": random_run(seed) for seed in range(4)},
}


def inputs_of(run: Run) -> dict[str, Any]:
    """In bfloat16, with what must not be read where it hurts: pages outside the window are none."""
    inputs = pad_inputs(make_inputs(run.case, FEATURES[run.feature]), T=run.T, S=run.S)
    if "window" in inputs and inputs.get("causal", True):
        for row, (count, length) in enumerate(run.case.rows):
            for page in range(max(length - count + 1 - inputs["window"], 0) // run.case.page_size):
                inputs["page_table"][row, page] = 10**6
    return inputs | {name: jnp.asarray(inputs[name], jnp.bfloat16) for name in ARRAYS}


def call(function: Any, inputs: dict[str, Any]) -> np.ndarray:
    """The output, in float32."""
    arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray | jax.Array | np.generic)}
    static = {name: value for name, value in inputs.items() if name not in arrays}

    @jax.jit
    def jitted(arrays: dict[str, Any]) -> jax.Array:
        first = [arrays[name] for name in (*ARRAYS, "layer")]
        return function(*first, **{name: arrays[name] for name in arrays if name not in (*ARRAYS, "layer")}, **static)[0]

    return np.asarray(jitted(arrays), np.float32)


def interpret(inputs: dict[str, Any]) -> np.ndarray:
    """The same from the kernel; raises if its warpgroups race."""
    pages = inputs["pages"]
    R, num_pages, page_size, heads, H = pages.shape
    assert hopper.cache_shape(R, num_pages, page_size, heads // 2, H) == gpu.cache_shape(R, num_pages, page_size, heads // 2, H)
    out = call(hopper.ragged_paged_attention, inputs | {"pages": pages.transpose(0, 1, 3, 2, 4)})
    assert not interpret_pallas_call.get_races().races_found, "warpgroups race"
    return out


def main() -> None:
    """Print what is wrong with a case, as JSON: the largest difference from the reference, and whether each row is the same alone."""
    share_compiled_warpgroups()
    run = RUNS[sys.argv[1]]
    inputs = inputs_of(run)
    expected = call(
        reference.ragged_paged_attention, inputs | {"page_table": np.minimum(inputs["page_table"], inputs["pages"].shape[1] - 1)}
    )
    out = interpret(inputs)
    print(json.dumps({"worst": float(np.max(np.abs(out - expected))), "alone": alone(run, inputs, out)}))


def alone(run: Run, inputs: dict[str, Any], out: np.ndarray) -> bool:
    """Whether the first long row has the same bits without the others, and elsewhere in its tiles."""
    s = max(range(len(run.case.rows)), key=lambda s: run.case.rows[s][0])
    count, length = run.case.rows[s]
    first = inputs["query_start"][s]
    tokens = {name: inputs[name][first : first + count] for name in ("q", "k", "v")}
    shifted = {name: jnp.concatenate([x[:5], x, x[:3]]) for name, x in tokens.items()}  # five tokens before it, in a row of their own
    rows = {
        "page_table": np.concatenate([np.zeros_like(inputs["page_table"][:1]), inputs["page_table"][s : s + 1]]),
        "query_start": np.array([0, 5, 5 + count], np.int32), "kv_len": np.array([5, length], np.int32),
    }  # fmt: skip
    return bool(np.array_equal(interpret(inputs | shifted | rows)[5 : 5 + count], out[first : first + count]))


def share_compiled_warpgroups() -> None:
    """Compile what the interpreter runs once for all threads and programs, not once for each of both."""
    compiled: dict[int, Any] = {}
    lock = threading.Lock()

    def run_jaxpr(jaxpr: Any, consts: Any, *args: Any) -> None:
        with lock:
            if id(jaxpr) not in compiled:
                program = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args) and None)
                options: dict[str, Any] = {"xla_backend_optimization_level": 0}
                compiled[id(jaxpr)] = jaxpr, program.trace(consts, *args).lower().compile(compiler_options=options)
        jax.block_until_ready(compiled[id(jaxpr)][1](consts, *args))

    thread_map._run_jaxpr = run_jaxpr


if __name__ == "__main__":
    main()
