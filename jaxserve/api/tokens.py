"""POST /tokenize and /detokenize, as in vLLM: text or a conversation to token ids, and back."""

from __future__ import annotations

from starlette.types import Receive, Send

from jaxserve.api.answers import MAX_CHARS_PER_TOKEN, check_chars, ready, served_name
from jaxserve.api.chat import render_prompt
from jaxserve.api.endpoint import JsonEndpoint
from jaxserve.api.fields import Fields
from jaxserve.api.json_door import parse_object
from jaxserve.api.parameters import check_parameters
from jaxserve.api.protocol import read_rendering
from jaxserve.api.wire import INLINE_BYTES, INLINE_CHARS, off_loop, send_json

_TOKENIZE = frozenset(
    {
        "model", "prompt", "messages", "add_special_tokens", "return_token_strs", "add_generation_prompt", "continue_final_message",
        "chat_template_kwargs", "tools", "tool_choice", "documents", "reasoning_effort",
    }
)  # fmt: skip
_DETOKENIZE = frozenset({"model", "tokens"})


class TokenizeEndpoint(JsonEndpoint):
    """The ASGI app of /tokenize."""

    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """Answer with the token ids of a text or a conversation."""
        fields = Fields(await off_loop(len(body) > INLINE_BYTES, lambda: parse_object(body)))
        served_name(self.engine.config, fields.text("model", None))
        served = ready(self.engine)
        check_parameters(fields, _TOKENIZE)
        strings = fields.flag("return_token_strs", False)
        if fields.given("messages"):
            add_special = fields.flag("add_special_tokens", False)
            ids, _ = await render_prompt(served, read_rendering(fields), add_special)
        else:
            text = fields.text("prompt", None)
            if text is None:
                raise fields.error("prompt", "is required, or messages")
            add_special = fields.flag("add_special_tokens", True)
            check_chars("prompt", len(text), served.max_len)
            ids = await off_loop(len(text) > INLINE_CHARS, lambda: served.tokenizer.encode(text, add_special_tokens=add_special))
        shown = await off_loop(len(ids) > INLINE_CHARS, lambda: [served.tokenizer.token_text(token) for token in ids]) if strings else None
        await send_json(send, {"count": len(ids), "max_model_len": served.max_len, "tokens": ids, "token_strs": shown})


class DetokenizeEndpoint(JsonEndpoint):
    """The ASGI app of /detokenize."""

    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """Answer with the text of token ids, special tokens included."""
        served = ready(self.engine)

        def work() -> str:
            fields = Fields(parse_object(body))
            served_name(self.engine.config, fields.text("model", None))
            check_parameters(fields, _DETOKENIZE)
            if not fields.given("tokens"):
                raise fields.error("tokens", "is required")
            ids = fields.integers("tokens", max_items=MAX_CHARS_PER_TOKEN * served.max_len)
            for position, token in enumerate(ids):
                if not 0 <= token < served.vocab_size:
                    raise fields.error(f"tokens[{position}]", f"is {token}, which is outside the vocabulary of {served.vocab_size} tokens")
            return served.tokenizer.decode(ids, skip_special_tokens=False)

        await send_json(send, {"prompt": await off_loop(len(body) > INLINE_CHARS, work)})
