"""What a checkpoint is served for, by its files and by what is asked for."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from jaxserve.config import make_config
from jaxserve.engine.task import choose_family
from jaxserve.errors import ConfigError
from jaxserve.models.hf_config import HfConfig

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 99,
}  # fmt: skip
BERT = {**SIZES, "type_vocab_size": 2, "max_position_embeddings": 64}


def choose(
    tmp_path: pathlib.Path, values: dict[str, Any], *, modules: bool = False, **options: Any
) -> tuple[str | None, int | None, str | None]:
    """Task, width and way of pooling."""
    if modules:
        (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Transformer", "path": ""}]))
    config = HfConfig(values)
    family, pooling = choose_family(make_config({"model": "m", **options}), config, tmp_path)
    spec = family.spec(config)
    assert (spec.pool is None) == (pooling is None)
    return (None, None, None) if spec.pool is None or pooling is None else (pooling.task, pooling.width, spec.pool.method)


@pytest.mark.parametrize(
    ("architecture", "options", "wanted"),
    [
        ("LlamaForCausalLM", {}, None),
        ("LlamaForCausalLM", {"runner": "pooling"}, ("embed", 32, "last")),
        ("LlamaForCausalLM", {"convert": "embed"}, ("embed", 32, "last")),
        ("LlamaForCausalLM", {"modules": True}, ("embed", 32, "last")),
        ("LlamaForCausalLM", {"modules": True, "runner": "generate"}, None),
        ("Qwen2Model", {}, ("embed", 32, "last")),
        ("Qwen3ForSequenceClassification", {"id2label": {"0": "SCORE"}}, ("classify", 1, "last")),
        ("MistralForSequenceClassification", {}, ("classify", 2, "last")),
        ("BertModel", {}, ("embed", 32, "cls")),
        ("BertForMaskedLM", {}, ("embed", 32, "cls")),
        ("BertForSequenceClassification", {"id2label": {"0": "a", "1": "b", "2": "c"}}, ("classify", 3, "cls")),
        ("XLMRobertaForSequenceClassification", {"runner": "pooling", "id2label": {"0": "a"}}, ("classify", 1, "cls")),
    ],
)
def test_checkpoint_is_served_for_what_its_files_say(
    architecture: str, options: dict[str, Any], wanted: tuple[str, int, str] | None, tmp_path: pathlib.Path
) -> None:
    known = {"runner", "convert", "modules"}
    sizes = SIZES if wanted is None or wanted[2] == "last" else BERT
    values = {"architectures": [architecture], **sizes, **{key: value for key, value in options.items() if key not in known}}
    found = choose(tmp_path, values, **{key: value for key, value in options.items() if key in known})
    assert found == (wanted or (None, None, None))


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("BertModel", {"runner": "generate"}, "does not write text"),
        ("Qwen3ForSequenceClassification", {"runner": "generate"}, "does not write text"),
        ("LlamaForCausalLM", {"runner": "generate", "convert": "embed"}, "contradict"),
        ("LlamaForCausalLM", {"convert": "classify"}, "has no classifier"),
        ("BertModel", {"convert": "classify"}, "has no classifier"),
        ("Gemma9Model", {}, "not supported"),
    ],
)
def test_what_the_checkpoint_is_not_made_for_is_refused(
    architecture: str, options: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(tmp_path, {"architectures": [architecture], **BERT}, **options)


def test_decoder_that_sees_whole_texts_writes_none(tmp_path: pathlib.Path) -> None:
    values = {"architectures": ["Qwen2ForCausalLM"], **SIZES, "is_causal": False}
    with pytest.raises(ConfigError, match="--runner=pooling"):
        choose(tmp_path, values)
    assert choose(tmp_path, values, runner="pooling") == ("embed", 32, "last")
