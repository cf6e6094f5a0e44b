"""The GPU kernels of attention over the compressed cache, interpreted, against the reference; their plan; and the GPU compiler."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from pallas_kernels.mla_attention import gpu, gpu_plan, mla_attention
from pallas_kernels.mla_attention.cases import Case, make_inputs
from tests.kernels import aot
from tests.kernels.test_mla_attention import (
    BATCH_NAMES,
    BATCHES,
    DECODES,
    MIXED,
    POSITIONAL,
    TARGETS,
    Compiled,
    compiled,
    jitted,
    run,
    with_idle_rows,
)

Shape = jax.ShapeDtypeStruct
SMALL = {"context": 16, "split": 32, "rows": 16}  # every case has several tiles and splits
TELLING = (
    ("decodes over several splits", DECODES, {"one_token_rows": True}, SMALL),
    ("mixed batch over several tiles and splits, padding", MIXED, {}, SMALL),
    ("not causal, two tiles of heads", Case(name="heads", rows=((1, 40), (6, 9)), num_heads=20, latent_size=48), {"causal": False}, {}),
)


def use_blocks(monkeypatch: pytest.MonkeyPatch, blocks: dict[str, int]) -> None:
    """Block sizes as if tuned; rows only apply to prefill and split only to decode."""
    jitted.cache_clear()

    def tuned(device: str, op: str, key: str) -> dict[str, int]:
        unwanted = "rows" if key.startswith("decode") else "split"
        return {name: size for name, size in blocks.items() if name != unwanted}

    monkeypatch.setattr(tuning, "tuned", tuned)


@pytest.mark.parametrize(("case", "static", "blocks"), [path[1:] for path in TELLING], ids=[path[0] for path in TELLING])
def test_kernels_equal_reference(case: Case, static: dict[str, Any], blocks: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    use_blocks(monkeypatch, blocks)
    inputs = make_inputs(case) | static
    if "one_token_rows" in static:
        inputs = with_idle_rows(inputs)
    expected, expected_pages = run("reference", inputs)
    out, pages = run("gpu", inputs)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)  # float32, sums in another order
    np.testing.assert_array_equal(pages, expected_pages)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "causal"), BATCHES, ids=BATCH_NAMES)
def test_kernels_equal_reference_on_every_case(case: Case, causal: bool) -> None:
    inputs = make_inputs(case) | {"causal": causal}
    expected, expected_pages = run("reference", inputs)
    out, pages = run("gpu", inputs)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)
    np.testing.assert_array_equal(pages, expected_pages)


def test_kernels_stay_within_bfloat16s_rounding() -> None:
    """At DeepSeek's sizes of latent and rope key, which are powers of two apart and not together."""
    case = Case(name="bf16", rows=((6, 29), (1, 140)), num_heads=16, latent_size=512, rope_size=64, page_size=16, padding=1)
    inputs = make_inputs(case) | {"sm_scale": 0.05}
    inputs |= {name: jnp.asarray(inputs[name], jnp.bfloat16) for name in ("q_latent", "q_rope", "latent", "rope_key", "pages")}
    expected, expected_pages = run("reference", inputs)
    out, pages = run("gpu", inputs)
    np.testing.assert_allclose(out, expected, atol=0.02)  # weights are rounded to 8 bits before they meet values up to 3
    np.testing.assert_array_equal(pages, expected_pages)


