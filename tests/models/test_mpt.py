"""MPT with llm-foundry's options, and which of them are refused."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch

from jaxserve.errors import ConfigError
from jaxserve.models.families.alibi import alibi_slopes
from jaxserve.models.families.mpt import mpt_spec
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.spec import DynamicScaling, Llama3Scaling
from tests.models.mpt_reference import mpt_logits, save_mpt
from tests.models.paged import PagedModel

SIZES = {
    "d_model": 48, "n_heads": 6, "n_layers": 2, "vocab_size": 130, "max_seq_len": 64, "expansion_ratio": 2, "no_bias": True,
    "norm_type": "low_precision_layernorm", "learned_pos_emb": False, "use_cache": False,
}  # fmt: skip
ALIBI = {"alibi": True, "alibi_bias_max": 8, "attn_impl": "flash", "attn_pdrop": 0, "prefix_lm": False, "attn_uses_sequence_id": False}
ROPE = {"alibi": False, "rope": True, "rope_theta": 500, "rope_impl": "dail", "rope_dail_config": {"type": "original"}}
GQA = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped, alibi of another range, over the width": {"attn_config": ALIBI | GQA | {"alibi_bias_max": 5, "qk_ln": True}},
    "all biases, multi-query, capped": {
        "no_bias": False, "final_logit_softcapping": 7.0, "logit_scale": "inv_sqrt_d_model", "tie_word_embeddings": False,
        "attn_config": ALIBI | {"attn_type": "multiquery_attention", "kv_n_heads": 1, "attn_logit_softcapping": 5.0, "clip_qkv": 1.5},
    },
    "rope, rms, gated, unfused": {
        "norm_type": "low_precision_rmsnorm", "logit_scale": 0.5, "ffn_config": {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}},
        "attn_config": ROPE | GQA | {"fused_qkv": False, "qk_gn": True, "sliding_window_size": 9},
    },
    "rope of transformers, stretched": {
        "no_bias": False, "expansion_ratio": 1.5,
        "ffn_config": {"ffn_type": "mptmlp", "ffn_act_fn": {"name": "gelu", "approximate": "tanh"}},
        "attn_config": ROPE | {"rope_impl": "hf", "rope_hf_config": {"type": "linear", "factor": 2.0}, "softmax_scale": 0.2},
    },
    "learned positions": {"learned_pos_emb": True, "attn_config": {"alibi": False}, "ffn_config": {"ffn_hidden_size": 80}},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_llm_foundrys_mathematics(name: str, tmp_path: pathlib.Path) -> None:
    config = SIZES | VARIANTS[name]
    prompt = np.random.default_rng(1).integers(0, 130, 37)
    expected = mpt_logits(config, save_mpt(tmp_path, config), torch.tensor(prompt)).numpy()
    model = PagedModel(tmp_path, scan=True)
    for cuts in ([37], [20, 1, 16], [1] * 37):
        assert np.abs(model.logits(prompt, cuts) - expected).max() < 1e-4 * np.abs(expected).max(), f"{cuts=}"


def spec_of(**values: Any) -> Any:
    return mpt_spec(HfConfig({"architectures": ["MPTForCausalLM"]} | SIZES | values))


def test_missing_keys_have_the_defaults_of_the_program_that_wrote_the_config() -> None:
    sizes = {"d_model": 48, "n_heads": 6, "n_layers": 2, "vocab_size": 130}
    for architecture, biased in (("MptForCausalLM", False), ("MPTForCausalLM", True)):
        layer: Any = mpt_spec(HfConfig({"architectures": [architecture], **sizes})).layers[0]
        assert (layer.attention.qkv_bias, layer.norm.bias, layer.attention.alibi_slopes is None) == (biased,) * 3


def test_published_config_of_mpt_7b_is_read_whole() -> None:
    config = HfConfig(
        {
            "architectures": ["MPTForCausalLM"], "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432, "max_seq_len": 2048,
            "expansion_ratio": 4, "no_bias": True, "norm_type": "low_precision_layernorm", "use_cache": False, "verbose": 0,
            "embedding_fraction": 1.0, "emb_pdrop": 0, "resid_pdrop": 0, "init_device": "cpu", "learned_pos_emb": True, "logit_scale": None,
            "init_config": {"name": "kaiming_normal_", "fan_mode": "fan_in"}, "tokenizer_name": "EleutherAI/gpt-neox-20b",
            "torch_dtype": "bfloat16", "model_type": "mpt", "transformers_version": "4.28.1",
            "attn_config": {
                "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0, "attn_type": "multihead_attention",
                "attn_uses_sequence_id": False, "clip_qkv": None, "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
            },
        }
    )  # fmt: skip
    spec: Any = mpt_spec(config)
    assert config.unread() == {}
    assert (spec.width, spec.layers[0].mlp.width, spec.tied, spec.positions) == (4096, 16384, True, None)
    assert spec.layers[0].attention.alibi_slopes == alibi_slopes(32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attn_config": {"prefix_lm": True}}, "prefix_lm"),
        ({"attn_config": {"alibi": True, "rope": True}}, "alibi"),
        ({"attn_config": {"qk_ln": True, "qk_gn": True}}, "qk_gn"),
        ({"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 4}}, "kv_n_heads=4"),
        ({"attn_config": {"attn_type": "multiquery_attention", "kv_n_heads": 2}}, "contradicts"),
        ({"attn_config": {"rope": True, "rope_dail_config": {"type": "xpos"}}}, "xpos"),
        ({"ffn_config": {"ffn_type": "mb_dmoe"}}, "mb_dmoe"),
        ({"ffn_config": {"ffn_act_fn": {"name": "selu"}}}, "selu"),
        ({"norm_type": "batchnorm"}, "batchnorm"),
        ({"logit_scale": "half"}, "half"),
        ({"expansion_ratio": 1.01}, "expansion_ratio"),
        ({"n_heads": 5}, "n_heads=5"),
        ({"attn_config": 3}, "attn_config"),
    ],
)
def test_option_that_is_not_understood_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(**values)


@pytest.mark.parametrize(("given", "window"), [(-1, None), (0, 1), (512, 513)])
def test_window_counts_the_tokens_before_a_querys_own(given: int, window: int | None) -> None:
    """It becomes flash-attention's window_size, whose bounds are inclusive."""
    assert spec_of(attn_config={"sliding_window_size": given}).layers[0].attention.window == window


