"""What is known about request parameters that change nothing here, or cannot be served: two tables, and the check of a body against them.

Unknown names are left alone (clients forward what other servers understand) and never get past this floor.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from jaxserve.api.fields import Fields
from jaxserve.api.json_door import json_type
from jaxserve.errors import UserError

logger = logging.getLogger(__name__)

# Of the error that refuses a parameter by name.
UNSUPPORTED_CODE = "unsupported_parameter"
# Far more than all known names together.
MAX_FIELDS = 512

# Bookkeeping of OpenAI's platform, and hints that matter to other servers: accepted as in vLLM, since no output depends on them.
WITHOUT_EFFECT: Mapping[str, type] = {
    "user": str,
    "metadata": dict,
    "store": bool,
    "service_tier": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "session_id": str,
    "prediction": dict,  # a hint for speed
    "web_search_options": dict,  # no server of this kind searches; clients for OpenAI's leave it in
    "mm_payload": str,  # of what the render routes of vLLM answer, as is the next
    "return_mm_kwargs": bool,
    "spaces_between_special_tokens": bool,  # none are ever put there: text is the tokens' own bytes
}

# name -> the values besides null with which a parameter asks for nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "custom_logit_processor": (),
    "custom_params": (),
    "do_sample": (),
    "ebnf": (),
    "ec_transfer_params": ({},),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "enable_response_messages": (False,),
    "kv_transfer_params": ({},),
    "lora_path": (),
    "max_new_tokens": (),
    "media_io_kwargs": ({},),
    "min_new_tokens": (0,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "no_stop_trim": (False,),
    "previous_input_messages": ([],),
    "prompt_embeds": (),
    "regex": (),
    "return_assistant_tokens_mask": (False,),
    "return_hidden_states": (False,),
    "return_token_offsets": (False,),
    "routed_experts_prompt_start": (0,),
    "session_params": (),
    "stop_regex": (),
    "suffix": ("",),
    "top_n_tokens": (),
    "typical_p": (1,),
    "vllm_xargs": ({},),
    "watermark": (False,),
    "watermarking": (False,),
}

_REASONS = {
    "do_sample": "is not known; temperature 0 is greedy",
    "max_new_tokens": "is not known; use max_tokens",
    "min_new_tokens": "is not known; use min_tokens",
    "no_stop_trim": "is not known; use include_stop_str_in_output",
    "return_token_offsets": "is of vLLM's render routes; use return_token_ids and logprobs",
    "suffix": "needs a model that is served with its own way to fill in the middle; put its markers into the prompt",
    "top_n_tokens": "is not known; use logprobs",
    "chat_template": "comes from the model or from --chat-template, never from a request",
    "functions": "is not supported; use tools",
    "function_call": "is not supported; use tool_choice",
    "guided_choice": 'is no longer known, in vLLM neither; use structured_outputs={"choice": [...]}',
    "guided_decoding_backend": "is no longer known, in vLLM neither; leave it out",
    "guided_grammar": 'is no longer known, in vLLM neither; use structured_outputs={"grammar": ...}',
    "guided_json": 'is no longer known, in vLLM neither; use structured_outputs={"json": {...}} or response_format',
    "guided_regex": 'is no longer known, in vLLM neither; use structured_outputs={"regex": ...}',
    "regex": 'is not known; use structured_outputs={"regex": ...}',
    "ebnf": 'is not known; use structured_outputs={"grammar": ...}',
}


def check_parameters(fields: Fields, known: Collection[str], foreign: Collection[str] = ()) -> None:
    """Refuse parameters that ask for what cannot be done, and mistyped ones; note the unknown ones in the debug log.

    Args:
      fields: the body.
      known: names that the caller reads itself.
      foreign: names that mean something on other routes only.
    Raises: UserError naming the parameter.
    """
    if len(fields) > MAX_FIELDS:
        raise UserError(None, f"the body has {len(fields)} fields; at most {MAX_FIELDS} are allowed")
    for name in fields:
        if name in known or not fields.given(name):
            continue
        value = fields.raw(name)
        if name in foreign:
            raise fields.error(name, "is not a parameter of this route; leave it out", code=UNSUPPORTED_CODE)
        if name in UNSUPPORTED:
            if not any(_same(value, neutral) for neutral in UNSUPPORTED[name]):
                raise fields.error(name, _REASONS.get(name, "is not supported yet; leave it out"), code=UNSUPPORTED_CODE)
        elif name in WITHOUT_EFFECT:
            if not isinstance(value, WITHOUT_EFFECT[name]):
                raise fields.error(name, f"must not be {json_type(value)}")
        else:
            logger.debug("unknown parameter ignored: name=%.60r", name)


def _same(value: Any, neutral: Any) -> bool:
    # 1 and 1.0 are the same number to a client; True is not one.
    numbers = not isinstance(value, bool) and isinstance(value, int | float) and not isinstance(neutral, bool)
    return value == neutral and (numbers or type(value) is type(neutral))
