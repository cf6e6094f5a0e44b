"""A model behind the caller's own event loop: the answers of LLM, as they come; and what operators may tell the engine."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from jaxserve import LLM, AsyncLLM, SamplingParams, StructuredOutputs
from jaxserve.errors import ConfigError, UserError
from jaxserve.metrics import Figure, HistogramFigure
from tests.tiny import tiny_model

SHAPES: dict[str, Any] = {
    "max_rows": 4, "max_step_tokens": 32, "decode_rows": (4,), "prefill_tokens": (32,), "cache_bytes": 1 << 20, "page_size": 16,
}  # fmt: skip
Run = Callable[[Callable[[AsyncLLM], Awaitable[None]]], None]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
PROMPT = [5, 17, 300]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a test in the loop of one model; nothing may be left running."""
    profiles = tmp_path_factory.mktemp("profiles")
    with asyncio.Runner() as runner:
        llm = runner.run(AsyncLLM(str(tiny_model()), **SHAPES, profile_dir=str(profiles)).__aenter__())

        def once(test: Callable[[AsyncLLM], Awaitable[None]]) -> None:
            runner.run(asyncio.wait_for(test(llm), 60))
            assert llm.engine.num_unfinished == 0

        yield once
        runner.run(llm.__aexit__(None, None, None))


@functools.cache
def alone(n: int = 1) -> list[list[int]]:
    params = SamplingParams(temperature=1.0, seed=3, n=n, max_tokens=12, ignore_eos=True)
    return [output.token_ids for output in LLM(str(tiny_model()), **SHAPES).generate([PROMPT], params, use_tqdm=False)[0].outputs]


async def last(results: Any) -> Any:
    return [result async for result in results][-1]


async def first(results: Any) -> Any:
    return await anext(aiter(results))


def test_results_grow_to_what_llm_answers(run: Run) -> None:
    async def test(llm: AsyncLLM) -> None:
        params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=12, ignore_eos=True)
        texts = ["", "", ""]
        result: Any = None
        async for result in llm.generate(PROMPT, params):
            for output in result.outputs:
                assert output.text.startswith(texts[output.index])
                texts[output.index] = output.text
        assert [output.token_ids for output in result.outputs] == alone(3)
        assert {output.finish_reason for output in result.outputs} == {"length"}
        many = await asyncio.gather(*(last(llm.generate(PROMPT, GREEDY)) for _ in range(6)))
        assert len({tuple(one.outputs[0].token_ids) for one in many}) == 1

    run(test)


def test_chat_structured_outputs_and_metrics_work(run: Run) -> None:
    async def test(llm: AsyncLLM) -> None:
        chosen = SamplingParams(structured_outputs=StructuredOutputs(choice=["yes", "no"]))
        result = await last(llm.chat([{"role": "user", "content": "well?"}], chosen))
        assert result.outputs[0].text in ("yes", "no")
        figures = {figure.name: figure for figure in llm.get_metrics()}
        length = figures["vllm:request_generation_tokens"]
        assert isinstance(length, HistogramFigure)
        assert length.count == length.buckets["+Inf"] >= length.buckets["1.0"]
        prompt = figures["vllm:prompt_tokens_total"]
        assert isinstance(prompt, Figure)
        assert prompt.value >= len(result.prompt_token_ids)
        assert prompt.labels["engine"] == "0"
        with pytest.raises(UserError):
            await last(llm.generate([9999], GREEDY))

    run(test)


def test_vectors_are_those_of_llm() -> None:
    async def test() -> None:
        options: dict[str, Any] = {"runner": "pooling", **SHAPES}
        async with AsyncLLM(str(tiny_model()), **options) as llm:
            found = [await last(llm.encode(prompt, pooling_task="embed")) for prompt in ("a city", PROMPT)]
            with pytest.raises(UserError, match="not classes"):
                await last(llm.encode("a", pooling_task="classify"))
        wanted = LLM(str(tiny_model()), **options).encode(["a city", PROMPT], use_tqdm=False)
        assert [one.outputs.data for one in found] == [one.outputs.data for one in wanted]
        assert [one.prompt_token_ids for one in found] == [one.prompt_token_ids for one in wanted]

    asyncio.run(test())


def test_bad_model_is_a_config_error() -> None:
    async def enter() -> None:
        async with AsyncLLM("/nowhere/at/all", **SHAPES):
            raise AssertionError("it has loaded")

    with pytest.raises(ConfigError, match="nowhere"):
        asyncio.run(enter())


def test_reader_who_leaves_frees_the_request(run: Run) -> None:
    async def test(llm: AsyncLLM) -> None:
        results = llm.generate(PROMPT, LONG)
        await first(results)
        await results.aclose()  # type: ignore[attr-defined]
        assert llm.engine.num_unfinished == 0

    run(test)


