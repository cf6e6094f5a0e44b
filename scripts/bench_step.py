"""Measure decode steps of a model of published sizes, with random weights: time over what reading its bytes takes at the rate of a copy.

1. Sizes come from a config.json (default: Llama-3.1-8B's); weights are made on the device, the tokenizer is the default model's.
2. Each number of rows, after one unmeasured run: --context random tokens each, --steps answered. A step's time is that of the engine as
   it serves, host and sampling included, without prompts; see bench_offline.py.
3. A step's bytes: every weight but the rows of the embedding that are not looked up, and the keys and values of the contexts.
4. Print a table and one JSON line a number of rows. --layers N makes the model as shallow, for slow devices.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
from bench_kernels import measure_ceilings
from bench_offline import load_engine, parse_counts, parse_option, time_point
from jax.sharding import SingleDeviceSharding

from jaxserve.config import DEFAULT_MODEL, make_config
from jaxserve.models.families import find_family
from jaxserve.models.hf_config import HfConfig
from jaxserve.runner.memory import num_bytes
from jaxserve.runner.programs import Programs, Target, platform_of

_LLAMA = pathlib.Path(__file__).parents[1] / "configs" / "models" / "llama-3.1-8b.json"
_DEPTHS = ("num_hidden_layers", "n_layers", "n_layer")  # what families call the number of layers


def main() -> None:
    """Run from the command line."""
    args = parse_args()
    values = json.loads(args.config.read_text())
    if args.layers is not None:
        values |= {name: args.layers for name in _DEPTHS if name in values}
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(values))
        args.model = folder
        args.option += [("load_format", "dummy"), ("tokenizer", args.tokenizer), ("decode_rows", tuple(args.rows))]
        generate, ready_s = load_engine(args)
    copy = measure_ceilings(args.scale, args.repeats, "float32")["copy"]
    device = jax.devices()[0].device_kind
    print(f"{args.config.stem} on {device}, jax {jax.__version__}: ready in {ready_s:.1f} s, copy {copy / 1e9:.0f} GB/s")
    print(f"{'rows':>5}{'context':>9}{'step ms':>10}{'GB':>8}{'GB/s':>9}{'of copy':>9}{'tokens/s':>10}")
    (context,), (steps,) = args.input_len, args.output_len
    for rows in args.rows:
        found = time_point(generate, args.vocab, rows, context, steps, args.repeats, args.seed)
        moved = step_bytes(values, dict(args.option), rows, context + steps // 2)
        rate = moved / (1e-3 * found["step_ms"])
        row = {
            "rows": rows,
            "context": context,
            "step_ms": found["step_ms"],
            "bytes": moved,
            "gb_per_s": rate / 1e9,
            "of_copy": rate / copy,
        }
        print(
            f"{rows:>5}{context:>9}{found['step_ms']:>10.3f}{moved / 1e9:>8.2f}{row['gb_per_s']:>9.1f}{row['of_copy']:>9.0%}"
            f"{found['decode_tokens_per_s']:>10.1f}"
        )
        print(json.dumps({"model": args.config.stem, "device": device, **row}), flush=True)


def step_bytes(values: dict[str, Any], options: dict[str, Any], rows: int, context: int) -> int:
    """What a decode step has to read: weights once, and keys and values of so many tokens in each row."""
    given = HfConfig(values)
    device = jax.devices()[0]
    target = Target(platform=platform_of(device), sharding=SingleDeviceSharding(device))
    programs = Programs(find_family(given).spec(given), make_config(options), target)
    looked_up = {"embed.weight"} if "head.weight" in programs.param_shapes else set[str]()
    weights = num_bytes(leaf for path, leaf in programs.param_shapes.items() if path not in looked_up)
    return weights + rows * context * programs.page_bytes() // programs.limits.page_size


def parse_args() -> argparse.Namespace:
    """The options, by the names that bench_offline.py has for them."""
    parser = argparse.ArgumentParser(description="Measure decode steps with random weights.", allow_abbrev=False)
    parser.add_argument("--config", type=pathlib.Path, default=_LLAMA, help="config.json of the model (default: Llama-3.1-8B's)")
    parser.add_argument("--layers", type=int, help="as many layers; default: the config's")
    parser.add_argument("--tokenizer", default=DEFAULT_MODEL, help="any, for which tokens are only numbers (default: %(default)s)")
    parser.add_argument("--rows", type=parse_counts, default=[1, 2, 4, 8], metavar="N,...", help="default: 1,2,4,8")
    parser.add_argument(
        "--context", dest="input_len", type=parse_counts, default=[4096], metavar="N", help="tokens of a row (default: 4096)"
    )
    parser.add_argument("--steps", dest="output_len", type=parse_counts, default=[128], metavar="N", help="default: 128")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs, of which the median counts (default: 3)")
    parser.add_argument("--vocab", type=int, default=49152, help="token ids are drawn below this (default: %(default)s)")
    parser.add_argument("--option", type=parse_option, action="append", default=[], metavar="NAME=VALUE", help="field of the configuration")
    parser.add_argument("--scale", type=int, default=1, help="divide the copied bytes by this, for slow devices")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    return parser.parse_args()


if __name__ == "__main__":
    main()
