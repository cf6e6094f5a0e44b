"""Attention over the compressed cache: implementations against the reference, the reference against numpy, and the TPU compiler."""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.mla_attention import cache_shape, mla_attention, tpu, tpu_plan
from pallas_kernels.mla_attention.cases import CASES, Case, make_inputs
from tests.compiling import COMPILER_OPTIONS
from tests.kernels import aot

POSITIONAL = ("q_latent", "q_rope", "latent", "rope_key", "pages", "layer")
MIXED = next(case for case in CASES if case.name.startswith("mixed"))
INTERPRET = pltpu.InterpretParams()  # a DMA moves its bytes when it is waited for: one not waited for leaves NaN
BATCHES = [*((case, True) for case in CASES), (MIXED, False)]
BATCH_NAMES = [case.name + ("" if causal else ", not causal") for case, causal in BATCHES]
RACES = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")  # moved at once: bytes used before the wait are a race


@functools.cache
def jitted(implementation: str, static: tuple[tuple[str, Any], ...], params: pltpu.InterpretParams | None) -> Any:
    del params  # a function of its own for each, as jit does not see how kernels are interpreted

    def call(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        batch = {name: arrays[name] for name in arrays if name not in POSITIONAL}
        return mla_attention(*(arrays[name] for name in POSITIONAL), implementation=implementation, **batch, **dict(static))

    return jax.jit(call, compiler_options=COMPILER_OPTIONS)  # what is interpreted runs fast and compiles slowly


def run(implementation: str, inputs: dict[str, Any], params: pltpu.InterpretParams | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Output and cache as float32; arrays are traced."""
    arrays = {name: jnp.asarray(value) for name, value in inputs.items() if not isinstance(value, bool | float)}
    static = tuple((name, value) for name, value in inputs.items() if isinstance(value, bool | float))
    out, pages = jitted(implementation, static, params)(arrays)
    assert (out.dtype, pages.dtype) == (arrays["q_latent"].dtype, arrays["pages"].dtype)
    return np.asarray(out, np.float32), np.asarray(pages, np.float32)


def interpret(inputs: dict[str, Any], params: pltpu.InterpretParams = INTERPRET) -> tuple[np.ndarray, np.ndarray]:
    with pltpu.force_tpu_interpret_mode(params):
        return run("tpu", inputs, params)


def by_hand(case: Case, inputs: dict[str, Any]) -> np.ndarray:
    """Attention as the definition says, one query and head at a time, in float64."""
    q = np.concatenate([inputs["q_latent"], inputs["q_rope"]], axis=-1).astype(np.float64)
    new = np.concatenate([inputs["latent"], inputs["rope_key"]], axis=-1).astype(np.float64)
    out = np.zeros(inputs["q_latent"].shape)
    for s, (count, length) in enumerate(case.rows):
        first = inputs["query_start"][s]
        cached = inputs["pages"][inputs["layer"], inputs["page_table"][s]].reshape(-1, new.shape[1])
        keys = np.concatenate([cached[: length - count], new[first : first + count]])
        for t in range(count):
            seen = keys[: length - count + t + 1] if inputs.get("causal", True) else keys
            for n in range(case.num_heads):
                weights = np.exp(seen @ q[first + t, n] * inputs["sm_scale"])
                out[first + t, n] = weights @ seen[:, : case.latent_size] / weights.sum()
    return out


@pytest.mark.parametrize(("case", "causal"), BATCHES, ids=BATCH_NAMES)
def test_reference_equals_the_definition(case: Case, causal: bool) -> None:
    inputs: dict[str, Any] = {**make_inputs(case), "causal": causal}
    out, pages = run("reference", inputs)
    assert pages.shape == cache_shape(2, inputs["pages"].shape[1], case.page_size, case.latent_size, case.rope_size)
    np.testing.assert_allclose(out, by_hand(case, inputs), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(("case", "causal"), BATCHES, ids=BATCH_NAMES)
def test_xla_equals_reference(case: Case, causal: bool) -> None:
    inputs = make_inputs(case) | {"causal": causal}
    expected, expected_pages = run("reference", inputs)
    out, pages = run("xla", inputs)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)  # float32, sums in another order
    np.testing.assert_array_equal(pages, expected_pages)


def with_idle_rows(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with as many tokens as rows, as one_token_rows promises; the added ones are NaN."""
    added = len(inputs["kv_len"]) - len(inputs["latent"])
    padded: dict[str, Any] = {}
    for name in ("q_latent", "q_rope", "latent", "rope_key"):
        others = [(0, 0)] * (inputs[name].ndim - 1)
        padded[name] = np.pad(inputs[name], [(0, added), *others], constant_values=np.nan)
    return inputs | padded


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_one_token_rows_changes_nothing(case: Case) -> None:
    inputs = with_idle_rows(make_inputs(case))
    expected, _ = run("reference", inputs)
    out, _ = run("xla", inputs | {"one_token_rows": True})
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_other_layers_and_free_pages_stay_untouched(implementation: str) -> None:
    case = CASES[3]
    inputs = make_inputs(case)
    inputs["pages"] = np.nan_to_num(inputs["pages"], nan=7.0)
    _, pages = run(implementation, inputs)
    changed = np.argwhere((pages != inputs["pages"]).any(axis=3))
    assert {layer for layer, *_ in changed} == {int(inputs["layer"])}
    assert len(changed) == case.num_tokens


@settings(max_examples=25)
@given(st.data())
def test_xla_equals_reference_on_random_batches(data: st.DataObject) -> None:
    inputs = random_inputs(data)
    np.testing.assert_allclose(run("xla", inputs)[0], run("reference", inputs)[0], atol=2e-6, rtol=2e-5)


def random_inputs(data: st.DataObject) -> dict[str, Any]:
    """A ragged batch of four rows; one shape for all examples."""
    rows = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), min_size=4, max_size=4))
    rows = tuple((count, count + (before if count else 0)) for count, before in rows)
    inputs = make_inputs(Case(name="random", rows=rows, padding=40 - sum(count for count, _ in rows)), seed=data.draw(st.integers(0, 99)))
    inputs["page_table"] = np.pad(inputs["page_table"], ((0, 0), (0, 6 - inputs["page_table"].shape[1])))
    inputs["pages"] = np.pad(inputs["pages"], ((0, 0), (0, 24 - inputs["pages"].shape[1]), (0, 0), (0, 0)), constant_values=np.nan)
    return inputs


