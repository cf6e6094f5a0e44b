"""The feed-forward half of a layer."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.linear import Linear
from jaxserve.models.mlp_spec import Activation, ClampedSwiglu, MlpSpec
from jaxserve.sharding import WHOLE, Split

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_sigmoid": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def activate(hidden: jax.Array, spec: MlpSpec) -> jax.Array:
    """Numbers [T, F] for the projection down, of [T, 2F], columns [gate | up], or of [T, F] if not gated."""
    if not spec.gated:
        return _function(spec.activation)(hidden)
    gate, up = jnp.split(hidden, 2, axis=1)
    if isinstance(spec.activation, ClampedSwiglu):
        limit = spec.activation.limit
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit) + 1
    return _function(spec.activation)(gate) * up


def _function(activation: Activation | ClampedSwiglu) -> Callable[[jax.Array], jax.Array]:
    if isinstance(activation, ClampedSwiglu):
        return lambda x: x * jax.nn.sigmoid(activation.alpha * x)
    return ACTIVATIONS[activation]


class Mlp(nnx.Module):
    """Feed-forward layer; gate and up are one matrix, rows [gate | up], of which each device has its part of both."""

    def __init__(self, spec: MlpSpec, width: int, *, repeats: int, dtype: jnp.dtype, split: Split = WHOLE) -> None:
        self.spec = spec
        if spec.gated:
            cut = split.even("mlp", 0, spec.width, spec.width)
            self.gate_up = Linear(width, 2 * spec.width, bias=spec.bias, repeats=repeats, dtype=dtype, cut=cut)
        else:
            self.up = Linear(width, spec.width, bias=spec.bias, repeats=repeats, dtype=dtype, cut=split.even("mlp", 0, spec.width))
        self.down = Linear(spec.width, width, bias=spec.has_down_bias, repeats=repeats, dtype=dtype, cut=split.even("mlp", 1, spec.width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [T, D] to [T, D]."""
        return self.down(activate((self.gate_up if self.spec.gated else self.up)(x), self.spec))
