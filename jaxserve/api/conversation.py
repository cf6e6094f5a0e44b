"""Chat messages and tools as clients send them -> the plain dicts that a chat template understands.

Content is text or a list of text parts, tool-call arguments become objects, and the legacy function role becomes tool, as in vLLM.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxserve.api.fields import Fields
from jaxserve.api.json_door import is_array, is_object, json_type, parse_object
from jaxserve.errors import UserError

MAX_MESSAGES = 2048
MAX_PARTS = 256
MAX_TOOLS = 128
MAX_NAME_CHARS = 256
MAX_SCHEMA_MEMBERS = 256
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_MEDIA_PARTS = (
    "image_url", "input_image", "image_embeds", "image_pil", "input_audio", "audio_url", "audio_embeds", "video_url", "input_video",
    "file", "input_file",
)  # fmt: skip


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """The conversation of a chat request.

    Raises: UserError naming the message and member at fault.
    """
    if not fields.given("messages"):
        raise fields.error("messages", "is required")
    messages = [_message(message) for message in fields.objects("messages", max_items=MAX_MESSAGES)]
    if not messages:
        raise fields.error("messages", "must hold at least one message")
    return messages


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """Which tools the model may call.

    Args:
      kind: "named" for the one of `name`.
      parallel: more than one call in an answer.
      strict: tools whose arguments must be of their schemas.
    """

    kind: Literal["none", "auto", "required", "named"]
    name: str | None = None
    parallel: bool = True
    strict: frozenset[str] = frozenset()


def read_tools(fields: Fields) -> tuple[list[dict[str, Any]] | None, ToolChoice]:
    """The tools that the prompt shall mention, None without any; and which of them may be called.

    Raises: UserError naming the field at fault.
    """
    given = fields.objects("tools", max_items=MAX_TOOLS)
    tools = [_tool(tool) for tool in given]
    strict = frozenset(tool["function"]["name"] for tool, own in zip(tools, given, strict=True) if own.raw("function").get("strict"))
    parallel = fields.flag("parallel_tool_calls", True)
    choice = fields.raw("tool_choice")
    if isinstance(choice, dict):
        name = _named_tool(fields, [tool["function"]["name"] for tool in tools])
        return tools, ToolChoice(kind="named", name=name, parallel=False)
    kind = fields.text("tool_choice", "auto" if tools else "none", choices=("none", "auto", "required"))
    if not tools:
        if kind == "required" or (kind == "auto" and not fields.given("tools")):
            raise fields.error("tool_choice", "needs tools, and none are given")
        return None, ToolChoice(kind="none")
    match kind:
        case "required":
            return tools, ToolChoice(kind="required", parallel=parallel)
        case "none":
            return tools, ToolChoice(kind="none")
        case _:
            return tools, ToolChoice(kind="auto", parallel=parallel, strict=strict)


def _named_tool(fields: Fields, known: list[str]) -> str:
    choice = fields.object("tool_choice")
    assert choice is not None, "the caller has seen it"
    if choice.text("type", None) != "function":
        raise choice.error("type", "must be 'function'")
    function = choice.object("function")
    name = None if function is None else function.text("name", None)
    if function is None or not name:
        raise (choice if function is None else function).error("function" if function is None else "name", "is required")
    if not known:
        raise fields.error("tool_choice", "needs tools, and none are given")
    if name not in known:
        raise function.error("name", f"is {name!r:.80}, which is none of the tools: {', '.join(known)!s:.200}")
    return name


def plain_text(content: str | list[dict[str, str]]) -> str:
    """The text of a message's content."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def count_chars(messages: list[dict[str, Any]]) -> int:
    """Characters of text in a conversation, each message counted as a few more."""
    return sum(
        len(plain_text(message["content"])) + len(message.get("reasoning_content", "")) + _call_chars(message) + 16 for message in messages
    )


def _call_chars(message: dict[str, Any]) -> int:
    return sum(len(str(call["function"]["arguments"])) for call in message.get("tool_calls", ()))


