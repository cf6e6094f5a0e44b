"""A Jinja environment for chat templates, which are programs that come with model files.

Configured as in transformers, so that templates render the same. Beyond the sandbox of Jinja (no attributes that begin with an underscore,
no changes to the caller's objects, `range` of at most 100,000), it bounds what a template costs:

* time: loops, macros and calls count, and give up after `max_seconds` of the thread's processor time;
* size: the text written, and every string or list made by an operator, a filter, a call or a block, has at most `max_chars` characters or
  items.

What remains: one operation on strings within the limits, such as a `replace` that lengthens, may for a moment use memory in proportion to
the product of their sizes, and cannot be interrupted. Templates are read when a model is loaded, never from a request.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jinja2
from jinja2 import ext, meta, nodes, sandbox, visitor

from jaxserve.errors import ConfigError

_CHECK_EVERY = 64  # a power of two: steps between two looks at the clock
_MAX_INT_BITS = 1 << 14
_MAX_JSON_INDENT = 64
# Widths and precisions of format strings, of a million and more or taken from an argument.
_WIDE_FORMAT = re.compile(r"\d{7}|%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{")


class TemplateRefusal(jinja2.TemplateError):
    """The template called raise_exception: it does not take these messages."""


class TemplateLimit(jinja2.TemplateRuntimeError):
    """Rendering takes too much time or space."""


class Program:
    """A compiled template and the names of the variables that it reads."""

    def __init__(self, source: str, *, max_chars: int, max_seconds: float) -> None:
        """Compile a template.

        Raises: ConfigError if it is not valid Jinja.
        """
        self._environment = _Environment(max_chars=max_chars)
        self._max_chars = max_chars
        self._max_seconds = max_seconds
        try:
            tree = self._environment.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(tree))
            code = self._environment.compile(_Metering().visit(tree))
        except (jinja2.TemplateError, RecursionError) as error:
            raise ConfigError(f"the chat template is not valid Jinja: {error}") from None
        names: dict[str, Any] = cast("Any", self._environment).globals
        self._template = jinja2.Template.from_code(self._environment, code, names)

    def render(self, variables: Mapping[str, Any], *, max_seconds: float | None = None) -> str:
        """The text that the template writes.

        Args:
          max_seconds: another limit than that of the program.
        Raises: whatever the template's operations raise; TemplateRefusal and TemplateLimit, both of them jinja2.TemplateError.
        """
        parts: list[str] = []
        num_chars = 0
        self._environment.start_clock(self._max_seconds if max_seconds is None else max_seconds)
        for part in self._template.generate(variables):
            num_chars += len(part)
            if num_chars > self._max_chars:
                raise TemplateLimit(f"more than {self._max_chars} characters")
            self._environment.tick()
            parts.append(part)
        return "".join(parts)


class _Generation(ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's words for training; here its body is simply written."""

    tags = {"generation"}  # noqa: RUF012 - declared so by Jinja

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with a clock per thread and a limit on sizes."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, *, max_chars: int) -> None:
        # Not optimized: the optimizer runs filters on constants while compiling, outside of any limit.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[ext.loopcontrols, _Generation])
        self._max_chars = max_chars
        self._clock = threading.local()
        names: dict[str, Any] = cast("Any", self).globals
        del names["lipsum"]
        names.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_make_dict)
        known: dict[str, Any] = cast("Any", self).filters
        own = {name: self._with_bounds(known[name]) for name in ("center", "indent", "wordwrap", "format")}
        known.update(own, tojson=_tojson, bounded=self._bound_filtered)

    def start_clock(self, max_seconds: float) -> None:
        """Give this thread's rendering that much processor time from now on."""
        self._clock.steps = 0
        self._clock.end_s = time.thread_time() + max_seconds

    def _with_bounds(self, filtered: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(filtered)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                self._bound_width(value)
                if filtered.__name__ == "do_format":
                    _checked_format(value)
            return filtered(*args, **kwargs)

        return bounded

    @jinja2.pass_context
    def _bound_filtered(self, _context: object, value: Any) -> Any:
        # It takes the context so that Jinja does not run it, and what is inside, on constants while compiling.
        return self.bound(value)

    def tick(self) -> str:
        """Count a step of this thread's rendering."""
        self._clock.steps += 1
        if not self._clock.steps % _CHECK_EVERY and time.thread_time() > self._clock.end_s:
            raise TemplateLimit("too much time")
        return ""

    def bound(self, value: Any) -> Any:
        """The value, if it is not too large."""
        if _size(value) > self._max_chars:
            raise TemplateLimit(f"a value of more than {self._max_chars} characters or items")
        return value

    def join_values(self, *values: Any) -> str:
        """What the operator ~ makes."""
        texts = [str(value) for value in values]
        if sum(map(len, texts)) > self._max_chars:
            raise TemplateLimit(f"a value of more than {self._max_chars} characters")
        return "".join(texts)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            for value in (*args, *kwargs.values()):
                __self._bound_width(value)
        return __self.bound(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The safe form of the method `format` of a string, if the value is that."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _checked_format(value.__self__)
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        match operator, left, right:
            case "%", str(), _:
                _checked_format(left)
            case "*", str() | list() | tuple(), int():
                self._bound_width(_size(left) * right)
            case "*", int(), str() | list() | tuple():
                self._bound_width(left * _size(right))
            case "*" | "**", int(), int() if left.bit_length() * (right if operator == "**" else 1) + right.bit_length() > _MAX_INT_BITS:
                raise TemplateLimit("a number of too many digits")
            case _:
                pass
        return self.bound(super().call_binop(context, operator, left, right))

    def _bound_width(self, value: Any) -> Any:
        if isinstance(value, int) and value > self._max_chars:
            raise TemplateLimit(f"a width of more than {self._max_chars}")
        return value


class _Metering(visitor.NodeTransformer):
    """Writes into a template's tree the calls that count its steps and bound its values."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _tick_statement(node))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _tick_statement(node))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("join_values"), node.nodes, [], None, None, lineno=node.lineno)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, "bounded", [], [], None, None, lineno=node.lineno)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        if node.filter is None:
            node.filter = nodes.Filter(None, "bounded", [], [], None, None, lineno=node.lineno)
        return node


def _size(value: Any) -> int:
    return len(cast("Sequence[object]", value)) if isinstance(value, str | list | tuple) else 0


def _tick_statement(node: nodes.Node) -> nodes.Node:
    call = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None, lineno=node.lineno)
    return nodes.ExprStmt(call, lineno=node.lineno)


def _raise_exception(message: object) -> None:
    raise TemplateRefusal(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 256 or re.search(r"%[-_0^#]*\d", form):
        raise TemplateLimit("a time format that is too long")
    return datetime.datetime.now().strftime(form)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    # A function in place of the class, whose attributes are not for templates.
    return dict(*args, **kwargs)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes HTML, which models have not been trained on.
    if isinstance(indent, int) and indent > _MAX_JSON_INDENT:
        raise TemplateLimit(f"an indentation of more than {_MAX_JSON_INDENT}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _checked_format(form: Any) -> Any:
    if isinstance(form, str) and _WIDE_FORMAT.search(form):
        raise TemplateLimit("a format that is too wide")
    return form
