"""Sampling on the device: every feature in one fixed pytree with neutral values, none of them recompiles anything.

1. Logits of the rows that sample, float32.
2. Bans (min_tokens, bad_words), logit_bias, penalties and masks (structured outputs, allowed_token_ids), for batches that have any.
3. Temperature, min_p, top_k, top_p, for batches that have any; then one uniform number a row picks from the distribution.
4. Log-probabilities of the raw logits, for batches that want any.

A row's random number depends on its seed and on the position of the token alone, so that its tokens do not depend on its company.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.request import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
)

PENALTIES, BIAS, MIN_TOKENS, LOGPROBS, MASK, BAD_WORDS, CHOSEN, GRAMMAR = 1, 2, 4, 8, 16, 32, 64, 128
MAX_EOS = 16  # end-of-sequence ids of a model
MAX_BANNED = MAX_STOP_TOKEN_IDS + MAX_EOS
INVALID_TOKEN = -1  # sampled from logits that are not finite
NO_TOKEN = -2  # sampled where bans and masks leave nothing
ANY_TOKEN = -1  # matches whatever was sampled, in bad words
NOT_SAMPLED = -2  # matches no token of a bad word
SEEN_CHUNK = 1024  # token ids that one call of seed_slot takes
MASK_CHUNK = 8  # masks that one call of set_masks takes
_ABOVE_ONE = 0x3F800001  # the bits of the float32 after 1
_GREEDY_BELOW = 1e-5  # temperatures that vLLM takes for 0
_BLOCKS = 256  # of the vocabulary, for the two-level search of the distribution


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SlotRow:
    """What a request brings along to its slot; of all slots, with a leading axis M, in the SlotState.

    Args:
      bias_ids, bias_values: [MAX_LOGIT_BIAS] logit_bias, ids padded with V.
      banned: i32[MAX_BANNED], ids that min_tokens forbids, padded with V.
      bad_words: i32[MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS], each at the end of its row behind ANY_TOKEN; unused ones end in V.
      recent: i32[MAX_BAD_WORD_TOKENS - 1], the tokens sampled last, NOT_SAMPLED before the first; kept for requests with bad words.
      chosen: i32[MAX_LOGPROB_TOKEN_IDS], ids whose log-probabilities are wanted, padded with V.
    """

    bias_ids: jax.Array
    bias_values: jax.Array
    banned: jax.Array
    bad_words: jax.Array
    recent: jax.Array
    chosen: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """What the device remembers per slot between steps; donated.

    Args:
      last_token: i32[M], the token sampled last.
      seen: i32[M, V], twice the count in the output, plus one if the prompt has it; kept for requests with penalties.
      mask: i32[M, ceil(V / 32)], a bit per token that may be sampled next, of slots with structured outputs or allowed_token_ids.
      row: what the requests brought along.
    """

    last_token: jax.Array
    seen: jax.Array
    mask: jax.Array
    row: SlotRow


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """Per-row parameters of one step, each [S]; slot is -1 for rows that do not sample, position that of the sampled token."""

    slot: jax.Array
    seed: jax.Array
    position: jax.Array
    wants: jax.Array
    top_k: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    repetition_penalty: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """Log-probability and 1-based rank of a token, [S], the best MAX_LOGPROBS tokens, [S, MAX_LOGPROBS], and the slot's chosen ones.

    Of prompts, where none are chosen, `chosen` is f32[S, 0].
    """

    logprob: jax.Array
    rank: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array
    chosen: jax.Array


def slot_state_shapes(max_rows: int, vocab_size: int) -> SlotState:
    """Abstract SlotState."""

    def make(*dims: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((max_rows, *dims), dtype)

    return SlotState(
        last_token=make(), seen=make(vocab_size), mask=make(-(-vocab_size // 32)),
        row=SlotRow(
            bias_ids=make(MAX_LOGIT_BIAS), bias_values=make(MAX_LOGIT_BIAS, dtype=jnp.float32), banned=make(MAX_BANNED),
            bad_words=make(MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), recent=make(MAX_BAD_WORD_TOKENS - 1), chosen=make(MAX_LOGPROB_TOKEN_IDS),
        ),
    )  # fmt: skip


def seed_slot(state: SlotState, slot: jax.Array, first: jax.Array, ids: jax.Array, amount: jax.Array, row: SlotRow) -> SlotState:
    """Give a slot to a request: what it brings along, and its tokens so far, SEEN_CHUNK at a time.

    Args:
      first: bool[], forget what the slot's last request had seen.
      ids: i32[SEEN_CHUNK], padded with V. amount: i32[SEEN_CHUNK], 1 for a prompt token not yet counted, 2 for an output token.
    """
    before = jnp.where(first, 0, state.seen[slot])
    added = jnp.zeros_like(before).at[ids].add(amount, mode="drop")
    # Prompt tokens count once, however often they occur.
    counted = before + (added // 2) * 2 + jnp.where((added % 2 == 1) & (before % 2 == 0), 1, 0)
    rows = jax.tree.map(lambda leaf, one: leaf.at[slot].set(one), state.row, row)
    return dataclasses.replace(state, seen=state.seen.at[slot].set(counted), row=rows)


def set_masks(state: SlotState, slots: jax.Array, masks: jax.Array) -> SlotState:
    """Say which tokens some slots may sample in the next step.

    Args:
      slots: i32[MASK_CHUNK], padded with the number of slots.
      masks: i32[MASK_CHUNK, ceil(V / 32)].
    """
    return dataclasses.replace(state, mask=state.mask.at[slots].set(masks, mode="drop"))


def sample(logits: jax.Array, rows: SamplingRows, state: SlotState) -> tuple[jax.Array, Logprobs, SlotState]:
    """Sample one token per row of f32[S, V].

    Returns: i32[S] tokens (INVALID_TOKEN where the logits are not finite, NO_TOKEN where none is allowed), their log-probabilities, and the
    state with them counted.
    """
    slot = jnp.maximum(rows.slot, 0)
    live = rows.slot >= 0
    wants = jnp.where(live, rows.wants, 0)
    allowed = jax.lax.cond(jnp.any(wants & MASK), lambda: _mask(logits, wants, slot, state), lambda: logits)
    adjusted = jax.lax.cond(
        jnp.any(wants & (PENALTIES | BIAS | MIN_TOKENS | BAD_WORDS)), lambda: _adjust(allowed, rows, wants, slot, state), lambda: allowed
    )
    greedy, best = _argmax(adjusted)
    random = live & (rows.temperature >= _GREEDY_BELOW)
    tokens = jax.lax.cond(jnp.any(random), lambda: jnp.where(random, _draw(adjusted, rows, random), greedy), lambda: greedy)
    tokens = jnp.where(jnp.isfinite(best), tokens, jnp.where(best == -jnp.inf, NO_TOKEN, INVALID_TOKEN))

    def shown() -> jax.Array:
        """What log-probabilities are of, as in vLLM: the model's logits, without what a grammar forbids."""
        return jnp.where((wants & GRAMMAR > 0)[:, None], allowed, logits)

    logprobs = jax.lax.cond(jnp.any(wants & LOGPROBS), lambda: token_logprobs(shown(), tokens), lambda: _no_logprobs(tokens.shape[0]))
    chosen = jax.lax.cond(
        jnp.any(wants & CHOSEN), lambda: _chosen_logprobs(shown(), state.row.chosen[slot]),
        lambda: jnp.zeros((len(tokens), MAX_LOGPROB_TOKEN_IDS)),
    )  # fmt: skip
    return tokens, dataclasses.replace(logprobs, chosen=chosen), _remember(state, rows.slot, wants, jnp.maximum(tokens, 0))


