"""The two programs of a step: rows are sampled alike by every sampler, and it takes the head's parameters and no others."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jaxserve.config import make_config
from jaxserve.models.families import find_family
from jaxserve.models.spec import ModelSpec
from jaxserve.request import Request, SamplingParams
from jaxserve.runner.pack import INTS, ROW_WORDS, Layout, Packer, unpack_rows
from jaxserve.runner.programs import Programs, Target
from jaxserve.runner.sampling import PENALTIES
from jaxserve.runner.shapes import StepShape
from jaxserve.runner.step import make_sample
from jaxserve.scheduler.schedule import Row, Schedule
from jaxserve.weights.checkpoint import read_config
from tests.tiny import tiny_model

M, USED = 7, 5
FLOATS_OF_A_ROW = (0.9, 0.95, 0.01, 0.1, 0.2, 1.1)


@functools.cache
def spec_of(*, tied: bool) -> ModelSpec:
    config = read_config(tiny_model())
    return dataclasses.replace(find_family(config).spec(config), tied=tied)


@functools.cache
def programs_of(*, tied: bool = True) -> Programs:
    target = Target(platform="cpu", sharding=SingleDeviceSharding(jax.devices("cpu")[0]))
    sizes = {"max_rows": M, "decode_rows": (2, USED, M), "prefill_tokens": (8,), "max_step_tokens": 8, "max_len": 64, "page_size": 16}
    return Programs(spec_of(tied=tied), make_config(sizes), target)


@functools.cache
def sampled(*, num_rows: int, block_rows: int, live: tuple[int, ...]) -> tuple[list[int], np.ndarray, Any]:
    """Tokens of the live rows, their log-probabilities, and the state after them."""
    programs = programs_of()
    rng = np.random.default_rng(0)
    head = {path: jnp.asarray(rng.normal(size=programs.param_shapes[path].shape), jnp.float32) for path in programs.head_paths}
    hidden = jnp.asarray(rng.normal(size=(M, programs._spec.width)), jnp.float32)
    words = np.zeros((ROW_WORDS, M), np.int32)
    ints = dict(zip(INTS, words, strict=False))
    ints["slot"][:] = [M - 1 - i if i in live else -1 for i in range(M)]
    ints["seed"][:], ints["position"][:], ints["wants"][:] = range(M), 9, PENALTIES
    words[len(INTS) :] = np.array(FLOATS_OF_A_ROW, np.float32).view(np.int32)[:, None]
    program = make_sample(programs._graphdef, programs.param_shapes, num_rows=num_rows, block_rows=block_rows)
    state, tokens, logprobs = jax.jit(program)(head, programs.make_state(), hidden, jnp.asarray(words))
    return np.asarray(tokens)[list(live)].tolist(), np.asarray(logprobs.logprob)[list(live)], jax.tree.map(np.asarray, state)


@pytest.mark.parametrize(("num_rows", "block_rows"), [(M, M), (M, 3)])
def test_rows_are_sampled_alike_by_every_sampler_and_in_blocks(num_rows: int, block_rows: int) -> None:
    live = (0, 2, USED - 1)
    tokens, logprobs, state = sampled(num_rows=USED, block_rows=USED, live=live)
    found_tokens, found_logprobs, found_state = sampled(num_rows=num_rows, block_rows=block_rows, live=live)
    assert found_tokens == tokens
    np.testing.assert_array_equal(found_logprobs, logprobs)
    jax.tree.map(np.testing.assert_array_equal, found_state, state)
    assert np.flatnonzero(state.seen.sum(axis=1)).tolist() == sorted(M - 1 - i for i in live)


@pytest.mark.parametrize(("tied", "matrix"), [(True, "embed.weight"), (False, "head.weight")])
def test_sampler_takes_the_parameters_of_the_head_alone(tied: bool, matrix: str) -> None:
    programs = programs_of(tied=tied)
    assert set(programs.head_paths) == {matrix, "final_norm.weight"}
    taken, *_ = programs.lower_sample(2).in_avals[0]
    assert set(taken) == set(programs.head_paths)


def test_there_is_a_sampler_for_each_size_of_decode_steps_whatever_the_other_shapes() -> None:
    assert set(programs_of().sample_sizes) == {2, USED, M}


def test_packed_rows_say_up_to_which_row_a_step_samples() -> None:
    layout = Layout(StepShape("prefill", 8, 6), num_pages=3, max_rows=M)
    packer = Packer(max_rows=M, num_pages=3)
    rows = []
    for slot, samples in enumerate((False, True, False)):
        params = SamplingParams(temperature=0.5 + slot, top_k=slot + 1)
        request = Request(id=str(slot), prompt_ids=[slot] * 5, params=params, seed=-1 - slot, slot=slot)
        packer.assign(request)
        rows.append(Row(request, start=1, count=4 if samples else 2, samples=samples))
    words = packer.pack(Schedule(rows=tuple(rows), preempted=(), num_tokens=8), layout)
    assert packer.num_sampled(words) == 2
    assert packer.num_sampled(packer.pack(Schedule(rows=tuple(rows[:1]), preempted=(), num_tokens=2), layout)) == 0
    found = unpack_rows(jnp.asarray(words[-ROW_WORDS * M :].reshape(ROW_WORDS, M)))
    assert found.slot.tolist() == [-1, 1] + [-1] * (M - 2)
    assert found.position.tolist()[:3] == [3, 5, 3]
    assert found.seed.tolist()[:3] == [2**32 - 1, 2**32 - 2, 2**32 - 3]
    assert found.top_k.tolist()[:3] == [1, 2, 3]
    assert found.temperature.tolist()[:3] == [0.5, 1.5, 2.5]
