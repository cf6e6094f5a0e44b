"""Where models think aloud: one table row per format, which of them a model uses, and the reader that tells reasoning from the answer."""

from __future__ import annotations

import dataclasses

from jaxserve.text.answer import Markers, Parts


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFormat:
    """How reasoning stands before an answer.

    Args:
      starts, ends: markers around it; none of either: in channels, see harmony.py.
      label: what the model writes after the first marker and nobody needs to see.
      always: the answer begins with reasoning even if neither it nor the prompt says so.
      calls_end: a tool call ends it too.
      signs: strings of which the model's chat template has all of at least one group, if it was written for this format.
    """

    name: str
    starts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    label: str = ""
    always: bool = False
    calls_end: bool = False
    signs: tuple[tuple[str, ...], ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        """All that must be seen, although it may be a special token."""
        return self.starts + self.ends


_THINK: tuple[tuple[str, ...], tuple[str, ...]] = (("<think>",), ("</think>",))

# In the order in which templates are compared with them: the more special first.
REASONING_FORMATS: tuple[ReasoningFormat, ...] = (
    ReasoningFormat(name="gpt-oss", signs=(("<|channel|>", "<|message|>", "analysis"),)),
    ReasoningFormat(
        name="gemma", starts=("<|channel>",), ends=("<channel|>",), label="thought\n", calls_end=True, signs=(("<|channel>", "<channel|>"),)
    ),
    ReasoningFormat(name="mistral", starts=("[THINK]",), ends=("[/THINK]",), signs=(("[THINK]", "[/THINK]"),)),
    ReasoningFormat(
        name="granite",
        starts=("Here is my thought process:", "Here's my thought process:"),
        ends=("Here is my response:", "Here's my response:"),
        signs=(("my thought process",),),
    ),
    ReasoningFormat(name="glm45", starts=_THINK[0], ends=_THINK[1], calls_end=True, signs=(("</think>", "[gMASK]"),)),
    ReasoningFormat(name="deepseek_r1", starts=_THINK[0], ends=_THINK[1], always=True, signs=(("</think>", "<｜Assistant｜>"),)),
    ReasoningFormat(name="qwen3", starts=_THINK[0], ends=_THINK[1], calls_end=True, signs=(("</think>",),)),
)


def choose_reasoning_format(name: str, template: str | None) -> ReasoningFormat | None:
    """The format of this name; with "auto" the one that the model's chat template was written for, None if it does not tell."""
    if name == "auto":
        return next(
            (each for each in REASONING_FORMATS if any(all(sign in (template or "") for sign in group) for group in each.signs)), None
        )
    name = "gpt-oss" if name == "openai_gptoss" else name
    return None if name == "none" else next(each for each in REASONING_FORMATS if each.name == name)


def prompt_is_inside(form: ReasoningFormat, prompt: str, continued: str | None) -> bool | None:
    """Whether a prompt ends within reasoning; None if it ends with neither of the markers.

    Args:
      prompt: its end will do.
      continued: the assistant's last message, if the answer continues it.
    """
    if continued is not None:
        begun, ended = (max((continued.rfind(marker) for marker in markers), default=-1) for markers in (form.starts, form.ends))
        return begun > ended if max(begun, ended) >= 0 else False
    text = prompt.rstrip()
    if any(text.endswith((marker, marker + form.label.rstrip())) for marker in form.starts):
        return True
    return False if any(text.endswith(marker) for marker in form.ends) else None


class ReasoningReader:
    """Takes the reasoning out of an answer.

    Args:
      inside: what `prompt_is_inside` says of the prompt.
      call_starts: markers with which a tool call begins.
    """

    def __init__(self, form: ReasoningFormat, parts: Parts, *, inside: bool | None, call_starts: tuple[str, ...]) -> None:
        self._parts = parts
        self._starts = Markers(form.starts)
        self._own_ends = frozenset(form.ends)
        self._ends = Markers(form.ends + (call_starts if form.calls_end else ()))
        self._label = form.label
        self._inside_unmarked = form.always if inside is None else inside
        self._state = "after" if inside is False else "before"
        self._pending = ""

    def push(self, text: str) -> str:
        """Take the next text; returns what of it is certain to be no reasoning."""
        if self._state == "after":
            return text
        text = self._pending + text
        self._pending = ""
        if self._state == "before":
            text = self._enter(text)
        if self._state == "label":
            text = self._skip_label(text)
        return self._read(text) if self._state == "inside" else text

    def finish(self) -> str:
        """The text has ended; returns held text that is no reasoning."""
        text, self._pending = self._pending, ""
        if self._state == "after" or (self._state == "before" and not self._inside_unmarked):
            return text
        self._parts.reasoning(text)
        return ""

    def _enter(self, text: str) -> str:
        bare = text.lstrip()
        found = self._starts.at_start(bare) if bare else ""
        if found == "":
            self._pending = text
            return ""
        if found is None:
            self._state = "inside" if self._inside_unmarked else "after"
            return text
        self._state = "label" if self._label else "inside"
        return bare[len(found) :]

    def _skip_label(self, text: str) -> str:
        if len(text) < len(self._label) and self._label.startswith(text):
            self._pending = text
            return ""
        self._state = "inside"
        return text.removeprefix(self._label)

    def _read(self, text: str) -> str:
        found = self._ends.find(text)
        if found is None:
            certain = len(text) - self._ends.held(text)
            self._parts.reasoning(text[:certain])
            self._pending = text[certain:]
            return ""
        self._parts.reasoning(text[: found.start()])
        self._state = "after"
        return text[found.end() :] if found.group() in self._own_ends else text[found.start() :]
