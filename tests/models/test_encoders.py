"""Tiny random encoders, and decoders that give vectors, against transformers in float32: hidden states, and classifiers' numbers."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from jaxserve.errors import ConfigError
from jaxserve.models.attention import distance_buckets
from jaxserve.models.batch import Batch
from jaxserve.models.decoder import Decoder
from jaxserve.models.families import find_family
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.kv_cache import cache_shapes
from jaxserve.models.params import merge_model, split_model
from jaxserve.models.pooling import finish_pool, pool_step, pooled_tokens
from jaxserve.models.spec import DistanceBuckets, ModelSpec, NtkScaling, fold_layers
from jaxserve.weights.checkpoint import open_checkpoint, read_config
from jaxserve.weights.load import load_params
from tests.compiling import COMPILER_OPTIONS
from tests.models.variants import shuffled

VOCAB, PAGE_SIZE = 130, 8
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
DISTIL = {"vocab_size": VOCAB, "dim": 48, "hidden_dim": 72, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64}
ROBERTA = SIZES | {"pad_token_id": 1, "type_vocab_size": 1}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A model of transformers, by the names of its class and of its configuration's."""

    model: str
    config: str
    options: dict[str, Any]

    @functools.cached_property
    def reference(self) -> Any:
        torch.manual_seed(0)
        return shuffled(getattr(transformers, self.model)(getattr(transformers, self.config)(**self.options)))

    @functools.cached_property
    def path(self) -> pathlib.Path:
        directory = pathlib.Path(tempfile.mkdtemp(prefix="jaxserve-encoder-"))
        self.reference.save_pretrained(directory)
        return directory


