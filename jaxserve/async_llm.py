"""Offline use for callers with an event loop of their own: `async for result in llm.generate(prompt, params)`.

    async with AsyncLLM("model") as llm:
        async for result in llm.generate("Hello", SamplingParams(max_tokens=20)):
            print(result.outputs[0].text)

The engine runs in a thread of its own; requests of many callers share its steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from jaxserve.config import DEFAULT_MODEL, make_config
from jaxserve.engine.async_engine import AsyncEngine, OutputStream
from jaxserve.engine.load import ServedModel
from jaxserve.engine.vectors import PoolingOutput, PoolingResult, input_of, pooling_of, result_of
from jaxserve.errors import ConfigError, EngineUnavailableError, UserError
from jaxserve.llm import Message, Prompt, ids_of, render_chat, text_of
from jaxserve.metrics import Figure, HistogramFigure
from jaxserve.outputs import RequestResult, make_result
from jaxserve.pooling import PoolingParams, PoolingTask
from jaxserve.request import RequestOutput, SamplingParams, merge_outputs

_LAST_STEP_S = 5.0


class AsyncLLM:
    """A model in this process, as an async context.

    Args:
      model: hub id, directory of safetensors, .gguf file or Orbax directory.
      options: fields of the configuration by name, such as max_len=2048, dtype="bfloat16", max_rows=32.
    Raises: ConfigError saying which option does not fit; entering the context raises it for what the model does not fit.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any) -> None:
        self._config = make_config({"model": model, **options})
        self._engine: AsyncEngine | None = None

    async def __aenter__(self) -> AsyncLLM:
        self._engine = AsyncEngine(self._config)
        self._engine.start()
        try:
            self._served: ServedModel = await self._engine.wait_ready()
        except EngineUnavailableError as error:
            raise ConfigError(str(error)) from None
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.engine.abort_all()
        await asyncio.to_thread(self.engine.stop, timeout_s=_LAST_STEP_S)

    @property
    def engine(self) -> AsyncEngine:
        """The engine below."""
        assert self._engine is not None, "use `async with`, which loads the model"
        return self._engine

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._served.tokenizer

    def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None, *, priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestResult]:  # fmt: skip
        """Answer a prompt; each result holds all there is so far, the last one a finish reason for every answer.

        Args:
          prompt: text, token ids, or {"prompt": text} / {"prompt_token_ids": ids}.
          request_id: for abort().
        Raises: UserError if it cannot be served; RuntimeError if the engine fails.
        """
        return self._stream(
            text_of(prompt),
            ids_of(self._served, prompt),
            sampling_params or SamplingParams(**self._served.defaults),
            request_id,
            priority,
            cache_salt,
        )

    def chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None, request_id: str | None = None, *,
        tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool = True, continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None, priority: int = 0, cache_salt: str | None = None,
    ) -> AsyncIterator[RequestResult]:  # fmt: skip
        """Answer a conversation through the model's chat template; see generate."""
        text = render_chat(
            self._served.chat, messages, tools=tools, add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message, kwargs=chat_template_kwargs,
        )  # fmt: skip
        ids = self._served.tokenizer.encode(text, add_special_tokens=False)
        return self._stream(text, ids, sampling_params or SamplingParams(**self._served.defaults), request_id, priority, cache_salt)

    async def encode(
        self, prompt: Prompt, pooling_params: PoolingParams | None = None, request_id: str | None = None, *, priority: int = 0,
        cache_salt: str | None = None, pooling_task: PoolingTask | None = None,
    ) -> AsyncIterator[PoolingResult[PoolingOutput]]:  # fmt: skip
        """What a model of vectors gives for a prompt, as the only result; see LLM.encode."""
        served, params = self._served, pooling_params or PoolingParams()
        pooling_of(served, pooling_task)
        text = text_of(prompt)
        given = input_of(served, ids_of(served, prompt) if text is None else text, params)
        stream = self.engine.submit_pooling(given.ids, second_at=given.second_at, priority=priority, cache_salt=cache_salt)
        stream.name = request_id
        try:
            async for output in stream:
                _check(output)
                if output.pooled is not None:
                    yield result_of(served, given, output, params, lambda vector: PoolingOutput(vector.tolist()))
        finally:
            stream.abort()

    async def abort(self, request_id: str) -> None:
        """End requests of this id with what they have; their readers get the finish reason "abort"."""
        self.engine.cut_short({request_id})

    async def pause(self, mode: Literal["abort", "wait", "keep"] = "abort", *, clear_cache: bool = True) -> bool:
        """Stop stepping; returns when the device is idle, False if another order came first. Requests that come meanwhile wait.

        Args:
          mode: "abort" ends running requests with what they have, "wait" lets them end, "keep" leaves them where they are.
          clear_cache: forget cached prefixes too, but with "keep".
        """
        return await self.engine.pause(mode, clear_cache=clear_cache and mode != "keep")

    async def resume(self) -> None:
        """Go on after pause()."""
        await self.engine.resume()

    async def reset_prefix_cache(self, *, reset_running_requests: bool = False) -> bool:
        """Forget cached prefixes; False while requests run, unless they may be set back to their beginning."""
        return await self.engine.reset_prefix_cache(preempt=reset_running_requests)

    def get_metrics(self) -> list[Figure | HistogramFigure]:
        """What /metrics of a server would show."""
        return self.engine.metrics.read()

    async def _stream(
        self, text: str | None, ids: list[int], params: SamplingParams, request_id: str | None, priority: int, cache_salt: str | None
    ) -> AsyncIterator[RequestResult]:
        spec = params.structured_outputs
        constraint = None if spec is None else await self._served.grammars.compile_async(spec)
        streams: list[OutputStream] = []
        arrived: asyncio.Queue[tuple[int, RequestOutput]] = asyncio.Queue()
        pumps: list[asyncio.Task[None]] = []
        try:
            for number in range(params.n):
                one = params.of_answer(number)
                stream = self.engine.submit(prompt_ids=ids, params=one, priority=priority, cache_salt=cache_salt, constraint=constraint)
                stream.name = request_id
                streams.append(stream)
            pumps = [asyncio.create_task(_pump(number, stream, arrived)) for number, stream in enumerate(streams)]
            answers = [RequestOutput(id=stream.id) for stream in streams]
            while any(answer.finish_reason is None for answer in answers):
                number, output = await arrived.get()
                _check(output)
                answers[number] = merge_outputs([answers[number], output])
                yield make_result(self.tokenizer, text, ids, params, answers)
        finally:
            for pump in pumps:
                pump.cancel()
            for stream in streams:
                stream.abort()


async def _pump(number: int, stream: OutputStream, arrived: asyncio.Queue[tuple[int, RequestOutput]]) -> None:
    async for output in stream:
        arrived.put_nowait((number, output))


def _check(output: RequestOutput) -> None:
    if output.finish_reason != "error":
        return
    if output.fault is not None:
        raise UserError(output.fault, f"{output.fault}: {output.error}")
    raise RuntimeError(output.error)
