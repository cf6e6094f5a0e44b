"""Prints the table of docs/models.md, from the registry of families and the variants that the tests compare with transformers.

1. A row for each family: its architectures, its variants, the features that those have on, and the GGUF architectures of it.
2. The parity figures are those of tests/models/parity.json; --measure computes them anew, which takes minutes.
3. With --write the table replaces the one of the page; a test holds the page to it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from jaxserve.models.families import FAMILIES, find_family
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import MlpSpec, MoeSpec
from jaxserve.models.names import Family
from jaxserve.models.spec import AttentionSpec, LayerSpec, MlaSpec, ModelSpec, RopeSpec
from jaxserve.weights.gguf_moe_families import GGUF_FAMILIES
from tests.models.moe_variants import MOE_VARIANTS
from tests.models.paged import PagedModel
from tests.models.variants import SIZES, VARIANTS, VOCAB, Variant

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE, FIGURES = ROOT / "docs" / "models.md", ROOT / "tests" / "models" / "parity.json"
BEGIN, END = "<!-- scripts/models_table.py begins -->\n", "<!-- scripts/models_table.py ends -->\n"
PROMPT_LEN = 37
# What people call the families, by their first architecture; and where tests other than test_parity.py compare them.
TITLES: Mapping[str, str] = {
    "LlamaForCausalLM": "Llama 1 to 3, SmolLM 1 and 2, Yi, TinyLlama", "MptForCausalLM": "MPT", "MistralForCausalLM": "Mistral, Ministral",
    "ArceeForCausalLM": "Arcee", "SeedOssForCausalLM": "Seed-OSS", "InternLM2ForCausalLM": "InternLM 2",
    "InternLM3ForCausalLM": "InternLM 3", "SmolLM3ForCausalLM": "SmolLM 3", "GraniteForCausalLM": "Granite",
    "MiniCPMForCausalLM": "MiniCPM", "NemotronForCausalLM": "Nemotron", "ExaoneForCausalLM": "EXAONE 3", "Exaone4ForCausalLM": "EXAONE 4",
    "Qwen2ForCausalLM": "Qwen 2, 2.5", "Qwen3ForCausalLM": "Qwen 3", "GemmaForCausalLM": "Gemma 1", "Gemma2ForCausalLM": "Gemma 2",
    "Gemma3ForCausalLM": "Gemma 3 (text), EmbeddingGemma", "PhiForCausalLM": "Phi 1, 1.5, 2", "Phi3ForCausalLM": "Phi 3, 3.5, 4",
    "GPT2LMHeadModel": "GPT-2", "GPTBigCodeForCausalLM": "GPT-BigCode (StarCoder)", "GPTJForCausalLM": "GPT-J",
    "GPTNeoXForCausalLM": "GPT-NeoX, Pythia", "Starcoder2ForCausalLM": "StarCoder 2", "OPTForCausalLM": "OPT", "BloomForCausalLM": "BLOOM",
    "FalconForCausalLM": "Falcon", "OlmoForCausalLM": "OLMo 1", "Olmo2ForCausalLM": "OLMo 2", "Olmo3ForCausalLM": "OLMo 3",
    "CohereForCausalLM": "Cohere Command R", "Cohere2ForCausalLM": "Cohere Command R7B, A", "StableLmForCausalLM": "StableLM",
    "GlmForCausalLM": "GLM 4 (9B)", "Glm4ForCausalLM": "GLM 4 (0414)", "MixtralForCausalLM": "Mixtral", "OlmoeForCausalLM": "OLMoE",
    "Qwen2MoeForCausalLM": "Qwen 1.5 and 2 MoE", "Qwen3MoeForCausalLM": "Qwen 3 MoE", "GptOssForCausalLM": "GPT-OSS",
    "DeepseekV2ForCausalLM": "DeepSeek V2", "DeepseekV3ForCausalLM": "DeepSeek V3, R1", "Glm4MoeForCausalLM": "GLM 4.5",
    "GraniteMoeForCausalLM": "Granite MoE", "PhimoeForCausalLM": "Phi 3.5 MoE", "DbrxForCausalLM": "DBRX",
    "Llama4ForCausalLM": "Llama 4 (text)", "BertModel": "BERT (MiniLM, BGE, GTE, E5)",
    "RobertaModel": "RoBERTa, XLM-RoBERTa (BGE M3 and rerankers, multilingual E5)", "DistilBertModel": "DistilBERT",
    "MPNetModel": "MPNet (all-mpnet-base-v2)", "ModernBertModel": "ModernBERT (GTE, reranker)",
    "NewModel": "GTE 1.5 and multilingual, Arctic Embed M 2.0",
    "NomicBertModel": "Nomic Embed Text 1 and 1.5",
}  # fmt: skip
ELSEWHERE: Mapping[str, str] = {
    "MptForCausalLM": "llm-foundry's options (test_mpt)", "InternLM2ForCausalLM": "fused by KV head (test_families)",
    "InternLM3ForCausalLM": "biases (test_families)", "MiniCPMForCausalLM": "all multipliers (test_families)",
    "ExaoneForCausalLM": "its names (test_families)", "BertModel": "pairs, classifiers, oldest names (test_encoders)",
    "RobertaModel": "offset positions, classifiers (test_encoders)", "DistilBertModel": "classifiers (test_encoders)",
    "ModernBertModel": "windows, two ropes, biases, classifiers (test_encoders)",
    "Gemma3ForCausalLM": "whole texts (test_encoders)",
    "MPNetModel": "bias by distance (test_encoders)",
    "NewModel": "rotary positions, gated MLPs, both ways of naming (test_encoders)",
    "NomicBertModel": "rotary positions, no biases, both ways of naming (test_encoders)",
}  # fmt: skip


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Print the table of families of docs/models.md.", allow_abbrev=False)
    parser.add_argument("--measure", action="store_true", help="compute the parity figures anew, and keep each as it comes")
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    args = parser.parse_args()
    if args.measure:
        measure()
    if args.write:
        before, after = page_around(PAGE.read_text("utf-8"))
        PAGE.write_text(before + table() + after, "utf-8")
    else:
        print(table(), end="")


def page_around(page: str) -> tuple[str, str]:
    """What the page has before its table and after it."""
    before, rest = page.split(BEGIN)
    return before + BEGIN, END + rest.split(END)[1]


def table() -> str:
    """The table, a line for each family."""
    figures = json.loads(FIGURES.read_text("utf-8"))
    rows = [
        "| Family | Architectures | Variants tested | Features of those | GGUF | Parity |",
        "|---|---|---|---|---|---:|",
    ]
    configs = {name: config_of(variant) for name, variant in ALL.items()}
    families = {name: find_family(config, "none") for name, config in configs.items()}
    for family in FAMILIES:
        first = family.architectures[0]
        names = [name for name, its_family in families.items() if its_family is family]
        tested = [name.partition(", ")[2] or "plain" for name in names] + ([ELSEWHERE[first]] if first in ELSEWHERE else [])
        found = [figures[name] for name in names if name in figures]
        cells = (
            TITLES[first], ", ".join(f"`{name}`" for name in family.architectures), "; ".join(tested),
            ", ".join(sorted({feature for name in names for feature in features(family.spec(configs[name]))})),
            ", ".join(f"`{name}`" for name in gguf_names(family)), f"{max(found):.0e}" if found else "",
        )  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


ALL: Mapping[str, Variant] = VARIANTS | MOE_VARIANTS


def config_of(variant: Variant) -> HfConfig:
    """As the variant's checkpoint would have it, without making one."""
    options = (SIZES if variant.sizes else {}) | variant.options
    return HfConfig(getattr(transformers, variant.config)(**options).to_dict())


