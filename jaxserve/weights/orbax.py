"""Checkpoints saved with Orbax: a tree of Hugging Face tensor names -> array, in a directory with the model's JSON files.

    MODEL/config.json, generation_config.json, tokenizer files
    MODEL/params/            what orbax.checkpoint.StandardCheckpointer saved; or its files are in MODEL itself

Orbax is imported where it is used: it takes a second, and most models are no Orbax checkpoints.
"""

from __future__ import annotations

import mmap
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.weights.json_file import read_json
from jaxserve.weights.tensors import Checkpoint, TensorInfo, raise_problems

PARAMS = "params"
_METADATA = "_METADATA"
# Tensors are stored in chunks of about this size, so that rows can be read without the rest.
_CHUNK_BYTES = 16 << 20


class OrbaxCheckpoint(Checkpoint):
    """Tensors of one Orbax tree; nested dicts give names joined by dots.

    Orbax reads the tree; the arrays come straight from tensorstore, in which Orbax keeps them: it can read rows, and whole tensors in a
    third of the processor time that a restore of each takes.
    """

    def __init__(self, path: pathlib.Path, leaves: Mapping[str, Any]) -> None:
        stored = read_json(path / _METADATA, max_bytes=64 << 20)
        self._driver = "zarr3" if stored.get("use_zarr3") else "zarr"
        # Where zeros were stored too, a missing chunk means that the checkpoint is damaged, not that it is zero.
        self._fills_missing = stored.get("store_array_data_equal_to_fill_value") is not True
        self._stored_names: dict[str, str] = {name: leaf.name for name, leaf in leaves.items()}
        super().__init__(
            path, {name: TensorInfo(shape=tuple(leaf.shape), dtype=np.dtype(leaf.dtype).name) for name, leaf in leaves.items()}
        )

    def read(self, name: str) -> np.ndarray:
        return self._read(name, ...)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        self._check_rows(name, start, stop)
        return self._read(name, slice(start, stop))

    def close(self) -> None:
        """Nothing is kept open between reads."""

    def _read(self, name: str, rows: Any) -> np.ndarray:
        import tensorstore

        folder = f"{self._stored_names[name]}/"
        if (self.path / "manifest.ocdbt").exists():
            store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{self.path}/"}, "path": folder}
        else:
            store = {"driver": "file", "path": f"{self.path}/{folder}"}
        spec = {"driver": self._driver, "kvstore": store, "fill_missing_data_reads": self._fills_missing}
        info = self.tensors[name]
        try:
            array = tensorstore.open(spec, read=True, open=True, shape=info.shape).result()
            return np.asarray(array[rows].read().result())
        except ValueError as error:  # every error of a store is one
            raise ConfigError(f"cannot read {name} from {self.path}: {error}") from error


def is_orbax(path: pathlib.Path) -> bool:
    """Whether a directory holds an Orbax tree, itself or in params/."""
    return (path / PARAMS / _METADATA).is_file() or (path / _METADATA).is_file()


def open_orbax(path: pathlib.Path) -> OrbaxCheckpoint:
    """Open the tree in a model directory.

    Raises: ConfigError if its metadata are damaged or it holds anything but arrays.
    """
    import orbax.checkpoint as ocp

    folder = (path / PARAMS if (path / PARAMS / _METADATA).is_file() else path).resolve()
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            found = checkpointer.metadata(folder)
        tree: Any = None if found.item_metadata is None else found.item_metadata.tree
    except Exception as error:  # whatever Orbax and its stores make of a damaged file
        raise ConfigError(f"cannot read the checkpoint {folder}: {error}") from error
    problems: list[str] = []
    leaves: dict[str, Any] = {}
    _flatten(tree, "", leaves, problems)
    if not leaves:
        problems.append("it holds no tensors")
    raise_problems(folder, problems)
    return OrbaxCheckpoint(folder, leaves)


def save_orbax(checkpoint: Checkpoint, directory: pathlib.Path, *, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Save the tensors of any checkpoint as a tree of names -> arrays in `directory`/params.

    Orbax wants all leaves at once. They are put in a file that is mapped, so that the host holds one tensor at a time.

    Args:
      directory: exists, with room for the weights twice while this runs.
      progress: called with (tensors done, tensors in all).
    Raises: ConfigError if a tensor cannot be read; FileExistsError if `directory`/params is there.
    """
    import orbax.checkpoint as ocp

    target = directory.resolve() / PARAMS
    if target.exists():
        raise FileExistsError(f"{target} exists")
    with tempfile.TemporaryFile(dir=directory) as spool:
        places: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        for i, name in enumerate(checkpoint.tensors):
            array = np.ascontiguousarray(checkpoint.read(name))
            start = -(-spool.tell() // 64) * 64  # aligned, as arrays of every dtype must be
            spool.seek(start)
            spool.write(array.reshape(-1).view(np.uint8).data)
            places[name] = start, checkpoint.tensors[name].shape, array.dtype
            progress(i + 1, len(checkpoint.tensors))
        spool.write(b"\0")  # a file of no bytes cannot be mapped
        spool.flush()
        view = mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ)
        tree = {
            name: np.frombuffer(view, dtype, int(np.prod(shape, dtype=np.int64)), start).reshape(shape)
            for name, (start, shape, dtype) in places.items()
        }
        # By default the handler copies every leaf before it begins to write.
        handlers = ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
            (jax.Array, ocp.type_handlers.ArrayHandler()),  # it writes the metadata of all arrays
        )
        arguments = ocp.args.PyTreeSave(item=tree, save_args={name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in tree})
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)) as checkpointer:
            checkpointer.save(target, args=arguments)


def _flatten(node: Any, name: str, leaves: dict[str, Any], problems: list[str]) -> None:
    if isinstance(node, Mapping):
        for key, child in node.items():
            _flatten(child, f"{name}.{key}" if name else str(key), leaves, problems)
    elif name in leaves:
        problems.append(f"{name} is there twice")
    elif hasattr(node, "shape") and hasattr(node, "dtype") and node.dtype is not None:
        leaves[name] = node
    elif node is not None:
        problems.append(f"{name} is no array but {type(node).__name__}")
