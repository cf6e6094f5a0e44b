"""Matrices in MXFP4 (GPT-OSS), read as numbers: blocks of 32 with four bits each, and a power of two for each block.

    X_blocks u8[..., rows, blocks, 16]    two numbers a byte, the first in the lower half
    X_scales u8[..., rows, blocks]        127 is a factor of 1, 128 of 2

Source: OCP Microscaling Formats 1.0, sections 5.3 and 6.3.
"""

from __future__ import annotations

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.weights.tensors import Checkpoint, CheckpointView, TensorInfo

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK_BYTES = 16
_HALF = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_NUMBERS = np.concatenate([_HALF, -_HALF])
_PAIRS = np.stack([_NUMBERS[np.arange(256) & 15], _NUMBERS[np.arange(256) >> 4]], axis=1)  # of each byte


class Mxfp4Checkpoint(CheckpointView):
    """Another checkpoint, whose pairs X_blocks and X_scales are one tensor of numbers each, under the name of the blocks."""

    def __init__(self, stored: Checkpoint, packed: set[str]) -> None:
        tensors: dict[str, TensorInfo] = {}
        for name, info in stored.tensors.items():
            if name in packed:
                *dims, blocks, _ = info.shape
                tensors[name] = TensorInfo(shape=(*dims, blocks * 2 * _BLOCK_BYTES), dtype="float32")
            elif _scales_of(name) not in packed:
                tensors[name] = info
        super().__init__(stored, tensors, packed=packed)

    def _unpack(self, name: str, start: int, stop: int) -> np.ndarray:
        scales = self._stored.read_rows(name.removesuffix(_BLOCKS) + _SCALES, start, stop)
        return dequantize(self._stored.read_rows(name, start, stop), scales)


def unpack_mxfp4(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its MXFP4 matrices as numbers; itself if it has none.

    Raises: ConfigError if blocks and scales do not fit each other.
    """
    packed: set[str] = set()
    for name, info in checkpoint.tensors.items():
        scales = checkpoint.tensors.get(name.removesuffix(_BLOCKS) + _SCALES) if name.endswith(_BLOCKS) else None
        if scales is None or info.dtype != "uint8" or scales.dtype != "uint8":
            continue
        if len(info.shape) < 3 or info.shape[-1] != _BLOCK_BYTES or info.shape[:-1] != scales.shape:
            checkpoint.close()
            raise ConfigError(f"{checkpoint.path}: {name} {info.shape} and its scales {scales.shape} are no MXFP4 matrix")
        packed.add(name)
    return Mxfp4Checkpoint(checkpoint, packed) if packed else checkpoint


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """f32[..., 32 * blocks] of u8[..., blocks, 16] and u8[..., blocks]."""
    numbers = _PAIRS[blocks].reshape(*blocks.shape[:-1], 2 * _BLOCK_BYTES)
    numbers *= np.ldexp(np.float32(1), scales.astype(np.int32) - 127)[..., None]
    return numbers.reshape(*blocks.shape[:-2], -1)


def _scales_of(name: str) -> str:
    """The name of the blocks that scales of this name belong to."""
    return name.removesuffix(_SCALES) + _BLOCKS if name.endswith(_SCALES) else ""
