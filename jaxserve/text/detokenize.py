"""Token ids of one answer, as they come -> text that is certain.

1. Tokens become bytes, and whole characters of them become text; the beginning of a character waits for its end.
2. Stop strings are looked for letter by letter, so that the result does not depend on where tokens end: the string that is complete first
   wins, the longest of several that end at the same letter. Text that may yet become one is held back.
"""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Sequence

from jaxserve.request import SamplingParams
from jaxserve.text.tokenizer import Tokenizer

# Of prompts: tokens that may hold the beginning of a character, and tokens whose text decides how the next one is written.
_MAX_CHAR_TOKENS = 4
_CONTEXT_TOKENS = 6
# U+FFFD at the end of a window is a part of a character for at most three more tokens; skipped tokens must not make the window grow.
_MAX_HELD_TOKENS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Text that became certain; `stop` is the stop string that ended it, after which nothing comes."""

    text: str
    stop: str | None = None


_NOTHING = Piece("")


class Detokenizer:
    """Turns the tokens of one answer into text.

    The text of all pieces together equals the decoding of all ids, as it continues the prompt, up to a stop string.

    Args:
      prompt_ids: what the answer continues: a space that begins it is kept unless nothing visible stands before it.
      params: stop, include_stop_str_in_output, min_tokens, skip_special_tokens and shown_special_ids are used.
    """

    __slots__ = ("_decode", "_matcher", "_min_tokens", "_num_tokens", "_stopped")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        table = tokenizer.byte_table(skip_special_tokens=params.skip_special_tokens, shown=params.shown_special_ids)
        if table is None:
            # Such tokenizers know all or none of them.
            skip = params.skip_special_tokens and not params.shown_special_ids
            self._decode = _WindowStream(tokenizer, prompt_ids, skip_special_tokens=skip).decode
        else:
            self._decode = _ByteStream(table, prompt_ids, strips_space=tokenizer.strips_space).decode
        self._matcher = _StopMatcher(params.stop, keeps_stop=params.include_stop_str_in_output) if params.stop else None
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._stopped = False

    def push(self, ids: Sequence[int], *, final: bool) -> Piece:
        """Take the next tokens in, and with `final` give out what was held back."""
        if self._matcher is None:
            text = self._decode(ids, final)
            return Piece(text) if text else _NOTHING
        return self._push_through(self._matcher, ids, final=final)

    def _push_through(self, matcher: _StopMatcher, ids: Sequence[int], *, final: bool) -> Piece:
        if self._stopped:
            return _NOTHING
        texts: list[str] = []
        for place in range(len(ids) + final):
            last = place == len(ids)
            text = self._decode((), True) if last else self._decode(ids[place : place + 1], False)
            self._num_tokens += not last
            # As in vLLM, a stop string does not count before min_tokens.
            certain, stop = matcher.push(text, armed=self._num_tokens > self._min_tokens)
            texts.append(certain)
            if stop is not None:
                self._stopped = True
                return Piece("".join(texts), stop)
        if final:
            texts.append(matcher.held)
        return Piece("".join(texts))


class _ByteStream:
    """Text of tokens whose bytes do not depend on their neighbours."""

    __slots__ = ("_pending", "_strips", "_table")

    def __init__(self, table: list[bytes], prompt_ids: Sequence[int], *, strips_space: bool) -> None:
        self._table = table
        size = len(table)
        # A prompt of token ids may end within a character, which the answer then completes.
        tail = b"".join([table[token] for token in prompt_ids[-_MAX_CHAR_TOKENS:] if token < size])
        self._pending = tail[codecs.utf_8_decode(tail, "replace", False)[1] :]
        self._strips = strips_space and not any(table[token] for token in prompt_ids if token < size)

    def decode(self, ids: Sequence[int], final: bool) -> str:
        table = self._table
        try:
            data = table[ids[0]] if len(ids) == 1 else b"".join([table[token] for token in ids])
        except IndexError:  # logits may be wider than the vocabulary
            data = b"".join([table[token] for token in ids if token < len(table)])
        if self._pending:
            data = self._pending + data
        text, used = codecs.utf_8_decode(data, "replace", final)
        self._pending = data[used:] if used < len(data) else b""
        if self._strips and text:
            self._strips = False
            return text[1:] if text[0] == " " else text
        return text


class _WindowStream:
    """Text of tokens that are written differently after different neighbours: decode with a few tokens before, show what is new."""

    __slots__ = ("_ids", "_num_shown", "_skip", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._num_shown = len(self._ids)

    def decode(self, ids: Sequence[int], final: bool) -> str:
        texts = [self._next(token) for token in ids]
        if final:
            texts.append(self._advance(self._text(self._ids)))
        return "".join(texts)

    def _next(self, token: int) -> str:
        self._ids.append(token)
        text = self._text(self._ids)
        if text.endswith("\ufffd") and len(self._ids) - self._num_shown < _MAX_HELD_TOKENS:
            return ""
        return self._advance(text)

    def _advance(self, text: str) -> str:
        shown = len(self._text(self._ids[: self._num_shown]))
        if len(text) <= shown and len(self._ids) - self._num_shown < _MAX_HELD_TOKENS:
            return ""
        del self._ids[: max(0, min(self._num_shown, len(self._ids) - _CONTEXT_TOKENS))]
        self._num_shown = len(self._ids)
        return text[shown:]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


class _StopMatcher:
    """Finds the first of several strings in a growing text (Knuth, Morris, Pratt), holding back what may become one."""

    __slots__ = ("_fallbacks", "_keeps_stop", "_starts", "_states", "_stops", "held")

    def __init__(self, stops: Sequence[str], *, keeps_stop: bool) -> None:
        self._stops = tuple(stops)
        self._fallbacks = [_fallback_table(stop) for stop in stops]
        self._states = [0] * len(stops)
        self._starts = frozenset(stop[0] for stop in stops)
        self._keeps_stop = keeps_stop
        self.held = ""

    def push(self, text: str, *, armed: bool) -> tuple[str, str | None]:
        """The text that is certain now, and the stop string that was completed, if one was.

        Args:
          armed: strings that are completed in this text count.
        """
        if not self.held and self._starts.isdisjoint(text):
            return text, None
        buffer = self.held + text
        for end, letter in enumerate(text, start=len(self.held) + 1):
            stop = self._advance(letter)
            if stop is not None and armed:
                self.held = ""
                return buffer[: end if self._keeps_stop else end - len(stop)], stop
        num_held = max(self._states)
        certain = len(buffer) - num_held
        self.held = buffer[certain:]
        return buffer[:certain], None

    def _advance(self, letter: str) -> str | None:
        """The longest string that this letter completes."""
        found: str | None = None
        for which, (stop, fallback) in enumerate(zip(self._stops, self._fallbacks, strict=True)):
            state = self._states[which]
            while state and stop[state] != letter:
                state = fallback[state]
            state += stop[state] == letter
            if state == len(stop):
                found = stop if found is None or len(stop) > len(found) else found
                state = fallback[state]
            self._states[which] = state
        return found


def _fallback_table(stop: str) -> list[int]:
    """For each length of a matched beginning: the length of its longest proper end that is a beginning too."""
    table = [0] * (len(stop) + 1)
    state = 0
    for length in range(2, len(stop) + 1):
        while state and stop[state] != stop[length - 1]:
            state = table[state]
        state += stop[state] == stop[length - 1]
        table[length] = state
    return table
