"""How a body asks to be sampled: the names that all generating routes share, read into `SamplingParams`."""

from __future__ import annotations

from jaxserve.api.fields import Fields
from jaxserve.api.structured import read_structured
from jaxserve.errors import UserError
from jaxserve.request import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    RepetitionDetection,
    SamplingParams,
)

# Far more than any vocabulary has.
MAX_ALLOWED_TOKEN_IDS = 1 << 20
SAMPLING_NAMES = frozenset(
    {
        "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
        "allowed_token_ids", "bad_words", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "include_stop_str_in_output",
        "skip_special_tokens", "logprob_token_ids", "repetition_detection", "thinking_token_budget", "structured_outputs",
        "response_format",
    }
)  # fmt: skip
# Those whose default is the model's, where its generation_config.json has one.
DEFAULTED_NAMES = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def read_sampling(fields: Fields, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
    """How to sample. Raises: UserError naming the field at fault."""
    chosen = fields.integers("logprob_token_ids", max_items=MAX_LOGPROB_TOKEN_IDS)
    if chosen and logprobs is None:
        raise fields.error("logprob_token_ids", "needs logprobs")
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
        allowed_token_ids=_allowed_token_ids(fields),
        bad_words=fields.strings("bad_words", max_items=MAX_BAD_WORDS),
        min_tokens=fields.integer("min_tokens", 0, low=0, high=2**31 - 1),
        seed=fields.integer("seed", None),
        n=fields.integer("n", 1),
        stop=_stop(fields),
        stop_token_ids=fields.integers("stop_token_ids", max_items=MAX_STOP_TOKEN_IDS),
        include_stop_str_in_output=fields.flag("include_stop_str_in_output", False),
        ignore_eos=fields.flag("ignore_eos", False),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logprob_token_ids=chosen,
        repetition_detection=_repetition_detection(fields),
        thinking_token_budget=fields.integer("thinking_token_budget", None, low=-1, high=2**31 - 1),
        skip_special_tokens=fields.flag("skip_special_tokens", True),
        structured_outputs=read_structured(fields),
    )


def _allowed_token_ids(fields: Fields) -> list[int] | None:
    ids = fields.integers("allowed_token_ids", max_items=MAX_ALLOWED_TOKEN_IDS)
    return list(dict.fromkeys(ids)) if fields.given("allowed_token_ids") else None


def _repetition_detection(fields: Fields) -> RepetitionDetection | None:
    wanted = fields.object("repetition_detection")
    if wanted is None:
        return None
    sizes = {name: wanted.integer(name, 0) for name in ("max_pattern_size", "min_pattern_size", "min_count")}
    return RepetitionDetection(**sizes) if sizes["max_pattern_size"] else None


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
    return [value] if isinstance(value, str) else fields.strings("stop", max_items=MAX_STOP_STRINGS)
