"""Which of the processes that serve together this one is, and where process 0 is: as it was told, or as the cluster tells jax."""

from __future__ import annotations

import dataclasses

from jax._src.clusters import ClusterEnv

from jaxserve.config import ParallelConfig
from jaxserve.errors import ConfigError

_HOST_TIMEOUT_S = 300  # until the name of process 0's host is known


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One process's place in its group.

    Args:
      host, port: where process 0 can be reached, and where it awaits the others.
      count: processes that serve together.
      process: the number of this one, from 0.
    """

    host: str
    port: int
    count: int
    process: int


def find_place(parallel: ParallelConfig) -> Place | None:
    """The place of this process; None if it serves alone.

    Where no option says it, jax's detection of clusters does: of Slurm, slices of Cloud TPUs, Open MPI and Jobs of Kubernetes. Nothing else
    is left to jax, which could not keep out a process that comes late or is another, but would end all for it.

    Raises: ConfigError if jax detects none.
    """
    if not parallel.is_multihost:
        return None
    address, count, process = parallel.coordinator, parallel.num_processes, parallel.process_id
    if address is None or count is None or process is None:
        address, count, process = _detect()
    host, _, port = address.rpartition(":")
    return Place(host=host.strip("[]"), port=int(port), count=count, process=process)


def _detect() -> tuple[str, int, int]:
    """HOST:PORT of process 0, the number of processes and that of this one. The names used are those of jax 0.10.2 to 0.12.0."""
    try:
        address, count, process, _ = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, _HOST_TIMEOUT_S)
    except (RuntimeError, ValueError, LookupError, OSError, ImportError) as error:
        raise ConfigError(f"jax does not find the processes that serve together: {error!r}; {_SAY_IT}") from None
    if address is None or count is None or process is None:
        raise ConfigError(f"jax does not find the processes that serve together: it knows no cluster here; {_SAY_IT}")
    return address, count, process


_SAY_IT = "name them with --coordinator HOST:PORT, --num-processes and --process-id"