def _remember(state: SlotState, slot: jax.Array, wants: jax.Array, token: jax.Array) -> SlotState:
    """The state after i32[S] tokens were sampled in the slots; -1 for rows that did not sample."""
    target = jnp.where(slot >= 0, slot, state.last_token.shape[0])  # out of range: dropped
    counted = jnp.where(wants & PENALTIES, 2, 0)
    seen = jax.lax.fori_loop(  # a TPU passes over all of it; GPUs would copy what comes out of a cond
        0, jnp.any(counted > 0).astype(jnp.int32), lambda _, seen: seen.at[target, token].add(counted, mode="drop"), state.seen
    )
    recalled = jnp.where(wants & BAD_WORDS, target, state.last_token.shape[0])

    def recall(recent: jax.Array) -> jax.Array:
        moved = jnp.concatenate([recent[jnp.maximum(slot, 0), 1:], token[:, None]], axis=-1)
        return recent.at[recalled].set(moved, mode="drop")

    recent = jax.lax.cond(jnp.any(wants & BAD_WORDS), recall, lambda recent: recent, state.row.recent)
    return dataclasses.replace(
        state, last_token=state.last_token.at[target].set(token, mode="drop"), seen=seen,
        row=dataclasses.replace(state.row, recent=recent),
    )  # fmt: skip


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> Logprobs:
    """Log-probabilities under f32[S, V] of i32[S] tokens and of the best ones."""
    total = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=-1)
    width = min(MAX_LOGPROBS, logits.shape[-1])
    top, ids = jax.lax.top_k(logits, width)
    pad = ((0, 0), (0, MAX_LOGPROBS - width))
    return Logprobs(
        logprob=own[:, 0] - total, rank=1 + jnp.sum(logits > own, axis=-1, dtype=jnp.int32),
        top_ids=jnp.pad(ids, pad), top_logprobs=jnp.pad(top - total[:, None], pad, constant_values=-jnp.inf),
        chosen=jnp.zeros((len(tokens), 0)),
    )  # fmt: skip


