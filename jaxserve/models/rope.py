"""Rotary position embedding and its frequency scalings."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.spec import DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, NtkScaling, RopeSpec, YarnScaling


def rope_frequencies(spec: RopeSpec) -> np.ndarray:
    """Angle per position of each feature pair, f32[dim / 2].

    Raises: ValueError if spec.dim is odd.
    Source: Su et al. 2021 (RoFormer), section 3.4; Llama 3.1's reference code for its scaling; Peng et al. 2023 (YaRN), section 3;
      Ding et al. 2024 (LongRoPE); kexue.fm/archives/9706 (fixed and mixed NTK).
    """
    if spec.dim % 2:
        raise ValueError(f"rotary dimension {spec.dim} is odd")
    pairs = np.arange(0, spec.dim, 2, dtype=np.float64) / spec.dim
    frequencies = 1.0 / spec.theta**pairs
    match spec.scaling:
        case None:
            pass
        case LinearScaling(factor=factor):
            frequencies = frequencies / factor
        case Llama3Scaling():
            frequencies = _llama3(frequencies, spec.scaling)
        case YarnScaling():
            frequencies = _yarn(frequencies, spec.theta, spec.scaling)
        case DynamicScaling(factor=factor, original_len=original_len, max_len=max_len):
            stretch = factor * max(max_len, original_len) / original_len - (factor - 1)
            frequencies = 1.0 / (spec.theta * stretch ** (spec.dim / (spec.dim - 2))) ** pairs
        case LongRopeScaling(short=short, long=long, is_long=is_long):
            frequencies = frequencies / np.array(long if is_long else short)
        case NtkScaling(factor=factor, exponent=exponent):
            frequencies = frequencies / factor ** (np.arange(1, spec.dim // 2 + 1) * 2 / spec.dim) ** exponent
    return frequencies.astype(np.float32)


def _yarn(frequencies: np.ndarray, theta: float, scaling: YarnScaling) -> np.ndarray:
    dim = 2 * len(frequencies)
    turns = np.array([scaling.beta_fast, scaling.beta_slow])
    low, high = dim * np.log(scaling.original_len / (turns * 2 * math.pi)) / (2 * math.log(theta))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(len(frequencies)) - low) / ((high - low) or 0.001), 0.0, 1.0)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def _llama3(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    wavelength = 2 * math.pi / frequencies
    width = scaling.high_freq_factor - scaling.low_freq_factor or 1e-9  # Llama 4 has a step for a ramp
    ramp = (scaling.original_len / wavelength - scaling.low_freq_factor) / width
    smooth = np.clip(ramp, 0.0, 1.0)  # 0 below the low frequency, 1 above the high one
    return frequencies * (smooth + (1 - smooth) / scaling.factor)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Angles:
    """Cosine and signed sine, each f32[T, 1, 2, dim / 2], of a step's positions under every RopeSpec of the model."""

    specs: tuple[RopeSpec, ...] = dataclasses.field(metadata={"static": True})
    values: tuple[tuple[jax.Array, jax.Array], ...]


def rope_angles(positions: jax.Array, specs: tuple[RopeSpec, ...]) -> Angles:
    """The angles of positions i32[T], computed once for all layers."""
    return Angles(specs, tuple(_rotation(positions.astype(jnp.float32)[:, None, None] * rope_frequencies(spec), spec) for spec in specs))


def _rotation(angles: jax.Array, spec: RopeSpec) -> tuple[jax.Array, jax.Array]:
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if isinstance(spec.scaling, YarnScaling | LongRopeScaling):
        factor = spec.scaling.attention_factor
        if isinstance(spec.scaling, LongRopeScaling) and spec.scaling.is_long and spec.scaling.long_attention_factor is not None:
            factor = spec.scaling.long_attention_factor
        cos, sin = cos * factor, sin * factor
    return jnp.stack([cos] * 2, axis=2), jnp.stack([-sin, sin], axis=2)


def apply_rope(x: jax.Array, angles: Angles, spec: RopeSpec) -> jax.Array:
    """Rotate the first spec.dim features of each head by its position.

    Args:
      x: [T, N, H], any float dtype; computed in float32.
    """
    cos, sin = angles.values[angles.specs.index(spec)]
    T, N, H = x.shape
    if spec.interleaved:
        pairs = x[..., : spec.dim].reshape(T, N, spec.dim // 2, 2).swapaxes(2, 3).astype(jnp.float32)
        rotated = (pairs * cos + pairs[:, :, ::-1] * sin).astype(x.dtype).swapaxes(2, 3).reshape(T, N, spec.dim)
    else:
        halves = x[..., : spec.dim].reshape(T, N, 2, spec.dim // 2).astype(jnp.float32)
        rotated = (halves * cos + halves[:, :, ::-1] * sin).astype(x.dtype).reshape(T, N, spec.dim)
    return rotated if spec.dim == H else jnp.concatenate([rotated, x[..., spec.dim :]], axis=-1)
