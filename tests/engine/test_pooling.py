"""Vectors through a whole engine: sentence-transformers' numbers, whatever the company, the chunks and the cache."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import numpy as np
import pytest
import torch

from jaxserve import LLM, PoolingParams
from jaxserve.errors import ConfigError, UserError
from tests.tiny import tiny_model
from tests.tiny_vectors import MAX_LEN, PROMPTS, dense_weights, reference, tiny_classifier, tiny_decoder, tiny_encoder

SHAPES: dict[str, Any] = {"max_rows": 4, "max_step_tokens": 64, "prefill_tokens": (64,), "decode_rows": (4,), "cache_bytes": 1 << 20}
TEXTS = ["the quick brown fox", "a capital of a country is a city", "日本語", "x", "jumps over the lazy dog, " * 3, "émoji 😀🎉 text"]


@functools.cache
def engine(path: pathlib.Path, **options: Any) -> LLM:
    return LLM(str(path), **{**SHAPES, **options})


def states(path: pathlib.Path, ids: list[int]) -> torch.Tensor:
    """f32[T, D], what transformers hands to pooling."""
    model = reference(path)
    with torch.no_grad():
        outputs = model(torch.tensor(ids)[None], output_hidden_states=True)
    return outputs.hidden_states[-1][0]


def pooled(rows: torch.Tensor, mode: str) -> torch.Tensor:
    """sentence-transformers' pooling, by hand."""
    weights = torch.arange(1, len(rows) + 1)[:, None]
    return {
        "cls_token": rows[0], "mean_tokens": rows.mean(0), "max_tokens": rows.max(0).values, "lasttoken": rows[-1],
        "mean_sqrt_len_tokens": rows.sum(0) / len(rows) ** 0.5, "weightedmean_tokens": (rows * weights).sum(0) / weights.sum(),
    }[mode]  # fmt: skip


def embeddings(llm: LLM, prompts: list[Any], params: PoolingParams | None = None) -> np.ndarray:
    results = llm.embed(prompts, pooling_params=params, use_tqdm=False)
    return np.array([result.outputs.embedding for result in results])


def assert_close(found: Any, wanted: torch.Tensor) -> None:
    wanted_array = wanted.numpy()
    assert np.abs(np.array(found) - wanted_array).max() < 1e-4 * np.abs(wanted_array).max()


@pytest.mark.parametrize("family", ["MPNet", "NomicBert", "Gte", "ModernBert", "XLMRoberta"])
def test_every_encoder_embeds_as_sentence_transformers_does(family: str) -> None:
    path = tiny_encoder(family=family, normalize=False)
    prompts = [[5, 17, 300], list(range(10, 50)), [2], [7] * 20]  # no 1, which is padding to MPNet's positions
    for result in engine(path).embed(prompts, use_tqdm=False):
        assert_close(result.outputs.embedding, pooled(states(path, list(result.prompt_token_ids)), "mean_tokens"))


def test_encoder_with_dense_and_normalize_equals_sentence_transformers() -> None:
    path = tiny_encoder(dense=24)
    weights = dense_weights(24)
    for result in engine(path).embed(TEXTS, use_tqdm=False):
        mean = pooled(states(path, list(result.prompt_token_ids)), "mean_tokens")
        wanted = torch.tanh(weights["linear.weight"] @ mean + weights["linear.bias"])
        assert_close(result.outputs.embedding, wanted / wanted.norm())


@pytest.mark.parametrize("mode", ["cls_token", "weightedmean_tokens"])
def test_encoder_pools_as_its_files_say(mode: str) -> None:
    path = tiny_encoder(mode=mode, normalize=False)
    for result in engine(path).embed(TEXTS, use_tqdm=False):
        assert_close(result.outputs.embedding, pooled(states(path, list(result.prompt_token_ids)), mode))


