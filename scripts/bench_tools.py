"""Measure how many tool calls of a served model are syntactically right: the tasks of BFCL's files, asked of any OpenAI-compatible server.

scripts/bench_tools.py --base-url URL FILE [FILE ...]     files of the Berkeley Function Calling Leaderboard, one task a line

1. A task's functions become tools: BFCL's type names become JSON Schema's, dots in function names become underscores, as BFCL itself does.
2. Each task is asked once for every --tool-choice, --concurrency at a time.
3. A call is right if it names one of the tools and its arguments are JSON that the tool's schema takes. Whether it is also what the task
   wanted is the model's wit; of that, only the set of called functions is compared.
4. Print a table and one JSON line; append the line to --json FILE, and every answer to --answers FILE.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
from bench_serving import first_model
from load_client import Client, ProtocolError

TYPES = {"dict": "object", "float": "number", "tuple": "array", "hashmap": "object", "double": "number", "long": "integer"}
# BFCL says "any" where JSON Schema says nothing.
ANYTHING = ("any", "Any", "object or array")


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One question.

    Args:
      wanted: names of the functions that answer it; empty where none does, None if the file does not tell.
    """

    id: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    wanted: frozenset[str] | None


@dataclasses.dataclass(slots=True)
class Outcome:
    """What became of one task.

    Args:
      verdict: "right", "no call", or what is wrong with the first call that is not right.
      calls: names and arguments, as they came.
    """

    task: Task
    choice: str
    verdict: str = "no answer"
    calls: list[tuple[str, str]] = dataclasses.field(default_factory=list[tuple[str, str]])
    content: str | None = None
    finish_reason: str | None = None
    num_output: int = 0


def read_tasks(path: pathlib.Path, limit: int | None) -> list[Task]:
    """The first `limit` tasks of a file."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [_task(json.loads(line)) for line in lines[:limit]]


def _task(entry: dict[str, Any]) -> Task:
    tools = [{"type": "function", "function": _function(function)} for function in entry["function"]]
    truth = entry.get("ground_truth")
    wanted = frozenset(_name(name) for call in truth for name in call) if truth else None
    if entry["id"].startswith("irrelevance"):
        wanted = frozenset()
    return Task(entry["id"], entry["question"][0], tools, wanted)


def _name(name: str) -> str:
    return name.replace(".", "_")


def _function(function: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": _name(function["name"]), "description": function.get("description", ""), "parameters": json_schema(function["parameters"]),
    }  # fmt: skip


def json_schema(schema: Any) -> Any:
    """A schema in BFCL's words as JSON Schema."""
    if not isinstance(schema, dict):
        return schema
    changed = {name: value for name, value in schema.items() if name != "optional"}
    kind = schema.get("type")
    if kind in ANYTHING:
        del changed["type"]
    elif isinstance(kind, str):
        changed["type"] = TYPES.get(kind.lower(), kind.lower())
    if isinstance(schema.get("properties"), dict):
        changed["properties"] = {name: json_schema(inner) for name, inner in schema["properties"].items()}
    for name in ("items", "additionalProperties"):
        if name in schema:
            changed[name] = json_schema(schema[name])
    return changed


def judge(task: Task, calls: Sequence[tuple[str, str]]) -> str:
    """ "right", "no call", or what is wrong with the first call that is not right."""
    if not calls:
        return "no call"
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in task.tools}
    for name, arguments in calls:
        if name not in schemas:
            return "unknown name"
        try:
            parsed = json.loads(arguments)
        except ValueError:
            return "arguments are not JSON"
        if jsonschema.Draft202012Validator(schemas[name]).is_valid(parsed):
            continue
        return "arguments against the schema"
    return "right"


async def ask(client: Client, task: Task, choice: str, args: argparse.Namespace) -> Outcome:
    """The outcome of one task; failures are verdicts."""
    body: dict[str, Any] = {"model": args.model, "messages": task.messages, "tools": task.tools, "tool_choice": choice}
    body |= {"temperature": 0, "max_tokens": args.max_tokens}
    outcome, content = Outcome(task, choice), bytearray()
    try:
        async with asyncio.timeout(args.timeout_s):
            status = await client.send("POST", "/v1/chat/completions", json.dumps(body).encode(), content.extend)
    except TimeoutError:
        outcome.verdict = "timeout"
    except (OSError, ProtocolError) as error:
        outcome.verdict = f"connection: {error}"
    else:
        if status != 200:
            outcome.verdict, outcome.content = f"http {status}", content[:1000].decode(errors="replace")
        else:
            _read_answer(outcome, json.loads(content))
    return outcome


def _read_answer(outcome: Outcome, answer: dict[str, Any]) -> None:
    choice = answer["choices"][0]
    calls = [call["function"] for call in choice["message"].get("tool_calls") or ()]
    outcome.calls = [(call["name"], call["arguments"]) for call in calls]
    outcome.content, outcome.finish_reason = choice["message"].get("content"), choice["finish_reason"]
    outcome.num_output = answer["usage"]["completion_tokens"]
    outcome.verdict = judge(outcome.task, outcome.calls)
    if outcome.verdict != "right" and outcome.finish_reason == "length":
        outcome.verdict = "cut off by max_tokens"


