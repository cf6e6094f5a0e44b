"""A checkpoint's tensors into the parameters of a model, one tensor at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.models.names import Family, Layout, Stored
from jaxserve.models.params import Params
from jaxserve.models.spec import LayerGroup
from jaxserve.weights.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The tensors of one parameter of one layer.

    Args:
      heads: the numbers of queries and of KV heads, where the layout asks for them.
    """

    names: tuple[str, ...]
    layout: Layout
    heads: tuple[int, int] = (0, 0)

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...] | None:
        """Of the joined tensors in our layout; None if they cannot be joined."""
        dims = [checkpoint.tensors[name].shape for name in self.names]
        if self.layout == "transposed":
            dims = [found[::-1] for found in dims]
        if self.layout == "stacked":
            dims = [(1, *found) for found in dims]
        if not all(dims) or any(found[1:] != dims[0][1:] for found in dims):
            return None
        return sum(found[0] for found in dims), *dims[0][1:]


def sources(
    checkpoint: Checkpoint, shapes: Mapping[str, jax.ShapeDtypeStruct], groups: tuple[LayerGroup, ...], family: Family
) -> dict[str, list[Source]]:
    """For each parameter, the checkpoint tensors of each of its repeats (one entry if it is not stacked)."""
    result: dict[str, list[Source]] = {}
    for path, leaf in shapes.items():
        if path.startswith("groups."):
            _, g, j, name = path.split(".", 3)
            group = groups[int(g)]
            attention = group.pattern[int(j)].attention
            heads = attention.num_heads, attention.num_kv_heads
            layers = [group.first + r * len(group.pattern) + int(j) for r in range(group.repeats)]
            result[path] = [_find(checkpoint, family, family.layer_names[name], i, leaf.shape[1], heads) for i in layers]
        else:
            result[path] = [_find(checkpoint, family, family.model_names[path], 0, leaf.shape[0], (0, 0))]
    return result


def _find(checkpoint: Checkpoint, family: Family, ways: tuple[Stored, ...], layer: int, num_rows: int, heads: tuple[int, int]) -> Source:
    """The first way whose tensors are all there, else the first."""
    found: list[Source] = []
    for way in ways:
        names = [name.format(i=layer, h=h) for name in way.names for h in range(num_rows if "{h}" in name else 1)]
        short = [name.removeprefix(family.optional_prefix) for name in names]
        chosen = tuple(b if a not in checkpoint.tensors and b in checkpoint.tensors else a for a, b in zip(names, short, strict=True))
        found.append(Source(names=chosen, layout=way.layout, heads=heads))
        if all(name in checkpoint.tensors for name in chosen):
            return found[-1]
    return found[0]


def check_tensors(
    checkpoint: Checkpoint, shapes: Mapping[str, jax.ShapeDtypeStruct], wanted: Mapping[str, list[Source]], family: Family
) -> None:
    """Raise ConfigError listing every missing, unexpected and mis-shaped tensor."""
    problems: list[str] = []
    used: set[str] = set()
    for path, repeats in wanted.items():
        shape = shapes[path].shape[1:] if path.startswith("groups.") else shapes[path].shape
        for source in repeats:
            used.update(source.names)
            missing = [name for name in source.names if name not in checkpoint.tensors]
            problems += [f"missing: {name}" for name in missing]
            if not missing and source.shape(checkpoint) != shape:
                found = " + ".join(f"{name} {checkpoint.tensors[name].shape}" for name in source.names)
                problems.append(f"{found}: the config asks for {shape}{'' if source.layout == 'rows' else f', {source.layout}'}")
    ignored = ("rotary_emb.inv_freq", "rope_freqs.weight", *family.ignored)  # derived from the config
    if "head.weight" not in wanted and "head.weight" in family.model_names:  # a tied head may be stored all the same
        used.update(name for way in family.model_names["head.weight"] for name in way.names)
    problems += [f"unexpected: {name}" for name in checkpoint.tensors if name not in used and not name.endswith(ignored)]
    if problems:
        shown = problems if len(problems) <= 40 else [*problems[:40], f"... and {len(problems) - 40} more"]
        raise ConfigError("the checkpoint does not fit its config:\n  " + "\n  ".join(shown))


def load_params(
    checkpoint: Checkpoint,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    groups: tuple[LayerGroup, ...],
    family: Family,
    *,
    progress: Callable[[int, int], None],
) -> Params:
    """Read every parameter onto the device.

    On the host there is never more than one parameter of one layer at a time, beside what a CPU device holds.

    Args:
      progress: called with (bytes done, bytes in all) after each tensor.
    Raises: ConfigError listing every tensor that does not fit.
    """
    wanted = sources(checkpoint, shapes, groups, family)
    check_tensors(checkpoint, shapes, wanted, family)
    total = sum(_size(leaf) for leaf in shapes.values())
    done = 0
    params: Params = {}
    for path, repeats in wanted.items():
        leaf = shapes[path]
        stacked = path.startswith("groups.")
        if stacked and len(repeats) > 1:
            array = jnp.zeros(leaf.shape, leaf.dtype)
            for r, source in enumerate(repeats):
                array = _put_layer(array, _read(checkpoint, source, leaf.dtype), r)
                progress(done + _size(leaf) * (r + 1) // len(repeats), total)
        else:
            host = _read(checkpoint, repeats[0], leaf.dtype)
            array = jax.device_put(host[None] if stacked else host)
        done += _size(leaf)
        progress(done, total)
        params[path] = array
    return params


def _read(checkpoint: Checkpoint, source: Source, dtype: jnp.dtype) -> np.ndarray:
    if len(source.names) == 1:
        return np.ascontiguousarray(_read_one(checkpoint, source, source.names[0]).astype(dtype, copy=False))
    shape = source.shape(checkpoint)
    assert shape is not None, f"{source=}"
    joined = np.empty(shape, dtype)
    start = 0
    for name in source.names:
        piece = _read_one(checkpoint, source, name)
        joined[start : start + len(piece)] = piece
        start += len(piece)
    return joined


def _read_one(checkpoint: Checkpoint, source: Source, name: str) -> np.ndarray:
    array = checkpoint.read(name)
    match source.layout:
        case "rows":
            return array
        case "transposed":
            return array.T
        case "stacked":
            return array[None]
        case "by_kv_head":
            N, K = source.heads
            by_head = array.reshape(K, N // K + 2, -1, *array.shape[1:])  # [K, G + 2, H, ...]
            parts = by_head[:, : N // K], by_head[:, N // K], by_head[:, N // K + 1]
            return np.concatenate([part.reshape(-1, *array.shape[1:]) for part in parts])


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stacked: jax.Array, layer: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, layer, index, 0)


def _size(leaf: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(leaf.shape)) * leaf.dtype.itemsize
