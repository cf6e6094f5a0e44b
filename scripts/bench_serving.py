"""Measure an OpenAI-compatible server under load: latencies, throughput and errors of streamed completions.

1. Make the workload: synthetic prompts of given lengths, or a dataset file of prompts or of lengths.
2. Warm up, then send: a fixed number at a time (--concurrency) or at random times (--request-rate, Poisson).
3. Time each answer event by event as its bytes arrive; the server's own usage counts the tokens.
4. Print a table and one JSON line; append the line to --json FILE, draw --plot FILE.

Needs the standard library only (and matplotlib for --plot), so that it measures any server from any environment.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import dataclasses
import gzip
import io
import itertools
import json
import pathlib
import random
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from load_client import Answer, Client, EventReader, ProtocolError
from load_report import draw_plot, format_table, import_pyplot, summarize

WORDS = ("the", "of", "and", "to", "in", "is", "it", "you", "that", "he", "was", "for", "on", "are", "with", "as")
TEXT_KEYS = ("prompt", "question", "query", "context", "text", "turns", "conversations")
INPUT_KEYS = ("input_len", "input_length", "contexttokens", "num_prefill_tokens", "request tokens", "prompt_tokens")
OUTPUT_KEYS = ("output_len", "output_length", "generatedtokens", "num_decode_tokens", "response tokens", "max_tokens")


@dataclasses.dataclass(frozen=True, slots=True)
class Query:
    """One request of the workload: text or token ids or chat messages, and how many tokens to ask for."""

    prompt: str | list[int] | list[dict[str, Any]]
    output_len: int


def random_prompt(rng: random.Random, length: int, vocab: int) -> list[int]:
    """Token ids drawn evenly from the ordinary part of a vocabulary: special tokens sit at its beginning."""
    low = min(1000, vocab // 4)
    return rng.choices(range(low, vocab), k=length)


def random_text(rng: random.Random, length: int) -> str:
    """About `length` tokens of common words, of which most tokenizers make one token each."""
    return " ".join(rng.choices(WORDS, k=length))


def arrival_offsets(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start at which a Poisson process of `rate` a second sends each request; the first at 0."""
    rng = random.Random(seed)
    return list(itertools.accumulate((rng.expovariate(rate) for _ in range(count - 1)), initial=0.0))


