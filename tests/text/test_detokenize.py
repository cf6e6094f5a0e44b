from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.request import SamplingParams
from jaxserve.text.detokenize import Detokenizer
from jaxserve.text.tokenizer import Tokenizer

SOME_TEXT = "The 🦙 ate 日本語 naïve\n\n  food, é👩‍👩‍👧."


def stream(
    tokenizer: Tokenizer, ids: list[int], params: SamplingParams, sizes: list[int] | None = None, prompt: list[int] | None = None
) -> tuple[list[str], str | None]:
    """The texts of all pieces, and the stop string, when `ids` come in portions of these sizes."""
    detokenizer = Detokenizer(tokenizer, prompt or [], params)
    texts: list[str] = []
    stop: str | None = None
    turns = itertools.cycle(sizes or [1])
    at = 0
    while True:
        end = min(at + next(turns), len(ids))
        piece = detokenizer.push(ids[at:end], final=end == len(ids))
        assert stop is None or piece.text == "", "text after a stop string"
        texts.append(piece.text)
        stop = piece.stop or stop
        at = end
        if at == len(ids):
            return texts, stop


def first_stop(text: str, stops: list[str], *, keep: bool = False) -> tuple[str, str | None]:
    """What a reader who sees the text letter by letter would cut."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if keep else end - len(stop)], stop
    return text, None


@settings(deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_whole_decoding_for_any_tokens_and_portions(bpe: Tokenizer, spm: Tokenizer, data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from([bpe, spm]))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=24))
    skip = data.draw(st.booleans())
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    texts, _ = stream(tokenizer, ids, SamplingParams(skip_special_tokens=skip), sizes)
    assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(deadline=None)
@given(data=st.data())
def test_no_piece_holds_a_replacement_character_that_the_text_has_not(bpe: Tokenizer, spm: Tokenizer, data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from([bpe, spm]))
    text = data.draw(st.text(alphabet="a 🦙日é👩\u200d\n", max_size=30))
    texts, _ = stream(tokenizer, tokenizer.encode(text, add_special_tokens=False), SamplingParams())
    assert "".join(texts) == text
    assert "\ufffd" not in "".join(texts)


@pytest.mark.parametrize("text", ["unable to go", "un able, go able unable", "日 本 日", "goes"])
def test_tokens_written_by_their_neighbours_join_too(wordpiece: Tokenizer, text: str) -> None:
    ids = wordpiece.encode(text, add_special_tokens=False)
    texts, _ = stream(wordpiece, ids, SamplingParams())
    assert "".join(texts) == wordpiece.decode(ids)
    texts, _ = stream(wordpiece, ids * 30, SamplingParams(), [3])
    assert "".join(texts) == wordpiece.decode(ids * 30)


def test_answer_keeps_its_first_space_after_a_visible_prompt_only(spm: Tokenizer) -> None:
    the = spm.backend.get_vocab()["▁the"]
    assert stream(spm, [the], SamplingParams(), prompt=[1, the])[0] == [" the"]
    assert stream(spm, [the], SamplingParams(), prompt=[1])[0] == ["the"]
    assert stream(spm, [the], SamplingParams(skip_special_tokens=False), prompt=[1])[0] == [" the"]


def test_character_begun_in_the_prompt_is_completed_by_the_answer(bpe: Tokenizer) -> None:
    byte = {bpe.token_bytes(token): token for token in range(bpe.vocab_size)}
    llama = [byte[bytes((each,))] for each in "🦙".encode()]
    for cut in range(1, 4):
        assert "".join(stream(bpe, llama[cut:], SamplingParams(), prompt=[0, *llama[:cut]])[0]) == "🦙"


def test_incomplete_character_comes_out_at_the_end_only(bpe: Tokenizer) -> None:
    byte = {bpe.token_bytes(token): token for token in range(bpe.vocab_size)}
    detokenizer = Detokenizer(bpe, [], SamplingParams())
    assert detokenizer.push([byte[b"\xf0"]], final=False).text == ""
    assert detokenizer.push([byte[b"\x9f"]], final=False).text == ""
    assert detokenizer.push([], final=True).text == "\ufffd"


@pytest.mark.parametrize("keep", [False, True])
def test_every_stop_string_at_every_place_is_cut_exactly(bpe: Tokenizer, keep: bool) -> None:
    ids = bpe.encode(SOME_TEXT, add_special_tokens=False)
    for start in range(len(SOME_TEXT)):
        for size in (1, 2, 3, 7):
            stop = SOME_TEXT[start : start + size]
            texts, found = stream(bpe, ids, SamplingParams(stop=[stop], include_stop_str_in_output=keep))
            assert ("".join(texts), found) == first_stop(SOME_TEXT, [stop], keep=keep)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_first_completed_stop_string_wins_wherever_tokens_end(bpe: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet="ab🦙", max_size=30))
    stops = data.draw(st.lists(st.text(alphabet="ab🦙", min_size=1, max_size=5), min_size=1, max_size=4))
    keep = data.draw(st.booleans())
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    params = SamplingParams(stop=stops, include_stop_str_in_output=keep)
    texts, found = stream(bpe, bpe.encode(text, add_special_tokens=False), params, sizes)
    assert ("".join(texts), found) == first_stop(text, stops, keep=keep)


@settings(deadline=None)
@given(data=st.data())
def test_no_beginning_of_a_stop_string_is_shown_before_it_is_certain(bpe: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet="ab", max_size=20))
    stop = data.draw(st.text(alphabet="ab", min_size=1, max_size=6))
    detokenizer = Detokenizer(bpe, [], SamplingParams(stop=[stop]))
    whole, _ = first_stop(text, [stop])
    shown = ""
    for token in bpe.encode(text, add_special_tokens=False):
        shown += detokenizer.push([token], final=False).text
        assert whole.startswith(shown)


def test_stop_string_in_the_held_text_is_found_when_the_answer_ends(bpe: Tokenizer) -> None:
    ids = bpe.encode("lazy do", add_special_tokens=False)
    assert stream(bpe, ids, SamplingParams(stop=["dog"]))[0][-1].endswith("do")


def test_stop_strings_count_after_min_tokens_only(bpe: Tokenizer) -> None:
    ids = bpe.encode("a.b.c", add_special_tokens=False)
    assert len(ids) == 5
    assert stream(bpe, ids, SamplingParams(stop=["."], min_tokens=1)) == (["a", "", "", "", ""], ".")
    texts, stop = stream(bpe, ids, SamplingParams(stop=["."], min_tokens=2))
    assert ("".join(texts), stop) == ("a.b", ".")
    assert stream(bpe, ids, SamplingParams(stop=["."], min_tokens=5))[1] is None


def test_special_tokens_can_be_part_of_a_stop_string_when_shown(bpe: Tokenizer) -> None:
    ids = bpe.encode("fox<|eos|>dog", add_special_tokens=False)
    texts, stop = stream(bpe, ids, SamplingParams(stop=["<|eos|>"], skip_special_tokens=False))
    assert ("".join(texts), stop) == ("fox", "<|eos|>")
    assert stream(bpe, ids, SamplingParams(stop=["<|eos|>"]))[1] is None


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_that_are_asked_for_are_shown(bpe: Tokenizer, skip: bool) -> None:
    ids = [2, *bpe.encode("a<tool_call>é", add_special_tokens=False), 0, 2, 1]
    params = SamplingParams(skip_special_tokens=skip, shown_special_ids=frozenset({2}))
    detokenizer = Detokenizer(bpe, [], params)
    text = "".join(detokenizer.push([token], final=False).text for token in ids) + detokenizer.push([], final=True).text
    assert text == ("<|im_start|>a<tool_call>é<|im_start|>" if skip else "<|im_start|>a<tool_call>é<|bos|><|im_start|><|eos|>")
