"""Llama 4, its language model: attention within chunks on most layers, no positions on the others, a shared expert."""

from __future__ import annotations

import dataclasses

from jaxserve.errors import ConfigError
from jaxserve.models.families import parts
from jaxserve.models.families.experts import moe_names, read_moe
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import MlpSpec, RouterSpec
from jaxserve.models.names import Family, stored
from jaxserve.models.spec import LayerSpec, LogTemperature, ModelSpec, NormSpec, QkNormSpec

_CHUNKED = "chunked_attention"


def llama4_spec(config: HfConfig) -> ModelSpec:
    """Llama 4.

    Queries and keys are normalized after rotation there, here before: a rotation does not change their length.
    Raises: ConfigError naming the key and value that is not understood.
    """
    count, norm = parts.num_layers(config), parts.rms_norm(config, 1e-5)
    attention = parts.read_attention(config)
    rope = parts.read_rope(config, attention.head_size, theta=500_000.0, interleaved=True)
    qk_norm = QkNormSpec(norm=NormSpec(eps=norm.eps, weight=False), over="head") if config.get("use_qk_norm", True) else None
    temperature = LogTemperature(period=config.get("floor_scale", 8192.0), scale=config.get("attn_scale", 0.1))
    if not config.get("attn_temperature_tuning"):  # a number in the first configs
        temperature = None
    rotated = _flags(config, "no_rope_layers", [(i + 1) % config.get("no_rope_layer_interval", 4) != 0 for i in range(count)])
    chunked = _chunked_layers(config, rotated)
    chunk = config.get("attention_chunk_size", 8192)
    router = RouterSpec(scores="sigmoid")
    moe = read_moe(config, router, shared_width=config.require("intermediate_size", int))
    moe = dataclasses.replace(moe, weigh_inputs=True)
    dense = MlpSpec(width=config.get("intermediate_size_mlp", 16384), activation=moe.expert.activation)
    step = config.get("interleave_moe_layer_step", 1)
    sparse = config.get("moe_layers")
    sparse = range(step - 1, count, step) if sparse is None else sparse
    layer = LayerSpec(attention=attention, mlp=dense, norm=norm)
    layers = [
        dataclasses.replace(
            parts.with_attention(layer, rope=rope, qk_norm=qk_norm) if rotated[i] else parts.with_attention(layer, temperature=temperature),
            mlp=moe if i in sparse else dense,
        )
        for i in range(count)
    ]
    layers = [parts.with_attention(layer, chunk=chunk) if is_chunked else layer for layer, is_chunked in zip(layers, chunked, strict=True)]
    return parts.read_model(config, layers)


def _flags(config: HfConfig, key: str, default: list[bool]) -> list[bool]:
    given = config.get(key) or default
    if not isinstance(given, list) or len(given) != len(default):
        raise ConfigError(f"{key}={given!r:.80} is not a list of {len(default)} numbers")
    return [bool(value) for value in given]


def _chunked_layers(config: HfConfig, rotated: list[bool]) -> list[bool]:
    kinds = config.get("layer_types")
    if kinds is None:
        return rotated
    if not isinstance(kinds, list) or len(kinds) != len(rotated) or not all(kind in (_CHUNKED, parts.FULL) for kind in kinds):
        raise ConfigError(f"layer_types={kinds!r:.80} is not a list of {len(rotated)} times {_CHUNKED} or {parts.FULL}")
    return [kind == _CHUNKED for kind in kinds]


_AT = "model.layers.{i}.feed_forward"
LLAMA4 = Family(
    architectures=("Llama4ForCausalLM",),
    spec=llama4_spec,
    layer_names={
        **parts.llama_layer_names(mlp__down="feed_forward.down_proj"),
        **moe_names("feed_forward", router="router"),
        "mlp.gate_up.weight": stored(f"{_AT}.gate_proj.weight", f"{_AT}.up_proj.weight"),
        "mlp.experts.gate_up": stored(f"{_AT}.experts.gate_up_proj", layout="expert_transposed"),
        "mlp.experts.down": stored(f"{_AT}.experts.down_proj", layout="expert_transposed"),
    },
    model_names=parts.llama_model_names(),
)
