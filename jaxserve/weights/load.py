"""A checkpoint's tensors into the parameters of a model, one tensor at a time."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import re
import threading
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxserve.errors import ConfigError
from jaxserve.models.names import Family, Layout, Stored
from jaxserve.models.params import Params
from jaxserve.models.spec import LayerGroup
from jaxserve.sharding import Piece, Placement
from jaxserve.weights.checkpoint import Checkpoint
from jaxserve.weights.gguf_names import named_as_stored
from jaxserve.weights.place import PlacedParam, take
from jaxserve.weights.tensors import empty

_LAYER = re.compile(r"(?:^|\.)(?:layers|blk)\.(\d+)\.")

READERS = 4  # a disk and a memory of a server keep up with as many


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The tensors of one part of a parameter: of one layer, or of one expert of one layer.

    Args:
      heads: the numbers of queries and of KV heads, where the layout asks for them.
      rows_a_head: of the part, for the layouts that take some rows of each head.
      expert: this one of so many that each tensor holds; None if the tensors are the part's own.
    """

    names: tuple[str, ...]
    layout: Layout
    heads: tuple[int, int] = (0, 0)
    rows_a_head: int = 0
    expert: tuple[int, int] | None = None

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...] | None:
        """Of the joined tensors in our layout; None if they cannot be joined."""
        dims = [self._dims(checkpoint.tensors[name].shape) for name in self.names]
        if not all(dims) or any(found[1:] != dims[0][1:] for found in dims):
            return None
        joined = sum(found[0] for found in dims), *dims[0][1:]
        return joined[::-1] if self.layout in ("expert", "expert_pairs") else joined

    def _dims(self, dims: tuple[int, ...]) -> tuple[int, ...]:
        """A tensor's shape before joining; empty if it cannot be this part's."""
        if self.expert is not None:
            num_rows, rest = divmod(dims[0], self.expert[1]) if dims else (0, 1)
            return () if rest else dims[1:] if num_rows == 1 else (num_rows, *dims[1:])
        match self.layout:
            case "transposed":
                return *dims[:-2], *dims[:-3:-1]
            case "stacked":
                return dims if len(dims) == 2 else (1, *dims)
            case "head_starts" | "head_ends":
                fits = len(dims) == 2 and dims[0] % self.heads[0] == 0 and dims[0] // self.heads[0] >= self.rows_a_head
                return (self.heads[0], self.rows_a_head, dims[1]) if fits else ()
            case _:
                return dims


def sources(
    checkpoint: Checkpoint, shapes: Mapping[str, jax.ShapeDtypeStruct], groups: tuple[LayerGroup, ...], family: Family
) -> dict[str, list[Source]]:
    """For each parameter, the checkpoint tensors of each of its parts, along its leading axes (one entry if it is not stacked)."""
    result: dict[str, list[Source]] = {}
    for path, leaf in shapes.items():
        if path.startswith("groups."):
            _, g, j, name = path.split(".", 3)
            group = groups[int(g)]
            attention = group.pattern[int(j)].attention
            heads = attention.num_heads, attention.num_kv_heads
            layers = [group.first + r * len(group.pattern) + int(j) for r in range(group.repeats)]
            ways = family.layer_names[name]
            experts = range(leaf.shape[1]) if is_of_experts(ways) else [None]
            result[path] = [_find(checkpoint, family, ways, i, leaf.shape[1:], heads, e) for i in layers for e in experts]
        else:
            result[path] = [_find(checkpoint, family, family.model_names[path], 0, leaf.shape, (0, 0), None)]
    return result


def is_of_experts(ways: tuple[Stored, ...]) -> bool:
    """Whether a parameter is a part for each expert of a layer, not one for the layer."""
    return ways[0].layout.startswith("expert")


