"""Calls that must come: whatever a model writes within the form, the reader of the format finds calls of the tools in it."""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from jaxserve.request import StructuredOutputs
from jaxserve.text.grammar import Grammars
from jaxserve.text.reasoning import REASONING_FORMATS, ReasoningFormat
from jaxserve.text.required import CALL_SPACE, required_form, strict_form, thoughtful_form
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tools import REQUIRED_FORMAT, TOOL_FORMATS, ToolFormat, schemas_of
from tests.text.test_split import BY_NAME, THINKING, split

EOS = 1
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer"}, "fine": {"type": "boolean"}},
                "required": ["city"],
                "additionalProperties": False,
                "$defs": {"City": {"type": "string", "maxLength": 12}},
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
SCHEMAS = schemas_of(TOOLS)
FRAMED = [form for form in TOOL_FORMATS if form.frame is not None]


@pytest.fixture(scope="module")
def grammars(bpe: Tokenizer) -> Grammars:
    return Grammars(bpe, vocab_size=bpe.vocab_size, eos_ids=frozenset({EOS}))


def walk(grammars: Grammars, bpe: Tokenizer, tag: dict[str, Any], seed: int, max_tokens: int = 4000) -> Iterator[str]:
    """What a model without any sense writes under a constraint, token by token, in a hurry to end."""
    dice = random.Random(seed)
    matcher = grammars.compile(StructuredOutputs(structural_tag=tag, whitespace_pattern=CALL_SPACE, source="tools")).begin()
    decoder = codecs.getincrementaldecoder("utf-8")()
    for _ in range(max_tokens):
        mask = matcher.fill()
        allowed = [token for token in range(bpe.vocab_size) if is_set(mask, token)]
        closing = [token for token in allowed if token == EOS or bpe.token_text(token) in ('"', "}", "]", "<")]
        token = dice.choice(closing if closing and dice.random() < 0.7 else allowed)
        if token == EOS:
            return
        matcher.consume(token)
        yield decoder.decode(bpe.token_bytes(token))
    raise AssertionError("the walk did not end")


@pytest.mark.parametrize("form", [*FRAMED, REQUIRED_FORMAT], ids=lambda form: form.name)
@pytest.mark.parametrize("parallel", [True, False])
def test_anything_that_meets_the_form_is_calls_of_the_tools(grammars: Grammars, bpe: Tokenizer, form: ToolFormat, parallel: bool) -> None:
    own, tag = required_form(TOOLS, form, None, inside=None, parallel=parallel)
    assert own is form
    for seed in range(4):
        content, reasoning, calls = split(walk(grammars, bpe, tag, seed), own)
        assert (content, reasoning) == ("", "")
        assert len(calls) == 1 or (parallel and calls)
        for name, arguments, _ in calls:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
            assert name != "now" or json.loads(arguments) == {}