@pytest.mark.parametrize("mode", ["lasttoken", "mean_tokens", "max_tokens"])
def test_decoder_embeds_the_same_in_short_chunks(mode: str) -> None:
    path = tiny_decoder(mode=mode)
    chunked = engine(path, max_step_tokens=7, prefill_tokens=(7,), page_size=4)
    for _ in range(2):  # the second time there is a cache to find things in
        for result in chunked.embed(TEXTS, use_tqdm=False):
            wanted = pooled(states(path, list(result.prompt_token_ids)), mode)
            assert_close(result.outputs.embedding, wanted / wanted.norm())
    cached = [result.num_cached_tokens for result in chunked.embed(TEXTS, use_tqdm=False)]
    assert any(cached) == (mode == "lasttoken")  # what goes into a mean has to be computed


def test_decoder_gives_vectors_when_asked_to() -> None:
    path = tiny_decoder(mode=None)
    assert engine(path).generate("hello", use_tqdm=False)[0].outputs[0].token_ids
    result = engine(path, runner="pooling").embed("hello there", use_tqdm=False)[0]
    wanted = pooled(states(path, list(result.prompt_token_ids)), "lasttoken")
    assert_close(result.outputs.embedding, wanted / wanted.norm())


def test_embedding_is_the_same_in_any_company() -> None:
    llm = engine(tiny_encoder())
    alone = np.concatenate([embeddings(llm, [text]) for text in TEXTS])
    np.testing.assert_allclose(embeddings(llm, TEXTS), alone, atol=1e-6)
    np.testing.assert_allclose(embeddings(llm, TEXTS[::-1] * 4), np.concatenate([alone[::-1]] * 4), atol=1e-6)


def test_nothing_compiles_after_the_start() -> None:
    llm = engine(tiny_encoder())
    before = llm.metrics.compiles._value.get()
    embeddings(llm, [TEXTS[0] * n for n in (1, 2)] * 9)
    assert llm.metrics.compiles._value.get() == before


def test_text_longer_than_the_model_takes_is_refused_or_cut() -> None:
    llm = engine(tiny_encoder())
    ids = llm.tokenizer.encode("fox " * 99, add_special_tokens=True)
    with pytest.raises(UserError, match=f"{len(ids)} tokens, but this model takes at most {MAX_LEN}"):
        llm.embed("fox " * 99, use_tqdm=False)
    cut = llm.embed("fox " * 99, pooling_params=PoolingParams(truncate_prompt_tokens=-1), use_tqdm=False)[0]
    assert list(cut.prompt_token_ids) == ids[: MAX_LEN - 1] + ids[-1:]  # the separator stays
    whole = llm.embed([ids[: MAX_LEN - 1] + ids[-1:]], use_tqdm=False)[0]
    assert whole.outputs.embedding == cut.outputs.embedding


def test_text_that_no_step_can_take_whole_is_refused() -> None:
    llm = engine(tiny_encoder(), max_step_tokens=20, prefill_tokens=(20,))
    with pytest.raises(UserError, match="takes at most 20"):
        llm.embed([[5] * 21], use_tqdm=False)
    np.testing.assert_allclose(
        embeddings(llm, [[5] * 20, [6] * 20, [7] * 3]), embeddings(engine(tiny_encoder()), [[5] * 20, [6] * 20, [7] * 3]), atol=1e-6
    )


def test_dimensions_cut_before_the_length_becomes_one() -> None:
    llm = engine(tiny_encoder(normalize=False, matryoshka=(8, 16)))
    whole = embeddings(llm, TEXTS[:2], PoolingParams(use_activation=False))
    cut = embeddings(llm, TEXTS[:2], PoolingParams(dimensions=8, use_activation=True))
    np.testing.assert_allclose(cut, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), rtol=1e-5)
    with pytest.raises(UserError, match="there are 8, 16"):
        llm.embed("x", pooling_params=PoolingParams(dimensions=9))
    with pytest.raises(UserError, match="not trained for shorter"):
        engine(tiny_encoder()).embed("x", pooling_params=PoolingParams(dimensions=8))


def test_prompt_of_the_model_is_put_before_a_text() -> None:
    llm = engine(tiny_encoder())
    with_prompt = embeddings(llm, ["fox"], PoolingParams(prompt_name="query"))
    np.testing.assert_array_equal(with_prompt, embeddings(llm, [PROMPTS["query"] + "fox"]))
    with pytest.raises(UserError, match="it has 'query', 'document'"):
        llm.embed("x", pooling_params=PoolingParams(prompt_name="passage"))


