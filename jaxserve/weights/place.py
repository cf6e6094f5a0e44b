"""One parameter on its way to the devices: each gets its share, part by part, and nothing else of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.sharding import Device, Piece, Placement

ReadPart = Callable[[tuple[Piece, ...] | None], np.ndarray]
"""Reads a part of a parameter, of one layer or of one expert; of its rows only the given pieces, None is all."""


class PlacedParam:
    """The arrays of one parameter on the devices of this process.

    Args:
      whole: its shape before it is dealt out.
      num_leading: axes along which parts are stacked: layers, and experts.
    """

    def __init__(self, whole: jax.ShapeDtypeStruct, num_leading: int, placement: Placement) -> None:
        self._local = local = jax.ShapeDtypeStruct(placement.local_shape(whole.shape), whole.dtype)
        self._placement = placement
        self._leading = local.shape[:num_leading]
        axes = [placement.axis(cut) for cut in placement.cuts]
        self._of_parts = [(i, axis) for i, axis in enumerate(axes) if axis < num_leading]  # cuts that deal out whole parts
        self._within = [(i, axis - num_leading) for i, axis in enumerate(axes) if axis >= num_leading]
        self._shares = placement.shares(local.shape)
        self._buffers: dict[Device, jax.Array] = {}
        assert placement.order is None or int(np.prod(self._leading)) == 1, "a parameter that is put together part by part has no order"

    def put(self, part: Sequence[int], read: ReadPart) -> None:
        """Read a part, given by its place along the leading axes, and send every device its share."""
        found: dict[tuple[tuple[Piece, ...], ...], np.ndarray] = {}
        whole: list[np.ndarray] = []
        for device, shares in self._shares.items():
            place = self._place(part, shares)
            if place is None:
                continue
            within = tuple(shares[i] for i, _ in self._within)
            if within not in found:
                found[within] = self._read(within, read, whole)
            self._send(device, place, found[within])

    def array(self) -> jax.Array:
        """The parameter, once every part has been put."""
        for device in self._shares.keys() - self._buffers.keys():
            self._buffers[device] = jnp.zeros(self._local.shape, self._local.dtype, device=device)  # padding alone
        shape = self._placement.shape(self._local.shape)
        return jax.make_array_from_single_device_arrays(shape, self._placement.sharding, [self._buffers[d] for d in self._shares])

    def _place(self, part: Sequence[int], shares: tuple[tuple[Piece, ...], ...]) -> tuple[int, ...] | None:
        """Where a device keeps the part along its leading axes; None if others have it."""
        place = list(part)
        for i, axis in self._of_parts:
            offset = 0
            for piece in shares[i]:
                if piece.start <= part[axis] < piece.stop:
                    place[axis] = offset + part[axis] - piece.start
                    break
                offset += piece.size
            else:
                return None
        return tuple(place)

    def _read(self, within: tuple[tuple[Piece, ...], ...], read: ReadPart, whole: list[np.ndarray]) -> np.ndarray:
        """A device's share; rows are read alone, of other axes everything, once for all devices."""
        if [axis for _, axis in self._within] == [0]:
            return read(within[0])
        if not whole:
            whole.append(read(None))
        share = whole[0]
        for (_, axis), pieces in zip(self._within, within, strict=True):
            share = take(share, pieces, axis)
        return share

    def _send(self, device: Device, place: tuple[int, ...], share: np.ndarray) -> None:
        num_parts = int(np.prod(self._leading))
        if num_parts == 1:
            self._buffers[device] = jax.device_put(share.reshape(self._local.shape), self._placement.format_on(device))
            return
        if device not in self._buffers:
            self._buffers[device] = jnp.zeros(self._local.shape, self._local.dtype, device=device)
        self._buffers[device] = _put_part(self._buffers[device], share, np.array(place, np.int32))


def take(array: np.ndarray, pieces: Sequence[Piece], axis: int) -> np.ndarray:
    """Pieces of an axis, one after the other, as an array that owns its memory row by row."""
    dims = list(array.shape)
    dims[axis] = sum(piece.size for piece in pieces)
    taken, at = np.zeros(dims, array.dtype), 0
    for piece in pieces:
        target: list[slice] = [slice(None)] * array.ndim
        source = list(target)
        target[axis], source[axis] = slice(at, at + piece.stop - piece.start), slice(piece.start, piece.stop)
        taken[tuple(target)] = array[tuple(source)]
        at += piece.size
    return taken


@functools.partial(jax.jit, donate_argnums=0)
def _put_part(stacked: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    """The parameter with a part at i32[n] `index` of its n leading axes."""
    start = [*index, *[0] * part.ndim]
    return jax.lax.dynamic_update_slice(stacked, part.reshape(*[1] * len(index), *part.shape), start)
