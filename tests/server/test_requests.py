"""Hostile and mistaken requests, one row each under its requirement (R1 to R24): a clean 4xx at once, and nothing else happens."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from tests.server.process import CHAT, COMPLETIONS, MAX_LEN, ServerProcess, error_of
from tests.tiny import VOCAB

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f"}}


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": HELLO, "max_tokens": 2, **fields}


def completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": [5, 6], "max_tokens": 2, **fields}


def raw(text: str | bytes, path: str = COMPLETIONS) -> tuple[str, bytes]:
    return path, text if isinstance(text, bytes) else text.encode()


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": [value]}
    return value


REFUSED = {
    "r1 n": completion(n=257),
    "r1 n huge": completion(n=10**9),
    "r1 n of chat": chat(n=10**18),
    "r1 n negative": chat(n=-1),
    "r1 best_of": completion(best_of=10**6),
    "r1 prompts": completion(prompt=[[5]] * 2049),
    "r1 texts": completion(prompt=["a"] * 2049),
    "r1 messages": chat(messages=HELLO * 2049),
    "r1 parts": chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 257}]),
    "r1 tools": chat(tools=[TOOL] * 129, tool_choice="none"),
    "r1 stop": completion(stop=["a"] * 5),
    "r1 long stop": completion(stop="a" * 1025),
    "r1 logit_bias": completion(logit_bias={str(i): 1 for i in range(1025)}),
    "r1 logprobs": completion(logprobs=21),
    "r1 top_logprobs": chat(logprobs=True, top_logprobs=21),
    "r1 prompt_logprobs": completion(prompt_logprobs=10**6),
    "r1 stop_token_ids": completion(stop_token_ids=[5] * 100_000),
    "r1 max_tokens": completion(max_tokens=2**31),
    "r1 min_tokens": completion(min_tokens=10**9),
    "r1 fields": completion(**{f"f{i}": i for i in range(600)}),
    "r2 NaN": raw('{"prompt":[5],"temperature":NaN}'),
    "r2 Infinity": raw('{"prompt":[5],"top_p":Infinity}'),
    "r2 -Infinity": raw('{"prompt":[5],"logit_bias":{"5":-Infinity}}'),
    "r2 1e999": raw('{"prompt":[5],"presence_penalty":1e999}'),
    "r2 -1e999": raw('{"prompt":[5],"logit_bias":{"5":-1e999}}'),
    "r2 NaN unread": raw('{"prompt":[5],"metadata":{"a":[NaN]}}'),
    "r2 long number": raw('{"prompt":[5],"min_p":0.' + "1" * 10**6 + "}"),
    "r2 long integer": raw('{"prompt":[5],"seed":' + "9" * 10**6 + "}"),
    "r2 2**64": raw('{"prompt":[5],"seed":18446744073709551616}'),
    "r2 temperature": completion(temperature=-1e-9),
    "r2 top_p": completion(top_p=0),
    "r2 repetition_penalty": completion(repetition_penalty=0),
    "r2 min_p": completion(min_p=1.01),
    "r3 logit_bias": completion(logit_bias={str(VOCAB): 1}),
    "r3 logit_bias far": completion(logit_bias={"4294967301": 1}),
    "r3 logit_bias negative": completion(logit_bias={"-1": 1}),
    "r3 logit_bias word": completion(logit_bias={"the": 1}),
    "r3 logit_bias digits": completion(logit_bias={"٣": 1}),
    "r3 stop_token_ids": completion(stop_token_ids=[VOCAB]),
    "r3 stop_token_ids negative": completion(stop_token_ids=[-1]),
    "r3 prompt": completion(prompt=[5, VOCAB]),
    "r3 prompt negative": completion(prompt=[-1]),
    "r3 prompt 2**63": completion(prompt=[2**63]),
    "r3 prompt float": completion(prompt=[5, 6.5]),
    "r3 prompt bool": completion(prompt=[5, True]),
    "r3 allowed_token_ids": completion(allowed_token_ids=[VOCAB]),
    "r3 bad_words": completion(bad_words=["a " * 200]),
    "r3 logprob_token_ids": completion(logprob_token_ids=[VOCAB], logprobs=1),
    "r3 detokenize": ("/detokenize", {"tokens": [5, VOCAB]}),
    "r3 detokenize negative": ("/detokenize", {"tokens": [-1]}),
    "r5 schema": chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": nested(20)}}}),
    "r5 large schema": chat(structured_outputs={"json": {"enum": [f"value {i}" for i in range(20_000)]}}),
    "r5 product": chat(
        structured_outputs={"json": {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in "ab"]} for i in range(20)]}}
    ),
    "r5 choices": chat(structured_outputs={"choice": ["a"] * 10_001}),
    "r5 both": chat(structured_outputs={"regex": "a"}, response_format={"type": "json_object"}),
    "r5 regex": completion(guided_regex="(a+)+$"),
    "r5 structured": completion(structured_outputs={"regex": "(a|a)*(b"}),
    "r5 grammar": completion(guided_grammar="root ::= root"),
    "r5 choice": chat(guided_choice=["a"]),
    "r5 tool": chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": nested(20)}}}], tool_choice="required"),
    "r5 no tool": chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
    "r6 remote ref": chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1/"}}}),
    "r7 arrays": raw('{"prompt":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "r7 objects": raw('{"a":' * 100_000),
    "r7 open": raw("[" * 4_000_000),
    "r7 deep": completion(metadata=nested(100)),
    "r7 deep arguments": chat(
        messages=[
            *HELLO,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":' * 500 + "1" + "}" * 500}}],
            },
        ]
    ),
    "r8 template": chat(chat_template="{% for i in range(10**9) %}a{% endfor %}"),
    "r8 kwargs tokenizer": chat(chat_template_kwargs={"tokenize": True}),
    "r8 kwargs truncation": chat(chat_template_kwargs={"truncation": True, "max_length": 1}),
    "r8 kwargs dunder": chat(chat_template_kwargs={"__class__": 1}),
    "r8 kwargs global": chat(chat_template_kwargs={"range": 1}),
    "r8 kwargs many": chat(chat_template_kwargs={f"k{i}": 1 for i in range(100)}),
    "r8 kwargs large": chat(chat_template_kwargs={"a": "x" * 20_000}),
    "r8 kwargs list": chat(chat_template_kwargs=[1]),
    "r10 audio": chat(messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]}]),
    "r12 embeds": completion(prompt_embeds="gASVHAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOU"),
    "r12 logits processor": completion(custom_logit_processor="gASVHAAAAA"),
    "r17 salt": completion(cache_salt="x" * 1025),
    "r17 salt empty": completion(cache_salt=""),
    "r17 salt type": completion(cache_salt=[1]),
    "r18 id": completion(request_id="a b"),
    "r18 id long": completion(request_id="a" * 65),
    "r18 id html": completion(request_id="<script>"),
    "r21 transfer": completion(kv_transfer_params={"remote_host": "10.0.0.1"}),
    "r21 xargs": completion(vllm_xargs={"a": 1}),
    "r22 characters": completion(prompt="a" * (16 * MAX_LEN + 1)),
    "r22 tokens": completion(prompt=[5] * (16 * MAX_LEN + 1)),
    "r22 chat": chat(messages=[{"role": "user", "content": " " * 2_000_000}]),
    "r22 tokenize": ("/tokenize", {"prompt": "a" * 8_000_000}),
    "r23 surrogate": raw('{"prompt":"\\ud800"}'),
    "r23 surrogate of chat": raw('{"messages":[{"role":"user","content":"a\\udfffb"}]}', CHAT),
    "r23 surrogate in a key": raw('{"prompt":[5],"\\ud83d":1}'),
    "r23 surrogate in stop": raw('{"prompt":[5],"stop":"\\ude00"}'),
    "r23 not UTF-8": raw(b'{"prompt":"\xff\xfe"}'),
    "r23 UTF-8 of a surrogate": raw(b'{"prompt":"\xed\xa0\x80"}'),
    "r23 UTF-16": raw('{"prompt":[5]}'.encode("utf-16")),
    "body empty": raw(""),
    "body blank": raw("  \n"),
    "body null": raw("null"),
    "body array": raw('[{"prompt":[5]}]'),
    "body string": raw('"a"'),
    "body cut": raw('{"prompt":[5'),
    "body twice": raw('{"prompt":[5]}{"prompt":[5]}'),
    "body zeros": raw(bytes(1000)),
    "prompt missing": raw("{}"),
    "prompt null": completion(prompt=None),
    "prompt empty": completion(prompt=[]),
    "prompt number": completion(prompt=5),
    "prompt mixed": completion(prompt=["a", [5]]),
    "prompt in prompt": completion(prompt=[[[5]]]),
    "prompt object": completion(prompt={"a": 1}),
    "prompt of nothing": completion(prompt=""),
    "messages empty": chat(messages=[]),
    "messages text": chat(messages="hello"),
    "role unknown": chat(messages=[{"role": "root", "content": "a"}]),
    "role missing": chat(messages=[{"content": "a"}]),
    "content number": chat(messages=[{"role": "user", "content": 5}]),
    "stream text": completion(stream="yes"),
    "stream number": completion(stream=1),
    "max_tokens text": completion(max_tokens="2"),
    "max_tokens 0": completion(max_tokens=0),
    "max_tokens 1.5": completion(max_tokens=1.5),
    "temperature text": completion(temperature="hot"),
    "temperature bool": completion(temperature=True),
    "top_k -2": completion(top_k=-2),
    "stop empty": completion(stop=""),
    "stop number": completion(stop=5),
    "seed text": completion(seed="a"),
    "logprobs text": completion(logprobs="a"),
    "stream_options alone": completion(stream_options={"include_usage": True}),
    "top_logprobs alone": chat(top_logprobs=2),
    "context too long": completion(prompt=[5] * MAX_LEN),
    "answer too long": completion(max_tokens=MAX_LEN),
    "suffix": completion(suffix="a"),
}


def send(server: ServerProcess, path: str, body: Any) -> httpx.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return (
        server.get("/")
        if not path
        else httpx.post(server.url + path, content=data, headers={"content-type": "application/json"}, timeout=60)
    )


@pytest.mark.parametrize("name", REFUSED)
def test_bad_request_is_refused_at_once_and_cleanly(server: ServerProcess, name: str) -> None:
    path, body = REFUSED[name]
    began = time.monotonic()
    reply = send(server, path, body)
    assert reply.status_code == 400, reply.text[:300]
    assert time.monotonic() - began < 5
    error_of(reply)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"temperature": 3}, "temperature"), ({"top_p": "x"}, "top_p"), ({"stop": [1]}, "stop[0]"), ({"max_tokens": MAX_LEN}, "max_tokens")],
)
def test_error_names_the_parameter(server: ServerProcess, fields: dict[str, Any], param: str) -> None:
    assert error_of(send(server, *completion(**fields)))["param"] == param


def test_context_too_long_says_how_long_and_how_long_it_may_be(server: ServerProcess) -> None:
    error = error_of(send(server, *completion(prompt=[5] * 5000)))
    assert error["code"] == "context_length_exceeded"
    assert "5000" in error["message"]
    assert str(MAX_LEN) in error["message"]


@pytest.mark.parametrize("name", ["a" * 1_000_000, "\x00\n<script>", "../../etc/passwd", "http://127.0.0.1:1/x"])
def test_r9_r11_unknown_model_is_404_and_echoed_in_part(server: ServerProcess, name: str) -> None:
    reply = send(server, *completion(model=name))
    assert reply.status_code == 404
    assert error_of(reply)["param"] == "model"
    assert len(reply.content) < 2000


def test_r9_no_url_of_a_request_is_ever_fetched(server: ServerProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/"
        for kind in ("image_url", "video_url", "audio_url"):
            part = {"type": kind, kind: {"url": url}}
            assert send(server, *chat(messages=[{"role": "user", "content": [part]}])).status_code == 400
        send(server, *chat(model=url))
        with pytest.raises(BlockingIOError):
            trap.accept()


@pytest.mark.parametrize(
    "path",
    [
        "/sleep",
        "/wake_up",
        "/reset_prefix_cache",
        "/start_profile",
        "/collective_rpc",
        "/v1/load_lora_adapter",
        "/debug",
        "/shutdown",
        "/v1",
        "/v1/",
        "/v1/completions/",
        "//v1/models",
        "/health/",
        "/%2e%2e/etc/passwd",
        "/a" * 1000,
    ],
)
def test_r15_there_is_no_other_endpoint(server: ServerProcess, path: str) -> None:
    for method in ("GET", "POST"):
        reply = httpx.request(method, server.url + path, timeout=60)
        assert reply.status_code == 404
        assert error_of(reply)["code"] == "unknown_url"


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "application/json; charset=utf-16",
        "x" * 10_000,
    ],
)
def test_r16_bodies_other_than_json_get_415(server: ServerProcess, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    reply = httpx.post(server.url + COMPLETIONS, content=b'{"prompt":[5]}', headers=headers, timeout=60)
    assert reply.status_code == 415
    error_of(reply)


def test_r16_compressed_bodies_get_415_and_ranges_mean_nothing(server: ServerProcess) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert httpx.post(server.url + COMPLETIONS, content=b"\x1f\x8b", headers=headers, timeout=60).status_code == 415
    assert server.get("/metrics", headers={"range": "bytes=" + ",".join(f"{i}-" for i in range(1000))}).status_code == 200


def test_r17_prefixes_are_shared_only_within_a_salt(server: ServerProcess) -> None:
    prompt = [7 + i % 300 for i in range(140)]  # one page of 128 and some

    def cached(salt: str | None) -> int:
        return send(server, *completion(prompt=prompt, cache_salt=salt)).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached("a"), cached("a"), cached("b"), cached(None), cached("b"), cached(None)] == [0, 128, 0, 0, 128, 128]


def test_r18_requests_may_share_an_id(server: ServerProcess) -> None:
    replies: list[httpx.Response] = []
    path, body = completion(request_id="same", max_tokens=50, temperature=0, ignore_eos=True)
    threads = [threading.Thread(target=lambda: replies.append(send(server, path, body))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reply.status_code for reply in replies] == [200] * 8
    assert {reply.json()["id"] for reply in replies} == {"cmpl-same"}
    assert len({reply.json()["choices"][0]["text"] for reply in replies}) == 1


def test_r21_unknown_fields_change_nothing(server: ServerProcess) -> None:
    unknown = {
        "num_gpu_blocks": 10**12,
        "beam_width": 10**9,
        "adapter_file": "/etc/passwd",
        "__class__": {"a": []},
        "engine": "x",
        "pages": [1],
    }
    assert (
        send(server, *completion(temperature=0, **unknown)).json()["choices"] == send(server, *completion(temperature=0)).json()["choices"]
    )


@pytest.mark.parametrize(
    "text", ["{{ 7 * 7 }}", "{% for i in range(9**9) %}x{% endfor %}", "__import__('os').abort()", "{{ ''.__class__ }}"]
)
def test_r8_r24_text_of_a_message_is_text(server: ServerProcess, text: str) -> None:
    ids = server.post("/tokenize", {"messages": [{"role": "user", "content": text}]}).json()["tokens"]
    assert f"<user>{text}" in server.post("/detokenize", {"tokens": ids}).json()["prompt"]


def test_promise_1_health_stays_quick_while_hostile_requests_are_refused(server: ServerProcess) -> None:
    heavy = ["r7 open", "r7 arrays", "r22 tokenize", "r22 chat", "r2 long number"]
    bodies = [REFUSED[name] for name in heavy] + [
        completion(prompt=[[5] * 9000] * 64),
        raw("[" + "{}," * 2_500_000),
        raw('{"a":"' + "\\u0041" * 1_300_000),
    ]
    done = threading.Event()

    def attack(path: str, body: Any) -> None:
        while not done.is_set():
            assert send(server, path, body).status_code in (400, 413)

    threads = [threading.Thread(target=attack, args=pair) for pair in bodies]
    for thread in threads:
        thread.start()
    slowest = 0.0
    for _ in range(20):
        began = time.monotonic()
        assert server.get("/health").status_code == 200
        slowest = max(slowest, time.monotonic() - began)
    done.set()
    for thread in threads:
        thread.join()
    assert slowest < 3
