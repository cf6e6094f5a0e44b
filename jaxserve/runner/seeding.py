"""What a slot's sampling state is told when a request takes it: arrays of fixed sizes, made on the host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxserve.request import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_LOGPROB_TOKEN_IDS, Request
from jaxserve.runner.sampling import ANY_TOKEN, MAX_BANNED, NOT_SAMPLED, SEEN_CHUNK, SlotRow

Seed = tuple[np.bool_, np.ndarray, np.ndarray, SlotRow]


def needs_seed(request: Request) -> bool:
    """Whether sampling for the request will look at the state of its slot."""
    params = request.params
    return bool(params.has_penalties or params.logit_bias or params.min_tokens or request.bad_words or params.logprob_token_ids)


def slot_row(request: Request, vocab_size: int, eos_ids: frozenset[int]) -> SlotRow:
    """What a request brings along."""
    bias = request.params.logit_bias or {}
    bias_values = np.zeros(MAX_LOGIT_BIAS, np.float32)
    bias_values[: len(bias)] = list(bias.values())
    bad_words = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), ANY_TOKEN, np.int32)
    bad_words[:, -1] = vocab_size
    for row, word in zip(bad_words, request.bad_words, strict=False):
        row[-len(word) :] = word
    recent = np.full(MAX_BAD_WORD_TOKENS - 1, NOT_SAMPLED, np.int32)
    last = request.output_ids[-len(recent) :]
    recent[len(recent) - len(last) :] = last
    arrays: dict[str, Any] = {  # of numpy: the call that takes them puts them on the device
        "bias_ids": _padded(bias, MAX_LOGIT_BIAS, vocab_size), "bias_values": bias_values, "bad_words": bad_words, "recent": recent,
        "banned": _padded(sorted(eos_ids | request.stop_ids), MAX_BANNED, vocab_size),
        "chosen": _padded(request.params.logprob_token_ids, MAX_LOGPROB_TOKEN_IDS, vocab_size),
    }  # fmt: skip
    return SlotRow(**arrays)


def slot_seeds(request: Request, vocab_size: int, eos_ids: frozenset[int]) -> Iterator[Seed]:
    """The arguments of seed_slot behind state and slot, for one call after the other."""
    row = slot_row(request, vocab_size, eos_ids)
    ids: list[int] = []
    amounts: list[int] = []
    if request.params.has_penalties:
        prompt = sorted(set(request.prompt_ids))
        ids, amounts = prompt + request.output_ids, [1] * len(prompt) + [2] * len(request.output_ids)
    for start in range(0, max(len(ids), 1), SEEN_CHUNK):
        end = start + SEEN_CHUNK
        yield np.bool_(start == 0), _padded(ids[start:end], SEEN_CHUNK, vocab_size), _padded(amounts[start:end], SEEN_CHUNK, 0), row


def pack_mask(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """The mask i32[ceil(V / 32)] that allows just these tokens."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _padded(ids: Iterable[int], size: int, filler: int) -> np.ndarray:
    values = list(ids)
    return np.array(values + [filler] * (size - len(values)), np.int32)
