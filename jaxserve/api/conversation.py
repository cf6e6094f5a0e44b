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


def read_messages(fields: Fields, name: str = "messages") -> list[dict[str, Any]]:
    """The conversation of a chat request.

    Args:
      name: of the member that holds it.
    Raises: UserError naming the message and member at fault.
    """
    if not fields.given(name):
        raise fields.error(name, "is required")
    messages = [_message(message) for message in fields.objects(name, max_items=MAX_MESSAGES)]
    if not messages:
        raise fields.error(name, "must hold at least one message")
    return messages


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """Which tools the model may call.

    Args:
      kind: "named" for the one of `name`.
      parallel: more than one call in an answer.
      strict: tools whose arguments must be of their schemas.
      legacy: they were given as functions, and calls are shown as the first of OpenAI's APIs did.
    """

    kind: Literal["none", "auto", "required", "named"]
    name: str | None = None
    parallel: bool = True
    strict: frozenset[str] = frozenset()
    legacy: bool = False


def read_tools(fields: Fields) -> tuple[list[dict[str, Any]] | None, ToolChoice]:
    """The tools that the prompt shall mention, None without any; and which of them may be called.

    Raises: UserError naming the field at fault.
    """
    if fields.given("functions") or fields.given("function_call"):
        return _read_functions(fields)
    given = fields.objects("tools", max_items=MAX_TOOLS)
    tools = [_tool(tool) for tool in given]
    strict = frozenset(tool["function"]["name"] for tool, own in zip(tools, given, strict=True) if own.raw("function").get("strict"))
    parallel = fields.flag("parallel_tool_calls", True)
    choice = fields.raw("tool_choice")
    if isinstance(choice, dict):
        named = _named_function(fields)
        return choose_tools(tools, "named", named=named, parallel=parallel, strict=strict)
    kind = fields.text("tool_choice", "auto" if tools else "none", choices=("none", "auto", "required"))
    if not tools and kind == "auto" and not fields.given("tools"):
        raise fields.error("tool_choice", "needs tools, and none are given")
    return choose_tools(tools, kind, parallel=parallel, strict=strict)


def _read_functions(fields: Fields) -> tuple[list[dict[str, Any]] | None, ToolChoice]:
    """The same of functions and function_call, which tools and tool_choice have replaced."""
    if fields.given("tools") or fields.given("tool_choice"):
        raise fields.error("functions", "and tools cannot both be given")
    tools = [_described(function) for function in fields.objects("functions", max_items=MAX_TOOLS)]
    named = fields.object("function_call") if isinstance(fields.raw("function_call"), dict) else None
    kind = "named" if named is not None else fields.text("function_call", "auto" if tools else "none", choices=("none", "auto"))
    if not tools and kind != "none":
        raise fields.error("function_call", "needs functions, and none are given")
    found, choice = choose_tools(tools, kind, named=named, parallel=False)
    return found, dataclasses.replace(choice, legacy=True)


def choose_tools(
    tools: list[dict[str, Any]], kind: str, *, named: Fields | None = None, parallel: bool = True, strict: frozenset[str] = frozenset()
) -> tuple[list[dict[str, Any]] | None, ToolChoice]:
    """The tools that the prompt shall mention, None without any; and which of them may be called.

    Args:
      named: for kind "named", the object whose "name" is the tool's.
    Raises: UserError if a tool must be called that there is not.
    """
    name = None if named is None else named.text("name", None)
    if named is not None and not name:
        raise named.error("name", "is required")
    if not tools:
        if kind in ("required", "named"):
            raise UserError("tool_choice", "tool_choice needs tools, and none are given")
        return None, ToolChoice(kind="none")
    match kind:
        case "named":
            assert named is not None, "the caller has read a name"
            known = [tool["function"]["name"] for tool in tools]
            if name not in known:
                raise named.error("name", f"is {name!r:.80}, which is none of the tools: {', '.join(known)!s:.200}")
            return tools, ToolChoice(kind="named", name=name, parallel=False)
        case "required":
            return tools, ToolChoice(kind="required", parallel=parallel)
        case "none":
            return tools, ToolChoice(kind="none")
        case _:
            return tools, ToolChoice(kind="auto", parallel=parallel, strict=strict)


