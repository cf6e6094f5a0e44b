"""Structured outputs of the real engine: whatever the model, what comes out has the form that was asked for."""

from __future__ import annotations

import functools
import json
import math
import re
from typing import Any

import jsonschema
import pytest

from jaxserve import LLM, SamplingParams, StructuredOutputs
from jaxserve.engine import masks
from jaxserve.errors import UserError
from jaxserve.request import Request, RequestOutput
from tests.scheduler.invariants import check_scheduler
from tests.tiny import EOS, core, tiny_model

SHAPES = {"max_rows": 4, "max_step_tokens": 32, "decode_rows": (4,), "prefill_tokens": (32,), "cache_bytes": 1 << 20, "page_size": 16}
MAX_TOKENS = 700
WORD = {"type": "string", "maxLength": 12}

# Bounded in length, so that an answer of a random model is complete before its tokens run out.
SCHEMAS: dict[str, Any] = {
    "integers": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 99}, "minItems": 2, "maxItems": 5},
    "required": {
        "type": "object", "properties": {"name": WORD, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"], "additionalProperties": False,
    },
    "optional": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}}, "additionalProperties": False},
    "enum": {"enum": ["red", "green", 3, None, {"x": [1]}]},
    "const": {"const": {"a": [1, 2, {"b": "日本"}]}},
    "nested": {
        "type": "object", "required": ["p"], "additionalProperties": False,
        "properties": {"p": {"type": "array", "maxItems": 2, "items": {"type": "object", "required": ["k"], "additionalProperties": False,
                                                                       "properties": {"k": WORD}}}},
    },
    "any of": {"anyOf": [{"type": "integer", "minimum": 10, "maximum": 12}, {"type": "string", "pattern": "^x[0-9]{2,3}$"}]},
    "one of": {"oneOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]},
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    "refs": {"$defs": {"point": {"type": "array", "prefixItems": [{"$ref": "#/$defs/axis"}, {"$ref": "#/$defs/axis"}], "items": False,
                                 "minItems": 2}, "axis": {"type": "integer", "minimum": 0, "maximum": 9}}, "$ref": "#/$defs/point"},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "format": {"type": "string", "format": "date"},
    "lengths": {"type": "string", "minLength": 3, "maxLength": 6},
    "types": {"type": ["integer", "null"], "minimum": 0, "maximum": 1000},
}  # fmt: skip


@functools.cache
def engine(*, overlap: bool = True, **options: Any) -> LLM:
    return LLM(str(tiny_model(max_len=1024)), overlap=overlap, **{**SHAPES, **options})


def params(spec: StructuredOutputs, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": MAX_TOKENS, "temperature": 1.0, "seed": 1, **fields}, structured_outputs=spec)


def answer(spec: StructuredOutputs, llm: LLM | None = None, **fields: Any) -> Any:
    return (llm or engine()).generate("the fox", params(spec, **fields), use_tqdm=False)[0].outputs[0]


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_parse_and_validate(name: str) -> None:
    schema = SCHEMAS[name]
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for compact in (True, False):
        spec = StructuredOutputs(json=schema, disable_any_whitespace=compact)
        result = engine().generate("the fox", params(spec, n=4, seed=7), use_tqdm=False)[0]
        for output in result.outputs:
            assert output.finish_reason == "stop", output.text
            checker.validate(json.loads(output.text))


def test_schema_may_be_text_and_objects_may_be_closed() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    spec = StructuredOutputs(json=json.dumps(schema), disable_any_whitespace=True, disable_additional_properties=True)
    assert answer(spec).text in ('{"a":true}', '{"a":false}')


@pytest.mark.parametrize("pattern", [r"\d{3}-[a-z]{1,5}", r"(yes|no)!?", r"[^\n]{4}", r"^ab*c$", "日+本{2}", r"(a|b)(c|d)/\\"])
def test_regex_holds_for_the_whole_answer(pattern: str) -> None:
    for seed in range(4):
        output = answer(StructuredOutputs(regex=pattern), seed=seed)
        assert output.finish_reason == "stop"
        assert re.fullmatch(pattern.strip("^$"), output.text), output.text


def test_choices_come_out_whole_and_all_of_them() -> None:
    choices = ["a", "ab", 'quo"ted\n', "日本語", EOS.upper()]
    found = {answer(StructuredOutputs(choice=choices), seed=seed).text for seed in range(60)}
    assert found <= set(choices)
    assert len(found) > 2


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ('start: "(" NUMBER ("+" NUMBER)* ")"\nNUMBER: /[0-9]{1,3}/', r"\(\d{1,3}(\+\d{1,3})*\)"),
        ('root ::= item ("," item)?\nitem ::= [a-c] | "x" [0-9]', r"([a-c]|x[0-9])(,([a-c]|x[0-9]))?"),
    ],
    ids=["lark", "gbnf"],
)
def test_grammar_of_either_syntax(grammar: str, pattern: str) -> None:
    for seed in range(4):
        assert re.fullmatch(pattern, answer(StructuredOutputs(grammar=grammar), seed=seed).text)


