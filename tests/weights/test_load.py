"""From a checkpoint's tensors to parameters: which tensors are taken, how they are laid out, and what is wrong with them."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import save_file

from jaxserve.errors import ConfigError
from jaxserve.models.mlp_spec import MlpSpec
from jaxserve.models.names import Family, stored, with_leaves
from jaxserve.models.params import Params
from jaxserve.models.spec import AttentionSpec, LayerGroup, LayerSpec, NormSpec
from jaxserve.sharding import Placement
from jaxserve.weights.load import load_params
from jaxserve.weights.safetensors import open_safetensors

N, K, H, D = 4, 2, 3, 5
RANDOM = np.random.default_rng(0)


def no_spec(config: object) -> None:
    raise AssertionError(config)


FAMILY = Family(
    architectures=("XForCausalLM",),
    spec=no_spec,  # type: ignore[arg-type]
    layer_names=with_leaves(
        {
            "fused": stored("x.{i}.qkv", layout="by_kv_head"),
            "either": stored("x.{i}.both") + stored("x.{i}.one", "x.{i}.two"),
            "conv": stored("x.{i}.conv", layout="transposed"),
            "heads": stored("x.{i}.norms.{h}", layout="stacked"),
        }
    ),
    model_names=with_leaves({"embed": stored("x.embed"), "head": stored("lm_head")}),
    optional_prefix="x.",
    ignored=(".mask",),
)
LAYER = LayerSpec(
    attention=AttentionSpec(num_heads=N, num_kv_heads=K, head_size=H, sm_scale=1.0, rope=None),
    mlp=MlpSpec(width=7, activation="silu"),
    norm=NormSpec(eps=1e-5),
)
GROUPS = (LayerGroup(first=0, repeats=2, pattern=(LAYER,)),)


def load(
    directory: pathlib.Path,
    tensors: dict[str, np.ndarray],
    placements: Mapping[str, Placement] | None = None,
    **shapes: tuple[int, ...],
) -> Params:
    save_file(tensors, directory / "model.safetensors")
    wanted = {path.replace("__", "."): jax.ShapeDtypeStruct(shape, jnp.dtype("float32")) for path, shape in shapes.items()}
    with open_safetensors(directory) as checkpoint:
        return load_params(checkpoint, wanted, GROUPS, FAMILY, progress=lambda done, total: None, placements=placements)


def random(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def test_layouts_are_undone_for_every_layer(tmp_path: pathlib.Path) -> None:
    fused, conv, heads = random(2, K, N // K + 2, H, D), random(2, 6, D), random(2, N, H)
    tensors = {f"x.{i}.qkv.weight": fused[i].reshape(-1, D) for i in range(2)} | {f"x.{i}.conv.weight": conv[i] for i in range(2)}
    tensors |= {f"x.{i}.norms.{h}.weight": heads[i, h] for i in range(2) for h in range(N)}
    params = load(
        tmp_path,
        tensors,
        groups__0__0__fused__weight=(2, (N + 2 * K) * H, D),
        groups__0__0__conv__weight=(2, D, 6),
        groups__0__0__heads__weight=(2, N, H),
    )
    rows = [fused[:, :, :2].reshape(2, N * H, D), fused[:, :, 2].reshape(2, K * H, D), fused[:, :, 3].reshape(2, K * H, D)]
    np.testing.assert_array_equal(params["groups.0.0.fused.weight"], np.concatenate(rows, axis=1))
    np.testing.assert_array_equal(params["groups.0.0.conv.weight"], conv.swapaxes(1, 2))
    np.testing.assert_array_equal(params["groups.0.0.heads.weight"], heads)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("prefix", ["", "x."])
def test_first_way_whose_tensors_are_there_is_taken_with_or_without_the_prefix(split: bool, prefix: str, tmp_path: pathlib.Path) -> None:
    both = random(2, 7, D)
    pieces = {"one": both[:, :3], "two": both[:, 3:]} if split else {"both": both}
    tensors = {f"{prefix}{i}.{name}.weight": piece[i].copy() for name, piece in pieces.items() for i in range(2)}
    params = load(tmp_path, tensors, groups__0__0__either__weight=(2, 7, D))
    np.testing.assert_array_equal(params["groups.0.0.either.weight"], both)


def test_tied_head_and_masks_may_be_stored_and_are_not_read(tmp_path: pathlib.Path) -> None:
    tensors = {"x.embed.weight": random(9, D), "lm_head.weight": random(9, D), "x.0.attn.mask": random(1)}
    assert set(load(tmp_path, tensors, embed__weight=(9, D))) == {"embed.weight"}


@pytest.mark.parametrize("order", [None, (0, 1), (1, 0)])
def test_parameter_lies_in_memory_as_the_step_reads_it(order: tuple[int, int] | None, tmp_path: pathlib.Path) -> None:
    tensors = {"x.embed.weight": random(6, D)}
    placement = Placement(target=SingleDeviceSharding(jax.devices()[0]), cuts=(), stacked=False, order=order)
    (found,) = load(tmp_path, tensors, {"embed.weight": placement}, embed__weight=(6, D)).values()
    assert cast(Any, found).format.layout.major_to_minor == (order or (0, 1))
    np.testing.assert_array_equal(found, tensors["x.embed.weight"])
    step = jax.jit(lambda embed: embed[2], in_shardings=placement.format).lower(found).compile()
    np.testing.assert_array_equal(step(found), tensors["x.embed.weight"][2])


def test_everything_wrong_is_listed_at_once(tmp_path: pathlib.Path) -> None:
    tensors = {"x.embed.weight": random(9, D + 1), "x.0.conv.weight": random(D, 6), "x.novel.weight": random(1)}
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, tensors, embed__weight=(9, D), groups__0__0__conv__weight=(2, D, 6), head__weight=(9, D))
    for part in (
        "x.embed.weight (9, 6): the config asks for (9, 5)", "x.0.conv.weight (5, 6): the config asks for (5, 6), transposed",
        "missing: x.1.conv.weight", "missing: lm_head.weight", "unexpected: x.novel.weight",
    ):  # fmt: skip
        assert part in str(caught.value)
