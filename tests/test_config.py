"""The configuration: flags, TOML and their precedence."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from jaxserve.command_line import parse_args
from jaxserve.config import EngineConfig, make_config, read_toml
from jaxserve.errors import ConfigError

PRESETS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_preset_loads_and_changes_something(preset: pathlib.Path) -> None:
    assert parse_args(["--config", str(preset)]) != EngineConfig()


def test_command_line_wins_over_toml_over_default(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[server]\nport = 1\nhost = 'h'\n")
    config = parse_args(["--config", str(path), "--port", "2"])
    assert (config.server.port, config.server.host, config.server.log_level) == (2, "h", "info")


def test_every_field_has_help_and_a_flag() -> None:
    help_text = subprocess.run(
        [sys.executable, "-c", "from jaxserve.command_line import parse_args; parse_args(['--help'])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for section in dataclasses.fields(EngineConfig):
        for field in dataclasses.fields(getattr(EngineConfig(), section.name)):
            assert field.metadata["help"], field.name
            assert "--" + field.name.replace("_", "-") in help_text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[server]\nprot = 1", "prot"),
        ("[sever]\nport = 1", "sever"),
        ("[server]\nport = 'x'", "port='x'"),
        ("[cache]\nprefix_cache = 1", "prefix_cache=1"),
        ("[model]\ndtype = 'float8'", "dtype='float8'"),
        ("[compile]\ndecode_rows = [1, 'a']", "decode_rows"),
        ("x = ", "cannot read"),
    ],
)
def test_wrong_toml_is_refused_by_name(tmp_path: pathlib.Path, text: str, named: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        read_toml(path)


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"page_size": 0, "port": 70000, "memory_utilization": 2.0})
    assert all(name in str(caught.value) for name in ("page-size", "port", "memory-utilization"))


def test_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="max_len"):
        make_config({"max_lenn": 3})


def test_lists_come_from_commas() -> None:
    config = parse_args(["--decode-rows", "1,4", "--api-key", "a,b", "--no-prefix-cache"])
    assert (config.compile.decode_rows, config.server.api_key, config.cache.prefix_cache) == ((1, 4), ("a", "b"), False)


def test_keys_come_from_the_environment_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSERVE_API_KEY", "secret")
    assert parse_args([]).api_keys == ("secret",)
    assert parse_args(["--api-key", "other"]).api_keys == ("other",)
    monkeypatch.delenv("JAXSERVE_API_KEY")
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    assert parse_args([]).api_keys == ("theirs",)


def test_mesh_comes_from_one_option_or_from_vllms() -> None:
    assert parse_args(["--mesh", "data=2,tensor=4"]).parallel.axes == {"data": 2, "tensor": 4}
    assert parse_args(["--tensor-parallel-size", "4", "--data-parallel-size", "2"]).parallel.axes == {"data": 2, "tensor": 4}
    assert parse_args([]).parallel.axes == {}


@pytest.mark.parametrize(
    "options",
    [
        {"ssl_keyfile": "k"}, {"ssl_ca_certs": "c"}, {"root_path": "llm"},
        {"mesh": "tensor=4", "tensor_parallel_size": 4}, {"mesh": "pipe=2"}, {"mesh": "tensor"}, {"mesh": "tensor=2,tensor=2"},
        {"mesh": "tensor=0"}, {"mesh": ""}, {"coordinator": "h:1"}, {"coordinator": "h:1", "num_processes": 2, "process_id": 2},
        {"num_processes": 2}, {"coordinator": "host", "num_processes": 2, "process_id": 0},
    ],
)  # fmt: skip
def test_meshes_groups_and_servers_that_cannot_be_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        make_config(options)
