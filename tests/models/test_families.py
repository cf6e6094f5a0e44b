"""The registry of families, those that transformers has no code of, and the sizes of published models."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
import torch
from safetensors.torch import save_file

from jaxserve.errors import ConfigError
from jaxserve.models.decoder import Decoder
from jaxserve.models.families import FAMILIES, find_family
from jaxserve.models.hf_config import MODEL_TYPES, HfConfig
from jaxserve.models.params import split_model
from jaxserve.models.spec import fold_layers
from tests.models.paged import PagedModel, assert_same
from tests.models.variants import VARIANTS, Variant

Tensors = dict[str, torch.Tensor]


def test_unknown_architecture_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"NovelForCausalLM.*LlamaForCausalLM.*MptForCausalLM"):
        find_family(HfConfig({"architectures": ["NovelForCausalLM"]}))


def test_llama_by_another_name_is_taken_for_one_with_a_warning(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    variant = VARIANTS["llama, mqa, biases, wide heads"]
    config = json.loads((variant.path / "config.json").read_text()) | {"architectures": ["LookalikeForCausalLM"], "model_type": "lookalike"}
    save_file({name: tensor.clone() for name, tensor in variant.reference.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(*(PagedModel(path, scan=False) for path in (tmp_path, variant.path)))
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "LookalikeForCausalLM is not known and taken for a Llama" in warning


@pytest.mark.parametrize("given", [{"gate_temperature": 2.0}, {"rope_parameters": {"rope_type": "new"}}, {"rms_norm_eps": None}])
def test_unknown_architecture_that_says_more_than_a_llama_is_refused(given: dict[str, Any]) -> None:
    config = json.loads((VARIANTS["llama, gqa"].path / "config.json").read_text()) | {"architectures": ["OtherForCausalLM"]} | given
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(
        ConfigError, match=r"OtherForCausalLM.*is no Llama by another name.*(gate_temperature|new|rms_norm_eps).*there are Llama"
    ):
        find_family(HfConfig(config))


def test_every_architecture_has_one_family_and_every_family_a_model_type() -> None:
    architectures = [name for family in FAMILIES for name in family.architectures]
    assert len(set(architectures)) == len(architectures)
    assert {id(find_family(HfConfig({"model_type": name}))) for name in MODEL_TYPES} == {id(family) for family in FAMILIES}


def internlm2(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Llama's tensors as InternLM 2 keeps them: queries, keys and values KV head by KV head."""
    names = {
        "self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
        "embed_tokens": "tok_embeddings", "lm_head": "output",
    }  # fmt: skip
    result = {renamed(name, names): tensor for name, tensor in tensors.items() if "_attn." not in name or "o_proj" in name}
    for i in range(config["num_hidden_layers"]):
        q, k, v = (tensors[f"model.layers.{i}.self_attn.{part}_proj.weight"] for part in "qkv")
        by_head = torch.cat([q.view(2, 2, 12, 48), k.view(2, 1, 12, 48), v.view(2, 1, 12, 48)], dim=1)
        result[f"model.layers.{i}.attention.wqkv.weight"] = by_head.reshape(-1, 48)
    return result, config | {"architectures": ["InternLM2ForCausalLM"], "bias": False, "attn_implementation": "eager"}


