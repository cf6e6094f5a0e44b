"""MPT as llm-foundry computes it, written down plainly in torch: the options that transformers' MPT does not have."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

Tensors = Mapping[str, torch.Tensor]


def save_mpt(directory: pathlib.Path, config: Mapping[str, Any], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write a random checkpoint with llm-foundry's tensor names, and give its tensors."""
    random = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=random) * (0.25 if len(shape) > 1 else 0.2) + (len(shape) == 1 and name.endswith("weight"))
        for name, shape in _shapes(config).items()
    }
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"architectures": ["MPTForCausalLM"], "model_type": "mpt", **config}))
    return tensors


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    attn, ffn, D, N = config["attn_config"], config.get("ffn_config", {}), config["d_model"], config["n_heads"]
    H, K = D // N, attn.get("kv_n_heads", N)
    hidden = ffn.get("ffn_hidden_size", int(D * config.get("expansion_ratio", 4)))
    modules: dict[str, tuple[int, ...]] = {"norm_f": (D,)}
    for i in range(config["n_layers"]):
        block = f"blocks.{i}"
        modules |= {f"{block}.norm_1": (D,), f"{block}.norm_2": (D,), f"{block}.attn.out_proj": (D, D)}
        if attn.get("fused_qkv", True):
            modules[f"{block}.attn.Wqkv"] = ((N + 2 * K) * H, D)
        else:
            modules |= {f"{block}.attn.Wq": (D, D), f"{block}.attn.Wk": (K * H, D), f"{block}.attn.Wv": (K * H, D)}
        if attn.get("qk_ln"):
            modules |= {f"{block}.attn.q_ln": (D,), f"{block}.attn.k_ln": (K * H,)}
        if attn.get("qk_gn"):
            modules |= {f"{block}.attn.q_ln": (H,), f"{block}.attn.k_ln": (H,)}
        modules |= {f"{block}.ffn.up_proj": (hidden, D), f"{block}.ffn.down_proj": (D, hidden)}
        if ffn.get("ffn_type") == "mptglu":
            modules[f"{block}.ffn.gate_proj"] = (hidden, D)
    shapes = {f"transformer.{name}.weight": shape for name, shape in modules.items()}
    if not config["no_bias"]:
        biased = {name: shape for name, shape in modules.items() if not ("norm" in name or "_ln" in name) or "layer" in config["norm_type"]}
        shapes |= {f"transformer.{name}.bias": shape[:1] for name, shape in biased.items()}
    shapes["transformer.wte.weight"] = (config["vocab_size"], D)
    if config.get("learned_pos_emb") and not attn["alibi"]:
        shapes["transformer.wpe.weight"] = (config["max_seq_len"], D)
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (config["vocab_size"], D)
    return shapes


def mpt_logits(config: Mapping[str, Any], tensors: Tensors, prompt: torch.Tensor) -> torch.Tensor:
    """f32[T, V] for i64[T]."""
    T = len(prompt)
    x = tensors["transformer.wte.weight"][prompt]
    if "transformer.wpe.weight" in tensors:
        x = x + tensors["transformer.wpe.weight"][:T]
    for i in range(config["n_layers"]):
        block = f"transformer.blocks.{i}"
        x = x + _attend(config, tensors, f"{block}.attn", _norm(config, tensors, f"{block}.norm_1", x))
        x = x + _feed(config, tensors, f"{block}.ffn", _norm(config, tensors, f"{block}.norm_2", x))
    logits = _norm(config, tensors, "transformer.norm_f", x) @ tensors.get("lm_head.weight", tensors["transformer.wte.weight"]).T
    scale = config.get("logit_scale") or 1.0
    logits = logits * (1 / math.sqrt(config["d_model"]) if scale == "inv_sqrt_d_model" else scale)
    return _softcapped(logits, config.get("final_logit_softcapping"))


def _attend(config: Mapping[str, Any], tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    attn, N, T = config["attn_config"], config["n_heads"], len(x)
    H, K = config["d_model"] // N, attn.get("kv_n_heads", N)
    if attn.get("fused_qkv", True):
        qkv = _linear(tensors, f"{name}.Wqkv", x)
    else:
        qkv = torch.cat([_linear(tensors, f"{name}.W{part}", x) for part in "qkv"], dim=-1)
    if attn.get("clip_qkv"):
        qkv = qkv.clamp(-attn["clip_qkv"], attn["clip_qkv"])
    q, k, v = qkv.split([N * H, K * H, K * H], dim=-1)
    if attn.get("qk_ln"):
        q, k = _norm(config, tensors, f"{name}.q_ln", q), _norm(config, tensors, f"{name}.k_ln", k)
    q, k, v = q.view(T, N, H), k.view(T, K, H), v.view(T, K, H)
    if attn.get("qk_gn"):
        q, k = _norm(config, tensors, f"{name}.q_ln", q), _norm(config, tensors, f"{name}.k_ln", k)
    if attn.get("rope"):
        scale = attn.get("rope_hf_config", {}).get("factor", 1.0) if attn["rope_impl"] == "hf" else 1.0
        q, k = (_rotated(part, attn["rope_theta"], scale) for part in (q, k))
    k, v = (part.repeat_interleave(N // K, dim=1) for part in (k, v))
    scores = torch.einsum("qnh,knh->nqk", q, k) * (attn.get("softmax_scale") or 1 / math.sqrt(H))
    scores = _softcapped(scores, attn.get("attn_logit_softcapping"))
    distance = torch.arange(T)[None, :] - torch.arange(T)[:, None]
    if attn["alibi"]:
        full = 2 ** math.ceil(math.log2(N))
        slopes = 2.0 ** -(torch.arange(1, full + 1) * attn["alibi_bias_max"] / full)
        slopes = slopes if full == N else torch.cat([slopes[1::2], slopes[::2]])[:N]
        scores = scores + slopes[:, None, None] * distance
    window = attn.get("sliding_window_size", -1)
    # As flash-attention's window_size, which it becomes there: so many tokens before the query's own.
    hidden = (distance > 0) | ((distance < -window) if window >= 0 else False)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return _linear(tensors, f"{name}.out_proj", torch.einsum("nqk,knh->qnh", weights, v).reshape(T, N * H))


def _feed(config: Mapping[str, Any], tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    ffn = config.get("ffn_config", {})
    function = ffn.get("ffn_act_fn", {"name": "gelu"})
    up = _linear(tensors, f"{name}.up_proj", x)
    gate = _linear(tensors, f"{name}.gate_proj", x) if ffn.get("ffn_type") == "mptglu" else up
    active = F.silu(gate) if function["name"] == "silu" else F.gelu(gate, approximate=function.get("approximate", "none"))
    return _linear(tensors, f"{name}.down_proj", active * up if gate is not up else active)


def _linear(tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def _norm(config: Mapping[str, Any], tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    if "rms" in config["norm_type"]:
        return F.rms_norm(x, x.shape[-1:], weight, eps=1e-5)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-5)


def _rotated(x: torch.Tensor, theta: float, scale: float) -> torch.Tensor:
    T, _, H = x.shape
    angles = torch.arange(T)[:, None] / scale / theta ** (torch.arange(0, H, 2) / H)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., : H // 2], x[..., H // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _softcapped(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    return x if not cap else cap * torch.tanh(x / cap)