def read_dataset(path: pathlib.Path, args: argparse.Namespace) -> list[Query]:
    """The first --num-requests queries of a dataset file, in order.

    .csv: columns of lengths (Azure's, Vidur's or our own names). .jsonl: a prompt under one of TEXT_KEYS, messages, or lengths.
    .json: a list of the same, ShareGPT's conversations included, of which the first turn is asked. Any may end in .gz.
    Lengths are filled with synthetic prompts; an entry without an output length asks for --output-len.

    Raises: SystemExit naming the entries that hold neither a prompt nor lengths.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text, kind = content.decode(), pathlib.Path(path.name.removesuffix(".gz")).suffix
    if kind == ".csv":
        entries: list[Any] = list(csv.DictReader(io.StringIO(text)))
    else:
        entries = json.loads(text) if kind == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]
    chosen = enumerate(entries[: args.num_requests])
    queries = [_read_entry(entry, random.Random(f"{args.seed}/{index}"), args) for index, entry in chosen]
    if missing := [str(index + 1) for index, query in enumerate(queries) if query is None]:
        known = ", ".join(("messages", *TEXT_KEYS, *INPUT_KEYS))
        raise SystemExit(f"{path}: no prompt and no lengths in entry {', '.join(missing[:5])}; known keys: {known}")
    return [query for query in queries if query is not None]


def _read_entry(entry: Any, rng: random.Random, args: argparse.Namespace) -> Query | None:
    fields = {str(name).lower(): value for name, value in entry.items()}
    output_len = next((int(fields[key]) for key in OUTPUT_KEYS if fields.get(key)), args.output_len)
    if isinstance(fields.get("messages"), list):
        return Query(fields["messages"], output_len)
    for key in TEXT_KEYS:
        prompt = fields.get(key)
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            prompt = prompt[0].get("value") if isinstance(prompt[0], dict) else prompt[0]
        if prompt and isinstance(prompt, str | list):
            return Query(prompt, output_len)
    length = next((int(fields[key]) for key in INPUT_KEYS if fields.get(key)), 0)
    return Query(synthetic_prompt(rng, length, args), max(output_len, 1)) if length else None


def synthetic_prompt(rng: random.Random, length: int, args: argparse.Namespace) -> str | list[int]:
    """A random prompt of `length` tokens: ids, or text where the endpoint or the server takes no ids."""
    return random_prompt(rng, length, args.vocab) if args.prompts == "ids" else random_text(rng, length)


def make_queries(args: argparse.Namespace) -> list[Query]:
    """The queries to measure; a dataset shorter than --num-requests is gone through again."""
    if args.dataset is None:
        return synthetic_queries(args, args.num_requests, f"{args.seed}")
    if not (entries := read_dataset(args.dataset, args)):
        raise SystemExit(f"{args.dataset} is empty")
    return list(itertools.islice(itertools.cycle(entries), args.num_requests))


def synthetic_queries(args: argparse.Namespace, count: int, seed: str) -> list[Query]:
    """`count` queries of --input-len and --output-len."""
    rng = random.Random(seed)
    return [Query(synthetic_prompt(rng, args.input_len, args), args.output_len) for _ in range(count)]


def encode_query(query: Query, args: argparse.Namespace) -> bytes:
    """The JSON body of one request."""
    body: dict[str, Any] = {"model": args.model, "temperature": args.temperature, "max_tokens": query.output_len}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    is_messages = isinstance(query.prompt, list) and isinstance(query.prompt[0], dict)
    is_chat = args.endpoint == "chat"
    if isinstance(query.prompt, list) and is_messages != is_chat:
        raise SystemExit(f"--endpoint {args.endpoint} cannot take the dataset's {'messages' if is_messages else 'token ids'}")
    if is_chat:
        body["messages"] = query.prompt if is_messages else [{"role": "user", "content": query.prompt}]
    else:
        body["prompt"] = query.prompt
    if args.ignore_eos:
        body["ignore_eos"] = True
    return json.dumps(body | args.extra_body, separators=(",", ":")).encode()


async def ask(client: Client, path: str, body: bytes, answer: Answer, timeout_s: float) -> None:
    """Send one request and fill in its answer; failures become the answer's error."""
    reader = EventReader(answer)
    try:
        async with asyncio.timeout(timeout_s):
            status = await client.send("POST", path, body, reader.feed)
        reader.close()
        if status != 200:
            answer.error = f"http {status}"
        elif answer.error is None and not answer.finished:
            answer.error = "cut short"
    except TimeoutError:
        answer.error = "timeout"
    except ProtocolError as error:
        answer.error, answer.detail = "protocol", str(error)
    except (ConnectionRefusedError, socket.gaierror) as error:
        answer.error, answer.detail = "connect", str(error)
    except OSError as error:
        answer.error, answer.detail = "connection lost", str(error)
    answer.end_s = time.perf_counter()


async def run_load(client: Client, bodies: Sequence[bytes], args: argparse.Namespace, max_seconds: float) -> list[Answer]:
    """Send every body, at the rate or concurrency of `args`; stop after max_seconds, leaving some answers without an end."""
    path = "/v1/chat/completions" if args.endpoint == "chat" else "/v1/completions"
    answers: list[Answer] = []

    async def one(body: bytes, due_s: float) -> None:
        answer = Answer(due_s)
        answers.append(answer)
        await ask(client, path, body, answer, args.timeout_s)

    async def worker(queue: Iterator[bytes]) -> None:
        for body in queue:
            await one(body, time.perf_counter())

    async def feeder(group: asyncio.TaskGroup) -> None:
        start = time.perf_counter()
        for offset, body in zip(arrival_offsets(args.request_rate, len(bodies), args.seed), bodies, strict=True):
            await asyncio.sleep(max(0.0, start + offset - time.perf_counter()))
            group.create_task(one(body, start + offset))

    try:
        async with asyncio.timeout(max_seconds), asyncio.TaskGroup() as group:
            if args.request_rate is not None:
                group.create_task(feeder(group))
            else:
                queue = iter(bodies)
                for _ in range(min(args.concurrency, len(bodies))):
                    group.create_task(worker(queue))
    except TimeoutError:
        print(f"stopped after {max_seconds:g} s (--max-seconds)", file=sys.stderr)
    return answers


