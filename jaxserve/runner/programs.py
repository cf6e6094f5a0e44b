"""What an engine compiles: the abstract arguments of its steps, and their lowering for the device at hand or for one that is not."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding, SingleDeviceSharding

from jaxserve.config import EngineConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.kv_cache import KVCache, cache_shapes
from jaxserve.models.params import split_model
from jaxserve.models.spec import ModelSpec, fold_layers
from jaxserve.runner.memory import num_bytes
from jaxserve.runner.pack import Layout as WordLayout
from jaxserve.runner.sampling import MASK_CHUNK, SEEN_CHUNK, SlotState, seed_slot, set_masks, slot_state_shapes
from jaxserve.runner.shapes import StepShape, make_shapes
from jaxserve.runner.step import make_step

Platform = Literal["cpu", "tpu", "gpu"]
_PAGES_AT_A_TIME = 64  # pages of which the compiler is asked how many bytes they take


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The device that programs are compiled for.

    Args:
      sharding: where every array lies; its devices may be of another machine (jax.experimental.topologies).
    """

    platform: Platform
    sharding: Sharding


def this_machine() -> Target:
    """The first device that jax has."""
    device = jax.local_devices()[0]
    platform = device.platform if device.platform in ("cpu", "tpu") else "gpu"
    return Target(platform=cast(Platform, platform), sharding=SingleDeviceSharding(device))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes of an engine, with every default settled.

    Args:
      max_rows: S at most, and the number of slots.
      max_step_tokens, max_mixed_tokens: T at most; at most while any row decodes.
      max_len: tokens of a request at most.
      page_size: tokens of a page.
    """

    max_rows: int
    max_step_tokens: int
    max_mixed_tokens: int
    max_len: int
    page_size: int


def settle_limits(config: EngineConfig, spec: ModelSpec, platform: Platform) -> Limits:
    """Fill in what the configuration leaves open, by platform and model."""
    on_cpu = platform == "cpu"
    max_rows = config.schedule.max_rows or (64 if on_cpu else 256)
    max_step_tokens = config.schedule.max_step_tokens or (512 if on_cpu else 2048)
    return Limits(
        max_rows=max_rows, max_step_tokens=max(max_step_tokens, max_rows),
        max_mixed_tokens=config.schedule.max_mixed_tokens or max(max_step_tokens // 4, 1),
        max_len=config.model.max_len or spec.max_len, page_size=config.cache.page_size or (128 if on_cpu else 16),
    )  # fmt: skip


class Programs:
    """The programs of one model on one device, none of them compiled yet.

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
        self._target = target
        self.limits = settle_limits(config, spec, target.platform)
        self.groups = fold_layers(spec.layers, scan=loop == "scan" or (loop == "auto" and target.platform == "tpu"))
        self._graphdef, self.param_shapes = split_model(Decoder(spec, self.groups, dtype=dtype, platform=target.platform))
        self.state_shapes = slot_state_shapes(self.limits.max_rows, spec.vocab_size)
        self.shapes = make_shapes(config, max_rows=self.limits.max_rows, max_step_tokens=self.limits.max_step_tokens)
        self.pages_a_row = -(-self.limits.max_len // self.limits.page_size)
        # A CPU pays for the head of every padding row; elsewhere reading its weights twice would cost more, but logits take memory.
        self.layouts = {shape: self._layout(shape, 16 if on_cpu else 64, head_once=not on_cpu) for shape in self.shapes}

    def _layout(self, shape: StepShape, sample_rows: int, *, head_once: bool) -> WordLayout:
        whole = shape.kind == "decode" and not head_once
        return WordLayout(shape, self.pages_a_row, sample_rows=shape.rows if whole else sample_rows, head_once=head_once)

    def cache_shapes(self, num_pages: int) -> Any:
        """Abstract KVCache of so many pages."""
        return cache_shapes(
            self.groups, num_pages=num_pages, page_size=self.limits.page_size, dtype=self._cache_dtype, platform=self._target.platform
        )

    def page_bytes(self) -> int:
        """Bytes that one page takes over all layers, with the padding of the device's tiles."""
        if self._target.platform == "cpu":
            return num_bytes(jax.tree.leaves(self.cache_shapes(1)))
        memory = self.lower_cache(_PAGES_AT_A_TIME).compile().memory_analysis()
        assert memory is not None, "compilers of devices with memory of their own give one"
        return -(-memory.output_size_in_bytes // _PAGES_AT_A_TIME)

    def lower_cache(self, num_pages: int) -> jax.stages.Lowered:
        """A program that makes a cache of zeros."""
        shapes = self.cache_shapes(num_pages)
        zeros = functools.partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.jit(zeros, out_shardings=self._formats(shapes)).lower()

    def make_state(self) -> SlotState:
        """The sampling state, zeroed."""
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=self._target.sharding), self.state_shapes)

    def lower_step(self, shape: StepShape, num_pages: int) -> jax.stages.Lowered:
        """The step of a shape: (params, cache, state, packed words) -> (cache, state, StepOutputs)."""
        cache, sharding = self.cache_shapes(num_pages), self._target.sharding
        words = jax.ShapeDtypeStruct((self.layouts[shape].num_words,), jnp.int32)
        step = jax.jit(
            make_step(self._graphdef, self.layouts[shape]), donate_argnums=(1, 2),
            in_shardings=(sharding, self._formats(cache), sharding, sharding),
            out_shardings=(self._formats(cache), sharding, sharding),
        )  # fmt: skip
        return step.lower(self.param_shapes, cache, self.state_shapes, words)

    def lower_seed_slot(self) -> jax.stages.Lowered:
        """The program that gives a slot to a request; see seed_slot."""
        scalar, ids = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((SEEN_CHUNK,), jnp.int32)
        flag = jax.ShapeDtypeStruct((), jnp.bool_)
        row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.state_shapes)
        seed = jax.jit(seed_slot, donate_argnums=0, in_shardings=self._target.sharding, out_shardings=self._target.sharding)
        return seed.lower(self.state_shapes, scalar, flag, ids, ids, row.bias_ids, row.bias_values, row.banned)

    def lower_set_masks(self) -> jax.stages.Lowered:
        """The program that takes in which tokens slots may sample; see set_masks."""
        slots = jax.ShapeDtypeStruct((MASK_CHUNK,), jnp.int32)
        masks = jax.ShapeDtypeStruct((MASK_CHUNK, *self.state_shapes.mask.shape[1:]), jnp.int32)
        program = jax.jit(set_masks, donate_argnums=0, in_shardings=self._target.sharding, out_shardings=self._target.sharding)
        return program.lower(self.state_shapes, slots, masks)

    def _formats(self, cache: KVCache) -> Any:
        """Where a cache lies, and how: row by row, as kernels read it and write it in place. The compiler's own choice may be another."""
        if self._target.platform == "cpu":
            return self._target.sharding
        return jax.tree.map(lambda leaf: Format(Layout(tuple(range(leaf.ndim))), self._target.sharding), cache)
