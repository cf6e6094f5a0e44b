"""Compiled programs take memory maps, of which Linux gives a process 65,530: a tiny model's shape about 850."""

from __future__ import annotations

import gc
import pathlib
import sys

_MAPS = pathlib.Path("/proc/self/maps")  # there is none where there is no such limit
_MANY = 8_000  # which come with some 3 GB


def drop_compiled_programs() -> None:
    """Free what was compiled and is not in use, if it takes much: to look for it takes half a second."""
    if "jax" in sys.modules and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY:
        gc.collect()
        sys.modules["jax"].clear_caches()
