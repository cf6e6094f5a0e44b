"""The bodies of /v1/messages and /v1/messages/count_tokens, in Anthropic's names, as the typed request and conversation that chat has."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxserve.api.conversation import (
    MAX_MESSAGES,
    MAX_NAME_CHARS,
    MAX_PARTS,
    MAX_TOOLS,
    ToolChoice,
    choose_tools,
    read_function,
    read_signature,
)
from jaxserve.api.fields import Fields
from jaxserve.api.json_door import is_array, json_type
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
from jaxserve.request import MAX_STOP_STRINGS, SamplingParams

ROLES = ("user", "assistant", "system")
EFFORTS = tuple(effort for effort in REASONING_EFFORTS if effort not in ("none", "minimal"))

_SHARED = COMMON_NAMES - {
    "n", "echo", "logprobs", "prompt_logprobs", "response_format", "return_token_ids", "return_tokens_as_token_ids", "request_id",
    "add_special_tokens", "stop", "stream_options", "truncate_prompt_tokens", "truncation_side", "thinking_token_budget",
    "use_beam_search", "length_penalty", "logprob_token_ids", "stream_interval",
}  # fmt: skip
_CONVERSATION = frozenset(
    {"model", "messages", "system", "tools", "tool_choice", "thinking", "output_config", "cache_control", "chat_template_kwargs"}
)
_KNOWN = _SHARED | _CONVERSATION | {"stop_sequences", "metadata"}
FOREIGN = (CHAT_NAMES | {"prompt", "container", "mcp_servers", "context_management"}) - _KNOWN
FOREIGN_TO_COUNT = CHAT_NAMES - _CONVERSATION


def read_conversation(fields: Fields) -> Rendering:
    """What the prompt is made of: system, messages, tools and thinking."""
    thread = Thread()
    if fields.given("system"):
        thread.say("system", _texts(fields, "system"))
    messages = fields.objects("messages", max_items=MAX_MESSAGES)
    if not messages:
        raise fields.error("messages", "must hold at least one message" if fields.given("messages") else "is required")
    for message in messages:
        _read_message(thread, message)
    if not thread.messages:
        raise fields.error("messages", "must have some content")
    tools, choice = _tools(fields)
    # An answer that has been begun goes on.
    last = thread.messages[-1]
    goes_on = last["role"] == "assistant" and "tool_calls" not in last and bool(last["content"])
    return Rendering(
        messages=thread.messages, tools=tools, choice=choice, add_generation_prompt=not goes_on, continue_final_message=goes_on,
        kwargs=_thinking_kwargs(fields) | read_template_kwargs(fields),
    )  # fmt: skip


def read_count(fields: Fields) -> tuple[str | None, Rendering]:
    """The model and the conversation whose tokens shall be counted. Raises: UserError naming the field at fault."""
    check_parameters(fields, _CONVERSATION, FOREIGN_TO_COUNT)
    return fields.text("model", None), read_conversation(fields)


def read_messages_request(fields: Fields) -> ChatRequest:
    """Read a parsed request. Raises: UserError naming the field at fault."""
    check_parameters(fields, _KNOWN, FOREIGN)
    if not fields.given("max_tokens"):
        raise fields.error("max_tokens", "is required")
    rendering = read_conversation(fields)
    limit = fields.integer("max_tokens", None, low=1, high=2**31 - 1)
    params = _sampling(fields, read_sampling(fields, max_tokens=limit, logprobs=None, prompt_logprobs=None))
    options = read_options(fields, params=params, default_max_tokens=False, echo=False, add_special_tokens=False)
    metadata = fields.object("metadata")
    if metadata is not None:
        metadata.text("user_id", None)
    thinking = fields.object("thinking")
    display = None if thinking is None else thinking.text("display", None, choices=("summarized", "omitted"))
    return ChatRequest(options=options, rendering=rendering, include_reasoning=display != "omitted")


def _sampling(fields: Fields, params: SamplingParams) -> SamplingParams:
    stop = fields.strings("stop_sequences", max_items=MAX_STOP_STRINGS)
    config = fields.object("output_config")
    form = None if config is None else read_flat_format(config.object("format"), "output_config.format", has_name=False)
    if form is not None and params.structured_outputs is not None:
        raise fields.error("structured_outputs", "and output_config.format cannot both be given")
    thinking = fields.object("thinking")
    budget = None if thinking is None else thinking.integer("budget_tokens", None, low=1)
    if budget is not None and params.max_tokens is not None and budget >= params.max_tokens:
        raise fields.error("thinking.budget_tokens", f"is {budget}; it must be below max_tokens, which is {params.max_tokens}")
    return dataclasses.replace(params, stop=stop, structured_outputs=form or params.structured_outputs, thinking_token_budget=budget)


def _thinking_kwargs(fields: Fields) -> dict[str, Any]:
    """How the chat template is told whether and how much to think."""
    config = fields.object("output_config")
    effort = None if config is None else config.text("effort", None, choices=EFFORTS)
    kwargs = {} if effort is None else effort_kwargs(effort)
    thinking = fields.object("thinking")
    if thinking is None:
        return kwargs
    kind = thinking.text("type", None, choices=("enabled", "disabled", "adaptive"))
    match kind:
        case "enabled":
            if not thinking.given("budget_tokens"):
                raise thinking.error("budget_tokens", "is required")
            return {**kwargs, "enable_thinking": True, "thinking": True}
        case "disabled":
            return {**kwargs, "enable_thinking": False, "thinking": False}
        case "adaptive":
            return kwargs
        case _:
            raise thinking.error("type", "is required: one of enabled, disabled, adaptive")


def _read_message(thread: Thread, message: Fields) -> None:
    role = message.text("role", None, choices=ROLES)
    if role is None:
        raise message.error("role", f"is required: one of {', '.join(ROLES)}")
    if not message.given("content"):
        raise message.error("content", "is required")
    if isinstance(message.raw("content"), str) or role == "system":
        thread.say(role, _texts(message, "content"))
        return
    said: list[dict[str, str]] = []
    blocks = message.objects("content", max_items=MAX_PARTS)
    if not blocks and role == "user":
        raise message.error("content", "must hold at least one block")
    if not blocks:
        thread.say(role, "")
    for block in blocks:
        kind = block.text("type", None)
        if kind == "text":
            said.append({"type": "text", "text": _required(block, "text")})
        elif role == "user" and kind == "tool_result":
            # What the user says beside results comes behind them.
            _read_result(thread, block)
        elif role == "assistant" and kind == "tool_use":
            _say(thread, role, said)
            thread.call(_required(block, "id"), read_function(block, "input"))
        elif role == "assistant" and kind == "thinking":
            _say(thread, role, said)
            thread.think(_required(block, "thinking"))
        elif kind is None:
            raise block.error("type", "is required")
        else:
            raise block.error("type", f"is {kind!r:.60}, which is not supported in a message of role {role!r}; this server takes text only")
    _say(thread, role, said)


def _say(thread: Thread, role: str, said: list[dict[str, str]]) -> None:
    if said:
        thread.say(role, said.copy())
        said.clear()


def _read_result(thread: Thread, block: Fields) -> None:
    content = _texts(block, "content") if block.given("content") else ""
    if block.flag("is_error", False):
        content = [{"type": "text", "text": "Error:"}, *([{"type": "text", "text": content}] if isinstance(content, str) else content)]
    thread.result(_required(block, "tool_use_id"), content)


def _texts(fields: Fields, name: str) -> str | list[dict[str, str]]:
    """A string, or an array of text blocks."""
    value = fields.raw(name)
    if isinstance(value, str):
        return value
    if not is_array(value):
        raise fields.error(name, f"must be a string or an array of text blocks, not {json_type(value)}")
    blocks = fields.objects(name, max_items=MAX_PARTS)
    for block in blocks:
        if block.text("type", None) != "text":
            raise block.error("type", f"is {block.raw('type')!r:.60}; this server takes blocks of type 'text' here")
    return [{"type": "text", "text": _required(block, "text")} for block in blocks]


def _required(block: Fields, name: str) -> str:
    text = block.text(name, None, max_chars=MAX_NAME_CHARS if name.endswith("id") else 2**31)
    if text is None:
        raise block.error(name, "is required")
    return text


def _tools(fields: Fields) -> tuple[list[dict[str, Any]] | None, ToolChoice]:
    signatures: list[dict[str, Any]] = []
    strict: set[str] = set()
    for tool in fields.objects("tools", max_items=MAX_TOOLS):
        kind = tool.text("type", "custom")
        if kind != "custom":
            raise tool.error("type", f"is {kind!r:.60}; only tools of your own (type 'custom') are supported")
        if not tool.given("input_schema"):
            raise tool.error("input_schema", "is required")
        signatures.append(read_signature(tool, "input_schema"))
        if tool.flag("strict", False):
            strict.add(signatures[-1]["name"])
    tools = [{"type": "function", "function": signature} for signature in signatures]
    choice = fields.object("tool_choice")
    if choice is None:
        return choose_tools(tools, "auto", strict=frozenset(strict))
    kinds = {"auto": "auto", "any": "required", "tool": "named", "none": "none"}
    given = choice.text("type", None, choices=tuple(kinds))
    if given is None:
        raise choice.error("type", f"is required: one of {', '.join(kinds)}")
    parallel = not choice.flag("disable_parallel_tool_use", False)
    return choose_tools(tools, kinds[given], named=choice if given == "tool" else None, parallel=parallel, strict=frozenset(strict))
