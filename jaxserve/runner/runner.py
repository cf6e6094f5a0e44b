"""The device side of an engine: owns parameters, cache and sampling state; dispatches steps and collects their results."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.kv_cache import KVCache, cache_shapes, page_bytes
from jaxserve.models.names import Family
from jaxserve.models.params import Params, split_model
from jaxserve.models.spec import ModelSpec, fold_layers
from jaxserve.request import MAX_LOGIT_BIAS, Request, TokenLogprobs
from jaxserve.runner.compile import compile_all
from jaxserve.runner.memory import MemoryPlan, num_bytes, plan_memory
from jaxserve.runner.pack import Layout, Packer
from jaxserve.runner.sampling import MAX_BANNED, SEEN_CHUNK, Logprobs, SlotState, seed_slot, slot_state_shapes
from jaxserve.runner.shapes import StepShape, make_shapes, pick_shape
from jaxserve.runner.step import StepOutputs, make_step
from jaxserve.scheduler.schedule import Schedule
from jaxserve.weights.checkpoint import Checkpoint
from jaxserve.weights.load import load_params

log = logging.getLogger(__name__)


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A step that the device is working on; started_s is the monotonic time of its dispatch."""

    schedule: Schedule
    shape: StepShape
    outputs: StepOutputs
    started_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step gave each row of its schedule.

    Args:
      tokens: sampled ids, empty for a row that did not sample.
      logprobs: of the sampled token, for rows that want them.
      prompt_logprobs: of the prompt tokens at start + 1 .. start + count, for rows that want them.
    """

    tokens: list[tuple[int, ...]]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[list[TokenLogprobs] | None]


def settle_limits(config: EngineConfig, spec: ModelSpec) -> Limits:
    """Fill in what the configuration leaves open, by platform and model."""
    on_cpu = jax.default_backend() == "cpu"
    max_rows = config.schedule.max_rows or (64 if on_cpu else 256)
    max_step_tokens = config.schedule.max_step_tokens or (512 if on_cpu else 2048)
    return Limits(
        max_rows=max_rows, max_step_tokens=max(max_step_tokens, max_rows),
        max_mixed_tokens=config.schedule.max_mixed_tokens or max(max_step_tokens // 4, 1),
        max_len=config.model.max_len or spec.max_len, page_size=config.cache.page_size,
    )  # fmt: skip


class Runner:
    """One model on one device.

    1. __init__ settles shapes and memory, without touching the device.
    2. load and compile, in any order or side by side.
    3. dispatch and collect, one thread.
    """

    def __init__(self, spec: ModelSpec, family: Family, config: EngineConfig, *, eos_ids: frozenset[int]) -> None:
        on_cpu = jax.default_backend() == "cpu"
        default = "float32" if on_cpu else "bfloat16"
        dtype = jnp.dtype(default if config.model.dtype == "auto" else config.model.dtype)
        cache_dtype = dtype if config.cache.cache_dtype == "auto" else jnp.dtype(config.cache.cache_dtype)
        loop = config.compile.layer_loop
        self.limits = settle_limits(config, spec)
        self._config, self._spec, self._family, self._eos_ids = config, spec, family, eos_ids
        self._groups = fold_layers(spec.layers, scan=loop == "scan" or (loop == "auto" and jax.default_backend() == "tpu"))
        self._graphdef, self._param_shapes = split_model(Decoder(spec, self._groups, dtype=dtype))
        self._state_shapes = slot_state_shapes(self.limits.max_rows, spec.vocab_size)
        self.shapes = make_shapes(config, max_rows=self.limits.max_rows, max_step_tokens=self.limits.max_step_tokens)
        pages_a_row = -(-self.limits.max_len // self.limits.page_size)
        self.memory = self._plan_memory(cache_dtype, pages_a_row)
        self._cache_shapes = cache_shapes(self._groups, num_pages=self.memory.num_pages, page_size=self.limits.page_size, dtype=cache_dtype)
        # A CPU pays for the head of every padding row; elsewhere reading its weights twice would cost more.
        sample_rows = 16 if on_cpu else self.limits.max_rows
        self._layouts = {shape: Layout(shape, pages_a_row, shape.rows if shape.kind == "decode" else sample_rows) for shape in self.shapes}
        self._packer = Packer(max_rows=self.limits.max_rows, num_pages=pages_a_row)
        self._executables: dict[StepShape, Any] = {}
        self._seed_slot: Any = None
        self._params: Params = {}
        self._cache: KVCache = ()
        self._state: SlotState

    def _plan_memory(self, cache_dtype: jnp.dtype, pages_a_row: int) -> MemoryPlan:
        limits, spec = self.limits, self._spec
        widest = max(layer.mlp.width for layer in spec.layers)
        temporaries = 4 * (3 * limits.max_rows * spec.vocab_size + limits.max_step_tokens * (8 * spec.width + 3 * widest))
        return plan_memory(
            self._config.cache,
            weights=num_bytes(self._param_shapes.values()),
            state=num_bytes(jax.tree.leaves(self._state_shapes)),
            temporaries=temporaries,
            page_bytes=page_bytes(self._groups, page_size=limits.page_size, dtype=cache_dtype),
            page_size=limits.page_size, max_len=limits.max_len, max_pages=1 + limits.max_rows * pages_a_row,
        )  # fmt: skip

    def load(self, checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> None:
        """Read the parameters; see load_params."""
        self._params = load_params(checkpoint, self._param_shapes, self._groups, self._family, progress=progress)

    def allocate(self) -> None:
        """Make the cache and the sampling state, zeroed."""
        self._cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._cache_shapes)
        self._state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._state_shapes)
        jax.block_until_ready((self._cache, self._state))

    def compile(self, progress: Callable[[int, int, str], None]) -> None:
        """Compile every shape; afterwards nothing compiles any more."""
        programs: dict[str, Callable[[], Any]] = {shape.name: functools.partial(self._compile_step, shape) for shape in self.shapes}
        programs["seed_slot"] = self._compile_seed_slot
        compiled = compile_all(programs, threads=self._config.compile.compile_threads, progress=progress)
        self._seed_slot = compiled["seed_slot"]
        self._executables = {shape: compiled[shape.name] for shape in self.shapes}
        temporaries = max(executable.memory_analysis().temp_size_in_bytes for executable in compiled.values())
        self.memory = dataclasses.replace(self.memory, temporaries=temporaries)

    def _compile_step(self, shape: StepShape) -> Any:
        words = jax.ShapeDtypeStruct((self._layouts[shape].num_words,), jnp.int32)
        step = jax.jit(make_step(self._graphdef, self._layouts[shape]), donate_argnums=(1, 2))
        return step.lower(self._param_shapes, self._cache_shapes, self._state_shapes, words).compile()

    def _compile_seed_slot(self) -> Any:
        scalar, ids = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((SEEN_CHUNK,), jnp.int32)
        flag = jax.ShapeDtypeStruct((), jnp.bool_)
        row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self._state_shapes)
        return (
            jax.jit(seed_slot, donate_argnums=0)
            .lower(self._state_shapes, scalar, flag, ids, ids, row.bias_ids, row.bias_values, row.banned)
            .compile()
        )

    @property
    def usable(self) -> bool:
        """Whether the cache still exists: a step that failed on the device has taken it along."""
        return not any(leaf.is_deleted() for leaf in jax.tree.leaves((self._cache, self._state)))

    def dispatch(self, schedule: Schedule) -> Pending:
        """Send a step to the device; returns at once.

        Raises: whatever the device raises; see `usable` afterwards.
        """
        shape = pick_shape(self.shapes, schedule)
        for row in schedule.rows:
            if self._packer.assign(row.request):
                self._seed(row.request)
        words = self._packer.pack(schedule, self._layouts[shape])
        started_s = time.monotonic()
        self._cache, self._state, outputs = self._executables[shape](self._params, self._cache, self._state, words)
        outputs.tokens.copy_to_host_async()
        return Pending(schedule=schedule, shape=shape, outputs=outputs, started_s=started_s)

    def collect(self, pending: Pending) -> StepResult:
        """Wait for a step and read what it gave."""
        rows = pending.schedule.rows
        sampled = np.asarray(pending.outputs.tokens).tolist()
        tokens: list[tuple[int, ...]] = [(sampled[i],) if row.samples else () for i, row in enumerate(rows)]
        logprobs: list[TokenLogprobs | None] = [None] * len(rows)
        if any(row.samples and row.request.params.logprobs is not None for row in rows):
            host = jax.tree.map(np.asarray, pending.outputs.logprobs)
            for i, row in enumerate(rows):
                if row.samples and row.request.params.logprobs is not None:
                    logprobs[i] = _token_logprobs(host, i, sampled[i], row.request.params.logprobs)
        return StepResult(tokens=tokens, logprobs=logprobs, prompt_logprobs=self._prompt_logprobs(pending))

    def _prompt_logprobs(self, pending: Pending) -> list[list[TokenLogprobs] | None]:
        result: list[list[TokenLogprobs] | None] = [None] * len(pending.schedule.rows)
        if pending.outputs.prompt is None:
            return result
        host = jax.tree.map(np.asarray, pending.outputs.prompt)
        at = 0
        for i, row in enumerate(pending.schedule.rows):
            request = row.request
            wanted = request.params.prompt_logprobs
            if wanted is not None and row.start < len(request.prompt_ids):
                following = request.prompt_ids[row.start + 1 : row.start + row.count + 1]
                result[i] = [_token_logprobs(host, at + j, token, wanted) for j, token in enumerate(following)]
            at += row.count
        return result

    def _seed(self, request: Request) -> None:
        """Give a slot's sampling state to its new request, if the request will look at it."""
        params, vocab = request.params, self._spec.vocab_size
        if not (params.has_penalties or params.logit_bias or params.min_tokens):
            return
        bias_ids, bias_values = np.full(MAX_LOGIT_BIAS, vocab, np.int32), np.zeros(MAX_LOGIT_BIAS, np.float32)
        bias = params.logit_bias or {}
        bias_ids[: len(bias)], bias_values[: len(bias)] = list(bias), list(bias.values())
        banned = np.full(MAX_BANNED, vocab, np.int32)
        stops = sorted(self._eos_ids | request.stop_ids)
        banned[: len(stops)] = stops
        ids, amounts = [], []
        if params.has_penalties:
            prompt = sorted(set(request.prompt_ids))
            ids, amounts = prompt + request.output_ids, [1] * len(prompt) + [2] * len(request.output_ids)
        for start in range(0, max(len(ids), 1), SEEN_CHUNK):
            chunk = ids[start : start + SEEN_CHUNK]
            padded, amount = np.full(SEEN_CHUNK, vocab, np.int32), np.zeros(SEEN_CHUNK, np.int32)
            padded[: len(chunk)], amount[: len(chunk)] = chunk, amounts[start : start + SEEN_CHUNK]
            self._state = self._seed_slot(
                self._state, np.int32(request.slot), np.bool_(start == 0), padded, amount, bias_ids, bias_values, banned
            )  # fmt: skip


def _token_logprobs(host: Logprobs, i: int, token: int, num_top: int) -> TokenLogprobs:
    """Row i of host arrays; -inf becomes the lowest finite float, as JSON has no infinity."""
    lowest = -9999.0  # vLLM's stand-in for minus infinity
    top = tuple(
        (int(token_id), max(float(value), lowest))
        for token_id, value in zip(host.top_ids[i, :num_top], host.top_logprobs[i, :num_top], strict=True)
    )
    return TokenLogprobs(token_id=token, logprob=max(float(host.logprob[i]), lowest), rank=int(host.rank[i]), top=top)
