"""The ASGI app: the table of routes, error handlers and the layers around them. Whoever serves it starts and stops the engine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from jaxserve.api import examples
from jaxserve.api.admin import QUERY_PAUSE, QUERY_RESET, AbortEndpoint, AdminPages, read_abort
from jaxserve.api.capabilities import CapabilityPage
from jaxserve.api.chat import ChatEndpoint
from jaxserve.api.chat_batch import batch_operation
from jaxserve.api.completions import CompletionEndpoint
from jaxserve.api.errors import GenerationError, error_response_async
from jaxserve.api.invocations import InvocationsEndpoint
from jaxserve.api.messages import messages_operations
from jaxserve.api.middleware import OPEN_PATHS, KeyCheck, RequestIds, RootPath
from jaxserve.api.models import ModelPages
from jaxserve.api.openapi import DocumentPages
from jaxserve.api.operation import Body, Operation, make_routes
from jaxserve.api.protocol import read_chat, read_completion
from jaxserve.api.responses import responses_operations
from jaxserve.api.tokens import DetokenizeEndpoint, TokenizeEndpoint, read_detokenize, read_tokenize
from jaxserve.api.vectors import vectors_operations
from jaxserve.config import EngineConfig
from jaxserve.errors import EngineUnavailableError, QueueFullError, UserError

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncEngine

_HANDLED = (UserError, GenerationError, QueueFullError, EngineUnavailableError, HTTPException, Exception)
_POST = ("POST",)
# What bounds token ids in the documented schemas: a real request is read with the model's own figures.
_ANY = 1 << 20


def create_app(engine: AsyncEngine) -> ASGIApp:
    """The OpenAI API over an engine, as its config says (keys, CORS, limits)."""
    listed = operations(engine)
    app = Starlette(
        routes=make_routes(listed),
        middleware=_layers(engine.config, listed),
        exception_handlers=dict.fromkeys(_HANDLED, error_response_async),
    )
    # A redirect would be built from the Host header; a path with a slash too many is simply not there.
    app.router.redirect_slashes = False
    # Outermost, so that error pages of every layer carry an id.
    prefix = engine.config.server.root_path
    return RequestIds(app if prefix is None else RootPath(app, prefix))


def operations(engine: AsyncEngine) -> list[Operation]:
    """The table of routes."""
    server = engine.config.server
    listed = [*_generation(engine), *_information(engine)]
    if server.enable_admin_endpoints:
        listed += _administration(engine)
    documents, abilities = DocumentPages(listed), CapabilityPage(engine, listed)
    listed += [
        Operation(
            path="/v1/capabilities", handler=abilities.capabilities, tag="models",
            summary="Every parameter of every route, and what becomes of it for the model at hand",
        ),
        Operation(path="/openapi.json", handler=documents.openapi, summary="This description of the API", tag="operations"),
        Operation(path="/docs", handler=documents.docs, summary="The same to read", tag="operations", answers="text/html"),
    ]  # fmt: skip
    return listed


def _generation(engine: AsyncEngine) -> list[Operation]:
    complete = functools.partial(read_completion, vocab_size=_ANY, max_len=_ANY)
    detokenize = functools.partial(read_detokenize, max_items=_ANY)
    return [
        Operation(
            path="/v1/chat/completions", methods=_POST, handler=ChatEndpoint(engine), tag="generation", streams=True,
            summary="Answer a conversation", body=Body(read_chat, examples.CHAT),
        ),
        batch_operation(engine),
        Operation(
            path="/v1/completions", methods=_POST, handler=CompletionEndpoint(engine), tag="generation", streams=True,
            summary="Continue texts", body=Body(complete, examples.COMPLETION),
        ),
        Operation(
            path="/invocations", methods=_POST, handler=InvocationsEndpoint(engine), tag="generation", streams=True,
            summary="Continue texts, or answer a conversation where there are messages; for SageMaker",
            body=Body(complete, examples.COMPLETION),
        ),
        *responses_operations(engine),
        *messages_operations(engine),
        *vectors_operations(engine),
        Operation(
            path="/tokenize", methods=_POST, handler=TokenizeEndpoint(engine), tag="tokens",
            summary="The token ids of a text or of a conversation", body=Body(read_tokenize, examples.TOKENIZE),
        ),
        Operation(
            path="/detokenize", methods=_POST, handler=DetokenizeEndpoint(engine), tag="tokens",
            summary="The text of token ids", body=Body(detokenize, examples.DETOKENIZE),
        ),
    ]  # fmt: skip


def _information(engine: AsyncEngine) -> list[Operation]:
    pages = ModelPages(engine)
    listed = [
        Operation(path="/v1/models", handler=pages.models, summary="The models that are served", tag="models"),
        Operation(path="/v1/models/{name:path}", handler=pages.model, summary="One of them; its name may hold slashes", tag="models"),
        Operation(path="/health", handler=pages.health, summary="200 when a request would be answered, else 503", tag="operations"),
        Operation(path="/ping", methods=("GET", "POST"), handler=pages.health, summary="The same for SageMaker", tag="operations"),
        Operation(path="/version", handler=pages.version, summary="The version of the server", tag="operations"),
        Operation(path="/load", handler=pages.load, summary="How many requests are being answered", tag="operations"),
        Operation(path="/server_info", handler=pages.server_info, summary="Configuration and versions", tag="operations"),
        Operation(
            path="/metrics", handler=pages.metrics, summary="What Prometheus scrapes", tag="operations",
            answers=engine.metrics.content_type.partition(";")[0],
        ),
        Operation(path="/", handler=pages.root, summary="Name, version and state", tag="operations"),
    ]  # fmt: skip
    if engine.config.server.enable_tokenizer_info_endpoint:
        summary = "Special tokens and chat template of the tokenizer"
        listed.append(Operation(path="/tokenizer_info", handler=pages.tokenizer_info, summary=summary, tag="tokens"))
    return listed


def _administration(engine: AsyncEngine) -> list[Operation]:
    pages = AdminPages(engine)
    make = functools.partial(Operation, methods=_POST, tag="administration")
    return [
        make(path="/pause", handler=pages.pause, summary="Take no more steps until /resume; requests wait", query=QUERY_PAUSE),
        make(path="/resume", handler=pages.resume, summary="Go on after /pause"),
        make(path="/is_paused", methods=("GET",), handler=pages.is_paused, summary="Whether requests wait for /resume"),
        make(
            path="/abort_requests", handler=AbortEndpoint(engine), summary="End answers early, by their ids or all",
            body=Body(read_abort, examples.ABORT),
        ),
        make(path="/reset_prefix_cache", handler=pages.reset_prefix_cache, summary="Forget the prompts of the past", query=QUERY_RESET),
        make(path="/start_profile", handler=pages.start_profile, summary="Trace what the device and the host do"),
        make(path="/stop_profile", handler=pages.stop_profile, summary="End the trace and write it"),
    ]  # fmt: skip


def _layers(config: EngineConfig, listed: Sequence[Operation]) -> list[Middleware]:
    open_paths = OPEN_PATHS if config.server.metrics_auth else OPEN_PATHS | {"/metrics"}
    admin_paths = frozenset(operation.path for operation in listed if operation.tag == "administration")
    check = Middleware(KeyCheck, keys=config.api_keys, open_paths=open_paths, admin_keys=config.admin_keys, admin_paths=admin_paths)
    layers = [check]
    if config.server.cors_origins:
        # Before the key check: a browser's preflight brings no key.
        cors = Middleware(
            CORSMiddleware,
            allow_origins=config.server.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
        layers.insert(0, cors)
    return layers
