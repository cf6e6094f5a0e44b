"""What bench_kernels.py measures besides attention: shapes of published models, and what jax has for the same work."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.matmul import matmul
from pallas_kernels.mla_attention import cache_shape, mla_attention


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One row of the table: `make` gives a call without arguments, which moves so many bytes and takes so many operations."""

    name: str
    who: str
    make: Callable[[], Callable[[], Any]]
    bytes_moved: int
    flops: int
    feature: str = "plain"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Latent attention: rows of (new tokens, context with them), for some of a model's heads."""

    name: str
    rows: tuple[tuple[int, int], ...]
    N: int
    C: int = 512
    rope: int = 64
    page_size: int = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A product of experts: so many tokens, each with k of E experts, through matrices [in, out]."""

    name: str
    tokens: int
    k: int
    E: int
    num_in: int
    num_out: int


LATENT = (
    Latent(name="V2-Lite, decode 64 x 4096", rows=((1, 4096),) * 64, N=16),
    Latent(name="V2-Lite, prefill 2048", rows=((2048, 2048),), N=16),
    Latent(name="V3, decode 64 x 4096", rows=((1, 4096),) * 64, N=128),
    Latent(name="V3, prefill 2048", rows=((2048, 2048),), N=128),
)
EXPERTS = (
    Experts(name="Mixtral up, 64 tokens", tokens=64, k=2, E=8, num_in=4096, num_out=28_672),
    Experts(name="Mixtral up, 2048 tokens", tokens=2048, k=2, E=8, num_in=4096, num_out=28_672),
    Experts(name="Qwen3-30B up, 64 tokens", tokens=64, k=8, E=128, num_in=2048, num_out=1536),
    Experts(name="Qwen3-30B up, 2048 tokens", tokens=2048, k=8, E=128, num_in=2048, num_out=1536),
    Experts(name="gpt-oss-20b up, 64 tokens", tokens=64, k=4, E=32, num_in=2880, num_out=5760),
)
SMOLLM2 = {"qkv": (576, 960), "out": (576, 576), "gate and up": (576, 3072), "down": (1536, 576), "head": (576, 49_152)}  # in, out


def latent_attention(scale: int) -> Iterator[Timed]:
    """mla_attention, and its form in plain XLA."""
    for case in LATENT:
        rows = [(max(count // scale, 1), max(length // scale, 1)) for count, length in case.rows]
        tokens, context = sum(count for count, _ in rows), sum(length for _, length in rows)
        seen = sum(count * length - count * (count - 1) // 2 for count, length in rows)
        width = case.C + case.rope
        for who, implementation in (("jaxserve", None), ("plain XLA", "xla")):
            yield Timed(
                name=case.name, who=who, make=functools.partial(_latent_call, case, rows, implementation),
                bytes_moved=2 * (context * width + tokens * case.N * (width + case.C)), flops=2 * seen * case.N * (width + case.C),
            )  # fmt: skip


def _latent_call(case: Latent, rows: list[tuple[int, int]], implementation: str | None) -> Callable[[], Any]:
    counts, lengths = zip(*rows, strict=True)
    pages_of = [-(-length // case.page_size) for length in lengths]
    ids, T = np.random.default_rng(0).permutation(np.arange(1, 1 + sum(pages_of))), sum(counts)
    table = np.zeros((len(rows), max(pages_of)), np.int32)
    for row, end in enumerate(np.cumsum(pages_of)):
        table[row, : pages_of[row]] = ids[end - pages_of[row] : end]
    normal, keys = functools.partial(jax.random.normal, dtype=jnp.bfloat16), jax.random.split(jax.random.key(0), 5)
    queries = normal(keys[0], (T, case.N, case.C)), normal(keys[1], (T, case.N, case.rope))
    new = normal(keys[2], (T, case.C)), normal(keys[3], (T, case.rope))
    batch = {
        "page_table": jnp.asarray(table), "query_start": jnp.asarray(np.cumsum([0, *counts]), jnp.int32),
        "kv_len": jnp.asarray(lengths, jnp.int32),
    }  # fmt: skip
    state = {"cache": normal(keys[4], cache_shape(1, 1 + sum(pages_of), case.page_size, case.C, case.rope))}

    @functools.partial(jax.jit, donate_argnums=2)
    def step(queries: Any, new: Any, cache: Any, batch: Any) -> Any:
        one_token_rows = all(count == 1 for count in counts)
        (q_latent, q_rope), (latent, rope_key) = queries, new
        return mla_attention(
            q_latent,
            q_rope,
            latent,
            rope_key,
            cache,
            0,
            **batch,
            sm_scale=192**-0.5,
            one_token_rows=one_token_rows,
            implementation=implementation,
        )

    def call() -> jax.Array:
        out, state["cache"] = step(queries, new, state["cache"], batch)
        return out

    return call


def expert_products(scale: int) -> Iterator[Timed]:
    """grouped_matmul for tokens that choose at random, and jax.lax.ragged_dot."""
    for case in EXPERTS:
        num_in, num_out = max(case.num_in // scale, 64), max(case.num_out // scale, 64)
        rows = case.tokens * case.k
        counts = np.bincount(np.random.default_rng(0).integers(0, case.E, rows), minlength=case.E)
        moved = 2 * (int((counts > 0).sum()) * num_in * num_out + rows * (num_in + num_out))
        for who, product in (("jaxserve", grouped_matmul), ("jax.lax.ragged_dot", jax.lax.ragged_dot)):
            make = functools.partial(_expert_call, product, counts, rows, num_in, num_out)
            yield Timed(name=case.name, who=who, make=make, bytes_moved=moved, flops=2 * rows * num_in * num_out)


def _expert_call(product: Callable[..., jax.Array], counts: np.ndarray, rows: int, num_in: int, num_out: int) -> Callable[[], Any]:
    x = jax.random.normal(jax.random.key(0), (rows, num_in), jnp.bfloat16)
    weights = jax.random.normal(jax.random.key(1), (len(counts), num_in, num_out), jnp.bfloat16)
    sizes, jitted = jnp.asarray(counts, jnp.int32), jax.jit(product)
    return lambda: jitted(x, weights, sizes)


def weight_products(scale: int) -> Iterator[Timed]:
    """On a CPU, where there is a kernel for them: products of SmolLM2 in float32, of 30 layers a call, and XLA's in two forms."""
    del scale
    if jax.default_backend() != "cpu":
        return
    for what, (num_in, num_out) in SMOLLM2.items():
        layers = 1 if what == "head" else 30
        for rows in (1, 8, 32, 128, 512):
            moved = 4 * layers * (num_in * num_out + rows * (num_in + num_out))
            for who, implementation in (("jaxserve", "cpu"), ("XLA, weights first", "xla"), ("XLA, rows first", "reference")):
                make = functools.partial(_weights_call, implementation, layers, rows, num_in, num_out)
                yield Timed(name=f"{what}, {rows} rows", who=who, make=make, bytes_moved=moved, flops=2 * layers * rows * num_in * num_out)


def _weights_call(implementation: str, layers: int, rows: int, num_in: int, num_out: int) -> Callable[[], Any]:
    x = jax.random.normal(jax.random.key(0), (rows, num_in))
    weights = [jax.random.normal(jax.random.key(i), (num_out, num_in)) for i in range(layers)]
    products = jax.jit(lambda x, weights: [matmul(x, weight, implementation=implementation) for weight in weights])
    return lambda: products(x, weights)
