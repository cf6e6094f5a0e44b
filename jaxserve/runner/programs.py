"""What an engine compiles: the abstract arguments of its steps, and their lowering for the device at hand or for one that is not."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxserve.config import EngineConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.kv_cache import KVCache, cache_shapes, cache_specs
from jaxserve.models.params import model_cuts, split_model
from jaxserve.models.spec import ModelSpec, fold_layers
from jaxserve.runner.memory import num_bytes
from jaxserve.runner.pack import Layout as WordLayout
from jaxserve.runner.pooling import make_pool_step, pool_state_shapes
from jaxserve.runner.sampling import MASK_CHUNK, SEEN_CHUNK, seed_slot, set_masks, slot_state_shapes
from jaxserve.runner.shapes import StepShape, make_shapes
from jaxserve.runner.step import Step, make_step
from jaxserve.sharding import Device, Placement, mesh_of, split_of
from pallas_kernels.native.empty import empty

Platform = Literal["cpu", "tpu", "gpu"]
_WHOLE_TEXT_TOKENS = 8192  # the longest texts for which steps grow by themselves, of models that see them as a whole
_PAGES_AT_A_TIME = 64  # pages of which the compiler is asked how many bytes they take


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The devices that programs are compiled for: those of one copy of the model.

    Args:
      sharding: where arrays lie that every device has whole; its devices may be of another machine (jax.experimental.topologies). Its mesh,
        if it has several, says how they share the model; see jaxserve.sharding.
      memory_bytes: what programs and data may take of each device, if it is there.
    """

    platform: Platform
    sharding: Sharding
    memory_bytes: int = 0

    @property
    def devices(self) -> tuple[Device, ...]:
        """In the order of the mesh."""
        mesh = mesh_of(self.sharding)
        return tuple(self.sharding.device_set if mesh is None else mesh.devices.flat)


