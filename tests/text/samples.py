"""Answers as models write them, in every tool-call format, and what they mean."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "where": {"type": "object"},
                    "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]

CITY: dict[str, Any] = {"city": 'Zürich 😀 "q" \\ \n</tool>', "days": 3}
NESTED: dict[str, Any] = {"city": "a", "where": {"x": [1, {"y": "}]"}], "z": None, "on": True}, "tags": ["b", "c"]}
DEEPSEEK = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"


@dataclasses.dataclass(frozen=True)
class Sample:
    """An answer and the content and calls in it; calls are (name, arguments)."""

    form: str
    text: str
    content: str
    calls: tuple[tuple[str, Any], ...]

    def __repr__(self) -> str:
        return f"{self.form}: {self.text!r:.60}"


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _json_call(name: str, arguments: Any, key: str = "arguments") -> str:
    return dump({"name": name, key: arguments})


def _python(value: Any) -> str:
    return repr(value)


def _tagged(name: str, arguments: dict[str, Any]) -> str:
    values = {key: value if isinstance(value, str) else dump(value) for key, value in arguments.items()}
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def _glm(name: str, arguments: dict[str, Any]) -> str:
    values = {key: value if isinstance(value, str) else dump(value) for key, value in arguments.items()}
    inner = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in values.items())
    return f"<tool_call>{name}\n{inner}</tool_call>"


def _gemma(value: Any, quote: str) -> str:
    match value:
        case str():
            return quote + value + quote
        case dict():
            return "{" + ",".join(f"{key}:{_gemma(inner, quote)}" for key, inner in value.items()) + "}"
        case list():
            return "[" + ",".join(_gemma(inner, quote) for inner in value) + "]"
        case _:
            return dump(value)


def write_calls(form: str, calls: Sequence[tuple[str, Any]]) -> str:
    """Calls as a model that was trained on this format writes them."""
    match form:
        case "hermes":
            return "\n".join(f"<tool_call>\n{_json_call(*call)}\n</tool_call>" for call in calls)
        case "llama3_json":
            return "<|python_tag|>" + "; ".join(_json_call(*call, "parameters") for call in calls)
        case "pythonic":
            return "[" + ", ".join(f"{name}({', '.join(f'{k}={_python(v)}' for k, v in args.items())})" for name, args in calls) + "]"
        case "llama4_pythonic":
            return f"<|python_start|>{write_calls('pythonic', calls)}<|python_end|>"
        case "mistral":
            return "".join(f"[TOOL_CALLS]{name}{dump(args)}" for name, args in calls)
        case "qwen3_coder" | "qwen3_xml":
            return "\n".join(_tagged(*call) for call in calls)
        case "deepseek_v3":
            begin, call_begin, sep, call_end, end = DEEPSEEK
            return begin + "\n".join(f"{call_begin}function{sep}{n}\n```json\n{dump(a)}\n```{call_end}" for n, a in calls) + end
        case "openai":
            return "<|start|>assistant".join(
                f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dump(args)}<|call|>" for name, args in calls
            )
        case "glm45":
            return "\n".join(_glm(*call) for call in calls)
        case "kimi_k2":
            inner = "".join(
                f"<|tool_call_begin|>functions.{name}:{place}<|tool_call_argument_begin|>{dump(args)}<|tool_call_end|>"
                for place, (name, args) in enumerate(calls)
            )
            return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"
        case "granite":
            return "<|tool_call|>[" + ", ".join(_json_call(*call) for call in calls) + "]"
        case "phi4_mini_json":
            return "functools[" + ", ".join(_json_call(*call) for call in calls) + "]"
        case "internlm":
            return "".join(f"<|action_start|><|plugin|>\n{_json_call(*call, 'parameters')}<|action_end|>" for call in calls)
        case "xlam":
            return "[" + ", ".join(_json_call(*call) for call in calls) + "]"
        case "functiongemma":
            return "".join(f"<start_function_call>call:{n}{_gemma(a, '<escape>')}<end_function_call>" for n, a in calls)
        case "gemma4":
            quote = '<|"|>'
            return "".join(f"<|tool_call>call:{n}{_gemma(a, quote)}<tool_call|>" for n, a in calls)
        case _:
            raise AssertionError(form)


FORMS = (
    "hermes", "llama3_json", "pythonic", "llama4_pythonic", "mistral", "qwen3_coder", "qwen3_xml", "deepseek_v3", "openai", "glm45",
    "kimi_k2", "granite", "phi4_mini_json", "internlm", "xlam", "functiongemma", "gemma4",
)  # fmt: skip
# These find calls only at the beginning of an answer.
ONLY_FIRST = ("pythonic", "xlam")

_WEATHER, _NOW = ("get_weather", CITY), ("now", {})
_DEEP = ("get_weather", NESTED)


def _around(form: str, before: str, calls: str, after: str) -> str:
    if form != "openai":
        return before + calls + after
    final = "<|channel|>final<|message|>{}<|end|><|start|>assistant"
    return final.format(before) + calls + ("<|start|>assistant" + final.format(after).removesuffix("<|start|>assistant") if after else "")


def _samples() -> list[Sample]:
    found: list[Sample] = []
    for form in FORMS:
        for calls in ([_WEATHER], [_NOW], [_DEEP], [_WEATHER, _NOW, _DEEP]):
            text = write_calls(form, calls)
            found.append(Sample(form, text, "", tuple(calls)))
            if form not in ONLY_FIRST:
                found.append(Sample(form, _around(form, "Let me see.", text, ""), "Let me see.", tuple(calls)))
        after = _around(form, "Let me <see> [it]:", write_calls(form, [_WEATHER]), "Done: 1 < 2 [x].")
        if form not in (*ONLY_FIRST, "llama3_json"):
            found.append(Sample(form, after, "Let me <see> [it]:Done: 1 < 2 [x].", (_WEATHER,)))
    return found


_ASK = ("get_weather", {"city": "Paris"})
_PARIS = '{"city": "Paris"}'
# What `write_calls` does not write, but models do; and what looks like a call and is none.
OTHERS: tuple[Sample, ...] = (
    Sample("hermes", f'<tool_call>{{"arguments": {_PARIS}, "name": "get_weather"}}</tool_call>', "", (_ASK,)),
    Sample("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {dump(_PARIS)}}}</tool_call>', "", (_ASK,)),
    Sample("hermes", '<tool_call>{"name": "now", "id": {"a": [1]}}</tool_call>', "", (_NOW,)),
    Sample("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", (_NOW,)),
    Sample("hermes", f'a <tool_call>{{"name": "get_weather", "arguments": {_PARIS}\n</tool_call> b', "a b", (_ASK,)),
    Sample("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": Paris!}</tool_call>', "", (("get_weather", None),)),
    Sample("hermes", '<tool_call>\n{"nome": 3}\n</tool_call>', '<tool_call>\n{"nome": 3}\n</tool_call>', ()),
    Sample("hermes", "<tool_call>\nnot JSON\n</tool_call> end", "<tool_call>\nnot JSON\n</tool_call> end", ()),
    Sample("hermes", "<tool_call>{'name': 'now'}</tool_call>", "<tool_call>{'name': 'now'}</tool_call>", ()),
    Sample("hermes", '<tool_call><tool_call>{"name": "now", "arguments": {}}</tool_call>', "<tool_call>", (_NOW,)),
    Sample("hermes", "a <tool_call", "a <tool_call", ()),
    Sample("hermes", "<tool_call>", "<tool_call>", ()),
    Sample("hermes", f'```json\n{{"name": "get_weather", "arguments": {_PARIS}}}\n```', "", (_ASK,)),
    Sample("hermes", f'<tools>\n{{"arguments": {_PARIS}, "name": "get_weather"}}\n</tools>', "", (_ASK,)),
    Sample(
        "hermes",
        f'Both:\n```json\n{{"name": "get_weather", "arguments": {_PARIS}}}\n{{"name": "now", "arguments": {{}}}}\n```\nDone.',
        "Both:\nDone.",
        (_ASK, _NOW),
    ),
    Sample("hermes", '```json\n[{"name": "now"}, {"name": "now", "arguments": {}}]\n```\n', "", (_NOW, _NOW)),
    Sample("hermes", '```json\n{"name": "Bob", "arguments": {}}\n```', '```json\n{"name": "Bob", "arguments": {}}\n```', ()),
    Sample("hermes", 'See\n```json\n{"a": 1}\n```', 'See\n```json\n{"a": 1}\n```', ()),
    Sample("hermes", '<tool_call>{"name": "now"}</tool_call>\n```json\n[1]\n```', "\n```json\n[1]\n```", (_NOW,)),
    Sample("llama3_json", f'\n{{"name": "get_weather", "parameters": {_PARIS}}}', "", (_ASK,)),
    Sample("llama3_json", f'{{"type": "function", "name": "get_weather", "parameters": {_PARIS}}}<|eom_id|>', "", (_ASK,)),
    Sample("llama3_json", '{"city": "Paris", "name": "x"}', '{"city": "Paris", "name": "x"}', ()),
    Sample("llama3_json", '{"name": "Bob", "type": 3}', '{"name": "Bob", "type": 3}', ()),
    Sample("llama3_json", '<|python_tag|>print("hi")', '<|python_tag|>print("hi")', ()),
    Sample("pythonic", "[link](http://x.y) and [1, 2]", "[link](http://x.y) and [1, 2]", ()),
    Sample("pythonic", "[get_weather('Paris')]", "[get_weather('Paris')]", ()),
    Sample("pythonic", "[get_weather(city=open('x'))]", "[get_weather(city=open('x'))]", ()),
    Sample("pythonic", "[get_weather(city='Paris'", "[get_weather(city='Paris'", ()),
    Sample(
        "pythonic",
        " [get_weather(city='Paris', days=-1, where=(true, null))]\n",
        "",
        (("get_weather", {"city": "Paris", "days": -1, "where": [True, None]}),),
    ),
    Sample("pythonic", "[a.b(x=1), now(), oops]", "oops]", (("a.b", {"x": 1}), _NOW)),
    Sample("llama4_pythonic", "[get_weather(city='Paris')]", "", (_ASK,)),
    Sample("llama4_pythonic", "<|python_start|>x<|python_end|>", "<|python_start|>x<|python_end|>", ()),
    Sample(
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {_PARIS}}}, {{"name": "now", "arguments": {{}}}}]',
        "",
        (_ASK, _NOW),
    ),
    Sample("mistral", f"Hm.[TOOL_CALLS]get_weather[CALL_ID]abc123XYZ[ARGS]{_PARIS}", "Hm.", (_ASK,)),
    Sample("mistral", "[TOOL_CALLS] no call {", "[TOOL_CALLS] no call {", ()),
    Sample("mistral", "[TOOL_CALLS]" + "x" * 600 + "{}", "[TOOL_CALLS]" + "x" * 600 + "{}", ()),
    Sample(
        "qwen3_coder", "<function=get_weather>\n<parameter=city>\nnull\n</parameter>\n</function>", "", (("get_weather", {"city": "null"}),)
    ),
    Sample(
        "qwen3_coder",
        "<tool_call><function=get_weather><parameter=city>\nParis<parameter=days>\n3\n</function></tool_call>",
        "",
        (("get_weather", {"city": "Paris", "days": 3}),),
    ),
    Sample(
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n\nlong text\n\n\n</parameter>\n</function>\n</tool_call>",
        "",
        (("get_weather", {"city": "\nlong text\n\n"}),),
    ),
    Sample("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=a>\n5\n</parameter>\n</function>\n</tool_call>", "", (("f", {"a": "5"}),)),
    Sample(
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=days>\nsoon\n</parameter>\n<parameter=city>\nOn",
        "",
        (("get_weather", {"days": "soon", "city": "On"}),),
    ),
    Sample("qwen3_coder", "<function=<function=now></function>", "<function=", (_NOW,)),
    Sample("qwen3_coder", "<tool_call> what? </tool_call>", "<tool_call> what? </tool_call>", ()),
    Sample("qwen3_coder", "if a <function=3 b", "if a <function=3 b", ()),
    Sample("deepseek_v3", f"{DEEPSEEK[0]}{DEEPSEEK[1]}get_weather{DEEPSEEK[2]}{_PARIS}{DEEPSEEK[3]}{DEEPSEEK[4]}", "", (_ASK,)),
    Sample("deepseek_v3", f"{DEEPSEEK[1]}a b c{{", f"{DEEPSEEK[1]}a b c{{", ()),
    Sample("openai", "<|channel|>final<|message|>Hello.<|return|>", "Hello.", ()),
    Sample(
        "openai",
        "<|channel|>commentary<|message|>I'll look.<|end|><|start|>assistant to=functions.now<|channel|>commentary json<|message|><|call|>",
        "I'll look.",
        (_NOW,),
    ),
    Sample("openai", " to=functions.now<|channel|>commentary<|message|>{}", "", (_NOW,)),
    Sample("openai", "No channels at all.", "No channels at all.", ()),
    Sample("openai", "<|channel|>final<|message|>a < b <| c", "a < b <| c", ()),
    Sample("glm45", "<tool_call>now</tool_call>", "", (_NOW,)),
    Sample(
        "glm45",
        "<tool_call>f<arg_key>a</arg_key><arg_value>5</arg_value><arg_key>b</arg_key><arg_value>x</arg_value></tool_call>",
        "",
        (("f", {"a": 5, "b": "x"}),),
    ),
    Sample("glm45", '<tool_call>{"name": "now"}</tool_call>', '<tool_call>{"name": "now"}</tool_call>', ()),
    Sample("kimi_k2", "<|tool_call_begin|>hm<|tool_call_end|>", "<|tool_call_begin|>hm<|tool_call_end|>", ()),
    Sample("granite", f'<tool_call>[{{"name": "get_weather", "arguments": {_PARIS}}}]', "", (_ASK,)),
    Sample("granite", f'[{{"name": "get_weather", "arguments": {_PARIS}}}] ok', " ok", (_ASK,)),
    Sample("granite", "[1, 2] are numbers", "[1, 2] are numbers", ()),
    Sample("phi4_mini_json", "functools is a module", "functools is a module", ()),
    Sample("internlm", "<|action_start|><|interpreter|>\nprint(1)", "<|action_start|><|interpreter|>\nprint(1)", ()),
    Sample("xlam", f'Sure:\n```json\n[{{"name": "get_weather", "arguments": {_PARIS}}}]\n```', "Sure:", (_ASK,)),
    Sample("xlam", 'See\n```json\n{"a": 1}\n```', 'See\n```json\n{"a": 1}\n```', ()),
    Sample(
        "functiongemma",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:<escape>3<escape>}",
        "",
        (("get_weather", {"city": "Paris", "days": 3}),),
    ),
    Sample("functiongemma", "<start_function_call>call:get_weather{city:Paris}<start_function_response>", "", (_ASK,)),
    Sample("functiongemma", "<start_function_call>now{}<end_function_call>", "<start_function_call>now{}<end_function_call>", ()),
    Sample(
        "functiongemma",
        "<start_function_call>call:f{a:<escape>b}<end_function_call>",
        "<start_function_call>call:f{a:<escape>b}<end_function_call>",
        (),
    ),
)

NO_CALLS = "Plain answer, with {braces} in the middle,\n[brackets], 1 < 2 <b>and</b> `code`.\n\n"
SAMPLES = (*_samples(), *OTHERS, *(Sample(form, NO_CALLS, NO_CALLS, ()) for form in FORMS))
