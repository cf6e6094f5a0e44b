"""The device side of an engine: owns parameters, cache and sampling state; dispatches steps and collects their results."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.kv_cache import KVCache
from jaxserve.models.names import Family
from jaxserve.models.params import Params
from jaxserve.models.spec import ModelSpec
from jaxserve.request import MAX_LOGIT_BIAS, Request, TokenLogprobs
from jaxserve.runner.compile import compile_all
from jaxserve.runner.memory import MemoryPlan, num_bytes, plan_memory
from jaxserve.runner.pack import Packer
from jaxserve.runner.programs import Programs, this_machine
from jaxserve.runner.sampling import MASK_CHUNK, MAX_BANNED, MAX_EOS, SEEN_CHUNK, Logprobs, SlotState
from jaxserve.runner.shapes import StepShape, pick_shape
from jaxserve.runner.step import StepOutputs
from jaxserve.scheduler.schedule import Schedule
from jaxserve.weights.checkpoint import Checkpoint
from jaxserve.weights.load import load_params

log = logging.getLogger(__name__)


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


class Runner:
    """One model on one device.

    1. __init__ settles shapes and memory, without touching the device.
    2. load and compile, in any order or side by side.
    3. dispatch and collect, one thread.
    """

    def __init__(self, spec: ModelSpec, family: Family, config: EngineConfig, *, eos_ids: frozenset[int]) -> None:
        if len(eos_ids) > MAX_EOS:
            raise ConfigError(f"the model names {len(eos_ids)} end-of-sequence tokens; at most {MAX_EOS} are supported")
        self._config, self._spec, self._family, self._eos_ids = config, spec, family, eos_ids
        self._programs = Programs(spec, config, this_machine())
        self.limits, self.shapes = self._programs.limits, self._programs.shapes
        self.memory = self._plan_memory()
        self._packer = Packer(max_rows=self.limits.max_rows, num_pages=self._programs.pages_a_row)
        self._executables: dict[StepShape, Any] = {}
        self._seed_slot: Any = None
        self._set_masks: Any = None
        self._params: Params = {}
        self._cache: KVCache = ()
        self._state: SlotState

    def _plan_memory(self) -> MemoryPlan:
        limits, spec, programs = self.limits, self._spec, self._programs
        widest = max(layer.mlp.width for layer in spec.layers)
        temporaries = 4 * (3 * limits.max_rows * spec.vocab_size + limits.max_step_tokens * (8 * spec.width + 3 * widest))
        return plan_memory(
            self._config.cache,
            weights=num_bytes(programs.param_shapes.values()),
            state=num_bytes(jax.tree.leaves(programs.state_shapes)),
            temporaries=temporaries, page_bytes=programs.page_bytes(),
            page_size=limits.page_size, max_len=limits.max_len, max_pages=1 + limits.max_rows * programs.pages_a_row,
        )  # fmt: skip

    def load(self, checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> None:
        """Read the parameters; see load_params."""
        self._params = load_params(checkpoint, self._programs.param_shapes, self._programs.groups, self._family, progress=progress)

    def allocate(self) -> None:
        """Make the cache and the sampling state, zeroed."""
        self._cache = self._programs.lower_cache(self.memory.num_pages).compile()()
        self._state = self._programs.make_state()
        jax.block_until_ready((self._cache, self._state))

    def compile(self, progress: Callable[[int, int, str], None]) -> None:
        """Compile every shape; afterwards nothing compiles any more."""
        programs: dict[str, Callable[[], Any]] = {shape.name: functools.partial(self._compile_step, shape) for shape in self.shapes}
        programs["seed_slot"] = lambda: self._programs.lower_seed_slot().compile()
        programs["set_masks"] = lambda: self._programs.lower_set_masks().compile()
        compiled = compile_all(programs, threads=self._config.compile.compile_threads, progress=progress)
        self._seed_slot, self._set_masks = compiled["seed_slot"], compiled["set_masks"]
        self._executables = {shape: compiled[shape.name] for shape in self.shapes}
        temporaries = max(executable.memory_analysis().temp_size_in_bytes for executable in compiled.values())
        self.memory = dataclasses.replace(self.memory, temporaries=temporaries)

    def _compile_step(self, shape: StepShape) -> Any:
        return self._programs.lower_step(shape, self.memory.num_pages).compile()

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
        words = self._packer.pack(schedule, self._programs.layouts[shape])
        started_s = time.monotonic()
        self._cache, self._state, outputs = self._executables[shape](self._params, self._cache, self._state, words)
        outputs.tokens.copy_to_host_async()
        return Pending(schedule=schedule, shape=shape, outputs=outputs, started_s=started_s)

    def set_masks(self, slots: Sequence[int], masks: Sequence[np.ndarray]) -> None:
        """Say which tokens the slots of constrained requests may sample in the step dispatched next, as Matcher.fill gives them."""
        for start in range(0, len(slots), MASK_CHUNK):
            some = slots[start : start + MASK_CHUNK]
            padded = np.full(MASK_CHUNK, self.limits.max_rows, np.int32)
            padded[: len(some)] = some
            words = np.zeros((MASK_CHUNK, len(masks[0])), np.int32)
            words[: len(some)] = masks[start : start + MASK_CHUNK]
            self._state = self._set_masks(self._state, padded, words)

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
