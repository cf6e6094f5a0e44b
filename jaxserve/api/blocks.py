"""An answer as a row of blocks, one open at a time: text, reasoning, calls. What the printers of /v1/responses and /v1/messages share.

outputs -> AnswerReader -> parts -> Blocks -> blocks that open, grow and close -> events of the route
"""

from __future__ import annotations

import abc
import bisect
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from jaxserve.api.answers import Running
from jaxserve.api.reading import AnswerReader
from jaxserve.api.sse import named_frame
from jaxserve.api.turn import Turn
from jaxserve.api.wire import INLINE_CHARS, off_loop
from jaxserve.request import RequestOutput, TokenLogprobs
from jaxserve.text.answer import CallArguments, CallStart, Content, Reasoning

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import OutputStream

Kind = Literal["text", "reasoning", "call"]
Event = dict[str, Any]


@dataclasses.dataclass(slots=True)
class Block:
    """One block.

    Args:
      index: its place in the answer.
      name, call_id: of a call.
      state: "cut" if the model was stopped within it.
      logprobs: of the tokens of a text.
    """

    kind: Kind
    index: int
    name: str = ""
    call_id: str = ""
    text: str = ""
    state: Literal["open", "whole", "cut"] = "open"
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list[TokenLogprobs])


@dataclasses.dataclass(frozen=True, slots=True)
class Opened:
    """A block begins."""

    block: Block


@dataclasses.dataclass(frozen=True, slots=True)
class Grown:
    """A block has more text, and these log-probabilities."""

    block: Block
    text: str
    logprobs: tuple[TokenLogprobs, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Closed:
    """A block is as it will stay."""

    block: Block


Change = Opened | Grown | Closed


class Blocks:
    """Collects the blocks of one answer.

    Args:
      token_bytes: what a token stands for.
    Attributes:
      last: the last output.
    """

    def __init__(self, reader: AnswerReader, token_bytes: Callable[[int], bytes]) -> None:
        self.found: list[Block] = []
        self.last: RequestOutput | None = None
        self._reader = reader
        self._token_bytes = token_bytes
        self._unread: list[TokenLogprobs] = []  # of tokens whose text the reader still holds

    def push(self, output: RequestOutput) -> Iterator[Change]:
        """What changes with an output; it must be read to its end."""
        self.last = output
        self._unread.extend(output.logprobs or ())
        for part in self._reader.parts(output):
            match part:
                case Content(text):
                    yield from self._grow("text", text)
                case Reasoning(text):
                    yield from self._grow("reasoning", text)
                case CallStart(_, name, call_id):
                    yield from self._open(Block("call", len(self.found), name=name, call_id=call_id or ""))
                case CallArguments(_, text):
                    yield from self._grow("call", text)
        if output.finish_reason is not None:
            if self.found and self.found[-1].kind == "text":
                self.found[-1].logprobs.extend(self._unread)
            yield from self._close("cut" if output.finish_reason in ("length", "abort") else "whole")

    def open_empty(self) -> Iterator[Change]:
        """Open and close a text of nothing, for an answer without any block."""
        yield from self._open(Block("text", len(self.found)))
        yield from self._close("whole")

    def _grow(self, kind: Kind, text: str) -> Iterator[Change]:
        if not self.found or self.found[-1].kind != kind or self.found[-1].state != "open":
            yield from self._open(Block(kind, len(self.found)))
        block = self.found[-1]
        block.text += text
        logprobs = self._logprobs_of(text)
        if kind != "text":
            yield Grown(block, text, ())
            return
        block.logprobs.extend(logprobs)
        yield Grown(block, text, logprobs)

    def _logprobs_of(self, text: str) -> tuple[TokenLogprobs, ...]:
        """Those of the tokens that the text is made of; those before it, of a marker, belong to nobody."""
        if not self._unread:
            return ()
        pieces = [self._token_bytes(position.token_id) for position in self._unread]
        wanted = text.encode()
        start = b"".join(pieces).rfind(wanted)
        # Special tokens that are not shown may stand within the text.
        end = len(wanted) + start if start >= 0 else sum(map(len, pieces))
        ends = list(itertools.accumulate(map(len, pieces)))
        first = bisect.bisect_right(ends, max(start, 0))
        last = bisect.bisect_left(ends, end) + 1
        taken = tuple(self._unread[first:last])
        del self._unread[:last]
        return taken

    def _open(self, block: Block) -> Iterator[Change]:
        yield from self._close("whole")
        self.found.append(block)
        yield Opened(block)

    def _close(self, state: Literal["whole", "cut"]) -> Iterator[Change]:
        if self.found and self.found[-1].state == "open":
            self.found[-1].state = state
            yield Closed(self.found[-1])


class BlockPrinter(abc.ABC):
    """Prints one answer as events named after their types; the whole answer is what is left behind when all have been made.

    Args:
      turn: with one stream.
      call_prefix: of the ids of calls.
    """

    def __init__(self, turn: Turn, *, call_prefix: str) -> None:
        self._turn = turn
        self._blocks = Blocks(AnswerReader(turn.reading, call_prefix=call_prefix), turn.served.tokenizer.token_bytes)
        self._has_begun = False

    def outputs(self, running: Running, stream: OutputStream) -> AsyncIterator[RequestOutput]:
        """Every output."""
        return running.outputs(stream)

    async def collect(self, running: Running, tell: Callable[[bytes], None] | None = None) -> None:
        """Read the whole answer, and tell of its events, if somebody wants to know."""
        async for output in running.outputs(self._turn.streams[0]):
            _pass_on(self.take(output), tell)
        events = await off_loop(self.ends_heavily, lambda: list(self.end()))
        _pass_on(events, tell)

    def abandon(self, error: Exception, tell: Callable[[bytes], None] | None = None) -> None:
        """The answer that is being collected has failed."""
        _pass_on(self.fail(error), tell)

    @property
    def streams(self) -> list[OutputStream]:
        """The running request."""
        return self._turn.streams

    @property
    def ends_heavily(self) -> bool:
        """Whether the last events would hold the event loop for long."""
        return sum(len(block.text) for block in self._blocks.found) > INLINE_CHARS

    def render(self, index: int, output: RequestOutput) -> bytes:
        """The events for an output."""
        return b"".join(map(named_frame, self.take(output)))

    def last(self) -> bytes:
        """The events that end the stream."""
        return b"".join(map(named_frame, self.end()))

    def failed(self, error: Exception) -> bytes:
        """The events that end a stream in which something went wrong."""
        return b"".join(map(named_frame, self.fail(error)))

    def take(self, output: RequestOutput) -> Iterator[Mapping[str, Any]]:
        """The events for an output; they must be read to their end."""
        changes = self._blocks.push(output)
        if not self._has_begun:
            self._has_begun = True
            yield from self.begin(output)
        for change in changes:
            yield from self.show(change)

    @abc.abstractmethod
    def begin(self, output: RequestOutput) -> Iterator[Mapping[str, Any]]:
        """The first events."""

    @abc.abstractmethod
    def show(self, change: Change) -> Iterator[Mapping[str, Any]]:
        """The events for a change of a block."""

    @abc.abstractmethod
    def end(self) -> Iterator[Mapping[str, Any]]:
        """The last events."""

    @abc.abstractmethod
    def fail(self, error: Exception) -> Iterator[Mapping[str, Any]]:
        """The events for something that went wrong."""


def _pass_on(events: Iterable[Mapping[str, Any]], tell: Callable[[bytes], None] | None) -> None:
    for event in events:
        if tell is not None:
            tell(named_frame(event))
