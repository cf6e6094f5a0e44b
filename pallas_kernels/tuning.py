"""What the chip at hand allows, and block sizes measured for it: data in tuned/<device>.json, written by scripts/tune_kernels.py."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import jax
from jax.experimental.pallas import tpu as pltpu

TUNED = pathlib.Path(__file__).parent / "tuned"
MIB = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TpuLimits:
    """Memories of one TPU core, in bytes, and the name under which tuned block sizes are kept."""

    name: str
    vmem_bytes: int
    smem_bytes: int

    @property
    def vmem_budget(self) -> int:
        """What one kernel may plan with: the compiler needs the rest for spills, and XLA for operands of its own."""
        return min(self.vmem_bytes * 5 // 8, 48 * MIB)

    @property
    def vmem_limit(self) -> int:
        """What the compiler may use for one kernel before it refuses."""
        return self.vmem_bytes * 7 // 8

    @property
    def smem_budget(self) -> int:
        """What one kernel may prefetch as scalars."""
        return self.smem_bytes // 2


# The least of every TPU that runs Mosaic kernels: plans made with it fit them all.
SMALLEST_TPU = TpuLimits(name="tpu", vmem_bytes=16 * MIB, smem_bytes=MIB)


def tpu_limits() -> TpuLimits:
    """Limits of the TPU that is being compiled for; the smallest TPU's where it is unknown, as in interpret mode on a CPU."""
    try:
        found = pltpu.get_tpu_info()
    except (NotImplementedError, ValueError):
        return SMALLEST_TPU
    return TpuLimits(name=f"tpu_{found.chip_version}", vmem_bytes=found.vmem_capacity_bytes, smem_bytes=found.smem_capacity_bytes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GpuLimits:
    """What one block of threads has, and the name under which tuned block sizes are kept."""

    name: str
    shared_bytes: int
    converts_float8: bool
    is_hopper: bool = False


KIB = 1 << 10
# The least of every GPU from Ampere on: plans made with it fit them all.
SMALLEST_GPU = GpuLimits(name="gpu", shared_bytes=99 * KIB, converts_float8=False)
# By the first words of the device's kind; shared memory per block from the compute capabilities of the CUDA C++ programming guide.
_GPUS = (
    (("A100", "A800"), 163 * KIB, False, False),
    (("H100", "H200", "H800", "H20", "GH200"), 227 * KIB, True, True),
    (("B100", "B200", "B300", "GB200", "GB300"), 227 * KIB, True, False),
    (("L4", "L40", "L40S"), 99 * KIB, True, False),
)


def gpu_limits() -> GpuLimits | None:
    """Limits of the GPU that is being compiled for, the smallest GPU's where it is unknown; None where it is no GPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda", "rocm"):
        return None
    words = device.device_kind.replace("-", " ").split()
    name = "_".join(words).lower()
    for names, shared_bytes, converts_float8, is_hopper in _GPUS:
        if any(word in names for word in words):
            return GpuLimits(name=name, shared_bytes=shared_bytes, converts_float8=converts_float8, is_hopper=is_hopper)
    return dataclasses.replace(SMALLEST_GPU, name=name)


def tuned(device: str, op: str, key: str) -> dict[str, int] | None:
    """Measured block sizes of an op for a device and a key made of shapes, or None: the caller's heuristic decides."""
    return _table(device).get(op, {}).get(key)


@functools.cache
def _table(device: str) -> dict[str, dict[str, dict[str, int]]]:
    path = TUNED / f"{device}.json"
    return json.loads(path.read_text()) if path.is_file() else {}
