from __future__ import annotations

import time

import jinja2
import pytest

from jaxserve.errors import ConfigError
from jaxserve.text.sandbox import Program, TemplateLimit, TemplateRefusal

LIMITS = {"max_chars": 10_000, "max_seconds": 0.2}
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "output": "{% for a in range(99999) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}",
    "repeated string": "{{ 'x' * 1000000000 }}",
    "number before string": "{{ 1000000000 * 'x' }}",
    "repeated list": "{{ ([1] * 1000000000) | length }}",
    "doubling with +": "{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling with ~": "{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling with a block": "{% set n = namespace(x='x') %}"
    "{% for a in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "doubling with a macro": "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='x') %}"
    "{% for a in range(60) %}{% set n.x = d(n.x) %}{% endfor %}",
    "doubling with replace": "{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = n.x.replace('x', 'xx') %}{% endfor %}",
    "doubling with a filter": "{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = n.x | replace('x', 'xx') %}{% endfor %}",
    "center filter": "{{ 'x' | center(1000000000) }}",
    "center method": "{{ 'x'.center(1000000000) }}",
    "format": "{{ '%1000000000d' % 1 }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "format by argument": "{{ '{:{}}'.format(1, 1000000000) }}",
    "indent": "{{ {'a': 1} | tojson(indent=1000000000) }}",
    "power": "{{ 9 ** 999999999 }}",
    "squares": "{% set n = namespace(x=9) %}{% for a in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "time format": "{{ strftime_now('%1000000000Y') }}",
    "large range": "{% for a in range(1000000000) %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(80) }}",
}
FORBIDDEN = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ lipsum.__globals__ }}",
    "{{ dict.__base__ }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception.__globals__ }}",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_soon_with_an_error(name: str) -> None:
    started_s = time.thread_time()
    program = Program(HOSTILE[name], **LIMITS)
    with pytest.raises((jinja2.TemplateError, OverflowError, RecursionError)):
        program.render({})
    assert time.thread_time() - started_s < 1


@pytest.mark.parametrize("source", FORBIDDEN)
def test_templates_reach_nothing_outside(source: str) -> None:
    try:
        shown = Program(source, **LIMITS).render({"messages": []})
    except (jinja2.TemplateError, TypeError):
        shown = ""
    assert shown == ""


def test_harmless_templates_are_not_limited() -> None:
    source = (
        "{% set n = namespace(total=0) %}{% for a in range(300) %}{% set n.total = n.total + a %}{% if a == 299 %}{% break %}{% endif %}"
        "{% endfor %}{{ n.total }} {{ 'x' * 3 ~ '-' * 2 }} {{ '%s=%5d' % ('a', 7) }} {{ 'x' | center(3) }} {{ 2 ** 10 }} {{ dict(a=1).a }}"
    )
    assert Program(source, **LIMITS).render({}) == "44850 xxx-- a=    7  x  1024 1"


def test_json_is_written_as_models_were_trained_on() -> None:
    program = Program("{{ v | tojson }} {{ v | tojson(indent=1, sort_keys=true) }}", **LIMITS)
    assert program.render({"v": {"b": "<é>", "a": 1}}) == '{"b": "<é>", "a": 1} {\n "a": 1,\n "b": "<é>"\n}'


def test_generation_blocks_are_written_as_they_are() -> None:
    assert Program("{% generation %}a{{ x }}{% endgeneration %}b", **LIMITS).render({"x": 1}) == "a1b"


def test_white_space_of_blocks_is_trimmed() -> None:
    assert Program("  {% if true %}\n  x\n  {% endif %}\ny", **LIMITS).render({}) == "  x\ny"


def test_refusals_carry_the_message_of_the_template() -> None:
    with pytest.raises(TemplateRefusal, match="only users"):
        Program("{{ raise_exception('only users') }}", **LIMITS).render({})


def test_clock_starts_anew_with_each_rendering() -> None:
    program = Program("{% for a in range(n) %}{% for b in range(1000) %}{% endfor %}{% endfor %}", max_chars=100, max_seconds=0.2)
    with pytest.raises(TemplateLimit, match="time"):
        program.render({"n": 99_999})
    assert program.render({"n": 1}) == ""


def test_variables_that_the_template_reads_are_known() -> None:
    assert Program("{% set a = b %}{{ a }}{{ messages[0] }}{% if enable_thinking %}{% endif %}", **LIMITS).variables == {
        "b",
        "messages",
        "enable_thinking",
    }


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% for a in b %}", "{% unknown %}", "{{ x | nofilter }}"])
def test_invalid_jinja_is_refused_when_compiled(source: str) -> None:
    with pytest.raises(ConfigError, match="not valid Jinja"):
        Program(source, **LIMITS)
