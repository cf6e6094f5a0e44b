"""Beam search over HTTP: one task per prompt asks the engine token by token; its n answers are read like any other's."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jaxserve.api.errors import GenerationError
from jaxserve.engine.beam import Beam, BeamSearch, only_logprobs, step_params
from jaxserve.engine.stream import OutputStream, start_all
from jaxserve.errors import EngineUnavailableError, QueueFullError
from jaxserve.request import RequestOutput, SamplingParams

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from jaxserve.api.protocol import Options
    from jaxserve.engine.async_engine import AsyncEngine


def start_search(engine: AsyncEngine, prompt_ids: list[int], options: Options, params: SamplingParams) -> list[OutputStream]:
    """Begin a search; params.max_tokens is settled, and fits. Giving one of the streams up gives all of them up.

    Raises: UserError, QueueFullError, EngineUnavailableError.
    """
    assert options.length_penalty is not None, "only searches come here"
    search = BeamSearch(prompt_ids, params, length_penalty=options.length_penalty, eos_ids=engine.served.eos_ids)
    first = _submit(engine, search.prompts, options, params)

    async def run() -> None:
        try:
            outputs = await _search(engine, search, first, prompt_ids, options, params)
        except Exception as error:
            outputs = [_ending(error, options.request_id)] * params.n  # nobody is to wait for ever
        for stream, output in zip(streams, outputs, strict=True):
            stream.put(output)

    def give_up(_: str) -> None:
        task.cancel()
        for stream in first:  # the task may not have begun
            stream.abort()

    streams = [OutputStream(f"{first[0].id}-{index}", give_up) for index in range(params.n)]
    task = asyncio.create_task(run())
    return streams


def _ending(error: Exception, request_id: str) -> RequestOutput:
    if isinstance(error, EngineUnavailableError):
        return RequestOutput(id="", finish_reason="abort", error=str(error))
    if isinstance(error, GenerationError):
        return RequestOutput(id="", finish_reason="error", error=str(error))
    log.error("a beam search failed: request=%s", request_id, exc_info=error)
    return RequestOutput(id="", finish_reason="error", error="the search failed on the server; it is safe to try again")


async def _search(
    engine: AsyncEngine, search: BeamSearch, first: list[OutputStream], prompt_ids: list[int], options: Options, params: SamplingParams
) -> list[RequestOutput]:
    """The answers, best first."""
    num_cached = 0
    while prompts := search.prompts:
        streams = first or await _submit_again(engine, prompts, options, params)
        try:
            outputs = [await _last(stream) for stream in streams]
        finally:
            for stream in streams:
                stream.abort()
        if first:
            num_cached, first = outputs[0].num_cached_tokens, []
        search.take([only_logprobs(output) for output in outputs])
    beams = search.best()
    beams += [Beam(ids=tuple(prompt_ids))] * (params.n - len(beams))  # a tiny vocabulary may not have as many
    return [dataclasses.replace(beam.output(engine.served.tokenizer, params), num_cached_tokens=num_cached) for beam in beams]


def _submit(engine: AsyncEngine, prompts: Sequence[list[int]], options: Options, params: SamplingParams) -> list[OutputStream]:
    """Ask for the next token of each prompt; if one is refused, none is asked for."""

    def starting() -> Iterator[OutputStream]:
        for ids in prompts:
            stream = engine.submit(prompt_ids=ids, params=step_params(params), priority=options.priority, cache_salt=options.cache_salt)
            stream.name = options.request_id
            yield stream

    return start_all(starting())


async def _submit_again(engine: AsyncEngine, prompts: Sequence[list[int]], options: Options, params: SamplingParams) -> list[OutputStream]:
    """The same for a search that has begun: where there is no room in the queue, it waits for some."""
    while True:
        try:
            return _submit(engine, prompts, options, params)
        except QueueFullError as error:
            await asyncio.sleep(error.retry_after_s)


async def _last(stream: OutputStream) -> RequestOutput:
    async for output in stream:
        if output.finish_reason == "error":
            raise GenerationError(output.error or "the engine failed on this request")
        if output.finish_reason == "abort":
            raise EngineUnavailableError(output.error or "it is shutting down")
        if output.finish_reason is not None:
            return output
    raise EngineUnavailableError("it is shutting down")
