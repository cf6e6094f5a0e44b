"""How the answers to one conversation are read: which formats to look for, what that asks of the engine, and the parts that are found.

1. `plan_reading` decides once per request, from the server's options, the chat template, the tools and the end of the prompt.
2. `Reading.params` adds to the sampling parameters what reading needs: visible markers, and a form where a call must come.
3. Each answer has an `AnswerReader`, which turns its text into the parts that the routes print in their own shapes.
"""

from __future__ import annotations

import dataclasses
import uuid
from typing import TYPE_CHECKING, Any

from jaxserve.api.conversation import ToolChoice, plain_text
from jaxserve.api.protocol import ChatRequest
from jaxserve.config import ServerConfig
from jaxserve.errors import UserError
from jaxserve.request import CONSTRAINTS, FinishReason, RequestOutput, SamplingParams, StructuredOutputs
from jaxserve.text.answer import CallArguments, CallStart, Content, Part, Reasoning
from jaxserve.text.reasoning import ReasoningFormat, choose_reasoning_format, prompt_is_inside
from jaxserve.text.required import CALL_SPACE, required_form, strict_form, thoughtful_form
from jaxserve.text.split import make_splitter, shown_special_ids
from jaxserve.text.tool_bodies import Schemas
from jaxserve.text.tools import ToolFormat, choose_tool_format, schemas_of

if TYPE_CHECKING:
    from jaxserve.engine.load import ServedModel

_SHORT_ID_CHARS = 9


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What to look for in the answers to one request.

    Args:
      reasoning, tools: None where there is nothing to be found.
      schemas: parameters of each tool.
      inside: whether the prompt ends within reasoning; None if it does not tell.
      form: what the answers must look like, as a structural tag; None if they are free.
      shown: special tokens that stand in markers.
    """

    reasoning: ReasoningFormat | None
    tools: ToolFormat | None
    choice: ToolChoice
    schemas: Schemas
    inside: bool | None
    form: dict[str, Any] | None
    shown: frozenset[int]
    include_reasoning: bool

    def params(self, params: SamplingParams) -> SamplingParams:
        """The client's parameters and what reading needs.

        Raises: UserError if the client wants another form than that of a call that must come.
        """
        spec = params.structured_outputs
        if spec is not None and self.choice.kind in ("required", "named"):
            raise UserError("tool_choice", f"tool_choice {self.choice.kind!r} and {spec.source} cannot both be given")
        if self.form is not None:
            no_others = dict.fromkeys(CONSTRAINTS)
            tag: dict[str, Any] = {**no_others, "structural_tag": self.form}
            whole = StructuredOutputs(**tag, whitespace_pattern=CALL_SPACE, source="tools")
            params = dataclasses.replace(params, structured_outputs=whole if spec is None else dataclasses.replace(spec, **tag))
        return dataclasses.replace(params, shown_special_ids=self.shown) if self.shown else params


def plan_reading(server: ServerConfig, served: ServedModel, request: ChatRequest, prompt_end: str) -> Reading | None:
    """How to read the answers; None if all of them is content.

    Args:
      prompt_end: the last characters of the prompt.
    Raises: UserError for a choice of tools that the server does not offer.
    """
    rendering = request.rendering
    reasoning = choose_reasoning_format(server.reasoning_parser, served.chat.source)
    kind = rendering.choice.kind
    tools = None if kind == "none" else choose_tool_format(server.tool_call_parser, served.chat.source)
    if kind == "auto" and not server.enable_auto_tool_choice:
        raise UserError("tool_choice", "tool_choice 'auto' is turned off on this server (--no-enable-auto-tool-choice)")
    last = rendering.messages[-1]
    continued = plain_text(last["content"]) if rendering.continue_final_message else None
    inside = None if reasoning is None else prompt_is_inside(reasoning, prompt_end, continued)
    form: dict[str, Any] | None = None
    spec = request.options.params.structured_outputs
    if kind in ("required", "named"):
        offered = [tool for tool in rendering.tools or () if kind == "required" or tool["function"]["name"] == rendering.choice.name]
        tools, form = required_form(offered, tools, reasoning, inside=inside, parallel=rendering.choice.parallel)
    elif spec is not None:
        # A client's own form leaves no room for calls, but for reasoning, if that can be said.
        form = None if reasoning is None or inside is False else thoughtful_form(spec, reasoning, inside=inside)
        inside = inside if form is not None else False
    elif tools is not None:
        strict, parallel = rendering.choice.strict, rendering.choice.parallel
        form = strict_form(rendering.tools or (), strict, tools, reasoning, inside=inside, parallel=parallel)
        if form is not None:
            # The form binds proper calls only.
            tools = dataclasses.replace(tools, loose=())
    if reasoning is None and tools is None:
        return None
    markers = (reasoning.markers if reasoning is not None else ()) + (tools.markers if tools is not None else ())
    return Reading(
        reasoning=reasoning,
        tools=tools,
        choice=rendering.choice,
        schemas=schemas_of(rendering.tools or ()),
        inside=inside,
        form=form,
        shown=shown_special_ids(served.tokenizer, markers),
        include_reasoning=request.include_reasoning,
    )


class AnswerReader:
    """Reads one answer.

    Args:
      reading: None if all of it is content.
      call_prefix: what the ids of calls begin with where the model gives none.
    Attributes:
      thoughts: the texts of its reasoning so far, shown or not.
    """

    def __init__(self, reading: Reading | None, *, call_prefix: str) -> None:
        self._reading = reading
        self._splitter = (
            None if reading is None else make_splitter(reading.reasoning, reading.tools, reading.schemas, inside=reading.inside)
        )
        self._call_prefix = call_prefix
        self._ids: set[str] = set()
        self.thoughts: list[str] = []

    def parts(self, output: RequestOutput) -> list[Part]:
        """What became certain with an output, as far as the client shall see it; calls have ids."""
        if self._splitter is None:
            return [Content(output.text)] if output.text else []
        parts = self._splitter.push(output.text)
        if output.finish_reason is not None:
            # A stop string is the client's, and stops the model within a call as much as a limit does.
            parts += self._splitter.finish(cut=output.finish_reason != "stop" or isinstance(output.stop_reason, str))
        self.thoughts += [part.text for part in parts if isinstance(part, Reasoning)]
        return [shown for part in parts if (shown := self._shown(part)) is not None]

    def finish_reason(self, reason: FinishReason | None) -> str | None:
        """The reason to show: the model that called tools of its own choice stopped for them."""
        by_itself = self._reading is not None and self._reading.choice.kind != "named"
        if reason != "stop" or not self._ids or not by_itself:
            return reason
        return "function_call" if self._reading is not None and self._reading.choice.legacy else "tool_calls"

    def _shown(self, part: Part) -> Part | None:
        assert self._reading is not None, "without it nothing is split"
        match part:
            case Reasoning() if not self._reading.include_reasoning:
                return None
            case Content() if self._reading.choice.kind in ("required", "named"):
                # Their form leaves room for nothing but calls: white space, or one that was cut off before its name.
                return None
            case CallStart(index) | CallArguments(index) if index > 0 and not self._reading.choice.parallel:
                return None
            case CallStart(index, name, call_id):
                return CallStart(index, name, self._new_id(call_id))
            case _:
                return part

    def _new_id(self, given: str | None) -> str:
        tools = self._reading.tools if self._reading is not None else None
        fresh = uuid.uuid4().hex
        made = fresh[:_SHORT_ID_CHARS] if tools is not None and tools.ids == "short" else self._call_prefix + fresh
        call_id = given if given and given not in self._ids else made
        self._ids.add(call_id)
        return call_id
