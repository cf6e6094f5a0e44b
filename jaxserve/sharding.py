"""How a model is dealt out to devices: the axes of the mesh, one table of rules, and which piece of a parameter each device holds.

1. The devices form a mesh of data x expert x tensor. Every index of `data` has a copy of the model and serves requests of its own.
2. A step's programs run under a shard_map over the devices of a copy: each runs the decoder with its own heads and its own part of the MLP,
   and adds what it found to what the others found: two all-reduces a layer. Nothing is left to a partitioner's guess.
3. RULES says which axes of the mesh cut an axis of the model; a Cut says which rows (or columns) that gives each device. What does not
   divide is padded with zeros, which add nothing: a padding head has zero keys, values and output columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxserve.config import MESH_AXES

Device: TypeAlias = Any  # jax.Device, which type checkers do not take for a type
MeshAxis = Literal["data", "expert", "tensor"]
LogicalAxis = Literal["heads", "mlp", "vocab", "experts", "expert_mlp"]

RULES: Mapping[LogicalAxis, tuple[MeshAxis, ...]] = {
    "heads": ("expert", "tensor"),  # of queries, with the keys and values that they read
    "mlp": ("expert", "tensor"),  # the hidden width of a dense MLP
    "vocab": ("expert", "tensor"),  # rows of the embedding and of the head
    "experts": ("expert",),
    "expert_mlp": ("tensor",),  # the hidden width of each expert
}


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Entries start .. stop of an axis, then so many zeros."""

    start: int
    stop: int
    zeros: int = 0

    @property
    def size(self) -> int:
        """Entries and zeros."""
        return self.stop - self.start + self.zeros


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One axis of a parameter, dealt out to the devices along some axes of the mesh.

    Args:
      axis: of the parameter, not counting the repeats of a layer group.
      names: the axes of the mesh, none of size 1.
      shares: what each device holds, in the order of the mesh; all shares are of one size.
    """

    axis: int
    names: tuple[MeshAxis, ...]
    shares: tuple[tuple[Piece, ...], ...]

    @property
    def size(self) -> int:
        """Entries that each device holds."""
        return sum(piece.size for piece in self.shares[0])

    def index(self) -> jax.Array:
        """Which share is this device's; only inside a shard_map."""
        return jax.lax.axis_index(self.names)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over all shares, on each device."""
        return jax.lax.psum(x, self.names)

    def gather(self, x: jax.Array) -> jax.Array:
        """The last axis of all shares, one after the other, on each device."""
        return jax.lax.all_gather(x, self.names, axis=x.ndim - 1, tiled=True)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeadSplit:
    """The heads of each device: numbers of queries and of KV heads, None for padding. Queries come group by group of their KV heads.

    Args:
      names: axes of the mesh, none of size 1; empty if one device has all heads.
    """

    names: tuple[MeshAxis, ...]
    queries: tuple[tuple[int | None, ...], ...]
    keys: tuple[tuple[int | None, ...], ...]

    @property
    def num_queries(self) -> int:
        """Queries of each device."""
        return len(self.queries[0])

    @property
    def num_keys(self) -> int:
        """KV heads of each device."""
        return len(self.keys[0])

    def cut(self, axis: int, *sections: tuple[Literal["queries", "keys"], int, int]) -> Cut | None:
        """How an axis that holds heads is dealt out; None if it is not.

        Args:
          sections: what follows what along the axis: whose heads, entries of a head, entries of the axis before the section.
        """
        if not self.names:
            return None
        shares = []
        for queries, keys in zip(self.queries, self.keys, strict=True):
            share: list[Piece] = []
            for whose, size, offset in sections:
                share += _pieces(queries if whose == "queries" else keys, size, offset)
            shares.append(tuple(share))
        return Cut(axis=axis, names=self.names, shares=tuple(shares))

    def of_queries(self, values: Sequence[float]) -> jax.Array:
        """f32[num_queries], this device's part of a number for each query head; 0 for padding."""
        if not self.names:
            return jnp.array(values, jnp.float32)
        table = [[0.0 if head is None else values[head] for head in heads] for heads in self.queries]
        return jnp.array(table, jnp.float32)[jax.lax.axis_index(self.names)]


