"""What a tokenizer consists of, wherever it was read from, and the exact bytes that each of its tokens stands for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from jaxserve.text.sentencepiece import CONTROL, UNKNOWN, USER_DEFINED

# Texts that models end a turn with; files seldom mark all of theirs as end-of-sequence.
END_OF_TURN = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|return|>", "<|call|>",
     "<|eot|>", "<EOT>", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "</s>")
)  # fmt: skip
_SPACE = "▁"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A tokenizer as read from a directory or a GGUF file.

    Args:
      backend: knows special and added tokens; its post-processor is not used.
      special_tokens: text of "bos_token", "eos_token" and so on, as chat templates name them.
      eos_ids: tokens that end an answer.
      prefix_ids, suffix_ids: what add_special_tokens puts around a text.
    """

    backend: Tokenizer
    special_tokens: Mapping[str, str]
    eos_ids: frozenset[int]
    bos_id: int | None
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    chat_template: str | None = None


def add_marked_tokens(
    backend: Tokenizer, texts: Sequence[str], kinds: Sequence[int], *, special_ids: Iterable[int], rstrip: bool = False
) -> None:
    """Make the tokens that are never part of a word known to the backend.

    Args:
      kinds: SentencePiece kind of each text; control and unknown ones become special tokens, user-defined ones whole words.
      special_ids: further special tokens, whatever their kind.
      rstrip: special tokens longer than one word's mark, such as <|user|>, swallow the white space after them.
    """
    special = {token for token, kind in enumerate(kinds) if kind in (CONTROL, UNKNOWN)} | set(special_ids)
    keeps_space = ("<unk>", "<s>", "<|endoftext|>")
    marks = [
        AddedToken(texts[token], special=True, normalized=False, rstrip=rstrip and texts[token] not in keeps_space)
        for token in sorted(special)
    ]
    adder: Any = backend  # its type stubs leave the lists untyped
    adder.add_special_tokens(marks)
    words = [
        AddedToken(text, special=False, normalized=False)
        for token, (text, kind) in enumerate(zip(texts, kinds, strict=True))
        if kind == USER_DEFINED and token not in special
    ]
    adder.add_tokens(words)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenBytes:
    """The bytes of each token.

    Args:
      table: by id; empty for ids that no token has.
      strips_space: a space that begins the whole text was put there by the tokenizer and is not shown.
    """

    table: list[bytes]
    strips_space: bool


def read_token_bytes(backend: Tokenizer) -> TokenBytes | None:
    """The bytes of each token, or None if the decoder's text of a token depends on its neighbours."""
    steps = _decoder_steps(backend)
    kinds = [step["type"] for step in steps]
    vocab = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
        added = backend.get_added_tokens_decoder()
        for text, token in vocab.items():
            table[token] = text.encode("utf-8") if token in added else byte_level(text)
        return TokenBytes(table=table, strips_space=False)
    if not steps or not all(map(_is_sentencepiece_step, steps)):
        return None
    marks = any(kind in ("Replace", "Metaspace") for kind in kinds)
    fallback = "ByteFallback" in kinds
    for text, token in vocab.items():
        byte = _fallback_byte(text) if fallback else None
        table[token] = byte if byte is not None else (text.replace(_SPACE, " ") if marks else text).encode("utf-8")
    strips = any(step["type"] == "Strip" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never") for step in steps)
    return TokenBytes(table=table, strips_space=strips)


def _decoder_steps(backend: Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _is_sentencepiece_step(step: Mapping[str, Any]) -> bool:
    match step:
        case {"type": "ByteFallback" | "Fuse"}:
            return True
        case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
            return True
        case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
            return True
        case {"type": "Metaspace", "replacement": "▁"}:
            return True
        case _:
            return False


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's letter of each byte -> the byte; other letters below U+0100 -> one that Latin-1 lacks, so that encoding fails."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**dict.fromkeys(others, 0xFFFD), **{256 + place: byte for place, byte in enumerate(others)}}


_BYTE_OF_LETTER = _byte_alphabet()


def byte_level(text: str) -> bytes:
    """The bytes that a token of byte-level BPE is written for; its UTF-8 if it is not written in GPT-2's byte letters."""
    # Nearly all tokens are plain words, many behind the letter of a space; translate() takes microseconds, and there are 100,000s of them.
    if text.isascii():
        return text.encode("ascii")
    word = text[1:]
    if text[0] == "Ġ" and word.isascii() and word.isprintable() and " " not in word:
        return b" " + word.encode("ascii")
    try:
        return text.translate(_BYTE_OF_LETTER).encode("latin-1")
    except UnicodeEncodeError:
        return text.encode("utf-8")


def _fallback_byte(text: str) -> bytes | None:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes((int(text[3:5], 16),))
        except ValueError:
            return None
    return None
