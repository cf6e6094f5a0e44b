"""Tiny models with experts, as rows of a table like the one of variants.py."""

from __future__ import annotations

from tests.models.variants import LLAMA3, LONGROPE, YARN, Variant

LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 24, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "v_head_dim": 14,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
}  # fmt: skip
V3 = LATENT | {"q_lora_rank": 30, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
MSCALED = YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
SMALL_EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
DBRX_FFN = {"ffn_hidden_size": 40, "moe_num_experts": 5, "moe_top_k": 2}
DBRX = {
    "d_model": 48, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "vocab_size": 130, "ffn_config": DBRX_FFN,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
}  # fmt: skip

MOE_VARIANTS: dict[str, Variant] = {
    "mixtral": Variant("MixtralConfig", EXPERTS),
    "mixtral, window, head size, one expert each": Variant(
        "MixtralConfig", EXPERTS | {"sliding_window": 9, "head_dim": 16, "num_experts_per_tok": 1, "tie_word_embeddings": True}
    ),
    "qwen2_moe": Variant("Qwen2MoeConfig", SMALL_EXPERTS | {"shared_expert_intermediate_size": 28, "norm_topk_prob": True}),
    "qwen2_moe, some layers without experts or with windows": Variant(
        "Qwen2MoeConfig",
        SMALL_EXPERTS
        | {
            "shared_expert_intermediate_size": 28,
            "num_hidden_layers": 5,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 3,
            "qkv_bias": False,
            "rope_parameters": YARN,
        },
    ),
    "qwen3_moe": Variant("Qwen3MoeConfig", SMALL_EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe, window, biases, some layers without experts": Variant(
        "Qwen3MoeConfig",
        SMALL_EXPERTS | {"mlp_only_layers": [1], "attention_bias": True, "use_sliding_window": True, "sliding_window": 9},
    ),
    "olmoe, clipped": Variant("OlmoeConfig", {"num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 0.8, "norm_topk_prob": True}),
    "gpt_oss": Variant(
        "GptOssConfig",
        EXPERTS | {"head_dim": 16, "sliding_window": 9, "num_hidden_layers": 4, "rope_parameters": YARN | {"truncate": False}},
    ),
    "gpt_oss, clamped early, no biases, as many experts as there are": Variant(
        "GptOssConfig",
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "swiglu_limit": 0.3,
            "swiglu_alpha": 0.9,
            "attention_bias": False,
            "layer_types": ["full_attention"] * 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "deepseek_v2, like lite": Variant("DeepseekV2Config", LATENT | {"q_lora_rank": None, "first_k_dense_replace": 1}),
    "deepseek_v2, groups, ranks, yarn": Variant(
        "DeepseekV2Config",
        LATENT
        | {
            "q_lora_rank": 30,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "routed_scaling_factor": 3.0,
            "rope_parameters": MSCALED,
            "attention_bias": True,
        },
    ),
    "deepseek_v3": Variant("DeepseekV3Config", V3),
    "deepseek_v3, all dense": Variant("DeepseekV3Config", V3 | {"first_k_dense_replace": 3, "q_lora_rank": None}),
    "deepseek_v3, yarn, not interleaved, not renormalized": Variant(
        "DeepseekV3Config",
        V3
        | {
            "rope_parameters": MSCALED,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "glm4_moe": Variant(
        "Glm4MoeConfig",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "use_qk_norm": True,
            "attention_bias": True,
            "head_dim": 16,
            "routed_scaling_factor": 1.5,
        },
    ),
    "glm4_moe, groups, no q/k norms": Variant(
        "Glm4MoeConfig",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": False,
        },
    ),
    "granitemoe": Variant(
        "GraniteMoeConfig",
        EXPERTS | {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2},
    ),
    "granitemoe, shared expert, biases": Variant(
        "GraniteMoeSharedConfig", EXPERTS | {"shared_intermediate_size": 28, "attention_bias": True, "tie_word_embeddings": True}
    ),
    "phimoe": Variant("PhimoeConfig", EXPERTS | {"router_jitter_noise": 0.3}),
    "phimoe, longrope, window, biases": Variant(
        "PhimoeConfig",
        EXPERTS
        | {
            "rope_parameters": LONGROPE | {"short_mscale": 1.2, "long_mscale": 1.5, "original_max_position_embeddings": 64},
            "attention_bias": True,
            "lm_head_bias": True,
            "sliding_window": 9,
        },
        max_len=64,
    ),
    "dbrx": Variant("DbrxConfig", DBRX, sizes=False),
    "dbrx, clipped, not renormalized, gelu": Variant(
        "DbrxConfig",
        DBRX
        | {
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 0.7, "rope_theta": 500.0},
            "ffn_config": DBRX_FFN | {"moe_normalize_expert_weights": None, "ffn_act_fn": {"name": "gelu"}},
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        sizes=False,
    ),
    "llama4": Variant(
        "Llama4TextConfig",
        {
            "num_local_experts": 5,
            "intermediate_size_mlp": 40,
            "num_hidden_layers": 4,
            "interleave_moe_layer_step": 2,
            "head_dim": 16,
            "attention_chunk_size": 16,
            "no_rope_layer_interval": 2,
            "floor_scale": 8,
            "attn_scale": 0.5,
        },
    ),
    "llama4, two experts each, biases, no q/k norms, no temperature": Variant(
        "Llama4TextConfig",
        EXPERTS
        | {
            "head_dim": 16,
            "attention_chunk_size": 8,
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "attention_bias": True,
            "rope_parameters": LLAMA3,
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        },
    ),
    "olmoe, biases": Variant("OlmoeConfig", {"num_experts": 6, "num_experts_per_tok": 3, "attention_bias": True}),
}
