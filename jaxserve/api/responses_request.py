"""The body of /v1/responses as a typed request: the conversation it continues, and what it says about the answer."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxserve.api.conversation import (
    MAX_MESSAGES,
    MAX_NAME_CHARS,
    MAX_TOOLS,
    ToolChoice,
    choose_tools,
    read_content,
    read_function,
    read_signature,
)
from jaxserve.api.fields import Fields
from jaxserve.api.json_door import is_array, is_object, json_type
from jaxserve.api.parameters import check_parameters
from jaxserve.api.protocol import (
    CHAT_NAMES,
    COMMON_NAMES,
    REASONING_EFFORTS,
    ChatRequest,
    Rendering,
    effort_kwargs,
    read_options,
    read_template_kwargs,
)
from jaxserve.api.sampling import read_sampling
from jaxserve.api.structured import read_flat_format
from jaxserve.api.thread import Thread
from jaxserve.request import MAX_LOGPROBS

MAX_METADATA = 16
MAX_METADATA_CHARS = 512
LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"
# The others ask for more about things that no answer here has.
INCLUDES = (
    LOGPROBS, ENCRYPTED, "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs",
)  # fmt: skip
ROLES = ("user", "assistant", "system", "developer")
SUMMARIES = ("auto", "concise", "detailed")

_SHARED = COMMON_NAMES - {
    "n", "echo", "logprobs", "prompt_logprobs", "max_tokens", "response_format", "return_token_ids", "return_tokens_as_token_ids",
    "request_id", "add_special_tokens", "use_beam_search", "length_penalty", "stream_interval",
}  # fmt: skip
_OWN = frozenset(
    {
        "background", "include", "input", "instructions", "max_output_tokens", "max_tool_calls", "metadata", "parallel_tool_calls",
        "previous_response_id", "prompt_cache_key", "reasoning", "safety_identifier", "store", "text", "tool_choice", "tools",
        "top_logprobs", "truncation", "user", "chat_template_kwargs", "include_reasoning",
    }
)  # fmt: skip
_KNOWN = _SHARED | _OWN
FOREIGN = (CHAT_NAMES | {"prompt", "conversation", "context_management", "moderation", "background_options"}) - _KNOWN

Item = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesRequest:
    """The body of /v1/responses.

    Args:
      items: the input, without what came before it.
      shown: what the response object repeats of the request.
      summarizes: reasoning comes as its own summary.
      encrypts: reasoning comes in a form to send back, too.
    """

    chat: ChatRequest
    items: list[Item]
    shown: dict[str, Any]
    store: bool
    background: bool
    summarizes: bool
    encrypts: bool


def read_responses(fields: Fields, history: Sequence[Item], find_item: Callable[[str], Item | None]) -> ResponsesRequest:
    """Read a parsed request.

    Args:
      history: input and output of the responses before this one.
      find_item: the stored item of an id.
    Raises: UserError naming the field at fault.
    """
    check_parameters(fields, _KNOWN, FOREIGN)
    thread = Thread()
    instructions = fields.text("instructions", None)
    if instructions:
        thread.say("system", instructions)
    items = _input(fields)
    _read_items(thread, Fields({"previous_response_id": list(history)}), "previous_response_id", find_item)
    _read_items(thread, Fields({"input": items}), "input", find_item)
    if not thread.messages:
        raise fields.error("input", "holds nothing to answer")
    tools, shown_tools, choice = _tools(fields)
    effort, summary = _thinking(fields)
    kwargs = (effort_kwargs(effort) if effort is not None else {}) | read_template_kwargs(fields)
    goes_on = items[-1].get("role") == "assistant" and items[-1].get("status") in ("in_progress", "incomplete")
    rendering = Rendering(
        messages=thread.messages, tools=tools, choice=choice, add_generation_prompt=not goes_on, continue_final_message=goes_on,
        kwargs=kwargs, field="input",
    )  # fmt: skip
    include = _include(fields)
    chat, shown = _answer(fields, rendering, logprobs=LOGPROBS in include)
    store, background = fields.flag("store", True), fields.flag("background", False)
    if background and not store:
        raise fields.error("background", "needs store to be true")
    shown |= {
        "background": background,
        "instructions": instructions,
        "parallel_tool_calls": fields.flag("parallel_tool_calls", True),
        "previous_response_id": fields.text("previous_response_id", None),
        "reasoning": {"effort": effort, "summary": summary},
        "store": store,
        "tool_choice": fields.raw("tool_choice") or "auto",
        "tools": shown_tools,
    }
    return ResponsesRequest(
        chat=chat, items=items, shown=shown, store=store, background=background, summarizes=summary is not None,
        encrypts=ENCRYPTED in include,
    )  # fmt: skip


def _thinking(fields: Fields) -> tuple[str | None, str | None]:
    """How much effort to take, and which summary of it is wanted."""
    reasoning = fields.object("reasoning")
    if reasoning is None:
        return None, None
    if reasoning.text("context", "auto") != "auto":
        raise reasoning.error("context", "must be 'auto': the chat template decides what the model sees of earlier reasoning")
    effort = reasoning.text("effort", None, choices=REASONING_EFFORTS)
    return effort, reasoning.text("summary", reasoning.text("generate_summary", None, choices=SUMMARIES), choices=SUMMARIES)


def _answer(fields: Fields, rendering: Rendering, *, logprobs: bool) -> tuple[ChatRequest, dict[str, Any]]:
    """How to answer, and what of it is shown."""
    limit = fields.integer("max_output_tokens", None, low=1, high=2**31 - 1)
    top = fields.integer("top_logprobs", 0, low=0, high=MAX_LOGPROBS)
    text = fields.object("text") or Fields({}, "text")
    text.text("verbosity", None, choices=("low", "medium", "high"))  # a hint that only models of OpenAI's take; vLLM passes over it too
    form = read_flat_format(text.object("format"), "text.format", has_name=True)
    params = read_sampling(fields, max_tokens=limit, logprobs=top if logprobs or top else None, prompt_logprobs=None)
    if form is not None and params.structured_outputs is not None:
        raise fields.error("structured_outputs", "and text.format cannot both be given")
    params = dataclasses.replace(params, structured_outputs=form or params.structured_outputs)
    options = read_options(fields, params=params, default_max_tokens=False, echo=False, add_special_tokens=False)
    truncation = fields.text("truncation", "disabled", choices=("auto", "disabled"))
    if truncation == "auto":
        options = dataclasses.replace(options, truncate_prompt_tokens=-1)
    # Only OpenAI's own tools are counted by it.
    max_tool_calls = fields.integer("max_tool_calls", None, low=1)
    shown = {
        "max_output_tokens": limit,
        "max_tool_calls": max_tool_calls,
        "metadata": _metadata(fields),
        "prompt_cache_key": fields.text("prompt_cache_key", None),
        "safety_identifier": fields.text("safety_identifier", None),
        "text": {"format": text.raw("format") or {"type": "text"}},
        "top_logprobs": top,
        "truncation": truncation,
        "user": fields.text("user", None),
    }
    return ChatRequest(options=options, rendering=rendering, include_reasoning=fields.flag("include_reasoning", True)), shown


def _input(fields: Fields) -> list[Item]:
    value = fields.raw("input")
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": value}]}]
    if value is None:
        raise fields.error("input", "is required")
    if not is_array(value):
        raise fields.error("input", f"must be a string or an array of items, not {json_type(value)}")
    if not value:
        raise fields.error("input", "must hold at least one item")
    fields.objects("input", max_items=MAX_MESSAGES)
    return value


def _read_items(thread: Thread, holder: Fields, name: str, find_item: Callable[[str], Item | None]) -> None:
    for position, item in enumerate(holder.objects(name, max_items=64 * MAX_MESSAGES)):
        if item.text("type", "message") == "item_reference":
            found = find_item(item.text("id", ""))
            if found is None:
                raise item.error("id", "is not the id of an item of a stored response")
            item = Fields(found, f"{holder.path(name)}[{position}]")
        _read_item(thread, item)


def _read_item(thread: Thread, item: Fields) -> None:
    match item.text("type", "message"):
        case "message":
            role = item.text("role", None, choices=ROLES)
            if role is None:
                raise item.error("role", f"is required: one of {', '.join(ROLES)}")
            if not item.given("content"):
                raise item.error("content", "is required")
            thread.say(role, read_content(item))
        case "reasoning":
            thread.think(_reasoning(item))
        case "function_call":
            thread.call(_call_id(item), read_function(item))
        case "function_call_output":
            if not item.given("output"):
                raise item.error("output", "is required")
            thread.result(_call_id(item), read_content(item, "output"))
        case other:
            known = "message, reasoning, function_call, function_call_output, item_reference"
            raise item.error("type", f"is {other!r:.60}, which is not supported; send one of {known}")


def _call_id(item: Fields) -> str:
    call_id = item.text("call_id", None, max_chars=MAX_NAME_CHARS)
    if not call_id:
        raise item.error("call_id", "is required")
    return call_id


def _reasoning(item: Fields) -> str:
    """What was thought, from wherever the item has it."""
    for name in ("content", "summary"):
        parts = [part.text("text", "") for part in item.objects(name, max_items=MAX_MESSAGES)]
        if any(parts):
            return "\n".join(parts)
    try:
        return base64.b64decode(item.text("encrypted_content", ""), validate=True).decode()
    except (binascii.Error, ValueError):
        raise item.error("encrypted_content", "was not made by this server") from None


def seal_reasoning(text: str) -> str:
    """Reasoning as an item's encrypted_content: in this shape clients that keep their conversations themselves carry it."""
    return base64.b64encode(text.encode()).decode()


