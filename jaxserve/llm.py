"""Offline use: `LLM(model).generate(prompts, params)` runs the engine in the caller's thread."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from jaxserve.config import DEFAULT_MODEL, make_config
from jaxserve.engine.admit import Admission
from jaxserve.engine.beam import BeamSearch, BeamSearchOutput, BeamSearchParams, only_logprobs, step_params
from jaxserve.engine.load import ServedModel, load_engine
from jaxserve.engine.vectors import ClassificationOutput, EmbeddingOutput, PoolingOutput, PoolingResult, ScoringOutput, Vectors
from jaxserve.errors import QueueFullError, UserError
from jaxserve.metrics import Figure, HistogramFigure, Metrics
from jaxserve.pooling import PoolingParams
from jaxserve.request import FinishReason, Request, RequestOutput, SamplingParams, TokenLogprobs, merge_outputs

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One of a prompt's n answers.

    Args:
      index: 0-based number of the answer.
      logprobs: one per token, if asked for.
      finish_reason: None while it goes on, which only AsyncLLM shows.
      stop_reason: the stop string or token id that ended it, if one did.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
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
      options: fields of the configuration by name, such as max_len=2048, dtype="bfloat16", max_rows=32; performance_mode is
        "throughput" unless given: nobody waits for single tokens here.
    Raises: ConfigError saying what does not fit.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any) -> None:
        config = make_config({"model": model, "performance_mode": "throughput", **options})
        self.metrics = Metrics(config.served_names[0])
        self._engine, self._served = load_engine(config, self.metrics, lambda _: None)
        self._admission = Admission(self._served, seed=config.model.seed)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._served.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What answers are sampled with where no parameters are given: the model's own, as --generation-config says."""
        return SamplingParams(**self._served.defaults)

    def get_metrics(self) -> list[Figure | HistogramFigure]:
        """What /metrics of a server would show."""
        return self.metrics.read()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, *, use_tqdm: bool = True
    ) -> list[RequestResult]:
        """Answer each prompt; answers come in the order of the prompts.

        Args:
          prompts: one or many of: text, token ids, or {"prompt": text} / {"prompt_token_ids": ids}.
          params: for all prompts, or one for each; None for those of get_default_sampling_params.
        Raises: UserError if any of them cannot be served; then none is.
        """
        listed = _as_list(prompts)
        texts = [text_of(prompt) for prompt in listed]
        ids = [ids_of(self._served, prompt) for prompt in listed]
        return self._run(texts, ids, _spread(self.get_default_sampling_params() if params is None else params, len(ids)), use_tqdm=use_tqdm)

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
            render_chat(
                self._served, conversation, tools=tools, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]  # fmt: skip
        ids = [self._served.tokenizer.encode(text or "", add_special_tokens=False) for text in texts]
        return self._run(texts, ids, _spread(self.get_default_sampling_params() if params is None else params, len(ids)), use_tqdm=use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The likeliest answers to each prompt that a search of some width finds, as vLLM searches.

        Raises: UserError if any of the prompts cannot be served; then none is.
        """
        common, eos_ids = params.sampling(), self._served.eos_ids
        ids = [ids_of(self._served, prompt) for prompt in _as_list(prompts)]
        for each in ids:
            self._admission.make_request(each, dataclasses.replace(common, n=1))
        searches = [BeamSearch(each, common, length_penalty=params.length_penalty, eos_ids=eos_ids) for each in ids]
        for _ in tqdm(range(params.max_tokens), desc="searching", unit="token", disable=None if use_tqdm else True):
            going = [(search, prompts) for search in searches if (prompts := search.prompts)]
            if not going:
                break
            asked = [[self._admission.make_request(prompt, step_params(common)) for prompt in some] for _, some in going]
            found = self._drive([request for group in asked for request in group], use_tqdm=False)
            for (search, _), group in zip(going, asked, strict=True):
                search.take([only_logprobs(found[request.id]) for request in group])
        tokenizer = self._served.tokenizer
        return [BeamSearchOutput(sequences=tuple(beam.sequence(tokenizer, common) for beam in search.best())) for search in searches]

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling_params: PoolingParams | None = None, use_tqdm: bool = True
    ) -> list[PoolingResult[EmbeddingOutput]]:
        """The embedding of each prompt, of models that give them; see docs/embeddings.md.

        Raises: UserError if the model gives none, or any of the prompts cannot be served; then none is.
        """
        return self._vectors(use_tqdm).embed(_inputs(prompts), pooling_params or PoolingParams())

    def classify(
        self, prompts: Prompt | Sequence[Prompt], *, pooling_params: PoolingParams | None = None, use_tqdm: bool = True
    ) -> list[PoolingResult[ClassificationOutput]]:
        """The probability of each label for each prompt, of classifiers."""
        return self._vectors(use_tqdm).classify(_inputs(prompts), pooling_params or PoolingParams())

    def encode(
        self, prompts: Prompt | Sequence[Prompt], *, pooling_params: PoolingParams | None = None, use_tqdm: bool = True
    ) -> list[PoolingResult[PoolingOutput]]:
        """What the model gives for each prompt: embeddings or probabilities."""
        return self._vectors(use_tqdm).encode(_inputs(prompts), pooling_params or PoolingParams())

    def score(
        self, data_1: str | Sequence[str], data_2: str | Sequence[str], *, pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
    ) -> list[PoolingResult[ScoringOutput]]:  # fmt: skip
        """How well texts go together, one with many or pair by pair, by a cross-encoder or by the angle between embeddings."""
        first, second = ([data] if isinstance(data, str) else list(data) for data in (data_1, data_2))
        return self._vectors(use_tqdm).score(first, second, pooling_params or PoolingParams())

    def _vectors(self, use_tqdm: bool) -> Vectors:
        return Vectors(self._served, self._admission, lambda requests: self._drive(requests, use_tqdm=use_tqdm))

    def _run(
        self, texts: list[str | None], prompts: list[list[int]], params: list[SamplingParams], *, use_tqdm: bool
    ) -> list[RequestResult]:
        requests: list[list[Request]] = []
        for ids, each in zip(prompts, params, strict=True):
            constraint = None if each.structured_outputs is None else self._served.grammars.compile(each.structured_outputs)
            requests.append([self._admission.make_request(ids, each.of_answer(number), constraint=constraint) for number in range(each.n)])
        answers = self._drive([request for group in requests for request in group], use_tqdm=use_tqdm)
        return [
            make_result(text, ids, [answers[request.id] for request in group])
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


def ids_of(served: ServedModel, prompt: Prompt) -> list[int]:
    """The token ids of a prompt."""
    if isinstance(prompt, Mapping):
        if "prompt_token_ids" in prompt:
            return list(prompt["prompt_token_ids"])
        prompt = prompt["prompt"]
    return served.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else [int(token) for token in prompt]


def text_of(prompt: Prompt) -> str | None:
    """The text of a prompt, if it was given as one."""
    if isinstance(prompt, Mapping):
        return prompt.get("prompt")
    return prompt if isinstance(prompt, str) else None


def render_chat(
    served: ServedModel, conversation: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None, add_generation_prompt: bool,
    continue_final_message: bool, kwargs: Mapping[str, Any] | None,
) -> str:  # fmt: skip
    """A conversation as the model's chat template prints it."""
    return served.chat.render(
        [dict(message) for message in conversation], tools=None if tools is None else [dict(tool) for tool in tools],
        add_generation_prompt=add_generation_prompt and not continue_final_message, continue_final_message=continue_final_message,
        kwargs=dict(kwargs or {}),
    )  # fmt: skip


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if len(prompts) and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _inputs(prompts: Prompt | Sequence[Prompt]) -> list[str | Sequence[int]]:
    """Text or token ids of each prompt."""
    listed = _as_list(prompts)
    return [
        (prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt["prompt"]) if isinstance(prompt, Mapping) else prompt
        for prompt in listed
    ]


def _spread(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling params for {count} prompts")
    return list(params)


def make_result(text: str | None, ids: list[int], answers: Sequence[RequestOutput]) -> RequestResult:
    """A prompt and its answers, whole or as far as they have come."""
    outputs: list[CompletionOutput] = []
    for index, answer in enumerate(answers):
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
