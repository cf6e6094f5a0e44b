"""The jitted functions: one step of the engine, and the seeding of a slot's sampling state.

step: packed words -> batch -> decoder -> rows that sample -> logits -> tokens. Cache and slot state are donated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxserve.models.decoder import Decoder
from jaxserve.models.kv_cache import KVCache
from jaxserve.models.params import ModelGraph, Params, merge_model
from jaxserve.runner.pack import Layout, unpack
from jaxserve.runner.sampling import Logprobs, SlotState, sample, token_logprobs

_SCORE_CHUNK = 32  # tokens whose logits exist at a time while a prompt is scored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepOutputs:
    """What a step gives back.

    Args:
      tokens: i32[S]; meaningful for rows that sample.
      logprobs: of those tokens; zeros if no row wants them.
      prompt: of each token's successor in its prompt, [T]; None unless the shape is of kind score.
    """

    tokens: jax.Array
    logprobs: Logprobs
    prompt: Logprobs | None


Step = Callable[[Params, KVCache, SlotState, jax.Array], tuple[KVCache, SlotState, StepOutputs]]


def make_step(graphdef: ModelGraph, layout: Layout) -> Step:
    """The step of one shape, to be jitted with the cache and the state donated."""

    def step(params: Params, cache: KVCache, state: SlotState, packed: jax.Array) -> tuple[KVCache, SlotState, StepOutputs]:
        model = merge_model(graphdef, params)
        batch, rows, targets = unpack(packed, layout, state.last_token)
        hidden, cache = model(batch, cache)
        last = jnp.clip(batch.query_start[1:] - 1, 0, layout.shape.tokens - 1)
        logits = model.logits(hidden if layout.shape.kind == "decode" else hidden[last])
        with jax.named_scope("sample"):
            tokens, logprobs, state = sample(logits, rows, state)
        prompt = _score(model, hidden, targets) if layout.shape.kind == "score" else None
        return cache, state, StepOutputs(tokens=tokens, logprobs=logprobs, prompt=prompt)

    step.__name__ = f"step_{layout.shape.name}"
    return step


def _score(model: Decoder, hidden: jax.Array, targets: jax.Array) -> Logprobs:
    """Log-probabilities of i32[T] targets after hidden states [T, D], a chunk of logits at a time."""
    T, D = hidden.shape
    chunks = -(-T // _SCORE_CHUNK)
    pad = chunks * _SCORE_CHUNK - T
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(chunks, _SCORE_CHUNK, D)
    targets = jnp.pad(targets, (0, pad)).reshape(chunks, _SCORE_CHUNK)
    scored = jax.lax.map(lambda chunk: token_logprobs(model.logits(chunk[0]), chunk[1]), (hidden, targets))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:T], scored)
