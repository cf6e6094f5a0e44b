"""The command line: vLLM's launch scripts start jaxserve, or learn by name what to change."""

from __future__ import annotations

import argparse
import pathlib
import shlex
from typing import Any

import pytest

from jaxserve.command_line import make_parser, parse_args
from jaxserve.config import make_config
from jaxserve.errors import ConfigError
from jaxserve.vllm_options import FOREIGN, RENAMED

LAUNCH = """
org/model --host h --port 1 -tp 4 --gpu-memory-utilization 0.8 --max-model-len 8k --max-num-seqs 16 --max-num-batched-tokens 4K
--no-enable-prefix-caching --trust-remote-code --dtype bfloat16 --seed 3 --swap-space 4 --disable-log-requests --enforce-eager
--uvicorn-log-level warning --enable-auto-tool-choice --tool-call-parser hermes --chat-template-content-format auto
--limit-mm-per-prompt '{"image": 2}' --root-path /llm --served-model-name a b --api-key k1 k2 --allowed-origins '["*"]'
--pipeline-parallel-size 1 --block-size 32 --kv-cache-dtype auto --distributed-executor-backend mp --load-format auto
"""


def test_launch_script_of_vllm_means_the_same() -> None:
    config = parse_args(shlex.split(LAUNCH))
    assert (config.model.model, config.model.max_len, config.model.seed, config.model.dtype) == ("org/model", 8000, 3, "bfloat16")
    assert (config.schedule.max_rows, config.schedule.max_step_tokens) == (16, 4096)
    assert (config.cache.prefix_cache, config.cache.memory_utilization, config.cache.page_size) == (False, 0.8, 32)
    assert (config.parallel.axes, config.server.log_level, config.server.root_path) == ({"tensor": 4}, "warning", "/llm")
    assert (config.served_names, config.api_keys, config.server.cors_origins) == (("a", "b"), ("k1", "k2"), ("*",))


def test_model_may_stand_anywhere() -> None:
    assert [parse_args(argv).model.model for argv in (["m", "--port", "1"], ["--port", "1", "m"], ["--model", "m"])] == ["m"] * 3


def test_what_cannot_be_had_is_refused_by_name_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(["m", "--quantization", "awq", "-pp", "2", "--enable-lora", "--enforce-eager"])
    assert [line.split()[0] for line in str(caught.value).splitlines()] == [
        "--pipeline-parallel-size=2",
        "--enable-lora",
        "--quantization=awq",
    ]


def test_library_takes_the_arguments_of_vllm() -> None:
    config = make_config(
        {
            "model": "m", "tensor_parallel_size": 1, "max_model_len": 64, "seed": None, "gpu_memory_utilization": 0.5,
            "enforce_eager": True, "trust_remote_code": True, "quantization": None, "enable_lora": False,
            "served_model_name": "a", "swap_space": 4,
            "override_generation_config": {"temperature": 0.5}, "hf_overrides": {}, "disable_log_stats": True,
        }
    )  # fmt: skip
    assert (config.model.max_len, config.cache.memory_utilization, config.served_names) == (64, 0.5, ("a",))
    assert config.model.override_generation_config == '{"temperature": 0.5}'


@pytest.mark.parametrize("values", [{"max_len": 3, "max_model_len": 3}, {"quantization": "awq"}, {"speculative_config": {"model": "x"}}])
def test_library_refuses_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(values)).replace("_", "[-_]")):
        make_config(values)


@pytest.mark.parametrize(("text", "value"), [("12", 12), ("1.5k", 1500), ("2M", 2 << 20)])
def test_counts_may_have_a_unit(text: str, value: int) -> None:
    assert parse_args(["--cache-bytes", text]).cache.cache_bytes == value


def test_what_is_no_count_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--max-len", "many"])
    assert "--max-len/--max-model-len: 'many' is not an integer" in capsys.readouterr().err


def test_names_of_vllm_are_known_once_and_lead_to_options() -> None:
    flags = [flag for action in make_parser("p", "")._actions for flag in action.option_strings]
    assert len(flags) == len(set(flags))
    assert {"--" + name.replace("_", "-") for name in (*FOREIGN, *RENAMED)} <= set(flags)
    assert not set(FOREIGN) & set(RENAMED)


@pytest.fixture
def options_page() -> str:
    return (pathlib.Path(__file__).parent.parent / "docs" / "options.md").read_text("utf-8")


def documented(action: argparse.Action) -> str:
    names = ", ".join(f"`{flag}`" for flag in action.option_strings)
    return f"| {names} | {(action.help or '').replace('%%', '%').replace('|', chr(92) + '|')} |"


def test_every_option_is_on_the_page(options_page: str) -> None:
    shown = [documented(action) for action in make_parser("p", "")._actions if action.option_strings and action.help != argparse.SUPPRESS]
    assert [line for line in shown if line not in options_page.splitlines()] == []


def test_every_option_of_vllm_is_on_the_page(options_page: str) -> None:
    lines = [
        f"| `--{name.replace('_', '-')}` | {'any' if option.allowed is None else ', '.join(option.allowed) or 'none'} | {option.says} |"
        for name, option in FOREIGN.items()
    ]
    assert [line for line in lines if line not in options_page.splitlines()] == []
