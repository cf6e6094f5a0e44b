"""Measure the kernels on the device at hand: achieved bandwidth and FLOP/s over what the device reaches in a copy and a matmul.

1. Ceilings: a copy of 1 GiB, and a product of 8,192 x 8,192 matrices.
2. Attention: each case with each feature, median time of a call on a cache full of random numbers, every page somewhere else.
   On Hopper prompts also through the Mosaic GPU kernel, whichever of both the engine would take. The same data through jax's own paged
   kernel for the platform, and dense through jax.nn.dot_product_attention, where they take the case.
3. Latent attention, the products of experts, and on a CPU those of weights, beside what jax has for them: bench_more_kernels.py.
4. Print a table and one JSON line a row. --scale N divides contexts, prompts and widths of experts by N, for slow devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from bench_more_kernels import Timed, expert_products, latent_attention, weight_products

from pallas_kernels import tuning
from pallas_kernels.ragged_paged_attention import IMPLEMENTATIONS, cache_shape, ragged_paged_attention


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Rows of (new tokens, context with them), and the shape of the heads."""

    name: str
    rows: tuple[tuple[int, int], ...]
    N: int = 32
    K: int = 8
    H: int = 128
    page_size: int = 64

    @property
    def one_token_rows(self) -> bool:
        return all(count == 1 for count, _ in self.rows)

    @property
    def bytes_moved(self) -> int:
        """Keys and values of every context once, queries and outputs once, in bfloat16."""
        context = sum(length for _, length in self.rows)
        tokens = sum(count for count, _ in self.rows)
        return 2 * (2 * context * self.K * self.H + 2 * tokens * self.N * self.H)

    @property
    def flops(self) -> int:
        """Of q . k and weights . values, for the keys that causal queries see."""
        seen = sum(count * length - count * (count - 1) // 2 for count, length in self.rows)
        return 4 * seen * self.N * self.H


CASES = (
    Case(name="decode 64 x 4096", rows=((1, 4096),) * 64),
    Case(name="decode 8 x 4096", rows=((1, 4096),) * 8),
    Case(name="decode 256 x 1024", rows=((1, 1024),) * 256),
    Case(name="decode 64 x 4096, 32 KV heads", rows=((1, 4096),) * 64, K=32),
    Case(name="decode 64, ragged 16 to 8192", rows=tuple((1, 16 + 8176 * i // 63) for i in range(64))),
    Case(name="prefill 8192", rows=((8192, 8192),)),
    Case(name="prefill 4 x 2048", rows=((2048, 2048),) * 4),
    Case(name="prefill 512 after 7680", rows=((512, 8192),)),
    Case(name="mixed 8192 beside 255 decodes", rows=((8192, 8192),) + ((1, 1024),) * 255),
)
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "alibi": {"alibi_slopes": True},
    "softcap": {"softcap": 30.0},
    "window 1024": {"window": 1024},
    "sinks": {"sinks": True},
}


OPS = {"attention": None, "latent": latent_attention, "experts": expert_products, "products": weight_products}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Measure the kernels on the device at hand.", allow_abbrev=False)
    parser.add_argument("--ops", default=",".join(OPS), help="comma-separated; default: all")
    parser.add_argument("--scale", type=int, default=1, help="divide contexts, prompts and widths of experts by this")
    parser.add_argument("--cases", default="", help="only cases whose names contain this")
    parser.add_argument("--features", default=",".join(FEATURES), help="of attention, comma-separated; default: all")
    parser.add_argument("--implementation", choices=sorted(IMPLEMENTATIONS), help="of attention; default: the platform's own")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    for op in args.ops.split(","):
        dtype = "float32" if op == "products" else "bfloat16"
        ceilings = measure_ceilings(args.scale, args.repeats, dtype)
        copy, matmul = ceilings["copy"] / 1e9, ceilings["matmul"] / 1e12
        device = jax.devices()[0].device_kind
        print(f"{op} on {device}, jax {jax.__version__}, {dtype}: copy {copy:.0f} GB/s, matmul {matmul:.2f} TFLOP/s")
        print(f"{'case':<32}{'feature':<14}{'of':<22}{'ms':>9}{'GB/s':>9}{'of copy':>9}{'TFLOP/s':>9}{'of matmul':>10}")
        more = OPS[op]
        timed = attention(args.scale, args.features.split(","), args.implementation) if more is None else more(args.scale)
        for case in timed:
            if args.cases in case.name:
                report(case, time_call(case.make(), args.repeats), ceilings)


def attention(scale: int, features: list[str], implementation: str | None) -> Iterator[Timed]:
    """Every case with every feature, and the same data in jax's kernels."""
    for case in CASES:
        small = dataclasses.replace(case, rows=tuple((max(c // scale, 1), max(n // scale, 1)) for c, n in case.rows))
        for who, feature, make in calls(small, features, implementation):
            yield Timed(name=case.name, feature=feature, who=who, make=make, bytes_moved=small.bytes_moved, flops=small.flops)


def report(case: Timed, seconds: float, ceilings: dict[str, float]) -> None:
    """One row of the table, and its JSON line."""
    bandwidth, rate = case.bytes_moved / seconds, case.flops / seconds
    row = {
        "case": case.name, "feature": case.feature, "of": case.who, "ms": 1e3 * seconds, "gb_per_s": bandwidth / 1e9,
        "of_copy": bandwidth / ceilings["copy"], "tflop_per_s": rate / 1e12, "of_matmul": rate / ceilings["matmul"],
    }  # fmt: skip
    print(
        f"{case.name:<32}{case.feature:<14}{case.who:<22}{row['ms']:>9.3f}{row['gb_per_s']:>9.1f}{row['of_copy']:>9.0%}"
        f"{row['tflop_per_s']:>9.2f}{row['of_matmul']:>10.0%}"
    )
    print(json.dumps(row), flush=True)


def measure_ceilings(scale: int, repeats: int, dtype: str = "bfloat16") -> dict[str, float]:
    """Bytes a second of a copy (read and written), and FLOP a second of a product."""
    x = jnp.zeros((1 << 30) // scale // jnp.dtype(dtype).itemsize, dtype)
    copy = jax.jit(lambda x: x + 1)
    side = max(8192 // scale, 256)
    a = jnp.ones((side, side), dtype)
    matmul = jax.jit(lambda a: a @ a)
    return {
        "copy": 2 * x.nbytes / time_call(lambda: copy(x), repeats),
        "matmul": 2 * side**3 / time_call(lambda: matmul(a), repeats),
    }


def time_call(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, from groups of calls that are queued together."""
    jax.block_until_ready(call())
    once = _elapsed(call, 1)
    together = max(1, min(50, int(0.02 / max(once, 1e-6))))
    return statistics.median(_elapsed(call, together) / together for _ in range(repeats))


def _elapsed(call: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready([call() for _ in range(times)])
    return time.perf_counter() - start


def calls(case: Case, features: list[str], implementation: str | None) -> Iterator[tuple[str, str, Callable[[], Callable[[], Any]]]]:
    """(whose, feature, what makes a call without arguments) of a case."""
    data = functools.cache(lambda: make_data(case, implementation))
    for feature in features:
        yield "jaxserve", feature, lambda feature=feature: ours(case, data(), FEATURES[feature], implementation)
    limits = tuning.gpu_limits()
    if implementation is None and limits is not None and limits.is_hopper and not case.one_token_rows:
        for feature in features:
            yield "jaxserve, Mosaic GPU", feature, lambda feature=feature: ours(case, data(), FEATURES[feature], "hopper")
    yield "jax.nn, dense", "plain", lambda: dense(case, data())
    peer = {"tpu": jax_tpu_kernel, "gpu": jax_gpu_kernel}.get(jax.default_backend())
    if peer is not None and (jax.default_backend() == "tpu" or case.one_token_rows):
        yield "jax's paged kernel", "plain", lambda: peer(case, data())


def make_data(case: Case, implementation: str | None) -> dict[str, Any]:
    """Random queries, keys and values, and a page table in which no row's pages lie together."""
    T, S = sum(count for count, _ in case.rows), len(case.rows)
    pages_of = [-(-length // case.page_size) for _, length in case.rows]
    ids = np.random.default_rng(0).permutation(np.arange(1, 1 + sum(pages_of)))
    table, used = np.zeros((S, max(pages_of)), np.int32), 0
    for s, n in enumerate(pages_of):
        table[s, :n] = ids[used : used + n]
        used += n
    shape = cache_shape(1, 1 + used, case.page_size, case.K, case.H, implementation=implementation)
    keys = jax.random.split(jax.random.key(0), 4)
    normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    return {
        "q": normal(keys[0], (T, case.N, case.H)), "k": normal(keys[1], (T, case.K, case.H)), "v": normal(keys[2], (T, case.K, case.H)),
        "cache": normal(keys[3], shape), "page_table": jnp.asarray(table),
        "query_start": jnp.asarray(np.cumsum([0] + [count for count, _ in case.rows]), jnp.int32),
        "kv_len": jnp.asarray([length for _, length in case.rows], jnp.int32),
    }  # fmt: skip


def ours(case: Case, data: dict[str, Any], feature: dict[str, Any], implementation: str | None) -> Callable[[], Any]:
    """The op with its cache donated and taken back."""
    per_head = {name: jnp.linspace(0.01, 0.5, case.N) for name, value in feature.items() if value is True}
    static = {name: value for name, value in feature.items() if value is not True}

    @functools.partial(jax.jit, donate_argnums=3)
    def step(q: Any, k: Any, v: Any, cache: Any, batch: Any, per_head: Any) -> Any:
        return ragged_paged_attention(
            q, k, v, cache, 0, **batch, **per_head, **static, sm_scale=case.H**-0.5, one_token_rows=case.one_token_rows,
            implementation=implementation,
        )  # fmt: skip

    batch = {name: data[name] for name in ("page_table", "query_start", "kv_len")}
    state = {"cache": jnp.copy(data["cache"])}

    def call() -> jax.Array:
        out, state["cache"] = step(data["q"], data["k"], data["v"], state["cache"], batch, per_head)
        return out

    return call


def dense(case: Case, data: dict[str, Any]) -> Callable[[], Any]:
    """jax.nn.dot_product_attention over contiguous keys and values, rows padded to the longest."""
    S, L, C = len(case.rows), max(length for _, length in case.rows), max(count for count, _ in case.rows)
    q = jnp.ones((S, C, case.N, case.H), jnp.bfloat16)
    k = jnp.ones((S, L, case.K, case.H), jnp.bfloat16)
    attend = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=C > 1 and C == L))
    return lambda: attend(q, k, k, key_value_seq_lengths=data["kv_len"])


def jax_tpu_kernel(case: Case, data: dict[str, Any]) -> Callable[[], Any]:
    """jax.experimental.pallas.ops.tpu.ragged_paged_attention, which writes no keys and values."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention as kernel

    pages, rows = data["cache"][0], jnp.array([len(case.rows)], jnp.int32)
    attend = jax.jit(functools.partial(kernel, sm_scale=case.H**-0.5))
    return lambda: attend(data["q"], pages, data["kv_len"], data["page_table"], data["query_start"], rows)


def jax_gpu_kernel(case: Case, data: dict[str, Any]) -> Callable[[], Any]:
    """jax.experimental.pallas.ops.gpu.paged_attention: decode only, keys and values apart, heads first."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as kernel

    num_pages = data["cache"].shape[1]
    pages = jnp.ones((case.K, num_pages, case.page_size, case.H), jnp.bfloat16)
    attend = jax.jit(kernel)
    return lambda: attend(data["q"], pages, pages, data["page_table"], data["kv_len"])


if __name__ == "__main__":
    main()
