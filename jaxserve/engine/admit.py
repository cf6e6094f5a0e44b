"""From a prompt and its parameters to a request that the engine can take, or a reason why not."""

from __future__ import annotations

import dataclasses
import functools
import random
import time
import uuid
from collections.abc import Sequence

from jaxserve.engine.bounds import bound
from jaxserve.engine.load import ServedModel
from jaxserve.errors import UserError
from jaxserve.request import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, Constraint, Request, SamplingParams
from jaxserve.runner.pooling import POOLED_TOKEN
from jaxserve.text.tokenizer import Tokenizer


class Admission:
    """Checks requests against a model and draws seeds for those that bring none.

    Args:
      seed: of the generator that draws them.
    """

    def __init__(self, model: ServedModel, *, seed: int) -> None:
        self._model = model
        self._seeds = random.Random(seed)
        find = functools.partial(bad_word_ids, tokenizer=model.tokenizer, vocab_size=model.vocab_size)
        self._bad_word_ids = functools.lru_cache(64)(find)  # the answers to one prompt come one by one

    def make_request(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, priority: int = 0, cache_salt: str | None = None,
        constraint: Constraint | None = None,
    ) -> Request:  # fmt: skip
        """A request with max_tokens settled.

        Args:
          constraint: params.structured_outputs, compiled.
        Raises: UserError naming the field; code context_length_exceeded if prompt and max_tokens exceed the context.
        """
        model = self._model
        if model.pooling is not None:
            raise UserError("model", f"this model turns texts into vectors (task {model.pooling.task!r}); it writes no text")
        assert (constraint is None) == (params.structured_outputs is None), f"{constraint=} {params.structured_outputs=}"
        params.check_token_ids(model.vocab_size)
        self._check_ids(prompt_ids)
        max_tokens = self._max_tokens(len(prompt_ids), params)
        if params.thinking_token_budget not in (None, -1) and "thinking_token_budget" in model.refused:
            raise UserError("thinking_token_budget", f"thinking_token_budget {model.refused['thinking_token_budget']}")
        constraint = bound(constraint, params, prompt_ids, model.thinking, model.vocab_size)
        bad_words = self._bad_word_ids(params.bad_words)
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else model.eos_ids)
        seed = self._seeds.getrandbits(32) if params.seed is None else (params.seed ^ (params.seed >> 32)) & 0xFFFFFFFF
        return Request(
            id=uuid.uuid4().hex, prompt_ids=list(prompt_ids), params=dataclasses.replace(params, max_tokens=max_tokens),
            priority=priority, arrival_s=time.monotonic(), seed=seed, cache_salt=cache_salt, stop_ids=stops, bad_words=bad_words,
            constraint=constraint,
        )  # fmt: skip

    def make_pool_request(
        self, prompt_ids: Sequence[int], *, second_at: int | None = None, priority: int = 0, cache_salt: str | None = None
    ) -> Request:
        """A request for the vector of a text.

        Args:
          second_at: where the second text of a pair begins.
        Raises: UserError; code context_length_exceeded if the text is too long.
        """
        max_len = self._model.max_len
        if self._model.pooling is None:
            raise UserError("model", "this model writes text; vectors are for models of them, or with --runner=pooling")
        self._check_ids(prompt_ids)
        if len(prompt_ids) > max_len:
            message = f"the input has {len(prompt_ids)} tokens, but this model takes at most {max_len}"
            raise UserError("input", f"{message}; shorten it or set truncate_prompt_tokens", code="context_length_exceeded")
        return Request(
            id=uuid.uuid4().hex, prompt_ids=list(prompt_ids), params=SamplingParams(max_tokens=1), priority=priority,
            arrival_s=time.monotonic(), cache_salt=cache_salt, stop_ids=frozenset((POOLED_TOKEN,)), second_at=second_at,
        )  # fmt: skip

    def _check_ids(self, prompt_ids: Sequence[int]) -> None:
        if not prompt_ids:
            raise UserError("prompt", "the prompt is empty; it must have at least one token")
        outside = next((token for token in prompt_ids if not 0 <= token < self._model.vocab_size), None)
        if outside is not None:
            raise UserError("prompt", f"token id {outside} is outside the vocabulary of {self._model.vocab_size} tokens")

    def _max_tokens(self, prompt_len: int, params: SamplingParams) -> int:
        room = self._model.max_len - prompt_len
        if room < 1:
            raise UserError(
                "prompt",
                f"the prompt has {prompt_len} tokens, but this model's context is {self._model.max_len} tokens, "
                "one of them for the answer; shorten the prompt",
                code="context_length_exceeded",
            )
        if params.max_tokens is None:
            return room
        if params.max_tokens > room:
            raise UserError(
                "max_tokens",
                f"max_tokens={params.max_tokens} with a prompt of {prompt_len} tokens exceeds this model's context of "
                f"{self._model.max_len} tokens; ask for at most {room}",
                code="context_length_exceeded",
            )
        if params.max_tokens == 0:
            raise UserError("max_tokens", "max_tokens must be at least 1")
        if params.min_tokens > params.max_tokens:
            raise UserError("min_tokens", f"min_tokens={params.min_tokens} exceeds max_tokens={params.max_tokens}")
        return params.max_tokens


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Bad words as token ids: each as it stands, and as it is written behind a space where that begins with a token of its own.

    Raises: UserError if they are too many or too long.
    Source: vLLM's rule for the second form: as many tokens as the first, beginning with another one.
    """
    found: list[tuple[int, ...]] = []
    for word in words:
        plain, spaced = (tuple(tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False)) for prefix in ("", " "))
        forms = [plain, spaced] if len(spaced) == len(plain) and spaced[:1] != plain[:1] else [plain]
        if not plain or max(plain) >= vocab_size:
            raise UserError("bad_words", f"{word!r:.60} has no tokens of this model")
        if len(plain) > MAX_BAD_WORD_TOKENS:
            raise UserError("bad_words", f"{word!r:.60} has {len(plain)} tokens; at most {MAX_BAD_WORD_TOKENS} are allowed")
        found += forms
    if len(found) > MAX_BAD_WORDS:
        raise UserError("bad_words", f"bad_words make {len(found)} sequences of tokens; at most {MAX_BAD_WORDS} are allowed")
    return tuple(found)
