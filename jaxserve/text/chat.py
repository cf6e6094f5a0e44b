"""Conversations -> the text that a model was trained to see, through its chat template."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

from jaxserve.errors import UserError
from jaxserve.text.sandbox import Program, TemplateLimit, TemplateRefusal
from jaxserve.text.tokenizer import Tokenizer

MAX_CHARS = 16 << 20
MAX_SECONDS = 5.0
_MAX_REASON_CHARS = 300
_DEFAULT_TEMPLATE = pathlib.Path(__file__).with_name("default_chat.jinja")
_RESERVED = frozenset(("messages", "tools", "add_generation_prompt", "continue_final_message", "beginning", "chat_template", "tokenize"))
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_PROBE = "jaxserve-probe"
_PROBE_SECONDS = 0.2

Message = Mapping[str, Any]
# How messages with tool calls are given to a template: the kind of their arguments, and what stands for no content. The first that the
# template shows is taken; all of them are in use.
_CALL_STYLES: tuple[tuple[Literal["object", "text"], str | None], ...] = (("object", ""), ("text", ""), ("object", None), ("text", None))
ContentStyle = Literal["text", "parts", "both"]


class ChatTemplate:
    """The compiled chat template of a model; safe to use from several threads.

    Args:
      source: Jinja; None takes default_chat.jinja.
      defaults: variables that the kwargs of a rendering outrank.
      max_chars: most characters of a rendered conversation.
      max_seconds: most processor time of one rendering.
    Attributes:
      source: the template of the model; None if it has none.
    Raises: ConfigError if the source is not valid Jinja.
    """

    def __init__(
        self, source: str | None, tokenizer: Tokenizer, *, defaults: Mapping[str, Any] | None = None, max_chars: int = MAX_CHARS,
        max_seconds: float = MAX_SECONDS,
    ) -> None:  # fmt: skip
        self.source = source
        self._defaults = dict(defaults or {})
        if source is None:
            source = _DEFAULT_TEMPLATE.read_text(encoding="utf-8")
            self._constants: dict[str, Any] = {**tokenizer.special_tokens, "beginning": tokenizer.prefix_text}
        else:
            self._constants = dict(tokenizer.special_tokens)
        self._program = Program(source, max_chars=max_chars, max_seconds=max_seconds)
        self._styles: dict[str, ContentStyle] = {role: self._probe(role) for role in ("user", "system", "assistant")}
        # Templates that do not name the role pass over it, refuse it, or print a word that the model has never seen.
        named = "'developer'" in source or '"developer"' in source
        self._has_developer = (named and self._shows("developer", as_parts=False)) or not self._shows("system", as_parts=False)
        self._call_style = next((style for style in _CALL_STYLES if self._shows_call(*style)), _CALL_STYLES[0])

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, special tokens written out; encode it without adding any.

        Args:
          messages: dicts with "role" and "content" (a string, None or a list of text parts) and what else the template reads.
          add_generation_prompt: end with the beginning of an answer.
          continue_final_message: end within the last message, which the answer continues.
          kwargs: further variables of the template, such as "documents" or "enable_thinking"; those it does not read change nothing.
        Raises: UserError if the template cannot render them.
        """
        if continue_final_message and add_generation_prompt:
            raise UserError(
                "continue_final_message", "continue_final_message and add_generation_prompt exclude each other; set one of them to false"
            )
        taken = sorted(set(kwargs or ()) & (_RESERVED | set(self._constants)))
        if taken:
            raise UserError("chat_template_kwargs", f"chat_template_kwargs must not set {taken[0]}")
        plain = [self._prepare(message) for message in messages]
        variables: dict[str, Any] = {"documents": None, **self._constants}
        variables |= {name: value for name, value in (self._defaults | dict(kwargs or {})).items() if name in self._program.variables}
        variables |= {"tools": None if tools is None else list(tools), "add_generation_prompt": add_generation_prompt}
        if not continue_final_message:
            return self._run({**variables, "messages": plain})
        ending = _mark_end(plain)
        return _cut_at_mark(self._run({**variables, "messages": plain}), ending)

    def _run(self, variables: Mapping[str, Any]) -> str:
        try:
            return self._program.render(variables)
        except TemplateRefusal as refusal:
            raise UserError("messages", f"the model's chat template refuses these messages: {_printable(str(refusal))}") from None
        except TemplateLimit as limit:
            raise UserError("messages", f"rendering the model's chat template takes {limit}") from None
        except Exception as error:  # a template is a program of someone else's: whatever it raises says that these messages do not fit it
            raise UserError("messages", f"the model's chat template cannot render these messages ({type(error).__name__})") from None

    def _prepare(self, message: Message) -> dict[str, Any]:
        """A copy of a message with its content as this template reads it, and its reasoning under every name in use."""
        plain = dict(message)
        if plain.get("role") == "developer" and not self._has_developer:
            plain["role"] = "system"
        if plain.get("tool_calls"):
            kind, empty = self._call_style
            plain["content"] = plain.get("content") or empty
            if kind == "text":
                plain["tool_calls"] = [_with_text_arguments(call) for call in plain["tool_calls"]]
        reasoning = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        content = plain.get("content")
        style = self._styles.get(str(plain.get("role")), "text")
        if isinstance(content, str) and style == "parts":
            plain["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list | tuple):
            texts = list(_texts(cast("Sequence[Any]", content)))
            plain["content"] = "\n".join(texts) if style == "text" else [{"type": "text", "text": text} for text in texts]
        return plain

    def _probe(self, role: str) -> ContentStyle:
        """Find out how the template reads the content of a role's messages, by rendering some."""
        if not self._shows(role, as_parts=True):
            return "text"
        return "both" if self._shows(role, as_parts=False) else "parts"

    def _shows(self, role: str, *, as_parts: bool) -> bool:
        """Whether such content appears in the rendered text, and not as the source of a list."""

        def message(speaker: str, text: str) -> dict[str, Any]:
            return {"role": speaker, "content": [{"type": "text", "text": text}] if as_parts else text}

        before: list[str] = ["user"] if role == "assistant" else []
        after: list[str] = ["user"] if role in ("system", "developer") else []
        messages = [*(message(each, "question") for each in before), message(role, _PROBE), *(message(each, "question") for each in after)]
        text = self._try(messages)
        return _PROBE in text and "'type': 'text'" not in text and '"type": "text"' not in text

    def _shows_call(self, kind: Literal["object", "text"], content: str | None) -> bool:
        """Whether a call with arguments of this kind appears in the rendered text, in a message with such content."""
        arguments = {"city": _PROBE} if kind == "object" else f'{{"city": "{_PROBE}"}}'
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
        result = {"role": "tool", "tool_call_id": "abcdefghi", "name": "f", "content": "sunny"}
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": content, "tool_calls": [call]}, result]
        return _PROBE in self._try(messages)

    def _try(self, messages: list[dict[str, Any]]) -> str:
        variables = {"documents": None, "tools": None, "add_generation_prompt": True, **self._constants, "messages": messages}
        try:
            return self._program.render(variables, max_seconds=_PROBE_SECONDS)
        except Exception:  # as in _run; what cannot render the probe is treated as not showing it
            return ""


def render_pair(chat: ChatTemplate, query: str, document: str, *, kwargs: Mapping[str, Any]) -> str:
    """A query and a document as a template prints messages of these two roles, which is how rerankers get them in vLLM.

    Raises: UserError if the template cannot render them.
    """
    messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    return chat.render(messages, add_generation_prompt=False, continue_final_message=False, kwargs=kwargs)


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function: Mapping[str, Any] = call.get("function") or {}
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _texts(parts: Sequence[Any]) -> Iterator[str]:
    for part in parts:
        fields: Mapping[str, Any] = cast("Any", part) if isinstance(part, Mapping) else {"text": part}
        text = fields.get("text", fields.get("refusal"))
        if not isinstance(text, str):
            raise UserError("messages", "content must be a string or a list of parts of type 'text'")
        yield text


def _mark_end(messages: list[dict[str, Any]]) -> str:
    """Put the mark behind the last message's text, and return that text."""
    content: Any = messages[-1].get("content") if messages else None
    if isinstance(content, list) and content:
        last: dict[str, str] = cast("Any", content)[-1]
        text = last["text"]
        last["text"] = text + _MARK
        return text
    if not isinstance(content, str):
        raise UserError("continue_final_message", "continue_final_message needs a last message with text to continue")
    messages[-1]["content"] = content + _MARK
    return content


def _cut_at_mark(text: str, ending: str) -> str:
    mark = _MARK.rstrip()
    at = text.rfind(mark)
    if at < 0 or ending.strip() not in text:
        raise UserError(
            "continue_final_message", "the model's chat template does not show the last message whole, so that it cannot be continued"
        )
    # A template that strips messages has stripped the mark's space: it would have stripped the message's own, too.
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


def _printable(text: str) -> str:
    cut = "".join(letter if letter.isprintable() else " " for letter in text[:_MAX_REASON_CHARS])
    return cut + ("..." if len(text) > _MAX_REASON_CHARS else "")