# --- the TPU kernel, interpreted

DECODES = Case(name="decodes", rows=((1, 5), (1, 300), (1, 17), (0, 0)), page_size=16)
# Compiling an interpreted kernel takes seconds, so each of these stands for a path of its own; the slow test below is the whole list.
TELLING = (
    ("decodes in several grid steps and page blocks", DECODES, {"one_token_rows": True}, {"block_tokens": 2, "context": 128}),
    ("mixed batch over grid steps and page blocks", MIXED, {}, {"block_tokens": 16, "context": 128}),
    ("not causal: keys beyond the block's queries", MIXED, {"causal": False}, {"block_tokens": 16, "context": 128}),
    ("padding tokens, more heads than a tile", CASES[3], {}, {}),
    ("nothing but padding", CASES[7], {}, {}),
)


def use_blocks(monkeypatch: pytest.MonkeyPatch, blocks: dict[str, int]) -> None:
    jitted.cache_clear()
    monkeypatch.setattr(tuning, "tuned", lambda device, op, key: blocks)


@pytest.mark.parametrize(("case", "static", "blocks"), [path[1:] for path in TELLING], ids=[path[0] for path in TELLING])
def test_kernel_equals_reference(
    case: Case, static: dict[str, Any], blocks: dict[str, int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use_blocks(monkeypatch, blocks)
    inputs = make_inputs(case) | static
    if "one_token_rows" in static:
        inputs = with_idle_rows(inputs)
    expected, expected_pages = run("reference", inputs)
    out, pages = interpret(inputs, RACES)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)  # float32, sums in another order
    np.testing.assert_array_equal(pages, expected_pages)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("case", "causal"), BATCHES, ids=BATCH_NAMES)
