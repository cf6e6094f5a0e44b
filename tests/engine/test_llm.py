"""The engine offline, against transformers and against its own promises."""

from __future__ import annotations

import functools
import json
import pathlib
import random
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from jaxserve import LLM, SamplingParams
from jaxserve.engine.engine import FatalEngineError
from jaxserve.errors import ConfigError, UserError
from tests.tiny import EOS, VOCAB, tiny_model

SHAPES = {"max_rows": 4, "max_step_tokens": 32, "decode_rows": (4,), "prefill_tokens": (32,), "cache_bytes": 1 << 20, "page_size": 16}


@functools.cache
def engine() -> LLM:
    return LLM(str(tiny_model()), **SHAPES)


@functools.cache
def reference() -> Any:
    return LlamaForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()


def logprobs_of(ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return torch.log_softmax(reference()(torch.tensor([ids])).logits[0].double(), -1).numpy()


def answer(prompt: Any, **params: Any) -> Any:
    return engine().generate(prompt, SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **params}), use_tqdm=False)[
        0
    ]


def test_greedy_equals_transformers() -> None:
    prompt = [5, 17, 300, 42, 8]
    expected = reference().generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 5:].tolist()
    assert list(answer(prompt, max_tokens=20).outputs[0].token_ids) == expected


def test_logprobs_equal_transformers() -> None:
    prompt = [5, 17, 300]
    result = answer(prompt, logprobs=3, prompt_logprobs=2)
    ids = prompt + list(result.outputs[0].token_ids)
    exact = logprobs_of(ids)
    assert result.prompt_logprobs[0] is None
    found = [*result.prompt_logprobs[1:], *result.outputs[0].logprobs]
    for position, entry in enumerate(found):
        row = exact[position]
        assert entry.token_id == ids[position + 1]
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-4)
        assert entry.rank == 1 + (row > row[entry.token_id]).sum()
        assert [token for token, _ in entry.top] == np.argsort(-row)[: len(entry.top)].tolist()
    assert [len(entry.top) for entry in found] == [2] * 2 + [3] * 12


def test_prompt_logprobs_of_a_long_prompt_come_in_chunks() -> None:
    prompt = np.random.default_rng(0).integers(1, VOCAB, 90).tolist()
    found = answer(prompt, prompt_logprobs=0, max_tokens=1).prompt_logprobs
    exact = logprobs_of(prompt)
    np.testing.assert_allclose([entry.logprob for entry in found[1:]], [exact[i, prompt[i + 1]] for i in range(89)], atol=1e-4)


def test_prefix_cache_is_found_and_reported() -> None:
    prompt = np.random.default_rng(1).integers(1, VOCAB, 70).tolist()
    assert answer(prompt).num_cached_tokens == 0
    assert answer(prompt).num_cached_tokens == 64


def test_stop_string_is_cut_and_named() -> None:
    text = answer("the fox").outputs[0].text
    stop = text[5:8]
    cut = answer("the fox", stop=[stop]).outputs[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (text[: text.index(stop)], "stop", stop)
    assert answer("the fox", stop=[stop], include_stop_str_in_output=True).outputs[0].text == text[: text.index(stop) + len(stop)]


def test_stop_token_ends_the_answer_and_is_named() -> None:
    ids = answer("the fox").outputs[0].token_ids
    stopped = answer("the fox", stop_token_ids=[ids[3]]).outputs[0]
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == (ids[: ids.index(ids[3]) + 1], "stop", ids[3])


def test_end_of_sequence_stops_without_a_reason_and_min_tokens_forbids_it() -> None:
    likely = {0: 100.0}
    ended = answer("x", ignore_eos=False, logit_bias=likely).outputs[0]
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ((0,), "", "stop", None)
    later = answer("x", ignore_eos=False, logit_bias=likely, min_tokens=5).outputs[0]
    assert len(later.token_ids) == 6
    assert 0 not in later.token_ids[:5]
    assert EOS not in later.text


def test_n_answers_differ_and_repeat_with_the_seed() -> None:
    first = answer("the fox", n=3, temperature=1.0, seed=4)
    texts = [output.token_ids for output in first.outputs]
    assert [output.index for output in first.outputs] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert [output.token_ids for output in answer("the fox", n=3, temperature=1.0, seed=4).outputs] == texts


def test_chat_goes_through_the_template() -> None:
    result = engine().chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=2), use_tqdm=False)[0]
    assert result.prompt == f"<user>hi{EOS}<assistant>"