@pytest.mark.parametrize("thinking", REASONING_FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("inside", [None, True, False])
def test_reasoning_may_come_before(grammars: Grammars, bpe: Tokenizer, thinking: ReasoningFormat, inside: bool | None) -> None:
    native = BY_NAME["hermes" if thinking.starts else "openai"]
    form, tag = required_form(TOOLS, native, thinking, inside=inside if thinking.starts else None, parallel=True)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    if form.shape is None:
        call = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"
    start = thinking.starts[0] + thinking.label if thinking.starts else "<|channel|>analysis<|message|>"
    end = thinking.ends[0] if thinking.ends else "<|end|><|start|>assistant"
    matches = {text: accepts(grammars, bpe, tag, text) for text in (call, f"{start}hm {end}{call}", f"hm {end}{call}", f"hm {call}")}
    begun = inside if thinking.starts else None
    assert list(matches.values()) == [
        begun is False or (begun is None and not thinking.always), begun is not False, begun is True, False,
    ]  # fmt: skip
    for text, is_good in matches.items():
        if is_good:
            content, reasoning, calls = split([text], form, thinking, inside=begun)
            assert content.strip() == ""
            assert calls == [("now", "{}", None)]
            assert reasoning == ("hm " if "hm" in text else "")


@pytest.mark.parametrize("form", [form for form in FRAMED if form.shape is not None and not form.first], ids=lambda form: form.name)
@pytest.mark.parametrize("thinking", [None, THINKING["qwen3"]], ids=["", "thinking"])
def test_strict_calls_are_right_if_they_come(
    grammars: Grammars, bpe: Tokenizer, form: ToolFormat, thinking: ReasoningFormat | None
) -> None:
    tag = strict_form(TOOLS, {"get_weather"}, form, thinking, inside=None, parallel=True)
    assert tag is not None
    frame = form.frame
    assert frame is not None

    def call(name: str, arguments: str) -> str:
        return frame.opening + frame.before.replace("NAME", name) + arguments + frame.after + frame.closing

    good = call("get_weather", '{"city": "Paris"}')
    for before in ("", "Let me see: ", *(["<think>hm</think>", "<think>hm</think>Well. "] if thinking else [])):
        assert accepts(grammars, bpe, tag, before)
        assert accepts(grammars, bpe, tag, before + good)
        assert accepts(grammars, bpe, tag, before + call("now", '{"anything": 1}') + " after")
        assert not accepts(grammars, bpe, tag, before + call("get_weather", '{"city": 5}'))
        assert not accepts(grammars, bpe, tag, before + call("never", "{}"))


def test_nothing_is_strict_without_being_asked_or_in_formats_without_marks() -> None:
    assert strict_form(TOOLS, (), BY_NAME["hermes"], None, inside=None, parallel=True) is None
    for name in ("pythonic", "openai", "llama3_json", "qwen3_coder"):
        assert strict_form(TOOLS, {"now"}, BY_NAME[name], None, inside=None, parallel=True) is None


FORMS = [
    StructuredOutputs(json={"type": "object"}), StructuredOutputs(json_object=True), StructuredOutputs(regex=r"\{\}"),
    StructuredOutputs(choice=["{}", "b"]), StructuredOutputs(grammar='start: "{}"'),
    StructuredOutputs(structural_tag={"format": {"type": "const_string", "value": "{}"}}),
]  # fmt: skip


@pytest.mark.parametrize("spec", FORMS, ids=range(len(FORMS)))
@pytest.mark.parametrize(
    ("name", "inside", "good", "bad"),
    [
        ("qwen3", True, "hm</think>\n\n{}", "{}"), ("qwen3", None, "{}", "hm</think>{}"),
        ("qwen3", None, "<think>a</think>{}", "<think>{}"),
        ("deepseek_r1", None, "<think>a</think>{}", "{}"),
        ("gpt-oss", None, "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>{}", "{}"),
    ],
)  # fmt: skip
def test_form_of_the_client_holds_behind_reasoning(
    grammars: Grammars, bpe: Tokenizer, spec: StructuredOutputs, name: str, inside: bool | None, good: str, bad: str
) -> None:
    tag = thoughtful_form(spec, THINKING[name], inside=inside)
    assert tag is not None
    assert accepts(grammars, bpe, tag, good)
    assert not accepts(grammars, bpe, tag, bad)
    assert split([good], None, THINKING[name], inside=inside)[0].strip() == "{}"


def test_form_that_cannot_stand_behind_reasoning_says_so() -> None:
    for spec in (StructuredOutputs(json="{}"), StructuredOutputs(json={}, disable_additional_properties=True)):
        assert thoughtful_form(spec, THINKING["qwen3"], inside=True) is None


def is_set(mask: Any, token: int) -> bool:
    return bool(int(mask[token >> 5]) >> (token & 31) & 1)


def accepts(grammars: Grammars, bpe: Tokenizer, tag: dict[str, Any], text: str) -> bool:
    matcher = grammars.compile(StructuredOutputs(structural_tag=tag, whitespace_pattern=CALL_SPACE, source="tools")).begin()
    for token in [*bpe.encode(text, add_special_tokens=False), EOS]:
        if not is_set(matcher.fill(), token):
            return False
        matcher.consume(token)
    return True


def test_form_is_the_general_one_where_the_own_cannot_be_said() -> None:
    assert required_form(TOOLS, None, None, inside=None, parallel=True)[0] is REQUIRED_FORMAT
    assert required_form(TOOLS, BY_NAME["pythonic"], None, inside=None, parallel=True)[0] is REQUIRED_FORMAT
    strange = {"type": "function", "function": {"name": 'a "b"'}}
    form, tag = required_form([strange], BY_NAME["mistral"], THINKING["mistral"], inside=False, parallel=True)
    assert form is REQUIRED_FORMAT
    assert '{"name": "a \\"b\\"", "parameters": ' in str(tag["format"]["elements"][1]["tags"][0]["begin"])
