"""Run a checkpoint through our loader and decoder, paged and in chunks, and look at every logit."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.batch import Batch
from jaxserve.models.decoder import Decoder
from jaxserve.models.families import find_family
from jaxserve.models.kv_cache import KVCache, cache_shapes
from jaxserve.models.params import Params, merge_model, split_model
from jaxserve.models.spec import fold_layers
from jaxserve.weights.checkpoint import open_checkpoint, read_config
from jaxserve.weights.load import load_params

PAGE_SIZE = 8


def logits_of(path: pathlib.Path, prompt: np.ndarray, cuts: Sequence[int], *, scan: bool) -> np.ndarray:
    """f32[len(prompt), V]: the prompt's logits, computed in chunks of the given sizes over scattered pages."""
    config = read_config(path)
    family = find_family(config)
    spec = family.spec(config)
    groups = fold_layers(spec.layers, scan=scan)
    graphdef, shapes = split_model(Decoder(spec, groups, dtype=jnp.dtype(jnp.float32)))
    with open_checkpoint(path) as checkpoint:
        params = load_params(checkpoint, shapes, groups, family, progress=lambda done, total: None)
    num_pages = -(-len(prompt) // PAGE_SIZE)
    cache = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype),
        cache_shapes(groups, num_pages=num_pages + 3, page_size=PAGE_SIZE, dtype=jnp.dtype("float32")),
    )
    table = np.random.default_rng(2).permutation(np.arange(1, num_pages + 3))[:num_pages].astype(np.int32)
    found, start = [], 0
    for count in cuts:
        batch = Batch(
            tokens=jnp.asarray(prompt[start : start + count], jnp.int32), positions=jnp.arange(start, start + count, dtype=jnp.int32),
            page_table=jnp.asarray(table[None]), query_start=jnp.array([0, count], jnp.int32), kv_len=jnp.array([start + count], jnp.int32),
        )  # fmt: skip
        logits, cache = _forward(graphdef, params, batch, cache)
        found.append(np.asarray(logits))
        start += count
    assert start == len(prompt), f"{cuts=} do not cover the prompt"
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: Any, params: Params, batch: Batch, cache: KVCache) -> tuple[jax.Array, KVCache]:
    model = merge_model(graphdef, params)
    hidden, cache = model(batch, cache)
    return model.logits(hidden), cache
