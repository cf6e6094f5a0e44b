"""llama.cpp's 47 reference strings, tokenized as its tests expect, with those parts of published vocabularies that can matter to them.

reference_vocabularies.json has of each vocabulary (GPT-2, Qwen 2, MPT, Phi-3, BGE) the special tokens, the tokens that occur in a string,
and the merges that lead to those, in their order; ids are counted anew. The strings and ids are those of llama.cpp's models/ggml-vocab-*.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import gguf
import pytest

from jaxserve.text.tokenizer import load_tokenizer

REFERENCE: dict[str, Any] = json.loads(pathlib.Path(__file__).with_name("reference_vocabularies.json").read_text())


def write_vocabulary(path: pathlib.Path, found: dict[str, Any]) -> pathlib.Path:
    """The vocabulary as a GGUF file."""
    metadata = found["metadata"]
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    writer.add_token_list(found["tokens"])
    writer.add_token_types([found["types"].get(str(token), 1) for token in range(len(found["tokens"]))])
    if "scores" in found:
        writer.add_token_scores(found["scores"])
    if "merges" in found:
        writer.add_token_merges(found["merges"])
    for key, value in metadata.items():
        if key != "general.architecture":
            add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}[type(value)]
            add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", REFERENCE["vocabularies"])
def test_reference_strings_have_the_ids_that_llama_cpp_expects(name: str, tmp_path: pathlib.Path) -> None:
    found = REFERENCE["vocabularies"][name]
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "vocabulary.gguf", found))
    assert len(REFERENCE["texts"]) == 47
    ids = {text: tokenizer.encode(text, add_special_tokens=False) for text in REFERENCE["texts"]}
    assert ids == dict(zip(REFERENCE["texts"], found["ids"], strict=True))


def test_wordpiece_vocabulary_puts_its_marks_around_texts_and_between_them(tmp_path: pathlib.Path) -> None:
    found = REFERENCE["vocabularies"]["bert-bge"]
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "vocabulary.gguf", found))
    begin, end = (found["metadata"][f"tokenizer.ggml.{name}_token_id"] for name in ("cls", "seperator"))
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in ("Héllo", "world"))
    assert tokenizer.encode("hello", add_special_tokens=True) == [begin, *first, end]
    assert tokenizer.encode_pair("hello", "world") == ([begin, *first, end, *second, end], len(first) + 2)
    assert tokenizer.decode([begin, *first, *second, end]) == "hello world"
