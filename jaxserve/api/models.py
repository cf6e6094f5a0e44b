"""What the server says about itself: its models, health, load, configuration and metrics."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import time
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxserve.api.answers import ready, served_name, unavailable
from jaxserve.api.errors import RETRY_AFTER_S
from jaxserve.version import VERSION

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncEngine

_LIBRARIES = ("jaxserve", "jax", "jaxlib", "flax", "transformers")


class ModelPages:
    """The GET handlers, one method each.

    Args:
      engine: the engine to tell about.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._created = int(time.time())

    async def root(self, request: Request) -> Response:
        """A page for people and probes that ask for /."""
        return JSONResponse({"name": "jaxserve", "version": VERSION, "status": self._status(), "api": "/v1"})

    async def health(self, request: Request) -> Response:
        """200 when a request would be answered, else 503 saying what the engine does instead."""
        status = self._status()
        if status == "ok":
            return JSONResponse({"status": status})
        return JSONResponse({"status": status}, 503, {"retry-after": str(RETRY_AFTER_S)})

    async def version(self, request: Request) -> Response:
        """The installed version."""
        return JSONResponse({"version": VERSION})

    async def metrics(self, request: Request) -> Response:
        """What Prometheus scrapes."""
        metrics = self._engine.metrics
        return Response(metrics.render(), headers={"content-type": metrics.content_type})

    async def load(self, request: Request) -> Response:
        """How many requests have no whole answer yet."""
        return JSONResponse({"server_load": self._engine.num_unfinished})

    async def server_info(self, request: Request) -> Response:
        """The configuration, without its keys, and the versions that tell how the server behaves."""
        config = dataclasses.asdict(self._engine.config)
        for secret in ("api_key", "admin_api_key"):
            config["server"].pop(secret)
        versions = {name: _installed(name) for name in _LIBRARIES} | {"python": platform.python_version()}
        return JSONResponse({"config": config, "versions": versions, "state": self._status()})

    async def tokenizer_info(self, request: Request) -> Response:
        """What clients need to render and count on their own."""
        served = ready(self._engine)
        tokenizer = served.tokenizer
        return JSONResponse(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": served.max_len,
                "chat_template": served.chat.source,
                **tokenizer.special_tokens,
            }
        )

    async def models(self, request: Request) -> Response:
        """The list of served models."""
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._engine.config.served_names]})

    async def model(self, request: Request) -> Response:
        """One served model; its name may hold slashes."""
        name = request.path_params["name"]
        if not name:
            raise HTTPException(404)
        return JSONResponse(self._card(served_name(self._engine.config, name)))

    def _status(self) -> str:
        state = self._engine.state
        if state.phase == "ready":
            return "ok" if self._engine.healthy else "stalled"
        # What broke is for the log; how far it has come is for everyone.
        return state.detail or state.phase if state.phase in ("loading", "compiling") else state.phase

    def _card(self, name: str) -> dict[str, Any]:
        if self._engine.state.phase not in ("ready", "draining"):
            raise unavailable(self._engine)
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "jaxserve",
            "root": self._engine.config.model.model,
            "parent": None,
            "max_model_len": self._engine.served.max_len,
            "permission": [
                {
                    "id": f"modelperm-{self._created:x}",
                    "object": "model_permission",
                    "created": self._created,
                    "allow_create_engine": False,
                    "allow_sampling": True,
                    "allow_logprobs": True,
                    "allow_search_indices": False,
                    "allow_view": True,
                    "allow_fine_tuning": False,
                    "organization": "*",
                    "group": None,
                    "is_blocking": False,
                }
            ],
        }


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"  # run from a source tree that was never installed
