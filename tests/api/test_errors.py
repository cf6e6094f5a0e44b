"""Refusals: every hostile or unsupported value is a 400 naming its field, every error has OpenAI's shape, none leaks anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Client, ScriptedEngine

ErrorOf = Callable[[httpx.Response], dict[str, Any]]
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}

COMMON: list[tuple[str, Any]] = [
    ("model", 1), ("model", ["x"]), ("stream", "yes"), ("stream", 1), ("n", 0), ("n", 257), ("n", 10**15), ("n", 1.5), ("n", True),
    ("n", "2"),
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", True), ("temperature", [1]),
    ("top_p", 0), ("top_p", 1.1), ("top_p", -1), ("top_k", -2), ("top_k", 2**31), ("top_k", 1.5), ("min_p", -0.1), ("min_p", 2),
    ("presence_penalty", 2.5), ("frequency_penalty", -3), ("frequency_penalty", 1e300), ("repetition_penalty", 0),
    ("repetition_penalty", -1),
    ("seed", 2**63), ("seed", -(2**63) - 1), ("seed", "a"), ("min_tokens", -1), ("min_tokens", 2**40),
    ("stop", ""), ("stop", ["a", ""]), ("stop", ["a"] * 5), ("stop", ["a" * 1025]), ("stop", 5), ("stop", {"a": 1}),
    ("stop_token_ids", [259]), ("stop_token_ids", [-1]), ("stop_token_ids", [1] * 65), ("stop_token_ids", 5),
    ("logit_bias", {"259": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"x": 1}), ("logit_bias", {"\u0661": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": None}), ("logit_bias", [1]), ("logit_bias", {str(i): 1 for i in range(1025)}), ("logit_bias", {"9" * 18: 1}),
    ("ignore_eos", "no"), ("include_stop_str_in_output", 1), ("skip_special_tokens", "x"), ("return_token_ids", 3), ("priority", 2**40),
    ("priority", "high"), ("cache_salt", ""), ("cache_salt", "x" * 1025), ("cache_salt", 1),
    ("request_id", "a b"), ("request_id", "x" * 65),
    ("request_id", "a\r\nset-cookie: x"), ("request_id", 5), ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2),
    ("truncate_prompt_tokens", 121), ("truncation_side", "middle"), ("prompt_logprobs", -1), ("prompt_logprobs", 21),
    ("stream_options", {"include_usage": True}), ("stream_options", 5), ("response_format", {"type": "json"}),
    ("response_format", "json"),
    ("response_format", {"type": "json_schema", "json_schema": {}}), ("chat_template", "{{ x }}"), ("best_of", 2), ("suffix", "end"),
    ("use_beam_search", "yes"), ("length_penalty", 0.5), ("length_penalty", "x"),
    ("structured_outputs", {"regex": "a", "json_object": True}),
    ("guided_json", {}), ("guided_regex", "a+"),
    ("allowed_token_ids", []), ("allowed_token_ids", [259]), ("allowed_token_ids", ["a"]), ("bad_words", "x"), ("bad_words", [""]),
    ("bad_words", [5]), ("bad_words", ["x"] * 129), ("bad_words", ["x" * 2000]), ("logprob_token_ids", [10**12]),
    ("logprob_token_ids", [1] * 129), ("repetition_detection", 5), ("prompt_embeds", "gAAA"),
    ("kv_transfer_params", {"a": 1}),
    ("vllm_xargs", {"a": 1}), ("mm_processor_kwargs", {"a": 1}), ("thinking_token_budget", -2), ("spaces_between_special_tokens", 0),
    ("user", {"a": 1}), ("metadata", "x"), ("store", "yes"), ("echo", "x"), ("add_special_tokens", 0), ("return_tokens_as_token_ids", "x"),
]  # fmt: skip
CHAT_ONLY: list[tuple[str, Any]] = [
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 10**12), ("max_tokens", 1.5), ("max_tokens", "5"), ("max_completion_tokens", 0),
    ("top_logprobs", 2), ("top_logprobs", -1), ("top_logprobs", 21), ("logprobs", 5), ("messages", None), ("messages", []),
    ("messages", "hi"),
    ("messages", {"role": "user"}), ("messages", [USER] * 2049), ("tool_choice", "auto"), ("tool_choice", "required"), ("tool_choice", "x"),
    ("tool_choice", 5), ("tools", [TOOL] * 129), ("tools", {}), ("functions", [{}]), ("functions", "f"),
    ("function_call", "auto"), ("function_call", {"name": "f"}),
    ("modalities", ["audio"]), ("audio", {"voice": "x"}), ("reasoning_effort", "enormous"), ("documents", ["x"]), ("documents", [{}] * 257),
    ("chat_template_kwargs", {"tokenize": True}), ("chat_template_kwargs", {"chat_template": "x"}),
    ("chat_template_kwargs", {"messages": []}),
    ("chat_template_kwargs", {"bos_token": "x"}), ("chat_template_kwargs", {"__class__": 1}), ("chat_template_kwargs", {"a b": 1}),
    ("chat_template_kwargs", {"a": "x" * 20_000}), ("chat_template_kwargs", {f"a{i}": 1 for i in range(33)}), ("chat_template_kwargs", [1]),
    ("continue_final_message", True), ("add_generation_prompt", "x"),
]  # fmt: skip
MESSAGES: list[tuple[Any, str]] = [
    (5, "messages[1]"), (None, "messages[1]"), ({}, "messages[1].role"), ({"role": "king", "content": "x"}, "messages[1].role"),
    ({"role": 5, "content": "x"}, "messages[1].role"), ({"role": "user"}, "messages[1].content"),
    ({"role": "user", "content": 5}, "messages[1].content"),
    ({"role": "user", "content": {"a": 1}}, "messages[1].content"), ({"role": "user", "content": [5]}, "messages[1].content[0]"),
    ({"role": "user", "content": [{"text": "x"}]}, "messages[1].content[0].type"),
    ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
    ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages[1].content[0].text"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]}, "messages[1].content[0].type"),
    ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages[1].content[0].type"),
    ({"role": "user", "content": [{"type": "text", "text": "x"}] * 257}, "messages[1].content"),
    ({"role": "user", "content": "x", "name": 5}, "messages[1].name"),
    ({"role": "user", "content": "x", "name": "n" * 257}, "messages[1].name"),
    ({"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}, "messages[1].tool_calls"),
    ({"role": "assistant", "tool_calls": 5}, "messages[1].tool_calls"),
    ({"role": "assistant", "tool_calls": [5]}, "messages[1].tool_calls[0]"),
    ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "messages[1].tool_calls[0].function"),
    ({"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}, "messages[1].tool_calls[0].function.name"),
    ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}, "messages[1].tool_calls[0].function.arguments"),
    ({"role": "tool", "content": "x", "tool_call_id": {}}, "messages[1].tool_call_id"),
]  # fmt: skip
PROMPTS: list[tuple[Any, str]] = [
    (None, "prompt"), ([], "prompt"), (5, "prompt"), ({"a": 1}, "prompt"), (True, "prompt"), (["a"] * 2049, "prompt"),
    ([[97]] * 2049, "prompt"),
    (["a", 5], "prompt[1]"), ([97, "a"], "prompt[1]"), ([97, 1.5], "prompt[1]"), ([97, True], "prompt[1]"), ([True], "prompt[0]"),
    ([[]], "prompt[0]"),
    ([[97], "a"], "prompt[1]"), ([[97, "a"]], "prompt[0][1]"), ([259], "prompt[0]"), ([-1], "prompt[0]"), ([[97], [2**63]], "prompt[1][0]"),
]  # fmt: skip


def check_refusal(error: dict[str, Any], param: str) -> None:
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[-1].split("[")[0] in error["message"]


@pytest.mark.parametrize(("name", "value"), COMMON + CHAT_ONLY, ids=lambda value: f"{value!r:.30}")
def test_hostile_chat_value_is_400_naming_it(client: Client, engine: ScriptedEngine, error_of: ErrorOf, name: str, value: Any) -> None:
    response = client.post("/v1/chat/completions", {"messages": [USER], name: value})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"].startswith(name)
    assert error["type"] == "invalid_request_error"
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("name", "value"), [*COMMON, ("max_tokens", 0), ("logprobs", 21), ("logprobs", -1), ("logprobs", True)], ids=lambda v: f"{v!r:.30}"
)
def test_hostile_completion_value_is_400_naming_it(
    client: Client, engine: ScriptedEngine, error_of: ErrorOf, name: str, value: Any
) -> None:
    response = client.complete("a", **{name: value})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"].startswith(name)
    assert engine.submitted == []


@pytest.mark.parametrize(("message", "param"), MESSAGES, ids=lambda value: f"{value!r:.40}")
def test_bad_message_is_400_naming_its_path(client: Client, error_of: ErrorOf, message: Any, param: str) -> None:
    response = client.post("/v1/chat/completions", {"messages": [USER, message]})
    assert response.status_code == 400
    check_refusal(error_of(response), param)


@pytest.mark.parametrize(("prompt", "param"), PROMPTS, ids=lambda value: f"{value!r:.40}")
def test_bad_prompt_is_400_naming_its_place(client: Client, error_of: ErrorOf, prompt: Any, param: str) -> None:
    response = client.complete(prompt)
    assert response.status_code == 400
    check_refusal(error_of(response), param)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("payload", "param", "numbers"),
    [
        ({"prompt": [97] * 120}, "prompt", ["120"]),
        ({"prompt": [97] * 100, "max_tokens": 21}, "max_tokens", ["100", "21", "120", "20"]),
        ({"prompt": "x" * 2000}, "prompt", ["2000", "120"]),
        ({"prompt": ["a", "x" * 130]}, "prompt", ["131", "120"]),
        ({"messages": [{"role": "user", "content": "x" * 130}]}, "messages", ["120"]),
        ({"messages": [{"role": "user", "content": "x"}] * 200}, "messages", ["120"]),
    ],
)
def test_too_long_says_how_long_it_is_and_may_be(
    client: Client, engine: ScriptedEngine, error_of: ErrorOf, stream: bool, payload: dict[str, Any], param: str, numbers: list[str]
) -> None:
    path = "/v1/completions" if "prompt" in payload else "/v1/chat/completions"
    response = client.post(path, {**payload, "stream": stream})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert all(number in error["message"] for number in numbers)
    assert engine.submitted == []


def test_prompt_logprobs_do_not_stream(client: Client, error_of: ErrorOf) -> None:
    assert error_of(client.chat("a", stream=True, prompt_logprobs=1))["param"] == "prompt_logprobs"


def test_empty_text_without_tokens_is_400(client: Client, error_of: ErrorOf) -> None:
    assert error_of(client.complete("", add_special_tokens=False))["param"] == "prompt"


def test_what_the_template_refuses_is_400(client: Client, engine: ScriptedEngine, error_of: ErrorOf) -> None:
    engine.chat.refuses = {"developer"}
    response = client.post("/v1/chat/completions", {"messages": [{"role": "developer", "content": "x"}]})
    assert (response.status_code, error_of(response)["param"]) == (400, "messages")


def test_too_many_fields_are_400(client: Client, error_of: ErrorOf) -> None:
    response = client.complete("a", **{f"unknown{number}": 1 for number in range(600)})
    assert (response.status_code, error_of(response)["param"]) == (400, None)


def test_unknown_model_is_404(client: Client, error_of: ErrorOf) -> None:
    response = client.chat("a", model="gpt-" + "9" * 5000)
    assert response.status_code == 404
    error = error_of(response)
    assert (error["type"], error["code"], error["param"]) == ("not_found_error", "model_not_found", "model")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"{}"}, 415),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
        ({"data": {"a": "b"}}, 415),
        ({"content": b"{}", "headers": {"content-type": "application/json; charset=utf-16"}}, 415),
        ({"content": b"{}", "headers": {"content-type": "application/json", "content-encoding": "gzip"}}, 415),
        ({"content": b" " * 2000, "headers": {"content-type": "application/json"}}, 413),
        ({"content": b"{}", "headers": {"content-type": "application/json; charset=UTF-8"}}, 400),
    ],
)
def test_bad_bodies_have_their_status(
    make_client: Callable[..., Client], error_of: ErrorOf, path: str, options: dict[str, Any], status: int
) -> None:
    response = make_client(max_body_bytes=1024).request("POST", path, **options)
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"


def test_unknown_path_and_method_have_the_error_body(client: Client, error_of: ErrorOf) -> None:
    missing, wrong = client.get("/v1/nothing"), client.get("/v1/completions")
    assert (missing.status_code, error_of(missing)["type"]) == (404, "not_found_error")
    assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert client.get("/v1/models/").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue_is_429_and_takes_nothing(client: Client, engine: ScriptedEngine, error_of: ErrorOf, stream: bool) -> None:
    engine.capacity = 5
    engine.hold = True
    response = client.complete(["a", "b", "c"], n=2, stream=stream)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert error_of(response)["type"] == "rate_limit_error"
    assert engine.live == {}
    assert len(engine.aborted) == 5


@pytest.mark.parametrize("phase", ["loading", "compiling", "draining", "failed", "stalled"])
def test_engine_that_is_not_ready_answers_503(client: Client, engine: ScriptedEngine, error_of: ErrorOf, phase: str) -> None:
    engine.state.phase, engine.state.detail, engine.healthy = phase if phase != "stalled" else "ready", "/secret/path", phase != "stalled"
    for response in (client.chat(), client.complete(), client.post("/tokenize", {"prompt": "x"})):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert error_of(response)["type"] == "unavailable_error"
        assert "secret" not in response.text


def test_engine_that_closes_while_submitting_answers_503_in_our_words(client: Client, engine: ScriptedEngine, error_of: ErrorOf) -> None:
    engine.hold = True
    submit = engine.submit

    def first_then_closed(**options: Any) -> Any:
        if engine.submitted:
            engine.state.phase = "draining"
        return submit(**options)

    engine.submit = first_then_closed  # type: ignore[method-assign]
    response = client.complete("a", n=2)
    assert response.status_code == 503
    assert "secret" not in error_of(response)["message"]
    assert engine.live == {}


def test_failure_of_our_own_is_500_without_details(client: Client, engine: ScriptedEngine, error_of: ErrorOf) -> None:
    def broken(*_: Any, **__: Any) -> str:
        raise ZeroDivisionError("/secret/path 0x7fff")

    engine.chat.render = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):  # Starlette raises on, for the server's log, after it has answered
        client.chat()
    response = client.request_quietly("POST", "/v1/chat/completions", json={"messages": [USER]})
    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "secret" not in response.text