def test_kernel_equals_reference_on_every_case(case: Case, causal: bool, capfd: pytest.CaptureFixture[str]) -> None:
    inputs = make_inputs(case) | {"causal": causal}
    expected, expected_pages = run("reference", inputs)
    out, pages = interpret(inputs, RACES)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)
    np.testing.assert_array_equal(pages, expected_pages)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_bfloat16_stays_within_its_rounding() -> None:
    inputs = make_inputs(Case(name="bf16", rows=((6, 29), (1, 140)), num_heads=16, latent_size=128, rope_size=64, page_size=16, padding=1))
    inputs |= {name: jnp.asarray(inputs[name], jnp.bfloat16) for name in ("q_latent", "q_rope", "latent", "rope_key", "pages")}
    inputs |= {"sm_scale": 0.1}
    expected, expected_pages = run("reference", inputs)
    out, pages = interpret(inputs)
    np.testing.assert_allclose(out, expected, atol=0.02)  # weights are rounded to 8 bits before they meet values up to 3
    np.testing.assert_array_equal(pages, expected_pages)


def test_page_table_may_stay_in_hbm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    jitted.cache_clear()
    limits = dataclasses.replace(tuning.SMALLEST_TPU, smem_bytes=12 * 1024)
    monkeypatch.setattr(tuning, "tpu_limits", lambda: limits)
    inputs = make_inputs(MIXED)
    added = 2100 - inputs["page_table"].shape[1]  # three chunks a row, of which the first is used
    inputs["page_table"] = np.pad(inputs["page_table"], ((0, 0), (0, added)))
    expected, _ = run("xla", inputs)
    out, _ = interpret(inputs, RACES)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)
    assert "RACE DETECTED" not in capfd.readouterr().out


@settings(max_examples=8)
@given(st.data())
def test_kernel_equals_reference_on_random_batches(data: st.DataObject) -> None:
    inputs = random_inputs(data)
    expected, expected_pages = run("reference", inputs)
    out, pages = interpret(inputs)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)
    np.testing.assert_array_equal(pages, expected_pages)


@pytest.mark.parametrize("vmem_mib", [16, 64, 128])
@pytest.mark.parametrize("num_heads", [1, 5, 16, 20, 128])
def test_plan_keeps_within_vmem_and_alignment(num_heads: int, vmem_mib: int) -> None:
    limits = dataclasses.replace(tuning.SMALLEST_TPU, vmem_bytes=vmem_mib * tuning.MIB)
    for page_size, one_token_rows in ((8, False), (16, True), (24, False), (256, True)):
        arrays: list[Any] = [Shape((300, num_heads, 512), jnp.bfloat16), Shape((4, 99, page_size, 576), jnp.bfloat16)]
        arrays.append(Shape((300, 64), jnp.int32))
        plan = tpu_plan.make_plan(*arrays, sm_scale=1.0, causal=True, one_token_rows=one_token_rows, limits=limits)
        assert plan.vmem_bytes <= limits.vmem_budget
        assert plan.context % tpu_plan.LANES == 0
        assert plan.num_heads % 16 == 0  # bfloat16 tiles


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pages": np.zeros((2, 9, 4, 32), np.float32)}, "pages of 4 tokens"),
        ({"pages": np.zeros((2, 9, 8, 32), np.float16)}, "cache of float16"),
        ({"q_latent": np.zeros((4, 4, 24), np.float16)}, "queries of float16"),
    ],
)
def test_kernel_refuses_with_a_reason(changed: dict[str, np.ndarray], message: str) -> None:
    inputs = make_inputs(Case(name="refused", rows=((4, 4),))) | changed
    with pytest.raises(NotImplementedError, match=message):
        run("tpu", inputs)


# --- the TPU compiler

