"""LangChain's ChatOpenAI as its users point it at vLLM: mosaicml/mpt-7b by name, a model without a chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

from tests.server.process import serving
from tests.tiny import tiny_model

MESSAGES = [
    SystemMessage(content="You are a helpful assistant that translates English to Italian."),
    HumanMessage(content="Translate the following sentence from English to Italian: I love programming."),
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatOpenAI]:
    with serving(
        tmp_path_factory.mktemp("server"), "--served-model-name", "mosaicml/mpt-7b", model_path=str(tiny_model(chat_template=False))
    ) as server:
        options: dict[str, Any] = {"api_key": "EMPTY", "max_tokens": 5, "temperature": 0, "max_retries": 0, "stream_usage": True}
        yield ChatOpenAI(model="mosaicml/mpt-7b", base_url=f"{server.url}/v1", **options)


def test_invoke_answers_with_usage(llm: ChatOpenAI) -> None:
    answer = llm.invoke(MESSAGES)
    assert isinstance(answer, AIMessage)
    assert answer.content
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 5
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.response_metadata["model_name"] == "mosaicml/mpt-7b"


def test_prompt_template_pipes_into_the_model(llm: ChatOpenAI) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "You translate {source} to {target}."), ("human", "{text}")])
    chain = prompt | llm | StrOutputParser()
    values = {"source": "English", "target": "Italian", "text": "I love programming."}
    assert chain.invoke(values) == chain.invoke(values) != ""


def test_stream_adds_up_to_the_answer(llm: ChatOpenAI) -> None:
    chunks = list(llm.stream(MESSAGES))
    assert "".join(str(chunk.content) for chunk in chunks) == llm.invoke(MESSAGES).content
    usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert len(usage) == 1
    assert usage[0]["output_tokens"] == 5


def test_batch_equals_one_by_one(llm: ChatOpenAI) -> None:
    questions: list[Any] = [f"What is {i} plus {i}?" for i in range(9)]
    assert [a.content for a in llm.batch(questions)] == [llm.invoke(question).content for question in questions]


def test_async_calls_answer_alike(llm: ChatOpenAI) -> None:
    async def ask() -> tuple[str, str]:
        streamed = [str(chunk.content) async for chunk in llm.astream(MESSAGES)]
        return str((await llm.ainvoke(MESSAGES)).content), "".join(streamed)

    whole, streamed = asyncio.run(ask())
    assert whole == streamed == llm.invoke(MESSAGES).content


def test_stop_seed_and_logprobs_reach_the_engine(llm: ChatOpenAI) -> None:
    text = str(llm.invoke("hello").content)
    assert llm.bind(stop=[text[2:4]]).invoke("hello").content == text[: text.index(text[2:4])]
    random = llm.bind(temperature=1.0, seed=3)
    assert random.invoke("hello").content == random.invoke("hello").content
    logprobs = llm.bind(logprobs=True, top_logprobs=2).invoke("hello").response_metadata["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in logprobs] == [2] * 5
