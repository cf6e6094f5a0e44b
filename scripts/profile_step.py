"""Where the time of a step goes: run requests under jax's profiler and add up the operations of the device.

1. Load a model, answer --rows requests of --input-len random tokens, unmeasured.
2. Answer them again under the profiler, --output-len tokens each.
3. Print, by operation and by shape where the program tells it, time per step and share; --trace DIR keeps the trace for a viewer.

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
import sys
import tempfile
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
from bench_offline import parse_option
from bench_serving import random_prompt

from jaxserve import LLM, SamplingParams

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