def test_a_row_is_the_same_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, for decodes over one split and over many and for a prompt, whatever other rows, tokens and pages there are."""
    use_blocks(monkeypatch, SMALL)
    rows = ((1, 300), (1, 5), (20, 90))
    inputs = make_inputs(Case(name="company", rows=rows, padding=2))
    together, _ = run("gpu", inputs)
    for s, (count, length) in enumerate(rows):
        first = inputs["query_start"][s]
        alone: dict[str, Any] = {name: inputs[name][first : first + count] for name in ("q_latent", "q_rope", "latent", "rope_key")}
        alone = {name: np.pad(x, [(0, 21 - count), *[(0, 0)] * (x.ndim - 1)], constant_values=np.nan) for name, x in alone.items()}
        alone |= {"page_table": inputs["page_table"][s : s + 1], "kv_len": np.array([length], np.int32)}
        out, _ = run("gpu", inputs | alone | {"query_start": np.array([0, count], np.int32)})
        np.testing.assert_array_equal(out[:count], together[first : first + count])


def plan_for(
    *, T: int = 64, S: int = 8, N: int = 16, C: int = 512, Hr: int = 64, P: int = 64, num_pages: int = 99,
    dtype: str = "bfloat16", shared_kib: int = 99,
) -> gpu_plan.Plan:  # fmt: skip
    limits = dataclasses.replace(tuning.SMALLEST_GPU, shared_bytes=shared_kib * tuning.KIB)
    arrays: list[Any] = [Shape((T, N, C), jnp.bfloat16), Shape((1, num_pages, 16, C + Hr), dtype), Shape((S, P), jnp.int32)]
    return gpu_plan.make_plan(*arrays, sm_scale=1.0, causal=True, one_token_rows=False, limits=limits)


@pytest.mark.parametrize("num_heads", [1, 5, 16, 20, 128])
def test_plan_fits_shared_memory_and_depends_on_no_bucket(num_heads: int) -> None:
    for shared_kib in (99, 163, 227):
        buckets = (8, 8, 16), (64, 8, 512), (2048, 256, 8192)
        plans = [plan_for(T=T, S=S, P=P, N=num_heads, shared_kib=shared_kib) for T, S, P in buckets]
        assert len({(p.decode, p.prefill, p.least_split, p.max_splits, p.short_tokens) for p in plans}) == 1
        for blocks in (plans[0].decode, plans[0].prefill):
            buffers = (blocks.stages - 1) // 2 + 1
            assert (buffers * blocks.context + blocks.rows) * 576 * 2 <= shared_kib * tuning.KIB
            assert blocks.rows % 16 == 0 and blocks.context % 16 == 0  # products on tensor cores
        assert plans[0].max_splits * num_heads * 512 * 4 <= 2 * tuning.MIB


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "float16"}, "cache of float16"),
        ({"dtype": "float32"}, "cache of float32: needs bfloat16"),
        ({"C": 1024}, "latents of 1024"),
        ({"Hr": 192}, "rope keys of 192"),
        ({"num_pages": 1 << 27}, "below 2 \\*\\* 31"),
    ],
)
def test_kernels_refuse_with_a_reason(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        plan_for(**changed)


@pytest.mark.parametrize(("dtype", "kernels"), [(jnp.float32, True), (jnp.float16, False)])
def test_gpus_run_the_kernels_and_what_they_refuse_in_plain_xla(dtype: Any, kernels: bool) -> None:
    inputs = make_inputs(Case(name="refused", rows=((4, 4),)))
    inputs["pages"] = inputs["pages"].astype(dtype)
    positional = [inputs.pop(name) for name in POSITIONAL]
    arrays = {name: x for name, x in inputs.items() if name != "sm_scale"}

    def call(positional: list[Any], arrays: dict[str, Any]) -> Any:
        return mla_attention(*positional, **arrays, sm_scale=0.3, platform="cuda")

    assert ("pallas_call" in str(jax.make_jaxpr(call)(positional, arrays))) == kernels


# --- the compiler


@pytest.mark.aot
@pytest.mark.parametrize("call", [call for call in TARGETS if call.dtype == jnp.bfloat16], ids=lambda call: call.name)
@pytest.mark.parametrize("target", aot.GPUS)
def test_kernels_compile_in_place(target: str, call: Compiled) -> None:
    # Partial results, at most 2 MB a row with their maxima; queries and output put together; the new vectors.
    itemsize = jnp.dtype(call.dtype).itemsize
    temporaries = call.S * 2 * tuning.MIB * 514 // 512 + call.T * (call.N * (576 + 512) + 576) * itemsize + tuning.MIB
    aot.check_in_place(compiled(target, call, gpu), [call.cache], temporaries=temporaries)
