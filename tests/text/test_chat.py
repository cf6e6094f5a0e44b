from __future__ import annotations

from typing import Any

import pytest

from jaxserve.errors import ConfigError, UserError
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
TOOLS = (
    "{%- macro show(content) -%}\n{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for item in content -%}{{ item.text }}{%- endfor -%}{%- endif -%}\n"
    "{%- endmacro -%}\n{%- set ns = namespace(last=-1) %}\n"
    "{%- if tools %}\n    {{- '<tools>' }}\n    "
    "{%- for tool in tools %}\n        {{- '\\n' ~ (tool | tojson(indent=2)) }}\n    {%- endfor %}\n{%- endif %}\n"
    "{%- for message in messages %}\n    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}\n    {{- message.role + ': ' }}"
    "{% generation %}{{ show(message.content) }}{% endgeneration %}\n    {%- if message.tool_calls is defined %}\n"
    "        {%- for call in message.tool_calls %}{{ '<call>' ~ call.function.name ~ (call.function.arguments | tojson) }}"
    "{% continue %}{% endfor %}\n"
    "    {%- endif %}\n    {{- '\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}assistant: "
    "{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}{{ ns.last }}"
)
PARTS_ONLY = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %};{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "gemma": GEMMA, "tools": TOOLS}

TOOL = {"type": "function", "function": {"name": "weather", "description": "<b> é", "parameters": {"type": "object", "properties": {}}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}],
}


def say(*texts: str, first: str = "user") -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * len(texts)
    if first == "system":
        roles = ["system", *roles]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


CONVERSATIONS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    (say("Hi"), {}),
    (say("  Hi <b>there</b> \n"), {}),
    (say("a", "b", "c"), {}),
    (say("Be brief.", "a", "b", "c", first="system"), {}),
    (say("a", "b"), {"add_generation_prompt": False}),
    (say("a", "The answer is "), {"add_generation_prompt": False, "continue_final_message": True}),
    (say("a", "b\n\n  "), {"add_generation_prompt": False, "continue_final_message": True}),
    (say("a"), {"tools": [TOOL]}),
    ([*say("a"), CALL], {"tools": [TOOL], "add_generation_prompt": False}),
    (say("a", "b", "b", first="system")[1:], {}),
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_renderings_equal_those_of_transformers(name: str, bpe: Tokenizer) -> None:
    from transformers.utils import chat_template_utils

    reference: Any = chat_template_utils
    template = ChatTemplate(TEMPLATES[name], bpe)
    for messages, options in CONVERSATIONS:
        options = {"add_generation_prompt": True, **options}
        try:
            expected, _ = reference.render_jinja_template([messages], chat_template=TEMPLATES[name], **options, **bpe.special_tokens)
        except Exception:
            with pytest.raises(UserError):
                template.render(messages, **options)
        else:
            assert template.render(messages, **options) == expected[0]


def test_variables_of_the_template_reach_it(bpe: Tokenizer) -> None:
    template = ChatTemplate(TOOLS, bpe)
    assert "<think></think>" in template.render(say("a"), kwargs={"enable_thinking": False, "unheard_of": 1})
    assert "<think></think>" not in template.render(say("a"))
    assert ChatTemplate("{{ documents[0].text }}", bpe).render(say("a"), kwargs={"documents": [{"text": "d"}]}) == "d"


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token", "chat_template", "tokenize"])
def test_variables_that_are_not_the_callers_are_refused(bpe: Tokenizer, name: str) -> None:
    with pytest.raises(UserError, match=name) as raised:
        ChatTemplate(CHATML, bpe).render(say("a"), kwargs={name: "x"})
    assert raised.value.field == "chat_template_kwargs"


