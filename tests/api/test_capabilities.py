"""GET /v1/capabilities keeps its word: supported parameters change something, refused ones are a 400 naming them, ignored ones neither."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import TYPE_CHECKING, Any

import pytest

from jaxserve.api.app import operations
from jaxserve.api.capabilities import describe
from tests.api.conftest import CHAT, COMPLETIONS, EOS, Client, ScriptedEngine, error_of

if TYPE_CHECKING:
    from collections.abc import Iterator

ENGINE = ScriptedEngine()
OPERATIONS = operations(ENGINE)  # type: ignore[arg-type]
PAGE = describe(OPERATIONS, {})
EXAMPLES = {operation.path: operation.body.examples[0] for operation in OPERATIONS if operation.body is not None}
USER = {"role": "user", "content": "say something"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}

# name -> a value that must make a difference, and what else the body must hold for it.
COMMON: dict[str, tuple[Any, dict[str, Any]]] = {
    "add_special_tokens": (None, {}), "allowed_token_ids": ([97], {}), "bad_words": (["a"], {}), "cache_salt": ("x", {}),
    "echo": (True, {}), "frequency_penalty": (0.5, {}), "ignore_eos": (True, {}), "include_stop_str_in_output": (True, {}),
    "length_penalty": (0.0, {"use_beam_search": True, "n": 3}), "logit_bias": ({"97": 5}, {}), "logprob_token_ids": ([97], {}),
    "max_tokens": (2, {}), "min_p": (0.5, {}), "min_tokens": (2, {}), "model": ("unknown", {}), "n": (2, {}),
    "presence_penalty": (0.5, {}), "priority": (3, {}), "prompt_logprobs": (1, {}), "repetition_detection": ({"max_pattern_size": 2,
    "min_count": 2}, {}), "repetition_penalty": (1.5, {}), "request_id": ("mine", {}), "response_format": ({"type": "json_object"}, {}),
    "return_token_ids": (True, {}), "return_tokens_as_token_ids": (True, {}), "seed": (3, {}), "skip_special_tokens": (False, {}),
    "stop": ("e", {}), "stop_token_ids": ([101], {}), "stream": (True, {}),
    "stream_interval": (3, {"stream": True}), "stream_options": ({"include_usage": True}, {"stream": True}),
    "structured_outputs": ({"regex": "a"}, {}), "temperature": (0.5, {}), "thinking_token_budget": (5, {}), "top_k": (3, {}),
    "top_p": (0.5, {}), "truncate_prompt_tokens": (3, {}), "truncation_side": ("right", {"truncate_prompt_tokens": 3}),
    "use_beam_search": (True, {}),
}  # fmt: skip
CHANGES: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {
    CHAT: COMMON | {
        "add_special_tokens": (True, {}), "add_generation_prompt": (False, {}), "chat_template_kwargs": ({"a": 1}, {}),
        "continue_final_message": (True, {"messages": [USER, {"role": "assistant", "content": "a"}]}),
        "echo": (True, {"messages": [USER, {"role": "assistant", "content": "a"}]}), "documents": ([{"text": "a"}], {}),
        "include_reasoning": (False, {}),
        "return_prompt_text": (True, {}), "logprobs": (True, {}), "logprob_token_ids": ([97], {"logprobs": True}),
        "return_tokens_as_token_ids": (True, {"logprobs": True}), "max_completion_tokens": (2, {}), "messages": ([USER, USER], {}),
        "parallel_tool_calls": (False, {"tools": [TOOL], "tool_choice": "required"}), "reasoning_effort": ("low", {}),
        "functions": ([TOOL["function"]], {}), "function_call": ({"name": "f"}, {"functions": [TOOL["function"]]}),
        "tool_choice": ("required", {"tools": [TOOL]}), "tools": ([TOOL], {}), "top_logprobs": (2, {"logprobs": True}),
    },
    COMPLETIONS: COMMON | {
        "add_special_tokens": (False, {}), "logprobs": (1, {}), "logprob_token_ids": ([97], {"logprobs": 0}), "prompt": ("b", {}),
        "return_tokens_as_token_ids": (True, {"logprobs": 1}),
    },
}  # fmt: skip


def rows(state: str) -> Iterator[tuple[str, str]]:
    return ((path, name) for path in CHANGES for name, row in PAGE[path].items() if row["state"] == state)


def observe(path: str, body: dict[str, Any]) -> list[Any]:
    """Everything that a request does: what it asks of the template and of the engine, and what comes back, but for ids and times."""
    engine = ScriptedEngine(reasoning_parser="qwen3", tool_call_parser="hermes")
    engine.replies = ["<think>hm</think>a dead bee, ", "an odd egg"]
    engine.tops = lambda prompt: [(97, -0.1), (EOS, -2.0), (98, -3.0), (99, -3.5), (100, -3.7), (101, -4.0)]
    response = Client(engine).post(path, body)
    text = re.sub(r'"created":\d+|(cmpl|tool|call|rs|msg|resp|fc)[-_][0-9a-f-]{8,}', "", response.text)
    calls = [{**call, "params": dataclasses.astuple(call["params"])} for call in engine.calls]
    return [response.status_code, text, engine.chat.calls, calls]


def test_page_is_served_and_says_what_the_model_cannot(client: Client) -> None:
    client.engine.served.refused = {"thinking_token_budget": "needs a thinker"}
    page = client.get("/v1/capabilities").json()
    assert (page["object"], page["model"]) == ("capabilities", "org/byte-model")
    for path in (CHAT, COMPLETIONS):
        row = page["endpoints"][path].pop("thinking_token_budget")
        assert row == {"state": "refused", "reason": "thinking_token_budget needs a thinker"}
        assert page["endpoints"][path] == {name: row for name, row in PAGE[path].items() if name != "thinking_token_budget"}


@pytest.mark.parametrize("path", CHANGES)
def test_every_supported_parameter_has_its_test(path: str) -> None:
    assert set(CHANGES[path]) == {name for name, row in PAGE[path].items() if row["state"] == "supported"}


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in CHANGES.items() for name in names])
def test_supported_parameter_makes_a_difference(path: str, name: str) -> None:
    value, others = CHANGES[path][name]
    body = {**({"messages": [USER]} if path == CHAT else {"prompt": "say something"}), "max_tokens": 40, **others}
    body.pop("max_tokens" if name == "max_completion_tokens" else "", None)
    before, after = observe(path, body), observe(path, {**body, name: value})
    assert before[0] == 200
    assert after[0] == (404 if name == "model" else 200), after[1]
    assert before != after


@pytest.mark.parametrize(("path", "name"), list(rows("refused")))
def test_refused_parameter_is_400_naming_it(path: str, name: str) -> None:
    row = PAGE[path][name]
    response = Client(ScriptedEngine()).post(path, {**EXAMPLES[path], name: {"strange": 0.5}})
    error = error_of(response)
    assert (response.status_code, error["param"], error["message"]) == (400, name, row["reason"])
    for neutral in row.get("accepted", ()):
        assert Client(ScriptedEngine()).post(path, {**EXAMPLES[path], name: neutral}).status_code == 200


@pytest.mark.parametrize(("path", "name"), list(rows("ignored")))
def test_ignored_parameter_changes_nothing(path: str, name: str) -> None:
    body = dict(EXAMPLES[path])
    values: tuple[Any, ...] = ("x", True, {"a": "b"})
    answers = [observe(path, {**body, name: value}) for value in values]
    assert sum(answer[0] == 200 for answer in answers) == 1, "of one type"
    assert observe(path, body) in answers


def test_documented_table_is_the_page() -> None:
    text = (pathlib.Path(__file__).parent.parent.parent / "docs" / "parameters.md").read_text("utf-8")
    found = {cells[0]: cells[1:3] for line in text.splitlines() if (cells := [cell.strip(" `") for cell in line.strip("|").split("|")])[2:]}
    expected = {
        name: [PAGE[path].get(name, {"state": "-"})["state"] for path in (CHAT, COMPLETIONS)] for name in {*PAGE[CHAT], *PAGE[COMPLETIONS]}
    }
    assert {
        name: states for name, states in found.items() if name in expected or states[0] in ("supported", "refused", "ignored")
    } == expected