def test_classifier_gives_transformers_probabilities_and_labels() -> None:
    path = tiny_classifier(num_labels=3)
    llm = engine(path)
    for result in llm.classify(TEXTS, use_tqdm=False):
        with torch.no_grad():
            logits = reference(path)(torch.tensor(result.prompt_token_ids)[None]).logits[0]
        assert_close(result.outputs.probs, torch.softmax(logits, -1))
        assert result.outputs.label == ("bad", "good", "odd")[int(logits.argmax())]
        plain = llm.classify([list(result.prompt_token_ids)], pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        assert_close(plain[0].outputs.probs, logits)
    with pytest.raises(UserError, match="classifier with 3 labels"):
        llm.score("a", "b")
    with pytest.raises(UserError, match="gives no embeddings"):
        llm.embed("a")


def test_cross_encoder_scores_pairs_as_transformers_does() -> None:
    path = tiny_classifier()
    llm = engine(path)
    for result, document in zip(llm.score(TEXTS[0], TEXTS, use_tqdm=False), TEXTS, strict=True):
        a, b = (llm.tokenizer.encode(text, add_special_tokens=False) for text in (TEXTS[0], document))
        ids, types = [1, *a, 2, *b, 2], [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert list(result.prompt_token_ids) == ids
        with torch.no_grad():
            logits = reference(path)(torch.tensor(ids)[None], token_type_ids=torch.tensor(types)[None]).logits[0]
        assert_close([result.outputs.score], torch.sigmoid(logits))
    template = "{{ tone }}: {% for each in messages %}[{{ each.role }}] {{ each.content }} {% endfor %}"
    printed = llm.score("fox", ["dog"], chat_template=template, chat_template_kwargs={"tone": "dry"}, use_tqdm=False)[0]
    ids = llm.tokenizer.encode("dry: [query] fox [document] dog ", add_special_tokens=True)
    assert list(printed.prompt_token_ids) == ids
    with torch.no_grad():
        assert_close([printed.outputs.score], torch.sigmoid(reference(path)(torch.tensor(ids)[None]).logits[0]))
    with pytest.raises(UserError, match="needs a chat_template"):
        llm.score("a", "b", chat_template_kwargs={"tone": "dry"})


def test_embeddings_score_pairs_by_their_angle() -> None:
    llm = engine(tiny_encoder())
    queries, documents = (
        embeddings(llm, TEXTS[:2], PoolingParams(prompt_name="query")),
        embeddings(llm, TEXTS[2:4], PoolingParams(prompt_name="document")),
    )
    found = [result.outputs.score for result in llm.score(TEXTS[:2], TEXTS[2:4], use_tqdm=False)]
    np.testing.assert_allclose(found, (queries * documents).sum(1), atol=1e-6)
    encoded = llm.encode(TEXTS[:2], PoolingParams(prompt_name="query"), pooling_task="embed", use_tqdm=False)
    np.testing.assert_allclose([result.outputs.data for result in encoded], queries, atol=1e-6)
    assert len({result.request_id for result in encoded}) == 2
    assert all(result.finished for result in encoded)
    with pytest.raises(UserError, match="not classes"):
        llm.encode("a", pooling_task="classify")
    with pytest.raises(UserError, match="of each text alone"):
        llm.score("a", "b", chat_template="{{ messages }}")
    assert llm.reset_prefix_cache()
    with pytest.raises(UserError, match="do not make pairs"):
        llm.score(TEXTS[:2], TEXTS[:3])


def test_model_of_one_kind_refuses_the_other() -> None:
    with pytest.raises(UserError, match="it writes no text"):
        engine(tiny_encoder()).generate("hello", use_tqdm=False)
    with pytest.raises(UserError, match="writes text"):
        engine(tiny_decoder(mode=None)).embed("hello", use_tqdm=False)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        (tiny_encoder, {"runner": "generate"}, "does not write text"),
        (tiny_model, {"runner": "generate", "convert": "embed"}, "contradict"),
        (tiny_model, {"convert": "classify"}, "has no classifier"),
    ],
)
def test_engine_refuses_what_the_checkpoint_is_not_made_for(path: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(str(path()), **SHAPES, **options)
