"""Measure other engines that are installed beside this one, interleaved in one run on one machine, and print the ratios.

1. Each engine is a child process under its own interpreter (peer_drivers.py), loaded once and stopped while another is measured.
2. Per row count and repeat, every engine in turn: one token each (prefill), then --output-len tokens each; decode is the difference.
3. Medians over the repeats; the first repeat warms up and is not counted. Ratios are ours over theirs: above 1 we are faster.
4. A plain read of memory, measured in between, gives the fastest decode step that float32 weights allow.

Example:
  scripts/bench_peers.py --hf-dir smollm2-hf --peer vllm=venvs/vllm/bin/python --openvino-dir smollm2-ov --peer openvino=venvs/ov/bin/python
--openvino-dir is what `optimum-cli export openvino --task text-generation-with-past --weight-format fp32` makes of --hf-dir.
--gguf, for llama.cpp, is what its `convert_hf_to_gguf.py --outtype f32` makes of --hf-dir.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy
from peer_drivers import PACKAGES, Setup

NAMES = (*PACKAGES, "llama.cpp")
READ_BYTES = 512 << 20


class PeerError(RuntimeError):
    """An engine could not be loaded or measured."""


class Peer:
    """One engine in a child process, stopped (SIGSTOP) whenever it is not being measured."""

    def __init__(self, name: str, interpreter: str, setup: Setup) -> None:
        self.name = name
        self.version = ""
        self.ready_s = 0.0
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        script = pathlib.Path(__file__).with_name("peer_drivers.py")
        limits = {"OMP_NUM_THREADS": str(setup.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [interpreter, str(script), name, json.dumps(dataclasses.asdict(setup))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | limits,
            start_new_session=True,
        )

    def load(self, timeout_s: float) -> None:
        """Wait until the engine is ready, then stop it."""
        hello = self._read(timeout_s)
        self.version, self.ready_s = hello["version"], hello["ready_s"]
        self._signal(signal.SIGSTOP)

    def run(self, point: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The driver's answer to one point.

        Raises: PeerError with the end of the engine's output if it fails or takes longer than timeout_s.
        """
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(point).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._read(timeout_s)
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End the process and all it started."""
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            self._log.seek(0)
            tail = self._log.read().decode(errors="replace")[-2000:]
            raise PeerError(f"{self.name}: {'failed' if ready else f'nothing within {timeout_s:g} s'}; the end of its output:\n{tail}")
        return json.loads(line)


def read_bandwidth(threads: int) -> float:
    """Bytes a second that a plain read of READ_BYTES reaches with so many threads: the best of five."""
    parts = [numpy.ones(READ_BYTES // 8 // threads) for _ in range(threads)]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        best_s = float("inf")
        for _ in range(5):
            start_s = time.perf_counter()
            list(pool.map(numpy.max, parts))
            best_s = min(best_s, time.perf_counter() - start_s)
    return READ_BYTES / best_s


def find_peers(args: argparse.Namespace) -> dict[str, str]:
    """Name -> interpreter or binary: those of --peer, and those that this environment holds."""
    modules = {"jaxserve": "jax", "vllm": "vllm", "transformers": "torch", "openvino": "openvino_genai"}
    found = {name: sys.executable for name, module in modules.items() if importlib.util.find_spec(module)}
    if binary := shutil.which("llama-batched-bench"):
        found["llama.cpp"] = binary
    found |= dict(args.peer)
    needs = {"openvino": args.openvino_dir, "llama.cpp": args.gguf}
    for name, given in needs.items():
        if name in found and not given:
            print(f"{name} is installed but left out: it needs {'--openvino-dir' if name == 'openvino' else '--gguf'}")
            del found[name]
    return {name: found[name] for name in NAMES if name in found and name not in args.skip}


def start_peers(args: argparse.Namespace, peers: list[Peer]) -> None:
    """Fill `peers` with the engines that load, one after another; the others are reported and left out."""
    for name, path in find_peers(args).items():
        setup = Setup(
            model=args.model or args.hf_dir,
            hf_dir=args.hf_dir,
            openvino_dir=args.openvino_dir,
            gguf=args.gguf,
            binary=path,
            threads=args.threads,
            vocab=args.vocab,
            max_rows=max(args.rows),
            max_len=args.input_len + args.output_len,
        )
        peer = Peer(name, sys.executable if name == "llama.cpp" else path, setup)
        peers.append(peer)
        try:
            peer.load(args.timeout_s)
        except PeerError as error:
            print(error, file=sys.stderr)
            peers.remove(peer)
            peer.close()
            continue
        print(f"{name} {peer.version} ready in {peer.ready_s} s", flush=True)


def measure_rows(peers: list[Peer], rows: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of every engine at one row count; an engine that fails is reported and removed from `peers`."""
    times: dict[str, list[tuple[float, float]]] = {peer.name: [] for peer in peers}
    answers: dict[str, list[int]] = {}
    for repeat in range(args.repeats + 1):
        for peer in list(peers):
            point = {"rows": rows, "input_len": args.input_len, "seed": f"{args.seed}/{rows}/{repeat}"}
            try:
                short = peer.run(point | {"output_len": 1, "seed": point["seed"] + "/short"}, args.timeout_s)
                whole = peer.run(point | {"output_len": args.output_len}, args.timeout_s)
            except PeerError as error:
                print(error, file=sys.stderr)
                peers.remove(peer)
                peer.close()
                continue
            answers[peer.name] = whole["answers"]
            times[peer.name].append((short["elapsed_s"], whole["elapsed_s"] - short["elapsed_s"]))
    figures = [_summarize(peer, rows, times[peer.name][1:], args) for peer in peers]
    for entry in figures:
        same = [ours == theirs for ours, theirs in zip(answers[peers[0].name], answers[entry["engine"]], strict=False)]
        entry["rows_equal_to_first"] = sum(same) if same else None
        for kind in ("prefill", "decode"):
            entry[f"{kind}_ratio"] = round(figures[0][f"{kind}_tokens_per_s"] / entry[f"{kind}_tokens_per_s"], 3)
    return figures