def _tools(fields: Fields) -> tuple[list[dict[str, Any]] | None, list[dict[str, Any]], ToolChoice]:
    """Tools for the prompt, tools to be shown, and which of them may be called."""
    signatures: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    for tool in fields.objects("tools", max_items=MAX_TOOLS):
        kind = tool.text("type", None)
        if kind != "function":
            raise tool.error("type", f"is {kind!r:.60}; only tools of type 'function' are supported")
        signatures.append(read_signature(tool))
        shown.append({"type": "function", "strict": tool.flag("strict", False), **signatures[-1]})
    choice = fields.raw("tool_choice")
    named = fields.object("tool_choice") if is_object(choice) else None
    if named is not None and named.text("type", None) != "function":
        raise named.error("type", "must be 'function'")
    kind = "named" if named is not None else fields.text("tool_choice", "auto", choices=("none", "auto", "required"))
    strict = frozenset(tool["name"] for tool in shown if tool["strict"])
    parallel = fields.flag("parallel_tool_calls", True)
    tools = [{"type": "function", "function": signature} for signature in signatures]
    mentioned, chosen = choose_tools(tools, kind, named=named, parallel=parallel, strict=strict)
    return mentioned, shown, chosen


def _include(fields: Fields) -> frozenset[str]:
    wanted = fields.array("include", [], max_items=64)
    for position, name in enumerate(wanted):
        if name not in INCLUDES:
            raise fields.error(f"include[{position}]", f"is {name!r:.60}; it must be one of {', '.join(INCLUDES)}")
    return frozenset(wanted)


def _metadata(fields: Fields) -> dict[str, str]:
    pairs = fields.object("metadata")
    names = fields.mapping("metadata", max_items=MAX_METADATA)
    return {} if pairs is None else {name: pairs.text(name, "", max_chars=MAX_METADATA_CHARS) for name in names}
