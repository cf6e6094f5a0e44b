"""Measure the engine without a server: prefill and decode tokens a second over row counts and lengths.

1. Load the model once, with room for the largest point of the sweep.
2. Each point, after one unmeasured run: greedy requests of random ids, all given at once, end of sequence ignored.
3. Prefill is the time for one token each; decode is the time for --output-len tokens each less that, over the tokens in between.
   So the few steps in which late prompts and early answers share a step count as decode.
4. Print a table and one JSON line a point.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import pathlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from bench_serving import random_prompt

from jaxserve import LLM, SamplingParams

Generate = Callable[[list[list[int]], int], list[list[int]]]


def time_point(generate: Generate, vocab: int, rows: int, input_len: int, output_len: int, repeats: int, seed: int) -> dict[str, Any]:
    """The figures of one point: medians over `repeats` pairs of a short and a long run.

    Args:
      generate: answers prompts with exactly so many tokens each.
    """
    rng = random.Random(f"{seed}/{rows}/{input_len}")
    prefill_s, decode_s = [], []
    for repeat in range(repeats + 1):
        short_s = time_run(generate, [random_prompt(rng, input_len, vocab) for _ in range(rows)], 1)
        whole_s = time_run(generate, [random_prompt(rng, input_len, vocab) for _ in range(rows)], output_len)
        if repeat:
            prefill_s.append(short_s)
            decode_s.append(whole_s - short_s)
    prefill, decode = statistics.median(prefill_s), statistics.median(decode_s)
    return {
        "rows": rows,
        "input_len": input_len,
        "output_len": output_len,
        "repeats": repeats,
        "prefill_s": round(prefill, 4),
        "prefill_tokens_per_s": round(rows * input_len / prefill, 1),
        "decode_s": round(decode, 4),
        "decode_tokens_per_s": round(rows * (output_len - 1) / decode, 1) if output_len > 1 else None,
        "step_ms": round(1e3 * decode / (output_len - 1), 3) if output_len > 1 else None,
        "output_tokens_per_s": round(rows * output_len / (prefill + decode), 1),
    }


def time_run(generate: Generate, prompts: list[list[int]], output_len: int) -> float:
    """Seconds to answer all prompts with output_len tokens each."""
    start_s = time.perf_counter()
    answers = generate(prompts, output_len)
    elapsed_s = time.perf_counter() - start_s
    lengths = [len(answer) for answer in answers]
    assert lengths == [output_len] * len(prompts), f"{lengths=} but {output_len=}"
    return elapsed_s


def load_engine(args: argparse.Namespace) -> tuple[Generate, float]:
    """The engine as a function, and the seconds it took to be ready."""
    sizes: dict[str, Any] = {"max_rows": max(args.rows), "max_len": max(args.input_len) + max(args.output_len), "prefix_cache": False}
    start_s = time.perf_counter()
    engine = LLM(args.model, **(sizes | dict(args.option)))
    ready_s = time.perf_counter() - start_s

    def generate(prompts: list[list[int]], output_len: int) -> list[list[int]]:
        results = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True), use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]

    return generate, ready_s


def parse_option(text: str) -> tuple[str, Any]:
    """A field of the engine's configuration and its value, from name=value."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=value")
    try:
        return name.replace("-", "_"), ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name.replace("-", "_"), {"true": True, "false": False}.get(value, value)


def parse_counts(text: str) -> list[int]:
    """Positive numbers separated by commas."""
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be positive numbers")
    return counts


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Measure prefill and decode without a server.", allow_abbrev=False)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="as for jaxserve.serve (default: %(default)s)")
    parser.add_argument("--rows", type=parse_counts, default=[1, 8, 32], metavar="N,...", help="requests at a time (default: 1,8,32)")
    parser.add_argument("--input-len", type=parse_counts, default=[128], metavar="N,...", help="prompt tokens (default: 128)")
    parser.add_argument("--output-len", type=parse_counts, default=[128], metavar="N,...", help="tokens to answer (default: 128)")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs a point, of which the median counts (default: 3)")
    parser.add_argument("--vocab", type=int, default=49152, help="token ids are drawn below this (default: %(default)s)")
    parser.add_argument("--option", type=parse_option, action="append", default=[], metavar="NAME=VALUE", help="field of the configuration")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="append the JSON lines")
    return parser.parse_args(argv)


def main() -> None:
    """Sweep and print."""
    args = parse_args()
    generate, ready_s = load_engine(args)
    print(f"{args.model} ready in {ready_s:.1f} s")
    columns = ("rows", "input_len", "output_len", "prefill_tokens_per_s", "decode_tokens_per_s", "step_ms", "output_tokens_per_s")
    print("  ".join(columns))
    lines: list[str] = []
    for rows, input_len, output_len in itertools.product(args.rows, args.input_len, args.output_len):
        figures = time_point(generate, args.vocab, rows, input_len, output_len, args.repeats, args.seed)
        print("  ".join(f"{'-' if figures[name] is None else figures[name]:>{len(name)}}" for name in columns), flush=True)
        lines.append(json.dumps({"model": args.model, "ready_s": round(ready_s, 1), "options": dict(args.option), **figures}))
    print("\n".join(lines))
    if args.json is not None:
        with open(args.json, "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)


if __name__ == "__main__":
    main()
