"""The device sampler against a plain numpy one, row by row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxserve.request import MAX_BAD_WORD_TOKENS, MAX_LOGPROBS, Request, SamplingParams
from jaxserve.runner.sampling import (
    BAD_WORDS,
    BIAS,
    CHOSEN,
    GRAMMAR,
    INVALID_TOKEN,
    LOGPROBS,
    MASK,
    MASK_CHUNK,
    MIN_TOKENS,
    NO_TOKEN,
    PENALTIES,
    Logprobs,
    SamplingRows,
    SlotState,
    sample,
    seed_slot,
    set_masks,
    slot_state_shapes,
)
from jaxserve.runner.seeding import pack_mask, slot_seeds

V, M = 300, 5
NEUTRAL = {"seed": 0, "position": 7, "wants": 0, "top_k": 0, "temperature": 1.0, "top_p": 1.0, "min_p": 0.0}
NEUTRAL |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
run = jax.jit(sample)


def rows_of(*rows: dict[str, Any]) -> SamplingRows:
    full = [{"slot": i, **NEUTRAL, **row} for i, row in enumerate(rows)]
    floats = {"temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"}
    dtypes = {field.name: "float32" if field.name in floats else "int32" for field in dataclasses.fields(SamplingRows)} | {"seed": "uint32"}
    return SamplingRows(**{name: jnp.asarray([row[name] for row in full], dtype) for name, dtype in dtypes.items()})


def fresh_state() -> SlotState:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), slot_state_shapes(M, V))


def request_of(*, prompt: Sequence[int] = (), output: Sequence[int] = (), bad_words: Any = (), **params: Any) -> Request:
    made = Request(id="r", prompt_ids=list(prompt), params=SamplingParams(**params), bad_words=tuple(map(tuple, bad_words)))
    made.output_ids.extend(output)
    return made


def seeded(slot: int, *, banned: Sequence[int] = (), state: SlotState | None = None, **request: Any) -> SlotState:
    found = fresh_state() if state is None else state
    for seed in slot_seeds(request_of(**request), V, frozenset(banned)):
        found = jax.jit(seed_slot)(found, np.int32(slot), *seed)
    return found


def logits_of(num_rows: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((num_rows, V)) * 3).astype(np.float32)


@functools.cache
def _draws(num: int, **row: Any) -> np.ndarray:
    """Tokens drawn from one row of logits at `num` seeds."""
    logits = jnp.asarray(logits_of(1)[0])
    many = rows_of({**row, "slot": 0})

    def draw(seed: jax.Array) -> jax.Array:
        return sample(logits[None], dataclasses.replace(many, seed=seed[None]), fresh_state())[0][0]

    return np.asarray(jax.jit(lambda: jax.lax.map(draw, jnp.arange(num, dtype=jnp.uint32)))())


def expected_distribution(
    logits: np.ndarray, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    weights[weights < min_p] = 0
    order = np.argsort(-weights, kind="stable")
    if top_k:
        weights[order[top_k:]] = 0
    if top_p < 1:
        cumulated = np.cumsum(weights[order]) / weights.sum()
        weights[order[1:][cumulated[:-1] >= top_p]] = 0
    return weights / weights.sum()


TRUNCATIONS = [
    {},
    {"temperature": 0.5},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 1.7},
]


@pytest.mark.parametrize("params", TRUNCATIONS, ids=str)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    num = 4000
    counts = np.bincount(_draws(num, **params), minlength=V)
    expected = expected_distribution(logits_of(1)[0], **params)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    variance = np.maximum(num * expected[kept] * (1 - expected[kept]), 1)
    assert (((counts[kept] - num * expected[kept]) ** 2 / variance) < 25).all()  # five standard deviations in each of 300 cells
    if kept.sum() > 1:
        assert np.abs(counts / num - expected).sum() / 2 < 0.12


def test_zero_temperature_takes_the_likeliest() -> None:
    logits = logits_of(3)
    tokens, _, _ = run(jnp.asarray(logits), rows_of(*[{"temperature": 0.0}] * 3), fresh_state())
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_token_does_not_depend_on_neighbours_slot_or_row() -> None:
    logits, row = logits_of(1)[0], {"seed": 11, "top_p": 0.9, "temperature": 1.3}
    alone = int(run(jnp.asarray(logits[None]), rows_of(row), fresh_state())[0][0])
    crowd = logits_of(4, seed=5)
    crowd[2] = logits
    others = [{"temperature": 0.0}, {"top_k": 2, "seed": 3}, {**row, "slot": 4}, {"slot": 2, "min_p": 0.3}]
    tokens, _, _ = run(jnp.asarray(crowd), rows_of(*others), fresh_state())
    assert int(tokens[2]) == alone


def test_different_positions_draw_different_numbers() -> None:
    drawn = {int(run(jnp.zeros((1, V)), rows_of({"seed": 1, "position": p}), fresh_state())[0][0]) for p in range(12)}
    assert len(drawn) > 6


def test_penalties_follow_the_formula() -> None:
    prompt, output = [4, 4, 9], [7, 7, 7, 9]
    logits = logits_of(1)
    row = {
        "slot": 3,
        "temperature": 0.0,
        "wants": PENALTIES | LOGPROBS,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.5,
    }
    expected = logits[0].copy()
    for token in {*prompt, *output}:
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token in set(output):
        expected[token] -= 0.6 + 0.4 * output.count(token)
    for winner in (4, 7, 9, 20):  # each of them just above or below the best other token
        for margin in (-1e-3, 1e-3):
            shifted = expected.copy()
            best = np.delete(shifted, winner).max()
            raised = logits.copy()
            wanted = best + margin
            seen = winner in {*prompt, *output}
            before = wanted + (0.6 + 0.4 * output.count(winner) if winner in output else 0)
            raised[0, winner] = before * 1.5 if seen and before > 0 else before / 1.5 if seen else before
            tokens, _, _ = run(jnp.asarray(raised), rows_of(row), seeded(3, prompt=prompt, output=output, presence_penalty=0.6))
            assert (int(tokens[0]) == winner) == (margin > 0)


def test_sampled_tokens_count_towards_the_next_penalty() -> None:
    logits = np.zeros((1, V), np.float32)
    logits[0, [5, 6]] = [2.0, 1.5]
    row = {"slot": 1, "temperature": 0.0, "wants": PENALTIES, "frequency_penalty": 0.3}
    state, tokens = seeded(1), []
    for _ in range(4):
        token, _, state = run(jnp.asarray(logits), rows_of(row), state)
        tokens.append(int(token[0]))
    assert tokens == [5, 5, 6, 5]  # 2.0, 1.7 | 1.4 < 1.5 | 1.4 > 1.2


def test_stale_state_of_a_slot_does_not_reach_a_request_without_features() -> None:
    state = seeded(
        0, prompt=[1, 2], output=[3] * 9, presence_penalty=1.0, logit_bias={5: 100.0}, banned=[6], bad_words=[[logits_of(1)[0].argmax()]]
    )
    logits = logits_of(1)
    tokens, _, _ = run(jnp.asarray(logits), rows_of({"temperature": 0.0}), state)
    assert int(tokens[0]) == logits[0].argmax()


def test_seeding_forgets_the_last_request() -> None:
    state = seeded(2, prompt=[1], output=[3] * 9, presence_penalty=1.0)
    assert np.asarray(state.seen[2]).any()
    assert not np.asarray(seeded(2, state=state).seen[2]).any()


def test_logit_bias_and_min_tokens_move_the_choice() -> None:
    logits = logits_of(2)
    best = int(logits[0].argmax())
    state = seeded(0, logit_bias={17: 100.0}, banned=[17])
    biased = run(jnp.asarray(logits), rows_of({"temperature": 0.0, "wants": BIAS}, {"temperature": 0.0}), state)[0]
    assert [int(biased[0]), int(biased[1])] == [17, int(logits[1].argmax())]
    banned = run(jnp.asarray(logits[:1]), rows_of({"temperature": 0.0, "wants": MIN_TOKENS}), seeded(0, banned=[best]))[0]
    assert int(banned[0]) != best


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = logits_of(1)
    row = {"temperature": 0.2, "wants": LOGPROBS | BIAS, "seed": 5}
    tokens, logprobs, _ = run(jnp.asarray(logits), rows_of(row), seeded(0, logit_bias={int(logits[0].argmin()): 100.0}))
    token = int(tokens[0])
    exact = logits[0].astype(np.float64) - np.log(np.exp(logits[0].astype(np.float64)).sum())
    assert token == logits[0].argmin()
    assert isinstance(logprobs, Logprobs)
    np.testing.assert_allclose(logprobs.logprob[0], exact[token], atol=1e-5)
    assert int(logprobs.rank[0]) == V
    order = np.argsort(-exact)[:MAX_LOGPROBS]
    np.testing.assert_array_equal(logprobs.top_ids[0], order)
    np.testing.assert_allclose(logprobs.top_logprobs[0], exact[order], atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail_their_row_alone(bad: float) -> None:
    logits = logits_of(2)
    expected = logits[1].argmax()
    logits[0, 8] = bad
    tokens, _, _ = run(jnp.asarray(logits), rows_of({}, {"temperature": 0.0}), fresh_state())
    assert [int(tokens[0]), int(tokens[1])] == [INVALID_TOKEN, expected]


def test_rows_that_do_not_sample_change_no_state() -> None:
    state = seeded(0, prompt=[1], presence_penalty=1.0)
    _, _, after = run(jnp.asarray(logits_of(2)), rows_of({"slot": -1, "wants": PENALTIES}, {"slot": -1}), state)
    jax.tree.map(np.testing.assert_array_equal, state, after)


def masked(slots: Mapping[int, Sequence[int]]) -> SlotState:
    ids, words = np.full(MASK_CHUNK, M, np.int32), np.zeros((MASK_CHUNK, -(-V // 32)), np.int32)
    for place, (slot, allowed) in enumerate(slots.items()):
        ids[place], words[place] = slot, pack_mask(allowed, V)
    return jax.jit(set_masks)(fresh_state(), ids, words)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masked_rows_sample_what_their_mask_allows_and_others_what_they_did(temperature: float) -> None:
    rng = np.random.default_rng(5)
    allowed = {slot: sorted(rng.choice(V, 7, replace=False).tolist()) for slot in (0, 2, 4)}
    state = masked(allowed)
    for seed in range(20):
        logits = jnp.asarray(logits_of(M, seed))
        rows = [{"temperature": temperature, "seed": seed, "wants": MASK if slot in allowed else 0} for slot in range(M)]
        tokens, _, _ = run(logits, rows_of(*rows), state)
        plain, _, _ = run(logits, rows_of(*[{**row, "wants": 0} for row in rows]), fresh_state())
        for slot in range(M):
            if slot not in allowed:
                assert tokens[slot] == plain[slot]
                continue
            assert int(tokens[slot]) in allowed[slot]
            if temperature == 0:
                assert int(tokens[slot]) == max(allowed[slot], key=lambda token, slot=slot, logits=logits: float(logits[slot, token]))


def test_mask_outranks_bias_and_reaches_the_last_token() -> None:
    state = dataclasses.replace(seeded(1, logit_bias={5: 100.0, V - 1: -100.0}), mask=masked({1: [V - 1]}).mask)
    tokens, _, _ = run(jnp.asarray(logits_of(1)), rows_of({"slot": 1, "wants": MASK | BIAS}), state)
    assert int(tokens[0]) == V - 1


def test_logprobs_are_those_before_the_mask_but_after_a_grammar() -> None:
    logits = logits_of(1)
    _, found, _ = run(jnp.asarray(logits), rows_of({"wants": MASK | LOGPROBS}), masked({0: [7]}))
    assert float(found.logprob[0]) == pytest.approx(float(jax.nn.log_softmax(logits[0])[7]), abs=1e-5)
    _, found, _ = run(jnp.asarray(logits), rows_of({"wants": MASK | GRAMMAR | LOGPROBS}), masked({0: [7, 9]}))
    left = jax.nn.log_softmax(jnp.asarray(logits)[0, jnp.array([7, 9])])
    assert float(found.logprob[0]) == pytest.approx(float(left.max()), abs=1e-5)
    assert float(found.top_logprobs[0, 2]) == -np.inf


def test_draws_under_a_mask_follow_the_distribution_that_is_left() -> None:
    num, allowed = 3000, [3, 50, 120, 299]
    logits, state, one = jnp.asarray(logits_of(1)[0]), masked({0: allowed}), rows_of({"wants": MASK})

    def draw(seed: jax.Array) -> jax.Array:
        return sample(logits[None], dataclasses.replace(one, seed=seed[None]), state)[0][0]

    counts = np.bincount(np.asarray(jax.jit(lambda: jax.lax.map(draw, jnp.arange(num, dtype=jnp.uint32)))()), minlength=V)
    weights = np.exp(np.asarray(logits, np.float64)[allowed])
    expected = weights / weights.sum()
    assert counts.sum() == counts[allowed].sum() == num
    assert (np.abs(counts[allowed] - num * expected) < 5 * np.sqrt(num * expected * (1 - expected)) + 1).all()


def ban_by_hand(bad_words: Sequence[Sequence[int]], output: Sequence[int]) -> set[int]:
    """The tokens that would complete a bad word, as transformers' and vLLM's processors find them."""
    return {
        word[-1] for word in bad_words if tuple(output[len(output) - len(word) + 1 :]) == tuple(word[:-1]) and len(word) <= len(output) + 1
    }


def test_bad_words_ban_the_token_that_would_complete_one() -> None:
    rng = np.random.default_rng(3)
    for trial in range(40):
        words = [rng.integers(0, 4, rng.integers(1, 4)).tolist() for _ in range(5)] + [rng.integers(0, 4, MAX_BAD_WORD_TOKENS).tolist()]
        output = rng.integers(0, 4, rng.integers(0, 40)).tolist()
        logits = logits_of(1, trial)
        logits[0, 4:8] += 20  # what is left when all four are banned
        logits[0, :4] += 30
        banned = ban_by_hand(words, output)
        tokens, _, _ = run(
            jnp.asarray(logits), rows_of({"slot": 2, "temperature": 0.0, "wants": BAD_WORDS}), seeded(2, output=output, bad_words=words)
        )
        expected = logits[0].copy()
        expected[list(banned)] = -np.inf
        assert int(tokens[0]) == expected.argmax()


def test_bad_words_see_what_was_sampled_since() -> None:
    words = [[5, 5, 6], [6, 5, 5]]
    state, output = seeded(1, bad_words=words), []
    for step in range(30):
        logits = np.zeros((2, V), np.float32)
        logits[:, 5], logits[:, 6] = 3 + np.random.default_rng(step).random(2), 3.5
        expected = logits[1].copy()
        expected[list(ban_by_hand(words, output))] = -np.inf
        tokens, _, state = run(jnp.asarray(logits), rows_of({"slot": 0}, {"slot": 1, "temperature": 0.0, "wants": BAD_WORDS}), state)
        output.append(int(tokens[1]))
        assert output[-1] == expected.argmax()
    assert {5, 6} <= {*output}


def test_row_without_any_allowed_token_says_so() -> None:
    tokens, _, _ = run(
        jnp.asarray(logits_of(2)), rows_of({"wants": MASK | BAD_WORDS}, {"temperature": 0.0}),
        dataclasses.replace(seeded(0, bad_words=[[7]]), mask=masked({0: [7]}).mask),
    )  # fmt: skip
    assert [int(tokens[0]), int(tokens[1])] == [NO_TOKEN, logits_of(2)[1].argmax()]


def test_chosen_tokens_come_with_their_logprobs() -> None:
    ids = [299, 0, 17]
    _, found, _ = run(jnp.asarray(logits_of(2)), rows_of({}, {"slot": 3, "wants": LOGPROBS | CHOSEN}), seeded(3, logprob_token_ids=ids))
    exact = jax.nn.log_softmax(logits_of(2)[1])
    np.testing.assert_allclose(found.chosen[1, :3], exact[np.array(ids)], atol=1e-5)


def test_adjusted_logits_equal_those_of_transformers_processors() -> None:
    prompt, output = [4, 4, 9, 30], [7, 7, 9, 31]
    ids = torch.tensor([prompt + output])
    bad_words = [[7, 9, 31, 12], [40], [31, 41]]
    chain = [
        transformers.NoBadWordsLogitsProcessor(bad_words, eos_token_id=[]),
        transformers.SuppressTokensLogitsProcessor([3, 250]),
        transformers.SequenceBiasLogitsProcessor([[[12], 4.0], [[50], 2.5], [[9], -3.0], [[299], 3.0]]),
        transformers.RepetitionPenaltyLogitsProcessor(1.3),
        transformers.TemperatureLogitsWarper(1.9),
        transformers.MinPLogitsWarper(0.01),
        transformers.TopKLogitsWarper(30),
        transformers.TopPLogitsWarper(0.9),
    ]
    params = {"temperature": 1.9, "min_p": 0.01, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.3}
    scores = torch.tensor(logits_of(1))
    for process in chain:
        scores = process(ids, scores)
    expected = torch.softmax(scores[0].double(), -1).numpy()
    bias = {12: 4.0, 50: 2.5, 9: -3.0, 299: 3.0}
    state = seeded(0, prompt=prompt, output=output, repetition_penalty=1.3, bad_words=bad_words, logit_bias=bias, banned=[3, 250])
    one, num = rows_of({"wants": PENALTIES | BAD_WORDS | BIAS | MIN_TOKENS, **params}), 6000

    def draw(seed: jax.Array) -> jax.Array:
        return sample(jnp.asarray(logits_of(1)), dataclasses.replace(one, seed=seed[None]), state)[0][0]

    counts = np.bincount(np.asarray(jax.jit(lambda: jax.lax.map(draw, jnp.arange(num, dtype=jnp.uint32)))()), minlength=V)
    assert (counts[expected == 0] == 0).all()
    assert (np.abs(counts - num * expected) < 5 * np.sqrt(num * expected * (1 - expected)) + 1).all()
    assert 5 < (expected > 0).sum() < 31
