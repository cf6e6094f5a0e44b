"""POST /v1/completions, whole or streamed: prompts of text or token ids, each answered n times, with echo for scoring."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from starlette.types import Receive, Send

from jaxserve.api.answers import Running, UsageCount, answer_head, check_chars, ready, served_name, submit, truncate, with_usage
from jaxserve.api.chunks import ChunkPrinter
from jaxserve.api.endpoint import JsonEndpoint
from jaxserve.api.logprobs import Pieces, TokenNames, completion_logprobs, is_heavy, prompt_logprobs
from jaxserve.api.protocol import CompletionRequest, decode_completion
from jaxserve.api.sse import frame, stream_answer
from jaxserve.api.wire import INLINE_BYTES, INLINE_CHARS, off_loop, send_json
from jaxserve.request import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import OutputStream
    from jaxserve.engine.load import ServedModel


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its token ids, and the text that echo gives back."""

    ids: list[int]
    text: str


class CompletionEndpoint(JsonEndpoint):
    """The ASGI app of the route."""

    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """Answer one completion request."""
        served = ready(self.engine)
        heavy = len(body) > INLINE_BYTES
        request = await off_loop(heavy, lambda: decode_completion(body, vocab_size=served.vocab_size, max_len=served.max_len))
        request = dataclasses.replace(request, options=with_usage(request.options, self.engine.config))
        options = request.options
        name = served_name(self.engine.config, options.model)
        prompts = await _read_prompts(served, request)
        streams = await submit(self.engine, "prompt", [prompt.ids for prompt in prompts], options, _engine_params(request))
        printer = CompletionPrinter(request, name, prompts, served)
        async with Running(receive, streams) as running:
            if options.stream:
                interval = options.stream_interval
                await stream_answer(send, running, printer, write_timeout_s=self.server.write_timeout_s, interval=interval)
                return
            outputs = [await printer.collect(running, stream) for stream in streams]
        await send_json(send, await off_loop(is_heavy(*outputs), lambda: printer.whole(outputs)))


async def _read_prompts(served: ServedModel, request: CompletionRequest) -> list[Prompt]:
    options, tokenizer = request.options, served.tokenizer
    for prompt in request.prompts:
        if isinstance(prompt, str):
            check_chars("prompt", len(prompt), served.max_len)

    def work() -> list[Prompt]:
        made: list[Prompt] = []
        for prompt in request.prompts:
            ids = tokenizer.encode(prompt, add_special_tokens=options.add_special_tokens) if isinstance(prompt, str) else prompt
            kept = truncate(ids, options, served.max_len)
            text = ""
            if options.echo:
                # Only ids say what is left of a prompt that was cut.
                whole = isinstance(prompt, str) and len(kept) == len(ids)
                text = str(prompt) if whole else tokenizer.decode(kept, skip_special_tokens=options.params.skip_special_tokens)
            made.append(Prompt(kept, text))
        return made

    return await off_loop(sum(map(len, request.prompts)) > INLINE_CHARS, work)


def _engine_params(request: CompletionRequest) -> SamplingParams:
    """The client's params; echo with logprobs needs those of the prompt too."""
    params = request.options.params
    if not request.options.echo or params.logprobs is None:
        return params
    return dataclasses.replace(params, prompt_logprobs=max(params.logprobs, params.prompt_logprobs or 0))


class CompletionPrinter(ChunkPrinter):
    """The answers to one completion request in OpenAI's shapes: `whole`, or `render` piece by piece."""

    def __init__(self, request: CompletionRequest, name: str, prompts: list[Prompt], served: ServedModel) -> None:
        options = request.options
        n = options.params.n
        head = answer_head("cmpl", options.request_id, "text_completion", name)
        super().__init__(options, UsageCount([len(prompt.ids) for prompt in prompts], n), head)
        self._request = request
        self._prompts = prompts
        self._names = TokenNames(served.tokenizer, as_ids=options.tokens_as_ids)
        self._begun = [False] * len(prompts) * n
        self._pieces = [Pieces(self._names) for _ in self._begun]
        self._plain = options.params.num_logprobs is None and not (options.return_token_ids or options.continuous_usage or options.echo)
        before = b"data: " + orjson.dumps(self._head)[:-1] + b',"choices":[{"index":'
        self._before = [before + b'%d,"text":' % index for index in range(len(self._begun))]

    async def outputs(self, running: Running, stream: OutputStream) -> AsyncIterator[RequestOutput]:
        """Every output of one request; only the prompt's part of it when the client wants scores alone."""
        if self._request.score_only:
            yield await self.collect(running, stream)
            return
        async for output in running.outputs(stream):
            yield output

    async def collect(self, running: Running, stream: OutputStream) -> RequestOutput:
        """The whole answer of one request."""
        output = await running.collect(stream)
        if not self._request.score_only:
            return output
        # One token was sampled because a request needs one; the client asked for none.
        return dataclasses.replace(
            output, text="", token_ids=(), logprobs=None, finish_reason="length", stop_reason=None, num_output_tokens=0
        )

    def render(self, index: int, output: RequestOutput) -> bytes:
        """The event for an output of choice `index`."""
        self._usage.see(index, output)
        if self._plain and output.finish_reason is None:
            return self._before[index] + orjson.dumps(output.text) + b',"logprobs":null,"finish_reason":null}]}\n\n'
        choice = self._choice(index, output)
        if output.finish_reason is not None:
            choice["stop_reason"] = output.stop_reason
        body: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._options.continuous_usage:
            body["usage"] = self._usage.of(index)
        return frame(orjson.dumps(body))

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The body of an answer that is not streamed."""
        choices: list[dict[str, Any]] = []
        for index, output in enumerate(outputs):
            self._usage.see(index, output)
            choice = self._choice(index, output)
            choice["stop_reason"] = output.stop_reason
            if self._options.params.prompt_logprobs is not None:
                choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or (), self._options.params.prompt_logprobs, self._names)
            choices.append(choice)
        return orjson.dumps({**self._head, "choices": choices, "usage": self._usage.total()})

    def _choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        prompt = self._prompts[index // self._options.params.n]
        first = not self._begun[index]
        self._begun[index] = True
        echoed = prompt if first and self._options.echo else Prompt([], "")
        choice: dict[str, Any] = {
            "index": index,
            "text": echoed.text + output.text,
            "logprobs": None,
            "finish_reason": output.finish_reason,
        }
        num_logprobs = self._options.params.num_logprobs
        if num_logprobs is not None:
            positions = ((output.prompt_logprobs or ()) if echoed.ids else ()) + (output.logprobs or ())
            choice["logprobs"] = completion_logprobs(positions, echoed.ids, num_logprobs, self._pieces[index])
        if self._options.return_token_ids:
            choice["token_ids"] = output.token_ids
            if first:
                choice["prompt_token_ids"] = prompt.ids
        return choice
