"""The TPU kernel of ragged paged attention, interpreted, against the reference; and its plan."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.ragged_paged_attention import reference, tpu, tpu_plan
from pallas_kernels.ragged_paged_attention.cases import CASES, COMMON, FEATURES, Case, make_inputs, pad_inputs
from tests.compiling import COMPILER_OPTIONS

ARRAYS = ("q", "k", "v", "pages", "layer", "page_table", "query_start", "kv_len", "alibi_slopes", "sinks", "window")
BY_NAME = {case.name: case for case in CASES}
LONG, MIXED = CASES[5], CASES[6]
DECODES = Case(name="decodes, a row of one page, a long one", rows=((1, 5), (1, 300), (1, 17), (0, 0)), num_heads=8, page_size=16)
INTERPRET = pltpu.InterpretParams()
# Bytes move when a DMA starts: the default, when it is waited for, hides a wait that is missing.
RACES = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
# Compiling an interpreted kernel takes seconds, so each of these stands for a path of its own; the slow test below is the whole product.
TELLING = (
    ("decodes, all features", DECODES, "all", {"one_token_rows": True}, {}),
    ("decodes in several grid steps", dataclasses.replace(DECODES, num_kv_heads=1), "plain", {"one_token_rows": True}, {"block_tokens": 2}),
    ("mixed batch over grid steps and page blocks", MIXED, "all", {}, {"block_tokens": 32, "context": 128}),
    ("a long prompt, every tile full", LONG, "alibi", {}, {"block_tokens": 32, "context": 256}),
    ("not causal: keys beyond the block's queries", MIXED, "not causal", {}, {"block_tokens": 16, "context": 128}),
    ("not causal: keys before and behind the window", MIXED, "not causal, window", {}, {"block_tokens": 16, "context": 128}),
    ("padding tokens, one KV head", CASES[3], "sinks", {}, {}),
    (
        "heads interleaved by three",
        Case(name="smol", rows=((5, 21), (1, 33)), num_heads=9, num_kv_heads=3, head_size=64),
        "softcap",
        {},
        {},
    ),
    ("a group too odd to align", Case(name="g17", rows=((3, 19), (1, 9)), num_heads=17, num_kv_heads=1), "all", {}, {}),
    ("two lane chunks, the second half full", Case(name="h192", rows=((3, 19), (1, 9)), head_size=192), "plain", {}, {}),
    ("eight KV heads are transposed apart", Case(name="k8", rows=((3, 19), (1, 9)), num_heads=8, num_kv_heads=8), "window", {}, {}),
    ("page of one token", BY_NAME["page of one token"], "wide window", {}, {"context": 128}),
)


@functools.cache
def jitted(function: Any, static: tuple[tuple[str, Any], ...], params: pltpu.InterpretParams | None) -> Any:
    del params  # a function of its own for each, as jit does not see how kernels are interpreted

    def call(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        positional = [arrays[name] for name in ARRAYS[:5]]
        return function(*positional, **{name: arrays[name] for name in arrays if name not in ARRAYS[:5]}, **dict(static))

    return jax.jit(call, compiler_options=COMPILER_OPTIONS)  # what is interpreted runs fast and compiles slowly


def run(function: Any, inputs: dict[str, Any], params: pltpu.InterpretParams | None = None, **static: Any) -> tuple[np.ndarray, np.ndarray]:
    """Output and cache as float32; arrays of the inputs are traced."""
    arrays = {name: jnp.asarray(value) for name, value in inputs.items() if name in ARRAYS}
    static |= {name: value for name, value in inputs.items() if name not in ARRAYS}
    out, pages = jitted(function, tuple(static.items()), params)(arrays)
    return np.asarray(out, np.float32), np.asarray(pages, np.float32)


def interpret(inputs: dict[str, Any], params: pltpu.InterpretParams = INTERPRET, **static: Any) -> tuple[np.ndarray, np.ndarray]:
    with pltpu.force_tpu_interpret_mode(params):
        return run(tpu.ragged_paged_attention, inputs, params, **static)


def use_blocks(monkeypatch: pytest.MonkeyPatch, blocks: dict[str, int]) -> None:
    jitted.cache_clear()
    monkeypatch.setattr(tuning, "tuned", lambda device, op, key: blocks)


@pytest.mark.parametrize(("case", "feature", "static", "blocks"), [path[1:] for path in TELLING], ids=[path[0] for path in TELLING])
def test_kernel_equals_reference(
    case: Case,
    feature: str,
    static: dict[str, Any],
    blocks: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    use_blocks(monkeypatch, blocks)
    inputs = make_inputs(case, FEATURES[feature])
    if static:
        inputs = pad_inputs(inputs, T=len(case.rows))
    expected, expected_pages = run(reference.ragged_paged_attention, inputs)
    out, pages = interpret(inputs, RACES, **static)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)  # float32, sums in another order
    np.testing.assert_array_equal(pages, expected_pages)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("case", [case for case in CASES if case.value_size is None], ids=lambda case: case.name)
def test_kernel_equals_reference_on_every_case(case: Case, feature: str, capfd: pytest.CaptureFixture[str]) -> None:
    inputs = pad_inputs(make_inputs(case, FEATURES[feature]), **COMMON)
    expected, expected_pages = run(reference.ragged_paged_attention, inputs)
    out, pages = interpret(inputs, RACES)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)
    np.testing.assert_array_equal(pages, expected_pages)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize(("head_size", "page_size"), [(80, 32), (96, 64), (112, 128), (256, 256)])
def test_every_head_size_and_page_size_is_covered(head_size: int, page_size: int) -> None:
    case = Case(name="sizes", rows=((5, 9), (1, 140)), num_heads=2, num_kv_heads=1, head_size=head_size, page_size=page_size)
    inputs = make_inputs(case, {})
    expected, expected_pages = run(reference.ragged_paged_attention, inputs)
    out, pages = interpret(inputs)
    np.testing.assert_allclose(out, expected, atol=2e-5, rtol=2e-5)  # scores grow with the head size, and so does what exp makes of them
    np.testing.assert_array_equal(pages, expected_pages)


@pytest.mark.parametrize("num_kv_heads", [2, 16], ids=["heads interleaved", "heads apart"])
def test_bfloat16_stays_within_its_rounding(num_kv_heads: int) -> None:
    case = Case(name="bf16", rows=((6, 29), (1, 140)), num_heads=16, num_kv_heads=num_kv_heads, head_size=128, page_size=16, padding=1)
    inputs = make_inputs(case, FEATURES["softcap"])
    inputs |= {name: jnp.asarray(inputs[name], jnp.bfloat16) for name in ("q", "k", "v", "pages")}
    expected, expected_pages = run(reference.ragged_paged_attention, inputs)
    out, pages = interpret(inputs)
    np.testing.assert_allclose(out, expected, atol=0.02)  # weights are rounded to 8 bits before they meet values up to 3
    np.testing.assert_array_equal(pages, expected_pages)


@pytest.mark.parametrize(("dtype", "scale"), [("int8", 4.0 / 127), ("float8_e4m3fn", 0.5)])
def test_narrow_cache_is_scaled(dtype: str, scale: float) -> None:
    case = Case(name="prompts only", rows=((13, 13), (1, 1)))
    inputs: dict[str, Any] = {**make_inputs(case, {}), "k_scale": scale, "v_scale": scale / 2}
    inputs |= {"pages": np.zeros(inputs["pages"].shape, jnp.dtype(dtype))}
    expected, expected_pages = run(reference.ragged_paged_attention, inputs)
    out, pages = interpret(inputs)
    np.testing.assert_allclose(out, expected, atol=2e-5)  # int8 and float8 are exact in bfloat16
    np.testing.assert_array_equal(pages, expected_pages)


def test_pages_outside_the_window_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    use_blocks(monkeypatch, {"context": 128})
    case = Case(name="window at the end", rows=((3, 290), (1, 200)))
    inputs = make_inputs(case, {"window": np.int32(20)})  # traced: it may differ from layer to layer
    expected, _ = run(reference.ragged_paged_attention, inputs)
    for row, (count, length) in enumerate(case.rows):
        for page in range((length - count + 1 - 20) // case.page_size):
            inputs["pages"][:, inputs["page_table"][row, page]] = np.nan
            inputs["page_table"][row, page] = 10**6  # reading it would be out of bounds
    out, _ = interpret(inputs)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)


def test_page_table_in_hbm_is_read_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    jitted.cache_clear()
    monkeypatch.setattr(tuning, "tpu_limits", lambda: dataclasses.replace(tuning.SMALLEST_TPU, smem_bytes=5 * 2048))
    case = Case(name="a row over two chunks", rows=((1, 3), (2, 1030), (1, 9)), page_size=1)
    inputs = make_inputs(case, {"window": 12})
    expected, expected_pages = run(reference.ragged_paged_attention, inputs)
    out, pages = interpret(inputs, RACES)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)
    np.testing.assert_array_equal(pages, expected_pages)


@settings(max_examples=10)
@given(st.data())
def test_kernel_equals_reference_on_random_batches(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), min_size=4, max_size=4))
    case = Case(
        name="random", rows=tuple((count, count + (before if count else 0)) for count, before in rows), padding=40 - sum(c for c, _ in rows)
    )
    inputs = make_inputs(case, FEATURES["all"], seed=data.draw(st.integers(0, 99)))
    inputs = pad_inputs(inputs, P=6, num_pages=24)  # one shape for all examples
    np.testing.assert_allclose(interpret(inputs)[0], run(reference.ragged_paged_attention, inputs)[0], atol=2e-6, rtol=2e-5)


# --- the plan


@pytest.mark.parametrize("vmem_mib", [16, 64, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16, 71])
def test_plan_keeps_within_vmem_and_alignment(group: int, vmem_mib: int) -> None:
    limits = dataclasses.replace(tuning.SMALLEST_TPU, vmem_bytes=vmem_mib * tuning.MIB)
    for page_size, one_token_rows in ((8, False), (16, True), (24, False), (256, True)):
        plan = plan_for(limits, T=300, K=8, G=group, page_size=page_size, one_token_rows=one_token_rows)
        assert plan.vmem_bytes <= limits.vmem_budget
        assert plan.context % tpu_plan.LANES == 0
        assert plan.unit * plan.group % 16 == 0  # bfloat16 tiles
        assert all(tokens % plan.unit == 0 for tokens in (*plan.tiles, plan.block_tokens))
        assert one_token_rows or plan.tiles[-1] == plan.block_tokens


def test_plan_takes_measured_blocks_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    use_blocks(monkeypatch, {"block_tokens": 48, "context": 128})
    plan = plan_for(tuning.SMALLEST_TPU, T=300, K=2, G=4, page_size=16, one_token_rows=False)
    assert (plan.block_tokens, plan.context) == (48, 128)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"v": np.zeros((4, 2, 8), np.float32)}, "values of size 8"),
        ({"pages": np.zeros((1, 3, 8, 4, 16), np.float16)}, "cache of float16"),
        ({"q": np.zeros((4, 4, 16), np.float16)}, "queries of float16"),
    ],
)
def test_kernel_refuses_with_a_reason(changed: dict[str, np.ndarray], message: str) -> None:
    inputs = make_inputs(Case(name="refused", rows=((4, 4),)), {}) | changed
    with pytest.raises(NotImplementedError, match=message):
        run(tpu.ragged_paged_attention, inputs)


def plan_for(limits: tuning.TpuLimits, *, T: int, K: int, G: int, page_size: int, one_token_rows: bool) -> tpu_plan.Plan:
    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    new, pages = array(T, K, 128), array(2, 99, page_size, 2 * K, 128)
    return tpu_plan.make_plan(
        array(T, K * G, 128), new, new, pages, page_table=array(T, 64), sm_scale=1.0, causal=True, windowed=False, softcap=None,
        alibi=True, sinks=True, k_scale=1.0, v_scale=1.0, one_token_rows=one_token_rows, limits=limits,
    )  # fmt: skip