def _pieces(heads: Sequence[int | None], size: int, offset: int) -> list[Piece]:
    """Heads as few pieces: consecutive ones are one, padding is zeros at the end of one."""
    pieces: list[Piece] = []
    for head in heads:
        last = pieces[-1] if pieces else None
        if head is None:
            pieces = [*pieces[:-1], dataclasses.replace(last, zeros=last.zeros + size)] if last else [Piece(0, 0, size)]
            continue
        start = offset + head * size
        if last is not None and not last.zeros and last.stop == start:
            pieces[-1] = Piece(last.start, start + size)
        else:
            pieces.append(Piece(start, start + size))
    return pieces


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How many devices share one copy of a model, along the axes of the mesh that cut it."""

    expert: int = 1
    tensor: int = 1

    @property
    def num_devices(self) -> int:
        """Devices of a copy."""
        return self.expert * self.tensor

    def names(self, logical: LogicalAxis) -> tuple[MeshAxis, ...]:
        """Axes of the mesh, none of size 1, that cut an axis of the model."""
        return tuple(name for name in RULES[logical] if self._size(name) > 1)

    def count(self, logical: LogicalAxis) -> int:
        """Into how many shares an axis of the model is cut."""
        return math.prod(self._size(name) for name in self.names(logical))

    def even(self, logical: LogicalAxis, axis: int, *sections: int) -> Cut | None:
        """An axis of a parameter in equal shares; None if it stays whole.

        Args:
          sections: sizes of matrices that lie one after the other along the axis, such as gate and up: a share has its part of each.
        """
        count = self.count(logical)
        if count == 1:
            return None
        shares: list[tuple[Piece, ...]] = []
        for index in range(count):
            share, offset = [], 0
            for size in sections:
                width = -(-size // count)
                start, stop = min(index * width, size), min((index + 1) * width, size)
                share.append(Piece(offset + start, offset + stop, width - (stop - start)))
                offset += size
            shares.append(tuple(share))
        return Cut(axis=axis, names=self.names(logical), shares=tuple(shares))

    def heads(self, num_heads: int, num_kv_heads: int) -> HeadSplit:
        """Deal out heads, queries with the KV heads they read.

        With fewer KV heads than devices, several devices hold the same KV head and share its queries.
        """
        count, group = self.count("heads"), num_heads // num_kv_heads
        keys: list[tuple[int | None, ...]] = []
        queries: list[tuple[int | None, ...]] = []
        for device in range(count):
            if num_kv_heads >= count:
                width, sharers = -(-num_kv_heads // count), 1
                held = [head if head < num_kv_heads else None for head in range(device * width, (device + 1) * width)]
            else:
                sharers = count // num_kv_heads
                held = [device // sharers if device < sharers * num_kv_heads else None]
            width = -(-group // sharers)
            first = device % sharers * width
            own = [(head, g) for head in held for g in range(first, first + width)]
            keys.append(tuple(held))
            queries.append(tuple(None if head is None or g >= group else head * group + g for head, g in own))
        return HeadSplit(names=self.names("heads"), queries=tuple(queries), keys=tuple(keys))

    def _size(self, name: MeshAxis) -> int:
        return {"data": 1, "expert": self.expert, "tensor": self.tensor}[name]


WHOLE = Split()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a parameter lies.

    Args:
      cuts: none for one that every device has whole.
      stacked: whether its first axis, which cuts do not count, is the repeats of a layer group.
      order: its axes in memory, from the outermost to the innermost; None leaves them to the compiler.
    """

    target: Sharding
    cuts: tuple[Cut, ...]
    stacked: bool
    order: tuple[int, ...] | None = None

    def axis(self, cut: Cut) -> int:
        """Of the array that a cut deals out."""
        return cut.axis + self.stacked

    def local_shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Of the share of one device, for the shape of a parameter that is not dealt out."""
        dims = list(whole)
        for cut in self.cuts:
            dims[self.axis(cut)] = cut.size
        return tuple(dims)

    def shape(self, local: Sequence[int]) -> tuple[int, ...]:
        """Of the shares of all devices together, for the shape of one."""
        dims = list(local)
        for cut in self.cuts:
            dims[self.axis(cut)] *= len(cut.shares)
        return tuple(dims)

    @property
    def spec(self) -> PartitionSpec:
        """The axes of the mesh along each axis of the array."""
        by_axis = {self.axis(cut): cut.names for cut in self.cuts}
        return PartitionSpec(*(by_axis.get(axis) for axis in range(max(by_axis, default=-1) + 1)))

    @property
    def sharding(self) -> Sharding:
        """Where the array lies."""
        return NamedSharding(self.target.mesh, self.spec) if isinstance(self.target, NamedSharding) and self.cuts else self.target

    @property
    def format(self) -> Any:
        """Where the array lies and, if that is not left to the compiler, how."""
        return self.sharding if self.order is None else Format(Layout(self.order), self.sharding)

    def format_on(self, device: Device) -> Any:
        """The same of the share of one device."""
        return device if self.order is None else Format(Layout(self.order), SingleDeviceSharding(device))

    def shares(self, local: Sequence[int]) -> dict[Device, tuple[tuple[Piece, ...], ...]]:
        """For each device of this process, what it holds along each cut; `local` is the shape of a share."""
        places = self.sharding.addressable_devices_indices_map(self.shape(local))
        return {
            device: tuple(cut.shares[(index[self.axis(cut)].start or 0) // cut.size] for cut in self.cuts)
            for device, index in places.items()
            if index is not None
        }


def mesh_of(target: Sharding) -> Mesh | None:
    """The mesh over which a model is dealt out; None if one device has all of it."""
    return target.mesh if isinstance(target, NamedSharding) and isinstance(target.mesh, Mesh) and target.mesh.size > 1 else None


def split_of(target: Sharding) -> Split:
    """How a model is dealt out over the devices of a mesh."""
    mesh = mesh_of(target)
    return WHOLE if mesh is None else Split(expert=mesh.shape.get("expert", 1), tensor=mesh.shape.get("tensor", 1))


def one_copy(devices: Sequence[Device], split: Split) -> Sharding:
    """Where what every device of a copy of the model has whole lies: on devices in the order in which they share the rest."""
    assert len(devices) == split.num_devices, f"{len(devices)=} {split=}"
    if split.num_devices == 1:
        return SingleDeviceSharding(devices[0])
    grid = np.array(devices).reshape(1, split.expert, split.tensor)
    return NamedSharding(Mesh(grid, MESH_AXES), PartitionSpec())
