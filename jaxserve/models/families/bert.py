"""BERT and its relatives: encoders whose tokens see the whole text, for embeddings and, with a classifier, for scores."""

from __future__ import annotations

import dataclasses

from jaxserve.errors import ConfigError
from jaxserve.models.families import parts
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import MlpSpec
from jaxserve.models.names import Family, Names, Stored, stored, with_leaves
from jaxserve.models.spec import (
    AttentionSpec,
    DistanceBuckets,
    LayerSpec,
    LearnedPositions,
    ModelSpec,
    NormSpec,
    PoolLayerSpec,
    PoolSpec,
    RopeSpec,
)


def bert_spec(config: HfConfig) -> ModelSpec:
    """Norms after the sums, learned positions, a vector for the first and one for the second text of a pair."""
    return _encoder(config, LearnedPositions(num_rows=config.get("max_position_embeddings", 512)), activation="tanh")


def roberta_spec(config: HfConfig) -> ModelSpec:
    """BERT, whose positions begin behind the one of the padding token."""
    offset = config.get("pad_token_id", 1) + 1
    return _encoder(config, LearnedPositions(num_rows=config.get("max_position_embeddings", 512), offset=offset), activation="tanh")


def mpnet_spec(config: HfConfig) -> ModelSpec:
    """RoBERTa without token types, whose heads have a bias for each bucket of distances, the same in all layers."""
    count = config.get("relative_attention_num_buckets", 32)
    if count != 32:  # which transformers' code does not read
        raise ConfigError(f"relative_attention_num_buckets={count} is not supported; there is 32")
    spec, offset = bert_spec(config), 2  # whatever pad_token_id says
    attention = dataclasses.replace(
        encoder_attention(spec.width, spec.layers[0].attention.num_kv_heads),
        distance_buckets=DistanceBuckets(count=count, max_distance=128),
    )
    assert spec.positions is not None, "BERT has positions"
    positions = dataclasses.replace(spec.positions, offset=offset)
    return dataclasses.replace(
        spec, layers=tuple(dataclasses.replace(layer, attention=attention) for layer in spec.layers), positions=positions, token_types=0,
        max_len=positions.num_rows - offset,
    )  # fmt: skip


def distilbert_spec(config: HfConfig) -> ModelSpec:
    """BERT without token types, under keys of its own."""
    config.get("sinusoidal_pos_embds")  # how positions were initialized; they are stored all the same
    for key in ("qa_dropout", "seq_classif_dropout", "tie_weights_", "tie_word_embeddings", "num_labels"):
        config.get(key)
    width, num_heads = config.require("dim", int), config.require("n_heads", int)
    mlp = MlpSpec(
        width=config.require("hidden_dim", int), activation=parts.read_activation(config, "activation", "gelu"), bias=True, gated=False
    )
    norm = NormSpec(eps=1e-12, kind="layer", bias=True)
    layer = LayerSpec(attention=encoder_attention(width, num_heads), mlp=mlp, norm=norm, placement="post_sum")
    max_len = config.get("max_position_embeddings", 512)
    return ModelSpec(
        width=width, vocab_size=config.require("vocab_size", int), max_len=max_len, layers=(layer,) * config.require("n_layers", int),
        final_norm=None, tied=True, embed_norm=norm, positions=LearnedPositions(num_rows=max_len),
        pool=encoder_pool(config, width, activation="relu"),
    )  # fmt: skip


def modernbert_spec(config: HfConfig) -> ModelSpec:
    """Norms before, but for the first attention; rotary positions, windows on most layers, gated MLPs."""
    for key in (
        "tie_word_embeddings", "decoder_bias", "deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index", "num_labels",
        "initializer_cutoff_factor", "reference_compile", "repad_logits_with_grad", "position_embedding_type", "layer_norm_eps",
        "num_key_value_heads",
    ):  # fmt: skip
        config.get(key)
    width = config.require("hidden_size", int)
    bias, norm = config.get("attention_bias", False), _modernbert_norm(config)
    attention = dataclasses.replace(encoder_attention(width, config.require("num_attention_heads", int)), qkv_bias=bias, out_bias=bias)
    mlp = parts.read_mlp(config, activation="hidden_activation", default="gelu")
    every = config.get("global_attn_every_n_layers", 3)
    kinds = parts.read_layer_types(config, lambda i: i % every != 0)
    window = config.get("local_attention", 128) // 2 + 1
    layers = [
        LayerSpec(
            attention=dataclasses.replace(
                attention, window=window if kind == parts.SLIDING else None, rope=_modernbert_rope(config, kind, attention.head_size)
            ),
            mlp=mlp, norm=norm, placement="pre" if i else "pre_mlp",
        )
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    return ModelSpec(
        width=width, vocab_size=config.require("vocab_size", int), max_len=config.get("max_position_embeddings", 8192),
        layers=tuple(layers), final_norm=norm, tied=True, embed_norm=norm, pool=_modernbert_pool(config, width, norm),
    )  # fmt: skip


def _modernbert_norm(config: HfConfig) -> NormSpec:
    return NormSpec(eps=config.get("norm_eps", 1e-5), kind="layer", bias=config.get("norm_bias", False))


def _modernbert_rope(config: HfConfig, kind: str, head_size: int) -> RopeSpec:
    """Of a kind of layer; older configs have the bases under keys of their own."""
    old, theta = ("local_rope_theta", 10_000.0) if kind == parts.SLIDING else ("global_rope_theta", 160_000.0)
    config.get(old)
    given = config.values.get("rope_parameters")
    if isinstance(given, dict) and isinstance(given.get(kind), dict):
        return parts.read_rope(config, head_size, theta=theta, kind=kind)
    return RopeSpec(dim=head_size, theta=config.get(old, theta))


def _modernbert_pool(config: HfConfig, width: int, norm: NormSpec) -> PoolSpec:
    pooling, bias = config.get("classifier_pooling", "cls"), config.get("classifier_bias", False)
    activation = parts.read_activation(config, "classifier_activation", "gelu")
    if not config.architecture.endswith("ForSequenceClassification"):
        return PoolSpec(method="cls")
    if pooling not in ("cls", "mean"):
        raise ConfigError(f"classifier_pooling={pooling!r} is not supported; there are cls and mean")
    hidden = PoolLayerSpec(width=width, bias=bias, activation=activation, norm=norm)
    return PoolSpec(method="mean" if pooling == "mean" else "cls", layers=(hidden, PoolLayerSpec(width=num_labels(config))))


def num_labels(config: HfConfig) -> int:
    """Outputs of a classifier: as many as id2label names, else num_labels, else two."""
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, dict) and labels else config.get("num_labels", 2)


