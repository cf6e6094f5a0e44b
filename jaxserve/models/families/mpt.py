"""MPT, from transformers (MptForCausalLM) and from llm-foundry (MPTForCausalLM), whose configs have other defaults."""

from __future__ import annotations

import math

from jaxserve.errors import ConfigError
from jaxserve.models.families.alibi import alibi_slopes
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import Activation, MlpSpec
from jaxserve.models.names import Family, stored, with_leaves
from jaxserve.models.spec import (
    AttentionSpec,
    DynamicScaling,
    LayerSpec,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    ModelSpec,
    NormSpec,
    QkNormSpec,
    RopeScaling,
    RopeSpec,
)

_FOUNDRY = "MPTForCausalLM"
_NORMS = {
    "layernorm": "layer",
    "low_precision_layernorm": "layer",
    "rmsnorm": "rms",
    "low_precision_rmsnorm": "rms",
    "triton_rmsnorm": "rms",
}
# How to compute, not what: kernels, initialization, training, and the layout of training batches.
_HOW = (
    "init_device", "init_config", "embedding_fraction", "emb_pdrop", "verbose", "fc_type", "use_pad_tok_in_ffn", "loss_fn", "name",
    "tokenizer_name",
)  # fmt: skip
_HOW_ATTENTION = ("attn_impl", "attn_pdrop", "attn_uses_sequence_id", "model_type", "kv_dim", "fused_qkv")


def mpt_spec(config: HfConfig) -> ModelSpec:
    """The ModelSpec of an MPT config.

    Raises: ConfigError naming the key and value that is not understood.
    """
    for key in _HOW:
        config.get(key)
    foundry = config.architecture == _FOUNDRY
    width, max_len = config.require("d_model", int), config.get("max_seq_len", 2048)
    bias = not config.get("no_bias", not foundry)
    norm = _norm(config, bias and foundry)
    bias = bias and foundry  # transformers' MPT has no biases, whatever no_bias says
    attention = _attention(config, width, max_len, norm, bias=bias)
    layer = LayerSpec(attention=attention, mlp=_mlp(config, width, bias=bias), norm=norm)
    uses_alibi = attention.alibi_slopes is not None
    has_positions = config.get("learned_pos_emb", True) and not uses_alibi and attention.rope is None
    return ModelSpec(
        width=width, vocab_size=config.require("vocab_size", int), max_len=max_len,
        layers=(layer,) * config.require("n_layers", int), final_norm=norm, tied=config.get("tie_word_embeddings", True),
        positions=LearnedPositions(num_rows=max_len) if has_positions else None, logit_scale=_logit_scale(config, width),
        logit_softcap=config.get("final_logit_softcapping", 0.0) or None,
    )  # fmt: skip


def _attention(config: HfConfig, width: int, max_len: int, norm: NormSpec, *, bias: bool) -> AttentionSpec:
    options = config.child("attn_config")
    for key in _HOW_ATTENTION:
        options.get(key)
    if options.get("prefix_lm", False):
        raise ConfigError("attn_config.prefix_lm=True is not supported: prompts are read causally")
    num_heads = config.require("n_heads", int)
    if width % num_heads:
        raise ConfigError(f"d_model={width} is not divisible by n_heads={num_heads}")
    head_size = width // num_heads
    over_heads, over_width = options.get("qk_gn", False), options.get("qk_ln", False)
    if over_heads and over_width:
        raise ConfigError("attn_config.qk_ln and attn_config.qk_gn are both set; a model has one of them")
    window = options.get("sliding_window_size", -1)
    rope = options.get("rope", False)
    if rope and options.get("alibi", False):
        raise ConfigError("attn_config.alibi and attn_config.rope are both set; a model has one of them")
    alibi = options.get("alibi", config.architecture != _FOUNDRY) and not rope
    alibi_bias_max = options.get("alibi_bias_max", 8.0)
    return AttentionSpec(
        num_heads=num_heads, num_kv_heads=_num_kv_heads(options, num_heads), head_size=head_size,
        sm_scale=options.get("softmax_scale", 0.0) or 1 / math.sqrt(head_size),
        rope=_rope(options, head_size, max_len) if rope else None, qkv_bias=bias, out_bias=bias, clip=options.get("clip_qkv", 0.0) or None,
        qk_norm=QkNormSpec(norm=norm, over="head" if over_heads else "width") if over_heads or over_width else None,
        # The key counts the tokens before a query's own, as flash-attention does.
        window=window + 1 if window >= 0 else None, softcap=options.get("attn_logit_softcapping", 0.0) or None,
        alibi_slopes=alibi_slopes(num_heads, alibi_bias_max) if alibi else None,
    )  # fmt: skip


def _num_kv_heads(options: HfConfig, num_heads: int) -> int:
    stated = options.get("kv_n_heads", 0)
    match options.get("attn_type", "multihead_attention"):
        case "multihead_attention":
            expected = num_heads
        case "multiquery_attention":
            expected = 1
        case "grouped_query_attention" if stated > 0 and num_heads % stated == 0:
            expected = stated
        case kind:
            raise ConfigError(f"attn_config.attn_type={kind!r} with kv_n_heads={stated or None} and n_heads={num_heads} is not supported")
    if stated not in (0, expected):
        raise ConfigError(f"attn_config.kv_n_heads={stated} contradicts attn_type={options.get('attn_type')!r}")
    return expected


