"""Find block sizes of ragged paged attention on the TPU or GPU at hand and keep them in pallas_kernels/tuned/<device>.json.

1. Per case of bench_kernels.py and kind of key that its call looks up ("decode", "mixed", "prefill"): time every candidate.
2. Keep the fastest, if it beats the heuristic by 2 %; sizes that do not compile or do not fit are passed over.
Later runs merge into the file; --dry-run prints only.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
from bench_kernels import CASES, Case, make_data, ours, time_call

from pallas_kernels import tuning

OP = "ragged_paged_attention"
Grid = dict[str, tuple[int, ...]]
CANDIDATES: dict[str, dict[str, tuple[Grid, ...]]] = {
    "tpu": {
        "decode": ({"block_tokens": (8, 16, 32, 64), "context": (128, 256, 512, 1024)},),
        "mixed": ({"block_tokens": (16, 32, 64, 128, 256), "context": (128, 256, 512, 1024)},),
    },
    "gpu": {
        "decode": ({"context": (32, 64, 128), "split": (256, 512, 1024), "warps": (2, 4, 8), "stages": (2, 3, 4)},),
        "prefill": (
            {"rows": (64, 128), "context": (32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4)},
            {"mosaic": (1,), "context": (64, 128), "stages": (2, 3, 4)},  # the kernel for Hopper; refused elsewhere
        ),
    },
}
_WORTH_KEEPING = 0.98


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Find block sizes on the device at hand.", allow_abbrev=False)
    parser.add_argument("--cases", default="", help="only cases whose names contain this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    args = parser.parse_args()
    kinds = CANDIDATES.get(jax.default_backend())
    if kinds is None:
        sys.exit(f"nothing to tune on {jax.default_backend()}: block sizes are of the TPU's and the GPU's kernels")
    found: dict[tuple[str, str], dict[str, int]] = {}
    for case in CASES:
        if args.cases in case.name:
            found |= tune(case, kinds, args.repeats)
    if not args.dry_run:
        write(found)


def tune(case: Case, kinds: dict[str, tuple[Grid, ...]], repeats: int) -> dict[tuple[str, str], dict[str, int]]:
    """(device, key) -> the best sizes, for the keys that the case's call looks up."""
    with sizes_are({}) as asked:
        before_s = measure(case, repeats)
    print(f"{case.name}: heuristic {1e3 * before_s:.3f} ms", flush=True)
    best: dict[tuple[str, str], dict[str, int]] = {}
    for device, key in dict.fromkeys(asked):
        fastest_s = before_s * _WORTH_KEEPING
        for sizes in itertools.chain.from_iterable(map(combinations, kinds.get(key.split()[0], ()))):
            with sizes_are({key: sizes}):
                seconds = measure_or_pass(case, repeats)
            if seconds is not None and seconds < fastest_s:
                fastest_s, best[device, key] = seconds, sizes
                print(f"  {key}: {sizes} {1e3 * seconds:.3f} ms", flush=True)
    return best


def combinations(grid: Grid) -> Iterator[dict[str, int]]:
    """Every choice of one value for each name."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def measure(case: Case, repeats: int) -> float:
    """Median seconds of a call with the sizes in force."""
    jax.clear_caches()
    return time_call(ours(case, make_data(case, None), {}, None), repeats)


def measure_or_pass(case: Case, repeats: int) -> float | None:
    """The same, or None for sizes that the kernel or the compiler refuses."""
    try:
        return measure(case, repeats)
    except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
        print(f"  passed over: {str(error).splitlines()[0][:100]}", flush=True)
        return None


@contextlib.contextmanager
def sizes_are(sizes: dict[str, dict[str, int]]) -> Iterator[list[tuple[str, str]]]:
    """Inside, kernels find these sizes by key, and none for other keys; yields the (device, key) pairs that they ask for."""
    asked: list[tuple[str, str]] = []

    def look_up(device: str, op: str, key: str) -> dict[str, int] | None:
        assert op == OP, f"{op=} is not tuned here"
        asked.append((device, key))
        return sizes.get(key)

    with mock.patch.object(tuning, "tuned", look_up):
        yield asked


def write(found: dict[tuple[str, str], dict[str, int]]) -> None:
    """Merge into the devices' files."""
    tuning.TUNED.mkdir(exist_ok=True)
    for device in {device for device, _ in found}:
        path = tuning.TUNED / f"{device}.json"
        table = json.loads(path.read_text()) if path.is_file() else {}
        table.setdefault(OP, {}).update({key: sizes for (its_device, key), sizes in found.items() if its_device == device})
        path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
