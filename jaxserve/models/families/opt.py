"""OPT, whose 350m has its norms after the sum and embeddings of another width."""

from __future__ import annotations

import dataclasses

from jaxserve.models.families import parts
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import MlpSpec
from jaxserve.models.names import Family, stored, with_leaves
from jaxserve.models.spec import LayerSpec, LearnedPositions, ModelSpec, NormSpec


def opt_spec(config: HfConfig) -> ModelSpec:
    """Learned positions, of which the first two rows are for padding."""
    for key in ("init_std", "layerdrop", "activation_dropout"):
        config.get(key)
    bias, affine = config.get("enable_bias", True), config.get("layer_norm_elementwise_affine", True)
    norm = NormSpec(eps=1e-5, kind="layer", weight=affine, bias=affine)
    mlp = MlpSpec(
        width=config.require("ffn_dim", int), activation=parts.read_activation(config, "activation_function", "relu"), bias=bias,
        gated=False,
    )  # fmt: skip
    comes_before = config.get("do_layer_norm_before", True)
    layer = LayerSpec(
        attention=parts.read_attention(config, qkv_bias=bias, out_bias=bias), mlp=mlp, norm=norm,
        placement="pre" if comes_before else "post_sum",
    )  # fmt: skip
    model = parts.read_model(config, layer, tied=True)
    embed_width = config.get("word_embed_proj_dim", model.width)
    return dataclasses.replace(
        model, final_norm=norm if comes_before and not config.get("_remove_final_layer_norm", False) else None,
        positions=LearnedPositions(num_rows=model.max_len + 2, offset=2), embed_width=None if embed_width == model.width else embed_width,
    )  # fmt: skip


_D = "model.decoder."
_L = f"{_D}layers.{{i}}."
OPT = Family(
    architectures=("OPTForCausalLM",),
    spec=opt_spec,
    layer_names=with_leaves(
        {
            "attention_norm": stored(f"{_L}self_attn_layer_norm"),
            "attention.qkv": stored(*(f"{_L}self_attn.{part}_proj" for part in "qkv")),
            "attention.out": stored(f"{_L}self_attn.out_proj"),
            "mlp_norm": stored(f"{_L}final_layer_norm"),
            "mlp.up": stored(f"{_L}fc1"),
            "mlp.down": stored(f"{_L}fc2"),
        }
    ),
    model_names=with_leaves(
        {
            "embed": stored(f"{_D}embed_tokens"),
            "positions": stored(f"{_D}embed_positions"),
            "embed_in": stored(f"{_D}project_in"),
            "embed_out": stored(f"{_D}project_out"),
            "final_norm": stored(f"{_D}final_layer_norm"),
            "head": stored("lm_head"),
        }
    ),
    optional_prefix="model.",
)
