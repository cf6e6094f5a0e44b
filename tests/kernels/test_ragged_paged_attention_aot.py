"""The kernels of ragged paged attention compiled by the real TPU and GPU compilers, on a machine that has neither device."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuning
from pallas_kernels.ragged_paged_attention import gpu, tpu
from pallas_kernels.tpu_walk import LANES
from tests.kernels import aot

Shape = jax.ShapeDtypeStruct
BF16, F32, INT8, FLOAT8 = jnp.bfloat16, jnp.float32, jnp.int8, jnp.float8_e4m3fn


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call to compile; the cache is large enough that no compiler can hide a copy of it.

    Args:
      arrays: features that are given as arrays.
      static: those that are given as they are.
      only: the platform whose code it takes a path of its own through.
    """

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
    only: Literal["tpu", "gpu"] | None = None

    def cache(self, kernel: ModuleType) -> jax.ShapeDtypeStruct:
        """Of four layers."""
        return Shape(kernel.cache_shape(4, self.num_pages, self.page_size, self.K, self.H), self.cache_dtype)


DECODE = (("one_token_rows", True),)
SCALED = (("k_scale", 0.1), ("v_scale", 0.1))
EVERYTHING = ("alibi_slopes", "sinks", "window")
CALLS = (
    Call(name="llama 8B decode", T=64, static=DECODE),
    Call(name="llama 8B decode, all features", T=64, arrays=EVERYTHING, static=(*DECODE, ("softcap", 30.0))),
    Call(name="llama 8B mixed, all features", T=512, arrays=EVERYTHING, static=(("softcap", 30.0),)),
    Call(name="mpt 7B decode", T=64, K=32, arrays=("alibi_slopes",), static=DECODE),
    Call(name="mpt 7B mixed", K=32, arrays=("alibi_slopes",)),
    Call(name="falcon 7B: 71 heads on one, size 64", N=71, K=1, H=64),
    Call(name="smollm: 9 heads on 3, size 64", N=9, K=3, H=64),
    Call(name="qwen: 7 heads each", N=28, K=4),
    Call(name="gemma: size 256, window, not causal", N=4, K=1, H=256, static=(("window", 512), ("softcap", 50.0), ("causal", False))),
    Call(name="size 192", N=8, K=4, H=192),
    Call(name="size 192, values of 128", N=8, K=4, H=192, value_size=128, only="gpu"),
    Call(name="size 80, float32", N=8, H=80, query_dtype=F32, cache_dtype=F32),
    Call(name="size 256, float32", N=16, K=2, H=256, query_dtype=F32, cache_dtype=F32),
    Call(name="size 112, int8", N=16, H=112, cache_dtype=INT8, static=SCALED),
    Call(name="size 96, 16 heads each, float8, pages of 32", K=2, H=96, page_size=32, cache_dtype=FLOAT8),
    Call(name="float32 queries, float8 cache", query_dtype=F32, cache_dtype=FLOAT8),
    Call(name="pages of 256", page_size=256, num_pages=512),
    Call(name="pages of 8", page_size=8),
    Call(name="128k contexts", T=256, S=256, P=8192, static=DECODE),  # on TPUs the page table stays in HBM
    Call(name="a row of 8192 tokens beside 255 decodes", T=8448, S=256, P=1024),
    Call(name="contexts of one split", S=8, T=8, P=4, static=DECODE, only="gpu"),
    Call(name="bfloat16 cache of 24 GB", num_pages=90_000, only="gpu"),
    Call(name="float8 cache of 3 GB, in pairs", K=2, num_pages=90_000, cache_dtype=FLOAT8, only="gpu"),
    Call(name="int8 cache of 3 GB, in pairs", num_pages=24_000, cache_dtype=INT8, only="gpu"),
    Call(name="int8 cache of 18 GB", num_pages=140_000, cache_dtype=INT8, only="gpu"),
)
TARGETS = {**dict.fromkeys(aot.TPUS, tpu), **dict.fromkeys(aot.GPUS, gpu)}