def _summarize(peer: Peer, rows: int, pairs: Sequence[tuple[float, float]], args: argparse.Namespace) -> dict[str, Any]:
    prefill_s, decode_s = (statistics.median(pair[index] for pair in pairs) for index in (0, 1))
    spread = [(max(values) - min(values)) / statistics.median(values) for values in zip(*pairs, strict=True)]
    return {
        "engine": peer.name,
        "version": peer.version,
        "rows": rows,
        "prefill_tokens_per_s": round(rows * args.input_len / prefill_s, 1),
        "decode_tokens_per_s": round(rows * (args.output_len - 1) / decode_s, 1),
        "step_ms": round(1e3 * decode_s / (args.output_len - 1), 2),
        "spread": round(max(spread), 3),
    }


def format_rows(figures: Sequence[dict[str, Any]], limit_ms: float) -> str:
    """One block of the table; `limit_ms` is what reading the weights once takes."""
    lines: list[str] = []
    for entry in figures:
        same = "-" if entry["rows_equal_to_first"] is None else f"{entry['rows_equal_to_first']}/{entry['rows']}"
        share = f"{limit_ms / entry['step_ms']:.0%}"
        cells = (entry["rows"], entry["prefill_tokens_per_s"], entry["prefill_ratio"], entry["decode_tokens_per_s"], entry["decode_ratio"])
        cells = (*cells, entry["step_ms"], share, f"{entry['spread']:.0%}", same)
        lines.append(f"{entry['engine']:14}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def parse_peer(text: str) -> tuple[str, str]:
    """NAME=PATH, the path made absolute but not resolved: a virtual environment's python is a link."""
    name, _, path = text.partition("=")
    if name not in NAMES or not os.access(path, os.X_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH with NAME in {', '.join(NAMES)} and PATH executable")
    return name, str(pathlib.Path(path).absolute())


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Measure installed peers side by side.", allow_abbrev=False)
    parser.add_argument("--hf-dir", required=True, metavar="DIR", help="safetensors, config and tokenizer of the model")
    parser.add_argument("--model", help="what jaxserve loads (default: --hf-dir)")
    parser.add_argument("--openvino-dir", default="", metavar="DIR", help="the model as OpenVINO IR, float32")
    parser.add_argument("--gguf", default="", metavar="FILE", help="the model as F32 GGUF, for llama.cpp")
    parser.add_argument(
        "--peer", type=parse_peer, action="append", default=[], metavar="NAME=PATH", help="interpreter (llama.cpp: llama-batched-bench)"
    )
    parser.add_argument("--skip", action="append", default=[], choices=NAMES, help="engine to leave out")
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32], metavar="N,...")
    parser.add_argument("--input-len", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--output-len", type=int, default=128, metavar="TOKENS", help="at least 2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPUs that each engine may use")
    parser.add_argument("--vocab", type=int, default=49152, help="token ids are drawn below this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-s", type=float, default=600.0, help="longest wait for an engine to load or answer")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="append the JSON lines")
    return parser.parse_args(argv)


def weight_bytes(hf_dir: str) -> int:
    """Bytes of the model's tensors in float32; with tied embeddings that is what a decode step reads."""
    total = 0
    for path in pathlib.Path(hf_dir).glob("*.safetensors"):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(4 * math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def main() -> None:
    """Load, measure, print; exit with status 1 if an engine that was asked for failed."""
    args = parse_args()
    if not weight_bytes(args.hf_dir):
        raise SystemExit(f"--hf-dir {args.hf_dir} holds no .safetensors file")
    wanted = len(find_peers(args))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    peers: list[Peer] = []
    lines: list[str] = []
    header = ("rows", "prefill/s", "ratio", "decode/s", "ratio", "step ms", "of limit", "spread", "same rows")
    try:
        start_peers(args, peers)
        for rows in args.rows:
            bandwidth = read_bandwidth(args.threads)
            figures = measure_rows(peers, rows, args)
            print(f"\nreading memory: {bandwidth / 1e9:.1f} GB/s; load average {os.getloadavg()[0]:.1f}")
            print(f"{'':14}" + "".join(f"{name:>11}" for name in header))
            print(format_rows(figures, 1e3 * weight_bytes(args.hf_dir) / bandwidth), flush=True)
            common = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "input_len": args.input_len, "output_len": args.output_len}
            common |= {"threads": args.threads, "read_bytes_per_s": round(bandwidth), "load_average": os.getloadavg()[0]}
            lines += [json.dumps(common | entry) for entry in figures]
    finally:
        for peer in peers:
            peer.close()
    print("\n".join(["", *lines]))
    if args.json is not None:
        with open(args.json, "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
    sys.exit(0 if len(peers) == wanted else 1)


if __name__ == "__main__":
    main()
