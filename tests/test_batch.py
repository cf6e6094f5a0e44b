"""The batch runner: every line is answered exactly once, whatever happens on the way."""

from __future__ import annotations

import asyncio
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from jaxserve.batch import BatchOutput, parse_args, read_input, run_batch
from jaxserve.config import make_config
from jaxserve.errors import ConfigError
from tests.server.process import SHAPES, wait_until
from tests.tiny import tiny_model

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def line(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    shown = {"temperature": 0, "max_tokens": 5, "ignore_eos": True, **body}
    prompt = {"messages": [{"role": "user", "content": custom_id}]} if url == CHAT else {"prompt": custom_id}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**prompt, **shown}}


def write(path: pathlib.Path, lines: list[Any]) -> pathlib.Path:
    path.write_text("".join(text if isinstance(text, str) else json.dumps(text) + "\n" for text in lines))
    return path


def read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Answers by id; asserts that every line is whole and no id is answered twice."""
    text = path.read_text()
    assert text.endswith("\n") or not text
    answers = [json.loads(one) for one in text.splitlines()]
    found = {answer["custom_id"]: answer for answer in answers}
    assert len(found) == len(answers)
    return found


def run(source: pathlib.Path, target: pathlib.Path, *, concurrency: int = 8, **options: Any) -> int:
    shapes = {"max_rows": 4, "max_step_tokens": 32, "decode_rows": (4,), "prefill_tokens": (32,), "cache_bytes": 8 << 20}
    config = make_config({"model": str(tiny_model()), **shapes, **options})
    return asyncio.run(run_batch(config, source, target, concurrency=concurrency))


def test_each_line_has_its_answer_or_its_error(tmp_path: pathlib.Path) -> None:
    lines: list[Any] = [
        line("chat", CHAT), line("complete"), "\n", line("ids", prompt=[[5, 6], [7]]), line("hot", temperature=9),
        line("long", prompt="x " * 400), line("stream", stream=True), line("where", "/v1/nothing"), line("admin", "/pause"),
        {**line("how"), "method": "GET"},
        {"custom_id": "respond", "method": "POST", "url": "/v1/responses", "body": {"input": "hello", "max_output_tokens": 16}},
        {"custom_id": "bare", "url": COMPLETIONS}, line("other", model="another/model"), line("unicode-é😀"),
        line("bytes", encoding_format="bytes"),
    ]  # fmt: skip
    source = write(tmp_path / "in.jsonl", lines)
    assert run(source, tmp_path / "out.jsonl", api_key=("k",), max_queue=6) == 14
    answers = read(tmp_path / "out.jsonl")
    assert set(answers) == {one["custom_id"] for one in lines if isinstance(one, dict)}
    statuses = {name: one["response"]["status_code"] for name, one in answers.items() if one["response"]}
    assert statuses == {"chat": 200, "complete": 200, "ids": 200, "hot": 400, "long": 400, "other": 404, "unicode-é😀": 200, "respond": 200}
    assert answers["chat"]["response"]["body"]["object"] == "chat.completion"
    assert answers["respond"]["response"]["body"]["object"] == "response"
    assert len(answers["ids"]["response"]["body"]["choices"]) == 2
    assert answers["hot"]["response"]["body"]["error"]["param"] == "temperature"
    refused = {name: one["error"]["message"] for name, one in answers.items() if one["error"]}
    assert set(refused) == {"stream", "bytes", "where", "admin", "how", "bare"}
    assert COMPLETIONS in refused["where"]
    assert all(one["id"] and set(one) == {"id", "custom_id", "response", "error"} for one in answers.values())


def test_vectors_are_answered_too(tmp_path: pathlib.Path) -> None:
    body = {"input": ["the quick brown fox", "a city"]}
    lines = [{"custom_id": url, "method": "POST", "url": url, "body": body} for url in ("/v1/embeddings", COMPLETIONS)]
    run(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", runner="pooling")
    answers = read(tmp_path / "out.jsonl")
    assert len(answers["/v1/embeddings"]["response"]["body"]["data"]) == 2
    assert answers[COMPLETIONS]["response"]["status_code"] == 404


def test_killed_run_goes_on_and_answers_every_line_once(tmp_path: pathlib.Path) -> None:
    lines = [line(f"request {i}", max_tokens=100) for i in range(60)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = [
        sys.executable,
        "-m",
        "jaxserve.batch",
        "-i",
        str(source),
        "-o",
        str(target),
        "--concurrency",
        "4",
        "--model",
        str(tiny_model()),
    ]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([*command, *SHAPES], stdout=log, stderr=log)
    try:
        wait_until(lambda: process.poll() is not None or (target.exists() and target.read_bytes().count(b"\n") >= 5), "some answers")
    finally:
        process.kill()
        process.wait(30)
    before = target.read_bytes()
    num_before = before.count(b"\n")
    assert 5 <= num_before < 60, (tmp_path / "log").read_text()[-4000:]
    with open(target, "ab") as file:
        file.write(b'{"id":"batch_req_1","custom_id":"request 59","resp')
    assert run(source, target) == 60 - num_before
    answers = read(target)
    assert set(answers) == {one["custom_id"] for one in lines}
    assert target.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert {one["response"]["status_code"] for one in answers.values()} == {200}
    assert {one["response"]["body"]["usage"]["completion_tokens"] for one in answers.values()} == {100}
    assert run(source, target) == 0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{\n"], "line 1"),
        ([line("a"), "[]\n"], "line 2: it must be a JSON object"),
        ([{"url": COMPLETIONS}], "custom_id"),
        ([{"custom_id": 7}], "custom_id"),
        ([{"custom_id": ""}], "custom_id"),
        ([line("a"), line("b"), line("a")], "line 3: custom_id 'a' stands in more than one line"),
    ],
)
def test_input_that_cannot_be_told_apart_runs_nothing(tmp_path: pathlib.Path, lines: list[Any], message: str) -> None:
    source = write(tmp_path / "in.jsonl", lines)
    with pytest.raises(ConfigError, match=message.replace("[", "\\[")):
        read_input(source)
    with pytest.raises(ConfigError):
        run(source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_output_belongs_to_one_process_and_to_batches_only(tmp_path: pathlib.Path) -> None:
    first = BatchOutput(tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="another process"):
        BatchOutput(tmp_path / "out.jsonl")
    first.write({"custom_id": "a"})
    first.close()
    again = BatchOutput(tmp_path / "out.jsonl")
    assert again.done == {"a"}
    again.close()
    write(tmp_path / "notes.txt", ["dear diary\n", "x"])
    with pytest.raises(ConfigError, match="line 1 is not the output"):
        BatchOutput(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "dear diary\nx"


def test_command_line_has_every_option_of_the_engine(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "in.jsonl", [])
    config, own = parse_args(["-i", str(source), "-o", "out", "--concurrency", "3", "--model", "m", "--max-len", "64", "--no-prefix-cache"])
    assert (config.model.model, config.model.max_len, config.cache.prefix_cache) == ("m", 64, False)
    assert (own.input, own.output, own.concurrency) == (source, pathlib.Path("out"), 3)
    for wrong in (["--concurrency", "0"], ["-i", "/nowhere"]):
        with pytest.raises(ConfigError):
            parse_args(["-i", str(source), "-o", "out", *wrong])
