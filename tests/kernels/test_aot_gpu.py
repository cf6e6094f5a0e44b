"""The GPU kernels of ragged paged attention compiled by the real GPU compiler, on a machine without a GPU."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from pallas_kernels.ragged_paged_attention import gpu
from tests.kernels import aot

Shape = jax.ShapeDtypeStruct
BF16, F32 = jnp.bfloat16, jnp.float32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A call to compile."""

    name: str
    T: int = 256
    S: int = 64
    P: int = 512
    N: int = 32
    K: int = 8
    H: int = 128
    value_size: int | None = None
    page_size: int = 16
    num_pages: int = 8192
    query_dtype: Any = BF16
    cache_dtype: Any = BF16
    arrays: tuple[str, ...] = ()
    static: tuple[tuple[str, Any], ...] = ()

    @property
    def cache(self) -> jax.ShapeDtypeStruct:
        return Shape(gpu.cache_shape(4, self.num_pages, self.page_size, self.K, self.H), self.cache_dtype)


DECODE = (("one_token_rows", True),)
EVERYTHING = ("alibi_slopes", "sinks", "window")
# Those that every target compiles: each has a path that another does not.
TARGETS = (
    Compiled(name="llama 8B decode", T=64, static=DECODE),
    Compiled(name="llama 8B mixed, all features", T=512, arrays=EVERYTHING, static=(("softcap", 30.0),)),
    Compiled(name="mpt 7B mixed", K=32, arrays=("alibi_slopes",)),
    Compiled(name="gemma: size 256, window, not causal", N=4, K=1, H=256, static=(("window", 512), ("softcap", 50.0), ("causal", False))),
    Compiled(name="size 80, float32", N=8, H=80, query_dtype=F32, cache_dtype=F32),
    Compiled(name="size 112, int8", N=16, H=112, cache_dtype=jnp.int8, static=(("k_scale", 0.1), ("v_scale", 0.1))),
    Compiled(name="size 96, float8, pages of 32", K=2, H=96, page_size=32, cache_dtype=jnp.float8_e4m3fn),
    Compiled(name="float8 cache of 3 GB, in pairs", K=2, num_pages=90_000, cache_dtype=jnp.float8_e4m3fn),
    Compiled(name="a row of 8192 tokens beside 255 decodes", T=8448, S=256, P=1024),
)
# Other numbers on the same paths.
MORE = (
    Compiled(name="llama 8B decode, all features", T=64, arrays=EVERYTHING, static=(*DECODE, ("softcap", 30.0))),
    Compiled(name="mpt 7B decode", T=64, K=32, arrays=("alibi_slopes",), static=DECODE),
    Compiled(name="falcon 7B: 71 heads on one, size 64", N=71, K=1, H=64),
    Compiled(name="smollm: 9 heads on 3, size 64", N=9, K=3, H=64),
    Compiled(name="qwen: 7 heads each", N=28, K=4),
    Compiled(name="size 192", N=8, K=4, H=192),
    Compiled(name="size 192, values of 128", N=8, K=4, H=192, value_size=128),
    Compiled(name="size 256, float32", N=16, K=2, H=256, query_dtype=F32, cache_dtype=F32),
    Compiled(name="float32 queries, float8 cache", query_dtype=F32, cache_dtype=jnp.float8_e4m3fn),
    Compiled(name="contexts of one split", S=8, T=8, P=4, static=DECODE),
    Compiled(name="pages of 256", page_size=256, num_pages=512),
    Compiled(name="pages of 8", page_size=8),
    Compiled(name="128k contexts", T=256, S=256, P=8192, static=DECODE),
    Compiled(name="bfloat16 cache of 24 GB", num_pages=90_000),
    Compiled(name="int8 cache of 3 GB, in pairs", num_pages=24_000, cache_dtype=jnp.int8),
    Compiled(name="int8 cache of 18 GB", num_pages=140_000, cache_dtype=jnp.int8),
)


def compiled(target: str, call: Compiled) -> jax.stages.Compiled:
    static = dict(call.static)
    extra = {name: Shape((), jnp.int32) if name == "window" else Shape((call.N,), F32) for name in call.arrays}

    def function(q: Any, k: Any, v: Any, pages: Any, layer: Any, table: Any, start: Any, length: Any, extra: Any) -> Any:
        batch = {"page_table": table, "query_start": start, "kv_len": length}
        return gpu.ragged_paged_attention(q, k, v, pages, layer, **batch, sm_scale=0.1, **static, **extra)

    q, k, v = (
        Shape((call.T, n, h), call.query_dtype) for n, h in ((call.N, call.H), (call.K, call.H), (call.K, call.value_size or call.H))
    )
    batch = [Shape(shape, jnp.int32) for shape in ((), (call.S, call.P), (call.S + 1,), (call.S,))]
    return aot.compile_for(aot.gpu_mesh(target), function, (q, k, v, call.cache, *batch, extra), donate=(3,))