def test_abort_ends_with_what_there_is(run: Run) -> None:
    async def test(llm: AsyncLLM) -> None:
        whole = await last(llm.generate(PROMPT, LONG))
        results = llm.generate(PROMPT, LONG, request_id="mine")
        begun = await first(results)
        await llm.abort("another")
        await llm.abort("mine")
        result = await last(results)
        output = result.outputs[0]
        assert output.finish_reason == "abort"
        assert len(begun.outputs[0].token_ids) <= len(output.token_ids) < 200
        assert whole.outputs[0].token_ids[: len(output.token_ids)] == output.token_ids
        assert whole.outputs[0].text.startswith(output.text.rstrip("�"))

    run(test)


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_paused_engine_takes_no_step_and_goes_on_as_if_nothing_had_been(run: Run, mode: Any) -> None:
    async def test(llm: AsyncLLM) -> None:
        expected = (await last(llm.generate(PROMPT, LONG))).outputs[0].token_ids
        results = llm.generate(PROMPT, LONG)
        await first(results)
        assert await llm.pause(mode)
        running = asyncio.create_task(last(results))
        held = asyncio.create_task(last(llm.generate(PROMPT, GREEDY)))
        steps = step_count(llm)
        assert await llm.pause("keep"), "a second pause is fine"
        assert step_count(llm) == steps, "the device idles"
        assert not held.done()
        await llm.resume()
        assert not llm.engine.is_paused
        ended = (await running).outputs[0]
        assert ended.token_ids == expected[: len(ended.token_ids)]
        assert ended.finish_reason == ("abort" if mode == "abort" else "length")
        assert (await held).outputs[0].token_ids == expected[:12]

    run(test)


def step_count(llm: AsyncLLM) -> int:
    return sum(
        figure.count for figure in llm.get_metrics() if figure.name == "jaxserve:step_seconds" and isinstance(figure, HistogramFigure)
    )


def test_resume_overtakes_a_pause_that_still_waits(run: Run) -> None:
    async def test(llm: AsyncLLM) -> None:
        results = llm.generate(PROMPT, LONG)
        await first(results)
        pausing = asyncio.create_task(llm.pause("wait"))
        await asyncio.sleep(0)
        await llm.resume()
        assert not await pausing
        assert (await last(results)).outputs[0].finish_reason == "length"

    run(test)


def test_requests_held_by_a_pause_can_be_ended(run: Run) -> None:
    async def test(llm: AsyncLLM) -> None:
        await llm.pause()
        held = asyncio.create_task(last(llm.generate(PROMPT, GREEDY, request_id="held")))
        left = asyncio.create_task(first(llm.generate(PROMPT, GREEDY)))
        while llm.engine.num_unfinished < 2:
            await asyncio.sleep(0)
        await llm.abort("held")
        result = await held
        assert (result.outputs[0].finish_reason, result.outputs[0].token_ids) == ("abort", [])
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        await llm.resume()

    run(test)


def test_prefix_cache_is_reset_when_nothing_runs_or_running_requests_may_be_set_back(run: Run) -> None:
    prompt = list(range(5, 55))

    async def cached(llm: AsyncLLM) -> int:
        return (await last(llm.generate(prompt, GREEDY))).num_cached_tokens

    async def test(llm: AsyncLLM) -> None:
        for _ in range(2):
            assert await llm.reset_prefix_cache()
            assert [await cached(llm), await cached(llm)] == [0, 48]
        expected = (await last(llm.generate(PROMPT, LONG))).outputs[0].token_ids
        results = llm.generate(PROMPT, LONG)
        await first(results)
        assert not await llm.reset_prefix_cache()
        assert await cached(llm) == 48
        assert await llm.reset_prefix_cache(reset_running_requests=True)
        assert await cached(llm) == 0
        assert (await last(results)).outputs[0].token_ids == expected

    run(test)


@pytest.mark.parametrize("clear_cache", [True, False])
def test_pause_clears_the_prefix_cache_unless_told_not_to(run: Run, clear_cache: bool) -> None:
    prompt = list(range(5, 55))

    async def test(llm: AsyncLLM) -> None:
        await last(llm.generate(prompt, GREEDY))
        await llm.pause(clear_cache=clear_cache)
        await llm.resume()
        assert (await last(llm.generate(prompt, GREEDY))).num_cached_tokens == (0 if clear_cache else 48)

    run(test)


def test_profile_is_written_once_stopped(run: Run) -> None:
    async def test(llm: AsyncLLM) -> None:
        await llm.engine.start_profile()
        with pytest.raises(UserError):
            await llm.engine.start_profile()
        await last(llm.generate(PROMPT, GREEDY))
        await llm.engine.stop_profile()
        with pytest.raises(UserError):
            await llm.engine.stop_profile()
        assert list(llm.engine.config.profile_path.rglob("*.xplane.pb"))

    run(test)
