"""Every implementation of ragged paged attention against the reference, and the reference against a loop in numpy."""

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

from pallas_kernels.native.tiles import LINE
from pallas_kernels.ragged_paged_attention import cache_shape, ragged_paged_attention
from pallas_kernels.ragged_paged_attention.cases import CASES, COMMON, FEATURES, Case, make_inputs, pad_inputs
from tests.compiling import COMPILER_OPTIONS

ARRAYS = ("q", "k", "v", "pages", "layer", "page_table", "query_start", "kv_len", "alibi_slopes", "sinks", "distance_bias")


def to_rows(pages: jax.Array) -> jax.Array:
    """The contract's [R, num_pages, page_size, 2K, H] as xla.py holds it."""
    R, num_pages, page_size, heads, H = pages.shape
    keys, values = pages[..., 0::2, :].transpose(0, 1, 3, 4, 2), pages[..., 1::2, :].transpose(0, 1, 3, 2, 4)
    rows = [x.reshape(R, num_pages, heads // 2, page_size * H) for x in (keys, values)]
    return jnp.stack(rows, axis=3).reshape(R, num_pages, heads, page_size * H)


def from_rows(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The other way."""
    R, num_pages, page_size, heads, H = shape
    keys = rows[:, :, 0::2].reshape(R, num_pages, heads // 2, H, page_size).transpose(0, 1, 4, 2, 3)
    values = rows[:, :, 1::2].reshape(R, num_pages, heads // 2, page_size, H).transpose(0, 1, 3, 2, 4)
    return jnp.stack([keys, values], axis=4).reshape(shape)


REORDER = {"reference": lambda pages: pages, "xla": to_rows, "cpu": to_rows}
RESTORE = {"reference": lambda pages, shape: pages, "xla": from_rows, "cpu": from_rows}


def in_vectors(case: Case) -> Case:
    """The case with sizes that the kernel for CPUs takes."""
    return dataclasses.replace(case, head_size=2 * LINE if case.head_size < 16 else LINE, page_size=LINE)


def run(implementation: str, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Output and cache, which is in the contract's order whatever the implementation's."""
    arrays = {name: jnp.asarray(value) for name, value in inputs.items() if name in ARRAYS}
    static = {name: value for name, value in inputs.items() if name not in ARRAYS}
    shape = arrays["pages"].shape
    arrays["pages"] = REORDER[implementation](arrays["pages"])
    R, num_pages, page_size, heads, H = shape
    assert arrays["pages"].shape == cache_shape(R, num_pages, page_size, heads // 2, H, implementation=implementation)

    out, pages = jitted(implementation, tuple(static.items()))(arrays)
    return np.asarray(out, np.float32), np.asarray(RESTORE[implementation](pages, shape), np.float32)


@functools.cache
def jitted(implementation: str, static: tuple[tuple[str, Any], ...]) -> Any:
    """The op for any arrays: cases of like shapes share a program."""

    def call(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        positional = [arrays[name] for name in ARRAYS[:5]]
        return ragged_paged_attention(
            *positional, implementation=implementation, **{n: arrays[n] for n in arrays if n not in ARRAYS[:5]}, **dict(static)
        )

    options: dict[str, Any] = COMPILER_OPTIONS
    return jax.jit(call, compiler_options=options)


def by_hand(case: Case, inputs: dict[str, Any]) -> np.ndarray:
    """Attention as the definition says, one query and head at a time, in float64."""
    q, k, v, layer = inputs["q"].astype(np.float64), inputs["k"].astype(np.float64), inputs["v"].astype(np.float64), int(inputs["layer"])
    T, N, H = q.shape
    G, Hv = N // case.num_kv_heads, v.shape[2]
    out = np.zeros((T, N, Hv))
    for s, (count, length) in enumerate(case.rows):
        first = inputs["query_start"][s]
        keys, values = np.zeros((length, case.num_kv_heads, H)), np.zeros((length, case.num_kv_heads, Hv))
        for p in range(length):
            if p >= length - count:
                keys[p], values[p] = k[first + p - length + count], v[first + p - length + count]
            else:
                cached = inputs["pages"][layer, inputs["page_table"][s, p // case.page_size], p % case.page_size]
                keys[p], values[p] = cached[0::2], cached[1::2, :Hv]
        for t in range(count):
            position = length - count + t
            for n in range(N):
                scores = keys[:, n // G] @ q[first + t, n] * inputs["sm_scale"]
                if inputs.get("softcap"):
                    scores = inputs["softcap"] * np.tanh(scores / inputs["softcap"])
                distance = np.arange(length) - position
                if "alibi_slopes" in inputs:
                    scores = scores + inputs["alibi_slopes"][n] * distance
                if "distance_bias" in inputs:
                    most = inputs["distance_bias"].shape[1] // 2
                    scores = scores + inputs["distance_bias"][n, np.clip(distance, -most, most) + most]
                seen = (distance <= 0) | (not inputs.get("causal", True))
                if inputs.get("window"):
                    seen &= (distance > -inputs["window"]) & (distance < inputs["window"])
                weights = np.where(seen, np.exp(scores), 0)
                total = weights.sum() + (np.exp(inputs["sinks"][n]) if "sinks" in inputs else 0)
                out[first + t, n] = weights @ values[:, n // G] / total
    return out


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_xla_equals_reference(case: Case, feature: str) -> None:
    inputs = pad_inputs(make_inputs(case, FEATURES[feature]), **COMMON)
    expected, expected_pages = run("reference", inputs)
    out, pages = run("xla", inputs)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)  # float32, sums in another order
    np.testing.assert_array_equal(pages, expected_pages)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("case", [in_vectors(case) for case in CASES], ids=lambda case: case.name)
def test_cpu_equals_reference(case: Case, feature: str) -> None:
    inputs = pad_inputs(make_inputs(case, FEATURES[feature]), **COMMON)
    expected, expected_pages = run("reference", inputs)
    out, pages = run("cpu", inputs)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)  # float32, sums in another order
    np.testing.assert_array_equal(pages, expected_pages)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_bias_by_distance_is_that_of_the_definition(implementation: str) -> None:
    case = Case(name="whole texts, one longer than the table of distances", rows=((29, 29), (1, 1), (6, 6)), padding=3)
    inputs = make_inputs(case, {"causal": False})
    inputs["distance_bias"] = np.random.default_rng(2).standard_normal((case.num_heads, 23)).astype(np.float32)
    out, _ = run(implementation, inputs)
    np.testing.assert_allclose(out[: case.num_tokens], by_hand(case, inputs)[: case.num_tokens], atol=2e-6, rtol=2e-5)


def test_kernel_for_cpus_leaves_a_bias_by_distance_to_xla() -> None:
    inputs = make_inputs(in_vectors(CASES[0]), {}) | {"distance_bias": np.zeros((4, 3), np.float32)}
    with pytest.raises(NotImplementedError, match="bias for each distance"):
        run("cpu", inputs)


def test_cpu_gives_a_row_the_same_bits_in_any_company() -> None:
    case = in_vectors(CASES[6])
    inputs = make_inputs(case, FEATURES["all"])
    together, _ = run("cpu", inputs)
    for s, (count, _) in enumerate(case.rows):
        first = int(inputs["query_start"][s])
        alone = {name: inputs[name][first : first + count] for name in ("q", "k", "v")}
        alone |= {"page_table": inputs["page_table"][s : s + 1], "kv_len": inputs["kv_len"][s : s + 1]}
        if count:
            out, _ = run("cpu", {**inputs, **alone, "query_start": np.array([0, count], np.int32)})
            np.testing.assert_array_equal(out, together[first : first + count])


def test_cpu_refuses_what_it_has_no_vectors_for_and_the_default_takes_it() -> None:
    inputs = make_inputs(Case(name="small heads", rows=((3, 9),), head_size=12), {})
    with pytest.raises(NotImplementedError, match="heads"):
        run("cpu", inputs)
    case = in_vectors(CASES[0])
    inputs = make_inputs(case, {})
    inputs["pages"] = jnp.zeros(inputs["pages"].shape, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="bfloat16"):
        run("cpu", inputs)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("case", [case for case in CASES if case.num_tokens < 80], ids=lambda case: case.name)
def test_reference_equals_the_definition(case: Case, feature: str) -> None:
    inputs = make_inputs(case, FEATURES[feature])
    out, _ = run("reference", inputs)
    np.testing.assert_allclose(out, by_hand(case, inputs), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("case", [case for case in CASES if all(count <= 1 for count, _ in case.rows)], ids=lambda case: case.name)
@pytest.mark.parametrize("feature", FEATURES)
def test_one_token_rows_changes_nothing(case: Case, feature: str) -> None:
    inputs = make_inputs(case, FEATURES[feature])
    T, S = inputs["q"].shape[0], len(case.rows)
    for name in ("q", "k", "v"):
        inputs[name] = np.concatenate([inputs[name], np.full((S - T, *inputs[name].shape[1:]), np.nan, np.float32)])
    expected, _ = run("reference", inputs)
    out, _ = run("xla", {**inputs, "one_token_rows": True})
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla", "cpu"])
def test_other_layers_and_free_pages_stay_untouched(implementation: str) -> None:
    case = in_vectors(CASES[3])
    inputs = make_inputs(case, {})
    inputs["pages"] = np.nan_to_num(inputs["pages"], nan=7.0)
    _, pages = run(implementation, inputs)
    changed = np.argwhere((pages != inputs["pages"]).any(axis=(3, 4)))
    assert {layer for layer, *_ in changed} == {int(inputs["layer"])}
    assert len(changed) == case.num_tokens


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.02), ("float8_e4m3fn", 0.2), ("int8", 0.05)])
def test_narrow_cache_stays_within_its_rounding(implementation: str, dtype: str, tolerance: float) -> None:
    case = Case(name="prompt only", rows=((13, 13), (1, 1)))
    inputs = make_inputs(case, {})
    exact, _ = run("reference", inputs)
    scale = 4.0 / 127 if dtype == "int8" else 0.5
    inputs["pages"] = jnp.zeros(inputs["pages"].shape, dtype)
    out, pages = run(implementation, {**inputs, "k_scale": scale, "v_scale": scale})
    assert np.isfinite(pages).all()
    np.testing.assert_allclose(out, exact, atol=tolerance)  # values up to 3, rounded to 8, 4 and 7 bits


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@settings(max_examples=20)  # each compiles two programs
@given(data=st.data())
def test_equals_reference_on_random_batches(implementation: str, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), min_size=4, max_size=4))
    context = tuple((count, count + (before if count else 0)) for count, before in rows)
    case = in_vectors(Case(name="random", rows=context, padding=40 - sum(count for count, _ in rows)))
    inputs = make_inputs(case, FEATURES["all"], seed=data.draw(st.integers(0, 99)))
    P = 6  # one shape for all examples
    inputs["page_table"] = np.pad(inputs["page_table"], ((0, 0), (0, P - inputs["page_table"].shape[1])))
    inputs["pages"] = np.pad(inputs["pages"], ((0, 0), (0, 24 - inputs["pages"].shape[1]), (0, 0), (0, 0), (0, 0)), constant_values=np.nan)
    np.testing.assert_allclose(run(implementation, inputs)[0], run("reference", inputs)[0], atol=2e-6, rtol=2e-5)