def platform_of(device: Device) -> Platform:
    """Whose kernels a device runs."""
    return cast(Platform, device.platform if device.platform in ("cpu", "tpu") else "gpu")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes of an engine, with every default settled.

    Args:
      max_rows: S at most, and the number of slots.
      max_step_tokens, max_mixed_tokens: T at most; at most while any row decodes, see Scheduler.
      max_len: tokens of a request at most.
      page_size: tokens of a page.
    """

    max_rows: int
    max_step_tokens: int
    max_mixed_tokens: int
    max_len: int
    page_size: int


def settle_limits(config: EngineConfig, spec: ModelSpec, platform: Platform) -> Limits:
    """Fill in what the configuration leaves open, by platform and model; a text that is seen as a whole must fit into a step."""
    on_cpu = platform == "cpu"
    max_rows = config.schedule.max_rows or (64 if on_cpu else 256)
    max_len = config.model.max_len or spec.max_len
    at_least = 0 if spec.is_causal else min(max_len, _WHOLE_TEXT_TOKENS)
    max_step_tokens = config.schedule.max_step_tokens or max(512 if on_cpu else 2048, at_least)
    max_mixed_tokens = config.schedule.max_mixed_tokens
    if max_mixed_tokens is None and config.schedule.performance_mode == "throughput":
        max_mixed_tokens = 0 if on_cpu else max_step_tokens  # elsewhere rows that decode ride along with the weights that prompts read
    elif max_mixed_tokens is None:
        max_mixed_tokens = max(max_step_tokens // 4, 1)
    return Limits(
        max_rows=max_rows, max_step_tokens=max(max_step_tokens, max_rows), max_mixed_tokens=max_mixed_tokens,
        max_len=max_len if spec.is_causal else min(max_len, max(max_step_tokens, max_rows)),
        page_size=config.cache.page_size or (128 if on_cpu else 16),
    )  # fmt: skip


class Programs:
    """The programs of one copy of a model, none of them compiled yet. Shapes are those of one device's arrays.

    Args:
      spec, config: the model, and how it is to be run.
      target: what to compile for.
    """

    def __init__(self, spec: ModelSpec, config: EngineConfig, target: Target) -> None:
        on_cpu = target.platform == "cpu"
        default = "float32" if on_cpu else "bfloat16"
        dtype = jnp.dtype(default if config.model.dtype == "auto" else config.model.dtype)
        self._cache_dtype = dtype if config.cache.cache_dtype == "auto" else jnp.dtype(config.cache.cache_dtype)
        loop = config.compile.layer_loop
        self._spec, self._target = spec, target
        self.limits = settle_limits(config, spec, target.platform)
        self.groups = fold_layers(spec.layers, scan=loop == "scan" or (loop == "auto" and target.platform == "tpu"))
        self._mesh, self._split = mesh_of(target.sharding), split_of(target.sharding)
        model = Decoder(spec, self.groups, dtype=dtype, platform=target.platform, split=self._split)
        self._graphdef, self.param_shapes = split_model(model)
        # A table is read row by row; left to itself a TPU may store it column by column, and turn it round in every step.
        by_rows = {"embed.weight": (0, 1)} if target.platform == "tpu" else {}
        self.placements = {
            path: Placement(target=target.sharding, cuts=cuts, stacked=path.startswith("groups."), order=by_rows.get(path))
            for path, cuts in model_cuts(model).items()
        }
        self.whole_shapes = self.param_shapes
        if self._mesh is not None:
            self.whole_shapes = split_model(Decoder(spec, self.groups, dtype=dtype, platform=target.platform))[1]
        self._pool, max_rows = spec.pool, self.limits.max_rows
        state = slot_state_shapes(max_rows, spec.vocab_size) if spec.pool is None else pool_state_shapes(max_rows, spec.width)
        self.state_shapes: Any = state
        self.shapes = make_shapes(config, max_rows=max_rows, max_step_tokens=self.limits.max_step_tokens, pools=spec.pool is not None)
        self.pages_a_row = -(-self.limits.max_len // self.limits.page_size)
        # A CPU pays for the head of every padding row; elsewhere reading its weights twice would cost more, but logits take memory.
        # Devices that share a model each have the logits of all rows for sampling, and less memory for them.
        sample_rows = 16 if on_cpu else 64 if self._mesh is None else 32
        self.layouts = {shape: self._layout(shape, sample_rows, head_once=not on_cpu) for shape in self.shapes}

    def _layout(self, shape: StepShape, sample_rows: int, *, head_once: bool) -> WordLayout:
        whole = shape.kind == "decode" and not head_once
        return WordLayout(shape, self.pages_a_row, sample_rows=shape.rows if whole else sample_rows, head_once=head_once)

    def cache_shapes(self, num_pages: int) -> Any:
        """Abstract KVCache of so many pages."""
        return self._cache_shapes(num_pages, of_all=False)

    def _cache_shapes(self, num_pages: int, *, of_all: bool) -> Any:
        return cache_shapes(
            self.groups, num_pages=num_pages, page_size=self.limits.page_size, dtype=self._cache_dtype, platform=self._target.platform,
            split=self._split, of_all=of_all,
        )  # fmt: skip

    def _cache_specs(self) -> Any:
        return cache_specs(self.groups, split=self._split, platform=self._target.platform)

    def page_bytes(self) -> int:
        """Bytes that one page takes over all layers, with the padding of the device's tiles."""
        if self._target.platform == "cpu":
            return num_bytes(jax.tree.leaves(self.cache_shapes(1)))
        memory = self.lower_cache(_PAGES_AT_A_TIME).compile().memory_analysis()
        assert memory is not None, "compilers of devices with memory of their own give one"
        return -(-memory.output_size_in_bytes // _PAGES_AT_A_TIME)

    def lower_cache(self, num_pages: int) -> jax.stages.Lowered:
        """A program that makes a cache: of zeros, but on a CPU of what its memory happens to hold, which takes none until it is used."""
        shapes = self._cache_shapes(num_pages, of_all=True)
        make = empty if self._target.platform == "cpu" and self._mesh is None else jnp.zeros
        caches = functools.partial(jax.tree.map, lambda leaf: make(leaf.shape, leaf.dtype), shapes)
        return jax.jit(caches, out_shardings=self._formats(shapes)).lower()

    def identity(self, num_pages: int) -> str:
        """Everything that shapes the programs, but for the devices and the versions of what compiles them."""
        parts = self._spec, self.groups, self.limits, self._mesh, self.param_shapes, self.cache_shapes(num_pages), self.state_shapes
        return "\n".join(map(repr, (*parts, self.layouts)))

    def make_state(self) -> Any:
        """The sampling state, zeroed."""
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=self._target.sharding), self.state_shapes)

    def _make_step(self, shape: StepShape) -> Step:
        layout = self.layouts[shape]
        return make_step(self._graphdef, layout) if self._pool is None else make_pool_step(self._graphdef, layout, self._pool.method)

    def lower_step(self, shape: StepShape, num_pages: int) -> jax.stages.Lowered:
        """The step of a shape: (params, cache, state, packed words) -> (cache, state, StepOutputs)."""
        cache, sharding = self._cache_shapes(num_pages, of_all=True), self._target.sharding
        words = jax.ShapeDtypeStruct((self.layouts[shape].num_words,), jnp.int32)
        placed, params, step = self.placements, self.param_shapes, self._make_step(shape)
        if self._mesh is not None:
            params = {path: jax.ShapeDtypeStruct(placed[path].shape(leaf.shape), leaf.dtype) for path, leaf in params.items()}
            whole, caches, specs = PartitionSpec(), self._cache_specs(), {path: placement.spec for path, placement in placed.items()}
            step = jax.shard_map(
                step, mesh=self._mesh, in_specs=(specs, caches, whole, whole), out_specs=(caches, whole, whole), check_vma=False
            )  # every device samples, from the same logits and with the same numbers
        jitted = jax.jit(
            step, donate_argnums=(1, 2),
            in_shardings=({path: placement.format for path, placement in placed.items()}, self._formats(cache), sharding, sharding),
            out_shardings=(self._formats(cache), sharding, sharding),
        )  # fmt: skip
        return jitted.lower(params, cache, self.state_shapes, words)

    def lower_seed_slot(self) -> jax.stages.Lowered:
        """The program that gives a slot to a request; see seed_slot."""
        scalar, ids = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((SEEN_CHUNK,), jnp.int32)
        flag = jax.ShapeDtypeStruct((), jnp.bool_)
        row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.state_shapes.row)
        seed = jax.jit(seed_slot, donate_argnums=0, in_shardings=self._target.sharding, out_shardings=self._target.sharding)
        return seed.lower(self.state_shapes, scalar, flag, ids, ids, row)

    def lower_set_masks(self) -> jax.stages.Lowered:
        """The program that takes in which tokens slots may sample; see set_masks."""
        slots = jax.ShapeDtypeStruct((MASK_CHUNK,), jnp.int32)
        masks = jax.ShapeDtypeStruct((MASK_CHUNK, *self.state_shapes.mask.shape[1:]), jnp.int32)
        program = jax.jit(set_masks, donate_argnums=0, in_shardings=self._target.sharding, out_shardings=self._target.sharding)
        return program.lower(self.state_shapes, slots, masks)

    def _formats(self, cache: KVCache) -> Any:
        """Where a cache lies, and how: row by row, as kernels read it and write it in place. The compiler's own choice may be another."""
        sharding, on_cpu = self._target.sharding, self._target.platform == "cpu"
        if self._mesh is None:
            return sharding if on_cpu else jax.tree.map(lambda leaf: Format(Layout(tuple(range(leaf.ndim))), sharding), cache)

        mesh = self._mesh

        def place(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> Any:
            named = NamedSharding(mesh, spec)
            return named if on_cpu else Format(Layout(tuple(range(leaf.ndim))), named)

        return jax.tree.map(place, cache, self._cache_specs())
