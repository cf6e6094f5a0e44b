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
from numpy.typing import NDArray

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.kv_cache import KVCache
from jaxserve.models.names import Family
from jaxserve.models.params import Params
from jaxserve.models.spec import ModelSpec
from jaxserve.request import Request, TokenLogprobs
from jaxserve.runner.compile import compile_all
from jaxserve.runner.executables import Executables
from jaxserve.runner.memory import MemoryPlan, least_of_all, num_bytes, plan_memory
from jaxserve.runner.pack import Packer
from jaxserve.runner.programs import Programs, Target
from jaxserve.runner.sampling import MASK_CHUNK, MAX_EOS, Logprobs
from jaxserve.runner.seeding import needs_seed, pack_mask, slot_seeds
from jaxserve.runner.shapes import StepShape, pick_shape
from jaxserve.runner.step import StepOutputs
from jaxserve.scheduler.schedule import Schedule
from jaxserve.weights.checkpoint import Checkpoint
from jaxserve.weights.dummy import dummy_params
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
      pooled: f32[S, width], of models that give vectors; those of rows that "sampled" mean something.
    """

    tokens: list[tuple[int, ...]]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[list[TokenLogprobs] | None]
    pooled: NDArray[np.float32] | None = None


class Runner:
    """One copy of a model, on one device or dealt out to several.

    1. __init__ settles shapes and memory, without touching the device.
    2. load and compile, in any order or side by side.
    3. dispatch and collect, one thread.
    """

    def __init__(self, spec: ModelSpec, family: Family, config: EngineConfig, target: Target, *, eos_ids: frozenset[int]) -> None:
        if len(eos_ids) > MAX_EOS:
            raise ConfigError(f"the model names {len(eos_ids)} end-of-sequence tokens; at most {MAX_EOS} are supported")
        self._config, self._spec, self._family, self._eos_ids = config, spec, family, eos_ids
        self._target = target
        self._programs = Programs(spec, config, target)
        self.limits, self.shapes = self._programs.limits, self._programs.shapes
        self.memory = self._plan_memory()
        self._packer = Packer(max_rows=self.limits.max_rows, num_pages=self._programs.pages_a_row)
        self._executables: dict[str, Any] = {}
        self._tell: Callable[[str, Sequence[np.ndarray]], None] | None = None
        self._params: Params = {}
        self._head: Params = {}
        self._cache: KVCache = ()
        self._state: Any  # SlotState, or PoolState of models that give vectors

    def _plan_memory(self) -> MemoryPlan:
        limits, spec, programs = self.limits, self._spec, self._programs
        widest = max(layer.mlp.numbers_a_token(spec.width) for layer in spec.layers)
        logits = 0 if spec.pool else 3 * limits.max_rows * spec.vocab_size
        max_pages = limits.max_rows * programs.pages_a_row
        if not spec.is_causal:  # texts are computed whole, so that only those of two steps hold pages
            max_pages = min(max_pages, 2 * (limits.max_step_tokens // limits.page_size + limits.max_rows))
        temporaries = 4 * (logits + limits.max_step_tokens * (8 * spec.width + widest))
        plan = plan_memory(
            self._config.cache, total=self._target.memory_bytes, on_cpu=self._target.platform == "cpu",
            weights=num_bytes(programs.param_shapes.values()),
            state=num_bytes(jax.tree.leaves(programs.state_shapes)),
            temporaries=temporaries, page_bytes=programs.page_bytes(),
            page_size=limits.page_size, max_len=limits.max_len, max_pages=1 + max_pages,
        )  # fmt: skip
        num_pages = least_of_all(plan.num_pages)
        return dataclasses.replace(plan, num_pages=num_pages, cache=plan.cache // plan.num_pages * num_pages)

    def load(self, checkpoint: Checkpoint | None, progress: Callable[[int, int], None]) -> None:
        """Read the parameters, see load_params; without a checkpoint they are random numbers."""
        programs = self._programs
        if checkpoint is None:
            self._params = dummy_params(programs.param_shapes, programs.placements)
        else:
            self._params = load_params(
                checkpoint, programs.whole_shapes, programs.groups, self._family, progress=progress, placements=programs.placements
            )
        self._head = {path: self._params[path] for path in programs.head_paths}

    def allocate(self) -> None:
        """Make the cache and the sampling state, zeroed."""
        self._cache = self._programs.lower_cache(self.memory.num_pages).compile()()
        self._state = self._programs.make_state()
        jax.block_until_ready((self._cache, self._state))

    def compile(self, progress: Callable[[int, int, str], None]) -> None:
        """Compile every program; afterwards nothing compiles any more.

        Raises: ConfigError if the programs take more memory than there is.
        """
        lower, num_pages = self._programs, self.memory.num_pages
        lowers: dict[str, Callable[[], jax.stages.Lowered]] = {
            **{_sample_name(size): functools.partial(lower.lower_sample, size) for size in lower.sample_sizes},
            **{shape.name: functools.partial(lower.lower_step, shape, num_pages) for shape in self.shapes},
        }
        if self._spec.pool is None:
            lowers |= {"seed_slot": lower.lower_seed_slot, "set_masks": lower.lower_set_masks}
        programs = {name: functools.partial(self._compile_program, name, lower) for name, lower in lowers.items()}
        kept = Executables(self._config.cache_path / "programs", self._programs.identity(self.memory.num_pages), self._target.devices)
        ready = {name: functools.partial(kept.get, name, build) for name, build in programs.items()}
        compiled = compile_all(ready, threads=self._config.compile.compile_threads, progress=progress)
        self._executables = compiled
        temporaries = max(executable.memory_analysis().temp_size_in_bytes for executable in compiled.values())
        self.memory = dataclasses.replace(self.memory, temporaries=temporaries)
        if self._target.platform != "cpu":  # whose memory is shared with everything else, and grows
            self.memory.check()

    def _compile_program(self, name: str, lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
        lowered = lower()
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ConfigError(f"{name} does not fit:\n{self.memory.table()}\nthe compiler says: {error}") from None

    @property
    def usable(self) -> bool:
        """Whether the cache still exists: a step that failed on the device has taken it along."""
        return not any(leaf.is_deleted() for leaf in jax.tree.leaves((self._cache, self._state)))

    @property
    def num_programs(self) -> int:
        """Compiled for this copy."""
        return len(self._executables)

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
        if self._tell is not None:
            self._tell(shape.name, (words,))
        outputs = self._step(shape.name, words)
        outputs.tokens.copy_to_host_async()
        if outputs.pooled is not None:
            outputs.pooled.copy_to_host_async()
        return Pending(schedule=schedule, shape=shape, outputs=outputs, started_s=started_s)

    def set_masks(self, slots: Sequence[int], masks: Sequence[np.ndarray]) -> None:
        """Say which tokens the slots of constrained requests may sample in the step dispatched next, as Matcher.fill gives them."""
        for start in range(0, len(slots), MASK_CHUNK):
            some = slots[start : start + MASK_CHUNK]
            padded = np.full(MASK_CHUNK, self.limits.max_rows, np.int32)
            padded[: len(some)] = some
            words = np.zeros((MASK_CHUNK, len(masks[0])), np.int32)
            words[: len(some)] = masks[start : start + MASK_CHUNK]
            self._update("set_masks", padded, words)

    def lead(self, tell: Callable[[str, Sequence[np.ndarray]], None]) -> None:
        """Call `tell` with every program that is run from here on and with its arrays, before it runs, for others to `replay`."""
        self._tell = tell

    def replay(self, program: str, arrays: Sequence[np.ndarray]) -> None:
        """Run a program as another process does; what comes out stays on the devices."""
        if program in ("seed_slot", "set_masks"):
            _, *like = self._executables[program].in_avals[0]
            self._state = self._executables[program](self._state, *jax.tree.unflatten(jax.tree.structure(like), arrays))
        else:
            self._step(program, arrays[0])

    def _step(self, name: str, words: np.ndarray) -> StepOutputs:
        run = self._executables[name]
        if self._spec.pool is not None:
            self._cache, (self._state, outputs) = run(self._params, self._cache, self._state, words)
            return outputs
        self._cache, forward = run(self._params, self._cache, self._state.last_token, words)
        num_sampled = self._packer.num_sampled(words)
        if not num_sampled:
            return StepOutputs(tokens=forward.rows, logprobs=None, prompt=forward.prompt)
        sample = self._executables[_sample_name(min(size for size in self._programs.sample_sizes if size >= num_sampled))]
        self._state, tokens, logprobs = sample(self._head, self._state, forward.hidden, forward.rows)
        return StepOutputs(tokens=tokens, logprobs=logprobs, prompt=forward.prompt)

    def _update(self, name: str, *arguments: Any) -> None:
        if self._tell is not None:
            self._tell(name, [np.asarray(leaf) for leaf in jax.tree.leaves(arguments)])
        self._state = self._executables[name](self._state, *arguments)

    def collect(self, pending: Pending) -> StepResult:
        """Wait for a step and read what it gave."""
        rows = pending.schedule.rows
        sampled = np.asarray(pending.outputs.tokens).tolist()
        tokens: list[tuple[int, ...]] = [(sampled[i],) if row.samples else () for i, row in enumerate(rows)]
        logprobs: list[TokenLogprobs | None] = [None] * len(rows)
        if any(row.samples and row.request.params.num_logprobs is not None for row in rows):
            host = jax.tree.map(np.asarray, pending.outputs.logprobs)
            for i, row in enumerate(rows):
                params = row.request.params
                if row.samples and params.num_logprobs is not None:
                    logprobs[i] = _token_logprobs(host, i, sampled[i], params.num_logprobs, params.logprob_token_ids)
        pooled = None if pending.outputs.pooled is None else np.asarray(pending.outputs.pooled)
        return StepResult(tokens=tokens, logprobs=logprobs, prompt_logprobs=self._prompt_logprobs(pending), pooled=pooled)

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
        vocab_size = self._spec.vocab_size
        if needs_seed(request):
            for seed in slot_seeds(request, vocab_size, self._eos_ids):
                self._update("seed_slot", np.int32(request.slot), *seed)
        if request.params.allowed_token_ids is not None and request.constraint is None:  # else it is part of every mask
            self.set_masks([request.slot], [pack_mask(request.params.allowed_token_ids, vocab_size)])


def _sample_name(num_rows: int) -> str:
    return f"sample_{num_rows}"


def _token_logprobs(host: Logprobs, i: int, token: int, num_top: int, chosen: Sequence[int] = ()) -> TokenLogprobs:
    """Row i of host arrays, with the best tokens or the chosen ones; -inf becomes the lowest finite float, as JSON has no infinity."""
    lowest = -9999.0  # vLLM's stand-in for minus infinity
    ids, values = (chosen, host.chosen) if chosen else (host.top_ids[i, :num_top].tolist(), host.top_logprobs)
    top = tuple((token_id, max(value, lowest)) for token_id, value in zip(ids, values[i, : len(ids)].tolist(), strict=True))
    return TokenLogprobs(token_id=token, logprob=max(float(host.logprob[i]), lowest), rank=int(host.rank[i]), top=top)
