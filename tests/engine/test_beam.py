"""Beam search: equal to a plain one over whole distributions, from lengths to early ends, offline and over HTTP."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from jaxserve import LLM, BeamSearchParams, SamplingParams
from jaxserve.engine.beam import check_beams
from jaxserve.errors import UserError
from tests.tiny import tiny_model

SHAPES = {"max_rows": 8, "max_step_tokens": 32, "decode_rows": (8,), "prefill_tokens": (32,), "cache_bytes": 1 << 20, "page_size": 8}
PROMPT = [5, 17, 300, 42]
# Tokens that the tiny model likes, so that answers end.
ENDS = frozenset({201, 44, 77, 130, 12, 298, 9, 100})


@functools.cache
def engine() -> LLM:
    return LLM(str(tiny_model()), **SHAPES)


@functools.cache
def reference() -> Any:
    return LlamaForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()


def logprobs_after(ids: tuple[int, ...]) -> np.ndarray:
    with torch.no_grad():
        return torch.log_softmax(reference()(torch.tensor([ids])).logits[0, -1].double(), -1).numpy()


def plain_search(
    prompt: list[int], width: int, max_tokens: int, *, length_penalty: float, ends: frozenset[int]
) -> list[tuple[tuple[int, ...], float]]:
    """The textbook's search: 2 * width candidates of each beam, all texts of the same length side by side."""
    beams, ended = [(tuple(prompt), 0.0)], []
    for _ in range(max_tokens):
        candidates = []
        for ids, total in beams:
            row = logprobs_after(ids)
            for token in np.argsort(-row)[: 2 * width].tolist():
                (ended if token in ends else candidates).append(((*ids, token), total + row[token]))
        beams = sorted(candidates, key=lambda each: -each[1])[:width]
    length = {each: len(each[0]) - (each[0][-1] in ends) for each in ended + beams}
    return sorted(ended + beams, key=lambda each: each[1] / length[each] ** length_penalty, reverse=True)[:width]


@pytest.mark.parametrize(("width", "length_penalty", "ends"), [(1, 1.0, frozenset()), (3, 1.0, ENDS), (4, 0.0, ENDS), (4, 2.0, ENDS)])
def test_search_equals_a_plain_one(monkeypatch: pytest.MonkeyPatch, width: int, length_penalty: float, ends: frozenset[int]) -> None:
    llm = engine()
    monkeypatch.setattr(llm, "_served", dataclasses.replace(llm._served, eos_ids=ends))
    prompts = [PROMPT, [7, 8, 9]]
    found = llm.beam_search(prompts, BeamSearchParams(beam_width=width, max_tokens=9, length_penalty=length_penalty))
    some_ended = 0
    for prompt, output in zip(prompts, found, strict=True):
        expected = plain_search(prompt, width, 9, length_penalty=length_penalty, ends=ends)
        assert [tuple(sequence.tokens) for sequence in output.sequences] == [ids for ids, _ in expected]
        np.testing.assert_allclose([sequence.cum_logprob for sequence in output.sequences], [total for _, total in expected], atol=1e-3)
        for sequence in output.sequences:
            ended = sequence.tokens[-1] in ends
            some_ended += ended
            assert sequence.finish_reason == ("stop" if ended else "length")
            assert sum(entry.logprob for entry in sequence.logprobs) == pytest.approx(sequence.cum_logprob)
            assert sequence.text == llm.tokenizer.decode(sequence.tokens[len(prompt) : len(sequence.tokens) - ended])
    assert bool(some_ended) == (bool(ends) and length_penalty <= 1)  # above 1 the longest win


def test_one_beam_is_greedy() -> None:
    sampled = engine().generate([PROMPT], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)[0]
    found = engine().beam_search([PROMPT], BeamSearchParams(beam_width=1, max_tokens=12, ignore_eos=True))[0]
    assert found.sequences[0].tokens[len(PROMPT) :] == sampled.outputs[0].token_ids


@pytest.mark.parametrize(
    ("params", "field"),
    [({"n": 11}, "n"), ({"stop": "a"}, "stop"), ({"min_tokens": 2}, "min_tokens"), ({"bad_words": ["a"]}, "bad_words"),
     ({"repetition_penalty": 1.1}, "repetition_penalty"), ({"logit_bias": {1: 2.0}}, "logit_bias")],
)  # fmt: skip
def test_what_a_search_does_not_look_at_is_refused_by_name(params: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as caught:
        check_beams(SamplingParams(**params))
    assert caught.value.field == field
    with pytest.raises(UserError, match="context"):
        engine().beam_search([PROMPT], BeamSearchParams(beam_width=2, max_tokens=300))
