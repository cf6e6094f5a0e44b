"""Bodies that the endpoints accept: the examples of the docs page, and what the documented schemas are recorded from.

The first of each is the smallest; between them they have every object that holds fields of its own.
"""

from __future__ import annotations

from typing import Any

_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
_USER = {"role": "user", "content": "What is the weather in Rome?"}
_TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather of a city", "parameters": _SCHEMA, "strict": True}}
_CALL = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}

CHAT: tuple[dict[str, Any], ...] = (
    {"messages": [_USER]},
    {
        "messages": [
            {"role": "system", "content": "Be brief.", "name": "operator"},
            {"role": "user", "content": [{"type": "text", "text": "What is the weather in Rome?"}]},
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "content": "Sunny.", "tool_call_id": "call-1"},
        ],
        "tools": [_TOOL],
        "tool_choice": "auto",
        "max_completion_tokens": 100,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    {
        "messages": [_USER],
        "response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": _SCHEMA, "strict": True}},
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"42": -1.5},
        "chat_template_kwargs": {"enable_thinking": False},
        "documents": [{"title": "Rome", "text": "Rome is sunny."}],
    },
    {"messages": [_USER], "structured_outputs": {"regex": "(yes|no)"}, "temperature": 0},
    {"messages": [_USER], "functions": [{"name": "weather", "parameters": _SCHEMA}], "function_call": "auto"},
)

CHAT_BATCH: tuple[dict[str, Any], ...] = (
    {"messages": [[_USER]]},
    {
        "messages": [[_USER], [{"role": "user", "content": "What is the weather in Oslo?"}]],
        "response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": _SCHEMA, "strict": True}},
        "max_completion_tokens": 100,
        "logit_bias": {"42": -1.5},
        "documents": [{"title": "Rome", "text": "Rome is sunny."}],
    },
    {"messages": [[_USER]], "structured_outputs": {"regex": "(yes|no)"}},
)

COMPLETION: tuple[dict[str, Any], ...] = (
    {"prompt": "The capital of Italy is"},
    {"prompt": [[5, 17, 300]], "max_tokens": 8, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}},
    {"prompt": ["a", "b"], "response_format": {"type": "json_object"}, "logit_bias": {"42": -1.5}, "logprobs": 1},
    {"prompt": "a", "structured_outputs": {"choice": ["yes", "no"]}},
)

TOKENIZE: tuple[dict[str, Any], ...] = ({"prompt": "The capital of Italy is"}, {"messages": [_USER], "tools": [_TOOL]})

DETOKENIZE: tuple[dict[str, Any], ...] = ({"tokens": [5, 17, 300]},)

ABORT: tuple[dict[str, Any], ...] = ({"request_ids": ["chatcmpl-6f1c", "my-own-id"]}, {})

_FUNCTION = {"type": "function", "name": "weather", "description": "The weather of a city", "parameters": _SCHEMA, "strict": True}
RESPONSES: tuple[dict[str, Any], ...] = (
    {"input": "What is the weather in Rome?"},
    {
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "What is the weather in Rome?"}]},
            {"type": "function_call", "call_id": "call-1", "name": "weather", "arguments": '{"city": "Rome"}'},
            {"type": "function_call_output", "call_id": "call-1", "output": "Sunny."},
        ],
        "tools": [_FUNCTION],
        "max_output_tokens": 100,
        "stream": True,
        "stream_options": {"include_obfuscation": False},
        "logit_bias": {"42": -1.5},
        "chat_template_kwargs": {"enable_thinking": False},
    },
    {
        "input": "What is the weather in Rome?",
        "text": {"format": {"type": "json_schema", "name": "place", "schema": _SCHEMA, "strict": True}},
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["message.output_text.logprobs"],
        "metadata": {"topic": "weather"},
        "tools": [_FUNCTION],
        "tool_choice": {"type": "function", "name": "weather"},
    },
    {"input": "Is Rome in Italy?", "structured_outputs": {"regex": "(yes|no)"}, "temperature": 0},
)

_INPUT = {"name": "weather", "description": "The weather of a city", "input_schema": _SCHEMA}
COUNT: tuple[dict[str, Any], ...] = (
    {"messages": [_USER]},
    {"messages": [_USER], "system": "Be brief.", "tools": [_INPUT], "tool_choice": {"type": "auto"}, "thinking": {"type": "disabled"}},
)
MESSAGES: tuple[dict[str, Any], ...] = (
    {"messages": [_USER], "max_tokens": 100},
    {
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            _USER,
            {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "Sunny."}]},
        ],
        "tools": [_INPUT],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "max_tokens": 100,
        "stream": True,
        "stop_sequences": ["END"],
        "metadata": {"user_id": "anna"},
        "logit_bias": {"42": -1.5},
        "chat_template_kwargs": {"enable_thinking": False},
    },
    {
        "messages": [_USER],
        "max_tokens": 2000,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": _SCHEMA}},
    },
    {"messages": [_USER], "max_tokens": 5, "structured_outputs": {"choice": ["yes", "no"]}, "temperature": 0},
)

INPUTS: tuple[dict[str, Any], ...] = (
    {"input": "Rome is sunny."},
    {"input": ["Rome is sunny.", "Oslo is not."], "encoding_format": "base64", "truncate_prompt_tokens": -1},
    {"input": [[5, 17, 300]], "dimensions": 256},
    {"messages": [_USER]},
)

CLASSIFY: tuple[dict[str, Any], ...] = (
    {"input": "Rome is sunny."},
    {"input": [[5, 17, 300], [5, 18]], "truncate_prompt_tokens": -1},
    {"messages": [_USER]},
)

SCORE: tuple[dict[str, Any], ...] = (
    {"queries": "What is the weather in Rome?", "documents": ["Rome is sunny.", "Oslo is not."]},
    {"text_1": ["a", "b"], "text_2": ["c", "d"]},
)

RERANK: tuple[dict[str, Any], ...] = (
    {"query": "What is the weather in Rome?", "documents": ["Rome is sunny.", "Oslo is not."]},
    {"query": "Rome", "documents": [{"text": "Rome is sunny."}, {"text": "Oslo is not."}], "top_n": 1, "return_documents": False},
)
