"""Rotary position embedding and its frequency scalings."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.spec import LinearScaling, Llama3Scaling, RopeSpec


def rope_frequencies(spec: RopeSpec) -> np.ndarray:
    """Angle per position of each feature pair, f32[dim / 2].

    Raises: ValueError if spec.dim is odd.
    Source: Su et al. 2021 (RoFormer), section 3.4; Llama 3.1's reference code for its scaling.
    """
    if spec.dim % 2:
        raise ValueError(f"rotary dimension {spec.dim} is odd")
    frequencies = 1.0 / spec.theta ** (np.arange(0, spec.dim, 2, dtype=np.float64) / spec.dim)
    match spec.scaling:
        case None:
            pass
        case LinearScaling(factor=factor):
            frequencies = frequencies / factor
        case Llama3Scaling():
            frequencies = _llama3(frequencies, spec.scaling)
    return frequencies.astype(np.float32)


def _llama3(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    wavelength = 2 * math.pi / frequencies
    ramp = (scaling.original_len / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(ramp, 0.0, 1.0)  # 0 below the low frequency, 1 above the high one
    return frequencies * (smooth + (1 - smooth) / scaling.factor)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Angles:
    """Cosine and sine, each f32[T, 1, dim / 2], of a step's positions under every RopeSpec of the model."""

    specs: tuple[RopeSpec, ...] = dataclasses.field(metadata={"static": True})
    values: tuple[tuple[jax.Array, jax.Array], ...]


def rope_angles(positions: jax.Array, specs: tuple[RopeSpec, ...]) -> Angles:
    """The angles of positions i32[T], computed once for all layers."""
    angles = [positions.astype(jnp.float32)[:, None, None] * rope_frequencies(spec) for spec in specs]
    return Angles(specs, tuple((jnp.cos(a), jnp.sin(a)) for a in angles))


def apply_rope(x: jax.Array, angles: Angles, spec: RopeSpec) -> jax.Array:
    """Rotate the first spec.dim features of each head by its position.

    Args:
      x: [T, N, H], any float dtype; computed in float32.
    """
    cos, sin = angles.values[angles.specs.index(spec)]
    half = cos.shape[-1]
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return rotated if 2 * half == x.shape[-1] else jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)
