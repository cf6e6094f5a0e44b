"""The splitter: the same parts wherever the text is cut, and the parts that each format's samples have."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.answer import CallArguments, CallStart, Content, Markers, Part, Reasoning
from jaxserve.text.json_value import JsonValue
from jaxserve.text.reasoning import REASONING_FORMATS, ReasoningFormat
from jaxserve.text.split import make_splitter
from jaxserve.text.tools import TOOL_FORMATS, ToolFormat, schemas_of
from tests.text.samples import FORMS, SAMPLES, TOOLS, Sample, dump

BY_NAME = {form.name: form for form in TOOL_FORMATS}
THINKING = {form.name: form for form in REASONING_FORMATS}
Answer = tuple[str, str, list[tuple[str, str, str | None]]]


def split(
    pieces: Iterable[str],
    tools: ToolFormat | None,
    reasoning: ReasoningFormat | None = None,
    *,
    cut: bool = False,
    inside: bool | None = None,
) -> Answer:
    """Content, reasoning, and calls as (name, arguments, id); checks the order of parts."""
    splitter = make_splitter(reasoning, tools, schemas_of(TOOLS), inside=inside)
    parts = [part for piece in pieces for part in splitter.push(piece)] + splitter.finish(cut=cut)
    return join(parts)


def join(parts: list[Part]) -> Answer:
    content, reasoning = "", ""
    calls: list[tuple[str, str, str | None]] = []
    for part in parts:
        match part:
            case Content(text):
                content += text
            case Reasoning(text):
                reasoning += text
            case CallStart(index, name, call_id):
                assert index == len(calls)
                calls.append((name, "", call_id))
            case CallArguments(index, text):
                assert index == len(calls) - 1
                assert text
                calls[-1] = (calls[-1][0], calls[-1][1] + text, calls[-1][2])
    return content, reasoning, calls


def loads(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


@pytest.mark.parametrize("sample", SAMPLES, ids=repr)
def test_sample_has_its_content_and_calls(sample: Sample) -> None:
    content, reasoning, calls = split([sample.text], BY_NAME[sample.form])
    assert (content, [(name, loads(arguments)) for name, arguments, _ in calls]) == (sample.content, list(sample.calls))
    assert reasoning == ""


@pytest.mark.parametrize("sample", SAMPLES, ids=repr)
def test_sample_cut_anywhere_means_the_same(sample: Sample) -> None:
    form, text = BY_NAME[sample.form], sample.text
    whole = split([text], form)
    assert split(text, form) == whole
    for place in range(len(text) + 1):
        assert split([text[:place], text[place:]], form) == whole, place
    for seed in range(5):
        assert split(pieces_of(text, random.Random(seed)), form) == whole, seed


def pieces_of(text: str, dice: random.Random) -> list[str]:
    places = sorted(dice.choices(range(len(text) + 1), k=len(text) // 4 + 1))
    return [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("sample", [sample for sample in SAMPLES if sample.calls], ids=repr)
def test_answer_cut_off_keeps_what_came_and_makes_nothing_up(sample: Sample) -> None:
    form, text = BY_NAME[sample.form], sample.text
    _, _, whole = split([text], form)
    for length in range(len(text)):
        once = split([text[:length]], form, cut=True)
        if length % 19 == 0:
            assert split(text[:length], form, cut=True) == once
        for (name, arguments, _), (full_name, full, _) in zip(once[2], whole, strict=False):
            assert name == full_name
            # The beginning of a marker, at which the answer was cut, may be an argument for all that anyone knows.
            kept = arguments.rstrip("<|cal")
            assert full.startswith(kept) or kept.startswith(full)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_text_cut_anywhere_means_the_same_and_nothing_is_lost_without_calls(data: st.DataObject) -> None:
    form = BY_NAME[data.draw(st.sampled_from(FORMS))]
    thinking = data.draw(st.sampled_from([None, *REASONING_FORMATS]))
    bits = [
        *form.markers,
        *form.first,
        "<function=",
        "call:",
        "now",
        "f(",
        ")",
        "{",
        "}",
        "[",
        "]",
        '"',
        '"name": "now"',
        '"arguments": ',
        ",",
        ":",
        " ",
    ]
    bits += ["\n", "x", "\\", "1", "<", "</", "<arg_key>", "</arg_key>", "<arg_value>", "<parameter=", "</function>", ">", "null", "|"]
    bits += list(thinking.markers) if thinking is not None else []
    pieces = data.draw(st.lists(st.sampled_from(bits), max_size=30))
    inside, cut = data.draw(st.sampled_from([None, True, False])), data.draw(st.booleans())
    text = "".join(pieces)
    whole = split([text], form, thinking, inside=inside, cut=cut)
    assert split(pieces, form, thinking, inside=inside, cut=cut) == whole
    assert split(text, form, thinking, inside=inside, cut=cut) == whole
    if not whole[2] and form.shape is not None and thinking is None:
        for marker in form.silent:
            text = text.replace(marker, "")
        assert whole[0] == text


@pytest.mark.parametrize("form", FORMS)
def test_names_and_arguments_stream_before_the_call_ends(form: str) -> None:
    sample = next(sample for sample in SAMPLES if sample.form == form and len(sample.calls) == 1 and sample.content == "")
    splitter = make_splitter(None, BY_NAME[form], schemas_of(TOOLS), inside=None)
    deltas = [part for letter in sample.text for part in splitter.push(letter)] + splitter.finish(cut=False)
    pieces = [part for part in deltas if isinstance(part, CallArguments)]
    whole_calls = form in ("pythonic", "llama4_pythonic", "functiongemma", "gemma4")
    assert len(pieces) == 1 if whole_calls else len(pieces) > 10


def test_kimi_and_mistral_keep_the_ids_of_the_model() -> None:
    kimi = "<|tool_call_begin|>functions.now:7<|tool_call_argument_begin|>{}<|tool_call_end|>"
    assert split(kimi, BY_NAME["kimi_k2"])[2] == [("now", "{}", "functions.now:7")]
    assert split("[TOOL_CALLS]now[CALL_ID]abc123XYZ[ARGS]{}", BY_NAME["mistral"])[2] == [("now", "{}", "abc123XYZ")]


def test_calls_without_a_splitter_are_content() -> None:
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call> \n'
    assert split(text, None) == (text, "", [])


@pytest.mark.parametrize("tools", [None, "hermes"])
def test_content_is_not_held_back_without_need(tools: str | None) -> None:
    splitter = make_splitter(None, BY_NAME[tools] if tools else None, {}, inside=None)
    assert splitter.push("Hello") == [Content("Hello")]
    assert splitter.push(", world <b") == [Content(", world <b")]


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_json_value_ends_where_it_ends(value: Any) -> None:
    text = dump(value)
    for rest in (",", " x", "}"):
        reader = JsonValue()
        read = sum(iter_read(reader, text + rest))
        assert (text + rest)[:read] == text
        assert reader.is_done
        assert not reader.is_broken


def iter_read(reader: JsonValue, text: str) -> Iterable[int]:
    for letter in text:
        if not reader.is_done:
            yield reader.read(letter)


def test_markers_hold_the_longest_beginning() -> None:
    markers = Markers(["<ab>", "<<x"])
    assert [markers.held(text) for text in ("", "x", "x<", "<a", "<<", "<<a", "<ab>", "a<ab")] == [0, 0, 1, 2, 2, 2, 0, 3]
    assert [markers.at_start(text) for text in ("<", "<ab>c", "x", "")] == ["", "<ab>", None, ""]