def _find(
    checkpoint: Checkpoint, family: Family, ways: tuple[Stored, ...], layer: int, shape: tuple[int, ...], heads: tuple[int, int],
    expert: int | None,
) -> Source:  # fmt: skip
    """The first way whose tensors are all there, else the first; of a parameter of this shape in its layer."""
    found: list[Source] = []
    for way in ways:
        names = [name.format(i=layer, h=h, e=expert) for name in way.names for h in range(shape[0] if "{h}" in name else 1)]
        short = [name.removeprefix(family.optional_prefix) for name in names]
        chosen = tuple(b if a not in checkpoint.tensors and b in checkpoint.tensors else a for a, b in zip(names, short, strict=True))
        shared = None if expert is None or "{e}" in way.names[0] else (expert, shape[0])
        rows_a_head = shape[1] if way.layout.startswith("head_") else 0
        found.append(Source(names=chosen, layout=way.layout, heads=heads, rows_a_head=rows_a_head, expert=shared))
        if all(name in checkpoint.tensors for name in chosen):
            return found[-1]
    return found[0]


def _layer_number(name: str) -> int:
    """Of the layer that a tensor belongs to; -1 if it is in none."""
    found = _LAYER.search(name)
    return int(found[1]) if found else -1


def check_tensors(
    checkpoint: Checkpoint, shapes: Mapping[str, jax.ShapeDtypeStruct], wanted: Mapping[str, list[Source]], family: Family
) -> None:
    """Raise ConfigError listing every missing, unexpected and mis-shaped tensor."""
    problems: list[str] = []
    used: set[str] = set()
    for path, parts in wanted.items():
        shape = shapes[path].shape[_num_leading(path, family) :]
        for source in parts:
            used.update(source.names)
            missing = [name for name in source.names if name not in checkpoint.tensors]
            problems += [f"missing: {name}" for name in missing]
            if not missing and source.shape(checkpoint) != shape:
                found = " + ".join(f"{name} {checkpoint.tensors[name].shape}" for name in source.names)
                problems.append(f"{found}: the config asks for {shape}{'' if source.layout == 'rows' else f', {source.layout}'}")
    ignored = ("rotary_emb.inv_freq", "rope_freqs.weight", *family.ignored)  # derived from the config
    if "head.weight" not in wanted and "head.weight" in family.model_names:  # a tied head may be stored all the same
        used.update(name for way in family.model_names["head.weight"] for name in way.names)
    last = max(map(_layer_number, used), default=-1)
    problems += [
        f"unexpected: {name}"
        for name in checkpoint.tensors
        if name not in used and not name.endswith(ignored) and not (family.predicts_ahead and _layer_number(name) > last)
    ]
    problems = list(dict.fromkeys(problems))  # experts share tensors
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
    placements: Mapping[str, Placement] | None = None,
    num_readers: int = READERS,
) -> Params:
    """Read every parameter onto the devices of this process.

    On the host there is never more than one part for each reader at a time, of one layer or of one expert, beside what a CPU device holds.

    Args:
      shapes: of the whole parameters.
      placements: where each lies and which share of it each device has; default: all of them on the first device.
      progress: called with (bytes done, bytes in all) after each tensor, from one thread at a time.
      num_readers: threads, each with a parameter of its own.
    Raises: ConfigError listing every tensor that does not fit.
    """
    family = named_as_stored(family, checkpoint.tensors)
    wanted = sources(checkpoint, shapes, groups, family)
    check_tensors(checkpoint, shapes, wanted, family)
    tally = _Tally(sum(_size(leaf) for leaf in shapes.values()), progress)

    def place(path: str) -> jax.Array:
        leaf, num_leading = shapes[path], _num_leading(path, family)
        placed = PlacedParam(leaf, num_leading, _on_one_device() if placements is None else placements[path])
        for n, source in enumerate(wanted[path]):
            part = tuple(int(i) for i in np.unravel_index(n, leaf.shape[:num_leading]))
            placed.put(part, functools.partial(_read_rows, checkpoint, source, leaf.dtype))
            tally.add(_size(leaf) // len(wanted[path]))
        return placed.array()

    with concurrent.futures.ThreadPoolExecutor(num_readers, thread_name_prefix="read") as pool:
        placing = {path: pool.submit(place, path) for path in wanted}
        try:
            params = {path: future.result() for path, future in placing.items()}
        finally:
            pool.shutdown(cancel_futures=True)
    tally.finish()
    return params


class _Tally:
    """Bytes that all readers have placed, told one after the other."""

    def __init__(self, total: int, progress: Callable[[int, int], None]) -> None:
        self._total, self._progress, self._done, self._lock = total, progress, 0, threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._progress(self._done, self._total)

    def finish(self) -> None:
        self._progress(self._total, self._total)


def _on_one_device() -> Placement:
    return Placement(target=SingleDeviceSharding(jax.local_devices()[0]), cuts=(), stacked=False)


def _num_leading(path: str, family: Family) -> int:
    """Axes of a parameter along which its parts are stacked: layers, and experts."""
    if not path.startswith("groups."):
        return 0
    return 2 if is_of_experts(family.layer_names[path.split(".", 3)[3]]) else 1


def _read_rows(checkpoint: Checkpoint, source: Source, dtype: jnp.dtype, rows: tuple[Piece, ...] | None) -> np.ndarray:
    """A part, or pieces of its rows; where tensors are stored as parameters are, the other rows are not read."""
    if source.layout != "rows" or source.expert is not None:
        whole = _read(checkpoint, source, dtype)
        return whole if rows is None else take(whole, rows, 0)
    shape = source.shape(checkpoint)
    assert shape is not None, f"{source=}"
    if not shape:
        return checkpoint.read(source.names[0]).astype(dtype)
    rows = rows or (Piece(0, shape[0]),)
    joined, at = empty((sum(piece.size for piece in rows), *shape[1:]), dtype), 0
    for piece in rows:
        first = 0
        for name in source.names:
            num_rows = checkpoint.tensors[name].shape[0]
            start, stop = max(piece.start - first, 0), min(piece.stop - first, num_rows)
            if start < stop:
                here = at + first + start - piece.start
                checkpoint.read_into(name, start, joined[here : here + stop - start])
            first += num_rows
        joined[at + piece.stop - piece.start : at + piece.size] = 0  # padding
        at += piece.size
    return joined


def _read(checkpoint: Checkpoint, source: Source, dtype: jnp.dtype) -> np.ndarray:
    """A part that is not stored as parameters are."""
    shape = source.shape(checkpoint)
    assert shape is not None, f"{source=}"
    is_out_in = source.layout in ("expert", "expert_pairs")
    if len(source.names) == 1:
        joined = _read_one(checkpoint, source, source.names[0])
    else:
        joined, start = np.empty(shape[::-1] if is_out_in else shape, dtype), 0
        for name in source.names:
            piece = _read_one(checkpoint, source, name)
            joined[start : start + len(piece)] = piece
            start += len(piece)
    if is_out_in:
        joined = joined.T
    if source.layout.endswith("pairs"):
        joined = np.concatenate([joined[..., ::2], joined[..., 1::2]], axis=-1)
    out = empty(joined.shape, dtype)
    out[...] = joined
    return out


def _read_one(checkpoint: Checkpoint, source: Source, name: str) -> np.ndarray:
    if source.expert is not None:
        e, E = source.expert
        num_rows = checkpoint.tensors[name].shape[0] // E
        rows = checkpoint.read_rows(name, e * num_rows, (e + 1) * num_rows)
        return rows[0] if num_rows == 1 else rows
    array = checkpoint.read(name)
    match source.layout:
        case "transposed":
            return array.swapaxes(-1, -2)
        case "halves_swapped":
            return np.concatenate(np.split(array, 2)[::-1])
        case "stacked":
            return np.atleast_2d(array)
        case "head_starts" | "head_ends":
            by_head = array.reshape(source.heads[0], -1, array.shape[1])
            return by_head[:, : source.rows_a_head] if source.layout == "head_starts" else by_head[:, -source.rows_a_head :]
        case "by_kv_head":
            N, K = source.heads
            by_head = array.reshape(K, N // K + 2, -1, *array.shape[1:])  # [K, G + 2, H, ...]
            parts = by_head[:, : N // K], by_head[:, N // K], by_head[:, N // K + 1]
            return np.concatenate([part.reshape(-1, *array.shape[1:]) for part in parts])
        case _:
            return array


def _size(leaf: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(leaf.shape)) * leaf.dtype.itemsize
