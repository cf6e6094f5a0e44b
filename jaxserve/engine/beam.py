"""Beam search: which texts to go on with, told by the log-probabilities of what may come next; who asks for those is another's business.

1. `prompts` are the texts of the beams; their next tokens' log-probabilities are asked for, NUM_CANDIDATES x width each.
2. `take` makes of them the next beams, the likeliest first; those that end are put aside.
3. When no beam is left, or max_tokens are reached, `best` ranks all by log-probability / length ** length_penalty.

Lengths are of prompt and answer without its end of sequence, and nothing stops early, both as in vLLM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jaxserve.errors import UserError
from jaxserve.request import MAX_LOGPROBS, RequestOutput, SamplingParams, TokenLogprobs
from jaxserve.text.detokenize import Detokenizer
from jaxserve.text.tokenizer import Tokenizer

# As transformers has it: if each of them might end, as many beams are left as there were.
NUM_CANDIDATES = 2
MAX_WIDTH = MAX_LOGPROBS // NUM_CANDIDATES
# What a search does not look at, and must not seem to.
_WITHOUT = (
    "stop", "stop_token_ids", "min_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "allowed_token_ids", "bad_words", "prompt_logprobs", "logprob_token_ids", "repetition_detection", "thinking_token_budget",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """A search offline; the names are vLLM's."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def sampling(self) -> SamplingParams:
        """The same as the parameters of a request. Raises: UserError."""
        params = SamplingParams(
            n=self.beam_width, max_tokens=self.max_tokens, ignore_eos=self.ignore_eos, skip_special_tokens=self.skip_special_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
        )  # fmt: skip
        check_beams(params)
        return params


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchSequence:
    """One answer of a search.

    Args:
      tokens: prompt and answer.
      text: of the answer.
      cum_logprob: of all its tokens together.
    """

    tokens: list[int]
    text: str
    cum_logprob: float
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchOutput:
    """The answers to one prompt, best first."""

    sequences: tuple[BeamSearchSequence, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Beam:
    """A text that may become an answer.

    Args:
      ids: prompt and answer.
      logprob: of the answer, all its tokens together.
      logprobs: one per token of the answer.
      ended: by an end of sequence, which is the last of its tokens.
    """

    ids: tuple[int, ...]
    logprob: float = 0.0
    logprobs: tuple[TokenLogprobs, ...] = ()
    ended: bool = False

    @property
    def answer(self) -> tuple[int, ...]:
        """The ids behind the prompt."""
        return self.ids[len(self.ids) - len(self.logprobs) :]

    def output(self, tokenizer: Tokenizer, params: SamplingParams) -> RequestOutput:
        """The whole answer, as if it had been sampled."""
        ids, prompt_ids = self.answer, self.ids[: len(self.ids) - len(self.logprobs)]
        shown = ids[:-1] if self.ended and not params.include_stop_str_in_output else ids
        return RequestOutput(
            id="", text=Detokenizer(tokenizer, prompt_ids, params).push(shown, final=True).text, token_ids=ids,
            logprobs=None if params.logprobs is None else self.logprobs, finish_reason="stop" if self.ended else "length",
            num_prompt_tokens=len(prompt_ids), num_output_tokens=len(ids),
        )  # fmt: skip

    def sequence(self, tokenizer: Tokenizer, params: SamplingParams) -> BeamSearchSequence:
        """The whole answer, as LLM.beam_search gives it."""
        return BeamSearchSequence(
            tokens=list(self.ids), text=self.output(tokenizer, params).text, cum_logprob=self.logprob, logprobs=self.logprobs,
            finish_reason="stop" if self.ended else "length",
        )  # fmt: skip


class BeamSearch:
    """One search.

    Args:
      params: n is the width, max_tokens is set; ignore_eos lets nothing end.
      length_penalty: above 1 longer answers are preferred, below shorter ones.
      eos_ids: tokens that end an answer.
    """

    def __init__(self, prompt_ids: Sequence[int], params: SamplingParams, *, length_penalty: float, eos_ids: frozenset[int]) -> None:
        assert params.max_tokens is not None, "whoever searches has settled the length"
        self._width, self._length_penalty = params.n, length_penalty
        self._left = params.max_tokens
        self._eos_ids = frozenset[int]() if params.ignore_eos else eos_ids
        self._beams = [Beam(ids=tuple(prompt_ids))]
        self._ended: list[Beam] = []

    @property
    def prompts(self) -> list[list[int]]:
        """The texts to go on with; none when the search is over."""
        return [list(beam.ids) for beam in self._beams] if self._left else []

    def take(self, found: Sequence[TokenLogprobs]) -> None:
        """Go on with what may come next: one entry per prompt, as `step_params` makes the engine answer."""
        grown: list[Beam] = []
        for beam, entry in zip(self._beams, found, strict=True):
            for rank, (token, logprob) in enumerate(entry.top[: NUM_CANDIDATES * self._width], start=1):
                ended = token in self._eos_ids
                own = TokenLogprobs(token_id=token, logprob=logprob, rank=rank, top=entry.top)
                longer = Beam(ids=(*beam.ids, token), logprob=beam.logprob + logprob, logprobs=(*beam.logprobs, own), ended=ended)
                (self._ended if ended else grown).append(longer)
        self._beams = sorted(grown, key=lambda beam: -beam.logprob)[: self._width]
        self._left = self._left - 1 if self._beams else 0

    def best(self) -> list[Beam]:
        """The answers, best first."""
        return sorted([*self._ended, *self._beams], key=self._score, reverse=True)[: self._width]

    def _score(self, beam: Beam) -> float:
        return beam.logprob / max(len(beam.ids) - beam.ended, 1) ** self._length_penalty


def step_params(params: SamplingParams) -> SamplingParams:
    """What to ask the engine for each prompt of a search."""
    num_logprobs = max(NUM_CANDIDATES * params.n, params.logprobs or 0)
    return SamplingParams(max_tokens=1, temperature=0, logprobs=num_logprobs, skip_special_tokens=False)


def only_logprobs(output: RequestOutput) -> TokenLogprobs:
    """What may come next, of the answer to such a question."""
    assert output.logprobs is not None and len(output.logprobs) == 1, "one token was asked for, with its log-probabilities"
    return output.logprobs[0]


def check_beams(params: SamplingParams) -> None:
    """Raise UserError for parameters that a search cannot keep to."""
    if params.n > MAX_WIDTH:
        raise UserError("n", f"n={params.n} beams are too many; a search has at most {MAX_WIDTH}")
    if params.structured_outputs is not None:
        raise UserError(params.structured_outputs.source, f"{params.structured_outputs.source} and use_beam_search cannot both be given")
    plain = SamplingParams()
    for name in _WITHOUT:
        if getattr(params, name) != getattr(plain, name):
            raise UserError(name, f"{name} and use_beam_search cannot both be given")