@pytest.mark.parametrize(
    ("given", "scaling"),
    [
        ({"type": "no_scaling", "factor": 1.0}, None),
        ({"type": "dynamic", "factor": 3.0}, DynamicScaling(factor=3.0, original_len=64, max_len=64)),
        (
            {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
            Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_len=32),
        ),
    ],
)
def test_rotation_of_transformers_is_stretched_as_the_config_says(given: dict[str, Any], scaling: object) -> None:
    config = HfConfig({"architectures": ["MPTForCausalLM"]} | SIZES | {"attn_config": ROPE | {"rope_impl": "hf", "rope_hf_config": given}})
    rope: Any = mpt_spec(config).layers[0].attention.rope
    assert rope.scaling == scaling
    assert config.unread() == {}


def test_option_that_nobody_reads_is_reported_with_its_place() -> None:
    config = HfConfig({"architectures": ["MPTForCausalLM"]} | SIZES | {"attn_config": {"novel": 1}, "block_overrides": {"order": []}})
    mpt_spec(config)
    assert config.unread() == {"attn_config.novel": 1, "block_overrides": {"order": []}}


@pytest.mark.parametrize("num_heads", [1, 6, 8, 71])
def test_slopes_fall_by_head_and_are_those_of_the_next_power_of_two(num_heads: int) -> None:
    slopes = alibi_slopes(num_heads)
    assert len(set(slopes)) == len(slopes) == num_heads
    assert all(0 < slope < 1 for slope in slopes)
    if num_heads == 8:
        assert slopes == tuple(2.0**-i for i in range(1, 9))
