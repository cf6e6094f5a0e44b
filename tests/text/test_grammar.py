"""Masks against brute force over small languages, and what the compiler does with constraints that are wrong, hostile, or many."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from typing import Any

import numpy as np
import pytest

from jaxserve.errors import QueueFullError, UserError
from jaxserve.request import StructuredOutputs
from jaxserve.text import grammar
from jaxserve.text.grammar import Grammars
from jaxserve.text.tokenizer import Tokenizer

PADDING = 37  # logits are wider than the vocabulary
LANGUAGES: dict[str, tuple[StructuredOutputs, list[str]]] = {
    "choice": (StructuredOutputs(choice=["the", "then", "日本", "qu\nick"]), ["the", "then", "日本", "qu\nick"]),
    "regex": (StructuredOutputs(regex="(the|a{2,4}|é) ?[ox]"),
              [a + b + c for a in ("the", "aa", "aaa", "aaaa", "é") for b in ("", " ") for c in "ox"]),
    "lark": (StructuredOutputs(grammar='start: A | A "," A\nA: "in" | "ing"'), ["in", "ing", "in,in", "in,ing", "ing,in", "ing,ing"]),
    "gbnf": (StructuredOutputs(grammar='root ::= "o" ("ver" | "ther")?'), ["o", "over", "other"]),
    "schema": (
        StructuredOutputs(json={"type": "object", "properties": {"the": {"enum": ["ing", 1, None]}}, "required": ["the"],
                                "additionalProperties": False}, disable_any_whitespace=True),
        ['{"the":"ing"}', '{"the":1}', '{"the":null}'],
    ),
    "separators": (StructuredOutputs(json={"const": [1, True]}, whitespace_pattern=" "), ["[1,true]", "[ 1,true]"]),
}  # fmt: skip


def grammars_of(tokenizer: Tokenizer, **options: Any) -> Grammars:
    return Grammars(tokenizer, vocab_size=tokenizer.vocab_size + PADDING, eos_ids=tokenizer.eos_ids, **options)


def ids_of(mask: np.ndarray) -> set[int]:
    assert mask.dtype == np.int32
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def brute_force(tokenizer: Tokenizer, language: list[bytes], prefix: bytes) -> set[int]:
    allowed = set(tokenizer.eos_ids) if prefix in language else set()
    for token in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(token)
        if data and token not in tokenizer.special_ids and any(word.startswith(prefix + data) for word in language):
            allowed.add(token)
    return allowed


@pytest.mark.parametrize("kind", ["bpe", "spm"])
@pytest.mark.parametrize("name", [name for name in LANGUAGES if name != "separators"])
def test_masks_equal_brute_force(kind: str, name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    spec, words = LANGUAGES[name]
    language = [word.encode() for word in words]
    compiled, rng = grammars_of(tokenizer).compile(spec), random.Random(3)
    for _ in range(25):
        matcher, prefix = compiled.begin(), b""
        while not matcher.finished:
            mask = ids_of(matcher.fill())
            expected = brute_force(tokenizer, language, prefix)
            if mask != expected:  # where only one text can follow, it comes in the tokens that the tokenizer would give it
                assert len(mask) == 1
                assert mask < expected, prefix
                following = [word[len(prefix) :] for word in language if word.startswith(prefix)]
                assert all(word.startswith(tokenizer.token_bytes(min(mask))) for word in following), prefix
            token = rng.choice(sorted(mask))
            matcher.consume(token)
            if token in tokenizer.eos_ids:
                assert matcher.finished
            else:
                prefix += tokenizer.token_bytes(token)
        assert prefix in language


def test_model_without_an_end_of_sequence_ends_where_nothing_can_follow(bpe: Tokenizer) -> None:
    grammars = Grammars(bpe, vocab_size=bpe.vocab_size, eos_ids=frozenset())
    matcher = grammars.compile(StructuredOutputs(regex="ab*")).begin()
    for text in "abb":
        mask = ids_of(matcher.fill())
        assert max(mask) < bpe.vocab_size
        matcher.consume(bpe.encode(text, add_special_tokens=False)[0])
    matcher = grammars.compile(StructuredOutputs(choice=["a"])).begin()
    matcher.consume(bpe.encode("a", add_special_tokens=False)[0])
    assert matcher.finished


def test_forbidden_tokens_are_left_out_unless_nothing_else_remains(bpe: Tokenizer) -> None:
    matcher = grammars_of(bpe).compile(StructuredOutputs(regex="a*")).begin()
    end = next(iter(bpe.eos_ids))
    everything = ids_of(matcher.fill())
    assert ids_of(matcher.fill((end,))) == everything - {end}
    assert ids_of(matcher.fill(sorted(everything))) == everything


def test_text_of_a_special_token_is_written_in_ordinary_ones(bpe: Tokenizer) -> None:
    matcher, text = grammars_of(bpe).compile(StructuredOutputs(choice=["<|eos|>"])).begin(), b""
    while not matcher.finished:
        mask = ids_of(matcher.fill())
        assert not mask & bpe.special_ids
        matcher.consume(min(mask))
        text += bpe.token_bytes(min(mask))
    assert text == b"<|eos|>"


def test_special_tokens_stand_for_themselves_in_structural_tags(bpe: Tokenizer) -> None:
    tag = {"type": "tag", "begin": "<|im_start|>", "content": {"type": "const_string", "value": "x"}, "end": ""}
    matcher = grammars_of(bpe).compile(StructuredOutputs(structural_tag={"format": tag})).begin()
    assert ids_of(matcher.fill()) == {bpe.encode("<|im_start|>", add_special_tokens=False)[0]}


FORMATS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"type": "sequence", "elements": [{"type": "const_string", "value": 'a"'}, {"type": "regex", "pattern": "b/+"}]},
     ['a"b//'], ['a"', "b/"]),
    ({"type": "or", "elements": [{"type": "const_string", "value": "x"}, {"type": "grammar", "grammar": 'root ::= "y" | "z"'}]},
     ["x", "z"], ["xy"]),
    ({"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": ["</t>", "."]},
     ["<t>hello</t>", "<t>a."], ["<t>hello", "<t></t>a"]),
    ({"type": "tag", "begin": "<", "content": {"type": "json_schema", "json_schema": {"type": "integer"}}, "end": ">"},
     ["<12>"], ["<a>", "12"]),
    (
        {"type": "tags_with_separator", "separator": ", ", "at_least_one": True,
         "tags": [{"begin": "(", "content": {"type": "const_string", "value": c}, "end": ")"} for c in "ab"]},
        ["(a)", "(b), (a), (a)"], ["", "(a),(b)", "(a), "],
    ),
    (
        {"type": "triggered_tags", "triggers": ["<f"],
         "tags": [{"begin": "<f>", "content": {"type": "const_string", "value": "1"}, "end": "</f>"},
                  {"begin": "<fg>", "content": {"type": "const_string", "value": "2"}, "end": "</f>"}]},
        ["", "text < f", "a <f>1</f> b <fg>2</f>"], ["<f>2</f>", "a <f", "a <fx"],
    ),
    (
        {"type": "triggered_tags", "triggers": ["<f>"], "at_least_one": True, "stop_after_first": True,
         "tags": [{"begin": "<f>", "content": {"type": "const_string", "value": "1"}, "end": "</f>"}]},
        ["<f>1</f>", "so: <f>1</f>"], ["so", "<f>1</f> x"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("form", "inside", "outside"), FORMATS, ids=lambda value: value.get("type") if isinstance(value, dict) else None)
def test_structural_tag_takes_what_it_describes(bpe: Tokenizer, form: dict[str, Any], inside: list[str], outside: list[str]) -> None:
    compiled = grammars_of(bpe).compile(StructuredOutputs(structural_tag=json.dumps({"type": "structural_tag", "format": form})))

    def is_inside(text: str) -> bool:
        matcher = compiled.begin()
        for token in bpe.encode(text, add_special_tokens=False):
            if matcher.finished or token not in ids_of(matcher.fill()):
                return False
            matcher.consume(token)
        return matcher.finished or bool(bpe.eos_ids & ids_of(matcher.fill()))

    assert [text for text in inside if not is_inside(text)] == []
    assert [text for text in outside if is_inside(text)] == []


@pytest.mark.parametrize(
    "tag", [{}, {"format": 5}, {"format": {"type": "king"}}, {"format": {"type": "regex"}},
            {"format": {"type": "sequence", "elements": []}},
            {"structures": [], "triggers": ["a"]}, {"structures": [{"begin": "b", "schema": {}, "end": ""}], "triggers": ["a"]},
            {"format": {"type": "tag", "begin": "a", "content": {"type": "any_text"}, "end": 5}}, [1]],
)  # fmt: skip
def test_structural_tag_that_is_not_understood_is_refused(bpe: Tokenizer, tag: Any) -> None:
    with pytest.raises(UserError, match="structured_outputs"):
        grammars_of(bpe).compile(StructuredOutputs(structural_tag=tag if isinstance(tag, dict) else json.dumps(tag)))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE: dict[str, dict[str, Any]] = {
    "deep schema": {"json": '{"type":"object","properties":{"a":' * 2000 + "{}" + "}}" * 2000},
    "deeper schema": {"json": "[" * 60_000 + "]" * 60_000},
    "nested schema": {"json": nested(60)},
    "huge enum": {"json": {"enum": [f"value {i}" for i in range(8000)]}},
    "too large": {"json": {"enum": ["x" * 200_000]}},
    "many properties": {"json": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(2000)}}},
    "references": {"json": {"$defs": {f"n{i}": {"type": "object", "properties": {k: {"$ref": f"#/$defs/n{i + 1}"} for k in "ab"}}
                                      for i in range(30)} | {"n30": {}}, "$ref": "#/$defs/n0"}},
    "product": {"json": {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(2)]} for i in range(20)]}},
    "backtracking": {"regex": "(a|a)*b(a+)+(a*)*$"},
    "states": {"regex": ".*a.{200}b.{200}c"},
    "powers": {"regex": "((a{100}){100}){100}"},
    "deep regex": {"regex": "(" * 30_000 + "a" + ")" * 30_000},
    "deep grammar": {"grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "endless grammar": {"grammar": "root ::= root"},
    "ambiguous grammar": {"grammar": 'start: s\ns: s s | s s s | "a" |'},
    "many choices": {"choice": [f"v{i}" for i in range(9999)]},
    "number": {"json": {"type": "integer", "multipleOf": 982451653}},
    "long": {"json": {"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**9}}},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_constraint_is_compiled_or_refused_soon_and_blocks_nobody(bpe: Tokenizer, name: str) -> None:
    grammars, longest, stop = grammars_of(bpe), [0.0], threading.Event()

    def watch() -> None:
        last = time.monotonic()
        while not stop.wait(0.001):
            longest[0] = max(longest[0], time.monotonic() - last)
            last = time.monotonic()

    watcher = threading.Thread(target=watch)
    watcher.start()
    started_s = time.monotonic()
    try:
        compiled = grammars.compile(StructuredOutputs(**HOSTILE[name]))
        compiled.begin().fill()
    except (UserError, grammar.GrammarError) as error:
        assert len(str(error)) < 600
    finally:
        stop.set()
        watcher.join()
    assert time.monotonic() - started_s < 9
    assert longest[0] < 1.5  # the interpreter went on; generous for a busy machine


def test_compiled_once_for_equal_constraints_and_forgotten_in_order_of_use(bpe: Tokenizer) -> None:
    grammars = grammars_of(bpe, max_cached=2)
    schema = {"type": "integer"}
    first = grammars.compile(StructuredOutputs(json=schema))
    assert grammars.compile(StructuredOutputs(json=json.dumps(schema), source="response_format")) is first
    assert grammars.compile(StructuredOutputs(json=schema, disable_any_whitespace=True)) is not first
    assert grammars.compile(StructuredOutputs(json=schema)) is first
    grammars.compile(StructuredOutputs(regex="a"))
    grammars.compile(StructuredOutputs(regex="b"))
    assert grammars.compile(StructuredOutputs(json=schema)) is not first


def test_error_names_the_field_that_asked(bpe: Tokenizer) -> None:
    for source in ("response_format", "tools"):
        with pytest.raises(UserError) as caught:
            grammars_of(bpe).compile(StructuredOutputs(json={"type": "x"}, source=source))
        assert (caught.value.field, caught.value.status) == (source, 400)
        assert caught.value.message.startswith(f"{source}: Invalid type")


def test_slow_constraint_is_given_up_and_a_full_queue_says_so(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, release = grammars_of(bpe, threads=1, timeout_s=0.01), threading.Event()
    monkeypatch.setattr(grammar, "_grammar_text", lambda spec, special: release.wait(30) and 'start: "a"')
    monkeypatch.setattr(grammar, "MAX_WAITING", 2)
    with pytest.raises(UserError, match=r"not compiled within 0\.01 s"):
        grammars.compile(StructuredOutputs(regex="a"))
    with pytest.raises(UserError, match="not compiled within"):
        asyncio.run(grammars.compile_async(StructuredOutputs(regex="a")))
    # Of what has to wait for its turn nothing is known.
    monkeypatch.setattr(grammars, "_wait_s", 0.01)
    with pytest.raises(QueueFullError):
        grammars.compile(StructuredOutputs(regex="b"))
    with pytest.raises(QueueFullError):
        asyncio.run(grammars.compile_async(StructuredOutputs(regex="b")))
    with pytest.raises(QueueFullError):
        grammars.compile(StructuredOutputs(regex="c"))
    release.set()


def test_time_to_read_the_vocabulary_is_not_that_of_the_first_constraint(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, reading, release, read = grammars_of(bpe), threading.Event(), threading.Event(), grammar._read_tokenizer

    def read_slowly(*args: Any) -> Any:
        reading.set()
        release.wait(30)
        return read(*args)

    monkeypatch.setattr(grammar, "_read_tokenizer", read_slowly)
    build = grammars._submit(StructuredOutputs(regex="a"))
    assert reading.wait(30)
    assert not build.begun.done()
    release.set()
    assert build.done.result(30) is grammars.compile(StructuredOutputs(regex="a"))
    assert build.begun.done()


def test_answers_of_one_grammar_do_not_use_up_each_others_limits(bpe: Tokenizer) -> None:
    grammars = grammars_of(bpe)
    compiled = grammars.compile(StructuredOutputs(regex="[a-z]*"))
    matcher = compiled.begin()
    letter = bpe.encode("a", add_special_tokens=False)[0]
    matcher.fill()
    matcher.consume(letter)
    before = ids_of(matcher.fill())
    matcher._matcher.consume_token(next(iter(bpe.special_ids - bpe.eos_ids)))  # spoils what it shares
    assert matcher._matcher.is_error()
    assert ids_of(matcher.fill()) == before
    assert compiled.spoiled
    assert grammars.compile(StructuredOutputs(regex="[a-z]*")) is not compiled


def test_tokenizer_whose_tokens_depend_on_their_neighbours_is_refused(wordpiece: Tokenizer) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        Grammars(wordpiece, vocab_size=10, eos_ids=frozenset({0})).compile(StructuredOutputs(regex="a"))


@pytest.mark.parametrize(
    "fields", [{}, {"json": {}, "regex": "a"}, {"choice": []}, {"choice": "ab"}, {"choice": [1]}, {"regex": 5}, {"json": 5},
               {"json_object": False},
               {"structural_tag": [1]}, {"regex": "a", "whitespace_pattern": 1}],
)  # fmt: skip
def test_constraint_that_is_none_or_several_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="structured_outputs"):
        StructuredOutputs(**fields)


@pytest.mark.parametrize("spec", [{"grammar": "start: start"}, {"json": {"$ref": "#"}}])
def test_form_that_nothing_satisfies_is_refused_in_plain_words(bpe: Tokenizer, spec: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no text can satisfy it"):
        grammars_of(bpe).compile(StructuredOutputs(**spec))


def test_mistake_is_shown_without_the_lines_of_a_grammar_that_is_not_the_clients(bpe: Tokenizer) -> None:
    grammars = grammars_of(bpe)
    tag = {"type": "structural_tag", "format": {"type": "sequence", "elements": [
        {"type": "const_string", "value": "<think>"}, {"type": "json_schema", "json_schema": {"type": "foo"}},
    ]}}  # fmt: skip
    with pytest.raises(UserError) as caught:
        grammars.compile(StructuredOutputs(structural_tag=tag, source="response_format"))
    assert caught.value.message == "response_format: failed to compile JSON schema: Invalid type: foo"
    with pytest.raises(UserError, match=r" 2 \| "):
        grammars.compile(StructuredOutputs(grammar='start: "a"\n%json { "type": "foo" }\n'))
