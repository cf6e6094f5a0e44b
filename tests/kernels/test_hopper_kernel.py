"""The Hopper kernel of ragged paged attention: interpreted against the reference, compiled for an H200, and its plan."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import tuning
from pallas_kernels.ragged_paged_attention import gpu, gpu_plan, hopper, hopper_kernel
from tests.kernels import aot, hopper_interpreted
from tests.kernels.gpu_plans import plan_for

Shape = jax.ShapeDtypeStruct
HOPPER = tuning.GpuLimits(name="nvidia_h200", shared_bytes=227 * tuning.KIB, converts_float8=True, is_hopper=True)

DEFAULT = ("a prompt, every feature", "mixed rows, one of them empty")  # these and the others with --all


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in hopper_interpreted.RUNS]
)
def test_kernel_equals_reference_without_races(name: str) -> None:
    """And has the same bits for a row in company and alone; page ids outside the window are those of no page."""
    command = [sys.executable, "-m", "tests.kernels.hopper_interpreted", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["worst"] < 0.02  # weights are rounded to 8 bits before they meet values up to 3
    assert found["alone"]


# --- compiled


CALLS: dict[str, dict[str, Any]] = {
    "llama 8B": {},
    "llama 8B, every feature": {"features": {"alibi_slopes": (32,), "sinks": (32,), "window": ()}, "softcap": 30.0},
    "mpt 7B": {"K": 32, "features": {"alibi_slopes": (32,)}},
    "falcon 7B: 71 heads on one, size 64": {"N": 71, "K": 1, "H": 64},
    "not causal": {"causal": False},
    "pages of 256": {"page_size": 256, "num_pages": 512},
    "pages of 8, float16": {"page_size": 8, "dtype": jnp.float16},
    "a row of 8192 tokens beside 255 decodes": {"T": 8448, "S": 256, "P": 1024},
    "cache of 24 GB": {"num_pages": 90_000},
}


@pytest.mark.aot
@pytest.mark.parametrize("name", CALLS)
def test_kernel_compiles_in_place(name: str) -> None:
    call = {"T": 512, "S": 64, "P": 512, "N": 32, "K": 8, "H": 128, "page_size": 16, "num_pages": 8192, "dtype": jnp.bfloat16} | CALLS[name]
    T, S, P, N, K, H, page_size, num_pages, dtype = (call.pop(name) for name in list(call)[:9])
    features = {name: Shape(shape, jnp.float32 if shape else jnp.int32) for name, shape in call.pop("features", {}).items()}

    def step(x: Any, w: Any, pages: Any, batch: Any, features: Any) -> Any:
        for layer in range(2):
            q, k, v = (jnp.einsum("td,dnh->tnh", x, w[name]) for name in "qkv")
            out, pages = hopper.ragged_paged_attention(q, k, v, pages, layer, **batch, **features, **call, sm_scale=0.1)
            x = x + jnp.einsum("tnh,dnh->td", out, w["q"])
        return x, pages

    D = 512
    weights = {name: Shape((D, heads, H), dtype) for name, heads in (("q", N), ("k", K), ("v", K))}
    cache = Shape(hopper.cache_shape(4, num_pages, page_size, K, H), dtype)
    compiled = aot.compile_for(
        aot.mesh_for("sm_90"), step, (Shape((T, D), dtype), weights, cache, aot.batch_of(S, P), features), donate=(2,)
    )
    partial = min(T, 4 * S) * 64 * N * (H + 2) * 4  # of the rows that split their context
    aot.check_in_place(compiled, [cache], temporaries=2 * partial + 16 * T * N * H * 2 + tuning.MIB)
    assert "prefill_hopper" in aot.text_of(compiled)


# --- the plan


def hopper_plan(**changed: Any) -> gpu_plan.Plan:
    return plan_for(**{"T": 2048, "S": 16, "limits": HOPPER, "mosaic": True} | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"limits": tuning.SMALLEST_GPU}, "is for Hopper"),
        ({"dtypes": ("bfloat16", "int8")}, "cache of int8"),
        ({"dtypes": ("float32", "float32")}, "queries of float32"),
        ({"H": 80}, "head size 80"),
        ({"value_size": 64}, "values of 64"),
        ({"page_size": 4}, "pages of 4"),
        ({"page_size": 24}, "pages of 24"),
    ],
)
def test_kernel_refuses_with_a_reason(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        hopper_plan(**changed)


def test_engine_takes_it_where_it_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def tuned(device: str, op: str, key: str) -> dict[str, int] | None:
        return {"mosaic": 1, "stages": 3, "context": 64} if key == "prefill bfloat16/bfloat16 K2 G4 H128 page16" else None

    assert not hopper_plan(mosaic=False).prefill.mosaic
    monkeypatch.setattr(tuning, "tuned", tuned)
    found = hopper_plan(mosaic=False).prefill
    assert (found.mosaic, found.stages, found.context, found.rows, found.heads) == (True, 3, 64, 128, 1)
    assert not hopper_plan(mosaic=False, page_size=32).prefill.mosaic
    assert not hopper_plan(mosaic=False, value_size=64).prefill.mosaic  # a key of its own
    assert hopper_plan(page_size=32).prefill.stages == 2  # asked for by name, and not measured


def test_no_warpgroup_waits_for_registers_that_nobody_gives_up() -> None:
    warpgroups = hopper_kernel.COMPUTERS + 1
    at_launch = 65_536 // (128 * warpgroups) // 8 * 8  # of each thread: equal shares of the multiprocessor's, multiples of 8
    asked = hopper_kernel.COMPUTERS * hopper_kernel.COMPUTER_REGISTERS + hopper_kernel.LOADER_REGISTERS
    assert asked <= warpgroups * at_launch
    assert hopper_kernel.COMPUTER_REGISTERS % 8 == hopper_kernel.LOADER_REGISTERS % 8 == 0


def test_buffers_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "tuned", lambda *_: {"mosaic": 1, "stages": 3, "context": 128})
    with pytest.raises(NotImplementedError, match="3 buffers of 128 keys"):
        hopper_plan(mosaic=False)
    assert hopper_plan(mosaic=False, H=64).prefill.stages == 3


@given(st.lists(st.integers(0, 300), min_size=5, max_size=5), st.integers(0, 40))
def test_tiles_begin_aligned_and_cover_every_long_row_and_the_padding_once(counts: list[int], padding: int) -> None:
    query_start = np.cumsum([0, *counts]).astype(np.int32)
    plan = hopper_plan(T=max(int(query_start[-1]) + padding, 1), S=5)
    row, start, end = (np.asarray(x) for x in gpu._prefill_blocks(plan, jnp.asarray(query_start)))
    begins = np.append(query_start[:-1], query_start[-1])  # of each row; the padding is the last one
    covered = [t for s, a, b in zip(row, start, end, strict=True) for t in range(max(a, begins[s]), min(a + 128, b))]
    long = [t for s, count in enumerate(counts) if count > plan.short_tokens for t in range(query_start[s], query_start[s + 1])]
    assert sorted(covered) == [*long, *range(query_start[-1], plan.num_tokens)]
    assert not np.any(start[end > 0] % gpu_plan.TILE_ALIGNMENT)
