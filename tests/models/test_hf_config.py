"""The read-tracking view of config.json."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.models.hf_config import HfConfig

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def test_get_gives_the_value_in_the_type_of_the_default() -> None:
    config = HfConfig({"a": 3, "b": 4.0, "c": True, "d": "x", "e": None, "f": [1]})
    assert [config.get("a", 1), config.get("b", 1), config.get("c", False), config.get("d", ""), config.get("e", 7)] == [3, 4, True, "x", 7]
    assert isinstance(config.get("a", 1.0), float)
    assert isinstance(config.get("b", 1), int)
    assert config.get("f") == [1]
    assert config.get("g", 2.5) == 2.5
    assert config.get("g") is None


@pytest.mark.parametrize(
    ("value", "default"), [("3", 1), (10**400, 1.0), (True, 1), (1.5, 1), ([1], 1.0), (1, False), (1, "x"), (float("nan"), 1)]
)
def test_get_refuses_a_value_of_another_type_by_name(value: Any, default: Any) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: size="):
        HfConfig({"size": value}).get("size", default)


@pytest.mark.parametrize("values", [{}, {"size": None}, {"size": 0}, {"size": -3}, {"size": "3"}, {"size": False}])
def test_require_refuses_what_is_absent_or_no_positive_number(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="size"):
        HfConfig(values).require("size", int)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"architectures": ["AForCausalLM", "B"], "model_type": "b"}, "AForCausalLM"),
        ({"architectures": [], "model_type": "llama"}, "LlamaForCausalLM"),
        ({"model_type": "novel"}, "novel"),
    ],
)
def test_architecture_is_the_first_named_else_by_model_type(values: dict[str, Any], expected: str) -> None:
    assert HfConfig(values).architecture == expected


@pytest.mark.parametrize("values", [{}, {"architectures": "A"}, {"architectures": [3]}, {"model_type": 3}])
def test_architecture_is_refused_when_it_is_not_said(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        _ = HfConfig(values).architecture


def test_unread_keys_are_reported_unless_harmless_null_or_default() -> None:
    values = {
        "hidden_size": 5, "torch_dtype": "bfloat16", "_name_or_path": "x", "pretraining_tp": 1, "rope_interleaved": True, "novel": False,
        "unset": None, "known": 3, "other": 4,
    }  # fmt: skip
    config = HfConfig(values)
    config.require("hidden_size", int)
    assert config.unread({"known": 3, "other": 5}) == {"rope_interleaved": True, "novel": False, "other": 4}
    assert HfConfig({"pretraining_tp": 2}).unread() == {"pretraining_tp": 2}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"rope_type": "default"}),
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, {"rope_type": "linear", "rope_theta": 5e5, "factor": 2}),
        ({"rope_scaling": {"type": "x", "rope_type": "llama3", "factor": 8.0}}, {"rope_type": "llama3", "factor": 8.0}),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, {"rope_type": "default", "rope_theta": 1e6}),
        ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 1e6, "factor": None}}, {"rope_type": "default", "rope_theta": 1e6}),
    ],
)
def test_rope_parameters_are_alike_from_old_and_new_files(values: dict[str, Any], expected: dict[str, Any]) -> None:
    config = HfConfig(values)
    assert dict(config.rope_parameters()) == expected
    assert config.unread() == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_theta": "1e4"}, "rope_theta='1e4'"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0"),
        ({"rope_theta": 10**400}, "rope_theta=1000000"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' is not an object"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor=True"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_type=3"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention"),
    ],
)
def test_rope_parameters_are_refused_by_key_and_value_when_ill_typed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        HfConfig(values).rope_parameters()
    assert message in str(caught.value)


def test_rope_parameter_that_is_needed_and_missing_is_the_fault_of_the_config() -> None:
    rope = HfConfig({"rope_scaling": {"rope_type": "linear"}}).rope_parameters()
    assert rope.get("factor", 3) == 3
    with pytest.raises(ConfigError, match="rope_type='linear' needs factor"):
        rope["factor"]


def test_rope_parameter_that_nobody_read_is_reported() -> None:
    config = HfConfig({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25, "novel": 1}})
    config.rope_parameters().get("rope_type")
    assert config.unread() == {"rope_parameters.partial_rotary_factor": 0.25, "rope_parameters.novel": 1}


@given(st.dictionaries(st.sampled_from(["architectures", "model_type", "size", "rope_theta", "rope_scaling", "rope_parameters"]), JSON))
def test_any_json_is_read_or_refused(values: dict[str, Any]) -> None:
    config = HfConfig(values)
    for read in (
        lambda: config.architecture, lambda: config.require("size", int), lambda: config.require("size", float),
        lambda: config.get("size", 1), lambda: dict(config.rope_parameters()),
    ):  # fmt: skip
        try:
            read()
        except ConfigError as error:
            assert str(error)
    config.unread({"size": 1})
