"""What kernels for CPUs stand on: XLA's interface, its threads, and where compiled code is kept."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numba.core import config

from pallas_kernels.matmul import matmul
from pallas_kernels.native import ffi


@pytest.fixture
def cache_dir(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    monkeypatch.setattr(config, "CACHE_DIR", "")
    before = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_code_is_kept_beside_compiled_programs_under_a_name_of_its_sources(cache_dir: pathlib.Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(cache_dir))
    assert ffi.use_cache()
    (chosen,) = cache_dir.glob("native-*")
    assert str(chosen) == config.CACHE_DIR  # pyright: ignore[reportAttributeAccessIssue]


def test_nothing_is_kept_where_there_is_no_directory(cache_dir: pathlib.Path) -> None:
    jax.config.update("jax_compilation_cache_dir", None)
    assert not ffi.use_cache()
    (cache_dir / "file").write_text("in the way")
    jax.config.update("jax_compilation_cache_dir", str(cache_dir / "file"))
    assert not ffi.use_cache()


def test_a_kernel_is_built_once_whoever_asks() -> None:
    built: list[int] = []

    @ffi.once
    def build() -> int:
        built.append(1)
        return len(built)

    assert build() == build() == 1


def test_calls_of_several_programs_share_the_threads() -> None:
    x, weight = jnp.ones((96, 64)), jnp.arange(48 * 64, dtype=jnp.float32).reshape(48, 64)
    call = jax.jit(lambda x, w: [matmul(x * i, w, implementation="cpu") for i in range(8)])
    pending = [call(x, weight) for _ in range(16)]  # dispatched before any has ended
    expected = np.asarray(weight).sum(axis=1)
    for results in pending:
        for i, result in enumerate(results):
            np.testing.assert_allclose(result, np.broadcast_to(expected * i, (96, 48)), rtol=1e-5)
