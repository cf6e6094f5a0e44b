"""What operators tell a running engine: pause and resume, ending answers early, forgetting prefixes.

An order goes through the inbox like a request, is carried out by the engine's thread between two steps, and its result goes back under its
number. While the engine is paused, requests that come wait in front of it; they count as queued.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from jaxserve.engine.engine import Engine
from jaxserve.engine.replicas import Replicas
from jaxserve.request import Request, RequestOutput

PauseMode = Literal["abort", "wait", "keep"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One order.

    Args:
      mode: of "pause": "abort" ends running answers with what they have, "wait" lets them end, "keep" leaves them where they are.
      clear_cache: of "pause": forget cached prefixes too.
      preempt: of "reset_prefix_cache": set running requests back to their beginning.
      request_ids: of "end".
    """

    kind: Literal["pause", "resume", "end", "reset_prefix_cache"]
    number: int = -1
    mode: PauseMode = "keep"
    clear_cache: bool = False
    preempt: bool = False
    request_ids: tuple[str, ...] = ()


class Foreman:
    """Carries orders out, in the thread of the engine.

    Args:
      answer: called with the number of an order that is done, and whether it succeeded.
    """

    def __init__(self, answer: Callable[[int, bool], None]) -> None:
        self._answer = answer
        self._pause: Order | None = None
        self._reached = True

    @property
    def is_paused(self) -> bool:
        """Whether new requests wait."""
        return self._pause is not None

    @property
    def is_frozen(self) -> bool:
        """Whether no step may be taken, though there be work."""
        return self._pause is not None and self._pause.mode == "keep"

    def carry_out(self, engine: Engine | Replicas, order: Order, waiting: list[Request]) -> list[RequestOutput]:
        """Do as told; what ended by it.

        Args:
          waiting: requests that are not in the engine yet; those that are ended are taken out.
        """
        match order.kind:
            case "pause":
                self._drop_pause()
                self._pause, self._reached = order, False
                return engine.settle() if order.mode == "keep" else engine.end_all() if order.mode == "abort" else []
            case "resume":
                self._drop_pause()
                self._answer(order.number, True)
            case "reset_prefix_cache":
                self._answer(order.number, engine.reset_prefix_cache(preempt=order.preempt))
            case "end":
                waiting[:] = [request for request in waiting if request.id not in order.request_ids]
                return [engine.end(number) or RequestOutput(id=number, finish_reason="abort") for number in order.request_ids]
        return []

    def settle(self, engine: Engine | Replicas) -> None:
        """The device is idle: if it shall pause, it does now."""
        if self._pause is not None and not self._reached:
            if self._pause.clear_cache:
                engine.reset_prefix_cache(preempt=False)
            self._reached = True
            self._answer(self._pause.number, True)

    def _drop_pause(self) -> None:
        """End a pause; whoever still waits for it is told that another order came first."""
        if self._pause is not None and not self._reached:
            self._answer(self._pause.number, False)
        self._pause, self._reached = None, True
