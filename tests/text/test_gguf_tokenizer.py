from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import gguf
import pytest
from tokenizers import Tokenizer as Backend

from jaxserve.errors import ConfigError
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer

Writer = Callable[..., pathlib.Path]


@pytest.fixture
def write_bpe(bpe_backend: Backend, tmp_path: pathlib.Path) -> Writer:
    """Writes the byte-level vocabulary as GGUF, with what a test changes about it."""
    model = json.loads(bpe_backend.to_str())["model"]
    added = bpe_backend.get_added_tokens_decoder()
    texts = [bpe_backend.id_to_token(token) or "" for token in range(bpe_backend.get_vocab_size())]
    kinds = [3 if token in added and added[token].special else 4 if token in added else 1 for token in range(len(texts))]

    def write(pre: str | None = "gpt-2", architecture: str = "gpt2", model_name: str = "gpt2", **extra: int | bool | str) -> pathlib.Path:
        path = tmp_path / "bpe.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_tokenizer_model(model_name)
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(texts)
        writer.add_token_types(kinds)
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
        for name, value in {"bos_token_id": 0, "eos_token_id": 1, **extra}.items():
            key = f"tokenizer.ggml.{name}"
            if isinstance(value, bool):
                writer.add_bool(key, value)
            else:
                writer.add_uint32(key, int(value))
        writer.add_chat_template("{{ messages }}")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path

    return write


def test_byte_level_vocabulary_gives_the_ids_of_its_tokenizer_json(write_bpe: Writer, bpe: Tokenizer, corpus: str) -> None:
    tokenizer = load_tokenizer(write_bpe())
    text = corpus + "<|im_start|>user\n<tool_call>  <|eos|>"
    assert tokenizer.encode(text, add_special_tokens=False) == bpe.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False) == text
    assert tokenizer.special_ids == bpe.special_ids == {0, 1, 2}
    assert tokenizer.chat_template == "{{ messages }}"
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (0, {1}, bpe.vocab_size)
    assert tokenizer.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}


@pytest.mark.parametrize(
    ("extra", "pre", "before", "after"),
    [
        ({}, "gpt-2", [], []),
        ({}, "llama-bpe", [0], []),
        ({"add_bos_token": False}, "llama-bpe", [], []),
        ({"add_bos_token": True}, "gpt-2", [0], []),
        ({"add_bos_token": True, "add_eos_token": True}, "gpt-2", [0], [1]),
    ],
)
def test_beginning_and_end_are_added_as_the_file_says(
    write_bpe: Writer, extra: dict[str, bool], pre: str, before: list[int], after: list[int]
) -> None:
    tokenizer = load_tokenizer(write_bpe(pre, **extra))
    plain = tokenizer.encode("quick", add_special_tokens=False)
    assert tokenizer.encode("quick", add_special_tokens=True) == before + plain + after
    assert tokenizer.prefix_text == "".join(["<|bos|>"] * len(before))


def test_every_token_that_ends_a_turn_is_an_end(write_bpe: Writer) -> None:
    assert load_tokenizer(write_bpe(eot_token_id=2)).eos_ids == {1, 2}


def test_sentencepiece_begins_with_its_bos_unless_the_file_says_otherwise(spm: Tokenizer) -> None:
    assert spm.encode("the", add_special_tokens=True) == [1, spm.backend.get_vocab()["▁the"]]
    assert spm.special_ids == {0, 1, 2}


def test_unknown_word_rule_is_refused_by_name_and_file(write_bpe: Writer) -> None:
    with pytest.raises(ConfigError, match=r"bpe\.gguf: tokenizer\.ggml\.pre='my-pre' is not known"):
        load_tokenizer(write_bpe("my-pre"))


def test_missing_word_rule_is_refused_when_the_architecture_does_not_tell(write_bpe: Writer, bpe: Tokenizer) -> None:
    assert load_tokenizer(write_bpe(None, "gptneox")).encode("It's 12", add_special_tokens=False) == bpe.encode(
        "It's 12", add_special_tokens=False
    )
    with pytest.raises(ConfigError, match=r"no tokenizer\.ggml\.pre"):
        load_tokenizer(write_bpe(None, "llama"))


def test_unknown_model_is_refused_by_name(write_bpe: Writer) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.model='rwkv' is not known"):
        load_tokenizer(write_bpe(model_name="rwkv"))


def test_file_without_tokenizer_is_refused(tmp_path: pathlib.Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "x.gguf")


def test_phi3_marks_swallow_the_white_space_after_them(spm_gguf: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = spm_gguf.read_bytes()
    path = tmp_path / "phi.gguf"
    path.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x04\0\0\0\0\0\0\0phi3", 1))
    assert load_tokenizer(path).encode("</s> \nthe", add_special_tokens=False) == [2, load_tokenizer(path).backend.get_vocab()["▁the"]]
