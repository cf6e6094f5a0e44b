"""From checked prompts to running requests and back: what chat and completion handlers share.

1. `ready` and `served_name` say whether and under which name the server answers.
2. `fit` and `submit` check lengths and make prompts x n requests, all or none.
3. `Running` aborts all of them at once when the client goes, or the handler ends for any reason.
4. `outputs` and `collect` read one of them, turning bad ends into exceptions; `UsageCount` adds up.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from starlette.types import Receive

from jaxserve.api.beam import start_search
from jaxserve.api.errors import ClientGoneError, GenerationError
from jaxserve.api.protocol import Options
from jaxserve.config import EngineConfig
from jaxserve.engine.beam import check_beams
from jaxserve.engine.stream import start_all
from jaxserve.errors import EngineUnavailableError, UserError
from jaxserve.request import RequestOutput, SamplingParams, TokenLogprobs
from jaxserve.version import VERSION

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncEngine, OutputStream
    from jaxserve.engine.load import ServedModel

# No tokenizer of a served model packs more characters into a token on average; longer texts are refused before they are tokenized.
MAX_CHARS_PER_TOKEN = 16
_TOO_LONG = "context_length_exceeded"


def ready(engine: AsyncEngine) -> ServedModel:
    """The served model, when a request would be answered. Raises: EngineUnavailableError."""
    if engine.state.phase != "ready" or not engine.healthy:
        raise unavailable(engine)
    return engine.served


def unavailable(engine: AsyncEngine) -> EngineUnavailableError:
    """Why the engine takes no requests, in words fit for a client."""
    phase = engine.state.phase
    words = {"loading": "it is loading", "compiling": "it is compiling", "draining": "it is shutting down", "failed": "it has failed"}
    return EngineUnavailableError(words.get(phase, "it makes no progress"))


def served_name(config: EngineConfig, asked: str | None) -> str:
    """The model name to show. Raises: UserError with status 404 for a name that is not served."""
    names = config.served_names
    if not asked:
        return names[0]
    if asked not in names:
        message = f"the model {asked[:200]!r} does not exist; served: {', '.join(names)}"
        raise UserError("model", message, code="model_not_found", status=404)
    return asked


def with_usage(options: Options, config: EngineConfig) -> Options:
    """The same, with usage in every chunk if the server tells it whether asked or not."""
    if not (options.stream and config.server.enable_force_include_usage):
        return options
    return dataclasses.replace(options, include_usage=True, continuous_usage=True)


def answer_id(kind: str, request_id: str | None) -> str:
    """A fresh id such as chatcmpl-..., or one made of the client's own."""
    return f"{kind}-{request_id or uuid.uuid4().hex}"


def answer_head(kind: str, request_id: str, name: str, model: str) -> dict[str, Any]:
    """The members that an answer, or each chunk of it, begins with; `name` is the object that it is."""
    now = int(time.time())
    return {"id": answer_id(kind, request_id), "object": name, "created": now, "model": model, "system_fingerprint": f"jaxserve-{VERSION}"}


def check_chars(field: str, chars: int, max_len: int) -> None:
    """Refuse a text that cannot fit, before any time is spent on it."""
    if chars > MAX_CHARS_PER_TOKEN * max_len:
        message = f"the prompt has {chars} characters, far more than the {max_len} tokens that the model's context holds; shorten it"
        raise UserError(field, message, code=_TOO_LONG)


def truncate(prompt_ids: list[int], options: Options, max_len: int) -> list[int]:
    """The prompt cut to truncate_prompt_tokens, if the client asked for it."""
    keep = options.truncate_prompt_tokens
    if keep is None:
        return prompt_ids
    if keep == -1:
        keep = max(1, max_len - max(1, options.params.max_tokens or 1))
    if keep > max_len:
        raise UserError("truncate_prompt_tokens", f"truncate_prompt_tokens is {keep}, but the model's context holds {max_len} tokens")
    return prompt_ids[-keep:] if options.truncation_side == "left" else prompt_ids[:keep]


def fit(field: str, num_prompt: int, options: Options, params: SamplingParams, max_len: int) -> SamplingParams:
    """The params with max_tokens set for a prompt of this length.

    Raises: UserError with code context_length_exceeded, saying how long the prompt is and how long it may be.
    """
    room = max_len - num_prompt
    if num_prompt == 0:
        raise UserError(field, "the prompt has no tokens")
    if room < 1:
        message = f"the prompt has {num_prompt} tokens, but the model's context holds {max_len}, answer included; shorten the prompt"
        raise UserError(field, message, code=_TOO_LONG)
    asked = params.max_tokens
    if asked is not None and asked > room and not options.default_max_tokens:
        name = options.limit_name
        message = f"the prompt has {num_prompt} tokens and {name} is {asked}, but the model's context holds {max_len} tokens in all; "
        raise UserError(name, message + f"ask for at most {room}", code=_TOO_LONG)
    limit = room if asked is None else min(asked, room)
    return params if limit == asked else dataclasses.replace(params, max_tokens=limit)


