"""What an engine compiles: the abstract arguments of its steps, and their lowering for the device at hand or for one that is not."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, cast

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
from jaxserve.runner.pack import ROW_WORDS
from jaxserve.runner.pack import Layout as WordLayout
from jaxserve.runner.pooling import make_pool_step, pool_state_shapes
from jaxserve.runner.sampling import MASK_CHUNK, SEEN_CHUNK, seed_slot, set_masks, slot_state_shapes
from jaxserve.runner.shapes import StepShape, make_shapes
from jaxserve.runner.step import make_forward, make_sample
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


class _Argument(NamedTuple):
    """Of a program, or a result: abstract arrays, how devices share them, and where they lie."""

    shapes: Any
    specs: Any
    formats: Any


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
        self._dtype, loop = dtype, config.compile.layer_loop
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
        self.layouts = {shape: WordLayout(shape, self.pages_a_row, max_rows) for shape in self.shapes}
        # One that takes max_rows is always there; prompts that end in a step are few, and pay for the head of as few rows.
        self.sample_sizes = tuple(shape.rows for shape in self.shapes if shape.kind == "decode")
        # What sampling makes of logits takes several times their memory, of which devices that share a model have less.
        self._block_rows = max_rows if on_cpu else 64 if self._mesh is None else 32
        self.head_paths = tuple(path for path in self.param_shapes if path.split(".")[0] in model.head_parts)

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
        return "\n".join(map(repr, (*parts, self.layouts, self.sample_sizes, self._block_rows)))

    def make_state(self) -> Any:
        """The sampling state, zeroed."""
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=self._target.sharding), self.state_shapes)

    def lower_step(self, shape: StepShape, num_pages: int) -> jax.stages.Lowered:
        """The program of a shape; see make_forward, and make_pool_step for models that give vectors."""
        layout = self.layouts[shape]
        words = jax.ShapeDtypeStruct((layout.num_words,), jnp.int32)
        cache = self._cache_shapes(num_pages, of_all=True)
        cached = _Argument(cache, self._cache_specs() if self._mesh is not None else None, self._formats(cache))
        if self._pool is not None:
            step, state, donated = make_pool_step(self._graphdef, layout, self._pool.method), self.state_shapes, (1, 2)
        else:
            step, state, donated = make_forward(self._graphdef, layout), self.state_shapes.last_token, (1,)
        arguments = (self._params_argument(self.param_shapes), cached, self._whole(state), self._whole(words))
        return self._lower(step, arguments, (cached, self._whole(None)), donated)

    def lower_sample(self, num_rows: int) -> jax.stages.Lowered:
        """The program that samples for so many rows of a step; see make_sample."""
        sample = make_sample(self._graphdef, self.param_shapes, num_rows=num_rows, block_rows=self._block_rows)
        M = self.limits.max_rows
        hidden = jax.ShapeDtypeStruct((M, self._spec.width), self._dtype)
        words = jax.ShapeDtypeStruct((ROW_WORDS, M), jnp.int32)
        arguments = (self._params_argument(self.head_paths), *map(self._whole, (self.state_shapes, hidden, words)))
        return self._lower(sample, arguments, (self._whole(None),) * 3, (1,))

    def _params_argument(self, paths: Iterable[str]) -> _Argument:
        shapes, placed = self.param_shapes, self.placements
        if self._mesh is not None:
            shapes = {path: jax.ShapeDtypeStruct(placed[path].shape(leaf.shape), leaf.dtype) for path, leaf in shapes.items()}
        return _Argument(
            {path: shapes[path] for path in paths},
            {path: placed[path].spec for path in paths},
            {path: placed[path].format for path in paths},
        )

    def _whole(self, shapes: Any) -> _Argument:
        return _Argument(shapes, PartitionSpec(), self._target.sharding)

    def _lower(
        self, program: Callable[..., Any], arguments: Sequence[_Argument], results: Sequence[_Argument], donated: tuple[int, ...]
    ) -> jax.stages.Lowered:
        if self._mesh is not None:  # every device samples, from the same logits and with the same numbers
            program = jax.shard_map(
                program, mesh=self._mesh, in_specs=tuple(each.specs for each in arguments),
                out_specs=tuple(each.specs for each in results), check_vma=False,
            )  # fmt: skip
        jitted = jax.jit(
            program, donate_argnums=donated, in_shardings=tuple(each.formats for each in arguments),
            out_shardings=tuple(each.formats for each in results),
        )  # fmt: skip
        return jitted.lower(*(each.shapes for each in arguments))

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
