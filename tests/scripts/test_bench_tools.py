"""The BFCL driver: tasks in JSON Schema's words, the judgement of calls, and a whole run against a scripted server."""

from __future__ import annotations

import asyncio
import importlib
import json
import pathlib
import sys
from typing import Any

import pytest

from tests.scripts.test_bench_serving import Server

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
bench: Any = importlib.import_module("bench_tools")

AREA = {
    "name": "shape.area",
    "description": "Area of a shape",
    "parameters": {
        "type": "dict",
        "properties": {
            "side": {"type": "float", "optional": True},
            "corner": {"type": "tuple", "items": {"type": "integer"}},
            "extra": {"type": "any"},
        },
        "required": ["side"],
    },
}
ENTRIES = [
    {"id": "simple_0", "question": [[{"role": "user", "content": "area?"}]], "function": [AREA], "ground_truth": [{"shape.area": {}}]},
    {"id": "irrelevance_1", "question": [[{"role": "user", "content": "hello"}]], "function": [AREA], "ground_truth": None},
]


@pytest.fixture
def tasks(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, ENTRIES)) + "\n")
    return path


def test_tasks_are_put_into_the_words_of_json_schema(tasks: pathlib.Path) -> None:
    task, irrelevant = bench.read_tasks(tasks, None)
    function = task.tools[0]["function"]
    assert (function["name"], task.wanted, irrelevant.wanted) == ("shape_area", {"shape_area"}, frozenset())
    assert function["parameters"] == {
        "type": "object",
        "properties": {"side": {"type": "number"}, "corner": {"type": "array", "items": {"type": "integer"}}, "extra": {}},
        "required": ["side"],
    }
    assert len(bench.read_tasks(tasks, 1)) == 1


@pytest.mark.parametrize(
    ("calls", "verdict"),
    [
        ([], "no call"), ([("shape_area", '{"side": 2}')], "right"), ([("shape_area", '{"side": "2"}')], "arguments against the schema"),
        ([("shape_area", '{"side": 2')], "arguments are not JSON"), ([("shape.area", '{"side": 2}')], "unknown name"),
        ([("shape_area", '{"side": 2}'), ("shape_area", "{}")], "arguments against the schema"),
    ],
)  # fmt: skip
def test_calls_are_judged_by_name_and_schema(tasks: pathlib.Path, calls: list[tuple[str, str]], verdict: str) -> None:
    assert bench.judge(bench.read_tasks(tasks, 1)[0], calls) == verdict


def test_run_counts_what_came_back(tasks: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that calls rightly where it must, and otherwise only for the first task."""

    async def reply(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        calls = [{"function": {"name": "shape_area", "arguments": '{"side": 2}'}}]
        message = {"content": None, "tool_calls": calls} if body["tool_choice"] == "required" else {"content": "hi"}
        reason = "stop" if body["messages"][0]["content"] == "hello" else "length"
        data = json.dumps({"choices": [{"message": message, "finish_reason": reason}], "usage": {"completion_tokens": 3}}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))

    async def run() -> dict[str, Any]:
        server = Server(reply)
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        url, answers = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1", str(tmp_path / "answers.jsonl")
        try:
            return await asyncio.wait_for(bench.measure(bench.parse_args([str(tasks), "--base-url", url, "--answers", answers])), 20)
        finally:
            listener.close()
            await server.close()

    groups = asyncio.run(run())["groups"]
    required, auto = groups["all required"], groups["tasks auto"]
    assert (required["tasks"], required["with_calls"], required["right"], required["names_as_wanted"]) == (2, 2, 2, 1)
    assert (auto["with_calls"], auto["right"], auto["wrong"], auto["names_as_wanted"]) == (0, 0, {"cut off by max_tokens": 1}, 1)
    assert "tasks required" in capsys.readouterr().out
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 4
