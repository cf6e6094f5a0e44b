"""Tiny models of every family, as rows of a table: a configuration of transformers with unusual options on."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

import torch
import transformers

VOCAB = 130
LAYERS = 3
# What most configurations call their sizes; all sizes differ, so that a swapped axis fails.
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
IDS = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model of transformers.

    Args:
      config: the name of its configuration class.
      options: beside SIZES, or all of them if `sizes` is false.
      max_len: longest text that ours is told of.
      attention: transformers' implementation.
    """

    config: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    sizes: bool = True
    max_len: int | None = None
    attention: str = "eager"

    @functools.cached_property
    def reference(self) -> Any:
        """The random model, in float32."""
        torch.manual_seed(0)
        options = (SIZES if self.sizes else {}) | IDS | self.options
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, self.config)(**options), attn_implementation=self.attention
        )
        return shuffled(model)

    @functools.cached_property
    def path(self) -> pathlib.Path:
        """Directory of its checkpoint, in shards."""
        directory = pathlib.Path(tempfile.mkdtemp(prefix="jaxserve-variant-"))
        self.reference.save_pretrained(directory, max_shard_size="60KB")
        return directory


def shuffled(model: Any) -> Any:
    """The model with every parameter random, biases and norms too, whatever its own initialization leaves at 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):  # of a router: learnt, though it is no parameter
                buffer.normal_(std=0.2)
    return model.eval()


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 13.0],
}  # fmt: skip
MPT_SIZES = {"d_model": 48, "n_heads": 6, "n_layers": LAYERS, "vocab_size": VOCAB, "max_seq_len": 64}
GPT_SIZES = {"n_embd": 48, "n_head": 4, "n_layer": LAYERS, "vocab_size": VOCAB, "n_positions": 64}
HEADS_SIZES = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 64}
NEOX_SIZES = HEADS_SIZES | {"intermediate_size": 72}
OPT_SIZES = HEADS_SIZES | {"ffn_dim": 72}
BLOOM_SIZES = {"hidden_size": 48, "n_head": 4, "n_layer": LAYERS, "vocab_size": VOCAB}

VARIANTS: dict[str, Variant] = {
    "llama, gqa": Variant("LlamaConfig"),
    "llama, tied, mha": Variant("LlamaConfig", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama, mqa, biases, wide heads": Variant(
        "LlamaConfig", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "head_dim": 24, "hidden_act": "gelu"}
    ),
    "llama, llama3 rope": Variant("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama, linear rope": Variant("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
    "llama, yarn rope": Variant("LlamaConfig", {"rope_parameters": YARN}),
    "llama, dynamic rope beyond its length": Variant(
        "LlamaConfig",
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}},
        max_len=37,
    ),
    "llama, longrope, short texts": Variant(
        "LlamaConfig", {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 64}}, max_len=64
    ),
    "mpt": Variant("MptConfig", MPT_SIZES, sizes=False),
    "mpt, clipped, scaled, 8 heads": Variant(
        "MptConfig", MPT_SIZES | {"n_heads": 8, "attn_config": {"clip_qkv": 0.7, "softmax_scale": 0.3}}, sizes=False
    ),
    "mistral, window": Variant("MistralConfig", {"sliding_window": 9, "head_dim": 16}),
    "ministral, windows on some layers": Variant(
        "MinistralConfig",
        {"head_dim": 16, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "qwen2": Variant("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2, windows on late layers, yarn": Variant(
        "Qwen2Config", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "rope_parameters": YARN}
    ),
    "qwen3": Variant("Qwen3Config", {"head_dim": 16, "attention_bias": True}),
    "gemma": Variant("GemmaConfig", {"head_dim": 16}),
    "gemma2": Variant(
        "Gemma2Config",
        {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 9, "attn_logit_softcapping": 6.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3": Variant(
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "sliding_window": 9,
            "num_hidden_layers": 5,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0},
            },
        },
    ),
    "phi": Variant("PhiConfig", {"qk_layernorm": True}),
    "phi, rotated whole": Variant("PhiConfig", {"partial_rotary_factor": 1.0, "num_key_value_heads": 4}),
    "phi3, window": Variant("Phi3Config", {"sliding_window": 9}),
    "phi3, longrope, long texts": Variant(
        "Phi3Config", {"rope_parameters": LONGROPE | {"partial_rotary_factor": 1.0}, "original_max_position_embeddings": 16}
    ),
    "gpt2": Variant("GPT2Config", GPT_SIZES, sizes=False),
    "gpt2, scaled by layer": Variant(
        "GPT2Config",
        GPT_SIZES | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 80, "activation_function": "relu", "tie_word_embeddings": False},
        sizes=False,
    ),
    "gpt_bigcode, multi-query": Variant("GPTBigCodeConfig", GPT_SIZES, sizes=False),
    "gpt_bigcode, multi-head": Variant("GPTBigCodeConfig", GPT_SIZES | {"multi_query": False}, sizes=False),
    "gptj": Variant("GPTJConfig", GPT_SIZES | {"rotary_dim": 8}, sizes=False),
    "gpt_neox": Variant(
        "GPTNeoXConfig",
        NEOX_SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        sizes=False,
    ),
    "gpt_neox, one after the other, no biases": Variant(
        "GPTNeoXConfig",
        NEOX_SIZES | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new", "rotary_pct": 0.5},
        sizes=False,
    ),
    "starcoder2, window": Variant("Starcoder2Config", {"sliding_window": 9}),
    "starcoder2, no biases": Variant("Starcoder2Config", {"use_bias": False, "tie_word_embeddings": False}),
    "opt": Variant("OPTConfig", OPT_SIZES, sizes=False),
    "opt, like 350m": Variant("OPTConfig", OPT_SIZES | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}, sizes=False),
    "opt, nothing learnt in norms, no biases": Variant(
        "OPTConfig", OPT_SIZES | {"enable_bias": False, "layer_norm_elementwise_affine": False}, sizes=False
    ),
    "bloom": Variant("BloomConfig", BLOOM_SIZES, sizes=False),
    "bloom, residual of the norm, 6 heads": Variant(
        "BloomConfig", BLOOM_SIZES | {"n_head": 6, "apply_residual_connection_post_layernorm": True}, sizes=False
    ),
    "falcon, 7b": Variant("FalconConfig", HEADS_SIZES, sizes=False),
    "falcon, rw": Variant(
        "FalconConfig",
        HEADS_SIZES | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
        sizes=False,
        attention="sdpa",  # the eager one of transformers 5.23 adds the bias twice, once with the mask and once by itself
    ),
    "falcon, new": Variant(
        "FalconConfig", HEADS_SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False}, sizes=False
    ),
    "falcon, new with one norm": Variant(
        "FalconConfig",
        HEADS_SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 80},
        sizes=False,
    ),
    "olmo, clipped": Variant("OlmoConfig", {"clip_qkv": 0.8}),
    "olmo2": Variant("Olmo2Config"),
    "olmo3, scaled on full layers": Variant(
        "Olmo3Config",
        {
            "sliding_window": 9,
            "num_hidden_layers": 4,
            "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 500.0}, "full_attention": YARN},
        },
    ),
    "stablelm": Variant("StableLmConfig", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "stablelm, parallel, norms of heads": Variant(
        "StableLmConfig", {"use_parallel_residual": True, "qk_layernorm": True, "partial_rotary_factor": 0.5}
    ),
    "granite": Variant(
        "GraniteConfig",
        {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2, "mlp_bias": True},
    ),
    "cohere": Variant("CohereConfig", {"use_qk_norm": True, "logit_scale": 0.3}),
    "cohere2": Variant("Cohere2Config", {"sliding_window": 9, "num_hidden_layers": 4, "attention_bias": True}),
    "glm": Variant("GlmConfig", {"head_dim": 16}),
    "glm4": Variant("Glm4Config", {"head_dim": 16, "attention_bias": False}),
    "smollm3": Variant("SmolLM3Config", {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 9}),
    "exaone4": Variant("Exaone4Config", {"sliding_window": 9, "sliding_window_pattern": 3}),
    "exaone4, no windows": Variant(
        "Exaone4Config", {"sliding_window": None, "sliding_window_pattern": None, "layer_types": ["full_attention"] * 3}
    ),
    "nemotron": Variant("NemotronConfig", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "seed_oss": Variant("SeedOssConfig", {"head_dim": 16, "attention_out_bias": True}),
    "arcee": Variant("ArceeConfig", {"mlp_bias": True}),
}
