"""Requests and their answers: the plain data that crosses from clients to the engine and back.

1. A front end validates once and makes a `SamplingParams`.
2. The engine turns prompt ids and params into a `Request`, which only the scheduler writes.
3. Each step yields a `RequestOutput` per advanced request: what is new since the one before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxserve.errors import UserError

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_BAD_WORDS = 128  # after tokenization, where a word is most often two: with and without a space before it
MAX_BAD_WORD_TOKENS = 32
MAX_LOGPROB_TOKEN_IDS = 128
MAX_PATTERN_TOKENS = 4096
MAX_N = 256
_MOST = 2**31 - 1
RANGES: Mapping[str, tuple[float, float]] = {
    "max_tokens": (0, _MOST), "min_tokens": (0, _MOST), "top_k": (0, _MOST), "n": (1, MAX_N), "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, MAX_LOGPROBS), "prompt_logprobs": (0, MAX_LOGPROBS), "thinking_token_budget": (-1, _MOST),
    "temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (0, 100),
    "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2),
}  # fmt: skip
_MOST_ENTRIES: Mapping[str, int] = {
    "stop": MAX_STOP_STRINGS, "bad_words": MAX_BAD_WORDS, "stop_token_ids": MAX_STOP_TOKEN_IDS, "logit_bias": MAX_LOGIT_BIAS,
    "logprob_token_ids": MAX_LOGPROB_TOKEN_IDS,
}  # fmt: skip
CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")

FinishReason = Literal["stop", "length", "repetition", "abort", "error"]
Status = Literal["waiting", "running", "preempted", "finished"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """What an answer must look like: exactly one of the first six fields; names and meanings are vLLM's.

    Args:
      json: a JSON schema, as text or parsed.
      regex: the whole answer matches it, in Rust's syntax.
      choice: the answer is one of these strings.
      grammar: in Lark's syntax, or in llama.cpp's (GBNF).
      json_object: any JSON object.
      structural_tag: free text with parts that have a form, as text or parsed: {"type": "structural_tag", "format": {...}} or
        {"structures": [{"begin", "schema", "end"}], "triggers": [...]}.
      disable_any_whitespace: no white space between the tokens of JSON.
      disable_additional_properties: objects of the schema that do not say so allow no further properties.
      whitespace_pattern: regex of the white space between the tokens of JSON.
      source: the field of the request that asked for it, for messages.
    Raises: UserError if none or several are given, or one of the wrong type.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    source: str = "structured_outputs"

    def __post_init__(self) -> None:
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None and (name != "json_object" or self.json_object)]
        if len(given) != 1:
            what = f"{' and '.join(given)} are given" if given else "none is given"
            raise UserError(self.source, f"{self.source} takes exactly one of {', '.join(CONSTRAINTS)}; {what}")
        for name in ("regex", "grammar", "whitespace_pattern"):
            if not isinstance(getattr(self, name), str | None):
                raise UserError(self.source, f"{self.source}.{name} must be a string, not {type(getattr(self, name)).__name__}")
        choice: Any = self.choice  # what comes from outside may be anything
        if choice is not None:
            if isinstance(choice, str) or not choice or not all(isinstance(item, str) for item in choice):
                raise UserError(self.source, f"{self.source}.choice must be a list of at least one string")
            object.__setattr__(self, "choice", tuple(choice))
        document: tuple[Any, ...] = (str, Mapping, type(None))
        for name, kinds in (("json", (*document, bool)), ("structural_tag", document)):
            if not isinstance(getattr(self, name), kinds):
                raise UserError(self.source, f"{self.source}.{name} must be an object, not {type(getattr(self, name)).__name__}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionDetection:
    """Ends an answer whose last tokens are some pattern, min_count times over; as vLLM's, whose 0 for both sizes turns it off.

    Args:
      max_pattern_size, min_pattern_size: tokens of a pattern.
    Raises: UserError.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        _check_range("repetition_detection.max_pattern_size", self.max_pattern_size, 0, MAX_PATTERN_TOKENS)
        _check_range("repetition_detection.min_pattern_size", self.min_pattern_size, 0, self.max_pattern_size)
        _check_range("repetition_detection.min_count", self.min_count, 2 if self.max_pattern_size else 0, _MOST)


class Matcher(Protocol):
    """Follows one answer through a constraint: fill, then consume the token that was sampled, and so on."""

    @property
    def finished(self) -> bool:
        """Whether nothing can follow."""
        ...

    def consume(self, token: int) -> None:
        """Go on to a token that the last mask allowed."""
        ...

    def fill(self, forbidden: Sequence[int] = ()) -> Any:
        """The tokens that may come next, i32[ceil(V / 32)], bit i % 32 of word i // 32 for token i.

        Args:
          forbidden: token ids left out unless nothing else remains.
        Raises: ValueError if the constraint is too complex to go on.
        """
        ...


class Constraint(Protocol):
    """A compiled `StructuredOutputs`."""

    def begin(self) -> Matcher:
        """A matcher at the beginning of an answer."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one request; the fields, defaults and meanings are those of vLLM's `SamplingParams`.

    Args:
      max_tokens: most tokens to sample; None means as many as the context holds.
      temperature: 0 is greedy.
      top_k: keep the k likeliest tokens; 0 or -1 keeps all.
      top_p: keep the likeliest tokens that together reach this probability, in (0, 1].
      min_p: drop tokens less likely than min_p times the likeliest, in [0, 1].
      presence_penalty: subtracted from the logit of each token sampled before, in [-2, 2].
      frequency_penalty: subtracted once per earlier occurrence in the output, in [-2, 2].
      repetition_penalty: divides (or multiplies, when negative) logits of tokens of prompt and output; > 0.
      logit_bias: token id -> value in [-100, 100], added to its logit.
      allowed_token_ids: the only tokens that may be sampled.
      bad_words: texts that the output must not contain; the token that would complete one, with or without a space before it, is banned.
      min_tokens: end-of-sequence and stop token ids are not sampled before this many tokens.
      seed: makes the request's tokens repeatable; None and -1 draw one at arrival.
      n: independent answers to one prompt; the front end makes n requests of it.
      stop: strings that end the output, cut from it unless include_stop_str_in_output.
      stop_token_ids: token ids that end the output, as the end-of-sequence id does.
      ignore_eos: go on past the end-of-sequence token.
      logprobs: top log-probabilities to return per sampled token (the sampled one always comes too).
      prompt_logprobs: the same for each prompt token.
      logprob_token_ids: tokens whose log-probabilities to return, instead of the top ones.
      repetition_detection: ends an answer that goes in circles, after min_tokens.
      thinking_token_budget: most tokens of reasoning, then its end is forced; None and -1 mean no limit.
      skip_special_tokens: leave special tokens out of the text.
      shown_special_ids: special tokens that stay in the text all the same, as whoever reads it looks for them.
      structured_outputs: what the answer must look like; when it is complete, the end of sequence follows, and counts, whatever
        min_tokens and ignore_eos say.
    Raises: UserError naming the field, on a value out of range.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    min_tokens: int = 0
    seed: int | None = None
    n: int = 1
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] = ()
    repetition_detection: RepetitionDetection | None = None
    thinking_token_budget: int | None = None
    skip_special_tokens: bool = True
    shown_special_ids: frozenset[int] = frozenset()
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "logprob_token_ids", "bad_words"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        object.__setattr__(self, "seed", None if self.seed == -1 else self.seed)  # as in vLLM
        object.__setattr__(self, "top_k", max(self.top_k, 0) if self.top_k >= -1 else self.top_k)
        self._check_numbers()
        self._check_lists()

    def _check_numbers(self) -> None:
        for name, (low, high) in RANGES.items():
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), low, high)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise UserError(name, f"{name}=0 is not allowed; it must be above 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError("min_tokens", f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}")

    def _check_lists(self) -> None:
        for name, most in _MOST_ENTRIES.items():
            if len(getattr(self, name) or ()) > most:
                raise UserError(name, f"{name} has {len(getattr(self, name))} entries; at most {most} are allowed")
        for name, texts in (("stop", self.stop), ("bad_words", self.bad_words)):
            for text in texts:
                if not text or (name == "bad_words" and not text.strip()):
                    raise UserError(name, f"{name} must not hold an empty string")
                if len(text.encode("utf-8", "surrogatepass")) > MAX_STOP_CHARS:
                    raise UserError(name, f"a string of {name} may have at most {MAX_STOP_CHARS} bytes")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise UserError("allowed_token_ids", "allowed_token_ids allows no token")
        for value in (self.logit_bias or {}).values():
            _check_range("logit_bias", value, -100.0, 100.0)

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise UserError if any token id lies outside the logits' width `vocab_size`."""
        for field in ("logit_bias", "stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            for token in getattr(self, field) or ():
                if not 0 <= token < vocab_size:
                    raise UserError(field, f"token id {token} is outside the vocabulary of {vocab_size} tokens")

    def clone(self) -> SamplingParams:
        """The same: nothing changes them."""
        return self

    def of_answer(self, number: int) -> SamplingParams:
        """Those of one of the n answers; seeds run on, and wrap below zero."""
        seed = None if self.seed is None else (self.seed + number) % 2**63
        return self if self.n == 1 else dataclasses.replace(self, n=1, seed=seed)

    @property
    def num_logprobs(self) -> int | None:
        """How many tokens beside the sampled one come with their log-probabilities; None if no log-probabilities are wanted at all."""
        return len(self.logprob_token_ids) or self.logprobs

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens seen so far change the logits."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One sequence in the engine; written by the scheduler alone.

    Args:
      id: the engine's own id, never a client's.
      prompt_ids: token ids of the prompt.
      params: how to sample; max_tokens is set (not None) and fits the context.
      priority: lower goes first; ties go by arrival.
      arrival_s: time.monotonic() at arrival.
      seed: the number that the request's random keys derive from, 32 bits.
      cache_salt: keeps the prefix cache of one tenant from another; None shares.
      stop_ids: token ids that end the output (end-of-sequence and stop_token_ids; empty of eos with ignore_eos).
      bad_words: params.bad_words as token ids.
      output_ids: tokens sampled and collected.
      num_computed: leading tokens of prompt + output whose keys and values are in the cache, or will be once
        the steps already dispatched have run.
      num_in_flight: tokens sampled by dispatched steps and not collected yet.
      pages: ids of the pages that hold the keys and values, in order.
      slot: index of the row of per-request sampling state on the device while running, else -1.
      num_cached: prompt tokens that the prefix cache held at the first admission.
      constraint: of params.structured_outputs, compiled, or of bounds like it. The next token of such a request is not scheduled
        before the last one is known.
      awaits_mask: nor before the tokens that may come next are; written by the engine.
      second_at: position at which the second text of a pair begins, for models that tell the two apart.
    """

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0
    arrival_s: float = 0.0
    seed: int = 0
    cache_salt: str | None = None
    stop_ids: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    output_ids: list[int] = dataclasses.field(default_factory=list[int])
    num_computed: int = 0
    num_in_flight: int = 0
    pages: list[int] = dataclasses.field(default_factory=list[int])
    slot: int = -1
    num_cached: int = -1
    num_preemptions: int = 0
    status: Status = "waiting"
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    constraint: Constraint | None = None
    awaits_mask: bool = False
    second_at: int | None = None

    @property
    def num_known(self) -> int:
        """Tokens whose ids the host knows: prompt and collected output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, those in flight included."""
        return self.num_known + self.num_in_flight


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one position, natural logarithm, of the raw (untempered, unpenalized) distribution.

    Args:
      token_id: the token that stands at this position.
      logprob: its log-probability, finite.
      rank: 1-based rank of that token.
      top: the likeliest tokens, best first, as (token id, log-probability); with logprob_token_ids those, in the request's order.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What one request gained since its last output; the sum of all of them is the answer.

    Args:
      id: the engine's id of the request.
      text: text that became certain (never half a character, never part of a stop string).
      token_ids: tokens sampled since the last output.
      logprobs: one per token of token_ids if asked for, else None.
      prompt_logprobs: in the first output that has them: one per prompt token, the first None; else None.
      finish_reason: set in the last output, and only there.
      stop_reason: the stop string or token id that ended it; None for end-of-sequence and for length.
      num_prompt_tokens, num_cached_tokens, num_output_tokens: totals so far.
      error: message for the client when finish_reason is "error".
      fault: the field of the request that caused the error; None if the server did.
      pooled: the text's vector, of models that give one.
    """

    id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None
    fault: str | None = None
    pooled: NDArray[np.float32] | None = None


def merge_outputs(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Consecutive outputs of one request as one, for a reader who was slower than the engine."""
    if len(outputs) == 1:
        return outputs[0]
    assert all(output.finish_reason is None for output in outputs[:-1]), "nothing comes after a finish reason"
    logprobs = [entry for output in outputs for entry in output.logprobs or ()]
    return dataclasses.replace(
        outputs[-1],
        text="".join(output.text for output in outputs),
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=tuple(logprobs) if any(output.logprobs is not None for output in outputs) else None,
        prompt_logprobs=next((output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None), None),
    )


def _check_range(field: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(field, f"{field} must be a number, not {type(value).__name__}")
    if not math.isfinite(value) or not low <= value <= high:
        raise UserError(field, f"{field}={value!s:.40} is out of range; it must be in [{low}, {high}]")
