"""GPT-OSS: experts with biases and a clamped activation, sinks in the softmax, a window on every other layer."""

from __future__ import annotations

import dataclasses

from jaxserve.models.families import parts
from jaxserve.models.families.experts import read_moe
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import ClampedSwiglu, MlpSpec, RouterSpec
from jaxserve.models.names import Family, stored
from jaxserve.models.spec import LayerSpec, ModelSpec


def gpt_oss_spec(config: HfConfig) -> ModelSpec:
    """GPT-OSS; its matrices in MXFP4 are read as numbers."""
    bias = config.get("attention_bias", True)
    attention = parts.read_attention(config, qkv_bias=bias, out_bias=bias)
    attention = dataclasses.replace(attention, rope=parts.read_rope(config, attention.head_size, theta=150_000.0), sinks=True)
    activation = ClampedSwiglu(alpha=config.get("swiglu_alpha", 1.702), limit=config.get("swiglu_limit", 7.0))
    for key in ("experts_per_token", "initial_context_length"):  # said again by num_experts_per_tok and the rotary positions
        config.get(key)
    moe = read_moe(config, RouterSpec(renormalize=True, bias=True))
    moe = dataclasses.replace(moe, expert=MlpSpec(width=moe.expert.width, activation=activation, bias=True))
    layer = LayerSpec(attention=attention, mlp=moe, norm=parts.rms_norm(config, 1e-5))
    window = parts.read_window(config, 128)
    kinds = parts.read_layer_types(config, lambda i: i % 2 == 0)
    return parts.read_model(config, [parts.with_attention(layer, window=window if kind == parts.SLIDING else None) for kind in kinds])


_AT = "model.layers.{i}.mlp"
GPT_OSS = Family(
    architectures=("GptOssForCausalLM",),
    spec=gpt_oss_spec,
    layer_names={
        **parts.llama_layer_names(),
        "attention.sinks": stored("model.layers.{i}.self_attn.sinks"),
        "mlp.router.weight": stored(f"{_AT}.router.weight"),
        "mlp.router.bias": stored(f"{_AT}.router.bias"),
        "mlp.experts.gate_up": stored(f"{_AT}.experts.gate_up_proj", layout="expert_transposed_pairs")
        + stored(f"{_AT}.experts.gate_up_proj_blocks", layout="expert_pairs"),
        "mlp.experts.gate_up_bias": stored(f"{_AT}.experts.gate_up_proj_bias", layout="expert_pairs"),
        "mlp.experts.down": stored(f"{_AT}.experts.down_proj", layout="expert_transposed")
        + stored(f"{_AT}.experts.down_proj_blocks", layout="expert"),
        "mlp.experts.down_bias": stored(f"{_AT}.experts.down_proj_bias", layout="expert"),
    },
    model_names=parts.llama_model_names(),
)