def _encoder(config: HfConfig, positions: LearnedPositions, *, activation: str) -> ModelSpec:
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ConfigError(f"position_embedding_type={config.get('position_embedding_type')!r} is not supported; there is absolute")
    if config.get("is_decoder", False):
        raise ConfigError("is_decoder=True is not supported: these models are encoders")
    width = config.require("hidden_size", int)
    mlp = MlpSpec(
        width=config.require("intermediate_size", int), activation=parts.read_activation(config, default="gelu"), bias=True, gated=False
    )
    norm = NormSpec(eps=config.get("layer_norm_eps", 1e-12), kind="layer", bias=True)
    attention = encoder_attention(width, config.require("num_attention_heads", int))
    layer = LayerSpec(attention=attention, mlp=mlp, norm=norm, placement="post_sum")
    for key in ("tie_word_embeddings", "attention_probs_dropout_prob", "num_labels"):
        config.get(key)
    return ModelSpec(
        width=width, vocab_size=config.require("vocab_size", int), max_len=positions.num_rows - positions.offset,
        layers=(layer,) * parts.num_layers(config), final_norm=None, tied=True, embed_norm=norm, positions=positions,
        token_types=config.get("type_vocab_size", 2), pool=encoder_pool(config, width, activation=activation),
    )  # fmt: skip


def encoder_attention(width: int, num_heads: int) -> AttentionSpec:
    """Attention as BERT has it: every token sees all of its text; biases everywhere."""
    head_size = width // num_heads
    return AttentionSpec(
        num_heads=num_heads, num_kv_heads=num_heads, head_size=head_size, sm_scale=head_size**-0.5, rope=None, qkv_bias=True, out_bias=True,
        causal=False,
    )  # fmt: skip


def encoder_pool(config: HfConfig, width: int, *, activation: str) -> PoolSpec:
    """The first token's state, and with a classifier a layer between it and the labels."""
    if not config.architecture.endswith("ForSequenceClassification"):
        return PoolSpec(method="cls")
    hidden = PoolLayerSpec(width=width, activation="relu" if activation == "relu" else "tanh")
    return PoolSpec(method="cls", layers=(hidden, PoolLayerSpec(width=num_labels(config))))


def _names(prefix: str, layer: dict[str, str], model: dict[str, str], *, classifier: tuple[str, str]) -> tuple[Names, Names]:
    """Names of a layer's parameters and of the others, norms of the oldest checkpoints' too."""

    def table(modules: dict[str, str]) -> Names:
        ways = with_leaves({path: stored(*(f"{prefix}{name}" for name in names.split())) for path, names in modules.items()})
        old = {".weight": ".gamma", ".bias": ".beta"}
        return {path: (*found, *_renamed(found, old)) if "norm" in path else found for path, found in ways.items()}

    head = with_leaves({f"pool.{i}": stored(name) for i, name in enumerate(classifier)})
    return table(layer), {**table(model), **head}


def _renamed(ways: tuple[Stored, ...], old: dict[str, str]) -> tuple[Stored, ...]:
    def name_of(name: str) -> str:
        for new, before in old.items():
            name = name.removesuffix(new) + before if name.endswith(new) else name
        return name

    return tuple(Stored(tuple(map(name_of, way.names)), way.layout) for way in ways)


