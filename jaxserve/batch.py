"""`python -m jaxserve.batch -i in.jsonl -o out.jsonl --model M`: answer a file of requests in OpenAI's batch format, without a server.

1. The input is checked as a whole: every line is an object with a custom_id of its own, else nothing is run.
2. Lines whose ids are in the output already are skipped, so a run that was killed goes on where it was; half a last line is cut off.
3. The rest goes through the same app as a server's requests do, many at a time, and each answer is one line, written at once.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import fcntl
import logging
import os
import pathlib
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import orjson
from tqdm import tqdm

from jaxserve.api.app import create_app, operations
from jaxserve.api.json_door import is_object, parse_object
from jaxserve.command_line import config_of_args, make_parser
from jaxserve.config import EngineConfig
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.load import follow_leader
from jaxserve.engine.multihost import is_follower
from jaxserve.errors import ConfigError, EngineUnavailableError, UserError
from jaxserve.metrics import Metrics

log = logging.getLogger(__name__)

App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]
DEFAULT_CONCURRENCY = 256
_TAGS = ("generation", "pooling")
_MAX_PROBLEMS = 20
_LAST_STEP_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a request stands in the input, and under which id; its text is read when its turn comes."""

    custom_id: str
    offset: int


class BatchOutput:
    """The output file: one writer at a time, whole lines only.

    Raises: ConfigError if another process writes to it, or it holds what is no output of a batch.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - close() closes it
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which the kernel gives up when its holder dies
            self.done = self._read(path)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"another process is writing to {path}") from None
        except ConfigError:
            self._file.close()
            raise

    def write(self, line: dict[str, Any]) -> None:
        """Append one answer."""
        data = orjson.dumps(line) + b"\n"
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        """Make sure that it is on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _read(self, path: pathlib.Path) -> set[str]:
        """The ids that are answered; half a last line is cut off."""
        done: set[str] = set()
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                log.warning("%s: cutting off line %d, of which only half was written", path, number)
                break
            try:
                done.add(orjson.loads(line)["custom_id"])
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{path}, line {number} is not the output of a batch; choose another file with -o") from None
            end += len(line)
        self._file.truncate(end)
        return done


def read_input(path: pathlib.Path) -> list[Place]:
    """The requests of a file. Raises: ConfigError listing the lines that are none."""
    places: dict[str, Place] = {}
    problems: list[str] = []
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            problem = _check_line(line, places, offset) if line.strip() else None
            offset += len(line)
            if problem is not None:
                problems.append(f"{path}, line {number}: {problem}")
                if len(problems) == _MAX_PROBLEMS:
                    break
    if problems:
        raise ConfigError("\n".join(problems))
    return list(places.values())


def _check_line(line: bytes, places: dict[str, Place], offset: int) -> str | None:
    try:
        custom_id = parse_object(line).get("custom_id")
    except UserError as error:
        return error.message.replace("the body", "it")
    if not isinstance(custom_id, str) or not custom_id:
        return "custom_id must be a string that is not empty"
    if custom_id in places:
        return f"custom_id {custom_id!r:.80} stands in more than one line"
    places[custom_id] = Place(custom_id, offset)
    return None


