"""Offline use: `LLM(model).generate(prompts, params)` runs the engine in the caller's thread."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from jaxserve.config import DEFAULT_MODEL, make_config
from jaxserve.engine.admit import Admission
from jaxserve.engine.beam import BeamSearch, BeamSearchOutput, BeamSearchParams, only_logprobs, step_params
from jaxserve.engine.load import ServedModel, load_engine
from jaxserve.engine.vectors import ClassificationOutput, EmbeddingOutput, PoolingOutput, PoolingResult, ScoringOutput, Vectors
from jaxserve.errors import QueueFullError, UserError
from jaxserve.metrics import Figure, HistogramFigure, Metrics
from jaxserve.outputs import RequestResult, make_result
from jaxserve.pooling import PoolingParams, PoolingTask
from jaxserve.request import Request, RequestOutput, SamplingParams, merge_outputs
from jaxserve.text.chat import ChatTemplate, render_pair

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]
T = TypeVar("T")


class LLM:
    """A model in this process.

    Args:
      model: hub id, directory of safetensors, .gguf file or Orbax directory.
      options: fields of the configuration by name, such as max_len=2048, dtype="bfloat16", max_rows=32, or by vLLM's name, such as
        max_model_len=2048; performance_mode is "throughput" unless given: nobody waits for single tokens here.
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

    def get_tokenizer(self) -> Any:
        """The same as a tokenizer of transformers, as vLLM gives it."""
        return self.tokenizer.to_transformers(self._served.chat.source)

    def get_default_sampling_params(self) -> SamplingParams:
        """What answers are sampled with where no parameters are given: the model's own, as --generation-config says."""
        return SamplingParams(**self._served.defaults)

    def get_metrics(self) -> list[Figure | HistogramFigure]:
        """What /metrics of a server would show."""
        return self.metrics.read()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestResult]:
        """Answer each prompt; answers come in the order of the prompts.

        Args:
          prompts: one or many of: text, token ids, or {"prompt": text} / {"prompt_token_ids": ids}.
          sampling_params: for all prompts, or one for each; None for those of get_default_sampling_params.
          use_tqdm: show a bar, or what makes one.
          priority: of all prompts, or of each; lower goes first.
        Raises: UserError if any of them cannot be served; then none is.
        """
        listed = _as_list(prompts)
        texts = [text_of(prompt) for prompt in listed]
        ids = [ids_of(self._served, prompt) for prompt in listed]
        return self._run(texts, ids, sampling_params, use_tqdm, priority)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestResult]:
        """Answer one conversation, or many, through the model's chat template, or one in its place; see generate."""
        chat = self._served.chat if chat_template is None else ChatTemplate(chat_template, self.tokenizer)
        single = not messages or isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if single else list(messages)
        texts: list[str | None] = [
            render_chat(
                chat, conversation, tools=tools, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]  # fmt: skip
        ids = [self._served.tokenizer.encode(text or "", add_special_tokens=False) for text in texts]
        return self._run(texts, ids, sampling_params, use_tqdm, priority)

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
        self, prompts: Prompt | Sequence[Prompt], pooling_params: PoolingParams | None = None, *, use_tqdm: bool = True,
        pooling_task: PoolingTask | None = None,
    ) -> list[PoolingResult[PoolingOutput]]:  # fmt: skip
        """What the model gives for each prompt: embeddings or probabilities, or an error if that is not the task."""
        return self._vectors(use_tqdm).encode(_inputs(prompts), pooling_params or PoolingParams(), pooling_task)

    def score(
        self, data_1: str | Sequence[str], data_2: str | Sequence[str], *, pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True, chat_template: str | None = None, chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingResult[ScoringOutput]]:  # fmt: skip
        """How well texts go together, one with many or pair by pair, by a cross-encoder or by the angle between embeddings.

        Args:
          chat_template: prints a classifier's pairs, as messages of the roles query and document.
          chat_template_kwargs: its variables, such as an instruction.
        """
        first, second = ([data] if isinstance(data, str) else list(data) for data in (data_1, data_2))
        if chat_template is None and chat_template_kwargs:
            raise UserError("chat_template_kwargs", "chat_template_kwargs needs a chat_template")
        render = None
        if chat_template is not None:
            render = functools.partial(render_pair, ChatTemplate(chat_template, self.tokenizer), kwargs=dict(chat_template_kwargs or {}))
        return self._vectors(use_tqdm).score(first, second, pooling_params or PoolingParams(), render)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes."""
        return self._engine.reset_prefix_cache(preempt=False)

    def _vectors(self, use_tqdm: bool) -> Vectors:
        return Vectors(self._served, self._admission, lambda requests: self._drive(requests, use_tqdm=use_tqdm))

    def _run(
        self, texts: list[str | None], prompts: list[list[int]], params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool | Callable[..., Any], priority: int | Sequence[int] | None,
    ) -> list[RequestResult]:  # fmt: skip
        chosen = _spread("sampling_params", self.get_default_sampling_params() if params is None else params, len(prompts))
        priorities = _spread("priority", 0 if priority is None else priority, len(prompts))
        requests: list[list[Request]] = []
        for ids, each, rank in zip(prompts, chosen, priorities, strict=True):
            constraint = None if each.structured_outputs is None else self._served.grammars.compile(each.structured_outputs)
            make = functools.partial(self._admission.make_request, ids, priority=rank, constraint=constraint)
            requests.append([make(each.of_answer(number)) for number in range(each.n)])
        answers = self._drive([request for group in requests for request in group], use_tqdm=use_tqdm)
        return [
            make_result(self.tokenizer, text, ids, each, [answers[request.id] for request in group])
            for text, ids, each, group in zip(texts, prompts, chosen, requests, strict=True)
        ]

    def _drive(self, requests: list[Request], *, use_tqdm: bool | Callable[..., Any]) -> dict[str, RequestOutput]:
        """Run the engine until every request has ended; on an interrupt none stays behind."""
        parts: dict[str, list[RequestOutput]] = {request.id: [] for request in requests}
        waiting = list(reversed(requests))
        try:
            show = use_tqdm if callable(use_tqdm) else functools.partial(tqdm, disable=None if use_tqdm else True)
            with show(total=len(requests), desc="generating", unit="request") as bar:
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
    chat: ChatTemplate, conversation: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None, add_generation_prompt: bool,
    continue_final_message: bool, kwargs: Mapping[str, Any] | None,
) -> str:  # fmt: skip
    """A conversation as the model's chat template prints it."""
    return chat.render(
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


def _spread(name: str, given: T | Sequence[T], count: int) -> list[T]:
    """One for each prompt."""
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{len(given)} {name} for {count} prompts")
    return list(given)
