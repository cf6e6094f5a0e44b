"""What `LLM` and `AsyncLLM` answer with: the names, types and meanings are those of vLLM's `RequestOutput`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxserve.request import FinishReason, RequestOutput, SamplingParams, TokenLogprobs
from jaxserve.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a token was at its place.

    Args:
      logprob: of the raw distribution, natural logarithm.
      rank: 1 for the likeliest; None where it is not known, of tokens chosen by logprob_token_ids.
      decoded_token: its text; parts of characters become U+FFFD.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# Of one place: the token that stands there first, then the likeliest, or the chosen ones.
Position = dict[int, Logprob]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One of a prompt's n answers.

    Args:
      index: 0-based number of the answer.
      cumulative_logprob: of all its tokens together, if logprobs are asked for.
      logprobs: one per token, if asked for.
      finish_reason: None while it goes on, which only AsyncLLM shows.
      stop_reason: the stop string or token id that ended it, if one did.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[Position] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None

    def finished(self) -> bool:
        """Whether nothing follows."""
        return self.finish_reason is not None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestResult:
    """A prompt and its answers; prompt_logprobs has one entry per prompt token, the first None."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[Position | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int


def make_result(
    tokenizer: Tokenizer, text: str | None, ids: list[int], params: SamplingParams, answers: Sequence[RequestOutput]
) -> RequestResult:
    """A prompt and its answers, whole or as far as they have come."""
    first = answers[0]
    prompt, ranked = first.prompt_logprobs, not params.logprob_token_ids
    return RequestResult(
        request_id=first.id,
        prompt=text,
        prompt_token_ids=ids,
        prompt_logprobs=None if prompt is None else [None if entry is None else _position(tokenizer, entry, True) for entry in prompt],
        outputs=[_completion(tokenizer, index, answer, ranked) for index, answer in enumerate(answers)],
        finished=all(answer.finish_reason is not None for answer in answers),
        num_cached_tokens=first.num_cached_tokens,
    )


def _completion(tokenizer: Tokenizer, index: int, answer: RequestOutput, ranked: bool) -> CompletionOutput:
    found = answer.logprobs
    return CompletionOutput(
        index=index,
        text=answer.text,
        token_ids=list(answer.token_ids),
        cumulative_logprob=None if found is None else sum(entry.logprob for entry in found),
        logprobs=None if found is None else [_position(tokenizer, entry, ranked) for entry in found],
        finish_reason=answer.finish_reason,
        stop_reason=answer.stop_reason,
    )


def _position(tokenizer: Tokenizer, entry: TokenLogprobs, ranked: bool) -> Position:
    position = {entry.token_id: Logprob(entry.logprob, entry.rank, tokenizer.token_text(entry.token_id))}
    for rank, (token, logprob) in enumerate(entry.top, start=1):
        position.setdefault(token, Logprob(logprob, rank if ranked else None, tokenizer.token_text(token)))
    return position