def test_json_object_is_an_object() -> None:
    for seed in range(3):
        output = answer(StructuredOutputs(json_object=True), seed=seed, logit_bias={91: 30.0, 93: 30.0})
        assert output.finish_reason == "length" or isinstance(json.loads(output.text), dict)


def test_structural_tag_holds_where_its_trigger_comes_up() -> None:
    tag = {
        "type": "structural_tag",
        "structures": [{"begin": "<f>", "schema": {"type": "integer", "minimum": 1, "maximum": 9}, "end": "</f>"}],
        "triggers": ["<f"],
    }
    bias = dict.fromkeys(engine().tokenizer.encode("<f>", add_special_tokens=False), 6.0)
    texts = [answer(StructuredOutputs(structural_tag=tag), seed=seed, logit_bias=bias, max_tokens=60).text for seed in range(6)]
    assert sum("<f>" in text for text in texts) > 1
    for text in texts:
        for part in text.split("<f")[1:-1]:
            assert re.match(r">\s*[1-9]\s*</f>", part), text


def test_chat_takes_structured_outputs() -> None:
    result = engine().chat([{"role": "user", "content": "hi"}], params(StructuredOutputs(choice=["red", "blue"])), use_tqdm=False)[0]
    assert result.outputs[0].text in ("red", "blue")


def test_same_tokens_with_and_without_overlap_and_in_company() -> None:
    specs = [StructuredOutputs(json=schema) for schema in SCHEMAS.values()]
    each = [params(spec, seed=seed, max_tokens=40) for seed, spec in enumerate(specs)] + [SamplingParams(seed=9, max_tokens=40)] * 3
    alone = [engine().generate("the fox", one, use_tqdm=False)[0].outputs[0].token_ids for one in each]
    for llm in (engine(), engine(overlap=False)):
        together = llm.generate(["the fox"] * len(each), each, use_tqdm=False)
        assert [result.outputs[0].token_ids for result in together] == alone


def test_preempted_answers_keep_their_form() -> None:
    llm = engine(num_pages=8, page_size=8, cache_bytes=None)
    spec = StructuredOutputs(regex="[a-z ]{120}")
    before = llm.metrics.preemptions._value.get()
    results = llm.generate(["the fox"] * 4, [params(spec, seed=seed, max_tokens=40) for seed in range(4)], use_tqdm=False)
    assert llm.metrics.preemptions._value.get() > before
    for seed, result in enumerate(results):
        assert re.fullmatch("[a-z ]*", result.outputs[0].text)
        assert result.outputs[0].token_ids == answer(spec, seed=seed, max_tokens=40).token_ids
    check_scheduler(core(llm)._scheduler)


def test_complete_answer_ends_with_the_end_of_sequence() -> None:
    llm = engine()
    counted = llm.metrics.generation_tokens._value.get()
    output = answer(StructuredOutputs(choice=["x"]), logprobs=2)
    assert llm.metrics.generation_tokens._value.get() == counted + 2
    assert (output.text, output.finish_reason, output.stop_reason, output.token_ids[1:]) == ("x", "stop", None, [0])
    end = output.logprobs[1]
    assert [(token, entry.logprob, entry.rank) for token, entry in end.items()] == [(0, 0.0, 1), (1, -math.inf, 2)]
    chosen = answer(StructuredOutputs(choice=["x"]), logprob_token_ids=[5, 0]).logprobs[1]
    assert {token: entry.logprob for token, entry in chosen.items()} == {0: 0.0, 5: -math.inf}
    # As in vLLM, whose models sample it: without room for it the answer was cut off by its length.
    cut = answer(StructuredOutputs(choice=["x"]), max_tokens=1)
    assert (cut.text, cut.finish_reason, len(cut.token_ids)) == ("x", "length", 1)
    check_scheduler(core(llm)._scheduler)
    assert core(llm)._scheduler.usage == 0


