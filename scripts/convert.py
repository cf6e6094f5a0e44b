"""Converts a model to an Orbax directory, which jaxserve serves like any other.

1. The weights are read tensor by tensor, dequantized where they are quantized, into OUT_DIR/params.
2. config.json, generation_config.json and the tokenizer's files are copied; those of a GGUF file are made from its metadata.
3. All of it is written beside OUT_DIR and moved there when whole.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import processors
from tqdm import tqdm

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from jaxserve.weights.checkpoint import open_checkpoint, read_config
from jaxserve.weights.orbax import save_orbax
from jaxserve.weights.source import resolve_model

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")


def convert(source: pathlib.Path, target: pathlib.Path) -> None:
    """Write the model at `source` as an Orbax directory.

    Args:
      source: directory or .gguf file.
      target: must not exist, or be an empty directory.
    Raises: ConfigError if the model cannot be read, or `target` is taken.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists; name a directory that does not, or an empty one")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.part-", dir=target.parent) as scratch:
        whole = pathlib.Path(scratch) / "model"
        whole.mkdir()
        if source.is_dir():
            _copy_files(source, whole)
        else:
            _write_files(source, whole)
        with open_checkpoint(source) as checkpoint, tqdm(total=len(checkpoint.tensors), desc="reading", unit="tensor", disable=None) as bar:

            def progress(done: int, total: int) -> None:
                bar.update(done - bar.n)

            save_orbax(checkpoint, whole, progress=progress)
        os.replace(whole, target)


def _copy_files(source: pathlib.Path, target: pathlib.Path) -> None:
    read_config(source)  # a model without one could not be served
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)


def _write_files(source: pathlib.Path, target: pathlib.Path) -> None:
    config = read_config(source)
    _write_json(target / "config.json", config.values)
    tokenizer = load_tokenizer(source)
    # GGUF files mark several tokens that end an answer; a directory's tokenizer names one, generation_config.json all.
    stated = config.generation.get("eos_token_id", [])
    ends = tokenizer.eos_ids | set(stated if isinstance(stated, list) else [stated])
    _write_json(target / "generation_config.json", {**config.generation, "eos_token_id": sorted(ends)})
    _keep_affixes(tokenizer)
    tokenizer.backend.save(str(target / "tokenizer.json"))
    _write_json(target / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens})
    if tokenizer.chat_template is not None:
        (target / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _keep_affixes(tokenizer: Tokenizer) -> None:
    """Write into the tokenizer's backend what it puts around a text, such as beginning-of-sequence; GGUF files have that as flags."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    before, after = full[:at], full[at + len(bare) :]
    if not before and not after:
        return
    words = {token: tokenizer.backend.id_to_token(token) for token in before + after}
    template = [*(words[token] for token in before), "$A", *(words[token] for token in after)]
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single=template, pair=[*template, "$B"], special_tokens=[(word, token) for token, word in words.items()]
    )


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(value), indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(description="Convert a model to an Orbax directory.")
    parser.add_argument("model", metavar="MODEL", help="hub id, directory of safetensors, or .gguf file")
    parser.add_argument("target", metavar="OUT_DIR", type=pathlib.Path, help="directory to make")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the hub")
    args = parser.parse_args(argv)
    try:
        source = resolve_model(args.model, revision=args.revision, cache_dir=EngineConfig().cache_path)
        convert(source, args.target.absolute())
    except ConfigError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    print(args.target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
