"""schemathesis on a running server with a real engine: what fits /openapi.json, or breaks it, is no 500, and nothing stays behind."""

from __future__ import annotations

from typing import Any

import hypothesis
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok

from tests.server.process import ServerProcess, wait_until

LIMITS = {"/v1/chat/completions": "max_completion_tokens", "/v1/completions": "max_tokens", "/v1/messages": "max_tokens"}
MOST_TOKENS = 8
few = hypothesis.settings(
    max_examples=5,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much, hypothesis.HealthCheck.data_too_large],
)


def test_no_request_makes_a_running_server_fail(server: ServerProcess) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) > 15
    for operation in operations:
        try_operation(operation, GenerationMode.POSITIVE)
        if operation.body:
            try_operation(operation, GenerationMode.NEGATIVE)
    wait_until(server.is_idle, "idle")


def try_operation(operation: Any, mode: GenerationMode) -> None:
    @few
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        if isinstance(case.body, dict):
            shorten(case.body, LIMITS.get(operation.path, "max_output_tokens"))
        case.call_and_validate(checks=[not_a_server_error])

    run()


def shorten(body: dict[str, Any], name: str) -> None:
    """Ask for a few tokens where the body would ask for all that fit; what is no number stays."""
    if isinstance(body.setdefault(name, MOST_TOKENS), int | float):
        body[name] = min(body[name], MOST_TOKENS)
