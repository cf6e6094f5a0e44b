"""What the tests of models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.memory_maps import drop_compiled_programs


@pytest.fixture(autouse=True)
def _drop_compiled_programs_of_a_test() -> Iterator[None]:
    """A module compiles more than there are memory maps for."""
    yield
    drop_compiled_programs()
