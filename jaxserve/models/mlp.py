"""The feed-forward half of a layer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.linear import Linear
from jaxserve.models.spec import MlpSpec

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_sigmoid": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class Mlp(nnx.Module):
    """Feed-forward layer; gate and up are one matrix, rows [gate | up]."""

    def __init__(self, spec: MlpSpec, width: int, *, repeats: int, dtype: jnp.dtype) -> None:
        self.spec = spec
        if spec.gated:
            self.gate_up = Linear(width, 2 * spec.width, bias=spec.bias, repeats=repeats, dtype=dtype)
        else:
            self.up = Linear(width, spec.width, bias=spec.bias, repeats=repeats, dtype=dtype)
        self.down = Linear(spec.width, width, bias=spec.bias, repeats=repeats, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [T, D] to [T, D]."""
        activation = ACTIVATIONS[self.spec.activation]
        if not self.spec.gated:
            return self.down(activation(self.up(x)))
        hidden = self.gate_up(x)
        gate, up = hidden[:, : self.spec.width], hidden[:, self.spec.width :]
        return self.down(activation(gate) * up)
