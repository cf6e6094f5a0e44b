"""The form of answers with tool calls: of those that must consist of them, and of those in which a call must be right if it comes.

Calls are in the model's own format where a grammar can say it. Where one must come and it cannot, they are vLLM's array of calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from jaxserve.request import StructuredOutputs
from jaxserve.text.reasoning import ReasoningFormat
from jaxserve.text.tools import REQUIRED_FORMAT, CallFrame, ToolFormat, schemas_of

# White space between the tokens of arguments: models write them on one line.
CALL_SPACE = " ?"
_COMPOSED = ("allOf", "anyOf", "oneOf", "$ref", "patternProperties", "if", "dependentSchemas", "unevaluatedProperties")
_FINAL = "<|channel|>final<|message|>"
_PLAIN_NAME = re.compile(r"[\w.\-]+")
_THINKING_SPACE: Mapping[str, Any] = {"type": "regex", "pattern": r"\s{0,2}"}


def required_form(
    tools: Sequence[Mapping[str, Any]], form: ToolFormat | None, reasoning: ReasoningFormat | None, *, inside: bool | None, parallel: bool
) -> tuple[ToolFormat, dict[str, Any]]:
    """How an answer with nothing but calls is read, and what it must look like, as a structural tag.

    Reasoning may come before: where the prompt has begun it, it must end; where nothing tells, the model decides.

    Args:
      tools: those that may be called; at least one.
      form: the model's own format, if it is known.
      inside: whether the prompt ends within reasoning; None if it does not tell.
      parallel: more than one call is allowed.
    """
    schemas = schemas_of(tools)
    if form is None or form.frame is None or not all(_PLAIN_NAME.fullmatch(name) for name in schemas):
        form = REQUIRED_FORMAT
    frame = form.frame
    assert frame is not None, f"{form.name} has a frame"
    calls = _calls(frame, _tags(frame, schemas, schemas), parallel=parallel and not frame.is_single)
    around = [*_const(frame.opening), calls, *_const(frame.closing)]
    return form, {"type": "structural_tag", "format": _behind_reasoning({"type": "sequence", "elements": around}, reasoning, inside)}


def strict_form(
    tools: Sequence[Mapping[str, Any]], strict: Collection[str], form: ToolFormat, reasoning: ReasoningFormat | None, *,
    inside: bool | None, parallel: bool,
) -> dict[str, Any] | None:  # fmt: skip
    """What an answer must look like in which a call is right if it comes: of a tool that there is, with arguments of its schema.

    Args:
      strict: names of the tools whose schemas count; the others take any object.
    Returns: a structural tag; None if nothing is strict, or calls of this format do not begin with a marker of their own.
    """
    schemas, frame = schemas_of(tools), form.frame
    if not strict or frame is None or form.shape is None or form.first or not all(_PLAIN_NAME.fullmatch(name) for name in schemas):
        return None
    tags = _tags(frame, schemas, strict)
    if frame.opening:
        section = _calls(frame, tags, parallel=parallel)
        tags = [{"type": "tag", "begin": frame.opening, "content": section, "end": frame.closing}]
    begins = frame.opening or frame.before
    trigger = next((start for start in form.starts if begins.startswith(start)), frame.opening)
    calls = {"type": "triggered_tags", "triggers": [trigger], "tags": tags, "stop_after_first": not parallel}
    return {"type": "structural_tag", "format": _behind_reasoning(calls, reasoning, inside)}


def thoughtful_form(spec: StructuredOutputs, reasoning: ReasoningFormat, *, inside: bool | None) -> dict[str, Any] | None:
    """A client's own form for what comes behind reasoning, as a structural tag.

    Returns: None if the form cannot be put behind something; then there can be no reasoning.
    """
    wanted = _format(spec)
    if wanted is None or spec.disable_additional_properties:
        return None
    if not reasoning.starts:
        wanted = {"type": "sequence", "elements": [*_const(_FINAL), wanted]}
    return {"type": "structural_tag", "format": _behind_reasoning(wanted, reasoning, inside)}


def _format(spec: StructuredOutputs) -> Mapping[str, Any] | None:
    if spec.json_object:
        return {"type": "json_schema", "json_schema": {"type": "object"}}
    if isinstance(spec.json, Mapping):
        return {"type": "json_schema", "json_schema": spec.json}
    if spec.regex is not None:
        return {"type": "regex", "pattern": spec.regex}
    if spec.choice is not None:
        return {"type": "or", "elements": [{"type": "const_string", "value": choice} for choice in spec.choice]}
    if spec.grammar is not None:
        return {"type": "grammar", "grammar": spec.grammar}
    found = spec.structural_tag.get("format") if isinstance(spec.structural_tag, Mapping) else None
    return cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else None


def _tags(frame: CallFrame, schemas: Mapping[str, Mapping[str, Any]], strict: Collection[str]) -> list[dict[str, Any]]:
    tags: list[dict[str, Any]] = []
    for name, parameters in schemas.items():
        # Quotes of a name can only stand in a frame that is JSON.
        begin = frame.before.replace("NAME", json.dumps(name, ensure_ascii=False)[1:-1])
        content = {"type": "json_schema", "json_schema": _closed(parameters) if name in strict else {"type": "object"}}
        tags.append({"type": "tag", "begin": begin, "content": content, "end": frame.after})
    return tags


def _calls(frame: CallFrame, tags: list[dict[str, Any]], *, parallel: bool) -> dict[str, Any]:
    return {
        "type": "tags_with_separator", "tags": tags, "separator": frame.between, "at_least_one": True, "stop_after_first": not parallel,
    }  # fmt: skip


def _const(text: str) -> list[dict[str, Any]]:
    return [{"type": "const_string", "value": text}] if text else []


def _closed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A schema of objects; of parameters that it lists, and no others, unless it says something on that."""
    schema: dict[str, Any] = {"type": "object", **parameters}
    if "properties" in schema and not any(word in schema for word in _COMPOSED):
        schema.setdefault("additionalProperties", False)
    return schema


def _behind_reasoning(calls: Mapping[str, Any], form: ReasoningFormat | None, inside: bool | None) -> Mapping[str, Any]:
    if form is None or inside is False:
        return calls
    begins = [""] if inside else [start + form.label for start in form.starts[:1]] or ["<|channel|>analysis<|message|>"]
    ends = list(form.ends[:1]) or ["<|end|><|start|>assistant"]
    think = {"type": "tag", "begin": begins[0], "content": {"type": "any_text"}, "end": ends[0]}
    space = [_THINKING_SPACE] if form.starts else []
    thoughtful = {"type": "sequence", "elements": [think, *space, calls]}
    if inside or form.always:
        return thoughtful
    return {"type": "or", "elements": [thoughtful, calls]}