Shape = jax.ShapeDtypeStruct
DECODE = (("one_token_rows", True),)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A call to compile, of DeepSeek V3's sizes; the cache is large enough that XLA cannot hide a copy of it in VMEM."""

    name: str
    T: int = 256
    S: int = 64
    P: int = 512
    N: int = 128
    page_size: int = 16
    num_pages: int = 8192
    dtype: Any = jnp.bfloat16
    static: tuple[tuple[str, Any], ...] = ()

    @property
    def cache(self) -> jax.ShapeDtypeStruct:
        return Shape((4, self.num_pages, self.page_size, 576), self.dtype)


TARGETS = (
    Compiled(name="deepseek V3 decode", T=64, static=DECODE),
    Compiled(name="deepseek V3 mixed"),
    Compiled(name="deepseek V2 lite decode, pages of 64", T=64, N=16, page_size=64, num_pages=2048, static=DECODE),
    Compiled(name="deepseek V2 lite mixed, pages of 8", T=512, N=16, page_size=8),
    Compiled(name="20 heads, float32, not causal", N=20, dtype=jnp.float32, static=(("causal", False),)),
    Compiled(name="128k contexts: the table stays in HBM", S=256, P=8192, static=DECODE),
    Compiled(name="a row of 8192 tokens beside 255 decodes", T=8448, S=256, P=1024, N=16),
)


def compiled(target: str, call: Compiled, kernel: ModuleType) -> jax.stages.Compiled:
    def function(q_latent: Any, q_rope: Any, latent: Any, rope_key: Any, pages: Any, layer: Any, batch: Any) -> Any:
        return kernel.mla_attention(q_latent, q_rope, latent, rope_key, pages, layer, **batch, sm_scale=0.1, **dict(call.static))

    tokens = [Shape((call.T, *shape), call.dtype) for shape in ((call.N, 512), (call.N, 64), (512,), (64,))]
    arguments = (*tokens, call.cache, Shape((), jnp.int32), aot.batch_of(call.S, call.P))
    return aot.compile_for(aot.mesh_for(target), function, arguments, donate=(4,))


@pytest.mark.aot
@pytest.mark.parametrize("call", TARGETS, ids=lambda call: call.name)
@pytest.mark.parametrize("target", aot.TPUS)
def test_kernel_compiles_in_place(target: str, call: Compiled) -> None:
    # The padded queries, the output, the new vectors by page, a padded page table: nothing that grows with the cache.
    queries_bytes, vectors_bytes = call.T * tpu_plan.round_up(call.N, 16) * 640 * 4, call.S * call.page_size * 640 * 4
    temporaries = 2 * queries_bytes + 2 * call.S * call.P * 4 + 2 * vectors_bytes + tuning.MIB
    aot.check_in_place(compiled(target, call, tpu), [call.cache], temporaries=temporaries)


@pytest.mark.aot
@pytest.mark.parametrize("target", aot.TPUS)
def test_scanned_layers_never_copy_the_cache(target: str) -> None:
    R, T, S, N, D = 2, 64, 64, 16, 2048
    cache = Shape((R, 8192, 16, 576), jnp.bfloat16)
    weights = {name: Shape((R, *shape), jnp.bfloat16) for name, shape in (("q", (D, N * 576)), ("kv", (D, 576)), ("o", (N * 512, D)))}

    def layer(x: jax.Array, pages: jax.Array, index: Any, w: dict[str, jax.Array], batch: dict[str, Any]) -> Any:
        q_latent, q_rope = jnp.split((x @ w["q"]).reshape(T, N, 576), (512,), axis=2)
        latent, rope_key = jnp.split(x @ w["kv"], (512,), axis=1)
        out, pages = tpu.mla_attention(q_latent, q_rope, latent, rope_key, pages, index, **batch, sm_scale=0.1, one_token_rows=True)
        return x + out.reshape(T, N * 512) @ w["o"], pages

    x, mesh = Shape((T, D), jnp.bfloat16), aot.tpu_mesh(target)
    executable = aot.compile_layers(mesh, layer, x, weights, cache, aot.batch_of(S, 128), scanned=True)
    aot.check_in_place(executable, [cache], temporaries=cache.size * 2 // R - 1)
