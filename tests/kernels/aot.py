"""Compiling for TPUs without a TPU: topologies, abstract arguments, and what the tests ask of an executable."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@functools.cache
def tpu_mesh(name: str) -> Mesh:
    """A mesh of one device of a TPU generation, a key of TPUS.

    Raises: RuntimeError if libtpu, the TPU compiler, is not installed.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # without a TPU there is no metadata server to wait for
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor one that test workers could take from each other
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[name])
    except Exception as error:
        raise RuntimeError(f"no compiler for TPU {name}: install libtpu, the aot extra, to run tests marked aot") from error
    return Mesh(np.array(topology.devices[:1]), ("x",))


@contextlib.contextmanager
def compiling_for(mesh: Mesh) -> Iterator[None]:
    """Kernels traced inside see the mesh's device; the compile cache is off, as it does not know targets without devices."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with jax.set_mesh(mesh):
            yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def compile_for(mesh: Mesh, function: Callable[..., Any], arguments: Any, *, donate: tuple[int, ...] = ()) -> jax.stages.Compiled:
    """Compile function(*arguments) for the mesh's device.

    Args:
      arguments: a tuple of pytrees of jax.ShapeDtypeStruct.
    """
    formats = functools.partial(jax.tree.map, functools.partial(_format, mesh))
    with compiling_for(mesh):
        outputs = jax.eval_shape(function, *arguments)
        jitted = jax.jit(function, donate_argnums=donate, in_shardings=formats(arguments), out_shardings=formats(outputs))
        return jitted.lower(*arguments).compile()


def memory_of(executable: jax.stages.Compiled) -> Any:
    """Sizes in bytes of the executable's arguments, aliases and temporaries."""
    memory = executable.memory_analysis()
    assert memory is not None, "the TPU compiler always gives one"
    return memory


def _format(mesh: Mesh, x: jax.ShapeDtypeStruct) -> Format | NamedSharding:
    """Caches, the arrays of four and five axes, lie row-major: kernels need it, and the default for a head size of 64 is another."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return Format(Layout(tuple(range(x.ndim))), sharding) if x.ndim >= 4 else sharding
