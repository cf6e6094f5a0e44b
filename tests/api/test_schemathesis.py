"""schemathesis on /openapi.json: whatever fits the description, or breaks it, is answered as the description says; never with a 500."""

from __future__ import annotations

from typing import Any

import hypothesis
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from jaxserve.pooling import Pooling
from tests.api.conftest import Client, ScriptedEngine
from tests.api.test_embeddings import VectorEngine

CHECKS: list[Any] = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, unsupported_method,
    allow_header_conformance,
]  # fmt: skip
TEXT = Client(ScriptedEngine(enable_admin_endpoints=True, enable_tokenizer_info_endpoint=True))
EMBEDDER = Client(VectorEngine(Pooling(task="embed", width=4, normalize=False)))
CLASSIFIER = Client(VectorEngine(Pooling(task="classify", width=1, activation="identity", labels=("SCORE",))))

text, embedder, classifier = (schemathesis.openapi.from_asgi("/openapi.json", client.app) for client in (TEXT, EMBEDDER, CLASSIFIER))
few = hypothesis.settings(
    max_examples=15,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much, hypothesis.HealthCheck.data_too_large],
)


@text.exclude(tag="pooling").parametrize()
@few
def test_every_answer_is_as_described(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)
    live = dict(TEXT.engine.live)
    TEXT.engine.live.clear()
    in_background = isinstance(case.body, dict) and case.body.get("background")
    assert in_background or not live, "something was left running"


@embedder.include(tag="pooling").parametrize()
@few
def test_answers_of_an_embedder_are_as_described(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)


@classifier.include(tag="pooling").parametrize()
@few
def test_answers_of_a_classifier_are_as_described(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)
