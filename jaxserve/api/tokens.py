"""POST /tokenize and /detokenize, as in vLLM: text or a conversation to token ids, and back."""

from __future__ import annotations

import dataclasses
import functools

from starlette.types import Receive, Send

from jaxserve.api.answers import MAX_CHARS_PER_TOKEN, check_chars, ready, served_name
from jaxserve.api.endpoint import JsonEndpoint
from jaxserve.api.fields import Fields
from jaxserve.api.json_door import parse_object
from jaxserve.api.parameters import check_parameters
from jaxserve.api.protocol import Rendering, read_rendering
from jaxserve.api.turn import render_prompt
from jaxserve.api.wire import INLINE_BYTES, INLINE_CHARS, off_loop, send_json
from jaxserve.errors import UserError

_TOKENIZE = frozenset(
    {
        "model", "prompt", "messages", "add_special_tokens", "return_token_strs", "add_generation_prompt", "continue_final_message",
        "chat_template_kwargs", "tools", "tool_choice", "documents", "reasoning_effort",
    }
)  # fmt: skip
_DETOKENIZE = frozenset({"model", "tokens"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeRequest:
    """The body of /tokenize.

    Args:
      prompt: text, or a conversation and how the template shall print it.
    """

    model: str | None
    prompt: str | Rendering
    add_special_tokens: bool
    return_token_strs: bool


def read_tokenize(fields: Fields) -> TokenizeRequest:
    """Read a body of /tokenize. Raises: UserError naming the field at fault."""
    check_parameters(fields, _TOKENIZE)
    prompt = read_rendering(fields) if fields.given("messages") else fields.text("prompt", None)
    if prompt is None:
        raise fields.error("prompt", "is required, or messages")
    return TokenizeRequest(
        model=fields.text("model", None),
        prompt=prompt,
        add_special_tokens=fields.flag("add_special_tokens", isinstance(prompt, str)),
        return_token_strs=fields.flag("return_token_strs", False),
    )


def read_detokenize(fields: Fields, *, max_items: int) -> tuple[str | None, list[int]]:
    """The model and the token ids of a body of /detokenize. Raises: UserError naming the field at fault."""
    check_parameters(fields, _DETOKENIZE)
    if not fields.given("tokens"):
        raise fields.error("tokens", "is required")
    return fields.text("model", None), fields.integers("tokens", max_items=max_items)


class TokenizeEndpoint(JsonEndpoint):
    """The ASGI app of /tokenize."""

    gives = None

    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """Answer with the token ids of a text or a conversation."""
        request = await off_loop(len(body) > INLINE_BYTES, lambda: read_tokenize(Fields(parse_object(body))))
        served_name(self.engine.config, request.model)
        served, prompt = ready(self.engine), request.prompt
        if isinstance(prompt, str):
            check_chars("prompt", len(prompt), served.max_len)
            encode = functools.partial(served.tokenizer.encode, prompt, add_special_tokens=request.add_special_tokens)
            ids = await off_loop(len(prompt) > INLINE_CHARS, encode)
        else:
            ids, _ = await render_prompt(served, prompt, request.add_special_tokens)
        shown = None
        if request.return_token_strs:
            shown = await off_loop(len(ids) > INLINE_CHARS, lambda: [served.tokenizer.token_name(token) for token in ids])
        await send_json(send, {"count": len(ids), "max_model_len": served.max_len, "tokens": ids, "token_strs": shown})


class DetokenizeEndpoint(JsonEndpoint):
    """The ASGI app of /detokenize."""

    gives = None

    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """Answer with the text of token ids, special tokens included."""
        served = ready(self.engine)

        def work() -> str:
            name, ids = read_detokenize(Fields(parse_object(body)), max_items=MAX_CHARS_PER_TOKEN * served.max_len)
            served_name(self.engine.config, name)
            for position, token in enumerate(ids):
                if not 0 <= token < served.vocab_size:
                    message = f"tokens[{position}] is {token}, which is outside the vocabulary of {served.vocab_size} tokens"
                    raise UserError(f"tokens[{position}]", message)
            return served.tokenizer.decode(ids, skip_special_tokens=False)

        await send_json(send, {"prompt": await off_loop(len(body) > INLINE_CHARS, work)})
