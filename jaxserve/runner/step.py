"""The jitted functions: one step of the engine, and the seeding of a slot's sampling state.

step: packed words -> batch -> decoder -> rows that sample -> logits -> tokens. Cache and slot state are donated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.models.decoder import Decoder
from jaxserve.models.kv_cache import KVCache
from jaxserve.models.params import ModelGraph, Params, merge_model
from jaxserve.runner.pack import Layout, unpack
from jaxserve.runner.sampling import Logprobs, SamplingRows, SlotState, sample, token_logprobs

_SCORE_CHUNK = 32  # tokens whose logits exist at a time while a prompt is scored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepOutputs:
    """What a step gives back.

    Args:
      tokens: i32[S]; meaningful for rows that sample.
      logprobs: of those tokens; zeros if no row wants them.
      prompt: of each token's successor in its prompt, [T]; None unless the shape is of kind score.
      pooled: f32[S, width], vectors of the rows whose texts are complete, instead of tokens; None unless the shape is of kind pool.
    """

    tokens: jax.Array
    logprobs: Logprobs | None
    prompt: Logprobs | None
    pooled: jax.Array | None = None


Step = Callable[[Params, KVCache, Any, jax.Array], tuple[KVCache, Any, StepOutputs]]


def make_step(graphdef: ModelGraph, layout: Layout) -> Step:
    """The step of one shape, to be jitted with the cache and the state donated."""

    def step(params: Params, cache: KVCache, state: SlotState, packed: jax.Array) -> tuple[KVCache, SlotState, StepOutputs]:
        model = merge_model(graphdef, params)
        batch, rows, targets = unpack(packed, layout, state.last_token)
        last = jnp.clip(batch.query_start[1:] - 1, 0, layout.shape.tokens - 1)
        hidden, cache = model(batch, cache, last if layout.shape.kind == "prefill" else None)
        rows_hidden = hidden[last] if layout.shape.kind == "score" else hidden
        tokens, logprobs, state = _sample_rows(model, rows_hidden, rows, state, layout)
        prompt = _score(model, hidden, targets) if layout.shape.kind == "score" else None
        return cache, state, StepOutputs(tokens=tokens, logprobs=logprobs, prompt=prompt)

    step.__name__ = f"step_{layout.shape.name}"
    return step


def _sample_rows(
    model: Decoder, hidden: jax.Array, rows: SamplingRows, state: SlotState, layout: Layout
) -> tuple[jax.Array, Logprobs, SlotState]:
    """Head and sampler over the last hidden states [S, D] of the rows, some rows at a time, up to the last row that samples."""
    S, width = hidden.shape[0], layout.sample_rows
    if width >= S:
        return _sample_block(model.logits(hidden), rows, state)
    padded_rows = jax.tree.map(lambda leaf: jnp.pad(leaf, (0, -S % width)), rows)
    padded_rows = dataclasses.replace(padded_rows, slot=jnp.pad(rows.slot, (0, -S % width), constant_values=-1))
    source = model.own_logits(hidden) if layout.head_once else hidden
    source = jnp.pad(source, ((0, -S % width), (0, 0)))
    num_used = jnp.max(jnp.where(rows.slot >= 0, jnp.arange(S) + 1, 0))

    def sample_at(start: jax.Array, state: SlotState) -> tuple[jax.Array, Logprobs, SlotState]:
        here, its_rows = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, width), (source, padded_rows))
        return _sample_block(model.gather_logits(here) if layout.head_once else model.logits(here), its_rows, state)

    shapes = jax.eval_shape(sample_at, jnp.int32(0), state)
    empty = jax.tree.map(lambda leaf: jnp.zeros((len(source), *leaf.shape[1:]), leaf.dtype), shapes[:2])

    def body(block: jax.Array, carry: tuple[Any, SlotState]) -> tuple[Any, SlotState]:
        outputs, state = carry
        start = block * width
        tokens, logprobs, state = sample_at(start, state)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return jax.tree.map(put, outputs, (tokens, logprobs)), state

    (tokens, logprobs), state = jax.lax.fori_loop(0, -(-num_used // width), body, (empty, state))
    return tokens[:S], jax.tree.map(lambda leaf: leaf[:S], logprobs), state


def _sample_block(logits: jax.Array, rows: SamplingRows, state: SlotState) -> tuple[jax.Array, Logprobs, SlotState]:
    with jax.named_scope("sample"):
        return sample(logits, rows, state)


def _score(model: Decoder, hidden: jax.Array, targets: jax.Array) -> Logprobs:
    """Log-probabilities of i32[T] targets after hidden states [T, D], a chunk of logits at a time."""
    T, D = hidden.shape
    chunks = -(-T // _SCORE_CHUNK)
    pad = chunks * _SCORE_CHUNK - T
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(chunks, _SCORE_CHUNK, D)
    targets = jnp.pad(targets, (0, pad)).reshape(chunks, _SCORE_CHUNK)
    scored = jax.lax.map(lambda chunk: token_logprobs(model.logits(chunk[0]), chunk[1]), (hidden, targets))
    return jax.tree.map(lambda leaf: leaf.reshape(chunks * _SCORE_CHUNK, *leaf.shape[2:])[:T], scored)