def _message(fields: Fields) -> dict[str, Any]:
    role = fields.text("role", None, choices=ROLES)
    if role is None:
        raise fields.error("role", f"is required: one of {', '.join(ROLES)}")
    if role != "assistant" and "content" not in fields:
        raise fields.error("content", "is required")
    message: dict[str, Any] = {"role": "tool" if role == "function" else role, "content": _content(fields)}
    for name in ("name", "tool_call_id"):
        text = fields.text(name, None, max_chars=MAX_NAME_CHARS)
        if text is not None:
            message[name] = text
    reasoning = fields.text("reasoning_content", fields.text("reasoning", None))
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    calls = [_tool_call(call) for call in fields.objects("tool_calls", max_items=MAX_TOOLS)]
    legacy = fields.object("function_call")
    if legacy is not None:
        calls.append({"type": "function", "function": _function(legacy)})
    if calls:
        if role != "assistant":
            raise fields.error("tool_calls", f"belongs to the assistant, not to role {role!r}")
        message["tool_calls"] = calls
    return message


def _content(fields: Fields) -> str | list[dict[str, str]]:
    value = fields.raw("content")
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not is_array(value):
        raise fields.error("content", f"must be a string, null or an array of parts, not {json_type(value)}")
    if len(value) > MAX_PARTS:
        raise fields.error("content", f"has {len(value)} parts; at most {MAX_PARTS} are allowed")
    return [{"type": "text", "text": _part(fields, position, part)} for position, part in enumerate(value)]


def _part(fields: Fields, position: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    path = f"content[{position}]"
    if not is_object(part):
        raise fields.error(path, f"must be an object with a type, not {json_type(part)}")
    inner = Fields(part, fields.path(path))
    kind = inner.text("type", None)
    if kind in _MEDIA_PARTS:
        raise inner.error("type", f"is {kind!r}, but this model takes text only")
    if kind not in _TEXT_PARTS:
        raise inner.error("type", "is required" if kind is None else f"is {kind!r:.60}, which is not known; send parts of type 'text'")
    text = inner.text(_TEXT_PARTS[kind], None)
    if text is None:
        raise inner.error(_TEXT_PARTS[kind], "is required")
    return text


def _tool_call(fields: Fields) -> dict[str, Any]:
    kind = fields.text("type", "function", choices=("function",))
    function = fields.object("function")
    if function is None:
        raise fields.error("function", "is required")
    call: dict[str, Any] = {"type": kind, "function": _function(function)}
    call_id = fields.text("id", None, max_chars=MAX_NAME_CHARS)
    if call_id is not None:
        call["id"] = call_id
    return call


def _function(fields: Fields) -> dict[str, Any]:
    name = fields.text("name", None, max_chars=MAX_NAME_CHARS)
    if not name:
        raise fields.error("name", "is required")
    arguments = fields.raw("arguments")
    if isinstance(arguments, str) and arguments.strip():
        # Templates print arguments as objects; clients send the text that the model once wrote.
        try:
            arguments = parse_object(arguments.encode("utf-8"))
        except UserError:
            raise fields.error("arguments", "must be a string holding a JSON object") from None
    elif arguments is None or isinstance(arguments, str):
        arguments = {}
    if not is_object(arguments):
        raise fields.error("arguments", f"must be a string holding a JSON object, not {json_type(arguments)}")
    return {"name": name, "arguments": arguments}


def _tool(fields: Fields) -> dict[str, Any]:
    if fields.text("type", None) != "function":
        raise fields.error("type", "must be 'function'")
    function = fields.object("function")
    if function is None:
        raise fields.error("function", "is required")
    name = function.text("name", None, max_chars=MAX_NAME_CHARS)
    if not name:
        raise function.error("name", "is required")
    function.text("description", "")
    function.mapping("parameters", max_items=MAX_SCHEMA_MEMBERS)
    function.flag("strict", None)
    # As the client wrote it, since templates print it whole; but templates reach for what may be left out, and none knows strict.
    given = {key: function.raw(key) for key in function if function.given(key) and key != "strict"}
    given.setdefault("description", "")
    given.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": given}
