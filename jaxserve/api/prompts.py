"""What every route that takes prompts reads alike: texts and token ids, how to cut them, and what the request is called."""

from __future__ import annotations

import uuid
from typing import Any

from jaxserve.api.fields import Fields
from jaxserve.api.json_door import is_array, json_type
from jaxserve.api.wire import is_safe_id
from jaxserve.errors import UserError

MAX_SALT_CHARS = 1024  # as in vLLM


def read_prompts(fields: Fields, name: str, *, max_items: int, vocab_size: int, max_len: int) -> list[str] | list[list[int]]:
    """One or many texts, or token ids below `vocab_size` of one or many. Raises: UserError naming the one at fault."""
    value = fields.raw(name)
    if value is None:
        raise fields.error(name, "is required")
    if isinstance(value, str):
        return [value]
    if not is_array(value):
        raise fields.error(name, f"must be a string, an array of strings, token ids or arrays of token ids, not {json_type(value)}")
    if not value:
        raise fields.error(name, "must not be empty")
    if isinstance(value[0], int) and not isinstance(value[0], bool):
        return [_token_ids(fields, name, name, value, vocab_size, max_len)]
    prompts = fields.array(name, [], max_items=max_items)
    if isinstance(value[0], str):
        for position, item in enumerate(prompts):
            if not isinstance(item, str):
                raise fields.error(f"{name}[{position}]", f"must be a string like the first one, not {json_type(item)}")
        return prompts
    return [_token_ids(fields, name, f"{name}[{position}]", item, vocab_size, max_len) for position, item in enumerate(prompts)]


def read_cache_salt(fields: Fields) -> str | None:
    """The tenant whose prefixes may be found in the cache; None is the common one."""
    salt = fields.text("cache_salt", None, max_chars=MAX_SALT_CHARS)
    if salt == "":
        raise fields.error("cache_salt", "must not be empty")
    return salt


def read_request_id(fields: Fields) -> str:
    """The client's own id of the request, or a new one."""
    request_id = fields.text("request_id", None)
    if request_id is not None and not is_safe_id(request_id):
        raise fields.error("request_id", "must be 1 to 64 letters, digits, '.', '_', ':' or '-'")
    return request_id or uuid.uuid4().hex


def read_truncation(fields: Fields) -> int | None:
    """Tokens of a prompt to keep; -1 as many as fit, None all."""
    truncate = fields.integer("truncate_prompt_tokens", None, low=-1, high=2**31 - 1)
    if truncate == 0:
        raise fields.error("truncate_prompt_tokens", "is 0; it must be -1 or at least 1")
    return truncate


def _token_ids(fields: Fields, member: str, name: str, items: Any, vocab_size: int, max_len: int) -> list[int]:
    if not is_array(items):
        raise fields.error(name, f"must be an array of token ids, not {json_type(items)}")
    if not items:
        raise fields.error(name, "must hold at least one token id")
    if len(items) > 16 * max_len:
        message = f"has {len(items)} tokens, but the model's context holds {max_len}"
        raise UserError(member, f"{name} {message}", code="context_length_exceeded")
    for position, item in enumerate(items):
        if type(item) is not int:
            raise fields.error(f"{name}[{position}]", f"must be an integer, not {json_type(item)}")
        if not 0 <= item < vocab_size:
            raise fields.error(f"{name}[{position}]", f"is {item}, which is outside the vocabulary of {vocab_size} tokens")
    return items