_L = "encoder.layer.{i}."
_LAYER = {
    "attention_norm": f"{_L}attention.output.LayerNorm",
    "attention.qkv": " ".join(f"{_L}attention.self.{part}" for part in ("query", "key", "value")),
    "attention.out": f"{_L}attention.output.dense",
    "mlp_norm": f"{_L}output.LayerNorm",
    "mlp.up": f"{_L}intermediate.dense",
    "mlp.down": f"{_L}output.dense",
}
_MODEL = {
    "embed": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
}
_T = "transformer.layer.{i}."
_DISTIL_LAYER = {
    "attention_norm": f"{_T}sa_layer_norm",
    "attention.qkv": " ".join(f"{_T}attention.{part}_lin" for part in "qkv"),
    "attention.out": f"{_T}attention.out_lin",
    "mlp_norm": f"{_T}output_layer_norm",
    "mlp.up": f"{_T}ffn.lin1",
    "mlp.down": f"{_T}ffn.lin2",
}
# What guesses masked words and next sentences in a checkpoint as it was pre-trained.
PRETRAINED = (
    "cls.predictions.bias",
    "lm_head.bias",
    *(
        f"{at}.{leaf}"
        for at in (
            "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.transform.layer_norm",
            "cls.predictions.decoder", "cls.seq_relationship", "lm_head.dense", "lm_head.layer_norm", "lm_head.norm", "lm_head.decoder",
            "vocab_transform", "vocab_layer_norm", "vocab_projector", "head.dense", "head.norm", "decoder",
        )
        for leaf in ("weight", "bias", "gamma", "beta")
    ),
)  # fmt: skip
_NOT_LEARNT = ("embeddings.position_ids", "embeddings.token_type_ids", "pooler.dense.weight", "pooler.dense.bias", *PRETRAINED)

_BERT_LAYER, _BERT_MODEL = _names("bert.", _LAYER, _MODEL, classifier=("bert.pooler.dense", "classifier"))
BERT = Family(
    architectures=("BertModel", "BertForSequenceClassification"),
    spec=bert_spec, layer_names=_BERT_LAYER, model_names=_BERT_MODEL, optional_prefix="bert.", ignored=_NOT_LEARNT,
)  # fmt: skip
_ROBERTA_LAYER, _ROBERTA_MODEL = _names("roberta.", _LAYER, _MODEL, classifier=("classifier.dense", "classifier.out_proj"))
ROBERTA = Family(
    architectures=("RobertaModel", "RobertaForSequenceClassification", "XLMRobertaModel", "XLMRobertaForSequenceClassification"),
    spec=roberta_spec, layer_names=_ROBERTA_LAYER, model_names=_ROBERTA_MODEL, optional_prefix="roberta.", ignored=_NOT_LEARNT,
)  # fmt: skip
_DISTIL_NAMES, _DISTIL_MODEL = _names("distilbert.", _DISTIL_LAYER, _MODEL, classifier=("pre_classifier", "classifier"))
DISTILBERT = Family(
    architectures=("DistilBertModel", "DistilBertForSequenceClassification"),
    spec=distilbert_spec, layer_names=_DISTIL_NAMES, model_names=_DISTIL_MODEL, optional_prefix="distilbert.", ignored=_NOT_LEARNT,
)  # fmt: skip
_MPNET_LAYER = _LAYER | {
    "attention_norm": f"{_L}attention.LayerNorm",
    "attention.qkv": " ".join(f"{_L}attention.attn.{part}" for part in "qkv"),
    "attention.out": f"{_L}attention.attn.o",
}
_MPNET_NAMES, _MPNET_MODEL = _names("mpnet.", _MPNET_LAYER, _MODEL, classifier=("classifier.dense", "classifier.out_proj"))
MPNET = Family(
    architectures=("MPNetModel", "MPNetForSequenceClassification"),
    spec=mpnet_spec,
    layer_names={**_MPNET_NAMES, "attention.distance_bias": stored("mpnet.encoder.relative_attention_bias.weight")},
    model_names=_MPNET_MODEL, optional_prefix="mpnet.", ignored=_NOT_LEARNT,
)  # fmt: skip
_M = "model.layers.{i}."
MODERNBERT = Family(
    architectures=("ModernBertModel", "ModernBertForSequenceClassification"),
    spec=modernbert_spec,
    layer_names=with_leaves(
        {
            "attention_norm": stored(f"{_M}attn_norm"),
            "attention.qkv": stored(f"{_M}attn.Wqkv"),
            "attention.out": stored(f"{_M}attn.Wo"),
            "mlp_norm": stored(f"{_M}mlp_norm"),
            "mlp.gate_up": stored(f"{_M}mlp.Wi"),
            "mlp.down": stored(f"{_M}mlp.Wo"),
        }
    ),
    model_names=with_leaves(
        {
            "embed": stored("model.embeddings.tok_embeddings"),
            "embed_norm": stored("model.embeddings.norm"),
            "final_norm": stored("model.final_norm"),
            "pool.0": stored("head.dense"),
            "pool.0.norm": stored("head.norm"),
            "pool.1": stored("classifier"),
        }
    ),
    optional_prefix="model.",
    ignored=PRETRAINED,
)
BERTS = (BERT, ROBERTA, DISTILBERT, MPNET, MODERNBERT)
