"""What structured output costs and takes: share of schemas accepted, time to compile, time per mask, and whether outputs validate.

scripts/bench_grammar.py PATH [PATH ...]     directories or files: MaskBench's .jsonl(.gz), the JSON-Schema-Test-Suite's .json or .tar.gz
  --tokenizer MODEL      directory or .gguf file whose tokenizer is used (default: the default model's)
  --walks N              random walks through each schema's masks, whose output must validate (default 1)
  --limit N              first so many schemas of each file

1. Every schema is compiled, with nothing cached.
2. Instances that come with it are fed token by token: valid ones should be let through, invalid ones stopped.
3. Masks of these and of random walks are timed one by one; finished random walks are checked with the jsonschema package.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gzip
import io
import json
import pathlib
import random
import re
import tarfile
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
from jsonschema import validators

from jaxserve.config import DEFAULT_MODEL, make_config
from jaxserve.errors import UserError
from jaxserve.request import StructuredOutputs
from jaxserve.text.grammar import Grammar, GrammarError, Grammars, Matcher
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from jaxserve.weights.source import resolve_model

MAX_TOKENS = 400


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A schema and its instances, each with whether it is valid."""

    schema: Any
    tests: list[tuple[Any, bool]]


@dataclasses.dataclass(slots=True)
class Figures:
    """What one file of schemas gave; times in milliseconds."""

    schemas: int = 0
    accepted: int = 0
    compile_ms: list[float] = dataclasses.field(default_factory=list)
    mask_ms: list[float] = dataclasses.field(default_factory=list)
    tests: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    walks: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    refusals: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def read_cases(path: pathlib.Path) -> Iterator[tuple[str, Iterator[Case]]]:
    """Name and cases of each file below a path."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.name.endswith((".jsonl", ".jsonl.gz")):
            text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            yield file.name, (_maskbench(json.loads(line)) for line in text.splitlines() if line.strip())
        elif file.name.endswith(".tar.gz"):
            yield file.name, _suite_archive(file)
        elif file.suffix == ".json":
            yield file.name, _suite(json.loads(file.read_text()))


def _maskbench(entry: dict[str, Any]) -> Case:
    return Case(entry["schema"], [(test["data"], test["valid"]) for test in entry.get("tests", ())])


def _suite(groups: list[dict[str, Any]]) -> Iterator[Case]:
    for group in groups:
        yield Case(group["schema"], [(test["data"], test["valid"]) for test in group["tests"]])


def _suite_archive(file: pathlib.Path) -> Iterator[Case]:
    with tarfile.open(fileobj=io.BytesIO(file.read_bytes())) as archive:
        for member in archive:
            # "optional" is what an implementation may leave out.
            if member.name.endswith(".json") and "/optional/" not in member.name and (content := archive.extractfile(member)):
                yield from _suite(json.load(content))


class Bench:
    """Measures cases with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rng = random.Random(0)
        closing = (b'"', b"}", b"]", b'"}', b'"]', b'",', b",", b":", b'":')
        self._closing = [token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token) in closing]

    def _new_grammars(self) -> Grammars:
        grammars = Grammars(self._tokenizer, vocab_size=self._tokenizer.vocab_size, eos_ids=self._tokenizer.eos_ids, max_cached=0)
        grammars.compile(StructuredOutputs(regex="a"))  # reads the tokenizer
        return grammars

    def measure(self, cases: Iterator[Case], *, walks: int, limit: int | None) -> Figures:
        """Figures over the cases."""
        figures, grammars = Figures(), self._new_grammars()
        for case in cases:
            if limit is not None and figures.schemas >= limit:
                break
            figures.schemas += 1
            started_s = time.perf_counter()
            try:
                grammar = grammars.compile(StructuredOutputs(json=case.schema))
            except UserError as error:
                figures.refusals[error.message.partition(": ")[2][:40]] += 1
                continue
            finally:
                figures.compile_ms.append((time.perf_counter() - started_s) * 1000)
            figures.accepted += 1
            for instance, valid in case.tests:
                figures.tests[self._feed(grammar, instance, valid, figures)] += 1
            for _ in range(walks):
                figures.walks[self._walk(grammar, case.schema, figures)] += 1
        return figures

    def _feed(self, grammar: Grammar, instance: Any, valid: bool, figures: Figures) -> str:
        matcher = grammar.begin()
        taken = True
        for token in self._tokenizer.encode(json.dumps(instance, ensure_ascii=False), add_special_tokens=False):
            try:
                mask = self._mask(matcher, figures)
            except GrammarError:
                return "too complex on the way"
            # Where llguidance forces one tokenization the mask may leave out another of the same text: the text is what counts.
            if not _has(mask, token) and not matcher._matcher.validate_tokens([token]):
                taken = False
                break
            matcher.consume(token)
        taken = taken and (matcher.finished or any(_has(self._mask(matcher, figures), end) for end in self._tokenizer.eos_ids))
        return f"{'valid' if valid else 'invalid'} {'taken' if taken else 'stopped'}"

    def _walk(self, grammar: Grammar, schema: Any, figures: Figures) -> str:
        matcher, ids = grammar.begin(), []
        for _ in range(MAX_TOKENS):
            if matcher.finished:
                break
            try:
                mask = self._mask(matcher, figures)
            except GrammarError:
                return "too complex on the way"
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            ends = [token for token in self._tokenizer.eos_ids if _has(mask, token)]
            # A model closes what it has opened; dice alone seldom do.
            closing = [token for token in self._closing if _has(mask, token)] if self._rng.random() < 0.5 else []
            token = ends[0] if ends else int(self._rng.choice(closing or allowed))
            if ends:
                break
            matcher.consume(token)
            ids.append(token)
        else:
            return "cut off"
        try:
            value = json.loads(self._tokenizer.decode(ids))
            validators.validator_for(schema, jsonschema.Draft202012Validator)(schema).validate(value)
        except jsonschema.ValidationError:
            return "finished, does not validate"
        except re.error:
            return "finished, not checked: Python does not know the schema's regex"
        except ValueError:
            return "finished, does not parse"
        return "finished and validates"

    def _mask(self, matcher: Matcher, figures: Figures) -> np.ndarray:
        started_s = time.perf_counter()
        mask = matcher.fill()
        figures.mask_ms.append((time.perf_counter() - started_s) * 1000)
        return mask


def _has(mask: np.ndarray, token: int) -> bool:
    return bool(mask[token >> 5] >> (token & 31) & 1)


def _percentiles(values: list[float]) -> str:
    return "p50={:.3f} p99={:.3f} max={:.1f}".format(*np.percentile(values, [50, 99, 100])) if values else "none"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=pathlib.Path)
    parser.add_argument("--tokenizer", default=DEFAULT_MODEL)
    parser.add_argument("--walks", type=int, default=1)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    bench = Bench(load_tokenizer(resolve_model(arguments.tokenizer, revision=None, cache_dir=make_config({}).cache_path, need="tokenizer")))
    for path in arguments.paths:
        for name, cases in read_cases(path):
            figures = bench.measure(cases, walks=arguments.walks, limit=arguments.limit)
            if not figures.schemas:
                continue
            print(f"{name}: schemas={figures.schemas} accepted={figures.accepted} ({figures.accepted / figures.schemas:.1%})")
            print(f"  compile_ms {_percentiles(figures.compile_ms)}")
            print(f"  mask_ms    {_percentiles(figures.mask_ms)} masks={len(figures.mask_ms)}")
            print(f"  instances  {dict(figures.tests)}\n  walks      {dict(figures.walks)}\n  refused    {figures.refusals.most_common(8)}")


if __name__ == "__main__":
    main()