class BatchRunner:
    """Answers requests as a server over this engine would."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._app: App = create_app(engine)
        self._urls = frozenset(one.path for one in operations(engine) if one.tag in _TAGS and one.body is not None)
        self._headers = [(b"content-type", b"application/json")]
        self._headers += [(b"authorization", b"Bearer " + key.encode()) for key in engine.config.api_keys[:1]]

    async def answer(self, line: bytes) -> dict[str, Any]:
        """The line of output for a line of input.

        Raises: EngineUnavailableError if the engine can answer nothing any more.
        """
        request = parse_object(line)
        shown: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": request["custom_id"], "response": None, "error": None}
        problem = self._problem(request)
        if problem is not None:
            return {**shown, "error": {"code": "invalid_request", "message": problem}}
        body = orjson.dumps(request["body"])
        while True:
            status, headers, answer = await self._call(request["url"], body)
            if status != 429:
                break
            await asyncio.sleep(float(headers.get(b"retry-after", b"1")))
        if status == 503 or self._engine.state.phase == "failed":
            raise EngineUnavailableError("the engine answers nothing any more")
        shown["response"] = {"status_code": status, "request_id": headers[b"x-request-id"].decode(), "body": orjson.loads(answer)}
        return shown

    def _problem(self, request: dict[str, Any]) -> str | None:
        url, body = request.get("url"), request.get("body")
        if request.get("method", "POST") != "POST":
            return "method must be POST"
        if url not in self._urls:
            return f"url is {url!r:.80}; it must be one of {', '.join(sorted(self._urls))}"
        if not is_object(body):
            return "body must be an object"
        if body.get("encoding_format") in ("bytes", "bytes_only"):
            return "body.encoding_format must be float or base64: an answer is a line of JSON"
        return "body.stream must not be true: an answer is one line" if body.get("stream") else None

    async def _call(self, path: str, body: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        """Status, headers and body of the app's answer to one POST."""
        requests: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
        status, headers, pieces = 0, dict[bytes, bytes](), list[bytes]()

        async def receive() -> dict[str, Any]:
            if requests:
                return requests.pop()
            return await asyncio.get_running_loop().create_future()  # nobody leaves; whoever waits for that is cancelled

        async def send(message: Any) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], dict(message["headers"])
            else:
                pieces.append(message.get("body", b""))

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
            "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": self._headers,
        }  # fmt: skip
        await self._app(scope, receive, send)
        return status, headers, b"".join(pieces)


async def run_batch(config: EngineConfig, source: pathlib.Path, target: pathlib.Path, *, concurrency: int) -> int:
    """Answer what `source` holds and `target` does not; the number of answers written.

    Raises: ConfigError; EngineUnavailableError if the engine fails, after which another run goes on.
    """
    places = read_input(source)
    output = BatchOutput(target)
    left = [place for place in places if place.custom_id not in output.done]
    engine = AsyncEngine(config)
    try:
        if left or config.parallel.is_multihost:  # the other processes wait to be let go
            engine.start()
            await engine.wait_ready()
        runner = BatchRunner(engine)
        with (
            open(source, "rb") as file,
            tqdm(total=len(places), initial=len(places) - len(left), desc="batch", unit="request", disable=None) as bar,
        ):

            async def work(places: Iterator[Place]) -> None:
                for place in places:
                    file.seek(place.offset)
                    output.write(await runner.answer(file.readline()))
                    bar.update()

            waiting = iter(left)
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(left))):
                    group.create_task(work(waiting))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    finally:
        output.close()
        engine.stop(timeout_s=_LAST_STEP_S)
    return len(left)


def parse_args(argv: list[str]) -> tuple[EngineConfig, argparse.Namespace]:
    """The configuration of a command line, and input, output and concurrency. Raises: ConfigError."""
    parser = make_parser("python -m jaxserve.batch", "Answer a file of requests in OpenAI's batch format.")
    parser.add_argument("-i", "--input", required=True, type=pathlib.Path, metavar="FILE", help="JSON lines: custom_id, method, url, body")
    parser.add_argument(
        "-o", "--output", required=True, type=pathlib.Path, metavar="FILE", help="answers are appended; known ids are skipped"
    )
    parser.add_argument(
        "--concurrency", type=int, default=DEFAULT_CONCURRENCY, metavar="INT",
        help=f"most requests under way at a time (default: {DEFAULT_CONCURRENCY})",
    )  # fmt: skip
    given = parser.parse_args(argv)
    own = argparse.Namespace(**{name: vars(given).pop(name) for name in ("input", "output", "concurrency")})
    if own.concurrency < 1:
        raise ConfigError("--concurrency must be at least 1")
    if not own.input.is_file():
        raise ConfigError(f"there is no file {own.input}")
    return config_of_args(vars(given)), own


def main() -> None:
    """Entry point of the command line."""
    try:
        config, own = parse_args(sys.argv[1:])
        logging.basicConfig(level=config.server.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        if is_follower(config.parallel):
            follow_leader(config, Metrics(config.served_names[0]))
            return
        count = asyncio.run(run_batch(config, own.input, own.output, concurrency=own.concurrency))
    except (ConfigError, EngineUnavailableError, OSError) as error:
        sys.exit(f"jaxserve: {error}")
    except KeyboardInterrupt:
        sys.exit("jaxserve: interrupted; the same command goes on")
    log.info("answered requests=%d output=%s", count, own.output)


if __name__ == "__main__":
    main()