def check_in_place(call: Compiled, executable: jax.stages.Compiled) -> None:
    memory = aot.memory_of(executable)
    assert memory.alias_size_in_bytes >= call.cache.size * call.cache.dtype.itemsize
    assert memory.temp_size_in_bytes <= partial_bytes(call) + 4 * call.T * call.K * call.H * 4 + tuning.MIB
    assert not copies_of(call.cache, executable)


def partial_bytes(call: Compiled) -> int:
    """Of the partial results of rows of up to four tokens, and the output before it is combined: nothing that grows with the cache."""
    decode = call.static[:1] == DECODE
    slots = min(call.T, call.S * (1 if decode else 4))
    splits = min(max(256 // call.K, 4), 64, -(-call.P * call.page_size // 256))
    output = 0 if decode else call.T * call.N * call.H * 4
    return slots * splits * call.N * (call.H + 2) * 4 + output


def copies_of(cache: jax.ShapeDtypeStruct, executable: jax.stages.Compiled) -> list[str]:
    """Lines of the executable that make another array of the cache's size."""
    copying = re.compile(
        r"= \(?\w+\[([\d,]+)\]\S* (?:copy|copy-start|dynamic-slice|dynamic-update-slice|fusion|transpose|bitcast-convert)\("
    )
    found = [(match, line) for line in (executable.as_text() or "").splitlines() if (match := copying.search(line))]
    return [line for match, line in found if np.prod([int(n) for n in match[1].split(",")], dtype=np.int64) >= cache.size // 2]


@pytest.mark.aot
@pytest.mark.parametrize("call", TARGETS, ids=lambda call: call.name)
@pytest.mark.parametrize("target", aot.GPUS)
def test_kernels_compile_in_place(target: str, call: Compiled) -> None:
    check_in_place(call, compiled(target, call))


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("call", MORE, ids=lambda call: call.name)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_kernels_compile_in_place_for_more_models(target: str, call: Compiled) -> None:
    check_in_place(call, compiled(target, call))


@pytest.mark.aot
@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
@pytest.mark.parametrize("tokens", [64, 512], ids=["decode", "prefill"])
def test_layers_never_copy_the_cache(tokens: int, layers: str) -> None:
    cache, executable = step("sm_90", tokens, layers == "scanned")
    assert not copies_of(cache, executable)
    memory = aot.memory_of(executable)
    assert memory.alias_size_in_bytes >= cache.size * 2
    assert memory.temp_size_in_bytes < cache.size * 2 // cache.shape[0]  # one layer


def step(target: str, T: int, scanned: bool, *, R: int = 2, D: int = 2048, N: int = 16, K: int = 4, H: int = 128) -> Any:
    """Attention layers with projections around, the cache carried through all; returns the cache's shape and the executable."""
    S, P = 64, 128
    cache = Shape(gpu.cache_shape(R, 16_384, 16, K, H), BF16)
    weights = {"qkv": Shape((R, D, (N + 2 * K) * H), BF16), "o": Shape((R, N * H, D), BF16)}

    def layer(carry: Any, w: dict[str, jax.Array], batch: dict[str, Any]) -> Any:
        x, pages, index = carry
        q, k, v = jnp.split((x @ w["qkv"]).reshape(T, N + 2 * K, H), (N, N + K), axis=1)
        out, pages = gpu.ragged_paged_attention(q, k, v, pages, index, **batch, sm_scale=0.1, one_token_rows=T == S)
        return x + out.reshape(T, N * H) @ w["o"], pages, index + 1

    def function(x: jax.Array, weights: dict[str, jax.Array], pages: jax.Array, batch: dict[str, Any]) -> Any:
        carry = (x, pages, jnp.int32(0))
        if scanned:
            return jax.lax.scan(lambda carry, w: (layer(carry, w, batch), None), carry, weights)[0][:2]
        for index in range(R):
            carry = layer(carry, {name: w[index] for name, w in weights.items()}, batch)
        return carry[:2]

    batch = {name: Shape(shape, jnp.int32) for name, shape in (("page_table", (S, P)), ("query_start", (S + 1,)), ("kv_len", (S,)))}
    return cache, aot.compile_for(aot.gpu_mesh(target), function, (Shape((T, D), BF16), weights, cache, batch), donate=(2,))


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("sm_80", tuning.GpuLimits(name="nvidia_a100_sxm4_80gb", shared_bytes=163 * tuning.KIB, converts_float8=False)),
        ("sm_90", tuning.GpuLimits(name="nvidia_h200", shared_bytes=227 * tuning.KIB, converts_float8=True)),
        ("unknown", dataclasses.replace(tuning.SMALLEST_GPU, name="nvidia_unheard_of")),
    ],
)
def test_limits_are_those_of_the_target(target: str, expected: tuning.GpuLimits) -> None:
    with jax.set_mesh(aot.gpu_mesh(target)):
        assert tuning.gpu_limits() == expected
