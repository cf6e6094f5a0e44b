"""Parameters of experts and of latent attention: every way in which checkpoints store them, read one expert at a time."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.errors import ConfigError
from jaxserve.models.mlp_spec import MlpSpec
from jaxserve.models.names import Family, Names, stored
from jaxserve.models.spec import AttentionSpec, LayerGroup, LayerSpec, NormSpec
from jaxserve.weights.load import load_params
from jaxserve.weights.safetensors import open_safetensors

R, E, D, F, HEADS = 2, 3, 5, 4, 2
LAYER = LayerSpec(
    attention=AttentionSpec(num_heads=HEADS, num_kv_heads=HEADS, head_size=3, sm_scale=1.0, rope=None),
    mlp=MlpSpec(width=7, activation="silu"),
    norm=NormSpec(eps=1e-5),
)
GROUPS = (LayerGroup(first=0, repeats=R, pattern=(LAYER,)),)
# [R, E, D, gate and up, F]
GATE_UP = np.random.default_rng(0).standard_normal((R, E, D, 2, F)).astype(np.float32)
WANTED = GATE_UP.reshape(R, E, D, 2 * F)
Tensors = dict[str, np.ndarray]


def each_expert() -> Tensors:
    return {
        f"{i}.{e}.{name}": np.ascontiguousarray(GATE_UP[i, e, :, part].T)
        for i in range(R) for e in range(E) for part, name in enumerate(("gate", "up"))
    }  # fmt: skip


def of_layers(layers: np.ndarray) -> Tensors:
    return {f"{i}.all": np.ascontiguousarray(layers[i]) for i in range(R)}


def one_above_the_other() -> Tensors:
    return {
        f"{i}.{name}": np.ascontiguousarray(GATE_UP[i, :, :, part].swapaxes(1, 2)).reshape(E * F, D)
        for i in range(R) for part, name in enumerate(("gate", "up"))
    }  # fmt: skip


STORED: dict[str, tuple[Names, Tensors]] = {
    "each": ({"x": stored("{i}.{e}.gate", "{i}.{e}.up", layout="expert")}, each_expert()),
    "all, out in": ({"x": stored("{i}.all", layout="expert")}, of_layers(WANTED.swapaxes(2, 3))),
    "all, in out": ({"x": stored("{i}.all", layout="expert_transposed")}, of_layers(WANTED)),
    "all, out in, pairs": (
        {"x": stored("{i}.all", layout="expert_pairs")},
        of_layers(GATE_UP.swapaxes(3, 4).reshape(R, E, D, 2 * F).swapaxes(2, 3)),
    ),
    "all, in out, pairs": (
        {"x": stored("{i}.all", layout="expert_transposed_pairs")},
        of_layers(GATE_UP.swapaxes(3, 4).reshape(R, E, D, 2 * F)),
    ),
    "gate and up apart, experts one above the other": ({"x": stored("{i}.gate", "{i}.up", layout="expert")}, one_above_the_other()),
}


def load(
    directory: pathlib.Path, names: Names, tensors: Tensors, shape: tuple[int, ...], *, predicts_ahead: bool = False
) -> tuple[jax.Array, list[int]]:
    """The parameter x, and how many bytes each read gave."""
    save_file(tensors, directory / "model.safetensors")
    family = Family(
        architectures=("X",), spec=lambda config: pytest.fail("not asked for"), layer_names=names, model_names={},
        predicts_ahead=predicts_ahead,
    )  # fmt: skip
    sizes: list[int] = []
    with open_safetensors(directory) as checkpoint:
        read, read_rows = checkpoint.read, checkpoint.read_rows

        def counted(array: np.ndarray) -> np.ndarray:
            sizes.append(array.nbytes)
            return array

        checkpoint.read = lambda name: counted(read(name))  # type: ignore[method-assign]
        checkpoint.read_rows = lambda name, start, stop: counted(read_rows(name, start, stop))  # type: ignore[method-assign]
        wanted = {"groups.0.0.x": jax.ShapeDtypeStruct(shape, jnp.dtype("float32"))}
        return load_params(checkpoint, wanted, GROUPS, family, progress=lambda done, total: None)["groups.0.0.x"], sizes


@pytest.mark.parametrize("way", STORED)
def test_experts_are_stacked_one_at_a_time(way: str, tmp_path: pathlib.Path) -> None:
    names, tensors = STORED[way]
    found, sizes = load(tmp_path, names, tensors, WANTED.shape)
    np.testing.assert_array_equal(found, WANTED)
    assert max(sizes) <= WANTED[0, 0].nbytes
    assert sum(sizes) == WANTED.nbytes


def test_biases_of_pairs_are_told_apart(tmp_path: pathlib.Path) -> None:
    bias = GATE_UP[:, :, 0]  # [R, E, 2, F]
    tensors = of_layers(bias.swapaxes(2, 3).reshape(R, E, 2 * F))
    found, _ = load(tmp_path, {"x": stored("{i}.all", layout="expert_pairs")}, tensors, (R, E, 2 * F))
    np.testing.assert_array_equal(found, bias.reshape(R, E, 2 * F))


def test_rows_of_heads_are_taken_from_both_ends(tmp_path: pathlib.Path) -> None:
    whole = np.random.default_rng(1).standard_normal((R, HEADS, 3 + 4, D)).astype(np.float32)
    tensors = of_layers(whole.reshape(R, HEADS * 7, D))
    first, _ = load(tmp_path, {"x": stored("{i}.all", layout="head_starts")}, tensors, (R, HEADS, 3, D))
    last, _ = load(tmp_path, {"x": stored("{i}.all", layout="head_ends")}, tensors, (R, HEADS, 4, D))
    np.testing.assert_array_equal(first, whole[:, :, :3])
    np.testing.assert_array_equal(last, whole[:, :, 3:])


def test_what_is_wrong_with_experts_is_said_once(tmp_path: pathlib.Path) -> None:
    names, tensors = STORED["all, out in"]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, names, {"0.all": tensors["0.all"], "extra": np.zeros(1)}, WANTED.shape)
    assert str(caught.value).splitlines()[1:] == ["  missing: 1.all", "  unexpected: extra"]


def test_experts_of_another_number_are_refused(tmp_path: pathlib.Path) -> None:
    names, tensors = STORED["all, in out"]
    with pytest.raises(ConfigError, match=r"0\.all \(4, 5, 8\): the config asks for \(5, 8\), expert_transposed"):
        load(tmp_path, names, tensors | {"0.all": np.zeros((4, 5, 8), np.float32)}, WANTED.shape)


@pytest.mark.parametrize("predicts_ahead", [False, True])
def test_layers_that_predict_ahead_are_left_out_where_families_have_them(predicts_ahead: bool, tmp_path: pathlib.Path) -> None:
    names: Names = {"x": stored("layers.{i}.all", layout="expert_transposed")}
    tensors = {f"layers.{name}": tensor for name, tensor in of_layers(WANTED).items()} | {f"layers.{R}.eh_proj": np.zeros(1)}
    if predicts_ahead:
        found, _ = load(tmp_path, names, tensors, WANTED.shape, predicts_ahead=True)
        np.testing.assert_array_equal(found, WANTED)
    else:
        with pytest.raises(ConfigError, match=rf"unexpected: layers\.{R}\.eh_proj"):
            load(tmp_path, names, tensors, WANTED.shape)
