"""The bodies of /v1/chat/completions and /v1/completions as typed requests: every known field is read and checked here, once."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxserve.api.conversation import ToolChoice, read_messages, read_tools
from jaxserve.api.fields import Fields
from jaxserve.api.json_door import is_array, json_type, parse_object
from jaxserve.api.parameters import check_parameters
from jaxserve.api.structured import read_structured
from jaxserve.api.wire import is_safe_id
from jaxserve.errors import UserError
from jaxserve.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, SamplingParams

MAX_PROMPTS = 64
MAX_SALT_CHARS = 128
MAX_DOCUMENTS = 256
MAX_TEMPLATE_KWARGS = 32
MAX_TEMPLATE_KWARGS_CHARS = 16_384
DEFAULT_COMPLETION_TOKENS = 16
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
_COMMON = frozenset(
    {
        "model", "stream", "stream_options", "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "include_stop_str_in_output",
        "skip_special_tokens", "max_tokens", "logprobs", "prompt_logprobs", "echo", "add_special_tokens", "response_format", "priority",
        "cache_salt", "request_id", "return_token_ids", "return_tokens_as_token_ids", "truncate_prompt_tokens", "truncation_side",
        "structured_outputs",
    }
)  # fmt: skip
_CHAT = _COMMON | frozenset(
    {
        "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "add_generation_prompt", "continue_final_message",
        "chat_template_kwargs", "documents", "reasoning_effort", "parallel_tool_calls", "include_reasoning",
    }
)  # fmt: skip
_COMPLETION = _COMMON | {"prompt"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What chat and completion requests share.

    Args:
      model: the name the client asked for; None means the server's own choice.
      params: how to sample; max_tokens is as asked for, None for the rest of the context.
      default_max_tokens: max_tokens is a default, to be cut to the room there is.
      truncate_prompt_tokens: keep at most so many prompt tokens; -1 as many as fit; None keeps all.
      truncation_side: the end from which tokens are cut.
      tokens_as_ids: show tokens as "token_id:N" in log-probabilities.
    """

    model: str | None
    params: SamplingParams
    default_max_tokens: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    echo: bool
    add_special_tokens: bool
    truncate_prompt_tokens: int | None
    truncation_side: Literal["left", "right"]
    priority: int
    cache_salt: str | None
    request_id: str | None
    return_token_ids: bool
    tokens_as_ids: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """A conversation and how the chat template shall print it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    choice: ToolChoice
    add_generation_prompt: bool
    continue_final_message: bool
    kwargs: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """The body of /v1/chat/completions.

    Args:
      include_reasoning: show what the model thought before it answered.
    """

    options: Options
    rendering: Rendering
    include_reasoning: bool


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
    fields = Fields(parse_object(body))
    check_parameters(fields, _CHAT)
    rendering = read_rendering(fields)
    wanted = fields.flag("logprobs", False)
    top = fields.integer("top_logprobs", 0, low=0, high=MAX_LOGPROBS)
    if top and not wanted:
        raise fields.error("top_logprobs", "needs logprobs to be true")
    limit_name = "max_completion_tokens" if fields.given("max_completion_tokens") else "max_tokens"
    limit = fields.integer(limit_name, None, low=1, high=2**31 - 1)
    fields.integer("max_tokens", None, low=1, high=2**31 - 1)
    echo = fields.flag("echo", False)
    prompt_logprobs = fields.integer("prompt_logprobs", None, low=0, high=MAX_LOGPROBS)
    params = _sampling(fields, max_tokens=limit, logprobs=top if wanted else None, prompt_logprobs=prompt_logprobs)
    options = _options(fields, params=params, default_max_tokens=False, echo=echo, add_special_tokens=False)
    return ChatRequest(options=options, rendering=rendering, include_reasoning=fields.flag("include_reasoning", True))


def decode_completion(body: bytes, *, vocab_size: int, max_len: int) -> CompletionRequest:
    """Read a completion request; prompt token ids must be below `vocab_size`. Raises: UserError naming the field at fault."""
    fields = Fields(parse_object(body))
    check_parameters(fields, _COMPLETION)
    prompts = _prompts(fields, vocab_size, max_len)
    default = "max_tokens" not in fields
    limit = DEFAULT_COMPLETION_TOKENS if default else fields.integer("max_tokens", None, low=0, high=2**31 - 1)
    echo = fields.flag("echo", False)
    if limit == 0 and not echo:
        raise fields.error("max_tokens", "is 0; it must be at least 1, except with echo")
    logprobs = fields.integer("logprobs", None, low=0, high=MAX_LOGPROBS)
    prompt_logprobs = fields.integer("prompt_logprobs", None, low=0, high=MAX_LOGPROBS)
    params = _sampling(fields, max_tokens=limit or (1 if limit == 0 else None), logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    options = _options(fields, params=params, default_max_tokens=default, echo=echo, add_special_tokens=True)
    return CompletionRequest(options=options, prompts=prompts, score_only=limit == 0)


def read_rendering(fields: Fields) -> Rendering:
    """Messages, tools and template variables of a chat-shaped body."""
    messages, (tools, choice) = read_messages(fields), read_tools(fields)
    go_on = fields.flag("continue_final_message", False)
    begin = fields.flag("add_generation_prompt", not go_on)
    if go_on and begin:
        raise fields.error("continue_final_message", "and add_generation_prompt cannot both be true")
    if go_on and messages[-1]["role"] != "assistant":
        raise fields.error("continue_final_message", "needs a last message of the assistant to continue")
    kwargs = fields.mapping("chat_template_kwargs", max_items=MAX_TEMPLATE_KWARGS)
    for name in kwargs:
        if not name.isidentifier() or name.startswith("_") or name in _RESERVED_KWARGS:
            raise UserError("chat_template_kwargs", f"chat_template_kwargs may not set {name!r:.60}; only variables of the template itself")
    if len(str(kwargs)) > MAX_TEMPLATE_KWARGS_CHARS:
        raise fields.error("chat_template_kwargs", f"is too large; at most {MAX_TEMPLATE_KWARGS_CHARS} characters are allowed")
    effort = fields.text("reasoning_effort", None, choices=REASONING_EFFORTS)
    if effort is not None:
        kwargs.setdefault("reasoning_effort", effort)
    documents = fields.objects("documents", max_items=MAX_DOCUMENTS)
    if documents:
        kwargs["documents"] = fields.raw("documents")
    return Rendering(
        messages=messages, tools=tools, choice=choice, add_generation_prompt=begin, continue_final_message=go_on, kwargs=kwargs
    )


def _options(fields: Fields, *, params: SamplingParams, default_max_tokens: bool, echo: bool, add_special_tokens: bool) -> Options:
    stream = fields.flag("stream", False)
    include_usage, continuous_usage = _stream_options(fields, stream)
    if stream and params.prompt_logprobs is not None:
        raise fields.error("prompt_logprobs", "is not available with stream=true")
    request_id = fields.text("request_id", None)
    if request_id is not None and not is_safe_id(request_id):
        raise fields.error("request_id", "must be 1 to 64 letters, digits, '.', '_', ':' or '-'")
    truncate = fields.integer("truncate_prompt_tokens", None, low=-1, high=2**31 - 1)
    if truncate == 0:
        raise fields.error("truncate_prompt_tokens", "is 0; it must be -1 or at least 1")
    return Options(
        model=fields.text("model", None),
        params=params,
        default_max_tokens=default_max_tokens,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        echo=echo,
        add_special_tokens=fields.flag("add_special_tokens", add_special_tokens),
        truncate_prompt_tokens=truncate,
        truncation_side="right" if fields.text("truncation_side", "left", choices=("left", "right")) == "right" else "left",
        priority=fields.integer("priority", 0, low=-(2**31), high=2**31 - 1),
        cache_salt=_cache_salt(fields),
        request_id=request_id,
        return_token_ids=fields.flag("return_token_ids", False),
        tokens_as_ids=fields.flag("return_tokens_as_token_ids", False),
    )


def _sampling(fields: Fields, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=fields.number("temperature", 1.0, low=0, high=2),
        top_k=fields.integer("top_k", 0, low=-1, high=2**31 - 1),
        top_p=fields.number("top_p", 1.0),
        min_p=fields.number("min_p", 0.0),
        presence_penalty=fields.number("presence_penalty", 0.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0),
        logit_bias=_logit_bias(fields),
        min_tokens=fields.integer("min_tokens", 0, low=0, high=2**31 - 1),
        seed=fields.integer("seed", None),
        n=fields.integer("n", 1),
        stop=_stop(fields),
        stop_token_ids=fields.integers("stop_token_ids", max_items=MAX_STOP_TOKEN_IDS),
        include_stop_str_in_output=fields.flag("include_stop_str_in_output", False),
        ignore_eos=fields.flag("ignore_eos", False),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        skip_special_tokens=fields.flag("skip_special_tokens", True),
        structured_outputs=read_structured(fields),
    )


def _logit_bias(fields: Fields) -> dict[int, float] | None:
    bias = fields.object("logit_bias")
    if bias is None:
        return None
    values: dict[int, float] = {}
    for key in fields.mapping("logit_bias", max_items=MAX_LOGIT_BIAS):
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise UserError("logit_bias", f"logit_bias has the key {key!r:.40}; keys must be token ids")
        value = bias.number(key, None)
        if value is None:
            raise UserError("logit_bias", f"logit_bias[{key}] must be a number, not null")
        values[int(key)] = value
    return values or None


def _stop(fields: Fields) -> list[str]:
    value = fields.raw("stop")
    if isinstance(value, str):
        return [value]
    items = fields.array("stop", [], max_items=MAX_STOP_STRINGS)
    for position, item in enumerate(items):
        if not isinstance(item, str):
            raise fields.error(f"stop[{position}]", f"must be a string, not {json_type(item)}")
    return items


def _stream_options(fields: Fields, stream: bool) -> tuple[bool, bool]:
    options = fields.object("stream_options")
    if options is None:
        return False, False
    if not stream:
        raise fields.error("stream_options", "is only allowed with stream=true")
    options.flag("include_obfuscation", None)
    include_usage = options.flag("include_usage", False)
    return include_usage, options.flag("continuous_usage_stats", False) and include_usage


def _cache_salt(fields: Fields) -> str | None:
    salt = fields.text("cache_salt", None, max_chars=MAX_SALT_CHARS)
    if salt == "":
        raise fields.error("cache_salt", "must not be empty")
    return salt


def _prompts(fields: Fields, vocab_size: int, max_len: int) -> list[str] | list[list[int]]:
    value = fields.raw("prompt")
    if value is None:
        raise fields.error("prompt", "is required")
    if isinstance(value, str):
        return [value]
    if not is_array(value):
        raise fields.error("prompt", f"must be a string, an array of strings, token ids or arrays of token ids, not {json_type(value)}")
    if not value:
        raise fields.error("prompt", "must not be empty")
    if isinstance(value[0], int) and not isinstance(value[0], bool):
        return [_token_ids(fields, "prompt", value, vocab_size, max_len)]
    prompts = fields.array("prompt", [], max_items=MAX_PROMPTS)
    if isinstance(value[0], str):
        for position, item in enumerate(prompts):
            if not isinstance(item, str):
                raise fields.error(f"prompt[{position}]", f"must be a string like the first one, not {json_type(item)}")
        return prompts
    return [_token_ids(fields, f"prompt[{position}]", item, vocab_size, max_len) for position, item in enumerate(prompts)]


def _token_ids(fields: Fields, name: str, items: Any, vocab_size: int, max_len: int) -> list[int]:
    if not is_array(items):
        raise fields.error(name, f"must be an array of token ids, not {json_type(items)}")
    if not items:
        raise fields.error(name, "must hold at least one token id")
    if len(items) > 16 * max_len:
        message = f"has {len(items)} tokens, but the model's context holds {max_len}"
        raise UserError("prompt", f"{name} {message}", code="context_length_exceeded")
    for position, item in enumerate(items):
        if type(item) is not int:
            raise fields.error(f"{name}[{position}]", f"must be an integer, not {json_type(item)}")
        if not 0 <= item < vocab_size:
            raise fields.error(f"{name}[{position}]", f"is {item}, which is outside the vocabulary of {vocab_size} tokens")
    return items
