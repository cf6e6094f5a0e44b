"""The formats in which models write tool calls, one table row each; and which of them a model uses."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxserve.text.tool_bodies import JsonShape, Schemas, Shape
from jaxserve.text.tool_markup import GemmaShape, PythonShape, TaggedShape

_NAME = r"(?P<name>[\w.\-/]+)"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CallFrame:
    """What stands around the arguments of calls, for an answer that must consist of them.

    Args:
      opening, closing: before the first call and after the last.
      before, after: around the arguments of each call, with NAME for the tool.
      between: two calls.
      is_single: the model stops after one call.
    """

    before: str
    after: str
    opening: str = ""
    closing: str = ""
    between: str = ""
    is_single: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How calls stand in an answer.

    Args:
      shape: how they are written; None: in channels, see harmony.py.
      starts: markers that open a section of calls wherever they stand.
      first: characters that open one when the answer begins with them.
      loose: what small models write instead, opening and closing, around calls as JSON: believed only of tools that there are.
      ends: markers that may close a section.
      silent: markers around sections, which nobody needs to see.
      inner: further markers within sections.
      ids: "short" for nine letters and digits, as the model's template wants them.
      frame: how a grammar can make the model write calls; None if arguments are not JSON.
      signs: strings of which the model's chat template has all of at least one group, if it was written for this format.
    """

    name: str
    shape: Shape | None
    starts: tuple[str, ...] = ()
    first: str = ""
    loose: tuple[tuple[str, str], ...] = ()
    ends: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    ids: Literal["long", "short"] = "long"
    frame: CallFrame | None = None
    signs: tuple[tuple[str, ...], ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        """All that must be seen, although it may be a special token."""
        return self.starts + self.ends + self.silent + self.inner


_ARGUMENTS = '{"name": "NAME", "arguments": '
_PARAMETERS = '{"name": "NAME", "parameters": '


def _array(opening: str) -> CallFrame:
    return CallFrame(opening=opening, before=_ARGUMENTS, after="}", between=", ", closing="]")


_QWEN_TAGS = TaggedShape(
    head="<function=", name_end=">", key="<parameter=", key_end=">", value="", value_end=("</parameter>", "<parameter=", "</function>"),
    close=("</function>", "</tool_call>"), trims_lines=True, unknown_is_text=True,
)  # fmt: skip
_GLM_TAGS = TaggedShape(
    head="", name_end="\n<", key="<arg_key>", key_end="</arg_key>", value="<arg_value>", value_end=("</arg_value>",),
    close=("</tool_call>",), trims_lines=False, unknown_is_text=False,
)  # fmt: skip

# In the order in which templates are compared with them: the more special first.
TOOL_FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat(
        name="openai", shape=None, signs=(("<|channel|>", "<|message|>", "functions"),),
        starts=("<|channel|>", "<|start|>"), ends=("<|end|>", "<|call|>", "<|return|>"), inner=("<|message|>", "<|constrain|>"),
        frame=CallFrame(before="<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>", after="", is_single=True),
    ),
    ToolFormat(
        name="kimi_k2",
        shape=JsonShape(
            objects=False, header=re.compile(rf"\s*(?P<id>(?:functions\.)?{_NAME}(?::\d+)?)\s*<\|tool_call_argument_begin\|>\s*")
        ),
        starts=("<|tool_call_begin|>",), ends=("<|tool_call_end|>",), inner=("<|tool_call_argument_begin|>",),
        silent=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        frame=CallFrame(
            opening="<|tool_calls_section_begin|>", before="<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>",
            after="<|tool_call_end|>", closing="<|tool_calls_section_end|>",
        ),
        signs=(("<|tool_call_begin|>",),),
    ),
    ToolFormat(
        name="deepseek_v3",
        shape=JsonShape(
            objects=False, header=re.compile(rf"\s*(?:function\s*<｜tool▁sep｜>)?\s*{_NAME}\s*(?:<｜tool▁sep｜>)?\s*(?:```(?:json)?)?\s*")
        ),
        starts=("<｜tool▁call▁begin｜>",), ends=("```", "<｜tool▁call▁end｜>"), inner=("<｜tool▁sep｜>",),
        silent=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        frame=CallFrame(
            opening="<｜tool▁calls▁begin｜>", before="<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
            after="\n```<｜tool▁call▁end｜>", between="\n", closing="<｜tool▁calls▁end｜>",
        ),
        signs=(("<｜tool▁call▁begin｜>",),),
    ),
    ToolFormat(
        name="glm45", shape=_GLM_TAGS, starts=("<tool_call>",), ends=("</tool_call>",),
        inner=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"), signs=(("<arg_key>",),),
    ),
    ToolFormat(
        name="qwen3_coder", shape=_QWEN_TAGS, starts=("<tool_call>", "<function="), ends=("</tool_call>",),
        signs=(("<function=", "<parameter="),),
    ),
    ToolFormat(name="qwen3_xml", shape=_QWEN_TAGS, starts=("<tool_call>", "<function="), ends=("</tool_call>",)),
    ToolFormat(
        name="functiongemma", shape=GemmaShape(quotes=("<escape>",)), starts=("<start_function_call>",), inner=("<escape>",),
        ends=("<end_function_call>", "<start_function_response>"), signs=(("<start_function_call>",),),
    ),
    ToolFormat(
        name="gemma4", shape=GemmaShape(quotes=('<|"|>',)), starts=("<|tool_call>",), inner=('<|"|>',),
        ends=("<tool_call|>", "<|tool_response>"), signs=(("<|tool_call>",),),
    ),
    ToolFormat(
        name="mistral", starts=("[TOOL_CALLS]",), inner=("[ARGS]", "[CALL_ID]"), ids="short", signs=(("[TOOL_CALLS]",),),
        frame=_array("[TOOL_CALLS]["),
        shape=JsonShape(header=re.compile(rf"\s*{_NAME}\s*(?:\[CALL_ID\](?P<id>\w+))?\s*(?:\[ARGS\])?\s*")),
    ),
    ToolFormat(
        name="internlm", shape=JsonShape(), starts=("<|action_start|><|plugin|>",), ends=("<|action_end|>",),
        frame=CallFrame(before="<|action_start|><|plugin|>\n" + _PARAMETERS, after="}<|action_end|>"),
        signs=(("<|action_start|>",), ("<|plugin|>",)),
    ),
    ToolFormat(
        name="phi4_mini_json", shape=JsonShape(), starts=("functools",), frame=_array("functools["),
        signs=(("<|/tool|>",), ("functools",)),
    ),
    ToolFormat(
        name="granite", shape=JsonShape(), starts=("<|tool_call|>", "<tool_call>"), first="[",
        ends=("</tool_call>", "<|end_of_text|>"), frame=_array("<|tool_call|>["), signs=(("<|tool_call|>",),),
    ),
    ToolFormat(
        name="hermes", shape=JsonShape(), starts=("<tool_call>",), ends=("</tool_call>",), signs=(("<tool_call>", '"arguments'),),
        loose=(("```json", "```"), ("<tools>", "</tools>")),
        frame=CallFrame(before="<tool_call>\n" + _ARGUMENTS, after="}\n</tool_call>", between="\n"),
    ),
    ToolFormat(
        name="llama4_pythonic", shape=PythonShape(), starts=("<|python_start|>",), first="[", ends=("<|python_end|>",),
        signs=(("<|python_start|>",), ("<|header_start|>", "func_name1(")),
    ),
    ToolFormat(name="pythonic", shape=PythonShape(), first="[", signs=(("func_name1(",),)),
    ToolFormat(
        name="xlam", shape=JsonShape(), starts=("```json", "[TOOL_CALLS]", "<tool_call>"), first="[",
        ends=("```", "</tool_call>"), frame=_array("["), signs=(("single JSON array",),),
    ),
    ToolFormat(
        name="llama3_json", shape=JsonShape(more=True), starts=("<|python_tag|>",), first="{", ends=("<|eom_id|>",),
        frame=CallFrame(before=_PARAMETERS, after="}", between="; "),
        signs=(("<|python_tag|>",), ('"parameters": dictionary of argument name',)),
    ),
)  # fmt: skip


# Of answers that must call tools, by models whose own format no grammar says here.
REQUIRED_FORMAT = ToolFormat(name="required", shape=JsonShape(), first="[", frame=dataclasses.replace(_array("["), before=_PARAMETERS))


def choose_tool_format(name: str, template: str | None) -> ToolFormat | None:
    """The format of this name; with "auto" the one that the model's chat template was written for, None if it does not tell."""
    if name == "auto":
        return next((each for each in TOOL_FORMATS if any(all(sign in (template or "") for sign in group) for group in each.signs)), None)
    return None if name == "none" else next(each for each in TOOL_FORMATS if each.name == name)


def schemas_of(tools: Sequence[Mapping[str, Any]]) -> Schemas:
    """Parameters of each tool by its name."""
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