def test_end_of_sequence_is_allowed_exactly_where_the_form_is_complete() -> None:
    likely = {0: 100.0}
    assert answer(StructuredOutputs(regex="[a-z]{2}[0-9]*"), logit_bias=likely).text.isalpha()
    longer = answer(StructuredOutputs(regex="[a-z]{2}[0-9]*"), logit_bias=likely, min_tokens=8)
    assert re.fullmatch("[a-z]{2}[0-9]+", longer.text)
    assert len(longer.token_ids) == 9
    endless = answer(StructuredOutputs(regex="[a-z]{2}[0-9]*"), logit_bias=likely, ignore_eos=True, max_tokens=20)
    assert (endless.finish_reason, len(endless.token_ids)) == ("length", 20)
    more: list[dict[str, Any]] = [{"min_tokens": 5}, {"ignore_eos": True}]
    for options in more:  # a complete answer ends all the same
        assert answer(StructuredOutputs(choice=["x"]), **options).text == "x"


def test_logprobs_bias_penalties_and_stop_strings_work_along() -> None:
    spec = StructuredOutputs(regex="[a-z]{60}")
    output = answer(spec, logprobs=3, repetition_penalty=1.3, logit_bias={80: 5.0}, stop=["o"], top_p=0.9, top_k=20, min_p=0.01)
    assert len(output.logprobs) == len(output.token_ids)
    assert output.finish_reason == "stop"
    assert "o" not in output.text
    assert re.fullmatch("[a-z]*", output.text)


def drive(llm: LLM, requests: list[Request]) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {request.id: [] for request in requests}
    for request in requests:
        llm._engine.add(request)
    while llm._engine.has_work:
        for output in llm._engine.step():
            outputs[output.id].append(output)
    return outputs


def make_request(llm: LLM, spec: StructuredOutputs | None, **fields: Any) -> Request:
    sampling = SamplingParams(**{"max_tokens": 50, "seed": 1, **fields}, structured_outputs=spec)
    constraint = None if spec is None else llm._served.grammars.compile(spec)
    return llm._admission.make_request([5, 17, 300], sampling, constraint=constraint)


def test_aborted_request_leaves_nothing_behind() -> None:
    llm = engine()
    request = make_request(llm, StructuredOutputs(regex="[a-z]{400}"), max_tokens=300)
    llm._engine.add(request)
    for _ in range(9):
        llm._engine.step()
    llm._engine.abort(request.id)
    assert not core(llm)._masks.busy
    while llm._engine.has_work:
        llm._engine.step()
    check_scheduler(core(llm)._scheduler)
    assert (core(llm)._scheduler.usage, core(llm)._masks._guides) == (0, {})


def test_constraint_that_becomes_too_complex_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "MAX_SLOW_S", 0.3)
    llm = engine()
    hostile = make_request(llm, StructuredOutputs(regex="a?((a{100}){100}){100}"))
    others = [make_request(llm, StructuredOutputs(regex="[a-z]{10,20}")), make_request(llm, None, ignore_eos=True)]
    outputs = drive(llm, [hostile, *others])
    last = outputs[hostile.id][-1]
    assert (last.finish_reason, last.fault) == ("error", "structured_outputs")
    assert last.error
    assert len(outputs[hostile.id]) < 20
    assert [outputs[request.id][-1].finish_reason for request in others] == ["stop", "length"]
    with pytest.raises(UserError, match="structured_outputs"):
        answer(StructuredOutputs(regex="a?((a{100}){100}){100}"))
    check_scheduler(core(llm)._scheduler)


def test_nothing_compiles_and_unconstrained_answers_stay_the_same_beside_constrained_ones() -> None:
    llm = engine()
    plain = SamplingParams(seed=3, max_tokens=30, ignore_eos=True)
    alone = llm.generate("a city", plain, use_tqdm=False)[0].outputs[0].token_ids
    compiles = llm.metrics.compiles._value.get()
    mixed = [plain, *[params(StructuredOutputs(regex="[a-z]{20}"), seed=seed) for seed in range(5)]]
    results = llm.generate(["a city"] * len(mixed), mixed, use_tqdm=False)
    assert results[0].outputs[0].token_ids == alone
    assert llm.metrics.compiles._value.get() == compiles


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"json": {"type": "nonsense"}}, "Invalid type"), ({"json": "{"}, "not a JSON document"), ({"regex": "(a"}, "unclosed group"),
        ({"grammar": "root := 3"}, "neither Lark nor GBNF"), ({"structural_tag": {"format": {"type": "x"}}}, "not supported"),
        ({"json": {"$ref": "http://127.0.0.1/x"}}, "not present"), ({"choice": ["a"] * 10_001}, "at most 10000"),
    ],
)  # fmt: skip
def test_bad_constraint_is_refused_with_its_reason(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        answer(StructuredOutputs(**spec))
    assert caught.value.field == "structured_outputs"
