"""Texts and pairs as token ids: what stands around them survives every cut."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import UserError
from jaxserve.pooling import Pooling
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from jaxserve.text.vectors import ScorePlan, TextOptions, encode_text
from tests.tiny_vectors import tiny_classifier

CLS, SEP = 1, 2
EMBEDDER = Pooling(task="embed", width=4, prompts={"query": "q: "}, lowercase=True)
SCORER = Pooling(task="classify", width=1, activation="identity")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(tiny_classifier())


def test_file_that_pads_and_cuts_is_read_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("fox " * 30, add_special_tokens=True)
    assert (ids[0], ids[-1]) == (CLS, SEP)
    assert len(ids) > 30
    assert len(tokenizer.encode("fox", add_special_tokens=True)) < 8


@given(first=st.text("ab é", min_size=1, max_size=30), second=st.text("ab é", min_size=1, max_size=30), most=st.integers(3, 40))
@settings(deadline=None, max_examples=60)
def test_pair_is_cut_at_its_longer_text(tokenizer: Tokenizer, first: str, second: str, most: int) -> None:
    a, b = (tokenizer.encode(text, add_special_tokens=False) for text in (first, second))
    ids, border = tokenizer.encode_pair(first, second, max_tokens=most)
    x, y = ids.index(SEP) - 1, len(ids) - ids.index(SEP) - 2
    assert ids == [CLS, *a[:x], SEP, *b[:y], SEP]
    assert border == x + 2
    assert len(ids) == min(len(a) + len(b) + 3, most)
    if x < len(a):
        assert x >= y - 1
    if y < len(b):
        assert y >= x - 1


def test_each_text_of_a_pair_has_its_own_limit(tokenizer: Tokenizer) -> None:
    a, b = (tokenizer.encode(text * 9, add_special_tokens=False) for text in ("x", "y"))
    assert tokenizer.encode_pair("x" * 9, "y" * 9, max_first=2, max_second=3)[0] == [CLS, *a[:2], SEP, *b[:3], SEP]


@given(text=st.text("ab é", max_size=30), most=st.integers(1, 40), side=st.sampled_from(["left", "right"]))
@settings(deadline=None, max_examples=60)
def test_shortened_text_keeps_its_ends(tokenizer: Tokenizer, text: str, most: int, side: str) -> None:
    whole = tokenizer.encode(text, add_special_tokens=True)
    plain = tokenizer.encode(text, add_special_tokens=False)
    cut = tokenizer.shorten(whole, most, side=side)  # type: ignore[arg-type]
    assert len(cut) == min(len(whole), most)
    if most > 2:
        kept = len(cut) - 2
        assert cut == [CLS, *(plain[:kept] if side == "right" else plain[len(plain) - kept :]), SEP]


def test_prompt_and_case_are_the_models(tokenizer: Tokenizer) -> None:
    found = encode_text(tokenizer, EMBEDDER, "FOX", TextOptions(prompt_name="query")).ids
    assert found == tokenizer.encode("q: fox", add_special_tokens=True)
    with pytest.raises(UserError, match="'query'"):
        encode_text(tokenizer, EMBEDDER, "x", TextOptions(prompt_name="other"))
    default = dataclasses.replace(EMBEDDER, default_prompt="query")
    assert encode_text(tokenizer, default, "fox", TextOptions()).ids == found


def test_embedder_scores_one_query_with_many_documents_by_few_vectors(tokenizer: Tokenizer) -> None:
    plan = ScorePlan(tokenizer, EMBEDDER, ["a"], ["b", "c", "d"], TextOptions(max_query=1))
    assert len(plan.inputs) == 4
    assert [plan.parts_of(i) for i in range(3)] == [(0, 1), (0, 2), (0, 3)]
    assert len(plan.inputs[0].ids) == 1 or plan.inputs[0].ids[0] == CLS
    assert len(ScorePlan(tokenizer, SCORER, ["a"], ["b", "c", "d"], TextOptions()).inputs) == 3


@pytest.mark.parametrize(("queries", "documents"), [([], ["a"]), (["a"], []), (["a", "b"], ["c"]), (["a", "b"], ["c"] * 3)])
def test_texts_that_make_no_pairs_are_refused(tokenizer: Tokenizer, queries: list[str], documents: list[str]) -> None:
    with pytest.raises(UserError):
        ScorePlan(tokenizer, SCORER, queries, documents, TextOptions())