def _chosen_logprobs(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Log-probabilities under f32[S, V] of i32[S, C] tokens."""
    found = jnp.take_along_axis(logits, jnp.minimum(ids, logits.shape[-1] - 1), axis=-1)
    return found - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _no_logprobs(S: int) -> Logprobs:
    return Logprobs(
        logprob=jnp.zeros(S),
        rank=jnp.zeros(S, jnp.int32),
        top_ids=jnp.zeros((S, MAX_LOGPROBS), jnp.int32),
        top_logprobs=jnp.zeros((S, MAX_LOGPROBS)),
        chosen=jnp.zeros((S, 0)),
    )


def _mask(logits: jax.Array, wants: jax.Array, slot: jax.Array, state: SlotState) -> jax.Array:
    """Only what the masks of the rows allow."""
    S, V = logits.shape
    words = jnp.where((wants & MASK)[:, None] > 0, state.mask[slot], -1)
    allowed = (words[:, :, None] >> jnp.arange(32)) & 1  # [S, ceil(V / 32), 32]
    return jnp.where(allowed.reshape(S, -1)[:, :V] > 0, logits, -jnp.inf)


def _adjust(logits: jax.Array, rows: SamplingRows, wants: jax.Array, slot: jax.Array, state: SlotState) -> jax.Array:
    """Bans, then bias, then penalties, in vLLM's order; rows that want none keep their logits."""
    S, V = logits.shape
    index = jnp.arange(S)[:, None]
    logits = logits.at[index, jnp.where((wants & MIN_TOKENS)[:, None] > 0, state.row.banned[slot], V)].set(-jnp.inf, mode="drop")
    bias_ids = state.row.bias_ids[slot]
    beyond = V + jnp.arange(MAX_LOGIT_BIAS)  # no two alike: sorting so many indices takes the TPU compiler ten seconds a step
    bias_ids = jnp.where((wants & BIAS > 0)[:, None] & (bias_ids < V), bias_ids, beyond)
    logits = logits.at[index, bias_ids].add(state.row.bias_values[slot], mode="drop", unique_indices=True)

    def ban_words() -> jax.Array:
        words, recent = state.row.bad_words[slot], state.row.recent[slot]
        before, last = words[:, :, :-1], words[:, :, -1]  # [S, MAX_BAD_WORDS, ...]
        matches = jnp.all((before == ANY_TOKEN) | (before == recent[:, None]), axis=-1) & (wants & BAD_WORDS > 0)[:, None]
        return logits.at[index, jnp.where(matches, last, V)].set(-jnp.inf, mode="drop")

    def penalize() -> jax.Array:
        seen = jnp.where((wants & PENALTIES)[:, None] > 0, state.seen[slot], 0)
        count = (seen // 2).astype(jnp.float32)
        repetition = rows.repetition_penalty[:, None]
        repeated = jnp.where(adjusted > 0, adjusted / repetition, adjusted * repetition)
        penalized = jnp.where(seen > 0, repeated, adjusted)
        return penalized - rows.frequency_penalty[:, None] * count - rows.presence_penalty[:, None] * (count > 0)

    adjusted = jax.lax.cond(jnp.any(wants & BAD_WORDS), ban_words, lambda: logits)
    return jax.lax.cond(jnp.any(wants & PENALTIES), penalize, lambda: adjusted)


def _argmax(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first of the largest logits [S, V], and that logit: NaN wins every maximum.

    In two levels, since XLA's own argmax carries indices along: 0.6 against 3.8 ms for 32 rows of 49,152 on two cores.
    """
    S, V = logits.shape
    width = -(-V // _BLOCKS)
    blocks = jnp.pad(logits, ((0, 0), (0, width * _BLOCKS - V)), constant_values=-jnp.inf).reshape(S, _BLOCKS, width)
    best = blocks.max(axis=-1)
    block = jnp.argmax(best, axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * width + jnp.argmax(inside, axis=-1)).astype(jnp.int32), best.max(axis=-1)


def _draw(logits: jax.Array, rows: SamplingRows, random: jax.Array) -> jax.Array:
    """A token of each row's tempered and truncated distribution; rows that are not random give anything."""
    temperature = jnp.where(random, rows.temperature, 1.0)[:, None]
    scaled = logits / temperature
    weights = jnp.exp(scaled - scaled.max(axis=-1, keepdims=True))  # the likeliest weighs 1
    truncated = random & ((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0))
    weights = jax.lax.cond(jnp.any(truncated), lambda: _truncate(weights, rows), lambda: weights)
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), position))(
        rows.seed, rows.position
    )
    uniform = jax.vmap(jax.random.uniform)(keys)
    return _invert(weights, uniform)