def gguf_names(family: Family) -> list[str]:
    """Architectures of GGUF files that become this family; of some it is their other keys that say so."""
    also = {
        "MixtralForCausalLM": ["llama"],
        "MistralForCausalLM": ["llama"],
        "Olmo3ForCausalLM": ["olmo2"],
        "DeepseekV3ForCausalLM": ["deepseek2"],
    }
    found = [name for name, gguf in GGUF_FAMILIES.items() if gguf.architecture in family.architectures]
    return found + also.get(family.architectures[0], [])


def features(spec: ModelSpec) -> Iterator[str]:
    """In words, what is not as in the first Llama."""
    checks = {
        "tied head": spec.tied, "scaled embeddings": spec.embed_scale != 1, "normed embeddings": spec.embed_norm is not None,
        "learned positions": spec.positions is not None, "head bias": spec.head_bias, "scaled logits": spec.logit_scale != 1,
        "capped logits": spec.logit_softcap is not None, "embedding of another width": spec.embed_width not in (None, spec.width),
        "some layers without positions": len({layer.attention.rope is None for layer in spec.layers}) > 1,
    }  # fmt: skip
    yield from (name for name, is_on in checks.items() if is_on)
    for layer in dict.fromkeys(spec.layers):
        yield from _layer_features(layer)
        yield from _mlp_features(layer.mlp)
        if isinstance(layer.attention, MlaSpec):
            yield "latent attention"
        else:
            yield from _attention_features(layer.attention)
        if layer.attention.rope is not None:
            yield from _rope_features(layer.attention.rope, spec)


