"""Who and where this process is among those that serve together: as options say, or as jax reads it from Slurm or a slice of TPUs.

The detection is jax's own and not part of its public interface: these tests run it, on the oldest jax that is supported.
"""

from __future__ import annotations

import os

import pytest
from jax._src.clusters import cloud_tpu_cluster, cluster

from jaxserve.config import ParallelConfig
from jaxserve.engine.cluster import Place, find_place
from jaxserve.errors import ConfigError

AUTO = ParallelConfig(coordinator="auto")
CLUSTERS = ("SLURM_", "TPU_", "MEGASCALE_", "OMPI_", "KUBERNETES_", "JAX_COORDINATOR")
SLICE = {
    "agent-worker-number": "3",
    "worker-network-endpoints": "v:0:127.0.0.1,v:1:10.0.0.2,v:2:10.0.0.3,v:3:10.0.0.4",
    "tpu-env": "A: 'b'",
}


def slurm_task(count: int, process: int) -> dict[str, str]:
    """What `srun --ntasks COUNT` on this host sets for each task."""
    return {
        "SLURM_JOB_ID": "5001", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(count), "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process),
    }  # fmt: skip


def gke_worker(process: int) -> dict[str, str]:
    """What GKE sets for each pod of a slice of three hosts."""
    return {"TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_HOSTNAMES": "localhost,worker-1,worker-2", "TPU_WORKER_ID": str(process)}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the environment that this test runs in."""
    for name in [name for name in os.environ if name.startswith(CLUSTERS)]:
        monkeypatch.delenv(name)


def pretend_tpu_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Cloud TPU VM, of a slice of four, that has to be asked by its metadata."""
    for module in (cluster, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (SLICE[key], 200))


@pytest.mark.parametrize(("address", "host"), [("head:8476", "head"), ("[::1]:8476", "::1")])
def test_options_say_the_place_even_in_a_cluster(address: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm_task(3, 1).items():
        monkeypatch.setenv(name, value)
    asked = ParallelConfig(coordinator=address, num_processes=2, process_id=0)
    assert find_place(asked) == Place(host=host, port=8476, count=2, process=0)


@pytest.mark.parametrize("parallel", [ParallelConfig(), AUTO], ids=["default", "auto"])
@pytest.mark.parametrize(
    ("env", "place"),
    [
        (slurm_task(3, 1), Place(host="127.0.0.1", port=65535 - 4095 + 5001 % 4096, count=3, process=1)),
        (slurm_task(3, 1) | {"JAX_COORDINATOR_PORT": "99"}, Place(host="127.0.0.1", port=99, count=3, process=1)),
        (slurm_task(2, 0) | {"SLURM_STEP_NODELIST": "gpu[007-8],x"}, Place(host="gpu007", port=65535 - 4095 + 905, count=2, process=0)),
        (gke_worker(2), Place(host="localhost", port=8482, count=3, process=2)),
        (gke_worker(0) | {"TPU_PROCESS_ADDRESSES": "localhost:8471,b:8471"}, Place(host="localhost", port=8482, count=2, process=0)),
    ],
    ids=["slurm", "port", "slurm nodes", "gke", "gke addresses"],
)
def test_cluster_says_the_place(env: dict[str, str], place: Place, parallel: ParallelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    if "TPU_WORKER_ID" in env:
        pretend_tpu_vm(monkeypatch)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert find_place(parallel) == place


def test_cloud_tpu_slice_says_the_place_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_tpu_vm(monkeypatch)
    assert find_place(AUTO) == Place(host="127.0.0.1", port=8482, count=4, process=3)
    assert find_place(ParallelConfig()) is None, "a request to the metadata server is not for every start"


@pytest.mark.parametrize("broken", [{}, slurm_task(3, 1) | {"SLURM_NTASKS": "many"}], ids=["none", "slurm"])
def test_group_that_no_one_knows_is_refused(broken: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in broken.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"jax does not find the processes .*--coordinator HOST:PORT"):
        find_place(AUTO)
