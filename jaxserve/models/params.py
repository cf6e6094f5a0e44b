"""Parameters as a plain dict: dotted path -> array, with the graph that turns them back into a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jaxserve.models.decoder import Decoder
from jaxserve.sharding import Cut

Params = dict[str, jax.Array]
ModelGraph = nnx.GraphDef[Decoder]


def split_model(model: Decoder) -> tuple[ModelGraph, dict[str, jax.ShapeDtypeStruct]]:
    """The static graph of an abstract model and the shape of each parameter by its path, such as groups.0.0.mlp.down.weight."""
    graphdef, state = nnx.split(model)
    leaves: dict[str, jax.ShapeDtypeStruct] = {}
    _flatten(nnx.to_pure_dict(state), (), leaves)
    return graphdef, leaves


def model_cuts(model: Decoder) -> dict[str, tuple[Cut, ...]]:
    """How each parameter of an abstract model is dealt out to devices, by its path."""
    return {".".join(map(str, path)): variable.get_metadata().get("cuts", ()) for path, variable in nnx.to_flat_state(nnx.state(model))}


def merge_model(graphdef: ModelGraph, params: Mapping[str, Any]) -> Decoder:
    """The model with the arrays of `params`; only to be called while tracing, never per step."""
    nested: dict[Any, Any] = {}
    for path, leaf in params.items():
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
        node = nested
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return nnx.merge(graphdef, nested)


def _flatten(node: Any, path: tuple[str, ...], leaves: dict[str, jax.ShapeDtypeStruct]) -> None:
    if isinstance(node, dict):
        for name, child in node.items():
            _flatten(child, (*path, str(name)), leaves)
    else:
        leaves[".".join(path)] = node
