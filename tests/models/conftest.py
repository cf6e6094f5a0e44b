"""What the tests of models share."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def _drop_compiled_programs_of_a_test() -> Iterator[None]:
    """Free what a test has compiled: a model takes about a thousand of the memory maps of which tests/conftest.py tells."""
    yield
    jax.clear_caches()
