"""The layer with experts, against a loop over tokens and experts in numpy; its parity with transformers is in test_parity.py."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.models.linear import WholeParam
from jaxserve.models.mlp_spec import ClampedSwiglu, MlpSpec, MoeSpec, RouterSpec
from jaxserve.models.moe import Moe, Router

D, F, E, K = 12, 7, 5, 2
LAYER = 1  # of three in the group
PLAIN = MoeSpec(num_experts=E, top_k=K, expert=MlpSpec(width=F, activation="silu"), router=RouterSpec())
SPECS = {
    "plain": PLAIN,
    "renormalized, scaled": dataclasses.replace(PLAIN, router=RouterSpec(renormalize=True, scale=2.5)),
    "biases, clamped": dataclasses.replace(
        PLAIN, expert=MlpSpec(width=F, activation=ClampedSwiglu(alpha=1.3, limit=0.7), bias=True), router=RouterSpec(bias=True)
    ),
    "weighed inputs": dataclasses.replace(PLAIN, router=RouterSpec(scores="sigmoid"), weigh_inputs=True),
    "shared": dataclasses.replace(PLAIN, shared=MlpSpec(width=4, activation="gelu")),
    "gated shared": dataclasses.replace(PLAIN, shared=MlpSpec(width=4, activation="gelu"), shared_gate=True),
    "all experts": dataclasses.replace(PLAIN, top_k=E),
}


def filled(module: nnx.Module, seed: int = 0) -> nnx.Module:
    """The module with random parameters, as the layer loop hands it out: without the axis of repeats, but for what it takes whole."""
    graphdef, whole, sliced = nnx.split(module, WholeParam, ...)
    rng = np.random.default_rng(seed)
    whole = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), whole)
    return nnx.merge(graphdef, whole, jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape[1:]), leaf.dtype), sliced))


def build(spec: MoeSpec, seed: int = 0) -> Moe:
    module = filled(Moe(spec, D, repeats=LAYER + 2, dtype=jnp.dtype("float32"), platform="cpu"), seed)
    assert isinstance(module, Moe)
    return module


@jax.jit
def run_plain(x: jax.Array) -> jax.Array:
    """Tokens [T, D] through the plain layer."""
    return build(PLAIN)(x, jnp.int32(LAYER), jnp.ones(len(x), bool))


def tokens(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, D)).astype(np.float32)


def gated(hidden: np.ndarray, spec: MlpSpec) -> np.ndarray:
    gate, up = np.split(hidden, 2)
    match spec.activation:
        case ClampedSwiglu(alpha=alpha, limit=limit):
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            return gate / (1 + np.exp(-alpha * gate)) * (up + 1)
        case _:
            return gate / (1 + np.exp(-gate)) * up


def by_hand(moe: Moe, x: np.ndarray) -> np.ndarray:
    """Every token through each of its experts, one after the other."""
    weights, chosen = (np.asarray(found) for found in moe.router(jnp.asarray(x), moe.spec.top_k))
    experts, out = moe.experts, np.zeros_like(x)
    for t, token in enumerate(x):
        for weight, e in zip(weights[t], chosen[t], strict=True):
            given = token * weight if moe.spec.weigh_inputs else token
            hidden = given @ np.asarray(experts.gate_up[...])[LAYER, e]
            if experts.gate_up_bias is not None:
                hidden = hidden + np.asarray(experts.gate_up_bias[...])[LAYER, e]
            result = gated(hidden, moe.spec.expert) @ np.asarray(experts.down[...])[LAYER, e]
            if experts.down_bias is not None:
                result = result + np.asarray(experts.down_bias[...])[LAYER, e]
            out[t] += result if moe.spec.weigh_inputs else weight * result
    if moe.shared is not None:
        shared = np.asarray(moe.shared(jnp.asarray(x)))
        gate = 1.0 if moe.shared_gate is None else 1 / (1 + np.exp(-np.asarray(moe.shared_gate(jnp.asarray(x)))))
        out += gate * shared
    return out


@pytest.mark.parametrize("name", SPECS)
def test_tokens_go_through_their_experts(name: str) -> None:
    moe, x = build(SPECS[name]), tokens(9)
    np.testing.assert_allclose(nnx.jit(moe)(jnp.asarray(x), jnp.int32(LAYER), jnp.ones(9, bool)), by_hand(moe, x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SPECS)
def test_padding_of_any_kind_changes_nothing(name: str) -> None:
    moe, x = build(SPECS[name]), tokens(6)
    alone = nnx.jit(moe)(jnp.asarray(x), jnp.int32(LAYER), jnp.ones(6, bool))
    padded = np.concatenate([x, np.full((5, D), np.nan, np.float32)])
    found = nnx.jit(moe)(jnp.asarray(padded), jnp.int32(LAYER), jnp.arange(11) < 6)
    # XLA may sum 6 and 11 rows in another order: an ulp of terms up to 12 is 1e-6.
    np.testing.assert_allclose(found[:6], alone, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from((1, 12)))
def test_a_token_gets_the_same_whatever_its_company(seed: int, company: int) -> None:
    x = tokens(1)
    others = np.random.default_rng(seed).standard_normal((company, D)).astype(np.float32)
    crowd = np.concatenate([others, x, np.repeat(x, 3, axis=0)])  # all of them to the same experts, too
    found = np.asarray(run_plain(jnp.asarray(crowd)))
    np.testing.assert_allclose(found[company:], np.repeat(run_plain(jnp.asarray(x)), 4, axis=0), rtol=1e-5, atol=1e-5)


def choose(spec: RouterSpec, logits: list[list[float]], top_k: int, correction: list[float] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Weights and experts for tokens whose logits are given."""
    E = len(logits[0])
    router = filled(Router(spec, E, E, repeats=1, dtype=jnp.dtype("float32")))
    assert isinstance(router, Router)
    router.weight[...] = jnp.eye(E)
    if correction is not None:
        assert router.correction is not None
        router.correction[...] = jnp.array(correction)
    weights, chosen = router(jnp.array(logits, jnp.float32), top_k)
    return np.asarray(weights), np.asarray(chosen)


def test_correction_moves_the_choice_and_not_the_weight() -> None:
    spec = RouterSpec(scores="sigmoid", correction=True)
    weights, chosen = choose(spec, [[0.0, 1.0, 2.0, 3.0]], 1, [9.0, 0.0, 0.0, 0.0])
    assert chosen.tolist() == [[0]]
    assert weights.tolist() == [[0.5]]


def test_groups_are_ranked_by_their_best_or_their_best_two() -> None:
    logits = [[9.0, 0.0, 0.0, 5.0, 5.0, 4.0]]  # groups of three
    highest = RouterSpec(scores="sigmoid", num_groups=2, top_groups=1)
    assert choose(highest, logits, 2)[1].tolist() == [[0, 1]]
    assert choose(dataclasses.replace(highest, group_score="two_highest"), logits, 2)[1].tolist() == [[3, 4]]


def test_sparsemixer_weighs_each_among_experts_near_it() -> None:
    weights, chosen = choose(RouterSpec(scores="sparsemixer", jitter=0.1), [[10.0, 9.0, 5.0]], 2)
    assert chosen.tolist() == [[0, 1]]
    assert weights[0, 0] == pytest.approx(1 / (1 + np.exp(-1)))  # 9 is within a fifth of 10
    assert weights[0, 1] == 1  # 5 is not within a fifth of 9
