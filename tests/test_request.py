"""Sampling parameters refuse what cannot be sampled; outputs merge without loss."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.errors import UserError
from jaxserve.request import RequestOutput, SamplingParams, TokenLogprobs, merge_outputs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1), ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_p", 0.0), ("top_p", 1.1),
        ("top_k", -2), ("min_p", 2.0), ("presence_penalty", 2.5), ("frequency_penalty", -3.0), ("repetition_penalty", 0.0), ("seed", 2**64),
        ("n", 0), ("n", 257), ("logprobs", 21), ("prompt_logprobs", -1), ("stop", [""]), ("stop", ["a"] * 5), ("stop", ["x" * 2000]),
        ("stop_token_ids", [1] * 65), ("logit_bias", {1: 101.0}), ("logit_bias", dict.fromkeys(range(1025), 0.0)), ("temperature", True),
        ("allowed_token_ids", []), ("bad_words", [" "]), ("bad_words", ["x" * 2000]), ("bad_words", ["x"] * 129),
        ("logprob_token_ids", [1] * 129), ("thinking_token_budget", -2),
    ],
)  # fmt: skip
def test_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="min_tokens=5 exceeds max_tokens=4"):
        SamplingParams(max_tokens=4, min_tokens=5)


def test_seeds_of_answers_run_on_and_wrap() -> None:
    params = SamplingParams(n=3, seed=2**63 - 2, top_k=4)
    assert [params.of_answer(number).seed for number in range(3)] == [2**63 - 2, 2**63 - 1, 0]
    assert params.of_answer(1) == SamplingParams(seed=2**63 - 1, top_k=4)
    assert SamplingParams(n=2).of_answer(1).seed is None
    assert SamplingParams(seed=-1).seed is None
    assert None not in [SamplingParams(n=4, seed=-3).of_answer(number).seed for number in range(4)]


def test_none_stands_for_no_entries_and_a_clone_is_the_same() -> None:
    params = SamplingParams(stop=None, stop_token_ids=None, bad_words=None, logprob_token_ids=None)  # type: ignore[arg-type]
    assert params == SamplingParams() == params.clone()


def test_minus_one_turns_top_k_off() -> None:
    assert SamplingParams(top_k=-1).top_k == 0


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    for params in (SamplingParams(logit_bias={100: 1.0}), SamplingParams(stop_token_ids=[-1])):
        with pytest.raises(UserError, match="outside the vocabulary"):
            params.check_token_ids(100)


def test_merged_outputs_say_what_both_said() -> None:
    logprobs = TokenLogprobs(token_id=1, logprob=-0.5, rank=1, top=())
    first = RequestOutput(id="a", text="he", token_ids=(1,), logprobs=(logprobs,), prompt_logprobs=(None,), num_output_tokens=1)
    second = RequestOutput(id="a", text="y", token_ids=(2, 3), logprobs=(logprobs, logprobs), finish_reason="stop", num_output_tokens=3)
    merged = merge_outputs([first, second])
    assert (merged.text, merged.token_ids, len(merged.logprobs or ()), merged.prompt_logprobs) == ("hey", (1, 2, 3), 3, (None,))
    assert (merged.finish_reason, merged.num_output_tokens) == ("stop", 3)
