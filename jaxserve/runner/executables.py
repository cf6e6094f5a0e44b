"""Compiled programs on disk, ready to run: a start that finds its own traces, lowers and compiles nothing.

1. A directory holds the programs of one identity: the model, the sizes, the devices, and the versions of everything that compiled them.
2. A file holds one program: the executable as jax serializes it, and the trees of its arguments and results.
3. What is not there, or cannot be read, is compiled, and kept for the next start.

The files hold machine code and pickles, as those of jax's own cache do: nobody else may be able to write to the directory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import pickle
import shutil
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import serialize_executable

from jaxserve.config import compiler_environment
from jaxserve.sharding import Device
from pallas_kernels.native.ffi import processor
from pallas_kernels.native_kernels import define_kernels_in

log = logging.getLogger(__name__)

_SOURCES = pathlib.Path(__file__).parents[2]
_MOST_BYTES = 8 << 30  # of all identities; those that were used least lately go first
_COMPILED, _FETCHED = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
_PLACES = ("jax_compilation_cache", "jax_persistent_cache", "jax_log", "jax_dump")  # options that shape no program


class Executables:
    """The programs of one identity.

    Args:
      directory: where those of all identities are; None keeps nothing.
      identity: everything that shapes a program, but for versions, devices and jax's options, which are added here.
      devices: that run the programs.
    """

    def __init__(self, directory: pathlib.Path | None, identity: str, devices: Sequence[Device]) -> None:
        self._devices, self._heard = tuple(devices), threading.local()
        self._own: pathlib.Path | None = None
        if directory is None or jax.process_count() > 1:  # processes that serve together compile together
            return
        digest = hashlib.sha256("\n".join((identity, sources(), *_surroundings(self._devices))).encode()).hexdigest()
        self._own = use_directory(directory / digest[:32])
        self._listen()

    def get(self, name: str, build: Callable[[], jax.stages.Compiled]) -> jax.stages.Compiled:
        """The program of this name, from disk, or else built and kept."""
        if self._own is None:
            return build()
        path = self._own / name
        found = self._load(path) if path.exists() else None
        if found is None:
            self._heard.events = set()
            found = build()
            if self._heard.events == {_COMPILED}:
                self._keep(path, found)
        return found

    def _listen(self) -> None:
        """Notice what jax compiles, and what it takes from a cache of its own: on a CPU the latter is not whole, and cannot be kept."""
        target = weakref.ref(self)  # jax keeps its listeners for ever

        def listen(event: str, *_: Any, **__: Any) -> None:
            living = target()
            if living is not None and event in (_COMPILED, _FETCHED):
                vars(living._heard).setdefault("events", set()).add(event)  # of the thread that compiles

        jax.monitoring.register_event_listener(listen)
        jax.monitoring.register_event_duration_secs_listener(listen)

    def _load(self, path: pathlib.Path) -> jax.stages.Compiled | None:
        try:
            executable, arguments, results = pickle.loads(path.read_bytes())
            define_kernels_in(executable)
            trees = jax.tree.structure(arguments), jax.tree.structure(results)
            return serialize_executable.deserialize_and_load(
                executable, *trees, backend=self._devices[0].client, execution_devices=self._devices
            )
        except Exception as error:  # of pickle, of jax or of a compiler: whatever is wrong with it, it can be compiled
            log.warning("compiling again what cannot be loaded: path=%s: %s: %s", path, type(error).__name__, error)
            return None

    def _keep(self, path: pathlib.Path, program: jax.stages.Compiled) -> None:
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            executable, arguments, results = serialize_executable.serialize(program)
            # Trees have no pickles, but what they are of has.
            trees = (jax.tree.unflatten(tree, range(tree.num_leaves)) for tree in (arguments, results))
            part.write_bytes(pickle.dumps((executable, *trees)))
            part.replace(path)
        except Exception as error:  # not every compiler's programs can be kept, nor every disk written to
            log.warning("cannot keep a compiled program: path=%s: %s: %s", path, type(error).__name__, error)
            part.unlink(missing_ok=True)


@functools.cache  # each copy of a model asks, and jax's own cache; the code that runs is the one that was read
def sources() -> str:
    """A digest of the code of jaxserve and of its kernels."""
    digest = hashlib.sha256()
    for pattern in ("jaxserve/**/*.py", "pallas_kernels/**/*.py", "pallas_kernels/**/*.json"):
        for path in sorted(_SOURCES.glob(pattern)):
            digest.update(str(path.relative_to(_SOURCES)).encode() + path.read_bytes())
    return digest.hexdigest()


def use_directory(chosen: pathlib.Path) -> pathlib.Path | None:
    """Make a directory beside others like it, of which those that were used least lately go if all take too much; None if it cannot be."""
    try:
        chosen.mkdir(parents=True, exist_ok=True)
        os.utime(chosen)
        _forget(chosen.parent, but=chosen)
    except OSError as error:
        log.warning("cannot keep compiled programs in directory=%s: %s", chosen, error)
        return None
    return chosen


def _surroundings(devices: Sequence[Device]) -> list[str]:
    """What else shapes a program: versions, devices, and options of jax and of its compilers."""
    client = devices[0].client
    options = {name: value for name, value in jax.config.values.items() if not name.startswith(_PLACES)}
    return [
        *(f"{package} {importlib.metadata.version(package)}" for package in ("jax", "jaxlib", "flax", "numba")),
        f"{client.platform} {client.platform_version} {processor() if client.platform == 'cpu' else ''}",
        repr([(device.id, device.device_kind) for device in devices]),
        repr(sorted((name, repr(value)) for name, value in options.items())),
        repr(sorted(compiler_environment().items())),
    ]


def _forget(directory: pathlib.Path, *, but: pathlib.Path) -> None:
    """Remove what was used least lately, as long as there is too much."""
    total = 0
    for path in sorted(directory.iterdir(), key=_last_used, reverse=True):
        with contextlib.suppress(FileNotFoundError):  # another server removes too
            total += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if total > _MOST_BYTES and path != but:
            shutil.rmtree(path, ignore_errors=True)


def _last_used(path: pathlib.Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