def test_answer_may_fill_the_context_and_no_more() -> None:
    full = answer(list(range(1, 251)), max_tokens=None).outputs[0]
    assert (len(full.token_ids), full.finish_reason) == (6, "length")
    with pytest.raises(UserError, match="context of 256 tokens") as caught:
        answer(list(range(1, 251)), max_tokens=7)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("prompt", [[], [VOCAB], [-1], list(range(1, 257))])
def test_prompt_that_cannot_be_served_is_refused(prompt: list[int]) -> None:
    with pytest.raises(UserError):
        engine().generate([prompt], use_tqdm=False)


def test_nothing_compiles_after_warm_up_and_nothing_leaks() -> None:
    llm, rng = engine(), random.Random(3)
    before = llm.metrics.compiles._value.get()
    for _ in range(6):
        prompts = [[rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 120))] for _ in range(rng.randrange(1, 9))]
        each = [
            SamplingParams(
                temperature=rng.choice([0, 0.7]), top_k=rng.choice([0, 5]), top_p=rng.choice([1, 0.5]), min_p=rng.choice([0, 0.1]),
                repetition_penalty=rng.choice([1, 1.3]), logit_bias=rng.choice([None, {3: 1.0}]), min_tokens=rng.choice([0, 2]),
                logprobs=rng.choice([None, 5]), prompt_logprobs=rng.choice([None, 3]), max_tokens=rng.randrange(2, 20),
                n=rng.choice([1, 2]),
            )
            for _ in prompts
        ]  # fmt: skip
        llm.generate(prompts, each, use_tqdm=False)
    assert llm.metrics.compiles._value.get() == before
    scheduler = llm._engine._scheduler
    scheduler.check()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.usage, llm._engine.num_unfinished) == (0, 0, 0, 0)


def test_failed_step_fails_only_its_own_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine()
    runner = llm._engine._runner
    dispatch, calls = runner.dispatch, []

    def fail_once(schedule: Any) -> Any:
        calls.append(schedule)
        if len(calls) == 2:
            raise RuntimeError("the device is on fire")
        return dispatch(schedule)

    monkeypatch.setattr(runner, "dispatch", fail_once)
    with pytest.raises(RuntimeError, match="safe to try again"):
        llm.generate("the fox", SamplingParams(max_tokens=9), use_tqdm=False)
    monkeypatch.undo()
    assert len(answer("the fox").outputs[0].token_ids) == 12
    llm._engine._scheduler.check()


def test_second_failure_in_a_row_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(tiny_model()), **SHAPES)

    def fail(_: Any) -> Any:
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(llm._engine._runner, "dispatch", fail)
    with pytest.raises(RuntimeError, match="safe to try again"):
        llm.generate("a", SamplingParams(max_tokens=9), use_tqdm=False)
    with pytest.raises(FatalEngineError):
        llm.generate("a", SamplingParams(max_tokens=9), use_tqdm=False)


def test_logits_that_are_not_finite_end_their_request_alone() -> None:
    llm = LLM(str(tiny_model()), **SHAPES)
    engine = llm._engine
    head = engine._runner._params["embed.weight"]
    engine._runner._params = {**engine._runner._params, "embed.weight": head.at[9].set(np.nan)}
    good = SamplingParams(temperature=0, max_tokens=6, logit_bias={9: -100.0}, ignore_eos=True)
    requests = [llm._admission.make_request(prompt, good) for prompt in ([5, 9, 6], [5, 6, 7])]
    for request in requests:
        engine.add(request)
    last = {}
    while engine.has_work:
        last.update({output.id: output for output in engine.step()})
    assert [last[request.id].finish_reason for request in requests] == ["error", "length"]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"max_len": 9999}, "--max-len=9999"), ({"cache_bytes": 1}, "do not fit"), ({"dtype": "int3"}, "dtype"), ({"max_row": 1}, "max_row")],
)
def test_options_that_cannot_work_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        LLM(str(tiny_model()), **{**SHAPES, **options})


def test_model_with_too_many_ends_of_sequence_is_refused(tmp_path: pathlib.Path) -> None:
    directory = shutil.copytree(tiny_model(), tmp_path / "model")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(17))}))
    with pytest.raises(ConfigError, match="17 end-of-sequence tokens; at most 16"):
        LLM(str(directory), **SHAPES)
