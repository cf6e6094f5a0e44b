"""Log-probabilities in the three shapes that clients know: of chat, of completions, and vLLM's of prompts."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxserve.request import RequestOutput, TokenLogprobs

if TYPE_CHECKING:
    from jaxserve.text.tokenizer import Tokenizer

# Printing more positions than this goes to a worker thread.
INLINE_POSITIONS = 128
# JSON has no infinity; this is what OpenAI sends for a token that cannot be.
LOWEST = -9999.0


def is_heavy(*outputs: RequestOutput) -> bool:
    """Whether printing the log-probabilities of these outputs would hold the event loop for long."""
    return sum(len(output.logprobs or ()) + len(output.prompt_logprobs or ()) for output in outputs) > INLINE_POSITIONS


class TokenNames:
    """How tokens are shown, remembered per answer since the same few thousand come again and again.

    Args:
      as_ids: show "token_id:N" instead of text.
    """

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self.as_ids = as_ids
        self._texts: dict[int, str] = {}
        self._bytes: dict[int, list[int]] = {}

    def text(self, token: int) -> str:
        """The token as shown to the client."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = f"token_id:{token}" if self.as_ids else self._tokenizer.token_text(token)
        return text

    def bytes(self, token: int) -> list[int]:
        """The exact bytes that the token stands for."""
        values = self._bytes.get(token)
        if values is None:
            values = self._bytes[token] = list(self._tokenizer.token_bytes(token))
        return values


class Pieces:
    """Tokens as pieces of a text that add up to it, as offsets need them: a character belongs to the token that completes it.

    Attributes:
      num_chars: of the tokens taken.
    """

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = b""  # of a character
        self.num_chars = 0

    def text(self, token: int) -> str:
        """What a token would add at this place."""
        shown = self._names.text(token)
        if self._names.as_ids or not (self._begun or "\ufffd" in shown):
            return shown
        self._decoder.setstate((self._begun, 0))
        return self._decoder.decode(bytes(self._names.bytes(token)))

    def take(self, token: int) -> str:
        """What the token adds that stands at this place; goes on to the next one."""
        self._decoder.reset()
        text = self.text(token)
        self._begun = self._decoder.getstate()[0]
        self.num_chars += len(text)
        return text


def chat_logprobs(positions: Sequence[TokenLogprobs], num_top: int, names: TokenNames) -> dict[str, Any]:
    """OpenAI's chat shape: {"content": [{"token", "logprob", "bytes", "top_logprobs"}]}."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": names.text(token), "logprob": _finite(logprob), "bytes": names.bytes(token)}

    return {
        "content": [
            {**entry(position.token_id, position.logprob), "top_logprobs": [entry(token, value) for token, value in position.top[:num_top]]}
            for position in positions
        ]
    }


def completion_logprobs(positions: Sequence[TokenLogprobs | None], prompt: Sequence[int], num_top: int, pieces: Pieces) -> dict[str, Any]:
    """OpenAI's completion shape: parallel lists, the first prompt token without a log-probability.

    Args:
      positions: of the prompt tokens, if echoed, then of the sampled ones; None where nothing came before.
      prompt: the echoed prompt's token ids, or nothing.
      pieces: of the same text, as far as it went before.
    """
    offsets: list[int] = []
    tokens: list[str] = []
    tops: list[dict[str, float] | None] = []
    for place, position in enumerate(positions):
        tops.append(None if position is None else _top(position, num_top, pieces))
        offsets.append(pieces.num_chars)
        tokens.append(pieces.take(prompt[place] if position is None else position.token_id))
    return {
        "text_offset": offsets,
        "token_logprobs": [None if position is None else _finite(position.logprob) for position in positions],
        "tokens": tokens,
        "top_logprobs": tops,
    }


def prompt_logprobs(positions: Sequence[TokenLogprobs | None], num_top: int, names: TokenNames) -> list[dict[str, Any] | None]:
    """vLLM's shape: per prompt token {"id": {"logprob", "rank", "decoded_token"}}, the token itself first."""

    def shown(token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": names.text(token)}

    found: list[dict[str, Any] | None] = []
    for position in positions:
        if position is None:
            found.append(None)
            continue
        entries = {str(position.token_id): shown(position.token_id, position.logprob, position.rank)}
        for rank, (token, logprob) in enumerate(position.top[:num_top], start=1):
            entries.setdefault(str(token), shown(token, logprob, rank))
        found.append(entries)
    return found


def _top(position: TokenLogprobs, num_top: int, pieces: Pieces) -> dict[str, float]:
    values: dict[str, float] = {}
    for token, logprob in (*position.top[:num_top], (position.token_id, position.logprob)):
        # Two tokens may look alike; the likelier one came first.
        values.setdefault(pieces.text(token), _finite(logprob))
    return values


def _finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST
