"""Rotary angles against transformers' own frequencies."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxserve.models.rope import apply_rope, rope_angles, rope_frequencies
from jaxserve.models.spec import LinearScaling, Llama3Scaling, NtkScaling, RopeSpec

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def test_llama3_frequencies_equal_those_of_transformers() -> None:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=512, rope_parameters={**LLAMA3, "rope_theta": 5000.0}
    )
    expected, factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_len=64)
    np.testing.assert_allclose(rope_frequencies(RopeSpec(dim=32, theta=5000.0, scaling=scaling)), expected.numpy(), rtol=1e-6)
    assert factor == 1.0


def test_linear_scaling_divides_positions() -> None:
    plain, scaled = RopeSpec(dim=8, theta=100.0), RopeSpec(dim=8, theta=100.0, scaling=LinearScaling(factor=4.0))
    a = rope_angles(jnp.array([3]), (plain,)).values[0]
    b = rope_angles(jnp.array([12]), (scaled,)).values[0]
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("mixed_b", [None, 0.75])
def test_ntk_frequencies_equal_those_of_their_definition(mixed_b: float | None) -> None:
    dim, theta, factor = 12, 500.0, 8.0
    exponents = np.arange(0, dim, 2) / dim
    if mixed_b is None:  # a larger base, then all divided
        expected = 1 / (theta * factor) ** exponents / factor ** (2 / dim)
    else:
        a = math.log(factor) / (dim / 2) ** mixed_b
        expected = 1 / theta**exponents / np.exp(a * np.arange(1, dim // 2 + 1) ** mixed_b)
    found = rope_frequencies(RopeSpec(dim=dim, theta=theta, scaling=NtkScaling(factor=factor, exponent=mixed_b or 1.0)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_rotation_keeps_scores_a_function_of_distance() -> None:
    spec = RopeSpec(dim=6, theta=50.0)
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 10)).astype(np.float32)  # 4 features beyond dim stay as they are

    def score(q_position: int, k_position: int) -> float:
        angles = rope_angles(jnp.array([q_position, k_position]), (spec,))
        rotated = apply_rope(jnp.concatenate([q, k]), angles, spec)
        return float((rotated[0] * rotated[1]).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 8), abs=1e-3)


def test_odd_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        rope_frequencies(RopeSpec(dim=7, theta=10.0))
