"""Settings of the whole test run: JAX on the CPU, one compile cache shared by all runs, deterministic hypothesis."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import hypothesis
import pytest

from tests.memory_maps import drop_compiled_programs

_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jaxserve-tests" / "xla"

# Before anything imports jax, which reads them once; servers that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# A bound makes jax lock the directory and evict, so that two workers never read what the other has half written.
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 << 30))

# The same examples in every run, and no deadline: the first call of a jitted function compiles.
hypothesis.settings.register_profile("jaxserve", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "jaxserve"))


@pytest.fixture(autouse=True, scope="module")
def _drop_compiled_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a module has compiled is not kept for others."""
    yield
    for value in list(vars(request.module).values()):
        if getattr(value, "__module__", None) == request.module.__name__ and hasattr(value, "cache_clear"):
            value.cache_clear()
    drop_compiled_programs()
