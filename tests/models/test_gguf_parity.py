"""GGUF files of each architecture, written as llama.cpp's converter writes them, against the checkpoint that they are made of.

The checkpoint's logits are compared with transformers' in test_parity.py: equal specs and parameters give equal logits.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jaxserve.weights.gguf_moe_families import GGUF_FAMILIES
from tests.models import variants
from tests.models.moe_variants import DBRX, MOE_VARIANTS
from tests.models.paged import PagedModel, assert_same
from tests.models.test_encoders import ENCODERS, Encoder
from tests.models.test_families import GRANITE
from tests.models.variants import VARIANTS, VOCAB, Variant

Arrays = dict[str, np.ndarray]
# As TextModel.set_gguf_parameters looks for them: key of the file -> keys of config.json.
KEYS = {
    "block_count": ("num_hidden_layers", "n_layers", "n_layer"),
    "context_length": ("max_position_embeddings", "n_positions", "max_seq_len"),
    "embedding_length": ("hidden_size", "n_embd", "d_model"), "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head", "n_heads"), "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",), "attention.key_length": ("head_dim",), "attention.value_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"), "expert_used_count": ("num_experts_per_tok",),
    "expert_group_count": ("n_group",), "expert_group_used_count": ("topk_group",), "attention.sliding_window": ("sliding_window",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A file.

    Args:
      more: metadata beside what all architectures have; None takes something out.
      change: a tensor's name and values, and the config -> what the converter makes of it, under names that it has a rule for.
      arch: of the file, if the case is called otherwise.
      extra: tensors that only the file has.
    """

    variant: Variant | Encoder
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    change: Callable[[str, np.ndarray, Any], Arrays] = lambda name, array, config: {name: array}
    arch: str = ""
    extra: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def of(name: str, **options: Any) -> Variant:
    """The variant with other options."""
    variant = (VARIANTS | MOE_VARIANTS)[name]
    return dataclasses.replace(variant, options=variant.options | options)


def interleaved(name: str, array: np.ndarray, config: Any) -> Arrays:
    """Rows of queries and keys as LlamaModel.permute leaves them; experts of Mixtral."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads:
        array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return experts(name, array, config)


def granite_moe(name: str, array: np.ndarray, config: Any) -> Arrays:
    """Granite's experts, under the names of other families."""
    if name.endswith("shared_mlp.input_linear.weight"):
        stem = name.replace("shared_mlp.input_linear.weight", "mlp.shared_expert")
        return {f"{stem}.{part}_proj.weight": half for part, half in zip(("gate", "up"), np.split(array, 2), strict=True)}
    name = name.replace("router.weight", "router.layer.weight").replace("block_sparse_moe.experts", "mlp.experts")
    return interleaved(name, array, config)


