"""A checkpoint's tensors into the parameters of a model, one tensor at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.models.names import Family
from jaxserve.models.params import Params
from jaxserve.models.spec import LayerGroup
from jaxserve.weights.checkpoint import Checkpoint


def sources(shapes: Mapping[str, jax.ShapeDtypeStruct], groups: tuple[LayerGroup, ...], family: Family) -> dict[str, list[tuple[str, ...]]]:
    """For each parameter, the checkpoint tensors of each of its repeats (one entry if it is not stacked)."""
    result: dict[str, list[tuple[str, ...]]] = {}
    for path in shapes:
        if path.startswith("groups."):
            _, g, j, leaf = path.split(".", 3)
            group = groups[int(g)]
            layers = [group.first + r * len(group.pattern) + int(j) for r in range(group.repeats)]
            result[path] = [tuple(name.format(i=i) for name in family.layer_names[leaf]) for i in layers]
        else:
            result[path] = [family.model_names[path]]
    return result


def check_tensors(checkpoint: Checkpoint, shapes: Mapping[str, jax.ShapeDtypeStruct], wanted: Mapping[str, list[tuple[str, ...]]]) -> None:
    """Raise ConfigError listing every missing, unexpected and mis-shaped tensor."""
    problems: list[str] = []
    used: set[str] = set()
    for path, repeats in wanted.items():
        shape = shapes[path].shape[1:] if path.startswith("groups.") else shapes[path].shape
        for names in repeats:
            used.update(names)
            missing = [name for name in names if name not in checkpoint.tensors]
            problems += [f"missing: {name}" for name in missing]
            if not missing:
                found = [checkpoint.tensors[name].shape for name in names]
                joined = (sum(dims[0] for dims in found), *found[0][1:])
                if joined != shape:
                    problems.append(f"{' + '.join(names)}: shape {joined}, the config asks for {shape}")
    ignored = ("rotary_emb.inv_freq", "rope_freqs.weight")  # derived from the config
    unexpected = [name for name in checkpoint.tensors if name not in used and not name.endswith(ignored)]
    tied_head = "head.weight" not in wanted
    problems += [f"unexpected: {name}" for name in unexpected if not (tied_head and name == "lm_head.weight")]
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
    wanted = sources(shapes, groups, family)
    check_tensors(checkpoint, shapes, wanted)
    total = sum(_size(leaf) for leaf in shapes.values())
    done = 0
    params: Params = {}
    for path, repeats in wanted.items():
        leaf = shapes[path]
        stacked = path.startswith("groups.")
        if stacked and len(repeats) > 1:
            array = jnp.zeros(leaf.shape, leaf.dtype)
            for r, names in enumerate(repeats):
                array = _put_layer(array, _read(checkpoint, names, leaf.dtype), r)
                progress(done + _size(leaf) * (r + 1) // len(repeats), total)
        else:
            host = _read(checkpoint, repeats[0], leaf.dtype)
            array = jax.device_put(host[None] if stacked else host)
        done += _size(leaf)
        progress(done, total)
        params[path] = array
    return params


def _read(checkpoint: Checkpoint, names: tuple[str, ...], dtype: jnp.dtype) -> np.ndarray:
    if len(names) == 1:
        return np.ascontiguousarray(checkpoint.read(names[0]).astype(dtype, copy=False))
    sizes = [checkpoint.tensors[name].shape for name in names]
    joined = np.empty((sum(dims[0] for dims in sizes), *sizes[0][1:]), dtype)
    start = 0
    for name, dims in zip(names, sizes, strict=True):
        joined[start : start + dims[0]] = checkpoint.read(name)
        start += dims[0]
    return joined


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stacked: jax.Array, layer: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, layer, index, 0)


def _size(leaf: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(leaf.shape)) * leaf.dtype.itemsize
