"""Which devices serve a model, and how it is spread over them: the mesh asked for, or one that suits model and machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.spec import AttentionSpec, ModelSpec
from jaxserve.runner.memory import device_bytes, num_bytes
from jaxserve.runner.programs import Programs, Target, platform_of
from jaxserve.sharding import Device, Split, one_copy

_ROOM_FOR_WEIGHTS = 0.8  # of what may be used of a device: the rest is for the cache and temporaries


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeshPlan:
    """How a model is spread over devices.

    Args:
      targets: where each copy lies, one for each index of the data axis.
      reason: for people.
    """

    data: int
    split: Split
    reason: str
    targets: tuple[Target, ...]

    def table(self) -> str:
        """One line for the start-up log."""
        axes = f"data={self.data} expert={self.split.expert} tensor={self.split.tensor}"
        return f"mesh {axes}: {self.data * self.split.num_devices} devices, {self.reason}"


def plan_mesh(config: EngineConfig, spec: ModelSpec, devices: Sequence[Device] | None = None) -> MeshPlan:
    """Choose the mesh.

    Args:
      devices: those at hand; default: what jax has. The devices of a copy are taken evenly from all processes.
    Raises: ConfigError if the mesh asked for does not fit the devices or the model.
    """
    devices = jax.devices() if devices is None else devices
    num_hosts, asked = len({device.process_index for device in devices}), config.parallel.axes
    if asked:
        data, split, reason = asked.get("data", 1), Split(expert=asked.get("expert", 1), tensor=asked.get("tensor", 1)), "as asked for"
        if "tensor" not in asked and "expert" not in asked and len(devices) % data == 0:
            split, reason = _fitting(config, spec, devices[: len(devices) // data], num_hosts, reason)
    else:
        split, reason = _fitting(config, spec, devices, num_hosts, "")
        data = len(devices) // split.num_devices
    check_split(spec, split)
    if data * split.num_devices > len(devices):
        raise ConfigError(f"a mesh of {data * split.num_devices} devices was asked for, but there are {len(devices)}")
    copies = _deal(devices, data, split)
    memory_bytes = device_bytes([device for copy in copies for device in copy if device.process_index == jax.process_index()])
    platform = platform_of(devices[0])
    targets = tuple(Target(platform=platform, sharding=one_copy(copy, split), memory_bytes=memory_bytes) for copy in copies)
    return MeshPlan(data=data, split=split, reason=reason, targets=targets)


def check_split(spec: ModelSpec, split: Split) -> None:
    """Refuse what cannot be dealt out.

    Raises: ConfigError.
    """
    if split.num_devices == 1:
        return
    if _norms_all_heads(spec):
        raise ConfigError(
            "this model normalizes the queries of all heads as one vector, which tensor parallelism would take apart; "
            "spread it with --mesh data=N"
        )


def _norms_all_heads(spec: ModelSpec) -> bool:
    attentions = [layer.attention for layer in spec.layers]
    return any(isinstance(a, AttentionSpec) and a.qk_norm is not None and a.qk_norm.over == "width" for a in attentions)


def _fitting(config: EngineConfig, spec: ModelSpec, devices: Sequence[Device], num_hosts: int, reason: str) -> tuple[Split, str]:
    """Devices on the tensor axis, up to the number of KV heads; more if weights need them, or hosts would have no equal parts."""
    if _norms_all_heads(spec):
        return Split(), reason or "its heads are normalized together, so each device has a copy"
    heads = min(
        layer.attention.num_kv_heads if isinstance(layer.attention, AttentionSpec) else layer.attention.num_heads for layer in spec.layers
    )
    sizes = [size for size in range(1, len(devices) + 1) if len(devices) % size == 0 and (size % num_hosts == 0 or size == len(devices))]
    tensor, found = max((size for size in sizes if size <= heads), default=sizes[0]), f"{heads} KV heads"
    if tensor > heads:
        found += f", but each of {num_hosts} processes takes part in every copy"
    own = [device for device in devices if device.process_index == jax.process_index()]
    room = _ROOM_FOR_WEIGHTS * config.cache.memory_utilization * device_bytes(own)
    while tensor < len(devices) and _weight_bytes(config, spec, devices, tensor) > room:
        tensor, found = min(size for size in sizes if size > tensor), f"{heads} KV heads, but the weights need more devices"
    return Split(tensor=tensor), reason or found


def _weight_bytes(config: EngineConfig, spec: ModelSpec, devices: Sequence[Device], tensor: int) -> int:
    split = Split(tensor=tensor)
    programs = Programs(spec, config, Target(platform=platform_of(devices[0]), sharding=one_copy(devices[:tensor], split)))
    return num_bytes(programs.param_shapes.values())


def _deal(devices: Sequence[Device], data: int, split: Split) -> list[list[Device]]:
    """The devices of each copy: an equal part of each process's, so that every process has a part of every copy."""
    by_process: dict[int, list[Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    each, rest = divmod(split.num_devices, len(by_process))
    if rest or any(len(own) < each * data for own in by_process.values()):
        raise ConfigError(
            f"{len(by_process)} hosts cannot share {data} copies of {split.num_devices} devices evenly; "
            f"choose tensor and expert so that their product is a multiple of {len(by_process)}"
        )
    return [[device for own in by_process.values() for device in own[i * each : (i + 1) * each]] for i in range(data)]
