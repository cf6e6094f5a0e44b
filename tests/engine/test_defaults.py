"""Sampling defaults: the model's file, another one, none, and what outranks them; whatever cannot be is refused at start."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.config import ModelConfig
from jaxserve.engine.defaults import read_generation, sampling_defaults
from jaxserve.errors import ConfigError
from tests.tiny import tiny_model

OWN = {"temperature": 0.6, "top_k": 20, "eos_token_id": 3, "do_sample": True, "max_new_tokens": 50, "top_p": None}


def defaults_of(**options: Any) -> dict[str, Any]:
    config = ModelConfig(**options)
    return sampling_defaults(config, read_generation(config, OWN))


def test_model_decides_unless_told_otherwise() -> None:
    assert defaults_of() == {"temperature": 0.6, "top_k": 20, "max_tokens": 50}
    assert defaults_of(generation_config="vllm") == {}
    assert defaults_of(override_generation_config='{"top_k": 5, "top_p": 0.5}') == {
        "temperature": 0.6, "top_k": 5, "top_p": 0.5, "max_tokens": 50,
    }  # fmt: skip
    assert defaults_of(generation_config="vllm", override_generation_config='{"min_p": 0.1}') == {"min_p": 0.1}


def test_file_of_another_directory_replaces_the_models_own(tmp_path: pathlib.Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.2, "eos_token_id": 7}')
    for path in (tmp_path, tmp_path / "generation_config.json"):
        config = ModelConfig(generation_config=str(path))
        assert read_generation(config, OWN)["eos_token_id"] == 7
        assert sampling_defaults(config, read_generation(config, OWN)) == {"repetition_penalty": 1.2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_config": "/nowhere"}, "cannot read"), ({"override_generation_config": "{"}, "is not JSON"),
        ({"override_generation_config": "[]"}, "not a JSON object"), ({"override_generation_config": '{"top_q": 1}'}, "top_q"),
        ({"override_generation_config": '{"top_p": 3}'}, "top_p=3"),
        ({"override_generation_config": '{"temperature": "hot"}'}, "temperature"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_at_start(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        defaults_of(**options)


def test_offline_answers_use_them_where_no_parameters_are_given(tmp_path: pathlib.Path) -> None:
    directory = shutil.copytree(tiny_model(), tmp_path / "model")
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "max_new_tokens": 5, "eos_token_id": 0}))
    llm = LLM(str(directory), max_rows=2, max_step_tokens=16, decode_rows=(2,), prefill_tokens=(16,), cache_bytes=1 << 20)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=5)
    plain = llm.generate("the fox", SamplingParams(temperature=0.0, max_tokens=5), use_tqdm=False)[0]
    assert llm.generate("the fox", use_tqdm=False)[0].outputs == plain.outputs
