"""The ASGI app: routes, error handlers and the layers around them. It neither starts nor stops the engine; whoever serves it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp

from jaxserve.api.chat import ChatEndpoint
from jaxserve.api.completions import CompletionEndpoint
from jaxserve.api.errors import GenerationError, error_response_async
from jaxserve.api.middleware import OPEN_PATHS, KeyCheck, RequestIds
from jaxserve.api.models import ModelPages
from jaxserve.api.tokens import DetokenizeEndpoint, TokenizeEndpoint
from jaxserve.config import EngineConfig
from jaxserve.errors import EngineUnavailableError, QueueFullError, UserError

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncEngine

_HANDLED = (UserError, GenerationError, QueueFullError, EngineUnavailableError, HTTPException, Exception)


def create_app(engine: AsyncEngine) -> ASGIApp:
    """The OpenAI API over an engine, as its config says (keys, CORS, limits)."""
    app = Starlette(
        routes=_routes(engine),
        middleware=_layers(engine.config),
        exception_handlers=dict.fromkeys(_HANDLED, error_response_async),
    )
    # A redirect would be built from the Host header; a path with a slash too many is simply not there.
    app.router.redirect_slashes = False
    # Outermost, so that error pages of every layer carry an id.
    return RequestIds(app)


def _routes(engine: AsyncEngine) -> list[Route]:
    pages = ModelPages(engine)
    return [
        Route("/v1/chat/completions", ChatEndpoint(engine), methods=["POST"]),
        Route("/v1/completions", CompletionEndpoint(engine), methods=["POST"]),
        Route("/tokenize", TokenizeEndpoint(engine), methods=["POST"]),
        Route("/detokenize", DetokenizeEndpoint(engine), methods=["POST"]),
        Route("/v1/models", pages.models, methods=["GET"]),
        Route("/v1/models/{name:path}", pages.model, methods=["GET"]),
        Route("/health", pages.health, methods=["GET"]),
        Route("/ping", pages.health, methods=["GET", "POST"]),
        Route("/version", pages.version, methods=["GET"]),
        Route("/metrics", pages.metrics, methods=["GET"]),
        Route("/", pages.root, methods=["GET"]),
    ]


def _layers(config: EngineConfig) -> list[Middleware]:
    open_paths = OPEN_PATHS if config.server.metrics_auth else OPEN_PATHS | {"/metrics"}
    layers = [Middleware(KeyCheck, keys=config.api_keys, open_paths=open_paths)]
    if config.server.cors_origins:
        # Before the key check: a browser's preflight brings no key.
        cors = Middleware(
            CORSMiddleware,
            allow_origins=config.server.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
        layers.insert(0, cors)
    return layers
