"""A tiny random Llama with a tokenizer of its own, made on the spot: what the tests of the engine and the server run on."""

from __future__ import annotations

import functools
import pathlib
import tempfile

import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from jaxserve import LLM
from jaxserve.engine.engine import Engine

VOCAB = 320
EOS = "<|end|>"
TEXT = ["the quick brown fox jumps over the lazy dog", "a capital of a country is a city", "日本語 émoji 😀🎉 text"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    + EOS
    + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@functools.cache
def tiny_model(*, chat_template: bool = True, max_len: int = 256) -> pathlib.Path:
    """Directory of a checkpoint as `save_pretrained` writes it; made once per process, removed with the process's temporary files."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="jaxserve-tiny-"))
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=max_len, initializer_range=0.4, eos_token_id=0, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    save_tokenizer(directory, eos=EOS, chat_template=CHAT_TEMPLATE if chat_template else None)
    return directory


def core(llm: LLM) -> Engine:
    """The one engine of an LLM on one device."""
    assert isinstance(llm._engine, Engine)
    return llm._engine


def save_tokenizer(directory: pathlib.Path, *, eos: str, chat_template: str | None) -> None:
    """Write a byte-level BPE tokenizer of VOCAB tokens, of which `eos` is the first."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[eos], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)
    if chat_template:
        wrapped.chat_template = chat_template
    wrapped.save_pretrained(directory)
