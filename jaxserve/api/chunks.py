"""What the streams of chat and completions have in common: how their outputs are read, and how they end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import orjson

from jaxserve.api.answers import Running, UsageCount
from jaxserve.api.errors import error_json
from jaxserve.api.protocol import Options
from jaxserve.api.sse import frame
from jaxserve.request import RequestOutput

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import OutputStream

_DONE = b"data: [DONE]\n\n"


class ChunkPrinter:
    """The part of a printer that does not depend on the shape of a choice.

    Args:
      head: the members that all chunks of the stream, and the answer that is not streamed, begin with.
    """

    def __init__(self, options: Options, usage: UsageCount, head: dict[str, Any]) -> None:
        self._options = options
        self._usage = usage
        self._head = head

    def outputs(self, running: Running, stream: OutputStream) -> AsyncIterator[RequestOutput]:
        """Every output of one request."""
        return running.outputs(stream)

    @property
    def ends_heavily(self) -> bool:
        """Whether `last` takes long enough to hold the event loop up."""
        return False

    def total(self) -> dict[str, Any]:
        """Usage of all choices."""
        return self._usage.total()

    def last(self) -> bytes:
        """The chunk with the usage of all choices, if it was asked for, and the mark that ends every stream."""
        if not self._options.include_usage:
            return _DONE
        return frame(orjson.dumps({**self._head, "choices": [], "usage": self.total()})) + _DONE

    def failed(self, error: Exception) -> bytes:
        """The error object, and the mark that ends every stream."""
        return frame(error_json(error)) + _DONE