def experts(name: str, array: np.ndarray, config: Any) -> Arrays:
    """Matrices of experts each in a tensor, the shared expert's gate a vector."""
    if name.endswith("experts.gate_up_proj"):
        gate, up = np.split(array, 2, axis=1)
        stem = name.removesuffix("gate_up_proj")
        return {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
    if name.endswith("experts.down_proj"):
        return {f"{name}.weight": array}
    return {name: array[0] if name.endswith("shared_expert_gate.weight") else array}


def plus_one(name: str, array: np.ndarray, config: Any) -> Arrays:
    """Norms whose 1 is added by Hugging Face's model."""
    return {name: array + 1 if name.endswith("norm.weight") else array}


def transposed(name: str, array: np.ndarray, config: Any) -> Arrays:
    """GPT-2's matrices."""
    return {name: array.T if re.search(r"\.c_(attn|proj|fc)\.weight", name) else array}


def joined(name: str, array: np.ndarray, config: Any) -> Arrays:
    """Fused rows of KV head after KV head as all queries, all keys, all values."""
    if config.model_type == "bloom":
        name = name.removeprefix("transformer.")
    if "query_key_value" not in name:
        return {name: array}
    num_heads = config.num_attention_heads
    num_kv_heads = num_heads
    if config.model_type == "falcon":
        num_kv_heads = config.num_kv_heads if config.new_decoder_architecture else 1
    by_head = array.reshape(num_kv_heads, num_heads // num_kv_heads + 2, -1, *array.shape[1:])
    parts = by_head[:, :-2], by_head[:, -2], by_head[:, -1]
    return {name: np.concatenate([part.reshape(-1, *array.shape[1:]) for part in parts])}


def stacked_norms(name: str, array: np.ndarray, config: Any) -> Arrays:
    """Norms of each head as one tensor; kept until the last of them is there."""
    if ".norms." not in name:
        return {name: array}
    stem, head = re.split(r"\.norms\.(?=\d)", name)
    return {f"{stem}.weight#{head.split('.')[0]}": array}


def gpt_oss(name: str, array: np.ndarray, config: Any) -> Arrays:
    """Experts transposed, gates and their ups apart."""
    if name.endswith("sinks"):
        return {f"{name}.weight": array}
    if "experts" not in name:
        return {name: array}
    leaf, stem = ("bias", name.removesuffix("_bias")) if name.endswith("_bias") else ("weight", name)
    array = array if leaf == "bias" else array.swapaxes(1, 2)
    if stem.endswith("gate_up_proj"):
        stem = stem.removesuffix("gate_up_proj")
        return {f"{stem}gate_proj.{leaf}": array[:, ::2], f"{stem}up_proj.{leaf}": array[:, 1::2]}
    return {f"{stem}.{leaf}": array}


def dbrx(name: str, array: np.ndarray, config: Any) -> Arrays:
    """Experts' matrices apart."""
    if "experts" not in name:
        return {name: array}
    array = array.reshape(config.ffn_config.moe_num_experts, config.ffn_config.ffn_hidden_size, -1)
    return {f"{name}.weight": array.swapaxes(1, 2) if name.endswith("w2") else array}


def latent(name: str, array: np.ndarray, config: Any) -> Arrays:
    """DeepSeek's matrix from latents to keys and values, apart and the first transposed."""
    if name.endswith("e_score_correction_bias"):
        return {name.replace("e_score_correction_bias", "e_score_correction.bias"): array}
    if not name.endswith("kv_b_proj.weight"):
        return experts(name, array, config)
    by_head = array.reshape(config.num_attention_heads, -1, array.shape[1])
    keys, values = by_head[:, : config.qk_nope_head_dim], by_head[:, config.qk_nope_head_dim :]
    return {name.replace("kv_b", "k_b"): keys.swapaxes(1, 2), name.replace("kv_b", "v_b"): values}


def llama4(name: str, array: np.ndarray, config: Any) -> Arrays:
    """Llama 4's experts, out before in."""
    return experts(name, array.swapaxes(1, 2) if "experts." in name else array, config)


def without_pooler(name: str, array: np.ndarray, config: Any) -> Arrays:
    """BERT's pooler is left out."""
    return {} if name.startswith("pooler.") else {name: array}


def correction(name: str, array: np.ndarray, config: Any) -> Arrays:
    """GLM 4.5's experts."""
    return latent(name, array, config) if name.endswith("e_score_correction_bias") else experts(name, array, config)


LATENT_KEYS = {
    "attention.head_count_kv": 1, "attention.key_length": 32, "attention.value_length": 24, "attention.key_length_mla": 18,
    "attention.value_length_mla": 14, "attention.kv_lora_rank": 24, "rope.dimension_count": 8,
}  # fmt: skip
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
LONG = {
    "rope_factors_long.weight": np.array([1.5, 2.0, 3.0, 5.0, 8.0, 13.0], np.float32),
    "rope_factors_short.weight": np.array([1.0, 1.1, 1.3, 1.6, 2.0, 2.5], np.float32),
}
NO_WINDOW = {"attention.sliding_window": None}
MULTIPLIERS = {"embedding_scale": 3.0, "residual_scale": 0.3}
CASES: dict[str, Case] = {
    "llama": Case(VARIANTS["llama, gqa"], {"rope.dimension_count": 12}, interleaved),
    "mixtral": Case(MOE_VARIANTS["mixtral"], {"rope.freq_base": 1_000_000.0}, interleaved, arch="llama"),
    "qwen2": Case(VARIANTS["qwen2"], NO_WINDOW),
    "qwen3": Case(VARIANTS["qwen3"], NO_WINDOW),
    "gemma": Case(VARIANTS["gemma"], change=plus_one),
    # The file cannot say by what scores are divided, so that it is the root of the head size.
    "gemma2": Case(
        of("gemma2", query_pre_attn_scalar=16), {"attn_logit_softcapping": 6.0, "final_logit_softcapping": 5.0}, change=plus_one
    ),
    "gemma3": Case(
        of("gemma3", query_pre_attn_scalar=16),
        {
            "attention.sliding_window_pattern": 2, "rope.freq_base_swa": 100.0, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
        },
        plus_one,
    ),
    "phi2": Case(VARIANTS["phi, rotated whole"], {"rope.dimension_count": 12}),
    "phi3": Case(VARIANTS["phi3, window"], {"rope.dimension_count": 12}),
    "phi3, longrope": Case(
        VARIANTS["phi3, longrope, long texts"],
        {
            "rope.scaling.type": "longrope", "rope.scaling.attn_factor": math.sqrt(1 + math.log(256 / 16) / math.log(16)),
            "rope.scaling.original_context_length": 16,
        },
        extra=LONG,
    ),
    "phimoe": Case(of("phimoe", router_jitter_noise=0.01), {"rope.freq_base": 1_000_000.0}, experts),
    "gpt2": Case(VARIANTS["gpt2"], {"feed_forward_length": 192}, transposed),
    "starcoder": Case(VARIANTS["gpt_bigcode, multi-query"], {"feed_forward_length": 192, "attention.head_count_kv": 1}),
    "starcoder2": Case(of("starcoder2, window", sliding_window=None)),
    "gptneox": Case(VARIANTS["gpt_neox"], {"rope.dimension_count": 6, "use_parallel_residual": True, "rope.freq_base": 500.0}, joined),
    "bloom": Case(VARIANTS["bloom"], {"feed_forward_length": 192, "context_length": 2048}, joined),
    "falcon": Case(VARIANTS["falcon, 7b"], {"feed_forward_length": 192, "attention.head_count_kv": 1}, joined),
    "falcon, two norms": Case(VARIANTS["falcon, new"], {"feed_forward_length": 192, "attention.head_count_kv": 2}, joined),
    "mpt": Case(
        of("mpt, clipped, scaled, 8 heads", attn_config={"clip_qkv": 0.7}), {
            "feed_forward_length": 192, "attention.clamp_kqv": 0.7, "attention.max_alibi_bias": 8.0, "attention.layer_norm_epsilon": 1e-5,
        },
    ),
    "stablelm": Case(
        VARIANTS["stablelm, parallel, norms of heads"], {"use_parallel_residual": True, "rope.dimension_count": 6}, stacked_norms
    ),
    "command-r": Case(VARIANTS["cohere"], {"logit_scale": 0.3, "rope.scaling.type": "none"}),
    "cohere2": Case(of("cohere2", attention_bias=False), {"logit_scale": 0.0625, "rope.dimension_count": 12}),
    "olmo": Case(VARIANTS["olmo, clipped"], {"attention.clamp_kqv": 0.8, "attention.layer_norm_epsilon": 1e-5}, interleaved),
    "olmo2": Case(VARIANTS["olmo2"]),
    "olmo2, windows": Case(
        VARIANTS["olmo3, scaled on full layers"],
        YARN | {"attention.sliding_window_pattern": [True, True, True, False], "rope.freq_base_swa": 500.0},
    ),
    "olmoe": Case(of("olmoe, clipped", clip_qkv=None, norm_topk_prob=False), change=experts),
    "nemotron": Case(VARIANTS["nemotron"], {"rope.dimension_count": 8, "rope.scaling.type": "none"}, plus_one),
    "exaone": Case(VARIANTS["llama, gqa"]),
    "exaone4": Case(VARIANTS["exaone4"], {"attention.sliding_window_pattern": [True, True, False]}),
    "internlm2": Case(VARIANTS["llama, gqa"], change=interleaved),
    "minicpm": Case(GRANITE, MULTIPLIERS | {"logit_scale": 4.0}, interleaved),
    "granite": Case(VARIANTS["granite"], MULTIPLIERS | {"logit_scale": 4.0, "attention.scale": 0.2}, interleaved),
    "granitemoe": Case(
        of("granitemoe, shared expert, biases", **MOE_VARIANTS["granitemoe"].options),
        MULTIPLIERS | {"logit_scale": 4.0, "attention.scale": 0.2, "expert_shared_feed_forward_length": 28}, granite_moe,
    ),
    "arcee": Case(VARIANTS["arcee"], change=interleaved),
    "smollm3": Case(of("smollm3", no_rope_layer_interval=4, use_sliding_window=False), NO_WINDOW, interleaved),
    "seed_oss": Case(VARIANTS["seed_oss"]),
    "glm4": Case(VARIANTS["glm4"], {"rope.dimension_count": 8}),
    "qwen2moe": Case(of("qwen2_moe", norm_topk_prob=False), NO_WINDOW | {"expert_shared_feed_forward_length": 28}, experts),
    "qwen3moe": Case(MOE_VARIANTS["qwen3_moe"], NO_WINDOW, experts),
    "dbrx": Case(
        Variant("DbrxConfig", DBRX, sizes=False), {
            "feed_forward_length": 40, "attention.head_count_kv": 2, "attention.clamp_kqv": 8.0, "expert_count": 5, "expert_used_count": 2,
            "attention.layer_norm_epsilon": 1e-5,
        }, dbrx,
    ),
    "gpt-oss": Case(
        MOE_VARIANTS["gpt_oss"],
        YARN | {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0, "expert_feed_forward_length": 72}, gpt_oss,
    ),
    "deepseek2": Case(
        of("deepseek_v2, groups, ranks, yarn", rope_parameters=variants.YARN | {"mscale": 0.8, "mscale_all_dim": 0.8}),
        LATENT_KEYS | YARN | {
            "attention.q_lora_rank": 30, "expert_shared_count": 1, "expert_weights_scale": 3.0, "expert_gating_func": 1,
            "leading_dense_block_count": 0, "rope.scaling.yarn_log_multiplier": 0.08,
        }, latent,
    ),
    "deepseek2, v3": Case(
        MOE_VARIANTS["deepseek_v3"],
        LATENT_KEYS | {
            "attention.q_lora_rank": 30, "expert_shared_count": 1, "expert_weights_scale": 2.5, "expert_gating_func": 2,
            "leading_dense_block_count": 1, "expert_weights_norm": True,
        }, latent,
    ),
    "chatglm": Case(VARIANTS["glm"], {"rope.dimension_count": 8}),
    "gptj": Case(VARIANTS["gptj"], {"feed_forward_length": 192, "rope.dimension_count": 8}),
    "llama4": Case(
        of("llama4", no_rope_layer_interval=4, attention_chunk_size=8192, floor_scale=8192, attn_scale=0.1),
        {"feed_forward_length": 40, "expert_feed_forward_length": 72, "interleave_moe_layer_step": 2}, llama4,
    ),
    "bert": Case(ENCODERS["bert"], {"attention.causal": False, "pooling_type": 1}, without_pooler),
    "nomic-bert": Case(ENCODERS["nomic"], {"attention.causal": False, "pooling_type": 1}),
    "glm4moe": Case(
        MOE_VARIANTS["glm4_moe"], {
            "rope.dimension_count": 8, "expert_shared_count": 1, "leading_dense_block_count": 1, "expert_gating_func": 2,
            "expert_weights_scale": 1.5, "expert_weights_norm": True, "nextn_predict_layers": 0,
        }, correction,
    ),
}  # fmt: skip


def write_gguf(path: pathlib.Path, arch: str, case: Case) -> None:
    """What convert_hf_to_gguf.py does with the case's model."""
    config, tensors = case.variant.reference.config, case.variant.reference.state_dict()
    if isinstance(case.variant, Encoder):  # under the makers' names
        tensors = load_file(case.variant.path / "model.safetensors")
    writer = gguf.GGUFWriter(path, arch)
    found = {key: next((getattr(config, name) for name in names if hasattr(config, name)), None) for key, names in KEYS.items()}
    for key, value in (found | {"rope.freq_base": theta_of(config)} | dict(case.more)).items():
        if value is not None:
            add = {
                str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool, list: writer.add_array
            }[type(value)]  # fmt: skip
            add(f"{arch}.{key}", value)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, int(found["block_count"] or 0))
    arrays: Arrays = {}
    for name, tensor in tensors.items():
        if not (name in ("lm_head.weight", "embed_out.weight") and config.tie_word_embeddings):
            arrays |= case.change(name, tensor.numpy(), config)
    for name in [name for name in arrays if name.endswith("#0")]:
        parts = [part for part in arrays if part.startswith(name[:-1])]
        arrays[name[:-2]] = np.stack([arrays.pop(part) for part in parts])
    for name, array in arrays.items():
        own_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own_name is not None, name
        writer.add_tensor(own_name, np.ascontiguousarray(array))
    for name, array in case.extra.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def theta_of(config: Any) -> float | None:
    """The base of the rotary frequencies, if the converter finds one."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    return float(rope["rope_theta"]) if "rope_theta" in rope else None


def test_every_architecture_is_compared() -> None:
    assert {case.arch or name.split(",")[0] for name, case in CASES.items()} == set(GGUF_FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_gguf_file_gives_the_spec_and_the_parameters_of_its_checkpoint(name: str, tmp_path: pathlib.Path) -> None:
    case = CASES[name]
    write_gguf(tmp_path / "m.gguf", case.arch or name.split(",")[0], case)
    found, expected = (PagedModel(path, scan=False) for path in (tmp_path / "m.gguf", case.variant.path))
    assert_same(found, expected)


def test_logits_of_a_gguf_file_equal_transformers(tmp_path: pathlib.Path) -> None:
    case = CASES["llama"]
    write_gguf(tmp_path / "m.gguf", "llama", case)
    prompt = np.random.default_rng(1).integers(0, VOCAB, 37)
    with torch.no_grad():
        expected = case.variant.reference(torch.tensor(prompt)[None]).logits[0].numpy()
    found = PagedModel(tmp_path / "m.gguf", scan=True).logits(prompt, [37])
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
