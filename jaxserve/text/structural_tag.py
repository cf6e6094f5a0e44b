"""Structural tags as a Lark grammar: free text in which some parts have a form, such as the arguments of a tool call.

Both shapes of the tag are read: {"format": {...}}, and the older {"structures": [...], "triggers": [...]}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

_TEXT = r"/(.|\n)*/"


class StructuralTagError(ValueError):
    """A structural tag that is not understood; says where."""


def structural_tag_grammar(tag: Mapping[str, Any], *, special: Mapping[str, int], json_options: Mapping[str, Any]) -> list[dict[str, str]]:
    """The grammars that a structural tag stands for, the first is the whole.

    Args:
      special: text -> id of the special tokens, which stand in a literal for themselves.
      json_options: how JSON is written inside the tag, as llguidance's "x-guidance" takes it.
    Raises: StructuralTagError.
    """
    writer = _Writer(special, json_options)
    if "format" in tag:
        start = writer.write(_object(tag["format"], "format"), "format")
    elif "structures" in tag:
        start = writer.write(_modern(tag), "structural_tag")
    else:
        raise StructuralTagError('a structural tag has a "format", or "structures" and "triggers"')
    whole = "\n".join([f"start: {start}", f"TEXT: {_TEXT}", *writer.rules])
    return [{"name": "structural_tag", "lark_grammar": whole}, *writer.grammars]


def _modern(tag: Mapping[str, Any]) -> dict[str, Any]:
    """The older shape as a format of the newer one."""
    tags: list[dict[str, Any]] = []
    for i, item in enumerate(_list(tag, "structures", "structural_tag")):
        structure = _object(item, f"structures[{i}]")
        content = {"type": "json_schema", "json_schema": structure.get("schema", {})}
        tags.append({"type": "tag", "begin": structure.get("begin"), "content": content, "end": structure.get("end", "")})
    return {"type": "triggered_tags", "triggers": _list(tag, "triggers", "structural_tag"), "tags": tags}


class _Writer:
    """Collects rules while formats become expressions of Lark."""

    def __init__(self, special: Mapping[str, int], json_options: Mapping[str, Any]) -> None:
        self.rules: list[str] = []
        self.grammars: list[dict[str, str]] = []
        self._special = special
        self._json_options = dict(json_options)
        words = sorted(special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, words)) + ")" if words else r"(\b\B)")

    def write(self, form: Mapping[str, Any], path: str) -> str:
        """The expression of a format."""
        kind = form.get("type")
        match kind:
            case "const_string":
                return self._literal(_text(form, "value", path))
            case "json_schema":
                return self._json(form.get("json_schema"), path)
            case "regex":
                return self._rule(f"/{_escape(_text(form, 'pattern', path))}/", terminal=True)
            case "grammar":
                self.grammars.append({"name": f"grammar_{len(self.grammars)}", "lark_grammar": _text(form, "grammar", path)})
                return f"@{self.grammars[-1]['name']}"
            case "any_text":
                return "TEXT"
            case "sequence" | "or":
                parts = [self.write(_object(item, path), f"{path}.elements[{i}]") for i, item in enumerate(_list(form, "elements", path))]
                return self._group(parts, " " if kind == "sequence" else " | ")
            case "tag":
                return self._tag(form, path)
            case "triggered_tags":
                return self._triggered(form, path)
            case "tags_with_separator":
                return self._separated(form, path)
            case _:
                raise StructuralTagError(f"{path}.type is {kind!r:.60}, which is not supported")

    def _tag(self, form: Mapping[str, Any], path: str, *, without: str = "") -> str:
        """A tag; `without` is the beginning of it that stands elsewhere."""
        begin = _text(form, "begin", path).removeprefix(without)
        content = _object(form.get("content"), f"{path}.content")
        end: object = form.get("end", "")
        ends = [end] if isinstance(end, str) else end
        if not is_list(ends) or not ends or not all(isinstance(end, str) for end in ends):
            raise StructuralTagError(f"{path}.end must be a string, or a list of strings")
        if content.get("type") == "any_text" and all(ends):
            # The first end that comes up is the end, so it must not count as text.
            closing = [self._until(end) for end in ends]
            return self._group([self._literal(begin), self._group(closing, " | ")], " ")
        return self._group([self._literal(begin), self.write(content, f"{path}.content"), self._one_of(ends)], " ")

    def _triggered(self, form: Mapping[str, Any], path: str) -> str:
        triggers = _list(form, "triggers", path)
        tags: dict[str, list[str]] = {}
        for i, item in enumerate(_list(form, "tags", path)):
            tag, where = _object(item, f"{path}.tags[{i}]"), f"{path}.tags[{i}]"
            begin = _text(tag, "begin", where)
            trigger = next((text for text in triggers if isinstance(text, str) and text and begin.startswith(text)), None)
            if trigger is None:
                raise StructuralTagError(f"{where}.begin is {begin!r:.60}, which starts with none of the triggers")
            tags.setdefault(trigger, []).append(self._tag(tag, where, without=trigger))
        one = self._group([f"{self._until(trigger)} {self._group(bodies, ' | ')}" for trigger, bodies in tags.items()], " | ")
        if form.get("stop_after_first"):
            return one if form.get("at_least_one") else f"({one} | TEXT)"
        return f"({one}){'+' if form.get('at_least_one') else '*'} TEXT"

    def _separated(self, form: Mapping[str, Any], path: str) -> str:
        tags = [self._tag(_object(item, f"{path}.tags[{i}]"), f"{path}.tags[{i}]") for i, item in enumerate(_list(form, "tags", path))]
        one = self._rule(" | ".join(tags))
        many = one if form.get("stop_after_first") else f"{one} ({self._literal(_text(form, 'separator', path))} {one})*"
        return many if form.get("at_least_one") else f"({many})?"

    def _until(self, end: str) -> str:
        """Text up to and with the first `end`."""
        lazy = "" if self._split.search(end) else "[lazy]"  # special tokens are no text anyway
        return self._rule(f"TEXT {self._literal(end)}", attributes=lazy)

    def _one_of(self, texts: list[str]) -> str:
        return self._group([self._literal(text) or '""' for text in texts], " | ") if any(texts) else ""

    def _literal(self, text: str) -> str:
        pieces = [
            f"<[{self._special[piece]}]>" if piece in self._special else json.dumps(piece, ensure_ascii=False)
            for piece in self._split.split(text) if piece
        ]  # fmt: skip
        return " ".join(pieces)

    def _json(self, schema: Any, path: str) -> str:
        if schema is True:
            schema = {}
        if not is_mapping(schema):
            raise StructuralTagError(f"{path}.json_schema must be a JSON schema")
        return f"%json {json.dumps({'x-guidance': self._json_options, **schema})}"

    def _rule(self, body: str, *, terminal: bool = False, attributes: str = "") -> str:
        name = f"{'X' if terminal else 'x'}_{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {body}")
        return name

    def _group(self, parts: list[str], between: str) -> str:
        """One expression of several, as a rule of its own."""
        parts = [part for part in parts if part] or ['""']
        return self._rule(between.join(parts))


def _escape(pattern: str) -> str:
    """A regex as it stands between slashes."""
    return re.sub(r"\\.|/|\n", lambda found: {"/": r"\/", "\n": r"\n"}.get(found[0], found[0]), pattern, flags=re.DOTALL)


def is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value that was JSON is an object."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether a value that was JSON is an array."""
    return isinstance(value, list)


def _object(value: Any, path: str) -> Mapping[str, Any]:
    if not is_mapping(value):
        raise StructuralTagError(f"{path} must be an object")
    return value


def _list(form: Mapping[str, Any], name: str, path: str) -> list[Any]:
    value = form.get(name)
    if not is_list(value) or not value:
        raise StructuralTagError(f"{path}.{name} must be an array of at least one item")
    return value


def _text(form: Mapping[str, Any], name: str, path: str) -> str:
    value = form.get(name)
    if not isinstance(value, str):
        raise StructuralTagError(f"{path}.{name} must be a string")
    return value