def test_list_content_is_joined_for_templates_that_read_text(bpe: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "one\ntwo<|im_end|>" in ChatTemplate(CHATML, bpe).render([{"role": "user", "content": parts}])


def test_list_content_is_passed_on_to_templates_that_read_lists(bpe: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "user: onetwo\n" in ChatTemplate(TOOLS, bpe).render([{"role": "user", "content": parts}])
    assert ChatTemplate(PARTS_ONLY, bpe).render([{"role": "user", "content": parts}]) == "user:onetwo;"


def test_text_content_becomes_a_list_for_templates_that_read_only_lists(bpe: Tokenizer) -> None:
    assert ChatTemplate(PARTS_ONLY, bpe).render(say("s", "Hi", first="system")) == "system:s;user:Hi;"
    continued = ChatTemplate(PARTS_ONLY, bpe).render(say("a", "b "), add_generation_prompt=False, continue_final_message=True)
    assert continued == "user:a;assistant:b "


def test_parts_that_are_not_text_are_refused(bpe: Tokenizer) -> None:
    with pytest.raises(UserError, match="parts of type 'text'"):
        ChatTemplate(CHATML, bpe).render([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


def test_reasoning_reaches_the_template_under_each_name(bpe: Tokenizer) -> None:
    template = ChatTemplate("{{ messages[-1].reasoning_content }}|{{ messages[-1].thinking }}", bpe)
    for name in ("reasoning", "thinking", "reasoning_content"):
        assert template.render([{"role": "assistant", "content": "x", name: "hm"}]) == "hm|hm"


SILENT = "{% for m in messages if m.role in ('system', 'user') %}{{ m.role }}:{{ m.content }};{% endfor %}"
ARGUMENTS_AS_TEXT = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ '(' + c.function.arguments + ')' }}{% endfor %}{% endfor %}"
NO_CONTENT = "{% for m in messages %}{% if m.content is none %}{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}{% endfor %}"


def test_developer_speaks_as_system_where_the_template_does_not_know_the_role(bpe: Tokenizer) -> None:
    messages = [{"role": "developer", "content": "d"}, {"role": "user", "content": "u"}]
    assert ChatTemplate(SILENT, bpe).render(messages) == "system:d;user:u;"
    knows = SILENT.replace("('system', ", "('developer', 'system', ")
    assert ChatTemplate(knows, bpe).render(messages) == "developer:d;user:u;"
    assert ChatTemplate(SILENT.replace(" if m.role in ('system', 'user')", ""), bpe).render(messages) == "system:d;user:u;"


@pytest.mark.parametrize("content", [None, ""])
def test_calls_reach_each_template_as_it_reads_them(bpe: Tokenizer, content: str | None) -> None:
    call = {**CALL, "content": content}
    assert ChatTemplate(ARGUMENTS_AS_TEXT, bpe).render([*say("a"), call]) == '({"city": "Zürich"})'
    assert ChatTemplate(NO_CONTENT, bpe).render([*say("a"), call]) == '{"city": "Zürich"}'
    assert ChatTemplate("{{ messages[1].content }}", bpe).render([*say("a"), {**call, "content": "x"}]) == "x"


def test_messages_of_the_caller_are_not_changed(bpe: Tokenizer) -> None:
    messages = [*say("a"), {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
    before = repr(messages)
    for source in (CHATML, TOOLS, PARTS_ONLY):
        ChatTemplate(source, bpe).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert repr(messages) == before


def test_continuing_needs_text_that_the_template_shows(bpe: Tokenizer) -> None:
    with pytest.raises(UserError, match="exclude each other"):
        ChatTemplate(CHATML, bpe).render(say("a", "b"), continue_final_message=True)
    for messages in ([], [{"role": "assistant", "content": None}]):
        with pytest.raises(UserError, match="text to continue"):
            ChatTemplate(CHATML, bpe).render(messages, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(UserError, match="does not show"):
        ChatTemplate("{{ messages[0].content }}", bpe).render(say("a", "b"), add_generation_prompt=False, continue_final_message=True)


def test_refusal_of_the_template_is_told_and_bounded(bpe: Tokenizer) -> None:
    with pytest.raises(UserError, match="System role not supported"):
        ChatTemplate(GEMMA, bpe).render(say("s", "u", first="system"))
    with pytest.raises(UserError) as raised:
        ChatTemplate("{{ raise_exception(messages[0].content) }}", bpe).render(say("\x00\x1b[31m" + "x" * 100_000))
    assert raised.value.field == "messages"
    assert len(raised.value.message) < 500
    assert "\x1b" not in raised.value.message


@pytest.mark.parametrize(
    "source", ["{{ messages[0].content.nothing.at_all }}", "{{ messages[0].content + 1 }}", "{{ messages[9]['x']['y'] }}", "{{ 1 // 0 }}"]
)
def test_failures_of_the_template_are_user_errors_without_details(bpe: Tokenizer, source: str) -> None:
    with pytest.raises(UserError, match=r"cannot render these messages \(\w+\)$"):
        ChatTemplate(source, bpe).render(say("secret"))


def test_endless_templates_are_user_errors(bpe: Tokenizer) -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="too much time"):
        ChatTemplate(source, bpe, max_seconds=0.05).render(say("a"))
    with pytest.raises(UserError, match="more than 100 characters"):
        ChatTemplate("{{ messages[0].content }}", bpe, max_chars=100).render(say("x" * 101))


def test_invalid_template_is_a_config_error(bpe: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="not valid Jinja"):
        ChatTemplate("{% if %}", bpe)


def test_default_template_writes_speakers_and_paragraphs(bpe: Tokenizer) -> None:
    template = ChatTemplate(None, bpe)
    assert template.render(say("Be brief.", "Hi", first="system")) == "System: Be brief.\n\nUser: Hi\n\nAssistant:"
    roles = [
        {"role": "developer", "content": "d"},
        *say("u"),
        CALL,
        {"role": "tool", "content": "sunny", "name": "weather"},
        {"role": "function", "content": "f"},
    ]
    assert template.render(roles) == (
        'System: d\n\nUser: u\n\nAssistant:\n{"name": "weather", "arguments": {"city": "Zürich"}}'
        "\n\nTool (weather): sunny\n\nTool: f\n\nAssistant:"
    )
    assert template.render(say("u", "It is "), add_generation_prompt=False, continue_final_message=True) == "User: u\n\nAssistant: It is "
    assert template.render(say("u"), tools=[{"name": "<w>"}]).startswith(
        'System: These tools are available, one on each line:\n{"name": "<w>"}\n\nUser: u'
    )


def test_default_template_begins_as_the_tokenizer_does(spm: Tokenizer) -> None:
    text = ChatTemplate(None, spm).render(say("Hi"))
    assert text == "<s>User: Hi\n\nAssistant:"
    assert spm.encode(text, add_special_tokens=False).count(1) == 1


def test_defaults_of_variables_hold_until_a_request_says_otherwise(bpe: Tokenizer) -> None:
    template = ChatTemplate("{{ messages[0].content }} {{ enable_thinking }}", bpe, defaults={"enable_thinking": False, "unread": 1})
    assert (template.render(say("q")), template.render(say("q"), kwargs={"enable_thinking": True})) == ("q False", "q True")