MODERN = {key: value for key, value in SIZES.items() if key != "pad_token_id"} | {
    "num_hidden_layers": 4, "local_attention": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
    "sep_token_id": 2,
}  # fmt: skip
GEMMA = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "query_pre_attn_scalar": 16, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "use_bidirectional_attention": True,
}  # fmt: skip
LLAMA = {key: value for key, value in SIZES.items() if key != "pad_token_id"} | {"num_key_value_heads": 2}
GPT = {"vocab_size": VOCAB, "n_embd": 48, "n_head": 4, "n_layer": 3, "n_positions": 64, "bos_token_id": None, "eos_token_id": 0}
MPNET = SIZES | {"relative_attention_num_buckets": 32, "max_position_embeddings": 66}
GTE = SIZES | {"type_vocab_size": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
ENCODERS = {
    "llama, without a head": Encoder("LlamaModel", "LlamaConfig", LLAMA),
    "modernbert": Encoder("ModernBertModel", "ModernBertConfig", MODERN),
    "modernbert, biases": Encoder(
        "ModernBertModel", "ModernBertConfig", MODERN | {"attention_bias": True, "mlp_bias": True, "norm_bias": True}
    ),
    "gemma3, whole texts": Encoder("Gemma3TextModel", "Gemma3TextConfig", GEMMA),
    "bert": Encoder("BertModel", "BertConfig", SIZES),
    "bert, one type, no gelu": Encoder("BertModel", "BertConfig", SIZES | {"type_vocab_size": 1, "hidden_act": "relu"}),
    "roberta": Encoder("RobertaModel", "RobertaConfig", ROBERTA),
    "xlm-roberta": Encoder("XLMRobertaModel", "XLMRobertaConfig", ROBERTA),
    "distilbert": Encoder("DistilBertModel", "DistilBertConfig", DISTIL),
    "mpnet": Encoder("MPNetModel", "MPNetConfig", MPNET),
    "gte": Encoder("GteModel", "GteConfig", GTE),
    "nomic": Encoder("NomicBertModel", "NomicBertConfig", SIZES),
}
CLASSIFIERS = {
    "qwen3, a score": Encoder("Qwen3ForSequenceClassification", "Qwen3Config", LLAMA | {"num_labels": 1, "head_dim": 12}),
    "gpt2": Encoder("GPT2ForSequenceClassification", "GPT2Config", GPT | {"num_labels": 3}),
    "bert, a score": Encoder("BertForSequenceClassification", "BertConfig", SIZES | {"num_labels": 1}),
    "roberta": Encoder("RobertaForSequenceClassification", "RobertaConfig", ROBERTA | {"num_labels": 3}),
    "xlm-roberta, a score": Encoder("XLMRobertaForSequenceClassification", "XLMRobertaConfig", ROBERTA | {"num_labels": 1}),
    "modernbert": Encoder(
        "ModernBertForSequenceClassification", "ModernBertConfig", MODERN | {"num_labels": 3, "classifier_pooling": "cls"}
    ),
    "modernbert, a score by the mean": Encoder(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        MODERN | {"num_labels": 1, "classifier_pooling": "mean", "classifier_bias": True, "classifier_activation": "relu"},
    ),
    "distilbert": Encoder("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL | {"num_labels": 4}),
    "mpnet": Encoder("MPNetForSequenceClassification", "MPNetConfig", MPNET | {"num_labels": 3}),
    "gte, a score": Encoder("GteForSequenceClassification", "GteConfig", GTE | {"num_labels": 1}),
    "nomic": Encoder("NomicBertForSequenceClassification", "NomicBertConfig", SIZES | {"num_labels": 3}),
}
LENGTHS = (1, 19, 6)  # of texts that are computed together; the second text of each pair begins half way


def load(path: pathlib.Path, platform: str | None = None) -> tuple[ModelSpec, Any, dict[str, jax.Array]]:
    """A model, on the kernels of a platform (default: the one at hand), and its parameters."""
    config = read_config(path)
    family = find_family(config)
    spec = family.spec(config)
    assert not config.unread(), f"{config.unread()=}"
    groups = fold_layers(spec.layers, scan=True)
    graphdef, shapes = split_model(Decoder(spec, groups, dtype=jnp.dtype(jnp.float32), platform=platform))
    with open_checkpoint(path) as checkpoint:
        return spec, graphdef, load_params(checkpoint, shapes, groups, family, progress=lambda done, total: None)


def run(path: pathlib.Path, texts: list[np.ndarray], *, pooled: bool, platform: str | None = None) -> list[np.ndarray]:
    """The hidden states of texts, or their vectors behind pooling and its layers, through one step over scattered pages."""
    spec, graphdef, params = load(path, platform)
    assert spec.pool is not None
    method, groups = spec.pool.method, fold_layers(spec.layers, scan=True)
    T, pages = sum(map(len, texts)) + 5, [-(-len(text) // PAGE_SIZE) for text in texts]
    cache = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype),
        cache_shapes(groups, num_pages=sum(pages) + 1, page_size=PAGE_SIZE, dtype=jnp.dtype("float32"), platform=platform),
    )
    ids = np.random.default_rng(3).permutation(np.arange(1, sum(pages) + 1))
    tokens, positions, types = np.zeros((3, T), np.int32)
    table, starts = np.zeros((len(texts), max(pages)), np.int32), np.cumsum([0, *map(len, texts)])
    for i, text in enumerate(texts):
        here = slice(starts[i], starts[i + 1])
        tokens[here], positions[here], types[here] = text, np.arange(len(text)), second(len(text))
        table[i, : pages[i]] = ids[sum(pages[:i]) : sum(pages[: i + 1])]
    batch = Batch(
        tokens=jnp.asarray(tokens), positions=jnp.asarray(positions), page_table=jnp.asarray(table), token_types=jnp.asarray(types),
        query_start=jnp.asarray(starts, jnp.int32), kv_len=jnp.asarray([len(text) for text in texts], jnp.int32),
    )  # fmt: skip

    def forward(params: Any, cache: Any) -> jax.Array:
        model = merge_model(graphdef, params)
        if not pooled:
            return model.normed(model(batch, cache)[0])
        hidden = model.normed(model(batch, cache, pooled_tokens(method, batch))[0])
        sums = pool_step(method, hidden, jnp.zeros((len(texts), spec.width)), batch)
        return finish_pool(method, sums, batch.kv_len, list(model.pool))

    found = np.asarray(jax.jit(forward, compiler_options=COMPILER_OPTIONS)(params, cache))
    return list(found) if pooled else [found[starts[i] : starts[i + 1]] for i in range(len(texts))]


def second(length: int) -> np.ndarray:
    return np.arange(length) >= max(1, length // 2)


def expected(reference: Any, text: np.ndarray) -> np.ndarray:
    num_types = getattr(reference.config, "type_vocab_size", 0)
    types = torch.tensor(second(len(text)) * (num_types > 1), dtype=torch.long)[None]
    options = {"token_type_ids": types} if num_types else {}
    with torch.no_grad():
        outputs = reference(torch.tensor(text)[None], **options)
    return (outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state)[0].numpy()


def texts_of() -> list[np.ndarray]:
    return [np.random.default_rng(length).integers(2, VOCAB, length) for length in LENGTHS]


@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states_equal_transformers(name: str) -> None:
    encoder = ENCODERS[name]
    for text, found in zip(texts_of(), run(encoder.path, texts_of(), pooled=False), strict=True):
        wanted = expected(encoder.reference, text)
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max(), f"{len(text)=}"


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_equals_transformers(name: str) -> None:
    encoder = CLASSIFIERS[name]
    for text, found in zip(texts_of(), run(encoder.path, texts_of(), pooled=True), strict=True):
        wanted = expected(encoder.reference, text)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max(), f"{len(text)=}"


def test_names_of_the_oldest_checkpoints_are_known(tmp_path: pathlib.Path) -> None:
    encoder = ENCODERS["bert"]
    tensors = load_file(encoder.path / "model.safetensors")
    old = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in tensors.items()
    }
    save_file(old | {"bert.embeddings.position_ids": torch.arange(64)[None]}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((encoder.path / "config.json").read_text())
    for found, wanted in zip(run(tmp_path, texts_of(), pooled=False), run(encoder.path, texts_of(), pooled=False), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_buckets_of_distances_are_those_of_mpnet() -> None:
    distances = torch.arange(-128, 129)
    expected = MPNetEncoder.relative_position_bucket(distances, num_buckets=32, max_distance=128).numpy()
    np.testing.assert_array_equal(distance_buckets(DistanceBuckets(count=32, max_distance=128)), expected)


# As the makers publish them: the same under other keys.
PUBLISHED = {
    "gte": {
        "architectures": ["NewModel"], "model_type": "new", "layer_norm_type": "layer_norm", "logn_attention_clip1": False,
        "logn_attention_scale": False, "pack_qkv": True, "position_embedding_type": "rope", "rope_theta": 500, "type_vocab_size": 2,
        "unpad_inputs": False, "use_memory_efficient_attention": False, "hidden_act": "gelu", "layer_norm_eps": 1e-12, **SIZES,
    },
    "nomic": {
        "architectures": ["NomicBertModel"], "model_type": "nomic_bert", "activation_function": "swiglu", "causal": False,
        "dense_seq_output": True, "fused_bias_fc": True, "layer_norm_epsilon": 1e-12, "max_trained_positions": 64, "mlp_fc1_bias": False,
        "mlp_fc2_bias": False, "n_embd": 48, "n_head": 4, "n_inner": 72, "n_layer": 3, "n_positions": 256, "prenorm": False,
        "pad_vocab_size_multiple": 1, "parallel_block": False, "qkv_proj_bias": False, "rotary_emb_base": 1000, "use_flash_attn": True,
        "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None, "rotary_scaling_factor": None,
        "scale_attn_weights": True, "summary_type": "cls_index", "type_vocab_size": 2, "use_rms_norm": False, "vocab_size": VOCAB,
    },
}  # fmt: skip


@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_encoder_is_the_same_under_its_other_names(name: str, prefixed: bool, tmp_path: pathlib.Path) -> None:
    """The makers' keys, with the prefix of their larger models; and the names of transformers' own modules."""
    encoder = ENCODERS[name]
    if prefixed:
        prefix, config = {"gte": "new.", "nomic": "nomic_bert."}[name], PUBLISHED[name]
        tensors = load_file(encoder.path / "model.safetensors")
    else:
        prefix, config = "", encoder.reference.config.to_dict() | {"architectures": [encoder.model]}
        tensors = {key: tensor.contiguous() for key, tensor in encoder.reference.state_dict().items()}
    save_file({f"{prefix}{key}": tensor for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (spec, _, found), (expected_spec, _, expected) = load(tmp_path), load(encoder.path)
    assert spec == expected_spec
    assert found.keys() == expected.keys()
    for path, parameter in expected.items():
        np.testing.assert_array_equal(found[path], parameter, err_msg=path)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"factor": 2.0, "type": "ntk"}, NtkScaling(factor=2.0)),
        ({"factor": 4.0, "type": "ntk", "mixed_b": 0.5}, NtkScaling(factor=4.0, exponent=0.5)),
    ],
)
def test_published_gte_stretches_its_rotation(scaling: dict[str, Any], expected: NtkScaling) -> None:
    spec = find_family(config := HfConfig(PUBLISHED["gte"] | {"rope_scaling": scaling})).spec(config)
    rope = spec.layers[0].attention.rope
    assert rope is not None
    assert rope.scaling == expected
    assert not config.unread()


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gte", "logn_attention_scale", True), ("gte", "position_embedding_type", "absolute"), ("gte", "layer_norm_type", "rms_norm"),
        ("nomic", "prenorm", True), ("nomic", "activation_function", "gelu"), ("nomic", "rotary_emb_fraction", 0.5),
    ],
)  # fmt: skip
def test_option_of_a_published_encoder_that_is_not_there_is_refused(name: str, key: str, value: Any) -> None:
    config = HfConfig(PUBLISHED[name] | {key: value})
    with pytest.raises(ConfigError, match=f"{key}={value!r}"):
        find_family(config).spec(config)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "mpnet", "modernbert", "gte", "nomic"])
def test_checkpoint_as_it_was_pretrained_is_an_encoder(name: str) -> None:
    """Many models of sentence-transformers still call themselves so; what guesses masked words is left out."""
    plain = ENCODERS[name]
    masked = dataclasses.replace(plain, model=plain.model.replace("Model", "ForMaskedLM"))
    spec, _, params = load(masked.path)
    assert spec == load(plain.path)[0]
    np.testing.assert_array_equal(params["embed.weight"], masked.reference.get_input_embeddings().weight.detach())


@pytest.mark.parametrize("options", [{"is_decoder": True}, {"position_embedding_type": "relative_key"}])
def test_option_that_changes_the_mathematics_is_refused(options: dict[str, Any]) -> None:
    config = HfConfig({"architectures": ["BertModel"], **SIZES, **options})
    with pytest.raises(ConfigError, match=next(iter(options))):
        find_family(config).spec(config)
