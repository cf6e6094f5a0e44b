"""Compiling for TPUs and GPUs that are not there: topologies, abstract arguments, and what the tests ask of an executable."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Instructions whose result is an array of its own; a kernel's, which is aliased, comes from a custom-call.
_MAKERS = "copy|copy-start|dynamic-slice|dynamic-update-slice|transpose|bitcast-convert"
TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What the compiler asks about a GPU; shared memory in KiB."""

    kind: str
    capability: str
    shared: int
    shared_per_core: int
    cores: int
    accelerated: bool = False

    @property
    def target(self) -> str:
        """The text proto that describes it to XLA."""
        major, minor = self.capability.split(".")
        extension = "feature_extension: ACCELERATED_FEATURES" if self.accelerated else ""
        return f"""gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
          shared_memory_per_core: {self.shared_per_core << 10} threads_per_core_limit: 2048 core_count: {self.cores} fpus_per_core: 128
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: 2000000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.5 device_memory_size: 85000000000
          shared_memory_per_block_optin: {self.shared << 10} cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 patch: 0 }} runtime_version {{ major: 13 }}
        device_description_str: "{self.kind}"
        """


GPUS = {
    "sm_80": Gpu(kind="NVIDIA A100-SXM4-80GB", capability="8.0", shared=163, shared_per_core=164, cores=108),
    "sm_90": Gpu(kind="NVIDIA H200", capability="9.0", shared=227, shared_per_core=228, cores=132, accelerated=True),
    "sm_100": Gpu(kind="NVIDIA B200", capability="10.0", shared=227, shared_per_core=228, cores=148, accelerated=True),
    "unknown": Gpu(kind="NVIDIA Unheard Of", capability="8.6", shared=99, shared_per_core=100, cores=80),
}


def mesh_for(name: str) -> Mesh:
    """A mesh of one device, a key of TPUS or of GPUS.

    Raises: RuntimeError if its compiler is not installed.
    """
    return tpu_mesh(name) if name in TPUS else gpu_mesh(name)


@functools.cache
def gpu_mesh(name: str) -> Mesh:
    """A mesh of one device of a GPU, a key of GPUS.

    Raises: RuntimeError if the CUDA plugin, which has the GPU compiler, is not installed.
    """
    return Mesh(np.array(gpu_devices(name, 1)), ("x",))


@functools.cache
def gpu_devices(name: str, count: int) -> list[Any]:
    """So many GPUs of a kind, a key of GPUS, in one server.

    Raises: RuntimeError if the CUDA plugin, which has the GPU compiler, is not installed.
    """
    try:
        target, topology = GPUS[name].target, f"1x1x{count}"
        found = topologies.get_topology_desc(platform="cuda", topology_name=name, target_config=target, topology=topology)
    except Exception as error:
        raise RuntimeError(f"no compiler for {name}: install jax-cuda13-plugin, the aot extra, to run tests marked aot") from error
    return list(found.devices)


@functools.cache
def tpu_mesh(name: str) -> Mesh:
    """A mesh of one device of a TPU generation, a key of TPUS.

    Raises: RuntimeError if libtpu, the TPU compiler, is not installed.
    """
    return Mesh(np.array(tpu_devices(TPUS[name])[:1]), ("x",))


@functools.cache
def tpu_devices(topology_name: str) -> list[Any]:
    """The chips of a slice, such as "v6e:2x4".

    Raises: RuntimeError if libtpu, the TPU compiler, is not installed.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # without a TPU there is no metadata server to wait for
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor one that test workers could take from each other
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology_name).devices)
    except Exception as error:
        raise RuntimeError(f"no compiler for TPU {topology_name}: install libtpu, the aot extra, to run tests marked aot") from error


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


def compile_layers(
    mesh: Mesh, layer: Callable[..., Any], x: jax.ShapeDtypeStruct, weights: Any, cache: jax.ShapeDtypeStruct, batch: Any, *, scanned: bool
) -> jax.stages.Compiled:
    """Compile a step that carries x and the cache through all layers, a scan's way or written out.

    Args:
      layer: (x, pages, index, weights of the layer, batch) -> (x, pages).
      weights: a pytree with a leading axis for the layers, as long as the cache's.
    """

    def step(x: jax.Array, weights: Any, pages: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
        def body(carry: Any, w: Any) -> Any:
            x, pages, index = carry
            return (*layer(x, pages, index, w, batch), index + 1), None

        if scanned:
            return jax.lax.scan(body, (x, pages, jnp.int32(0)), weights)[0][:2]
        for index in range(cache.shape[0]):
            x, pages = layer(x, pages, index, jax.tree.map(lambda w, index=index: w[index], weights), batch)
        return x, pages

    return compile_for(mesh, step, (x, weights, cache, batch), donate=(2,))


def batch_of(S: int, P: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch's arrays, by the kernels' names for them."""
    shapes = {"page_table": (S, P), "query_start": (S + 1,), "kv_len": (S,)}
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}


def check_in_place(
    executable: jax.stages.Compiled, caches: Iterable[jax.ShapeDtypeStruct], *, temporaries: float, fusions: bool = True
) -> None:
    """Assert that the caches are aliased and never copied, and that what else the executable allocates is at most so many bytes.

    Args:
      fusions: see copies_of.
    """
    caches = list(caches)
    memory = memory_of(executable)
    assert memory.alias_size_in_bytes >= sum(cache.size * cache.dtype.itemsize for cache in caches)
    assert memory.temp_size_in_bytes <= temporaries
    assert not copies_of(caches, executable, fusions=fusions)


def copies_of(
    arrays: Iterable[jax.ShapeDtypeStruct], executable: jax.stages.Compiled, *, fusions: bool = True, any_shape: bool = True
) -> list[str]:
    """Lines of the executable that make another array with as many numbers as one of these, or half as many: bytes in pairs.

    Args:
      fusions: whether the result of a fusion counts; XLA's own scatter updates in place and is one.
      any_shape: whether it counts whatever its shape; of weights, one layer's may have as many numbers as all of another.
    """
    arrays = list(arrays)
    sizes = {array.size // n for array in arrays for n in range(1, 3 if array.dtype.itemsize == 1 else 2)}
    shapes = {array.shape for array in arrays}
    making = re.compile(rf"= \(?\w+\[([\d,]+)\]\S* (?:{_MAKERS}{'|fusion' if fusions else ''})\(")
    found = [(match, line) for line in text_of(executable).splitlines() if (match := making.search(line))]
    made = [(tuple(int(n) for n in match[1].split(",")), line) for match, line in found]
    return [line for shape, line in made if shape in shapes or (any_shape and math.prod(shape) in sizes)]


def text_of(executable: jax.stages.Compiled) -> str:
    """The program that the device runs, in XLA's words."""
    text = executable.as_text()
    assert text is not None, "these compilers always give one"
    return text


def memory_of(executable: jax.stages.Compiled) -> Any:
    """Sizes in bytes of the executable's arguments, aliases and temporaries."""
    memory = executable.memory_analysis()
    assert memory is not None, "these compilers always give one"
    return memory


def _format(mesh: Mesh, x: jax.ShapeDtypeStruct) -> Format | NamedSharding:
    """Caches, the arrays of four and five axes, lie row-major: kernels need it, and the default for a head size of 64 is another."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return Format(Layout(tuple(range(x.ndim))), sharding) if x.ndim >= 4 else sharding