def _layer_features(layer: LayerSpec) -> Iterator[str]:
    words = {
        "sandwich": "norms before and after", "post": "norms after", "post_sum": "norms of sums", "pre_carried": "residual of the norm",
        "parallel": "parallel", "parallel_shared": "parallel",
    }  # fmt: skip
    if layer.placement in words:
        yield words[layer.placement]
    if layer.norm.kind == "layer":
        yield "layer norms"
    if layer.residual_scale != 1:
        yield "scaled residuals"


def _attention_features(attention: AttentionSpec) -> Iterator[str]:
    yield "MHA" if attention.num_kv_heads == attention.num_heads else "MQA" if attention.num_kv_heads == 1 else "GQA"
    checks = {
        "biases": attention.qkv_bias or attention.out_bias, "clip": attention.clip is not None, "q/k norms": attention.qk_norm is not None,
        "windows": attention.window is not None, "chunks": attention.chunk is not None, "temperature": attention.temperature is not None,
        "capped scores": attention.softcap is not None, "ALiBi": attention.alibi_slopes is not None, "sinks": attention.sinks,
    }  # fmt: skip
    yield from (name for name, is_on in checks.items() if is_on)


def _rope_features(rope: RopeSpec, spec: ModelSpec) -> Iterator[str]:
    if rope.scaling is not None:
        yield f"rope {type(rope.scaling).__name__.removesuffix('Scaling').lower()}"
    if rope.interleaved:
        yield "rope of neighbours"
    if any(isinstance(layer.attention, AttentionSpec) and rope.dim < layer.attention.head_size for layer in spec.layers):
        yield "partial rope"


def _mlp_features(mlp: MlpSpec | MoeSpec) -> Iterator[str]:
    if isinstance(mlp, MoeSpec):
        checks = {
            "experts": True, "shared expert": mlp.shared is not None, "groups of experts": mlp.router.num_groups > 1,
            "correction": mlp.router.correction, "sigmoid router": mlp.router.scores == "sigmoid",
        }  # fmt: skip
        yield from (name for name, is_on in checks.items() if is_on)
        mlp = mlp.expert
    if not mlp.gated:
        yield "plain MLP"
    if mlp.activation != "silu":
        yield mlp.activation if isinstance(mlp.activation, str) else "clamped swiglu"
    if mlp.bias:
        yield "biases"


def measure() -> None:
    """Write the largest difference of logits of each variant from transformers', over the largest of them, whole prompt at once."""
    figures: dict[str, float] = {}
    for name, variant in ALL.items():
        jax.clear_caches()  # a model takes about a thousand of a process's memory maps
        prompt = np.random.default_rng(1).integers(0, VOCAB, PROMPT_LEN)
        with torch.no_grad():
            expected = variant.reference(torch.tensor(prompt)[None]).logits[0].numpy()
        found = PagedModel(variant.path, scan=True, max_len=variant.max_len).logits(prompt, [PROMPT_LEN])
        figures[name] = float(f"{np.abs(found - expected).max() / np.abs(expected).max():.1e}")
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
