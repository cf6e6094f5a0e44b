"""Qwen 2, 2.5 and 3."""

from __future__ import annotations

from jaxserve.models.families import parts
from jaxserve.models.families.llama import llama_layer
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.spec import LayerSpec, ModelSpec, QkNormSpec


def qwen2_spec(config: HfConfig) -> ModelSpec:
    """Llama with biases on queries, keys and values."""
    return _windowed(config, parts.with_attention(llama_layer(config), qkv_bias=True, out_bias=False))


def qwen3_spec(config: HfConfig) -> ModelSpec:
    """Llama with norms of queries and keys, head by head."""
    layer = llama_layer(config)
    return _windowed(config, parts.with_attention(layer, qk_norm=QkNormSpec(norm=layer.norm, over="head")))


def _windowed(config: HfConfig, layer: LayerSpec) -> ModelSpec:
    """Layers from max_window_layers on see a window, if use_sliding_window says so; the window is in most configs, and unused."""
    window = parts.read_window(config, 4096)
    if not config.get("use_sliding_window", False):
        window = None
    first = config.get("max_window_layers", 28)
    kinds = parts.read_layer_types(config, lambda i: window is not None and i >= first)
    return parts.read_model(config, [parts.with_attention(layer, window=window if kind == parts.SLIDING else None) for kind in kinds])


QWEN2 = parts.llama_family(qwen2_spec, "Qwen2ForCausalLM")
QWEN3 = parts.llama_family(qwen3_spec, "Qwen3ForCausalLM")
