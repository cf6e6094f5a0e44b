"""From a prompt and its parameters to a request that the engine can take, or a reason why not."""

from __future__ import annotations

import dataclasses
import random
import time
import uuid
from collections.abc import Sequence

from jaxserve.engine.load import ServedModel
from jaxserve.errors import UserError
from jaxserve.request import Constraint, Request, SamplingParams


class Admission:
    """Checks requests against a model and draws seeds for those that bring none.

    Args:
      seed: of the generator that draws them.
    """

    def __init__(self, model: ServedModel, *, seed: int) -> None:
        self._model = model
        self._seeds = random.Random(seed)

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
        assert (constraint is None) == (params.structured_outputs is None), f"{constraint=} {params.structured_outputs=}"
        params.check_token_ids(model.vocab_size)
        if not prompt_ids:
            raise UserError("prompt", "the prompt is empty; it must have at least one token")
        outside = next((token for token in prompt_ids if not 0 <= token < model.vocab_size), None)
        if outside is not None:
            raise UserError("prompt", f"token id {outside} is outside the vocabulary of {model.vocab_size} tokens")
        max_tokens = self._max_tokens(len(prompt_ids), params)
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else model.eos_ids)
        seed = self._seeds.getrandbits(32) if params.seed is None else (params.seed ^ (params.seed >> 32)) & 0xFFFFFFFF
        return Request(
            id=uuid.uuid4().hex, prompt_ids=list(prompt_ids), params=dataclasses.replace(params, max_tokens=max_tokens),
            priority=priority, arrival_s=time.monotonic(), seed=seed, cache_salt=cache_salt, stop_ids=stops, constraint=constraint,
        )  # fmt: skip

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