def _named_function(fields: Fields) -> Fields:
    choice = fields.object("tool_choice")
    assert choice is not None, "the caller has seen it"
    if choice.text("type", None) != "function":
        raise choice.error("type", "must be 'function'")
    function = choice.object("function")
    if function is None:
        raise choice.error("function", "is required")
    return function


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
    thoughts, said = _take_thoughts(fields) if role == "assistant" else (None, fields)
    message: dict[str, Any] = {"role": "tool" if role == "function" else role, "content": read_content(said)}
    for name in ("name", "tool_call_id"):
        text = fields.text(name, None, max_chars=MAX_NAME_CHARS)
        if text is not None:
            message[name] = text
    reasoning = fields.text("reasoning_content", fields.text("reasoning", thoughts))
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    calls = [_tool_call(call) for call in fields.objects("tool_calls", max_items=MAX_TOOLS)]
    legacy = fields.object("function_call")
    if legacy is not None:
        calls.append({"type": "function", "function": read_function(legacy)})
    if calls:
        if role != "assistant":
            raise fields.error("tool_calls", f"belongs to the assistant, not to role {role!r}")
        message["tool_calls"] = calls
    return message


def _take_thoughts(fields: Fields) -> tuple[str | None, Fields]:
    """The reasoning among the parts of a message, if there is any, and the message without it."""
    value = fields.raw("content")
    if not is_array(value):
        return None, fields
    thoughts = [Fields(part, fields.path("content")) for part in value if is_object(part) and part.get("type") == "thinking"]
    if not thoughts:
        return None, fields
    rest = [part for part in value if not (is_object(part) and part.get("type") == "thinking")]
    return "\n".join(thought.text("thinking", "") for thought in thoughts), Fields({"content": rest}, fields.path("content"))


def read_content(fields: Fields, name: str = "content") -> str | list[dict[str, str]]:
    """The text of a message or a tool's result: one string, or its parts."""
    value = fields.raw(name)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not is_array(value):
        raise fields.error(name, f"must be a string, null or an array of parts, not {json_type(value)}")
    if len(value) > MAX_PARTS:
        raise fields.error(name, f"has {len(value)} parts; at most {MAX_PARTS} are allowed")
    return [{"type": "text", "text": _part(fields, f"{name}[{position}]", part)} for position, part in enumerate(value)]


def _part(fields: Fields, path: str, part: Any) -> str:
    if isinstance(part, str):
        return part
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
    call: dict[str, Any] = {"type": kind, "function": read_function(function)}
    call_id = fields.text("id", None, max_chars=MAX_NAME_CHARS)
    if call_id is not None:
        call["id"] = call_id
    return call


def read_function(fields: Fields, arguments_name: str = "arguments") -> dict[str, Any]:
    """The name and arguments of a call that the model once made."""
    name = fields.text("name", None, max_chars=MAX_NAME_CHARS)
    if not name:
        raise fields.error("name", "is required")
    arguments = fields.raw(arguments_name)
    if isinstance(arguments, str) and arguments.strip():
        # Templates print arguments as objects; clients send the text that the model once wrote. Where that was no object, a refusal
        # would end the conversation for good; vLLM goes on without the arguments too.
        try:
            arguments = parse_object(arguments.encode("utf-8"))
        except UserError as error:
            if error.code != "invalid_json":
                raise fields.error(arguments_name, error.message) from None
            arguments = {}
    elif arguments is None or isinstance(arguments, str):
        arguments = {}
    if not is_object(arguments):
        raise fields.error(arguments_name, f"must be a string holding a JSON object, not {json_type(arguments)}")
    return {"name": name, "arguments": arguments}


def _tool(fields: Fields) -> dict[str, Any]:
    fields.text("type", "function", choices=("function",))
    function = fields.object("function")
    if function is None:
        raise fields.error("function", "is required")
    return _described(function)


def _described(function: Fields) -> dict[str, Any]:
    # As the client wrote it, since templates print it whole; but none knows strict.
    given = {key: function.raw(key) for key in function if function.given(key) and key != "strict"}
    return {"type": "function", "function": {**given, **read_signature(function)}}


def read_signature(fields: Fields, schema_name: str = "parameters") -> dict[str, Any]:
    """A tool's name, description and parameters; templates reach for the last two, which may be left out."""
    name = fields.text("name", None, max_chars=MAX_NAME_CHARS)
    if not name:
        raise fields.error("name", "is required")
    fields.flag("strict", None)
    parameters = fields.mapping(schema_name, max_items=MAX_SCHEMA_MEMBERS)
    return {
        "name": name,
        "description": fields.text("description", ""),
        "parameters": parameters if fields.given(schema_name) else {"type": "object", "properties": {}},
    }