async def first_model(client: Client) -> str:
    """The first name that /v1/models lists.

    Raises: SystemExit if the server does not answer or lists none.
    """
    content = bytearray()
    try:
        status = await client.send("GET", "/v1/models", b"", content.extend)
    except (OSError, ProtocolError) as error:
        raise SystemExit(f"no answer from the server: {error}") from None
    if status != 200:
        raise SystemExit(f"/v1/models answered {status}: {content[:200].decode(errors='replace')}")
    return str(json.loads(content)["data"][0]["id"])


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the whole measurement and print it; returns the figures.

    Raises: SystemExit if the server cannot be reached or the warm-up fails altogether.
    """
    client = Client(args.base_url, args.api_key)
    deadline_s = time.perf_counter() + args.max_seconds
    args.model = args.model or await first_model(client)
    warmup = [encode_query(query, args) for query in synthetic_queries(args, args.warmup, f"warm-up {args.seed}")]
    bodies = [encode_query(query, args) for query in make_queries(args)]
    if warmup:
        tried = await run_load(client, warmup, _with_rate(args, None), args.max_seconds)
        if tried and all(answer.error for answer in tried):
            client.close()
            raise SystemExit(f"every warm-up request failed: {tried[0].error}: {tried[0].detail}")
    cpu_s, start_s = time.process_time(), time.perf_counter()
    answers = await run_load(client, bodies, args, max(deadline_s - start_s, 0.0))
    client_share = (time.process_time() - cpu_s) / (time.perf_counter() - start_s)
    client.close()
    load = {"request_rate": args.request_rate} if args.request_rate is not None else {"concurrency": args.concurrency}
    workload = {"dataset": args.dataset.name} if args.dataset else {"input_len": args.input_len, "output_len": args.output_len}
    figures = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "url": args.base_url,
        "model": args.model,
        "endpoint": args.endpoint,
        **load,
        **workload,
    }
    figures |= summarize(answers, len(bodies)) | {"client_cpu_share": round(client_share, 3)}
    print(format_table(figures))
    for kind in figures["errors"]:
        print(f"first {kind}: {next(answer.detail for answer in answers if answer.error == kind)}", file=sys.stderr)
    if args.plot is not None:
        draw_plot(args.plot, answers, f"{args.model}: {load | workload}")
    return figures


def _with_rate(args: argparse.Namespace, rate: float | None) -> argparse.Namespace:
    return argparse.Namespace(**(vars(args) | {"request_rate": rate}))


def _json_object(text: str) -> dict[str, Any]:
    found: Any = json.loads(text)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return found


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; defaults that depend on others are filled in."""
    parser = argparse.ArgumentParser(description="Load an OpenAI-compatible server and measure it.", allow_abbrev=False)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="server; a trailing /v1 is allowed (default: %(default)s)")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument("--model", help="name to ask for (default: the first of /v1/models)")
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="completions", help="(default: %(default)s)")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=_positive, default=8, metavar="N", help="requests at a time (default: %(default)s)")
    load.add_argument("--request-rate", type=float, metavar="PER_S", help="Poisson arrivals a second, however many are under way")
    parser.add_argument("--num-requests", type=_positive, default=64, metavar="N", help="requests to measure (default: %(default)s)")
    parser.add_argument("--warmup", type=int, metavar="N", help="unmeasured requests before (default: --concurrency, else 4)")
    parser.add_argument("--input-len", type=_positive, default=128, metavar="TOKENS", help="of each prompt (default: %(default)s)")
    parser.add_argument("--output-len", type=_positive, default=128, metavar="TOKENS", help="max_tokens (default: %(default)s)")
    parser.add_argument("--prompts", choices=("ids", "text"), help="synthetic prompts as (default: ids; text for chat)")
    parser.add_argument("--vocab", type=_positive, default=49152, metavar="N", help="token ids are drawn below this (default: %(default)s)")
    parser.add_argument("--dataset", type=pathlib.Path, metavar="FILE", help=".csv of lengths, .jsonl or .json of prompts, also .gz")
    parser.add_argument("--ignore-eos", action="store_true", help="send ignore_eos, so that answers reach --output-len")
    parser.add_argument("--temperature", type=float, default=0.0, help="(default: greedy)")
    parser.add_argument("--extra-body", type=_json_object, default={}, metavar="JSON", help="more fields for every request")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrival times (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="longest wait for one answer (default: %(default)s)")
    parser.add_argument("--max-seconds", type=float, default=1800.0, help="longest time in all, with warm-up (default: %(default)s)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="append the JSON line")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw latencies and timeline; needs matplotlib")
    args = parser.parse_args(argv)
    if args.request_rate is not None and args.request_rate <= 0:
        parser.error("--request-rate must be positive")
    if args.endpoint == "chat" and args.prompts == "ids":
        parser.error("--endpoint chat takes no token ids; use --prompts text")
    args.prompts = args.prompts or ("text" if args.endpoint == "chat" else "ids")
    if args.warmup is None:
        args.warmup = 4 if args.request_rate is not None else args.concurrency
    return args


def main() -> None:
    """Measure, and exit with status 1 if no request was answered whole."""
    args = parse_args()
    if args.plot is not None:
        import_pyplot()
    figures = asyncio.run(measure(args))
    line = json.dumps(figures, separators=(",", ":"))
    print(line)
    if args.json is not None:
        with open(args.json, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    sys.exit(0 if figures["completed"] else 1)


if __name__ == "__main__":
    main()
