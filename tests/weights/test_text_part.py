"""Checkpoints of models that see images too: their language model is what is served."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from jaxserve.models.families import find_family
from jaxserve.weights.checkpoint import open_checkpoint, read_config
from jaxserve.weights.text_part import text_values
from tests.models.moe_variants import MOE_VARIANTS
from tests.models.paged import PagedModel, assert_same
from tests.models.variants import VARIANTS, Variant

MODELS = {
    "Gemma3ForConditionalGeneration": VARIANTS["gemma3"],
    "Mistral3ForConditionalGeneration": VARIANTS["mistral, window"],
    "Llama4ForConditionalGeneration": MOE_VARIANTS["llama4"],
}


def inside(name: str, *, outermost: bool) -> str:
    """The name of a tensor in the whole model: in checkpoints before transformers 4.52, and since."""
    if outermost:
        return f"language_model.{name}"
    return name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)


@pytest.mark.parametrize("outermost", [True, False])
@pytest.mark.parametrize("architecture", MODELS)
def test_language_model_is_loaded_alone(
    architecture: str, outermost: bool, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    variant: Variant = MODELS[architecture]
    text = json.loads((variant.path / "config.json").read_text())
    whole: dict[str, Any] = {
        "architectures": [architecture], "text_config": {**text, "architectures": None}, "vision_config": {"hidden_size": 8},
        "image_token_index": 3, "eos_token_id": [1, 106],
    }  # fmt: skip
    tied = text.get("tie_word_embeddings", False)
    tensors = {
        inside(name, outermost=outermost): tensor.clone()
        for name, tensor in variant.reference.state_dict().items()
        if not (tied and name.startswith("lm_head"))
    }
    prefix = "" if outermost else "model."
    tensors |= {f"{prefix}vision_tower.x.weight": torch.ones(2), f"{prefix}multi_modal_projector.linear_1.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert_same(*(PagedModel(path, scan=False) for path in (tmp_path, variant.path)))
    assert read_config(tmp_path).values["eos_token_id"] in ([1, 106], text.get("eos_token_id"))
    with open_checkpoint(tmp_path) as checkpoint:
        assert not any("vision" in name or "projector" in name for name in checkpoint.tensors)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_file_named_alone_gives_the_language_model_too(name: str, tmp_path: pathlib.Path) -> None:
    tensors = {"language_model.model.norm.weight": torch.ones(3), "vision_tower.x.weight": torch.ones(2)}
    (torch.save if name.endswith(".bin") else save_file)(tensors, tmp_path / name)
    with open_checkpoint(tmp_path / name) as checkpoint:
        assert set(checkpoint.tensors) == {"model.norm.weight"}


def test_published_gemma_leaves_out_what_its_class_says() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    values = text_values({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "eos_token_id": [1, 106]})
    config = pathlib.Path("config.json")
    assert values["architectures"] == ["Gemma3ForCausalLM"], config
    assert (values["num_attention_heads"], values["head_dim"], values["vocab_size"], values["eos_token_id"]) == (8, 256, 262208, [1, 106])


def test_config_of_a_language_model_stays_as_it_is() -> None:
    values = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}
    assert text_values(values) is values
    assert find_family(read_config(VARIANTS["llama, gqa"].path)).architectures == ("LlamaForCausalLM",)
