"""Compiled programs that the next start finds: the same answers, nothing lowered, and no harm from what is damaged."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import uuid
from typing import Any, Never

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.runner import executables
from jaxserve.runner.executables import Executables
from jaxserve.runner.programs import Programs
from pallas_kernels.matmul import matmul
from tests.tiny import tiny_model

X, WEIGHT = np.arange(64, dtype=np.float32).reshape(2, 32), np.arange(96, dtype=np.float32).reshape(3, 32)


def of(directory: pathlib.Path, identity: str = "a model") -> Executables:
    return Executables(directory, identity, jax.devices()[:1])


def build() -> jax.stages.Compiled:
    """A program that jax has never seen, or else it would come from a cache of jax's."""
    number = uuid.uuid4().int & 0x7FFFFFFF

    def product(x: jax.Array) -> dict[str, jax.Array]:
        return {"out": matmul(x, jnp.asarray(WEIGHT), implementation="cpu"), "number": jnp.int32(number)}

    return jax.jit(product).lower(X).compile()


def build_another() -> jax.stages.Compiled:
    """Not one that other tests build: jax keeps this one for longer than a test."""
    return jax.jit(lambda x: {"out": matmul(x, jnp.asarray(WEIGHT), implementation="cpu") + 1}).lower(X).compile()


def fail() -> Never:
    raise AssertionError("it is on disk")


def files(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_a_program_is_built_once_and_then_found(tmp_path: pathlib.Path) -> None:
    built = of(tmp_path).get("product", build)
    found = of(tmp_path).get("product", fail)
    assert [path.name for path in files(tmp_path)] == ["product"]
    assert found.memory_analysis().output_size_in_bytes == built.memory_analysis().output_size_in_bytes  # type: ignore[union-attr]
    for program in (built, found):
        np.testing.assert_array_equal(program(X)["out"], X @ WEIGHT.T)


def test_another_process_finds_it_and_defines_the_kernels_that_it_calls(tmp_path: pathlib.Path) -> None:
    of(tmp_path).get("product", build)
    code = """if True:
        import pathlib, sys
        import jax, numpy as np
        from tests.runner.test_executables import X, WEIGHT, fail, of
        out = of(pathlib.Path(sys.argv[1])).get("product", fail)(X)["out"]
        np.testing.assert_array_equal(out, X @ WEIGHT.T)
        print("found")"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.stdout == "found\n", done.stderr


@pytest.mark.parametrize("content", [b"", b"half a pickle", None], ids=["empty", "no pickle", "cut off"])
def test_what_cannot_be_read_is_built_again(tmp_path: pathlib.Path, content: bytes | None) -> None:
    of(tmp_path).get("product", build)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    np.testing.assert_array_equal(of(tmp_path).get("product", build)(X)["out"], X @ WEIGHT.T)
    np.testing.assert_array_equal(of(tmp_path).get("product", fail)(X)["out"], X @ WEIGHT.T)


def test_what_jax_takes_from_its_own_cache_is_not_kept(tmp_path: pathlib.Path) -> None:
    # A CPU's program that was fetched lacks its functions when it is serialized again.
    before = jax.config.jax_persistent_cache_min_compile_time_secs  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        build_another()
        fetched = of(tmp_path).get("product", build_another)
        again = of(tmp_path).get("product", lambda: fetched)  # as jax remembers a program within a process
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    for program in (fetched, again):
        np.testing.assert_array_equal(program(X)["out"], X @ WEIGHT.T + 1)
    assert not files(tmp_path)


def test_whatever_shapes_a_program_is_part_of_its_identity(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def directories() -> int:
        return len(list(tmp_path.iterdir()))

    of(tmp_path)
    of(tmp_path)
    assert directories() == 1
    of(tmp_path, "another model")
    assert directories() == 2
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    of(tmp_path)
    assert directories() == 3
    before = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        of(tmp_path)
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert directories() == 4


def test_nothing_is_kept_without_a_directory_or_where_it_cannot_be_written(tmp_path: pathlib.Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    for kept in (of(in_the_way), Executables(None, "a model", jax.devices()[:1])):
        np.testing.assert_array_equal(kept.get("product", build)(X)["out"], X @ WEIGHT.T)
    assert files(tmp_path) == [in_the_way]


def test_what_was_used_least_lately_goes_first(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate(("first", "second", "third")):
        of(tmp_path, name).get("product", build)
        for directory in tmp_path.iterdir():
            before_s = directory.stat().st_mtime - 100
            os.utime(directory, (before_s, before_s))
        assert len(files(tmp_path)) == age + 1
    size = files(tmp_path)[0].stat().st_size
    monkeypatch.setattr(executables, "_MOST_BYTES", 2 * size + size // 2)
    of(tmp_path, "first")
    left: list[Any] = [of(tmp_path, name).get("product", build) for name in ("first", "third")]
    assert len(left) == len(files(tmp_path)) == 2


def test_an_engine_that_starts_again_lowers_no_program_and_answers_the_same(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "max_rows": 2, "max_step_tokens": 16, "decode_rows": (2,), "prefill_tokens": (16,), "cache_bytes": 1 << 20, "page_size": 16,
        "cache_dir": str(tmp_path), "max_len": 64 + uuid.uuid4().int % 128,  # shapes that jax has not seen either
    }  # fmt: skip

    def answers() -> list[Any]:
        params = SamplingParams(temperature=0.8, seed=3, max_tokens=12, logprobs=2, ignore_eos=True)
        return [
            (list(one.outputs[0].token_ids), one.outputs[0].cumulative_logprob)
            for one in LLM(str(tiny_model()), **options).generate([[5, 17, 300], [7] * 40], params, use_tqdm=False)
        ]

    first = answers()
    monkeypatch.setattr(Programs, "lower_step", fail)
    monkeypatch.setattr(Programs, "lower_sample", fail)
    monkeypatch.setattr(Programs, "lower_seed_slot", fail)
    assert answers() == first
