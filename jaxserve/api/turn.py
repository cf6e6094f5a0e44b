"""One turn of a conversation, whichever route it came by: rendered, tokenized, and on its way through the engine.

1. Render the conversation and tokenize it, off the event loop when it is long.
2. Decide how answers are read: reasoning and tool calls.
3. Submit n requests.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jaxserve.api.answers import check_chars, ready, served_name, submit, truncate
from jaxserve.api.conversation import count_chars
from jaxserve.api.protocol import ChatRequest, Rendering
from jaxserve.api.reading import Reading, plan_reading
from jaxserve.api.wire import INLINE_CHARS, off_loop
from jaxserve.errors import UserError

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncEngine, OutputStream
    from jaxserve.engine.load import ServedModel

# More than any marker of reasoning, with the white space behind it.
PROMPT_END_CHARS = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What has been submitted.

    Args:
      name: of the model, as it shall be shown.
      prompt_text: as the chat template printed it, before it was cut.
      reading: how to find reasoning and calls in the answers; None if all is content.
      streams: one per answer.
    """

    served: ServedModel
    name: str
    prompt_text: str
    prompt_ids: list[int]
    reading: Reading | None
    streams: list[OutputStream]


async def begin_turn(engine: AsyncEngine, request: ChatRequest) -> Turn:
    """Start the n answers to a conversation.

    Raises: UserError, QueueFullError, EngineUnavailableError.
    """
    options = request.options
    name = served_name(engine.config, options.model)
    served = ready(engine)
    ids, text = await render_prompt(served, request.rendering, options.add_special_tokens)
    prompt_ids = truncate(ids, options, served.max_len)
    reading = plan_reading(engine.config.server, served, request, text[-PROMPT_END_CHARS:])
    params = options.params if reading is None else reading.params(options.params)
    streams = await submit(engine, request.rendering.field, [prompt_ids], options, params)
    return Turn(served=served, name=name, prompt_text=text, prompt_ids=prompt_ids, reading=reading, streams=streams)


async def render_prompt(served: ServedModel, rendering: Rendering, add_special_tokens: bool) -> tuple[list[int], str]:
    """Token ids of a conversation as the model's chat template prints it, and what it prints.

    Raises: UserError for a conversation that the template refuses, or one far too long.
    """
    chars = count_chars(rendering.messages) + sum(len(str(tool)) for tool in rendering.tools or ())
    check_chars(rendering.field, chars, served.max_len)

    def work() -> tuple[list[int], str]:
        try:
            text = served.chat.render(
                rendering.messages,
                tools=rendering.tools,
                add_generation_prompt=rendering.add_generation_prompt,
                continue_final_message=rendering.continue_final_message,
                kwargs=rendering.kwargs,
            )
        except UserError as error:
            field = rendering.field if error.field == "messages" else error.field
            raise UserError(field, error.message, code=error.code, status=error.status) from None
        # A template may print documents and other variables that were not counted above.
        check_chars(rendering.field, len(text), served.max_len)
        return served.tokenizer.encode(text, add_special_tokens=add_special_tokens), text

    return await off_loop(chars > INLINE_CHARS or bool(rendering.kwargs), work)