def _rope(options: HfConfig, head_size: int, max_len: int) -> RopeSpec:
    theta, implementation = options.get("rope_theta", 10_000.0), options.get("rope_impl", "dail")
    dail, hf = options.child("rope_dail_config"), options.child("rope_hf_config")
    kinds = dail.get("type", "original"), hf.get("type", "no_scaling")
    factor = hf.get("factor", 1.0)
    for key in ("pos_idx_in_fp32", "xpos_scale_base"):  # positions are exact here; the base is for xpos alone
        dail.get(key)
    scaling: RopeScaling | None = None
    match implementation, kinds:
        case ("dail", ("original", _)) | ("hf", (_, "no_scaling")):
            for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "original_max_seq_len"):
                hf.get(key)
        case "hf", (_, "linear"):
            scaling = LinearScaling(factor=factor)
        case "hf", (_, "dynamic"):
            scaling = DynamicScaling(factor=factor, original_len=max_len, max_len=max_len)
        case "hf", (_, "llama3"):
            scaling = Llama3Scaling(
                factor=factor, low_freq_factor=hf.get("low_freq_factor", 1.0), high_freq_factor=hf.get("high_freq_factor", 4.0),
                original_len=hf.get("original_max_position_embeddings", 8192),
            )  # fmt: skip
        case _:
            raise ConfigError(f"attn_config.rope_impl={implementation!r} of type dail {kinds[0]!r}, hf {kinds[1]!r} is not supported")
    return RopeSpec(dim=head_size, theta=theta, scaling=scaling)


def _mlp(config: HfConfig, width: int, *, bias: bool) -> MlpSpec:
    options = config.child("ffn_config")
    options.get("fc_type")
    kind = options.get("ffn_type", "mptmlp")
    if kind not in ("mptmlp", "mptglu"):
        raise ConfigError(f"ffn_config.ffn_type={kind!r} is not supported; there are mptmlp, mptglu")
    function = options.child("ffn_act_fn")
    name, approximate = function.get("name", "gelu"), function.get("approximate", "none")
    activations: dict[tuple[str, str], Activation] = {
        ("gelu", "none"): "gelu", ("gelu", "tanh"): "gelu_tanh", ("silu", "none"): "silu", ("relu", "none"): "relu",
    }  # fmt: skip
    if (name, approximate) not in activations:
        raise ConfigError(f"ffn_config.ffn_act_fn={dict(function.values)!r:.80} is not supported; there are gelu (none, tanh), silu, relu")
    ratio = config.get("expansion_ratio", 4.0)
    hidden = options.get("ffn_hidden_size", 0) or width * ratio
    if int(hidden) != hidden:
        raise ConfigError(f"expansion_ratio={ratio} of d_model={width} is no whole number of features")
    return MlpSpec(width=int(hidden), activation=activations[name, approximate], bias=bias, gated=kind == "mptglu")


def _norm(config: HfConfig, bias: bool) -> NormSpec:
    kind = config.get("norm_type", "low_precision_layernorm")
    eps = config.get("norm_eps", config.get("layer_norm_epsilon", 1e-5))
    match _NORMS.get(kind):
        case "layer":
            return NormSpec(eps=eps, kind="layer", bias=bias)
        case "rms":
            return NormSpec(eps=eps)
        case _:
            raise ConfigError(f"norm_type={kind!r} is not supported; there are {', '.join(_NORMS)}")


def _logit_scale(config: HfConfig, width: int) -> float:
    scale = config.get("logit_scale")
    if scale is None:
        return 1.0
    if scale == "inv_sqrt_d_model":
        return 1 / math.sqrt(width)
    if isinstance(scale, int | float) and not isinstance(scale, bool):
        return float(scale)
    raise ConfigError(f"logit_scale={scale!r:.80} is neither a number nor 'inv_sqrt_d_model'")


_LAYER = "transformer.blocks.{i}."
MPT = Family(
    architectures=("MptForCausalLM", _FOUNDRY),
    spec=mpt_spec,
    layer_names=with_leaves(
        {
            "attention_norm": stored(f"{_LAYER}norm_1"),
            "attention.qkv": stored(f"{_LAYER}attn.Wqkv") + stored(*(f"{_LAYER}attn.W{part}" for part in "qkv")),
            "attention.q_norm.norm": stored(f"{_LAYER}attn.q_ln"),
            "attention.k_norm.norm": stored(f"{_LAYER}attn.k_ln"),
            "attention.out": stored(f"{_LAYER}attn.out_proj"),
            "mlp_norm": stored(f"{_LAYER}norm_2"),
            "mlp.gate_up": stored(f"{_LAYER}ffn.gate_proj", f"{_LAYER}ffn.up_proj"),
            "mlp.up": stored(f"{_LAYER}ffn.up_proj"),
            "mlp.down": stored(f"{_LAYER}ffn.down_proj"),
        }
    ),
    model_names=with_leaves(
        {
            "embed": stored("transformer.wte"),
            "positions": stored("transformer.wpe"),
            "final_norm": stored("transformer.norm_f"),
            "head": stored("lm_head"),
        }
    ),
    optional_prefix="transformer.",
)