def _truncate(weights: jax.Array, rows: SamplingRows) -> jax.Array:
    """Zero what min_p, top_k and top_p drop; tokens as likely as the last one kept are kept too."""
    V = weights.shape[-1]
    weights = jnp.where(weights >= rows.min_p[:, None], weights, 0.0)
    top_k = jnp.where((rows.top_k > 0) & (rows.top_k < V), rows.top_k, V).astype(jnp.float32)
    weights = _keep_above(weights, (weights > 0).astype(jnp.float32), top_k)
    top_p = jnp.where(rows.top_p < 1, rows.top_p, 2.0)  # 2: more than there is, so that everything is kept
    return _keep_above(weights, weights, top_p * weights.sum(axis=-1))


def _keep_above(weights: jax.Array, mass: jax.Array, needed: jax.Array) -> jax.Array:
    """Keep the largest weights until their mass reaches `needed` [S], by bisection over the bits of the threshold.

    Weights are in [0, 1], where float32 orders like its bits; 31 halvings find the exact threshold.
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # mass(>= low) is enough, mass(>= high) is not
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(bits >= middle[:, None], mass, 0.0), axis=-1) >= needed
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    S = weights.shape[0]
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros(S, jnp.int32), jnp.full(S, _ABOVE_ONE, jnp.int32)))
    return jnp.where(bits >= low[:, None], weights, 0.0)


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The token at which the cumulated weights [S, V] pass uniform [S] of their sum, found in two levels."""
    S, V = weights.shape
    width = -(-V // _BLOCKS)
    blocks = jnp.pad(weights, ((0, 0), (0, width * _BLOCKS - V))).reshape(S, _BLOCKS, width)
    cumulated = jnp.cumsum(blocks.sum(axis=-1), axis=-1)
    target = uniform * cumulated[:, -1]
    block = jnp.sum(cumulated <= target[:, None], axis=-1)
    block = jnp.minimum(block, _last_positive(blocks.sum(axis=-1)))
    before = jnp.where(block > 0, jnp.take_along_axis(cumulated, jnp.maximum(block - 1, 0)[:, None], axis=-1)[:, 0], 0.0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    token = jnp.sum(jnp.cumsum(inside, axis=-1) <= (target - before)[:, None], axis=-1)
    return (block * width + jnp.minimum(token, _last_positive(inside))).astype(jnp.int32)


def _last_positive(weights: jax.Array) -> jax.Array:
    """Index of the last positive weight of each row: rounding must not walk past it."""
    return weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
