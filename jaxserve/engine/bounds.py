"""What bounds an answer beside its grammar: a list of allowed tokens, a budget for reasoning whose end is then forced, and circles.

The first two speak through masks, as grammars do, and go around a grammar if there is one.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxserve.request import Constraint, Matcher, RepetitionDetection, SamplingParams
from jaxserve.runner.seeding import pack_mask
from jaxserve.text.reasoning import ReasoningFormat
from jaxserve.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingMarks:
    """The markers around a model's reasoning as token ids; the first of `ends` is the one to force.

    Args:
      always: an answer begins with reasoning if no marker of the prompt says otherwise.
    """

    starts: tuple[tuple[int, ...], ...]
    ends: tuple[tuple[int, ...], ...]
    always: bool


def thinking_marks(form: ReasoningFormat | None, tokenizer: Tokenizer) -> ThinkingMarks | None:
    """The marks of a format; None if it has no end that could be forced."""
    if form is None or not form.ends:
        return None
    starts, ends = (
        tuple(tuple(tokenizer.encode(marker, add_special_tokens=False)) for marker in markers) for markers in (form.starts, form.ends)
    )
    return ThinkingMarks(starts=starts, ends=ends, always=form.always)


def bound(
    inner: Constraint | None, params: SamplingParams, prompt_ids: Sequence[int], marks: ThinkingMarks | None, vocab_size: int
) -> Constraint | None:
    """A constraint that keeps to the params' bounds and to `inner`; `inner` itself if they add nothing to it.

    Args:
      marks: of the model's reasoning; where there are none, no budget is to come.
    """
    allowed, budget = params.allowed_token_ids, params.thinking_token_budget
    thought = None if marks is None or budget is None or budget < 0 else _Thought(marks, budget, prompt_ids)
    if thought is None and (inner is None or allowed is None):  # without a grammar a list of tokens is a mask that never changes
        return inner
    return _Bounds(inner, None if allowed is None else pack_mask(allowed, vocab_size), thought, vocab_size)


def goes_in_circles(ids: list[int], detection: RepetitionDetection) -> bool:
    """Whether the ids end in a pattern repeated often enough."""
    longest = min(detection.max_pattern_size, len(ids) // max(detection.min_count, 1))
    for size in range(max(detection.min_pattern_size, 1), longest + 1):
        # A tail repeats with a period if it equals itself one period earlier; most tails fail at their last token.
        if ids[-1] == ids[-1 - size]:
            tail = ids[-size * detection.min_count :]
            if tail[size:] == tail[:-size]:
                return True
    return False


class _Thought:
    """How much of the budget is left, and which token must come next when nothing is.

    Args:
      prompt_ids: reasoning that is open at their end goes on, and counts.
    """

    def __init__(self, marks: ThinkingMarks, budget: int, prompt_ids: Sequence[int]) -> None:
        self._marks, self._budget = marks, budget
        self._longest = max(map(len, marks.starts + marks.ends))
        self._last: list[int] = []
        begun, ended = (max(_find_last(prompt_ids, mark) for mark in group) for group in (marks.starts, marks.ends))
        self._inside = begun > ended or (marks.always and begun == ended)
        self._spent = len(prompt_ids) - begun if begun > ended else 0

    def consume(self, token: int) -> None:
        """Go on to the next token."""
        self._last = [*self._last, token][-self._longest :]
        self._spent += self._inside
        if not self._inside and self._ends_in(self._marks.starts):
            self._inside, self._spent = True, 0
        elif self._inside and self._ends_in(self._marks.ends):
            self._inside = False

    def forced(self) -> int | None:
        """The token that must come next."""
        if not self._inside or self._spent < self._budget:
            return None
        end = self._marks.ends[0]
        done = next(size for size in range(len(end) - 1, -1, -1) if tuple(self._last[len(self._last) - size :]) == end[:size])
        return end[done]

    def _ends_in(self, marks: tuple[tuple[int, ...], ...]) -> bool:
        return any(tuple(self._last[-len(mark) :]) == mark for mark in marks)


class _Bounds:
    """See `bound`; a jaxserve.request.Constraint."""

    def __init__(self, inner: Constraint | None, allowed: np.ndarray | None, thought: _Thought | None, vocab_size: int) -> None:
        self._inner, self._allowed, self._thought, self._vocab_size = inner, allowed, thought, vocab_size

    def begin(self) -> Matcher:
        """A matcher at the beginning of an answer."""
        inner = None if self._inner is None else self._inner.begin()
        return _BoundMatcher(inner, self._allowed, copy.copy(self._thought), self._vocab_size)


class _BoundMatcher:
    """See `bound`; a jaxserve.request.Matcher."""

    def __init__(self, inner: Matcher | None, allowed: np.ndarray | None, thought: _Thought | None, vocab_size: int) -> None:
        self._inner, self._allowed, self._thought, self._vocab_size = inner, allowed, thought, vocab_size

    @property
    def finished(self) -> bool:
        """Whether nothing can follow."""
        return self._inner is not None and self._inner.finished

    def consume(self, token: int) -> None:
        """Go on to a token that the last mask allowed."""
        if self._inner is not None:
            self._inner.consume(token)
        if self._thought is not None:
            self._thought.consume(token)

    def fill(self, forbidden: Sequence[int] = ()) -> np.ndarray:
        """The tokens that may come next; see jaxserve.request.Matcher. Raises: ValueError if nothing can."""
        if self._inner is not None:
            mask: np.ndarray = self._inner.fill(forbidden)
        else:
            mask = np.full(-(-self._vocab_size // 32), -1, np.int32)
            if forbidden:
                mask = mask & ~pack_mask(forbidden, self._vocab_size)
        token = None if self._thought is None else self._thought.forced()
        if token is not None and mask[token >> 5] >> (token & 31) & 1:
            return pack_mask([token], self._vocab_size)
        if self._allowed is not None:
            mask = mask & self._allowed
            if not mask.any():
                raise ValueError("none of allowed_token_ids may come next")
        return mask


def _find_last(ids: Sequence[int], mark: tuple[int, ...]) -> int:
    """Where the last occurrence of a mark ends, -1 if there is none."""
    for end in range(len(ids), len(mark) - 1, -1):
        if ids[end - 1] == mark[-1] and tuple(ids[end - len(mark) : end]) == mark:
            return end
    return -1