async def submit(
    engine: AsyncEngine, field: str, prompts: Sequence[list[int]], options: Options, params: SamplingParams
) -> list[OutputStream]:
    """Start n requests per prompt, those of one prompt side by side; if one is refused, none runs.

    What the answers must look like is compiled before, in threads of its own.

    Raises: UserError, QueueFullError, EngineUnavailableError.
    """
    served = engine.served
    params, options = with_defaults(params, options, served.defaults)
    params.check_token_ids(served.vocab_size)
    fitted = [fit(field, len(prompt), options, params, served.max_len) for prompt in prompts]
    constraint = None if params.structured_outputs is None else await served.grammars.compile_async(params.structured_outputs)

    def starting() -> Iterator[OutputStream]:
        for prompt_ids, limited in zip(prompts, fitted, strict=True):
            engine.metrics.request_n.observe(params.n)
            if options.length_penalty is not None:
                check_beams(limited)
                yield from start_search(engine, prompt_ids, options, limited)
                continue
            for number in range(params.n):
                stream = engine.submit(
                    prompt_ids=prompt_ids, params=limited.of_answer(number), priority=options.priority, cache_salt=options.cache_salt,
                    constraint=constraint,
                )  # fmt: skip
                stream.name = options.request_id
                yield stream

    return start(engine, starting())


def start(engine: AsyncEngine, starting: Iterable[OutputStream]) -> list[OutputStream]:
    """Start requests, each as it is iterated over: all of them or none.

    Raises: UserError, QueueFullError, EngineUnavailableError.
    """
    try:
        return start_all(starting)
    except EngineUnavailableError:
        raise unavailable(engine) from None


def with_defaults(params: SamplingParams, options: Options, defaults: Mapping[str, Any]) -> tuple[SamplingParams, Options]:
    """The same with the model's own defaults for what the client left open; a search looks at none but the length."""
    changes = {name: defaults[name] for name in options.unset if name in defaults and options.length_penalty is None}
    if params.max_tokens is None and "max_tokens" in defaults:
        changes["max_tokens"] = defaults["max_tokens"]
        options = dataclasses.replace(options, default_max_tokens=True)
    return dataclasses.replace(params, **changes) if changes else params, options


def _abort(streams: Sequence[OutputStream]) -> None:
    for stream in streams:
        stream.abort()


class Running:
    """The requests behind one HTTP request, as an async context: leaving it, or the client's leaving, aborts whatever still runs.

    When the client leaves, the task inside is cancelled wherever it waits, and the context ends with ClientGoneError.

    Args:
      receive: of ASGI, with the body read already.
    """

    def __init__(self, receive: Receive, streams: Sequence[OutputStream]) -> None:
        self.gone = False
        self.streams = streams
        self._receive = receive

    async def __aenter__(self) -> Running:
        self._task = asyncio.current_task()
        self._watch = asyncio.create_task(self._wait_until_gone())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._watch.cancel()
        _abort(self.streams)
        if self.gone and self._task is not None:
            self._task.uncancel()
            raise ClientGoneError from None

    def give_up(self) -> None:
        """The client is gone, or as good as gone: abort everything and end the context."""
        if not self.gone and self._task is not None:
            self.gone = True
            _abort(self.streams)
            self._task.cancel()

    async def _wait_until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        self.give_up()

    async def outputs(self, stream: OutputStream) -> AsyncIterator[RequestOutput]:
        """The outputs of one request up to its last one.

        Raises: GenerationError or EngineUnavailableError when it does not end well.
        """
        async for output in stream:
            if output.finish_reason == "error" and output.fault is not None:
                raise UserError(output.fault, f"{output.fault}: {output.error}")
            if output.finish_reason == "error":
                raise GenerationError(output.error or "the engine failed on this request")
            if output.finish_reason == "abort" and output.error is not None:
                raise EngineUnavailableError(output.error)
            yield output
            if output.finish_reason is not None:
                return
        raise EngineUnavailableError("it is shutting down")

    async def collect(self, stream: OutputStream) -> RequestOutput:
        """The whole answer of one request, as a single output; raises as `outputs` does."""
        texts: list[str] = []
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        prompt_logprobs = None
        last = None
        async for output in self.outputs(stream):
            texts.append(output.text)
            tokens.extend(output.token_ids)
            logprobs.extend(output.logprobs or ())
            prompt_logprobs = output.prompt_logprobs or prompt_logprobs
            last = output
        assert last is not None, "a stream ended well without any output"
        return dataclasses.replace(
            last, text="".join(texts), token_ids=tuple(tokens), logprobs=tuple(logprobs) or None, prompt_logprobs=prompt_logprobs
        )


class UsageCount:
    """Tokens used, over all choices; prompts count once, however many answers they get.

    Args:
      prompt_lengths: tokens of each prompt.
      n: choices per prompt.
    """

    def __init__(self, prompt_lengths: Sequence[int], n: int) -> None:
        self._prompts = prompt_lengths
        self._n = n
        self._cached = [0] * len(prompt_lengths)
        self._sampled = [0] * len(prompt_lengths) * n

    def see(self, index: int, output: RequestOutput) -> None:
        """Take note of the totals in an output of choice `index`."""
        self._sampled[index] = output.num_output_tokens
        if index % self._n == 0:
            self._cached[index // self._n] = max(0, output.num_cached_tokens)

    def before(self, index: int) -> dict[str, Any]:
        """Usage of one choice before its first token."""
        return _usage(self._prompts[index // self._n], 0, self._cached[index // self._n])

    def of(self, index: int) -> dict[str, Any]:
        """Usage of one choice so far."""
        return _usage(self._prompts[index // self._n], self._sampled[index], self._cached[index // self._n])

    def total(self) -> dict[str, Any]:
        """Usage of all choices so far."""
        return _usage(sum(self._prompts), sum(self._sampled), sum(self._cached))


def _usage(prompt: int, sampled: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
