from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import UserError
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.vocabulary import byte_level


def test_bytes_of_all_single_byte_tokens_cover_every_byte(bpe: Tokenizer, spm: Tokenizer) -> None:
    for tokenizer in (bpe, spm):
        assert {tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)} >= {bytes((byte,)) for byte in range(256)}


@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_token_bytes_join_to_the_text(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text, add_special_tokens=False)
    assert b"".join(bpe.token_bytes(token) for token in ids).decode() == text
    assert bpe.decode(ids, skip_special_tokens=False) == text


@settings(deadline=None)
@given(data=st.data())
def test_decoding_equals_that_of_the_tokenizers_library(bpe: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, bpe.vocab_size - 1), max_size=20))
    skip = data.draw(st.booleans())
    assert bpe.decode(ids, skip_special_tokens=skip) == bpe.backend.decode(ids, skip_special_tokens=skip)


def test_special_tokens_are_left_out_of_text_or_shown(bpe: Tokenizer) -> None:
    ids = bpe.encode("<|im_start|>fox<tool_call><|eos|>", add_special_tokens=False)
    assert bpe.decode(ids) == "fox<tool_call>"
    assert bpe.decode(ids, skip_special_tokens=False) == "<|im_start|>fox<tool_call><|eos|>"


def test_first_space_of_sentencepiece_is_not_shown_and_later_ones_are(spm: Tokenizer) -> None:
    the = spm.backend.get_vocab()["▁the"]
    assert spm.decode([1, the, the]) == "the the"
    assert (spm.token_text(the), spm.token_name(the)) == (" the", "\u2581the")
    assert spm.token_bytes(spm.backend.get_vocab()["<0xF0>"]) == b"\xf0"
    assert spm.token_text(spm.backend.get_vocab()["<0xF0>"]) == "\ufffd"


def test_ids_beyond_the_vocabulary_stand_for_nothing(any_tokenizer: Tokenizer) -> None:
    beyond = any_tokenizer.vocab_size + 5
    assert any_tokenizer.decode([beyond]) == ""
    assert any_tokenizer.token_bytes(beyond) == b""
    assert any_tokenizer.token_text(beyond) == ""


def test_half_of_a_surrogate_pair_is_a_user_error(any_tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="surrogate") as raised:
        any_tokenizer.encode("a\ud800b", add_special_tokens=True)
    assert raised.value.status == 400


def test_tokens_not_written_in_byte_letters_stand_for_themselves() -> None:
    assert byte_level("Ġtheé") == b" the\xe9"
    assert byte_level("Ġa b") == "Ġa b".encode()
    assert byte_level("<｜end▁of▁sentence｜>") == "<｜end▁of▁sentence｜>".encode()
    assert byte_level("") == b""


def test_importing_the_package_imports_neither_jax_nor_transformers() -> None:
    code = (
        "import sys, jaxserve.text.chat, jaxserve.text.detokenize; print([m for m in ('jax', 'transformers', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
