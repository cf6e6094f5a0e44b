"""SentencePiece vocabularies (from `tokenizer.model` or GGUF) as `tokenizers` tokenizers.

BPE vocabularies carry scores, not merges: the pair whose joined piece scores best is merged first, the leftmost of equals. The same order
is written down as a list of merges, best score first; of several ways to split one piece the one with the longer left part comes first.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import struct
from collections.abc import Iterator, Sequence
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxserve.errors import ConfigError

# Kinds of pieces, the same numbers in sentencepiece_model.proto and in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SentencePiece:
    """A SentencePiece model.

    Args:
      pieces: text of each id; user-defined ones hold plain spaces where SentencePiece has "▁".
      scores: log-probability (unigram) or priority (BPE) of each.
      kinds: NORMAL ... BYTE of each.
      prefix: where a space is put before text: before each stretch between special tokens, the first only, or none.
      collapse_spaces: runs of spaces count as one, and none lead or end the text.
      charsmap: SentencePiece's compiled normalization rules; empty for none.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    algorithm: Literal["bpe", "unigram"] = "bpe"
    prefix: Literal["always", "first", "never"] = "always"
    collapse_spaces: bool = False
    charsmap: bytes = b""


def build_sentencepiece(model: SentencePiece) -> Tokenizer:
    """The tokenizer of a SentencePiece model, without special tokens, which the caller adds.

    Raises: ConfigError if the vocabulary is not one.
    """
    ids: dict[str, int] = {}
    for token, piece in enumerate(model.pieces):
        ids.setdefault(piece, token)
    unknown = next((token for token, kind in enumerate(model.kinds) if kind == UNKNOWN), None)
    with_bytes = BYTE in model.kinds
    try:
        if model.algorithm == "bpe":
            unk_token = None if unknown is None else model.pieces[unknown]
            merges = list(_merges(model, ids))
            backend = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=unk_token, fuse_unk=True, byte_fallback=with_bytes))
        else:
            scored = list(zip(model.pieces, _unigram_scores(model), strict=True))
            backend = Tokenizer(models.Unigram(scored, unk_id=unknown, byte_fallback=with_bytes))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"the SentencePiece vocabulary cannot be used: {error}") from None
    _add_spacing(backend, model)
    return backend


def _merges(model: SentencePiece, ids: dict[str, int]) -> Iterator[tuple[str, str]]:
    usable = {model.pieces[token] for token, kind in enumerate(model.kinds) if kind == NORMAL}
    order = sorted((token for token, kind in enumerate(model.kinds) if kind == NORMAL), key=lambda token: -model.scores[token])
    for token in order:
        piece = model.pieces[token]
        if ids[piece] != token:
            continue
        for cut in range(len(piece) - 1, 0, -1):
            left = piece[:cut]
            if left in usable and piece[cut:] in usable:
                yield left, piece[cut:]


def _unigram_scores(model: SentencePiece) -> Iterator[float]:
    # Pieces that text may never become, by a cost that no path can afford; user-defined ones are matched before the model.
    for score, kind in zip(model.scores, model.kinds, strict=True):
        yield score if kind in (NORMAL, UNKNOWN) else -1e9


def _add_spacing(backend: Tokenizer, model: SentencePiece) -> None:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.collapse_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.prefix == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first", split=False)
    else:
        # Not Metaspace: it puts no space before text that already begins with one, SentencePiece does.
        steps += [normalizers.Prepend(_SPACE)] if model.prefix == "always" else []
        steps.append(normalizers.Replace(" ", _SPACE))
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    parts: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts if model.prefix == "never" else [*parts, decoders.Strip(" ", 1, 0)])


def read_sentencepiece(path: pathlib.Path) -> SentencePiece:
    """The model of a `tokenizer.model` file.

    Raises: ConfigError if it is not one, or uses an algorithm other than BPE and unigram.
    Source: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                kind = piece.get(3, NORMAL)
                text = _as_bytes(piece.get(1, b"")).decode("utf-8", "replace")
                pieces.append(text.replace(_SPACE, " ") if kind == USER_DEFINED else text)
                scores.append(struct.unpack("<f", _as_bytes(piece.get(2, bytes(4))))[0])
                kinds.append(int(kind) if isinstance(kind, int) else NORMAL)
            elif field in (2, 3) and isinstance(value, bytes):
                (trainer if field == 2 else normalizer).update(_fields(value))
    except (ValueError, struct.error, IndexError, OSError) as error:
        raise ConfigError(f"cannot read the SentencePiece model {path}: {error}") from None
    algorithm = trainer.get(3, 1)
    if not pieces or algorithm not in (1, 2) or not all(map(math.isfinite, scores)):
        raise ConfigError(f"{path} is not a SentencePiece model of type unigram or BPE ({len(pieces)} pieces, type {algorithm!r:.20})")
    return SentencePiece(
        pieces=pieces, scores=scores, kinds=kinds, algorithm="unigram" if algorithm == 1 else "bpe",
        prefix="always" if normalizer.get(3, 1) else "never", collapse_spaces=bool(normalizer.get(4, 1)),
        charsmap=_as_bytes(normalizer.get(2, b"")),
    )  # fmt: skip


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where text is expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of one protobuf message; fixed-width values come as their bytes."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"protobuf wire type {wire} at byte {at} is not known")
        if size > end - at:
            raise ValueError(f"it ends within a field at byte {at}")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number at byte {at} is too long")
