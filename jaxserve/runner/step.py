"""The jitted functions: the two programs of a step.

1. forward, one for each shape: packed words -> batch -> decoder -> the hidden states of the rows. The cache is donated.
2. sample, one for each number of rows, whatever the shape: hidden states -> logits -> tokens. The state of the slots is donated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.models.decoder import Decoder
from jaxserve.models.kv_cache import KVCache
from jaxserve.models.params import ModelGraph, Params, merge_model
from jaxserve.runner.pack import Layout, unpack, unpack_rows
from jaxserve.runner.sampling import Logprobs, SamplingRows, SlotState, sample, token_logprobs

_SCORE_CHUNK = 32  # tokens whose logits exist at a time while a prompt is scored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForwardOutputs:
    """What the decoder gives back.

    Args:
      hidden: [M, D], of the last token of each row, from the first on; zeros beyond S.
      rows: i32[ROW_WORDS, M], what sampling wants to know of them; see unpack_rows.
      prompt: of each token's successor in its prompt, [T]; None unless the shape is of kind score.
    """

    hidden: jax.Array
    rows: jax.Array
    prompt: Logprobs | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepOutputs:
    """What a step gives back.

    Args:
      tokens: i32[S], of the rows up to the last one that samples or beyond; meaningful for those that sample. Of a step in which none
        does, some array that is there when the step is done.
      logprobs: of those tokens; zeros if no row wants them, None if none samples.
      prompt: see ForwardOutputs.
      pooled: f32[S, width], vectors of the rows whose texts are complete, instead of tokens; None unless the shape is of kind pool.
    """

    tokens: jax.Array
    logprobs: Logprobs | None
    prompt: Logprobs | None
    pooled: jax.Array | None = None


Forward = Callable[[Params, KVCache, jax.Array, jax.Array], tuple[KVCache, ForwardOutputs]]
Sample = Callable[[Params, SlotState, jax.Array, jax.Array], tuple[SlotState, jax.Array, Logprobs]]


def make_forward(graphdef: ModelGraph, layout: Layout) -> Forward:
    """The decoder's part of the step of one shape, to be jitted with the cache donated."""

    def forward(params: Params, cache: KVCache, last_token: jax.Array, packed: jax.Array) -> tuple[KVCache, ForwardOutputs]:
        model = merge_model(graphdef, params)
        batch, rows, targets = unpack(packed, layout, last_token)
        last = jnp.clip(batch.query_start[1:] - 1, 0, layout.shape.tokens - 1)
        hidden, cache = model(batch, cache, last if layout.shape.kind == "prefill" else None)
        prompt = _score(model, hidden, targets) if layout.shape.kind == "score" else None
        hidden = hidden[last] if layout.shape.kind == "score" else hidden
        hidden = jnp.pad(hidden, ((0, layout.max_rows - layout.shape.rows), (0, 0)))
        return cache, ForwardOutputs(hidden=hidden, rows=rows, prompt=prompt)

    forward.__name__ = f"forward_{layout.shape.name}"
    return forward


def make_sample(graphdef: ModelGraph, param_shapes: Mapping[str, Any], *, num_rows: int, block_rows: int) -> Sample:
    """Head and sampler for the first num_rows rows of a step of any shape, to be jitted with the state donated.

    Args:
      param_shapes: abstract, of all parameters; the program takes those of the head alone.
      block_rows: rows that are sampled at a time.
    """

    def sample_rows(head: Params, state: SlotState, hidden: jax.Array, rows: jax.Array) -> tuple[SlotState, jax.Array, Logprobs]:
        model = merge_model(graphdef, {**param_shapes, **head})
        own = model.own_logits(hidden[:num_rows])  # of all at once: what takes long is to read the head's weights
        tokens, logprobs, state = _sample_blocks(model, own, unpack_rows(rows[:, :num_rows]), state, block_rows)
        return state, tokens, logprobs

    sample_rows.__name__ = f"sample_{num_rows}"
    return sample_rows


def _sample_blocks(
    model: Decoder, own: jax.Array, rows: SamplingRows, state: SlotState, width: int
) -> tuple[jax.Array, Logprobs, SlotState]:
    """Sample from this device's logits [S, V], `width` rows at a time, up to the last row that samples."""
    S = own.shape[0]
    if width >= S:
        return _sample_block(model.gather_logits(own), rows, state)
    padded_rows = jax.tree.map(lambda leaf: jnp.pad(leaf, (0, -S % width)), rows)
    padded_rows = dataclasses.replace(padded_rows, slot=jnp.pad(rows.slot, (0, -S % width), constant_values=-1))
    own = jnp.pad(own, ((0, -S % width), (0, 0)))
    num_used = jnp.max(jnp.where(rows.slot >= 0, jnp.arange(S) + 1, 0))

    def sample_at(start: jax.Array, state: SlotState) -> tuple[jax.Array, Logprobs, SlotState]:
        here, its_rows = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, width), (own, padded_rows))
        return _sample_block(model.gather_logits(here), its_rows, state)

    shapes = jax.eval_shape(sample_at, jnp.int32(0), state)
    empty = jax.tree.map(lambda leaf: jnp.zeros((len(own), *leaf.shape[1:]), leaf.dtype), shapes[:2])

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
