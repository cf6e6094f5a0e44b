"""How many pages fit, and the table of where memory goes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np
import psutil
from jax.experimental import multihost_utils

from jaxserve.config import CacheConfig
from jaxserve.errors import ConfigError
from jaxserve.sharding import Device

_ADVICE = (
    "spread the model over more devices (--mesh tensor=N), take a smaller one, lower --max-rows, --max-step-tokens, --num-pages or "
    "--cache-bytes, or raise --memory-utilization"
)
CPU_CACHE_BYTES = 4 << 30  # a CPU shares its memory with everything else


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes on one device, and the pages that they leave room for."""

    total: int
    weights: int
    cache: int
    state: int
    temporaries: int
    num_pages: int

    def table(self) -> str:
        """One line per use of memory, and what is free."""
        rows = {"weights": self.weights, "cache": self.cache, "sampling state": self.state, "temporaries": self.temporaries}
        rows["free"] = self.total - sum(rows.values())
        lines = [f"  {name:<15}{size / 2**30:>9.3f} GiB  {100 * size / max(self.total, 1):>5.1f} %" for name, size in rows.items()]
        return "\n".join([f"memory of one device: {self.total / 2**30:.3f} GiB, {self.num_pages} cache pages", *lines])

    def check(self) -> None:
        """Raises: ConfigError, with the table, if all that is needed is more than there is."""
        if self.weights + self.cache + self.state + self.temporaries > self.total:
            raise ConfigError(f"weights, cache and temporaries do not fit:\n{self.table()}\n{_ADVICE}")


def num_bytes(leaves: Iterable[jax.ShapeDtypeStruct]) -> int:
    """Bytes of abstract arrays."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def device_bytes(devices: Sequence[Device]) -> int:
    """Memory of the smallest of some devices of this process, all of them in use; those of a CPU share the machine's."""
    if devices[0].platform == "cpu":
        return psutil.virtual_memory().available // len(devices)
    return min((device.memory_stats() or {"bytes_limit": 0})["bytes_limit"] for device in devices)


def least_of_all(number: int) -> int:
    """The smallest of a number in all processes that serve together."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.array(number)).min())


def plan_memory(
    cache: CacheConfig, *, total: int, on_cpu: bool, weights: int, state: int, temporaries: int, page_bytes: int, page_size: int,
    max_len: int, max_pages: int,
) -> MemoryPlan:  # fmt: skip
    """Divide one device's memory.

    Args:
      total: bytes of it; on a CPU the cache takes 4 GiB of it at most unless told to take more.
      weights, state, temporaries: bytes that are needed whatever the cache.
      page_bytes: of one page over all layers.
      max_pages: more than this the scheduler could never use.
    Raises: ConfigError if no useful cache fits.
    """
    room = int(total * cache.memory_utilization) - weights - state - temporaries
    if cache.num_pages is not None:
        num_pages = cache.num_pages
    elif cache.cache_bytes is not None:
        num_pages = cache.cache_bytes // page_bytes
    else:
        num_pages = min(min(room, CPU_CACHE_BYTES) if on_cpu else room, max_pages * page_bytes) // page_bytes
    needed = 2 if cache.num_pages or cache.cache_bytes else 1 + -(-min(max_len, 256) // page_size)
    fits = needed <= num_pages and num_pages * page_bytes <= max(room, 0)
    num_pages = max(num_pages, needed)
    plan = MemoryPlan(total=total, weights=weights, cache=num_pages * page_bytes, state=state, temporaries=temporaries, num_pages=num_pages)
    if not fits:
        share = f"of each device {cache.memory_utilization:.0%} may be used, a page takes {page_bytes} bytes"
        raise ConfigError(f"weights, cache and temporaries do not fit; {share}:\n{plan.table()}\n{_ADVICE}")
    return plan
