"""The GPU kernels of ragged paged attention, interpreted, against the reference; and their plan."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import tuning
from pallas_kernels.ragged_paged_attention import gpu, gpu_plan, reference
from pallas_kernels.ragged_paged_attention.cases import CASES, COMMON, FEATURES, Case, make_inputs, pad_inputs
from tests.kernels.gpu_plans import plan_for

ARRAYS = ("q", "k", "v", "pages", "layer", "page_table", "query_start", "kv_len", "alibi_slopes", "sinks", "window")
TOKENS = ("q", "k", "v")
# Small enough that every case has several tiles and splits.
SMALL = {"context": 16, "split": 32, "rows": 16}
DRAFTS = Case(name="rows of one to four tokens over several splits", rows=((4, 300), (1, 270), (2, 9), (3, 40)))
HEADS = Case(name="two tiles of heads", rows=((1, 40), (3, 9), (1, 90)), num_heads=71, num_kv_heads=1)


@functools.cache
def jitted(function: Any, static: tuple[tuple[str, Any], ...], blocks: tuple[tuple[str, Any], ...]) -> Any:
    del blocks  # a function of its own for each, as jit does not see them

    def call(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        positional = [arrays[name] for name in ARRAYS[:5]]
        return function(*positional, **{name: arrays[name] for name in arrays if name not in ARRAYS[:5]}, **dict(static))

    return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})


def run(function: Any, inputs: dict[str, Any], blocks: dict[str, Any], **static: Any) -> tuple[np.ndarray, np.ndarray]:
    """Output and cache as float32, the cache in the contract's order; arrays of the inputs are traced."""
    arrays = {name: jnp.asarray(value) for name, value in inputs.items() if name in ARRAYS}
    static |= {name: value for name, value in inputs.items() if name not in ARRAYS}
    out, pages = jitted(function, tuple(static.items()), tuple(blocks.items()))(arrays)
    return np.asarray(out, np.float32), np.asarray(pages, np.float32)


