"""Where the time of a step goes: run requests under jax's profiler and add up the operations of the device.

1. Load a model, answer --rows requests of --input-len random tokens, unmeasured.
2. Answer them again under the profiler, --output-len tokens each.
3. Print, by operation and by shape where the program tells it, time per step and share; --trace DIR keeps the trace for a viewer.
4. Print the time of a decode step, and what sampling alone takes of it with every feature off.

Operations of a CPU nest (a while loop holds what runs in it), and threads run side by side: shares may add up to more than 1.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import pathlib
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
from bench_offline import parse_option
from bench_serving import random_prompt

from jaxserve import LLM, SamplingParams
from jaxserve.runner.sampling import SamplingRows, sample, slot_state_shapes

_HOST = ("$", "end:", "Thunk", "Pjit", "PjRt", "Common", "Parse", "Handle", "DevicePut", "H2D", "D2H", "Threadpool", "TfrtCpu")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Where the time of a step goes.", allow_abbrev=False)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="as for jaxserve.serve (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--top", type=int, default=30, help="operations to show")
    parser.add_argument("--trace", type=pathlib.Path, help="keep the trace in this directory")
    parser.add_argument("--option", type=parse_option, action="append", default=[], metavar="NAME=VALUE", help="field of the configuration")
    args = parser.parse_args()
    options = {"max_rows": args.rows, "max_len": args.input_len + args.output_len, "prefix_cache": False, **dict(args.option)}
    engine = LLM(args.model, **options)
    rng = random.Random(0)
    prompts = [random_prompt(rng, args.input_len, engine.tokenizer.vocab_size) for _ in range(args.rows)]
    params = SamplingParams(temperature=0.0, max_tokens=args.output_len, ignore_eos=True)
    engine.generate(prompts, params, use_tqdm=False)
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.trace or pathlib.Path(scratch)
        with jax.profiler.trace(str(directory)):
            engine.generate(prompts, params, use_tqdm=False)
        report(list(read_events(directory)), args.top, args.output_len)
    short = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    spent = [1e3 * _seconds(lambda one=one: engine.generate(prompts, one, use_tqdm=False)) for one in (short, params)]
    step = (spent[1] - spent[0]) / max(args.output_len - 1, 1)
    times = {name: sampling_ms(args.rows, engine.tokenizer.vocab_size, heat) for name, heat in (("greedy", 0.0), ("random", 1.0))}
    shares = ", ".join(f"{name} {milliseconds:.3f} ms ({milliseconds / step:.1%})" for name, milliseconds in times.items())
    print(f"decode step {step:.2f} ms; sampling alone, all features off: {shares}")


def sampling_ms(num_rows: int, vocab_size: int, temperature: float, repeats: int = 50) -> float:
    """Median milliseconds of sampling `num_rows` tokens with every feature off."""
    whole = {"slot": jnp.arange(num_rows), "seed": jnp.arange(num_rows, dtype=jnp.uint32), "position": jnp.full(num_rows, 7)}
    off = {"wants": 0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
    rows = SamplingRows(**whole, **{name: jnp.full(num_rows, value) for name, value in {**off, "temperature": temperature}.items()})
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), slot_state_shapes(num_rows, vocab_size))
    logits = jax.random.normal(jax.random.key(0), (num_rows, vocab_size))
    run = jax.jit(sample, donate_argnums=2)
    times: list[float] = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        tokens, _, state = run(logits, rows, state)
        tokens.block_until_ready()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[1:])


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def read_events(directory: pathlib.Path) -> Iterator[tuple[str, float]]:
    """(operation, milliseconds) of the newest trace in a directory; the host's own calls left out."""
    newest = max(directory.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(newest) as file:
        events = json.load(file)["traceEvents"]
    for event in events:
        name = event.get("name", "")
        if event.get("ph") == "X" and not name.startswith(_HOST) and "::" not in name:
            shape = event.get("args", {}).get("shape_with_layout", "")
            yield f"{re.sub(r'[.][0-9.]+$', '', name)} {shape}".strip(), event["dur"] / 1e3


def report(events: list[tuple[str, float]], top: int, steps: int) -> None:
    """The table: milliseconds a step, calls a step, share of all."""
    total: dict[str, float] = collections.defaultdict(float)
    times = collections.Counter[str]()
    for name, milliseconds in events:
        total[name] += milliseconds
        times[name] += 1
    everything = sum(total.values())
    print(f"{'ms/step':>9}{'calls/step':>12}{'share':>8}  operation")
    for name, milliseconds in sorted(total.items(), key=lambda item: -item[1])[:top]:
        print(f"{milliseconds / steps:>9.3f}{times[name] / steps:>12.1f}{milliseconds / everything:>8.1%}  {name[:100]}")


if __name__ == "__main__":
    main()
