"""The feed-forward half of a layer with experts: choose, sort tokens by expert, multiply each by its experts' matrices, add up.

No expert has a capacity and no token is dropped, so that what a token gets does not depend on its neighbours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.linear import Linear, WholeParam, size_of
from jaxserve.models.mlp import Mlp, activate
from jaxserve.models.mlp_spec import MlpSpec, MoeSpec, RouterSpec
from jaxserve.sharding import WHOLE, Cut, Split
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.matmul import matmul


class Moe(nnx.Module):
    """Feed-forward layer of experts, and of one that all tokens go through if there is one."""

    def __init__(self, spec: MoeSpec, width: int, *, repeats: int, dtype: jnp.dtype, platform: str | None, split: Split = WHOLE) -> None:
        self.spec = spec
        self.router = Router(spec.router, width, spec.num_experts, repeats=repeats, dtype=dtype)
        self.experts = Experts(spec.expert, width, spec.num_experts, repeats=repeats, dtype=dtype, platform=platform, split=split)
        self.shared = None if spec.shared is None else Mlp(spec.shared, width, repeats=repeats, dtype=dtype, split=split)
        self.shared_gate = Linear(width, 1, bias=False, repeats=repeats, dtype=dtype) if spec.shared_gate else None

    def __call__(self, x: jax.Array, layer: jax.Array, valid: jax.Array) -> jax.Array:
        """Map [T, D] to [T, D] in a layer of the group; tokens that are not bool[T] valid are padding, for which no matrix is read."""
        weights, chosen = self.router(x, self.spec.top_k)
        chosen = jnp.where(valid[:, None], chosen, self.spec.num_experts)
        mixed = self.experts(x, layer, weights, chosen, weigh_inputs=self.spec.weigh_inputs)
        if self.shared is None:
            return mixed
        shared = self.shared(x)
        return mixed + (shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * shared)


class Experts(nnx.Module):
    """The matrices of all experts, in before out: [R, E, D, 2F], columns [gate | up], and [R, E, F, D].

    Devices share out the experts along one axis of the mesh and each expert's F along another.
    """

    def __init__(
        self, spec: MlpSpec, width: int, num_experts: int, *, repeats: int, dtype: jnp.dtype, platform: str | None, split: Split
    ) -> None:
        assert spec.gated, f"{spec=}"
        self.spec, self.platform = spec, platform
        self.owned = owned = split.even("experts", 0, num_experts)
        self.columns = columns = split.even("expert_mlp", 1, spec.width)
        pairs = split.even("expert_mlp", 2, spec.width, spec.width)
        self.num_experts = E = size_of(owned, num_experts)
        F = size_of(columns, spec.width)
        self.gate_up = _param((repeats, E, width, 2 * F), dtype, owned, pairs)
        self.down = _param((repeats, E, F, width), dtype, owned, columns)
        bias_pairs = split.even("expert_mlp", 1, spec.width, spec.width)
        self.gate_up_bias = _param((repeats, E, 2 * F), dtype, owned, bias_pairs) if spec.bias else None
        self.down_bias = _param((repeats, E, width), dtype, owned) if spec.has_down_bias else None

    def __call__(self, x: jax.Array, layer: jax.Array, weights: jax.Array, chosen: jax.Array, *, weigh_inputs: bool) -> jax.Array:
        """The weighted sum [T, D] of what the chosen experts make of tokens [T, D].

        Args:
          weights: f32[T, k]. chosen: i32[T, k], numbers of experts; those that there are not are padding and give zeros.
          weigh_inputs: the weights multiply what experts are given.
        """
        (T, D), k, E = x.shape, chosen.shape[1], self.num_experts
        own = chosen if self.owned is None else chosen - self.owned.index() * E
        expert = jnp.where((own >= 0) & (own < E), own, E).reshape(-1)  # [T * k]; E is another device's, or padding
        order = jnp.argsort(expert, stable=True)
        rows = x[order // k]
        if weigh_inputs:
            rows = (rows * weights.reshape(-1)[order][:, None]).astype(x.dtype)
        rows = self._apply(rows, layer, expert, order)
        outputs = rows[jnp.argsort(order)].reshape(T, k, D).astype(jnp.float32)
        outputs = jnp.where((expert < E).reshape(T, k, 1), outputs, 0)
        # float32 and in the order of choice: the same sum whatever else is in the batch
        mixed = outputs.sum(1) if weigh_inputs else jnp.einsum("tkd,tk->td", outputs, weights, precision="highest")
        for cut in (self.columns, self.owned):
            mixed = mixed if cut is None else cut.sum(mixed)
        return mixed.astype(x.dtype)

    def _apply(self, rows: jax.Array, layer: jax.Array, expert: jax.Array, order: jax.Array) -> jax.Array:
        """Rows [T * k, D] in an order that sorts them by their expert i32[T * k], each through its own; padding comes last."""
        R, E = self.gate_up.shape[:2]
        # The experts of all the group's layers, of which only this layer's have rows: slicing them out would copy them.
        number = jnp.where(expert < E, layer * E + expert, R * E)
        counts = jnp.zeros(R * E, jnp.int32).at[number].add(1, mode="drop")
        own = jnp.minimum(number[order], R * E - 1)
        hidden = grouped_matmul(rows, _of_all(self.gate_up), counts, platform=self.platform)
        if self.gate_up_bias is not None:
            hidden = hidden + _of_all(self.gate_up_bias)[own]
        out = grouped_matmul(activate(hidden, self.spec), _of_all(self.down), counts, platform=self.platform)
        if self.down_bias is None:
            return out
        bias = _of_all(self.down_bias)[own]
        return out + (bias if self.columns is None else jnp.where(self.columns.index() == 0, bias, 0))  # once in the sum over devices


def _param(shape: tuple[int, ...], dtype: jnp.dtype, *cuts: Cut | None) -> WholeParam:
    return WholeParam(jax.ShapeDtypeStruct(shape, dtype), cuts=tuple(cut for cut in cuts if cut is not None))


def _of_all(param: WholeParam) -> jax.Array:
    """[R, E, ...] as [R * E, ...]."""
    return param[...].reshape(-1, *param.shape[2:])


class Router(nnx.Module):
    """The linear map from tokens to logits of experts, and the choice by them."""

    def __init__(self, spec: RouterSpec, width: int, num_experts: int, *, repeats: int, dtype: jnp.dtype) -> None:
        self.spec = spec
        self.weight = nnx.Param(jax.ShapeDtypeStruct((repeats, num_experts, width), dtype))
        self.bias = nnx.Param(jax.ShapeDtypeStruct((repeats, num_experts), dtype)) if spec.bias else None
        # float32, as checkpoints have it: it balances experts by digits that bfloat16 has not
        self.correction = nnx.Param(jax.ShapeDtypeStruct((repeats, num_experts), jnp.dtype(jnp.float32))) if spec.correction else None

    def __call__(self, x: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
        """Weights f32[T, k] and numbers i32[T, k] of the experts for tokens [T, D]."""
        logits = matmul(x, self.weight[...], dtype=jnp.dtype(jnp.float32))
        if self.bias is not None:
            logits = logits + self.bias[...].astype(jnp.float32)
        if self.spec.scores == "sparsemixer":
            return _sparsemixer(logits, self.spec.jitter)
        scores = jax.nn.softmax(logits) if self.spec.scores == "softmax" else jax.nn.sigmoid(logits)
        choice = scores if self.correction is None else scores + self.correction[...]
        chosen = jax.lax.top_k(_within_groups(choice, self.spec), top_k)[1]
        weights = jnp.take_along_axis(scores, chosen, axis=1)
        if self.spec.renormalize:
            weights = weights / jnp.maximum(weights.sum(1, keepdims=True), 1e-20)
        return weights * self.spec.scale, chosen


def _within_groups(choice: jax.Array, spec: RouterSpec) -> jax.Array:
    """Scores f32[T, E], -inf outside the best groups."""
    if spec.top_groups == spec.num_groups:
        return choice
    T, E = choice.shape
    grouped = choice.reshape(T, spec.num_groups, -1)
    best = jax.lax.top_k(grouped, 1 if spec.group_score == "highest" else 2)[0].sum(-1)  # [T, groups]
    groups = jax.lax.top_k(best, spec.top_groups)[1]
    is_best = (groups[:, :, None] == jnp.arange(spec.num_groups)).any(1)
    return jnp.where(is_best[:, :, None], grouped, -jnp.inf).reshape(T, E)


def _sparsemixer(logits: jax.Array, jitter: float) -> tuple[jax.Array, jax.Array]:
    """The choice of two experts.

    Source: Liu et al. 2024 (GRIN), section 2.2, as transformers' Phi-MoE computes it when it does not train.
    """
    weights, chosen, left = [], [], logits
    for _ in range(2):
        best, top = left.argmax(-1, keepdims=True), left.max(-1, keepdims=True)
        far = (top - logits) / jnp.maximum(jnp.abs(logits), top) > 2 * jitter
        near = jax.nn.softmax(jnp.where(far, -jnp.inf, left))
        weights.append(jnp.take_along_axis(near, best, axis=1))
        chosen.append(best)
        left = jnp.put_along_axis(left, best, -jnp.inf, axis=1, inplace=False)
    return jnp.concatenate(weights, 1), jnp.concatenate(chosen, 1).astype(jnp.int32)
