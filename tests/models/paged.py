"""Run a checkpoint through our loader and decoder, paged and in chunks, and look at every logit."""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxserve.models.batch import Batch
from jaxserve.models.decoder import Decoder
from jaxserve.models.families import find_family
from jaxserve.models.kv_cache import KVCache, cache_shapes, cache_specs
from jaxserve.models.params import Params, merge_model, model_cuts, split_model
from jaxserve.models.spec import fold_layers, limit_length
from jaxserve.sharding import WHOLE, Placement, Split, mesh_of, one_copy
from jaxserve.weights.checkpoint import open_checkpoint, read_config
from jaxserve.weights.load import load_params
from tests.compiling import COMPILER_OPTIONS

PAGE_SIZE = 8


class PagedModel:
    """A checkpoint, loaded in float32.

    Args:
      max_len: of texts, for positions that depend on it.
      split: how it is dealt out to the first of jax's devices.
      platform: whose kernels it runs; default: those of the one at hand.
    """

    def __init__(
        self, path: pathlib.Path, *, scan: bool, max_len: int | None = None, split: Split = WHOLE, platform: str | None = None
    ) -> None:
        self._platform = platform
        config = read_config(path)
        family = find_family(config)
        self.spec = spec = family.spec(config)
        assert not config.unread(), f"{config.unread()=}"
        if max_len is not None:
            spec = limit_length(spec, max_len)
        self._groups = fold_layers(spec.layers, scan=scan)
        shapes = split_model(Decoder(spec, self._groups, dtype=jnp.dtype(jnp.float32)))[1]
        model = Decoder(spec, self._groups, dtype=jnp.dtype(jnp.float32), split=split, platform=platform)
        self._split, self._graphdef, target = split, split_model(model)[0], one_copy(jax.devices()[: split.num_devices], split)
        placements = {
            path: Placement(target=target, cuts=cuts, stacked=path.startswith("groups.")) for path, cuts in model_cuts(model).items()
        }
        self._forward = _forward
        if split.num_devices > 1:
            whole, caches = PartitionSpec(), cache_specs(self._groups, split=split)
            specs = {path: placement.spec for path, placement in placements.items()}
            self._forward = jax.jit(
                lambda graphdef, *args: jax.shard_map(
                    functools.partial(_logits, graphdef), mesh=mesh_of(target), in_specs=(specs, whole, caches), out_specs=(whole, caches),
                    check_vma=False,
                )(*args),
                static_argnums=0, compiler_options=COMPILER_OPTIONS,
            )  # fmt: skip
        with open_checkpoint(path) as checkpoint:
            self.params = load_params(checkpoint, shapes, self._groups, family, progress=lambda done, total: None, placements=placements)

    def logits(self, prompt: np.ndarray, cuts: Sequence[int], *, decodes: bool = True) -> np.ndarray:
        """f32[len(prompt), V]: the prompt's logits, computed in chunks of the given sizes over scattered pages.

        Chunks are padded to the length of the prompt, but for single tokens, which are decode steps if `decodes`.
        """
        num_pages = -(-len(prompt) // PAGE_SIZE)
        cache = jax.tree.map(
            lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype),
            cache_shapes(
                self._groups,
                num_pages=num_pages + 3,
                page_size=PAGE_SIZE,
                dtype=jnp.dtype("float32"),
                split=self._split,
                of_all=True,
                platform=self._platform,
            ),
        )
        table = np.random.default_rng(2).permutation(np.arange(1, num_pages + 3))[:num_pages].astype(np.int32)
        found, start = [], 0
        for count in cuts:
            is_decode = decodes and count == 1
            T = 1 if is_decode else len(prompt)
            tokens, positions = np.zeros((2, T), np.int32)
            tokens[:count], positions[:count] = prompt[start : start + count], np.arange(start, start + count)
            batch = Batch(
                tokens=jnp.asarray(tokens), positions=jnp.asarray(positions), page_table=jnp.asarray(table[None]),
                query_start=jnp.array([0, count], jnp.int32), kv_len=jnp.array([start + count], jnp.int32), one_token_rows=is_decode,
            )  # fmt: skip
            logits, cache = self._forward(self._graphdef, self.params, batch, cache)
            found.append(np.asarray(logits)[:count])
            start += count
        assert start == len(prompt), f"{cuts=} do not cover the prompt"
        return np.concatenate(found)


def logits_of(path: pathlib.Path, prompt: np.ndarray, cuts: Sequence[int], *, scan: bool) -> np.ndarray:
    """Load a checkpoint for one prompt; see PagedModel."""
    return PagedModel(path, scan=scan).logits(prompt, cuts)


def assert_same(found: PagedModel, expected: PagedModel) -> None:
    """Specs and parameters are equal, so that logits are.

    Numbers of specs are compared as exactly as a float32 is; norms that were stored with 1 added have lost their last bits.
    """
    assert _rounded(found.spec) == _rounded(expected.spec)
    assert found.params.keys() == expected.params.keys()
    for path, array in expected.params.items():
        tolerance = 1e-6 if "norm" in path else 0
        np.testing.assert_allclose(np.asarray(found.params[path]), np.asarray(array), rtol=0, atol=tolerance, err_msg=path)


def _rounded(spec: object) -> str:
    return re.sub(r"\d+\.\d+(e-?\d+)?", lambda match: f"{float(match[0]):.5g}", repr(spec))


def _logits(graphdef: Any, params: Params, batch: Batch, cache: KVCache) -> tuple[jax.Array, KVCache]:
    model = merge_model(graphdef, params)
    hidden, cache = model(batch, cache)
    return model.logits(hidden), cache


_forward = jax.jit(_logits, static_argnums=0, compiler_options=COMPILER_OPTIONS)
