"""One server with a witty model for all clients that need one."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import pytest

from tests.server.process import serving
from tests.tiny import tiny_model

TEMPLATE = pathlib.Path(__file__).with_name("tool_chat.jinja")


@pytest.fixture(scope="session")
def witty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of its API; it serves "tiny" and "org/tiny", and wants the key "secret"."""
    programs = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).with_name("servers")  # kept for the next run
    options = (
        "--chat-template", str(TEMPLATE), "--served-model-name", "tiny,org/tiny", "--api-key", "secret", "--cache-dir", str(programs),
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("witty")
    with serving(directory, *options, module="tests.clients.witty", model_path=str(tiny_model(max_len=1024))) as server:
        yield f"{server.url}/v1"