async def ask_all(client: Client, tasks: Sequence[tuple[Task, str]], args: argparse.Namespace) -> list[Outcome]:
    """The outcomes of all tasks, in their order."""
    outcomes: dict[int, Outcome] = {}
    queue = iter(enumerate(tasks))

    async def worker(queue: Iterator[tuple[int, tuple[Task, str]]]) -> None:
        for index, (task, choice) in queue:
            outcomes[index] = await ask(client, task, choice, args)
            if args.answers is not None:
                _keep(args.answers, outcomes[index])
            print(f"\r{len(outcomes)} of {len(tasks)}", end="", file=sys.stderr, flush=True)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(args.concurrency, len(tasks))):
            group.create_task(worker(queue))
    print(file=sys.stderr)
    return [outcomes[index] for index in range(len(tasks))]


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts of a group of outcomes."""
    verdicts = collections.Counter(outcome.verdict for outcome in outcomes)
    told = [outcome for outcome in outcomes if outcome.task.wanted is not None]
    return {
        "tasks": len(outcomes),
        "with_calls": sum(bool(outcome.calls) for outcome in outcomes),
        "calls": sum(len(outcome.calls) for outcome in outcomes),
        "right": verdicts.pop("right", 0),
        "wrong": {name: count for name, count in verdicts.most_common() if name != "no call"},
        "names_as_wanted": sum({name for name, _ in outcome.calls} == outcome.task.wanted for outcome in told),
        "output_tokens": sum(outcome.num_output for outcome in outcomes),
    }


def format_table(groups: dict[str, dict[str, Any]]) -> str:
    """The figures for a reader at a terminal."""
    head = f"{'file and tool_choice':44}{'tasks':>7}{'calling':>9}{'right':>7}{'of these':>10}{'functions as wanted':>21}  wrong"
    lines = [head]
    for name, group in groups.items():
        share = f"{group['right'] / group['with_calls']:.1%}" if group["with_calls"] else "-"
        wrong = ", ".join(f"{count} {what}" for what, count in group["wrong"].items())
        lines.append(
            f"{name:44}{group['tasks']:>7}{group['with_calls']:>9}{group['right']:>7}{share:>10}{group['names_as_wanted']:>21}  {wrong}"
        )
    return "\n".join(lines)


def _keep(path: pathlib.Path, outcome: Outcome) -> None:
    entry = {
        "id": outcome.task.id, "tool_choice": outcome.choice, "verdict": outcome.verdict, "finish_reason": outcome.finish_reason,
        "calls": outcome.calls, "content": outcome.content,
    }  # fmt: skip
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Ask everything and print the table; returns the figures. Raises: SystemExit if the server cannot be reached."""
    client = Client(args.base_url, args.api_key)
    args.model = args.model or await first_model(client)
    files = {path.stem: read_tasks(path, args.limit) for path in args.files}
    # One after the other, so that the second finds the prompt in the server's prefix cache.
    asked = [(task, choice) for tasks in files.values() for task in tasks for choice in args.tool_choice]
    start_s = time.perf_counter()
    outcomes = await ask_all(client, asked, args)
    duration_s = time.perf_counter() - start_s
    client.close()
    figures: dict[str, dict[str, Any]] = {}
    for choice in args.tool_choice:
        own = {each.task.id: each for each in outcomes if each.choice == choice}
        figures |= {f"{name} {choice}": summarize([own[task.id] for task in tasks]) for name, tasks in files.items()}
        figures[f"all {choice}"] = summarize(list(own.values()))
    print(format_table(figures))
    head = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "url": args.base_url, "model": args.model, "concurrency": args.concurrency}
    return {**head, "max_tokens": args.max_tokens, "duration_s": round(duration_s, 1), "groups": figures}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Ask an OpenAI-compatible server the tasks of BFCL.", allow_abbrev=False)
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE", help="tasks, .jsonl")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="server; a trailing /v1 is allowed (default: %(default)s)")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument("--model", help="name to ask for (default: the first of /v1/models)")
    parser.add_argument("--tool-choice", nargs="+", choices=("auto", "required"), default=["auto", "required"], help="(default: both)")
    parser.add_argument("--limit", type=int, metavar="N", help="first so many tasks of each file")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of an answer (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="longest wait for one answer (default: %(default)s)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="append the JSON line")
    parser.add_argument("--answers", type=pathlib.Path, metavar="FILE", help="append every answer and its verdict, a JSON object a line")
    return parser.parse_args(argv)


def main() -> None:
    """Measure."""
    args = parse_args()
    line = json.dumps(asyncio.run(measure(args)), separators=(",", ":"))
    print(line)
    if args.json is not None:
        with open(args.json, "a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
