from __future__ import annotations

import dataclasses
import itertools
import pathlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.text.sentencepiece import CONTROL, NORMAL, SentencePiece, build_sentencepiece, read_sentencepiece
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer


def encode_as_published(model: SentencePiece, text: str) -> list[int]:
    """SentencePiece's BPE: join the adjacent pair whose piece scores best, the leftmost of equals, until none is in the vocabulary."""
    ids = {piece: token for token, piece in enumerate(model.pieces)}
    normal = {piece for piece, kind in zip(model.pieces, model.kinds, strict=True) if kind == NORMAL}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(-model.scores[ids[a + b]], place) for place, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in normal]
        if not pairs:
            break
        _, place = min(pairs)
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in normal else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(
        st.sampled_from([" ", "   ", "a", "aa", "the", "ing", "quick", "日本", "本", "é", "🦙", "\n", ".", "over"]), max_size=25
    ).map("".join)
)
def test_ids_equal_those_of_the_published_algorithm(spm: Tokenizer, pieces: SentencePiece, text: str) -> None:
    assert spm.encode(text, add_special_tokens=False) == encode_as_published(pieces, text)


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_text_survives_encoding_and_decoding(spm: Tokenizer, text: str) -> None:
    if not any(mark in text for mark in ("▁", "<s>", "</s>", "<unk>")):
        assert spm.decode(spm.encode(text, add_special_tokens=True)) == text


def test_user_defined_symbols_are_one_token_wherever_they_stand(spm: Tokenizer) -> None:
    mark = spm.backend.get_vocab()["<mark up>"]
    assert spm.encode("the<mark up>the", add_special_tokens=False).count(mark) == 1


def test_first_prefix_gives_a_space_to_the_first_stretch_only(pieces: SentencePiece) -> None:
    backend = build_sentencepiece(dataclasses.replace(pieces, prefix="first"))
    backend.add_special_tokens(["<s>"])
    assert backend.encode("the<s>the", add_special_tokens=False).tokens == ["▁the", "<s>", "t", "he"]
    backend = build_sentencepiece(dataclasses.replace(pieces, prefix="never"))
    assert backend.encode("the", add_special_tokens=False).tokens == ["t", "he"]


def test_unigram_takes_the_likeliest_split_and_collapses_spaces() -> None:
    model = SentencePiece(
        pieces=["<unk>", "<s>", "▁", "▁ab", "a", "b", "▁a", "bb"], scores=[0.0, 0.0, -2.0, -1.0, -3.0, -3.0, -2.5, -1.0],
        kinds=[2, CONTROL, *[NORMAL] * 6], algorithm="unigram", collapse_spaces=True,
    )  # fmt: skip
    backend = build_sentencepiece(model)
    assert backend.encode("  ab   abb ", add_special_tokens=False).tokens == ["▁ab", "▁a", "bb"]


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def serialize(model: SentencePiece) -> bytes:
    data = b""
    for text, score, kind in zip(model.pieces, model.scores, model.kinds, strict=True):
        data += field(1, field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + field(3, kind))
    return data + field(2, field(3, 2)) + field(3, field(3, 1) + field(4, 0))


def test_model_file_gives_the_same_ids_as_the_gguf_file(pieces: SentencePiece, spm: Tokenizer, tmp_path: pathlib.Path, corpus: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(serialize(pieces))
    assert read_sentencepiece(tmp_path / "tokenizer.model") == pieces
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(corpus, add_special_tokens=True) == spm.encode(corpus, add_special_tokens=True)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert tokenizer.eos_ids == {2}


@pytest.mark.parametrize("data", [b"", b"\x0a\xff", b"\xff" * 40, b"not a model at all", b"\x0b\x01"])
def test_other_files_are_refused(tmp_path: pathlib.Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ConfigError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)
