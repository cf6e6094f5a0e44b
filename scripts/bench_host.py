"""What the host costs: the whole engine, and the HTTP server on it, with the device's step replaced by one that is done at once.

scripts/bench_host.py                       engine time per step at 256 running rows, and where it goes
scripts/bench_host.py --serve --port 8000   the server on that engine; measure it with scripts/bench_serving.py
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import itertools
import pathlib
import pstats
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import uvicorn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from jaxserve.api.app import create_app
from jaxserve.config import EngineConfig, make_config
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.engine import Engine
from jaxserve.engine.load import ServedModel
from jaxserve.metrics import Metrics
from jaxserve.request import Request, SamplingParams
from jaxserve.runner.pack import Layout, Packer
from jaxserve.runner.runner import Pending, StepResult
from jaxserve.runner.shapes import StepShape
from jaxserve.scheduler.schedule import Schedule
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.grammar import Grammars
from jaxserve.text.tokenizer import load_tokenizer
from jaxserve.weights.source import resolve_model

MAX_LEN, PAGE_SIZE, VOCAB = 2048, 16, 49_152


class InstantRunner:
    """A runner whose steps take no time: packs as the real one does, then samples running numbers."""

    def __init__(self, max_rows: int) -> None:
        self._packer = Packer(max_rows=max_rows, num_pages=MAX_LEN // PAGE_SIZE)
        self._max_rows = max_rows
        self._tokens = itertools.count(1000)
        self.usable = True

    def dispatch(self, schedule: Schedule) -> Pending:
        """Pack the schedule for a decode or prefill shape that fits."""
        decodes = schedule.num_tokens == len(schedule.rows)
        shape = StepShape("decode", self._max_rows, self._max_rows) if decodes else StepShape("prefill", 4096, self._max_rows)
        for row in schedule.rows:
            self._packer.assign(row.request)
        self._packer.pack(schedule, Layout(shape, MAX_LEN // PAGE_SIZE, self._max_rows))
        return Pending(schedule=schedule, shape=shape, outputs=None, started_s=time.monotonic())  # type: ignore[arg-type]

    def collect(self, pending: Pending) -> StepResult:
        """One token for each row that samples."""
        tokens = [(next(self._tokens) % VOCAB,) if row.samples else () for row in pending.schedule.rows]
        nothing = [None] * len(tokens)
        return StepResult(tokens=tokens, logprobs=list(nothing), prompt_logprobs=list(nothing))


def load_instant(config: EngineConfig, metrics: Metrics, on_state: Callable[[str], None]) -> tuple[Engine, ServedModel]:
    """An engine over an InstantRunner, with the default model's tokenizer."""
    on_state("loading")
    path: pathlib.Path = resolve_model(config.model.model, revision=None, cache_dir=config.cache_path)
    tokenizer = load_tokenizer(path)
    max_rows = config.schedule.max_rows or 256
    scheduler = Scheduler(
        num_pages=1 + max_rows * MAX_LEN // PAGE_SIZE, page_size=PAGE_SIZE, max_rows=max_rows, max_step_tokens=4096, max_mixed_tokens=4096,
        max_len=MAX_LEN, prefix_cache=True, max_queue=4096, max_queue_tokens=10**9,
    )  # fmt: skip
    engine = Engine(InstantRunner(max_rows), scheduler, tokenizer, metrics, eos_ids=frozenset(), overlap=True)  # type: ignore[arg-type]
    chat = ChatTemplate(tokenizer.chat_template, tokenizer)
    grammars = Grammars(tokenizer, vocab_size=VOCAB, eos_ids=frozenset())
    return engine, ServedModel(tokenizer=tokenizer, chat=chat, max_len=MAX_LEN, vocab_size=VOCAB, eos_ids=frozenset(), grammars=grammars)


def measure_steps(rows: int, steps: int) -> None:
    """Print milliseconds of engine time per decode step, then the same under a profiler."""
    engine, _ = load_instant(make_config({"max_rows": rows}), Metrics("bench"), lambda _: None)
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=MAX_LEN - 200, ignore_eos=True)
    for i in range(rows):
        engine.add(Request(id=str(i), prompt_ids=rng.integers(0, VOCAB, 100).tolist(), params=params, arrival_s=time.monotonic()))
    while engine.waiting[0]:
        engine.step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        times.append((time.perf_counter() - start) * 1000)
    p50, p99 = statistics.median(times), sorted(times)[int(len(times) * 0.99)]
    print(f"rows={rows} steps={steps} step_ms_p50={p50:.3f} step_ms_p99={p99:.3f} tokens_per_s={rows / p50 * 1000:.0f}")
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(steps // 4):
        engine.step()
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(14)


def serve(port: int, rows: int) -> None:
    """The HTTP server over an InstantRunner, until interrupted."""

    async def run() -> None:
        config = make_config({"port": port, "host": "127.0.0.1", "max_rows": rows})
        engine = AsyncEngine(config, load=load_instant)
        engine.start()
        await uvicorn.Server(uvicorn.Config(create_app(engine), host="127.0.0.1", port=port, log_level="warning", lifespan="off")).serve()
        engine.stop(timeout_s=5)

    asyncio.run(run())


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="running rows")
    parser.add_argument("--steps", type=int, default=800, help="steps to time")
    parser.add_argument("--serve", action="store_true", help="serve over HTTP instead")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.port, arguments.rows)
    else:
        measure_steps(arguments.rows, arguments.steps)


if __name__ == "__main__":
    main()