def internlm3(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Llama with biases under other keys."""
    kept = {key: value for key, value in config.items() if key not in ("attention_bias", "mlp_bias")}
    return tensors, kept | {"architectures": ["InternLM3ForCausalLM"], "qkv_bias": True, "bias": True}


def exaone(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Llama's tensors and keys as EXAONE 3 has them."""
    names = {
        "self_attn": "attn.attention", "o_proj": "out_proj", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
        "mlp.gate_proj": "mlp.c_fc_0", "mlp.up_proj": "mlp.c_fc_1", "mlp.down_proj": "mlp.c_proj", "model.layers": "transformer.h",
        "model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f",
    }  # fmt: skip
    keys = {"num_hidden_layers": "num_layers", "hidden_act": "activation_function", "rms_norm_eps": "layer_norm_epsilon"}
    kept = {keys.get(key, key): value for key, value in config.items() if key not in ("attention_bias", "mlp_bias")}
    return {renamed(name, names): tensor for name, tensor in tensors.items()}, kept | {"architectures": ["ExaoneForCausalLM"]}


def minicpm(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Granite's multipliers as MiniCPM derives them."""
    multipliers = {key: config.pop(key) for key in list(config) if key.endswith(("_multiplier", "_scaling"))}
    return tensors, config | {
        "architectures": ["MiniCPMForCausalLM"], "scale_emb": multipliers["embedding_multiplier"],
        "scale_depth": multipliers["residual_multiplier"] * math.sqrt(3), "dim_model_base": 48 / multipliers["logits_scaling"],
    }  # fmt: skip


def renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


GRANITE = Variant(
    "GraniteConfig",
    {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.3, "attention_multiplier": 1 / math.sqrt(12)},
)


@pytest.mark.parametrize(
    ("convert", "variant"),
    [
        (internlm2, VARIANTS["llama, gqa"]),
        (internlm3, VARIANTS["llama, mqa, biases, wide heads"]),
        (exaone, VARIANTS["llama, gqa"]),
        (minicpm, GRANITE),
    ],
    ids=["internlm2", "internlm3", "exaone", "minicpm"],
)
def test_relative_under_other_names_gives_the_same_spec_and_parameters(
    convert: Callable[..., Any], variant: Variant, tmp_path: pathlib.Path
) -> None:
    config = json.loads((variant.path / "config.json").read_text())
    tensors, config = convert({name: tensor.clone() for name, tensor in variant.reference.state_dict().items()}, config)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(*(PagedModel(path, scan=False) for path in (tmp_path, variant.path)))


# Published configurations and how many parameters their makers counted.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "gpt2": (124_439_808, {"architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257}),
    "mpt-7b": (
        6_649_286_656,
        {
            "architectures": ["MPTForCausalLM"], "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432, "no_bias": True,
            "attn_config": {"alibi": True},
        },
    ),
    "opt-125m": (
        125_239_296,
        {
            "architectures": ["OPTForCausalLM"], "hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "ffn_dim": 3072,
            "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": 768,
        },
    ),
    "bloom-560m": (
        559_214_592,
        {"architectures": ["BloomForCausalLM"], "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "vocab_size": 250880},
    ),
    "pythia-70m": (
        70_426_624,
        {
            "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 6,
            "intermediate_size": 2048, "vocab_size": 50304, "tie_word_embeddings": False,
        },
    ),
    "falcon-7b": (
        6_921_720_704,
        {
            "architectures": ["FalconForCausalLM"], "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32,
            "vocab_size": 65024,
        },
    ),
    "phi-2": (
        2_779_683_840,
        {
            "architectures": ["PhiForCausalLM"], "hidden_size": 2560, "num_attention_heads": 32, "num_hidden_layers": 32,
            "intermediate_size": 10240, "vocab_size": 51200, "partial_rotary_factor": 0.4,
        },
    ),
    "Mistral-7B": (
        7_241_732_096,
        {
            "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
            "num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 32000, "sliding_window": 4096,
        },
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2,
            "num_hidden_layers": 24, "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
        },
    ),
    "gemma-2-2b": (
        2_614_341_888,
        {
            "architectures": ["Gemma2ForCausalLM"], "hidden_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 256, "num_hidden_layers": 26, "intermediate_size": 9216, "vocab_size": 256000,
        },
    ),
    "gemma-3-1b": (
        999_885_952,
        {
            "architectures": ["Gemma3ForCausalLM"], "hidden_size": 1152, "num_attention_heads": 4, "num_key_value_heads": 1,
            "head_dim": 256, "num_hidden_layers": 26, "intermediate_size": 6912, "vocab_size": 262144, "rope_local_base_freq": 10000,
            "sliding_window_pattern": 6,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_has_the_published_number_of_parameters(name: str) -> None:
    count, values = PUBLISHED[name]
    config = HfConfig(values)
    spec = find_family(config).spec(config)
    assert config.unread() == {}
    _, shapes = split_model(Decoder(spec, fold_layers(spec.layers, scan=True), dtype=jnp.dtype("bfloat16")))
    assert sum(math.prod(leaf.shape) for leaf in shapes.values()) == count
