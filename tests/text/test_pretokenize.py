from __future__ import annotations

import pytest

from jaxserve.errors import ConfigError
from jaxserve.text.pretokenize import find_pretokenization

SPACES_AND_DIGITS = "I'll  pay 12345\n\n  now"
# What the models' own tokenizer.json cut this text into.
PIECES = {
    "gpt-2": ["I", "'ll", "Ġ", "Ġpay", "Ġ12345", "ĊĊĠ", "Ġnow"],
    "smollm": ["I", "'ll", "Ġ", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "ĊĊĠ", "Ġnow"],
    "llama-bpe": ["I", "'ll", "Ġ", "Ġpay", "Ġ", "123", "45", "ĊĊ", "Ġ", "Ġnow"],
    "qwen2": ["I", "'ll", "Ġ", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "ĊĊ", "Ġ", "Ġnow"],
    "deepseek-v3": ["I", "'ll", "Ġ", "Ġpay", "Ġ", "123", "45", "ĊĊ", "Ġ", "Ġnow"],
    "gpt-4o": ["I'll", "Ġ", "Ġpay", "Ġ", "123", "45", "ĊĊ", "Ġ", "Ġnow"],
    "tekken": ["I", "'ll", "Ġ", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "ĊĊ", "Ġ", "Ġnow"],
}


@pytest.mark.parametrize("name", PIECES)
def test_text_is_cut_into_words_as_by_the_models_of_that_name(name: str) -> None:
    pieces = find_pretokenization(name, "").build().pre_tokenize_str(SPACES_AND_DIGITS)
    assert [piece for piece, _ in pieces] == PIECES[name]


@pytest.mark.parametrize(
    "name", ["default", "falcon", "deepseek-llm", "deepseek-coder", "bloom", "viking", "qwen35", "mpt", "olmo", "dbrx", "command-r", "glm4"]
)
def test_no_byte_of_the_text_is_lost_or_moved(name: str, corpus: str) -> None:
    pieces = find_pretokenization(name, "").build().pre_tokenize_str(corpus)
    assert pieces[0][1][0] == 0
    assert "".join(corpus[start:end] for _, (start, end) in pieces) == corpus


def test_unknown_name_is_refused_and_named() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.pre='frobnicate' is not known"):
        find_pretokenization("frobnicate", "llama")


def test_missing_name_is_taken_from_the_architecture_when_that_has_one_rule_only() -> None:
    assert find_pretokenization(None, "gptneox") is find_pretokenization("gpt-2", "")
    with pytest.raises(ConfigError, match="'llama' does not tell"):
        find_pretokenization(None, "llama")
