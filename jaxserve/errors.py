"""The errors that cross a floor: whose fault it is, and what the person at the other end should do."""

from __future__ import annotations


class UserError(ValueError):
    """A request or an option that cannot be served as given; the HTTP layer answers it with `status`.

    Args:
      field: name of the offending field, or None when no single field is at fault.
      message: what was given, what is allowed, what to do.
      code: machine-readable reason in OpenAI's vocabulary, such as "context_length_exceeded".
      status: HTTP status, 4xx.
    """

    def __init__(self, field: str | None, message: str, *, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.field = field
        self.message = message
        self.code = code
        self.status = status


class ConfigError(ValueError):
    """A configuration, command line or checkpoint that cannot work; lists every problem found."""


class QueueFullError(RuntimeError):
    """The bounded queue has no place for another request; `retry_after_s` is the time to wait, in seconds."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the request queue is full; retry in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class EngineUnavailableError(RuntimeError):
    """The engine takes no new requests: it is loading, draining, or has failed."""
