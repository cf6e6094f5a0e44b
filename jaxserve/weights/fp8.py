"""Matrices in FP8 with a scale for each block (DeepSeek V3, Qwen 3 FP8), read as numbers.

X.weight             e4m3[..., rows, columns]
X.weight_scale_inv   [..., row blocks, column blocks], or one number; by which the block's numbers are multiplied
X.activation_scale   of the layer's inputs, which are not quantized here: left out
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.weights.tensors import Checkpoint, CheckpointView, TensorInfo

E4M3 = "float8_e4m3fn"
_SCALE, _INPUT_SCALES = "_scale_inv", (".activation_scale", ".input_scale")
_NUMBERS = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


class Fp8Checkpoint(CheckpointView):
    """Another checkpoint, whose pairs of matrix and scales are one tensor of numbers each, under the name of the matrix.

    Args:
      packed: names of those matrices.
      block: rows and columns of a block.
    """

    def __init__(self, stored: Checkpoint, packed: set[str], block: tuple[int, int]) -> None:
        self._block = block
        left_out = {f"{name}{_SCALE}" for name in packed} | {
            name.removesuffix(".weight") + ending for name in packed for ending in _INPUT_SCALES
        }
        tensors = {
            name: TensorInfo(shape=info.shape, dtype="float32") if name in packed else info
            for name, info in stored.tensors.items()
            if name not in left_out
        }
        super().__init__(stored, tensors, packed=packed)

    def _unpack(self, name: str, start: int, stop: int) -> np.ndarray:
        stored = self._stored.read_rows(name, start, stop)
        scales = self._stored.read(f"{name}{_SCALE}").astype(np.float32)
        if stored.ndim > 2:
            scales, first = (scales[start:stop] if scales.ndim else scales), 0
        else:
            first = start
        return dequantize(stored, scales, self._block, first)


def unpack_fp8(checkpoint: Checkpoint, block: tuple[int, int]) -> Checkpoint:
    """The checkpoint with its FP8 matrices as numbers; itself if it has none.

    Raises: ConfigError listing matrices without scales, or whose scales do not fit blocks of this size.
    """
    packed = {name for name, info in checkpoint.tensors.items() if info.dtype == E4M3}
    problems: list[str] = []
    for name in sorted(packed):
        shape, scales = checkpoint.tensors[name].shape, checkpoint.tensors.get(f"{name}{_SCALE}")
        fitting = (*shape[:-2], *(-(-size // of) for size, of in zip(shape[-2:], block, strict=False)))
        if scales is None or len(shape) < 2 or scales.shape not in ((), fitting):
            found = "no scales" if scales is None else f"scales {scales.shape}"
            problems.append(f"{name} {shape} is in FP8 and has {found}, not {name}{_SCALE} {fitting} for blocks of {block}")
    if problems:
        checkpoint.close()
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ConfigError(f"cannot read the checkpoint {checkpoint.path}:\n  " + "\n  ".join(problems[:10]) + more)
    return Fp8Checkpoint(checkpoint, packed, block) if packed else checkpoint


def dequantize(stored: np.ndarray, scales: np.ndarray, block: tuple[int, int], first: int = 0) -> np.ndarray:
    """f32[..., R, C] of e4m3[..., R, C] and the scales of its blocks, or of everything.

    Args:
      first: row of the matrix at which the numbers begin.
    """
    numbers = _NUMBERS[stored.view(np.uint8)]
    if not scales.ndim:
        numbers *= scales
        return numbers
    num_rows, num_columns = stored.shape[-2:]
    for row in range(-(first % block[0]), num_rows, block[0]):
        of_columns = np.repeat(scales[..., (first + row) // block[0], :], block[1], axis=-1)[..., None, :num_columns]
        numbers[..., max(row, 0) : row + block[0], :] *= of_columns
    return numbers
