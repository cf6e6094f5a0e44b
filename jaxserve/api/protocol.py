"""The bodies of /v1/chat/completions and /v1/completions as typed requests: every known field is read and checked here, once."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxserve.api.conversation import ToolChoice, read_messages, read_tools
from jaxserve.api.fields import Fields
from jaxserve.api.json_door import parse_object
from jaxserve.api.parameters import check_parameters
from jaxserve.api.prompts import read_cache_salt, read_prompts, read_request_id, read_truncation
from jaxserve.api.sampling import DEFAULTED_NAMES, SAMPLING_NAMES, read_sampling
from jaxserve.errors import UserError
from jaxserve.request import MAX_LOGPROBS, SamplingParams

MAX_PROMPTS = 2048
MAX_DOCUMENTS = 256
MAX_TEMPLATE_KWARGS = 32
MAX_TEMPLATE_KWARGS_CHARS = 16_384
DEFAULT_COMPLETION_TOKENS = 16
_LIMIT_NAMES = ("max_output_tokens", "max_completion_tokens")
REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

# Names that the server itself gives to a template, or that a tokenizer would take as an argument.
_RESERVED_KWARGS = frozenset(
    {
        "messages", "conversation", "conversations", "tools", "documents", "chat_template", "tokenize", "tokenizer",
        "add_generation_prompt", "continue_final_message", "add_special_tokens", "return_dict", "return_tensors",
        "return_assistant_tokens_mask", "tokenizer_kwargs", "padding", "truncation", "max_length", "stride", "bos_token", "eos_token",
        "unk_token", "pad_token", "sep_token", "cls_token", "mask_token", "additional_special_tokens", "raise_exception", "strftime_now",
        "namespace", "range", "dict", "cycler", "joiner", "lipsum", "self", "loop", "caller", "varargs", "kwargs",
    }
)  # fmt: skip
COMMON_NAMES = SAMPLING_NAMES | {
    "model", "stream", "stream_options", "max_tokens", "logprobs", "prompt_logprobs", "echo", "add_special_tokens", "priority",
    "cache_salt", "request_id", "return_token_ids", "return_tokens_as_token_ids", "truncate_prompt_tokens", "truncation_side",
    "use_beam_search", "length_penalty", "stream_interval",
}  # fmt: skip
CHAT_NAMES = COMMON_NAMES | frozenset(
    {
        "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "functions", "function_call",
        "add_generation_prompt", "continue_final_message",
        "chat_template_kwargs", "documents", "reasoning_effort", "parallel_tool_calls", "include_reasoning",
        "return_prompt_text",
    }
)  # fmt: skip
_COMPLETION = COMMON_NAMES | {"prompt"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What chat and completion requests share.

    Args:
      model: the name the client asked for; None means the server's own choice.
      params: how to sample; max_tokens is as asked for, None for the rest of the context.
      limit_name: what the client calls max_tokens.
      default_max_tokens: max_tokens is a default, to be cut to the room there is.
      unset: names of sampling parameters that the client left open, so that the model's own defaults apply.
      stream_interval: least tokens of a streamed event, the first and the last one aside.
      length_penalty: of a beam search with n beams; None samples.
      truncate_prompt_tokens: keep at most so many prompt tokens; -1 as many as fit; None keeps all.
      request_id: the client's own, or a fresh one.
      truncation_side: the end from which tokens are cut.
      tokens_as_ids: show tokens as "token_id:N" in log-probabilities.
    """

    model: str | None
    params: SamplingParams
    limit_name: str
    default_max_tokens: bool
    unset: frozenset[str]
    length_penalty: float | None
    stream: bool
    include_usage: bool
    continuous_usage: bool
    stream_interval: int
    echo: bool
    add_special_tokens: bool
    truncate_prompt_tokens: int | None
    truncation_side: Literal["left", "right"]
    priority: int
    cache_salt: str | None
    request_id: str
    return_token_ids: bool
    tokens_as_ids: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """A conversation and how the chat template shall print it.

    Args:
      field: the member of the body that holds it.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    choice: ToolChoice
    add_generation_prompt: bool
    continue_final_message: bool
    kwargs: dict[str, Any]
    field: str = "messages"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """The body of /v1/chat/completions.

    Args:
      include_reasoning: show what the model thought before it answered.
      return_prompt_text: show the conversation as the chat template printed it.
    """

    options: Options
    rendering: Rendering
    include_reasoning: bool
    return_prompt_text: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """The body of /v1/completions; each prompt is text or token ids.

    Args:
      score_only: echo with max_tokens=0: the prompt comes back with its log-probabilities and nothing is added.
    """

    options: Options
    prompts: list[str] | list[list[int]]
    score_only: bool


def decode_chat(body: bytes) -> ChatRequest:
    """Read a chat request. Raises: UserError naming the field at fault."""
    return read_chat(Fields(parse_object(body)))


def read_chat(fields: Fields, messages: list[dict[str, Any]] | None = None) -> ChatRequest:
    """Read a chat request that has been parsed.

    Args:
      messages: its conversation, if that has been read already.
    Raises: UserError naming the field at fault.
    """
    check_parameters(fields, CHAT_NAMES)
    rendering = read_rendering(fields, messages)
    wanted = fields.flag("logprobs", False)
    top = fields.integer("top_logprobs", 0, low=0, high=MAX_LOGPROBS)
    if top and not wanted:
        raise fields.error("top_logprobs", "needs logprobs to be true")
    limit_name = "max_completion_tokens" if fields.given("max_completion_tokens") else "max_tokens"
    limit = fields.integer(limit_name, None, low=1, high=2**31 - 1)
    fields.integer("max_tokens", None, low=1, high=2**31 - 1)
    echo = fields.flag("echo", False)
    prompt_logprobs = fields.integer("prompt_logprobs", None, low=0, high=MAX_LOGPROBS)
    params = read_sampling(fields, max_tokens=limit, logprobs=top if wanted else None, prompt_logprobs=prompt_logprobs)
    options = read_options(fields, params=params, default_max_tokens=False, echo=echo, add_special_tokens=False)
    return ChatRequest(
        options=options,
        rendering=rendering,
        include_reasoning=fields.flag("include_reasoning", True),
        return_prompt_text=fields.flag("return_prompt_text", False),
    )


def decode_completion(body: bytes, *, vocab_size: int, max_len: int) -> CompletionRequest:
    """Read a completion request; prompt token ids must be below `vocab_size`. Raises: UserError naming the field at fault."""
    return read_completion(Fields(parse_object(body)), vocab_size=vocab_size, max_len=max_len)


def read_completion(fields: Fields, *, vocab_size: int, max_len: int) -> CompletionRequest:
    """Read a completion request that has been parsed. Raises: UserError naming the field at fault."""
    check_parameters(fields, _COMPLETION)
    prompts = read_prompts(fields, "prompt", max_items=MAX_PROMPTS, vocab_size=vocab_size, max_len=max_len)
    default = "max_tokens" not in fields
    limit = DEFAULT_COMPLETION_TOKENS if default else fields.integer("max_tokens", None, low=0, high=2**31 - 1)
    echo = fields.flag("echo", False)
    if limit == 0 and not echo:
        raise fields.error("max_tokens", "is 0; it must be at least 1, except with echo")
    logprobs = fields.integer("logprobs", None, low=0, high=MAX_LOGPROBS)
    prompt_logprobs = fields.integer("prompt_logprobs", None, low=0, high=MAX_LOGPROBS)
    params = read_sampling(fields, max_tokens=limit or (1 if limit == 0 else None), logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    if echo and params.logprob_token_ids:
        raise fields.error("logprob_token_ids", "and echo cannot both be given")
    options = read_options(fields, params=params, default_max_tokens=default, echo=echo, add_special_tokens=True)
    return CompletionRequest(options=options, prompts=prompts, score_only=limit == 0)


def read_rendering(fields: Fields, messages: list[dict[str, Any]] | None = None) -> Rendering:
    """Messages, unless they have been read already, tools and template variables of a chat-shaped body."""
    messages = read_messages(fields) if messages is None else messages
    tools, choice = read_tools(fields)
    go_on = fields.flag("continue_final_message", False)
    begin = fields.flag("add_generation_prompt", not go_on)
    if go_on and begin:
        raise fields.error("continue_final_message", "and add_generation_prompt cannot both be true")
    if go_on and messages[-1]["role"] != "assistant":
        raise fields.error("continue_final_message", "needs a last message of the assistant to continue")
    kwargs = read_template_kwargs(fields)
    effort = fields.text("reasoning_effort", None, choices=REASONING_EFFORTS)
    if effort is not None:
        kwargs = effort_kwargs(effort) | kwargs
    documents = fields.objects("documents", max_items=MAX_DOCUMENTS)
    if documents:
        kwargs["documents"] = fields.raw("documents")
    return Rendering(
        messages=messages, tools=tools, choice=choice, add_generation_prompt=begin, continue_final_message=go_on, kwargs=kwargs
    )


def read_template_kwargs(fields: Fields) -> dict[str, Any]:
    """Further variables for the chat template."""
    kwargs = fields.mapping("chat_template_kwargs", max_items=MAX_TEMPLATE_KWARGS)
    for name in kwargs:
        if not name.isidentifier() or name.startswith("_") or name in _RESERVED_KWARGS:
            raise UserError("chat_template_kwargs", f"chat_template_kwargs may not set {name!r:.60}; only variables of the template itself")
    if len(str(kwargs)) > MAX_TEMPLATE_KWARGS_CHARS:
        raise fields.error("chat_template_kwargs", f"is too large; at most {MAX_TEMPLATE_KWARGS_CHARS} characters are allowed")
    return kwargs


def effort_kwargs(effort: str) -> dict[str, Any]:
    """How templates are told how much to think; some only know whether to, which they are told as in vLLM."""
    return {"reasoning_effort": effort, "enable_thinking": effort != "none"}


def read_options(fields: Fields, *, params: SamplingParams, default_max_tokens: bool, echo: bool, add_special_tokens: bool) -> Options:
    """What a body says besides its prompt and its sampling."""
    stream = fields.flag("stream", False)
    include_usage, continuous_usage = _stream_options(fields, stream)
    if stream and params.prompt_logprobs is not None:
        raise fields.error("prompt_logprobs", "is not available with stream=true")
    return Options(
        model=fields.text("model", None),
        params=params,
        limit_name=next((name for name in _LIMIT_NAMES if fields.given(name)), "max_tokens"),
        default_max_tokens=default_max_tokens,
        unset=frozenset(name for name in DEFAULTED_NAMES if not fields.given(name)),
        length_penalty=_length_penalty(fields),
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        stream_interval=fields.integer("stream_interval", 1, low=1, high=2**31 - 1),
        echo=echo,
        add_special_tokens=fields.flag("add_special_tokens", add_special_tokens),
        truncate_prompt_tokens=read_truncation(fields),
        truncation_side="right" if fields.text("truncation_side", "left", choices=("left", "right")) == "right" else "left",
        priority=fields.integer("priority", 0, low=-(2**31), high=2**31 - 1),
        cache_salt=read_cache_salt(fields),
        request_id=read_request_id(fields),
        return_token_ids=fields.flag("return_token_ids", False),
        tokens_as_ids=fields.flag("return_tokens_as_token_ids", False),
    )


def _stream_options(fields: Fields, stream: bool) -> tuple[bool, bool]:
    options = fields.object("stream_options")
    if options is None:
        return False, False
    if not stream:
        raise fields.error("stream_options", "is only allowed with stream=true")
    options.flag("include_obfuscation", None)
    include_usage = options.flag("include_usage", False)
    return include_usage, options.flag("continuous_usage_stats", False) and include_usage


def _length_penalty(fields: Fields) -> float | None:
    penalty = fields.number("length_penalty", 1.0, low=-10, high=10)
    if fields.flag("use_beam_search", False):
        return penalty
    if penalty != 1:
        raise fields.error("length_penalty", "needs use_beam_search")
    return None
