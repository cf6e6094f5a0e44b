"""The engine offline, against transformers and against its own promises."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import random
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from jaxserve import LLM, SamplingParams, StructuredOutputs
from jaxserve.engine.admit import bad_word_ids
from jaxserve.engine.engine import FatalEngineError
from jaxserve.errors import ConfigError, UserError
from jaxserve.request import RepetitionDetection
from tests.scheduler.invariants import check_scheduler
from tests.tiny import EOS, VOCAB, core, tiny_model

SHAPES = {"max_rows": 4, "max_step_tokens": 32, "decode_rows": (4,), "prefill_tokens": (32,), "cache_bytes": 1 << 20, "page_size": 16}


@functools.cache
def engine() -> LLM:
    return LLM(str(tiny_model()), reasoning_parser="qwen3", **SHAPES)


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
    for place, (position, most) in enumerate(zip(found, [2] * 2 + [3] * 12, strict=True)):
        row, (own, *_) = exact[place], position
        assert own == ids[place + 1]
        assert set(position) == {own, *np.argsort(-row)[:most].tolist()}
        for token, entry in position.items():
            assert entry.logprob == pytest.approx(row[token], abs=1e-4)
            assert (entry.rank, entry.decoded_token) == (1 + (row > row[token]).sum(), engine().tokenizer.token_text(token))
    own = [position[token].logprob for position, token in zip(result.outputs[0].logprobs, result.outputs[0].token_ids, strict=True)]
    assert result.outputs[0].cumulative_logprob == pytest.approx(sum(own))


def test_prompt_logprobs_of_a_long_prompt_come_in_chunks() -> None:
    prompt = np.random.default_rng(0).integers(1, VOCAB, 90).tolist()
    found = answer(prompt, prompt_logprobs=0, max_tokens=1).prompt_logprobs
    exact = logprobs_of(prompt)
    own = [position[token].logprob for position, token in zip(found[1:], prompt[1:], strict=True)]
    np.testing.assert_allclose(own, [exact[i, prompt[i + 1]] for i in range(89)], atol=1e-4)


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
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([0], "", "stop", None)
    later = answer("x", ignore_eos=False, logit_bias=likely, min_tokens=5).outputs[0]
    assert len(later.token_ids) == 6
    assert 0 not in later.token_ids[:5]
    assert EOS not in later.text


def texts_of(ids: Any) -> str:
    return engine().tokenizer.decode(list(ids), skip_special_tokens=False)


def test_bad_words_do_not_occur_and_other_words_do() -> None:
    free = answer("the fox", max_tokens=40).outputs[0]
    words = [free.text[5:8], texts_of(free.token_ids[:3]), texts_of(free.token_ids[4:5])]
    bound = answer("the fox", max_tokens=40, bad_words=words)
    sequences = [tuple(engine().tokenizer.encode(word, add_special_tokens=False)) for word in words]
    ids = bound.outputs[0].token_ids
    assert any(len(each) > 1 for each in sequences)
    assert not any(ids[at : at + len(each)] == each for each in sequences for at in range(len(ids)))
    assert answer("the fox", max_tokens=40, bad_words=["zzzzzzzz"]).outputs[0].token_ids == free.token_ids


def test_bad_words_are_banned_with_and_without_a_space_before_them() -> None:
    tokenizer = engine().tokenizer
    assert bad_word_ids(["x"], tokenizer, VOCAB) == (tuple(tokenizer.encode("x", add_special_tokens=False)),)
    spaced = next(text for token in range(VOCAB) if (text := texts_of([token])).startswith(" ") and len(text) > 1)
    plain, behind = bad_word_ids([spaced[1]], tokenizer, VOCAB) if len(spaced) == 2 else bad_word_ids([spaced], tokenizer, VOCAB) * 2
    assert len(plain) == len(behind)
    with pytest.raises(UserError, match="at most 32"):
        bad_word_ids(["qzj" * 40], tokenizer, VOCAB)


def test_only_allowed_tokens_are_sampled() -> None:
    allowed = [7, 9, 200, 319]
    for params in ({"temperature": 1.0, "seed": 1}, {}, {"repetition_penalty": 2.0, "logit_bias": {8: 100.0}}):
        ids = answer("the fox", allowed_token_ids=allowed, max_tokens=30, **params).outputs[0].token_ids
        assert set(ids) <= set(allowed)
    regex = StructuredOutputs(regex="[a-f]+")
    letters = [engine().tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "xyef"]
    found = answer("x", allowed_token_ids=[*letters, 0], structured_outputs=regex, temperature=1.0, seed=3)
    assert set(found.outputs[0].text) <= {"e", "f"}
    with pytest.raises(UserError, match="none of allowed_token_ids"):
        answer("x", allowed_token_ids=letters[:2], structured_outputs=regex)
    with pytest.raises(UserError, match="no token is left"):
        answer("x", allowed_token_ids=letters[:1], bad_words=["x"])


def test_chosen_logprobs_are_those_of_the_distribution() -> None:
    wanted = [300, 2, 77]
    result = answer([5, 17, 300], logprob_token_ids=wanted)
    exact = logprobs_of([5, 17, 300, *result.outputs[0].token_ids])
    for place, position in enumerate(result.outputs[0].logprobs):
        np.testing.assert_allclose([position[token].logprob for token in wanted], exact[place + 2, wanted], atol=1e-4)
        assert [entry.rank for entry in position.values()][1:] == [None] * (len(position) - 1)


def test_reasoning_ends_when_its_budget_is_spent() -> None:
    start, end = (engine().tokenizer.encode(marker, add_special_tokens=False) for marker in ("<think>", "</think>"))
    prompt = [5, 17, *start]
    free = answer(prompt, max_tokens=20).outputs[0].token_ids
    for budget in (0, 3, 7):
        ids = list(answer(prompt, thinking_token_budget=budget, max_tokens=20).outputs[0].token_ids)
        assert ids[: budget + len(end)] == [*free[:budget], *end]
        after = reference().generate(
            torch.tensor([prompt + ids[: budget + len(end)]]), max_new_tokens=4, do_sample=False, eos_token_id=None
        )
        assert ids[: budget + len(end) + 4] == after[0, len(prompt) :].tolist()
    assert answer(prompt, thinking_token_budget=-1, max_tokens=20).outputs[0].token_ids == free
    assert answer([5, 17], thinking_token_budget=2, max_tokens=9).outputs[0].token_ids == answer([5, 17], max_tokens=9).outputs[0].token_ids
    spread = answer(prompt, thinking_token_budget=3, n=3, temperature=1.0, seed=1, logprobs=0)
    assert all(list(output.token_ids[3 : 3 + len(end)]) == end for output in spread.outputs)
    assert len({tuple(output.token_ids) for output in spread.outputs}) == 3
    phrase = answer(prompt, thinking_token_budget=2, structured_outputs=StructuredOutputs(regex=".{2,9}</think>[a-c]+"), max_tokens=20)
    assert "</think>" in phrase.outputs[0].text


def test_budget_for_reasoning_is_refused_where_its_end_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine()
    monkeypatch.setattr(llm._admission, "_model", dataclasses.replace(llm._served, thinking=None))
    with pytest.raises(UserError, match="reasoning-parser") as caught:
        answer("x", thinking_token_budget=3)
    assert caught.value.field == "thinking_token_budget"
    assert len(answer("x", thinking_token_budget=-1).outputs[0].token_ids) == 12


def test_answer_that_goes_in_circles_ends() -> None:
    loop = {"allowed_token_ids": [50], "max_tokens": 40}
    circles = RepetitionDetection(max_pattern_size=3, min_count=4)
    ended = answer("x", repetition_detection=circles, **loop).outputs[0]
    assert (len(ended.token_ids), ended.finish_reason, ended.stop_reason) == (4, "repetition", "repetition_detected")
    assert len(answer("x", repetition_detection=circles, min_tokens=9, **loop).outputs[0].token_ids) == 9
    pairs = RepetitionDetection(max_pattern_size=3, min_pattern_size=2, min_count=3)
    assert len(answer("x", repetition_detection=pairs, **loop).outputs[0].token_ids) == 6


def test_n_answers_differ_and_repeat_with_the_seed() -> None:
    first = answer("the fox", n=3, temperature=1.0, seed=4)
    texts = [output.token_ids for output in first.outputs]
    assert [output.index for output in first.outputs] == [0, 1, 2]
    assert len(set(map(tuple, texts))) == 3
    assert [output.token_ids for output in answer("the fox", n=3, temperature=1.0, seed=4).outputs] == texts


def test_chat_goes_through_the_template() -> None:
    result = engine().chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=2), use_tqdm=False)[0]
    assert result.prompt == f"<user>hi{EOS}<assistant>"
    assert (result.finished, result.outputs[0].finished()) == (True, True)


def test_arguments_of_vllm_mean_the_same() -> None:
    bars: list[int] = []

    def bar(total: int, **_: Any) -> Any:
        bars.append(total)
        return tqdm(total=total, disable=True)

    conversations = [[{"role": "user", "content": text}] for text in ("hi", "ho")]
    results = engine().chat(conversations, SamplingParams(max_tokens=1), bar, chat_template="{{ messages[0].content }}!")
    assert ([result.prompt for result in results], bars) == (["hi!", "ho!"], [2])
    unset: Any = None  # as vLLM's callers write it
    params = [SamplingParams(max_tokens=1, stop=unset, stop_token_ids=unset, bad_words=unset).clone(), SamplingParams(max_tokens=2)]
    results = engine().generate(["a", {"prompt_token_ids": [5]}], sampling_params=params, use_tqdm=False, priority=[1, 0])
    assert [len(result.outputs[0].token_ids) for result in results] == [1, 2]
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        engine().generate(["a", "b"], params[:1])


def test_tokenizer_of_transformers_does_the_same() -> None:
    own, tokenizer = engine().tokenizer, engine().get_tokenizer()
    assert tokenizer("the fox").input_ids == own.encode("the fox", add_special_tokens=True)
    assert tokenizer.eos_token_id in own.eos_ids
    shown = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert shown == f"<user>hi{EOS}<assistant>"


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
                bad_words=rng.choice([(), ("e", "a b")]), allowed_token_ids=rng.choice([None, range(1, 300)]),
                logprob_token_ids=rng.choice([(), (3, 4)]), logprobs=rng.choice([None, 5]),
                prompt_logprobs=rng.choice([None, 3]), max_tokens=rng.randrange(2, 20),
                n=rng.choice([1, 2]),
            )
            for _ in prompts
        ]  # fmt: skip
        llm.generate(prompts, each, use_tqdm=False)
    assert llm.metrics.compiles._value.get() == before
    scheduler = core(llm)._scheduler
    check_scheduler(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.usage, llm._engine.num_unfinished) == (0, 0, 0, 0)


def test_failed_step_fails_only_its_own_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine()
    runner = core(llm)._runner
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
    check_scheduler(core(llm)._scheduler)


def test_second_failure_in_a_row_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(tiny_model()), **SHAPES)

    def fail(_: Any) -> Any:
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(core(llm)._runner, "dispatch", fail)
    with pytest.raises(RuntimeError, match="safe to try again"):
        llm.generate("a", SamplingParams(max_tokens=9), use_tqdm=False)
    with pytest.raises(FatalEngineError):
        llm.generate("a", SamplingParams(max_tokens=9), use_tqdm=False)


def test_logits_that_are_not_finite_end_their_request_alone() -> None:
    llm = LLM(str(tiny_model()), **SHAPES)
    engine = core(llm)
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


def test_weights_are_random_and_not_read_when_the_format_is_dummy(tmp_path: pathlib.Path) -> None:
    for file in tiny_model().iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    with pytest.raises(ConfigError, match="holds no weights"):
        LLM(str(tmp_path), **SHAPES)
    prompts = [[5, 17, 300], [8] * 40]
    first, again = (
        LLM(str(tmp_path), load_format="dummy", **SHAPES).generate(prompts, SamplingParams(max_tokens=9, ignore_eos=True, temperature=0))
        for _ in range(2)
    )
    assert [len(result.outputs[0].token_ids) for result in first] == [9, 9]
    assert [result.outputs[0].token_ids for result in first] == [result.outputs[0].token_ids for result in again]
