"""The sizes of published models with experts: as many parameters as their makers counted, as many of them active."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import pytest

from jaxserve.models.decoder import Decoder
from jaxserve.models.families import find_family
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import MoeSpec
from jaxserve.models.params import split_model
from jaxserve.models.spec import fold_layers

YARN_V3 = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
    "type": "yarn",
}  # fmt: skip
# config.json without what has no effect, parameters in all, and in a token's way, in 10 ** 9, as counted by the makers.
PUBLISHED: dict[str, tuple[float, float, dict[str, Any]]] = {
    "Mixtral-8x7B": (
        46.7, 12.9,
        {
            "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
            "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
            "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32000, "hidden_act": "silu",
            "output_router_logits": False, "router_aux_loss_coef": 0.02,
        },
    ),
    "Qwen1.5-MoE-A2.7B": (
        14.3, 2.7,
        {
            "architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 5632,
            "max_position_embeddings": 8192, "max_window_layers": 21, "moe_intermediate_size": 1408, "norm_topk_prob": False,
            "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
            "rope_theta": 1e6, "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "Qwen3-30B-A3B": (
        30.5, 3.3,
        {
            "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
            "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
            "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
            "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_scaling": None,
            "rope_theta": 1000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 151936,
        },
    ),
    "OLMoE-1B-7B": (
        6.92, 1.3,
        {
            "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "clip_qkv": None, "hidden_size": 2048,
            "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16,
            "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16, "vocab_size": 50304,
        },
    ),
    "gpt-oss-20b": (
        20.9, 3.6,
        {
            "architectures": ["GptOssForCausalLM"], "attention_bias": True, "experts_per_token": 4, "head_dim": 64, "hidden_size": 2880,
            "initial_context_length": 4096, "intermediate_size": 2880, "max_position_embeddings": 131072, "num_attention_heads": 64,
            "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
            "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
            "rope_scaling": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088,
        },
    ),
    "DeepSeek-V2-Lite": (
        15.7, 2.4,
        {
            "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "aux_loss_alpha": 0.001, "first_k_dense_replace": 1,
            "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
            "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
            "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
            "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "rope_scaling": YARN_V3 | {"mscale": 0.707, "mscale_all_dim": 0.707}, "rope_theta": 10000, "routed_scaling_factor": 1.0,
            "scoring_func": "softmax", "seq_aux": True, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
        },
    ),
    "DeepSeek-V3": (
        671, 37,
        {
            "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "ep_size": 1, "first_k_dense_replace": 3,
            "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
            "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
            "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
            "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "rope_scaling": YARN_V3, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
            "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
        },
    ),
    "GLM-4.5-Air": (
        106, 12,
        {
            "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 128,
            "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 131072, "moe_intermediate_size": 1408,
            "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96,
            "num_experts_per_tok": 8, "num_hidden_layers": 46, "num_key_value_heads": 8, "num_nextn_predict_layers": 1,
            "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 1000000, "routed_scaling_factor": 1.0,
            "topk_group": 1, "use_qk_norm": False, "vocab_size": 151552,
        },
    ),
    "granite-3.1-3b-a800m": (
        3.3, 0.8,
        {
            "architectures": ["GraniteMoeForCausalLM"], "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_size": 1536,
            "intermediate_size": 512, "logits_scaling": 6.0, "max_position_embeddings": 131072, "num_attention_heads": 24,
            "num_experts_per_tok": 8, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 40,
            "residual_multiplier": 0.22, "rope_theta": 5000000.0, "tie_word_embeddings": True, "vocab_size": 49155,
        },
    ),
    "Phi-3.5-MoE": (
        41.9, 6.6,
        {
            "architectures": ["PhiMoEForCausalLM"], "attention_bias": True, "hidden_size": 4096, "input_jitter_noise": 0.01,
            "intermediate_size": 6400, "lm_head_bias": True, "max_position_embeddings": 131072, "num_attention_heads": 32,
            "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 16,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {
                "long_factor": [2.0] * 64, "long_mscale": 1.243163121016122, "original_max_position_embeddings": 4096,
                "short_factor": [1.0] * 64, "short_mscale": 1.243163121016122, "type": "longrope",
            },
            "rope_theta": 10000.0, "router_jitter_noise": 0.01, "sliding_window": 131072, "tie_word_embeddings": False,
            "vocab_size": 32064,
        },
    ),
    "dbrx": (
        132, 36,
        {
            "architectures": ["DbrxForCausalLM"], "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
            "d_model": 6144, "emb_pdrop": 0.0, "max_seq_len": 32768, "n_heads": 48, "n_layers": 40, "resid_pdrop": 0.0,
            "ffn_config": {
                "ffn_hidden_size": 10752, "model_type": "", "moe_jitter_eps": 0.01, "moe_loss_weight": 0.05, "moe_num_experts": 16,
                "moe_top_k": 4,
            },
            "vocab_size": 100352,
        },
    ),
    "Llama-4-Scout": (
        108, 17,
        {
            "architectures": ["Llama4ForCausalLM"], "attention_bias": False, "attention_chunk_size": 8192, "attn_scale": 0.1,
            "attn_temperature_tuning": 4, "floor_scale": 8192, "head_dim": 128, "hidden_size": 5120, "interleave_moe_layer_step": 1,
            "intermediate_size": 8192, "intermediate_size_mlp": 16384, "max_position_embeddings": 10485760, "no_rope_layers": [],
            "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8,
            "num_local_experts": 16,
            "rope_scaling": {
                "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "use_qk_norm": True, "vocab_size": 202048,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_has_the_published_number_of_parameters(name: str) -> None:
    in_all, active, values = PUBLISHED[name]
    config = HfConfig(values)
    spec = find_family(config).spec(config)
    assert config.unread() == {}
    groups = fold_layers(spec.layers, scan=True)
    _, shapes = split_model(Decoder(spec, groups, dtype=jnp.dtype("bfloat16")))
    used = 0.0
    for path, leaf in shapes.items():
        share = 1.0
        if ".experts." in path:
            _, g, j, _ = path.split(".", 3)
            moe = groups[int(g)].pattern[int(j)].mlp
            assert isinstance(moe, MoeSpec)
            share = moe.top_k / moe.num_experts
        used += share * math.prod(leaf.shape)
    assert sum(math.prod(leaf.shape) for leaf in shapes.values()) / 1e9 == pytest.approx(in_all, rel=0.01)
    without_lookup = used - math.prod(shapes["embed.weight"].shape)  # some makers count the embedding, of which a token takes one row
    assert 0.93 * without_lookup / 1e9 <= active <= 1.03 * used / 1e9
