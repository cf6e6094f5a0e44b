"""Reasoning: what the markers, the prompt and the format say of it, also beside tool calls."""

from __future__ import annotations

import pytest

from jaxserve.text.reasoning import REASONING_FORMATS, choose_reasoning_format, prompt_is_inside
from tests.text.test_split import BY_NAME, THINKING, split

CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
NOW = [("now", "{}", None)]
# Format, what the prompt says, the answer, its reasoning, its content.
CASES: list[tuple[str, bool | None, str, str, str]] = [
    ("qwen3", None, "<think>\nhm\n</think>\n\nYes.", "\nhm\n", "\n\nYes."),
    ("qwen3", None, "\n <think>hm</think>", "hm", ""),
    ("qwen3", None, "Yes. <think>no</think>", "", "Yes. <think>no</think>"),
    ("qwen3", True, "hm</think>Yes.", "hm", "Yes."),
    ("qwen3", True, "<think>hm</think>Yes.", "hm", "Yes."),
    ("qwen3", True, "cut off </thi", "cut off </thi", ""),
    ("qwen3", False, "<think>Yes.", "", "<think>Yes."),
    ("qwen3", None, "<thi", "", "<thi"),
    ("deepseek_r1", None, "hm\n</think>\nYes.", "hm\n", "\nYes."),
    ("deepseek_r1", None, "<think>hm</think>Yes.", "hm", "Yes."),
    ("deepseek_r1", None, "never ends", "never ends", ""),
    ("deepseek_r1", False, "Yes.", "", "Yes."),
    ("glm45", None, "\n<think>hm</think>\nYes.", "hm", "\nYes."),
    ("mistral", None, "[THINK]hm[/THINK]Yes.", "hm", "Yes."),
    ("granite", None, "Here is my thought process: hm Here is my response: Yes.", " hm ", " Yes."),
    ("granite", None, "Here's my thought process:hm. Here's my response:Yes.", "hm. ", "Yes."),
    ("granite", None, "Here is my answer.", "", "Here is my answer."),
    ("gemma", None, "<|channel>thought\nhm\n<channel|>Yes.", "hm\n", "Yes."),
    ("gemma", None, "<|channel>hm<channel|>Yes.", "hm", "Yes."),
    ("gemma", True, "hm<channel|>Yes.", "hm", "Yes."),
    ("gpt-oss", None, "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>", "hm", "Yes."),
    ("gpt-oss", None, "<|channel|>analysis to=browser.search code<|message|>{}<|call|>", "{}", ""),
    ("gpt-oss", None, "<|channel|>commentary to=functions.f<|message|>{}<|call|>", "", "{}"),
    ("gpt-oss", None, "<|channel|>analysis<|message|>cut of", "cut of", ""),
]


def test_every_format_of_the_table_has_cases() -> None:
    assert {case[0] for case in CASES} == {form.name for form in REASONING_FORMATS}


@pytest.mark.parametrize(("form", "inside", "text", "reasoning", "content"), CASES)
def test_reasoning_is_told_from_content_wherever_the_text_is_cut(
    form: str, inside: bool | None, text: str, reasoning: str, content: str
) -> None:
    thinking = THINKING[form]
    assert split([text], None, thinking, inside=inside) == (content, reasoning, [])
    for place in range(len(text) + 1):
        assert split([text[:place], text[place:]], None, thinking, inside=inside) == (content, reasoning, [])
    assert split(text, None, thinking, inside=inside) == (content, reasoning, [])


@pytest.mark.parametrize("form", [form for form in REASONING_FORMATS if form.starts], ids=lambda form: form.name)
def test_calls_come_after_reasoning(form: object) -> None:
    thinking = next(each for each in REASONING_FORMATS if each is form)
    text = f"{thinking.starts[0]}{thinking.label}I could say {CALL[:5]}.{thinking.ends[0]}\n\n{CALL}\n"
    for pieces in ([text], list(text)):
        assert split(pieces, BY_NAME["hermes"], thinking) == ("", f"I could say {CALL[:5]}.", NOW)


@pytest.mark.parametrize(("name", "calls"), [("qwen3", NOW), ("glm45", NOW), ("gemma", NOW), ("deepseek_r1", []), ("mistral", [])])
def test_call_ends_reasoning_only_where_models_forget_the_end(name: str, calls: object) -> None:
    text = THINKING[name].starts[0] + "hm " + CALL
    for pieces in ([text], list(text)):
        content, reasoning, found = split(pieces, BY_NAME["hermes"], THINKING[name])
        assert (content, found) == ("", calls)
        assert reasoning == ("hm " if calls else "hm " + CALL)


def test_channels_hold_reasoning_preamble_and_calls() -> None:
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"a": "<|x"}<|call|>'
    )
    expected = ("Wait.", "hm", [("now", '{"a": "<|x"}', None)])
    for place in range(len(text)):
        assert split([text[:place], text[place:]], BY_NAME["openai"], THINKING["gpt-oss"]) == expected


@pytest.mark.parametrize(
    ("prompt", "continued", "inside"),
    [
        ("<|im_start|>assistant\n", None, None), ("assistant\n<think>\n", None, True), ("<think>\n\n</think>\n\n", None, False),
        ("x", "<think>so far", True), ("x", "<think>so</think> far", False), ("x<think>", "so far", False),
    ],
)  # fmt: skip
def test_prompt_tells_whether_it_ends_in_reasoning(prompt: str, continued: str | None, inside: bool | None) -> None:
    assert prompt_is_inside(THINKING["qwen3"], prompt, continued) is inside


def test_label_in_the_prompt_counts() -> None:
    assert prompt_is_inside(THINKING["gemma"], "model\n<|channel>thought\n", None) is True
    assert prompt_is_inside(THINKING["gemma"], "model\n<|channel>thought\n<channel|>", None) is False


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<think>' }} content.split('</think>')", "qwen3"), ("'<｜Assistant｜>' '</think>'", "deepseek_r1"),
        ("'[gMASK]' '<think></think>'", "glm45"), ("[THINK] [/THINK]", "mistral"), ("<|channel>thought <channel|>", "gemma"),
        ("<|channel|>analysis<|message|>", "gpt-oss"), ("Here is my thought process:", "granite"), ("plain", None), (None, None),
    ],
)  # fmt: skip
def test_format_is_chosen_by_the_template(template: str | None, name: str | None) -> None:
    found = choose_reasoning_format("auto", template)
    assert (found.name if found else None) == name


def test_format_is_chosen_by_name() -> None:
    assert choose_reasoning_format("none", "<think></think>") is None
    assert choose_reasoning_format("mistral", "<think></think>") is THINKING["mistral"]
    assert choose_reasoning_format("openai_gptoss", None) is THINKING["gpt-oss"]
