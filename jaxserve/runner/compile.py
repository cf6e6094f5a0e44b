"""Ahead-of-time compilation of every shape, in parallel threads, and the counter that proves nothing compiles later."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxserve.metrics import Metrics
from jaxserve.runner.executables import sources, use_directory

_CACHE_BYTES = 4 << 30


def use_compile_cache(directory: pathlib.Path) -> None:
    """Let jax keep the programs that are not of a runner, or that a runner could not keep, in a directory.

    Each version of jaxserve has its own there: what another one left would not be compiled, and so not be kept whole.
    """
    chosen = use_directory(directory / f"jax-{sources()[:16]}")
    if chosen is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    # With a bound jax takes a lock to write, so that several servers can share the directory.
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def count_compiles(metrics: Metrics) -> None:
    """Count every program that jax compiles, or fetches from its cache, in this process from here on."""
    target = weakref.ref(metrics)  # jax keeps its listeners for ever

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        living = target()
        if living is not None and event == "/jax/core/compile/backend_compile_duration":
            living.compiles.inc()

    jax.monitoring.register_event_duration_secs_listener(listen)


def compile_all(
    programs: Mapping[str, Callable[[], Any]], *, threads: int | None, progress: Callable[[int, int, str], None]
) -> dict[str, Any]:
    """Compile named programs.

    Args:
      programs: name -> function that lowers and compiles; started in this order.
      threads: how many at a time; None is one per core, at most 8.
      progress: called with (done, all, name) as each is ready.
    Returns: name -> executable.
    """
    workers = threads or min(os.cpu_count() or 1, 8)
    compiled: dict[str, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="compile") as pool:
        futures = {pool.submit(build): name for name, build in programs.items()}
        try:
            for future in concurrent.futures.as_completed(futures):
                compiled[futures[future]] = future.result()
                progress(len(compiled), len(programs), futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return compiled
