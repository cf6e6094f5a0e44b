"""How a model is spread over the devices at hand when no one says it, and what the start-up log says of it."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest

from jaxserve.config import make_config
from jaxserve.errors import ConfigError
from jaxserve.models.families import find_family
from jaxserve.models.hf_config import HfConfig
from jaxserve.runner import mesh
from tests.runner.published import LLAMA_8B

GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    memory_kind: None = None


def table_of(devices: int, hosts: int, memory_gib: int, model: dict[str, Any], options: dict[str, Any]) -> str:
    given = HfConfig(model)
    spec = find_family(given).spec(given)
    chips = [Chip(id=i, process_index=i * hosts // devices) for i in range(devices)]
    with mock.patch.object(mesh, "device_bytes", return_value=memory_gib * GIB):
        plan = mesh.plan_mesh(make_config({"layer_loop": "scan", **options}), spec, chips)
    for target in plan.targets:  # every host has an equal part of every copy
        owners = [chip.process_index for chip in target.sharding.device_set]
        assert {owners.count(host) for host in range(hosts)} == {len(owners) // hosts}
    return plan.table()


@pytest.mark.parametrize(
    ("devices", "hosts", "memory_gib", "heads", "options", "table"),
    [
        (8, 1, 32, 8, {}, "mesh data=1 expert=1 tensor=8: 8 devices, 8 KV heads"),
        (8, 1, 32, 2, {}, "mesh data=4 expert=1 tensor=2: 8 devices, 2 KV heads"),
        (8, 1, 8, 2, {}, "mesh data=2 expert=1 tensor=4: 8 devices, 2 KV heads, but the weights need more devices"),
        (16, 4, 32, 8, {}, "mesh data=2 expert=1 tensor=8: 16 devices, 8 KV heads"),
        (16, 4, 32, 2, {}, "mesh data=4 expert=1 tensor=4: 16 devices, 2 KV heads, but each of 4 processes takes part in every copy"),
        (8, 8, 32, 2, {}, "mesh data=1 expert=1 tensor=8: 8 devices, 2 KV heads, but each of 8 processes takes part in every copy"),
        (8, 2, 32, 8, {"data_parallel_size": 2}, "mesh data=2 expert=1 tensor=4: 8 devices, as asked for"),
        (8, 1, 32, 8, {"mesh": "tensor=4"}, "mesh data=1 expert=1 tensor=4: 4 devices, as asked for"),
    ],
)
def test_devices_are_spread_and_the_log_says_why(
    devices: int, hosts: int, memory_gib: int, heads: int, options: dict[str, Any], table: str
) -> None:
    assert table_of(devices, hosts, memory_gib, LLAMA_8B | {"num_key_value_heads": heads}, options) == table


@pytest.mark.parametrize(
    ("hosts", "options", "named"),
    [
        (1, {"mesh": "tensor=16"}, "a mesh of 16 devices was asked for, but there are 8"),
        (4, {"mesh": "data=4,tensor=2"}, "4 hosts cannot share 4 copies of 2 devices evenly"),
    ],
)
def test_mesh_that_the_devices_do_not_make_is_refused(hosts: int, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        table_of(8, hosts, 32, LLAMA_8B, options)
