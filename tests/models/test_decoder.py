"""What the last layer computes when only some tokens are wanted."""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.batch import Batch
from jaxserve.models.decoder import Decoder
from jaxserve.models.kv_cache import cache_shapes
from jaxserve.models.mlp_spec import MlpSpec
from jaxserve.models.params import merge_model, split_model
from jaxserve.models.spec import AttentionSpec, LayerSpec, ModelSpec, NormSpec, Placement, fold_layers

T, D, PAGE_SIZE = 5, 24, 4


@pytest.mark.parametrize("placement", get_args(Placement))
def test_wanted_tokens_are_rows_of_all_tokens_wherever_norms_are(placement: Placement) -> None:
    attention = AttentionSpec(num_heads=3, num_kv_heads=1, head_size=8, sm_scale=0.3, rope=None)
    layer = LayerSpec(attention=attention, mlp=MlpSpec(width=17, activation="relu2"), norm=NormSpec(eps=1e-5), placement=placement)
    spec = ModelSpec(width=D, vocab_size=11, max_len=64, layers=(layer, layer), final_norm=None, tied=True)
    groups = fold_layers(spec.layers, scan=False)
    graphdef, shapes = split_model(Decoder(spec, groups, dtype=jnp.dtype("float32")))
    rng = np.random.default_rng(0)
    params = {path: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32) for path, leaf in shapes.items()}
    cache = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        cache_shapes(groups, num_pages=3, page_size=PAGE_SIZE, dtype=jnp.dtype("float32")),
    )
    batch = Batch(
        tokens=jnp.array([3, 1, 4, 1, 5]), positions=jnp.arange(T), page_table=jnp.array([[1, 2]]), query_start=jnp.array([0, T]),
        kv_len=jnp.array([T]),
    )  # fmt: skip
    wanted = jnp.array([4, 0, 2])

    @jax.jit
    def both(params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        model = merge_model(graphdef, params)
        return model(batch, cache)[0], model(batch, cache, wanted)[0]

    whole, some = both(params)
    np.testing.assert_allclose(some, np.asarray(whole)[np.asarray(wanted)], rtol=1e-4, atol=1e-4)