def compiled(target: str, call: Call) -> jax.stages.Compiled:
    static, kernel = dict(call.static), TARGETS[target]
    extra = {name: Shape((), jnp.int32) if name == "window" else Shape((call.N,), F32) for name in call.arrays}

    def function(q: Any, k: Any, v: Any, pages: Any, layer: Any, batch: Any, extra: Any) -> Any:
        return kernel.ragged_paged_attention(q, k, v, pages, layer, **batch, sm_scale=0.1, **static, **extra)

    sizes = (call.N, call.H), (call.K, call.H), (call.K, call.value_size or call.H)
    tokens = [Shape((call.T, *size), call.query_dtype) for size in sizes]
    arguments = (*tokens, call.cache(kernel), Shape((), jnp.int32), aot.batch_of(call.S, call.P), extra)
    return aot.compile_for(aot.mesh_for(target), function, arguments, donate=(3,))


def temporaries(target: str, call: Call) -> int:
    """What a call may take beside its arguments and results: nothing that grows with the cache."""
    if target in aot.TPUS:  # queries and output by KV head, the interleaved keys and values, a padded page table
        return 4 * call.T * call.N * LANES * 4 + 2 * call.S * call.P * 4 + tuning.MIB
    # Partial results of rows of up to four tokens, the output before it is combined, the new keys and values as the cache has them.
    decode = call.static[:1] == DECODE
    slots = min(call.T, call.S * (1 if decode else 4))
    splits = min(max(256 // call.K, 4), 64, -(-call.P * call.page_size // 256))
    output = 0 if decode else call.T * call.N * call.H * 4
    return slots * splits * call.N * (call.H + 2) * 4 + output + 4 * call.T * call.K * call.H * 4 + tuning.MIB


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "call"),
    [
        pytest.param(target, call, id=f"{target}-{call.name}")
        for target, kernel in TARGETS.items()
        for call in CALLS
        if call.only is None or kernel is {"tpu": tpu, "gpu": gpu}[call.only]
    ],
)
def test_kernel_compiles_in_place(target: str, call: Call) -> None:
    aot.check_in_place(compiled(target, call), [call.cache(TARGETS[target])], temporaries=temporaries(target, call))


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "scanned"),
    [*((target, True) for target in (*aot.TPUS, "sm_90")), ("sm_90", False)],
    ids=[*aot.TPUS, "sm_90 scanned", "sm_90 written out"],
)
@pytest.mark.parametrize("T", [64, 512], ids=["decode", "prefill"])
def test_layers_never_copy_the_cache(T: int, target: str, scanned: bool) -> None:
    """Two layers of Llama's shape."""
    R, S, D, F, N, K, H = 2, 64, 2048, 4096, 16, 4, 128
    kernel = TARGETS[target]
    cache = Shape(kernel.cache_shape(R, 16_384, 16, K, H), BF16)
    widths = {"qkv": (D, (N + 2 * K) * H), "o": (N * H, D), "gate": (D, F), "up": (D, F), "down": (F, D)}
    weights = {name: Shape((R, *width), BF16) for name, width in widths.items()}

    def layer(x: jax.Array, pages: jax.Array, index: Any, w: dict[str, jax.Array], batch: dict[str, Any]) -> Any:
        q, k, v = jnp.split((x @ w["qkv"]).reshape(T, N + 2 * K, H), (N, N + K), axis=1)
        out, pages = kernel.ragged_paged_attention(q, k, v, pages, index, **batch, sm_scale=0.1, one_token_rows=T == S)
        x += out.reshape(T, N * H) @ w["o"]
        return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], pages

    mesh, batch = aot.mesh_for(target), aot.batch_of(S, 128)
    executable = aot.compile_layers(mesh, layer, Shape((T, D), BF16), weights, cache, batch, scanned=scanned)
    aot.check_in_place(executable, [cache], temporaries=cache.size * 2 // R - 1)  # for tpu7x XLA tiles the weights anew


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("sm_80", tuning.GpuLimits(name="nvidia_a100_sxm4_80gb", shared_bytes=163 * tuning.KIB, converts_float8=False)),
        ("sm_90", tuning.GpuLimits(name="nvidia_h200", shared_bytes=227 * tuning.KIB, converts_float8=True, is_hopper=True)),
        ("unknown", dataclasses.replace(tuning.SMALLEST_GPU, name="nvidia_unheard_of")),
    ],
)
def test_limits_are_those_of_the_target(target: str, expected: tuning.GpuLimits) -> None:
    with jax.set_mesh(aot.gpu_mesh(target)):
        assert tuning.gpu_limits() == expected
