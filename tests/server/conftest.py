"""One server for most tests of this folder, and a directory for the logs of others."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from tests.server.process import ServerProcess, serving


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where servers write their logs."""
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def server(logs: pathlib.Path) -> Iterator[ServerProcess]:
    """A running server with default limits; tests leave it idle and as it was."""
    with serving(logs) as running:
        yield running


@pytest.fixture(scope="session")
def guarded(logs: pathlib.Path) -> Iterator[ServerProcess]:
    """A running server with keys, CORS for one origin, and a short queue."""
    options = ("--api-key", "sésame,other-key", "--metrics-auth", "--cors-origins", "http://a.example", "--max-queue", "2")
    with serving(logs, *options) as running:
        yield running
