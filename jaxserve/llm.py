"""Offline use: `LLM(model).generate(prompts, params)` runs the engine in the caller's thread."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from jaxserve.config import DEFAULT_MODEL, make_config
from jaxserve.engine.admit import Admission
from jaxserve.engine.load import load_engine
from jaxserve.errors import QueueFullError, UserError
from jaxserve.metrics import Metrics
from jaxserve.request import FinishReason, Request, RequestOutput, SamplingParams, TokenLogprobs, merge_outputs

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One of a prompt's n answers.

    Args:
      index: 0-based number of the answer.
      logprobs: one per token, if asked for.
      stop_reason: the stop string or token id that ended it, if one did.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    stop_reason: int | str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestResult:
    """A prompt and its answers; prompt_logprobs has one entry per prompt token, the first None."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int


class LLM:
    """A model in this process.

    Args:
      model: hub id, directory of safetensors, .gguf file or Orbax directory.
      options: fields of the configuration by name, such as max_len=2048, dtype="bfloat16", max_rows=32; max_mixed_tokens is unlimited
        unless given.
    Raises: ConfigError saying what does not fit.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any) -> None:
        # Nobody waits for single tokens here, so prompts need not be cut to let answers go on.
        config = make_config({"model": model, "max_mixed_tokens": sys.maxsize, **options})
        self.metrics = Metrics(config.served_names[0])
        self._engine, self._served = load_engine(config, self.metrics, lambda _: None)
        self._admission = Admission(self._served, seed=config.model.seed)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._served.tokenizer

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, *, use_tqdm: bool = True
    ) -> list[RequestResult]:
        """Answer each prompt; answers come in the order of the prompts.

        Args:
          prompts: one or many of: text, token ids, or {"prompt": text} / {"prompt_token_ids": ids}.
          params: for all prompts, or one for each.
        Raises: UserError if any of them cannot be served; then none is.
        """
        listed = _as_list(prompts)
        texts = [_text_of(prompt) for prompt in listed]
        ids = [self._ids_of(prompt) for prompt in listed]
        return self._run(texts, ids, _spread(params, len(ids)), use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestResult]:
        """Answer one conversation, or many, through the model's chat template."""
        single = not messages or isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if single else list(messages)
        texts: list[str | None] = [
            self._served.chat.render(
                [dict(message) for message in conversation], tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=add_generation_prompt and not continue_final_message, continue_final_message=continue_final_message,
                kwargs=dict(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]  # fmt: skip
        ids = [self._served.tokenizer.encode(text or "", add_special_tokens=False) for text in texts]
        return self._run(texts, ids, _spread(params, len(ids)), use_tqdm=use_tqdm)

    def _run(
        self, texts: list[str | None], prompts: list[list[int]], params: list[SamplingParams], *, use_tqdm: bool
    ) -> list[RequestResult]:
        requests: list[list[Request]] = []
        for ids, each in zip(prompts, params, strict=True):
            constraint = None if each.structured_outputs is None else self._served.grammars.compile(each.structured_outputs)
            seeds = [each.seed if each.seed is None else each.seed + i for i in range(each.n)]
            requests.append(
                [self._admission.make_request(ids, dataclasses.replace(each, n=1, seed=seed), constraint=constraint) for seed in seeds]
            )
        answers = self._drive([request for group in requests for request in group], use_tqdm=use_tqdm)
        return [
            _result(text, ids, [answers[request.id] for request in group])
            for text, ids, group in zip(texts, prompts, requests, strict=True)
        ]

    def _drive(self, requests: list[Request], *, use_tqdm: bool) -> dict[str, RequestOutput]:
        """Run the engine until every request has ended; on an interrupt none stays behind."""
        parts: dict[str, list[RequestOutput]] = {request.id: [] for request in requests}
        waiting = list(reversed(requests))
        try:
            with tqdm(total=len(requests), desc="generating", unit="request", disable=None if use_tqdm else True) as bar:
                while waiting or self._engine.has_work:
                    self._admit(waiting)
                    for output in self._engine.step():
                        parts[output.id].append(output)
                        bar.update(output.finish_reason is not None)
        finally:
            for request in requests:
                self._engine.abort(request.id)
        answers = {request_id: merge_outputs(outputs) for request_id, outputs in parts.items()}
        failed = next((answer for answer in answers.values() if answer.finish_reason == "error"), None)
        if failed is not None and failed.fault is not None:
            raise UserError(failed.fault, f"{failed.fault}: {failed.error}")
        if failed is not None:
            raise RuntimeError(failed.error)
        return answers

    def _admit(self, waiting: list[Request]) -> None:
        while waiting:
            try:
                self._engine.add(waiting[-1])
            except QueueFullError:
                return
            waiting.pop()

    def _ids_of(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return list(prompt["prompt_token_ids"])
            prompt = prompt["prompt"]
        return (
            self._served.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else [int(token) for token in prompt]
        )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if len(prompts) and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _text_of(prompt: Prompt) -> str | None:
    if isinstance(prompt, Mapping):
        return prompt.get("prompt")
    return prompt if isinstance(prompt, str) else None


def _spread(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling params for {count} prompts")
    return list(params)


def _result(text: str | None, ids: list[int], answers: list[RequestOutput]) -> RequestResult:
    outputs = []
    for index, answer in enumerate(answers):
        assert answer.finish_reason is not None, f"{answer.id=} has not ended"
        outputs.append(
            CompletionOutput(
                index=index,
                text=answer.text,
                token_ids=answer.token_ids,
                logprobs=answer.logprobs,
                finish_reason=answer.finish_reason,
                stop_reason=answer.stop_reason,
            )
        )
    first = answers[0]
    return RequestResult(
        prompt=text,
        prompt_token_ids=tuple(ids),
        prompt_logprobs=first.prompt_logprobs,
        outputs=tuple(outputs),
        num_cached_tokens=first.num_cached_tokens,
    )