def expect(inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return run(reference.ragged_paged_attention, inputs, {})


def assert_close(out: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)  # float32, sums in another order


class Interpreter:
    """Runs the GPU kernels on caches in the contract's order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.blocks: dict[str, Any] = {}

    def use(self, **blocks: int) -> None:
        """Block sizes as if tuned; rows only apply to prefill and split only to decode."""

        def tuned(device: str, op: str, key: str) -> dict[str, int]:
            unwanted = "rows" if key.startswith("decode") else "split"
            return {name: size for name, size in blocks.items() if name != unwanted}

        self.blocks |= blocks
        self.monkeypatch.setattr(tuning, "tuned", tuned)

    def __call__(self, inputs: dict[str, Any], **static: Any) -> tuple[np.ndarray, np.ndarray]:
        pages = jnp.asarray(inputs["pages"])
        R, num_pages, page_size, heads, H = pages.shape
        assert gpu.cache_shape(R, num_pages, page_size, heads // 2, H) == (R, num_pages, heads, page_size, H)
        out, pages = run(gpu.ragged_paged_attention, inputs | {"pages": pages.transpose(0, 1, 3, 2, 4)}, self.blocks, **static)
        return out, pages.transpose(0, 1, 3, 2, 4)


@pytest.fixture
def interpret(monkeypatch: pytest.MonkeyPatch) -> Interpreter:
    return Interpreter(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("feature", FEATURES)
def test_kernels_equal_reference(case: Case, feature: str, interpret: Interpreter) -> None:
    inputs = pad_inputs(make_inputs(case, FEATURES[feature]), **COMMON)  # runs fast and compiles slowly
    expected, expected_pages = expect(inputs)
    out, pages = interpret(inputs)
    assert_close(out, expected)
    np.testing.assert_array_equal(pages, expected_pages)


@pytest.mark.parametrize("feature", ["all", "not causal", "not causal, window"])
@pytest.mark.parametrize("case", [CASES[5], CASES[6], DRAFTS, HEADS], ids=lambda case: case.name)
def test_many_small_tiles_and_splits_equal_reference(case: Case, feature: str, interpret: Interpreter) -> None:
    interpret.use(**SMALL)
    inputs = make_inputs(case, FEATURES[feature])
    expected, _ = expect(inputs)
    assert_close(interpret(inputs)[0], expected)


@pytest.mark.parametrize(("head_size", "page_size"), [(12, 2), (64, 8), (80, 32), (96, 64), (112, 128), (192, 16), (256, 256)])
def test_every_head_size_and_page_size_is_covered(head_size: int, page_size: int, interpret: Interpreter) -> None:
    inputs = make_inputs(Case(name="sizes", rows=((5, 9), (1, 140)), head_size=head_size, page_size=page_size), {})
    expected, expected_pages = expect(inputs)
    out, pages = interpret(inputs)
    np.testing.assert_allclose(out, expected, atol=2e-5, rtol=2e-5)  # scores grow with the head size, and so does what exp makes of them
    np.testing.assert_array_equal(pages, expected_pages)


@pytest.mark.parametrize("feature", ["plain", "all"])
def test_one_token_rows_changes_no_bit(feature: str, interpret: Interpreter) -> None:
    interpret.use(**SMALL)
    inputs = make_inputs(CASES[2], FEATURES[feature])
    inputs = pad_inputs(inputs, T=len(inputs["kv_len"]))
    expected, expected_pages = interpret(inputs)
    out, pages = interpret(inputs, one_token_rows=True)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(pages, expected_pages)
    assert_close(out, expect(inputs)[0])


def test_a_row_is_the_same_in_any_company(interpret: Interpreter) -> None:
    """Bit for bit, for a decode, drafts and a prompt, whatever the other rows and the numbers of rows, tokens and pages are."""
    interpret.use(**SMALL)
    rows = ((1, 300), (1, 5), (3, 40), (1, 70), (20, 90))
    inputs = pad_inputs(make_inputs(Case(name="company", rows=rows), FEATURES["all"]), T=32, S=6)
    together, _ = interpret(inputs)
    for s, (count, length) in enumerate(rows):
        first = inputs["query_start"][s]
        alone = {name: inputs[name][first : first + count] for name in TOKENS}
        alone |= {"page_table": inputs["page_table"][s : s + 1], "kv_len": np.array([length], np.int32)}
        alone |= {"query_start": np.array([0, count], np.int32)}
        out, _ = interpret(pad_inputs(inputs | alone, T=24, S=2, P=inputs["page_table"].shape[1] + 3))
        np.testing.assert_array_equal(out[:count], together[first : first + count])


@pytest.mark.parametrize("paired", [False, True], ids=["bytes", "pairs"])
@pytest.mark.parametrize("converts", [False, True], ids=["by bits", "by hardware"])
@pytest.mark.parametrize(("dtype", "scale"), [("int8", 4.0 / 127), ("float8_e4m3fn", 0.5)])
def test_narrow_cache_is_scaled(
    dtype: str, scale: float, converts: bool, paired: bool, interpret: Interpreter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_plan, "_needs_pairs", lambda pages: paired)
    monkeypatch.setattr(tuning, "SMALLEST_GPU", dataclasses.replace(tuning.SMALLEST_GPU, converts_float8=converts))
    interpret.blocks = {"paired": paired, "converts": converts}
    case = Case(name="prompts only", rows=((13, 13), (1, 1)), value_size=11)
    inputs: dict[str, Any] = {**make_inputs(case, {}), "k_scale": scale, "v_scale": scale / 2}
    inputs |= {"pages": np.zeros(inputs["pages"].shape, jnp.dtype(dtype))}
    expected, expected_pages = expect(inputs)
    out, pages = interpret(inputs)
    np.testing.assert_allclose(out, expected, atol=2e-5)  # sums in another order; the numbers themselves are exact
    np.testing.assert_array_equal(pages, expected_pages)


def test_float8_is_decoded_from_its_bits(interpret: Interpreter) -> None:
    """Every finite number of the format, subnormal ones too: each is the only value that its row attends to."""
    numbers = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)
    numbers = numbers[np.isfinite(numbers.astype(np.float32))]
    rows = tuple((1, 1) for _ in range(16))
    inputs = make_inputs(Case(name="numbers", rows=rows, num_heads=1, num_kv_heads=1, page_size=1), {})
    inputs["pages"] = np.zeros(inputs["pages"].shape, jnp.float8_e4m3fn)
    inputs["v"] = np.resize(numbers.astype(np.float32), inputs["v"].shape)
    np.testing.assert_array_equal(interpret(inputs)[0], inputs["v"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_within_its_rounding(dtype: str, interpret: Interpreter) -> None:
    case = Case(name="half", rows=((6, 29), (1, 140)), num_heads=8, head_size=128, page_size=16, padding=1)
    inputs = make_inputs(case, FEATURES["softcap"])
    inputs |= {name: jnp.asarray(inputs[name], dtype) for name in ("q", "k", "v", "pages")}
    expected, expected_pages = expect(inputs)
    out, pages = interpret(inputs)
    np.testing.assert_allclose(out, expected, atol=0.02)  # weights are rounded to 8 bits before they meet values up to 3
    np.testing.assert_array_equal(pages, expected_pages)


def test_queries_and_cache_of_unlike_dtypes_meet_exactly(interpret: Interpreter) -> None:
    inputs = make_inputs(Case(name="unlike", rows=((6, 29), (1, 140))), {})
    inputs["pages"] = jnp.asarray(inputs["pages"], jnp.bfloat16)
    expected, _ = expect(inputs)
    assert_close(interpret(inputs)[0], expected)


def test_pages_outside_the_window_are_not_read(interpret: Interpreter) -> None:
    interpret.use(**SMALL)
    case = Case(name="window at the end", rows=((9, 290), (1, 200)))
    inputs = make_inputs(case, {"window": np.int32(20)})  # traced: it may differ from layer to layer
    expected, _ = expect(inputs)
    for row, (count, length) in enumerate(case.rows):
        for page in range((length - count + 1 - 20) // case.page_size):
            inputs["pages"][:, inputs["page_table"][row, page]] = np.nan
            inputs["page_table"][row, page] = 10**6  # reading it would be out of bounds
    assert_close(interpret(inputs)[0], expected)


def test_other_layers_and_free_pages_stay_untouched(interpret: Interpreter) -> None:
    case = CASES[3]
    inputs = make_inputs(case, {})
    inputs["pages"] = np.nan_to_num(inputs["pages"], nan=7.0)
    _, pages = interpret(inputs)
    changed = np.argwhere((pages != inputs["pages"]).any(axis=(3, 4)))
    assert {layer for layer, *_ in changed} == {int(inputs["layer"])}
    assert len(changed) == case.num_tokens


@settings(max_examples=20)
@given(st.data())
def test_kernels_equal_reference_on_random_batches(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), min_size=4, max_size=4))
    case = Case(name="random", rows=tuple((count, count + (before if count else 0)) for count, before in rows))
    inputs = pad_inputs(make_inputs(case, FEATURES["all"], seed=data.draw(st.integers(0, 99))), T=40, P=6, num_pages=24)
    with pytest.MonkeyPatch.context() as monkeypatch:
        interpret = Interpreter(monkeypatch)
        interpret.use(**SMALL)
        assert_close(interpret(inputs)[0], expect(inputs)[0])


# --- the plan


@pytest.mark.parametrize("size", range(1, 257))
def test_chunks_cover_a_head_with_powers_of_two(size: int) -> None:
    covered = gpu_plan.chunks(size)
    assert covered[0][0] == 0
    assert all(start + width == following for (start, width), (following, _) in itertools.pairwise(covered))
    assert all(width >= gpu_plan.LEAST_TILE and width & (width - 1) == 0 for _, width in covered)
    assert covered[-1][0] < size <= sum(covered[-1])


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "int8"), ("float32", "float32")])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16, 71])
def test_plan_fits_the_smallest_gpu(group: int, dtypes: tuple[str, str]) -> None:
    for H in (64, 80, 128, 192, 256):
        plan = plan_for(G=group, H=H, dtypes=dtypes)
        keys = 2 * sum(width for _, width, _ in plan.key_chunks) * plan.cache_dtype.itemsize
        for blocks in (plan.decode, plan.prefill):
            assert blocks.stages >= gpu_plan.LEAST_STAGES
            buffers = (blocks.stages - 1) // 2 + 1
            assert buffers * blocks.context * keys + blocks.rows * H * plan.query_dtype.itemsize <= tuning.SMALLEST_GPU.shared_bytes
            assert blocks.rows % gpu_plan.LEAST_TILE == 0 and blocks.context % gpu_plan.LEAST_TILE == 0
            assert group % blocks.heads == 0 or blocks is plan.decode
        assert plan.least_split % plan.decode.context == 0


@given(st.lists(st.integers(0, 70), min_size=5, max_size=5), st.sampled_from([350, 400]), st.sampled_from([1, 4, 8]))
def test_prefill_grid_holds_any_batch(counts: list[int], T: int, group: int) -> None:
    plan = plan_for(T=T, S=len(counts), G=group)
    query_start = np.cumsum([0, *counts]).astype(np.int32)
    row, start, end = (np.asarray(x) for x in gpu._prefill_blocks(plan, jnp.asarray(query_start)))
    covered = [t for s, a, b in zip(row, start, end, strict=True) for t in range(a, min(a + plan.prefill_tokens, b))]
    long = [t for s, count in enumerate(counts) if count > plan.short_tokens for t in range(query_start[s], query_start[s + 1])]
    assert sorted(covered) == sorted([*long, *range(query_start[-1], T)])


def test_plan_depends_on_no_bucket() -> None:
    """Tiles, splits and which rows split: else a row's bits would depend on its company."""
    plans = [plan_for(T=T, S=S, P=P) for T, S, P in ((8, 8, 16), (64, 8, 512), (2048, 256, 8192))]
    assert len({(p.decode, p.prefill, p.least_split, p.max_splits, p.short_tokens) for p in plans}) == 1


def test_caches_between_two_and_four_gib_of_bytes_are_addressed_in_pairs() -> None:
    def paired(num_pages: int, dtype: str) -> bool:
        return plan_for(num_pages=num_pages, dtypes=("bfloat16", dtype)).paired

    per_page = 4 * 16 * 128
    assert not paired((1 << 31) // per_page, "int8")
    assert paired((1 << 31) // per_page + 1, "int8")
    assert paired((1 << 32) // per_page, "float8_e4m3fn")
    assert not paired((1 << 32) // per_page + 1, "int8")
    assert not paired((1 << 31) // per_page, "bfloat16")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtypes": ("bfloat16", "int32")}, "cache of int32"),
        ({"dtypes": ("float64", "bfloat16")}, "queries of float64"),
        ({"H": 512}, "head size 512"),
        ({"num_pages": 1 << 26}, "below 2 \\*\\* 31"),
        ({"H": 63, "num_pages": 600_000, "dtypes": ("bfloat16", "int8")}, "head size 63 in a cache"),
    ],
)
def test_kernels_refuse_with_a_reason(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        plan_for(**changed)
