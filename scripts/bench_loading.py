"""Measures loading: bytes a second beside plain reading of the same files, and the host's memory beside what the parameters take.

1. Write a checkpoint of random weights, --megabytes of them, in --dtype; or take --model.
2. Read its files once: from then on they lie in the system's cache, unless memory is too small.
3. Read them plainly into memory and load the model in turn, --repeats times; of each the best counts.
4. Load in a process of its own, and see how far its memory rises above what it had before and what the parameters take.
5. Print one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from jaxserve.models.decoder import Decoder
from jaxserve.models.families import find_family
from jaxserve.models.params import Params, split_model
from jaxserve.models.spec import fold_layers
from jaxserve.weights.checkpoint import open_checkpoint, read_config
from jaxserve.weights.load import READERS, load_params

_MLP_RATIO = 3


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Measure loading of weights beside plain reading of their files.", allow_abbrev=False)
    parser.add_argument("--model", type=pathlib.Path, help="directory of safetensors, or a .gguf file; default: random weights")
    parser.add_argument("--megabytes", type=int, default=1000, help="of random weights")
    parser.add_argument("--dtype", default="float32", help="of the random weights, and of the parameters")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", type=pathlib.Path, help=argparse.SUPPRESS)  # the process of step 4
    args = parser.parse_args()
    if args.memory_of is not None:
        print(json.dumps(measure_memory(args.memory_of, args.dtype)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        path = args.model or write_model(pathlib.Path(scratch), args.megabytes << 20, args.dtype)
        print(json.dumps(compare(path, args.dtype, args.repeats) | memory_of(path, args.dtype)))


def write_model(directory: pathlib.Path, num_bytes: int, dtype: str) -> pathlib.Path:
    """A Llama of eight layers and about so many bytes."""
    num_layers, itemsize = 8, jnp.dtype(dtype).itemsize
    width = int((num_bytes / itemsize / num_layers / (4 + 3 * _MLP_RATIO)) ** 0.5) // 64 * 64
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": width, "intermediate_size": _MLP_RATIO * width, "num_attention_heads": 8,
        "num_hidden_layers": num_layers, "vocab_size": 512, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (512, width), "model.norm.weight": (width,)}
    for i in range(num_layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        shapes |= {f"{at}mlp.{part}_proj.weight": (_MLP_RATIO * width, width) for part in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (width, _MLP_RATIO * width)}
        shapes |= {f"{at}{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


class Loader:
    """Loads a model onto the first device, as an engine would, as often as asked."""

    def __init__(self, path: pathlib.Path, dtype: str) -> None:
        config = read_config(path)
        self._path, self._family = path, find_family(config)
        spec = self._family.spec(config)
        self._groups = fold_layers(spec.layers, scan=jax.default_backend() == "tpu")
        self._shapes = split_model(Decoder(spec, self._groups, dtype=jnp.dtype(dtype)))[1]

    def load(self) -> Params:
        """The parameters, all of them there."""
        with open_checkpoint(self._path) as checkpoint:
            params = load_params(checkpoint, self._shapes, self._groups, self._family, progress=lambda done, total: None)
        return jax.block_until_ready(params)


def read_plainly(path: pathlib.Path) -> int:
    """Bytes of the model's weight files, all read into memory."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return sum(np.fromfile(file, np.uint8).nbytes for file in files)


def compare(path: pathlib.Path, dtype: str, repeats: int) -> dict[str, Any]:
    """Megabytes a second of both, of the bytes in the files."""
    num_bytes, loader = read_plainly(path), Loader(path, dtype)
    loader.load()  # compiles what puts layers together
    plain_s: list[float] = []
    load_s: list[float] = []
    for _ in range(repeats):
        for found, run in ((plain_s, lambda: read_plainly(path)), (load_s, loader.load)):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    plain, ours = (num_bytes / min(found) / 1e6 for found in (plain_s, load_s))
    return {"megabytes": round(num_bytes / 1e6), "plain_mb_s": round(plain), "load_mb_s": round(ours), "ratio": round(ours / plain, 3)}


def memory_of(path: pathlib.Path, dtype: str) -> dict[str, Any]:
    """What measure_memory says in a fresh process."""
    command = [sys.executable, __file__, "--memory-of", str(path), "--dtype", dtype]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_memory(path: pathlib.Path, dtype: str) -> dict[str, float]:
    """How far this process's memory rose above what it had and what the parameters take; the bound that the design has for it."""
    loader = Loader(path, dtype)
    jax.block_until_ready(jnp.zeros((2, 3)) + 1)  # the device is there
    with open_checkpoint(path) as checkpoint:
        biggest = max(math.prod(info.shape) * np.dtype(dtype).itemsize for info in checkpoint.tensors.values())
    before, peak, stop = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    params = loader.load()
    stop.set()
    watcher.join()
    taken = sum(leaf.nbytes for leaf in params.values()) if jax.default_backend() == "cpu" else 0
    above = max(peak[0] - before - taken, 0)
    return {"above_parameters_mb": round(above / 1e6, 1), "allowed_mb": round(1.2 * biggest * READERS / 1e6, 1), "readers": READERS}


def anonymous_bytes() -> int:
    """Memory of this process that is no file's (Linux)."""
    line = next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
