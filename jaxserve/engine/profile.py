"""Traces of what device and host do, on demand, with jax's profiler; TensorBoard and Perfetto read them."""

from __future__ import annotations

import logging
import pathlib
import threading

import jax

from jaxserve.errors import UserError

log = logging.getLogger(__name__)


class Profiler:
    """At most one trace at a time, as jax has one profiler for the whole process.

    Args:
      directory: where traces go, each in a directory of its own.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._running = False

    def start(self) -> None:
        """Begin a trace. Raises: UserError with status 409 if one is under way."""
        with self._lock:
            if self._running:
                raise UserError(None, "a profile is under way; stop it first", code="profile_running", status=409)
            self._directory.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        log.info("profiling directory=%s", self._directory)

    def stop(self) -> None:
        """End the trace and write it. Raises: UserError with status 409 if none is under way."""
        with self._lock:
            if not self._running:
                raise UserError(None, "no profile is under way; start one first", code="profile_not_running", status=409)
            self._running = False
            jax.profiler.stop_trace()
        log.info("profile written directory=%s", self._directory)
