"""Decoders that give vectors instead of text: any family, with its head left out or replaced by a classifier's."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxserve.models.families.bert import num_labels
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.names import Family, stored, with_leaves
from jaxserve.models.spec import ModelSpec, PoolLayerSpec, PoolSpec

Convert = Literal["none", "embed", "classify"]
_CLASSIFIER, _MASKED = "ForSequenceClassification", "ForMaskedLM"


def converted(family: Family, convert: Convert) -> Family:
    """The family for texts as vectors: the last token's hidden state, and with "classify" what the layer `score` makes of it."""
    if convert == "none":
        return family

    def spec(config: HfConfig) -> ModelSpec:
        layers = (PoolLayerSpec(width=num_labels(config), bias=False),) if convert == "classify" else ()
        return dataclasses.replace(family.spec(config), pool=PoolSpec(method="last", layers=layers))

    return dataclasses.replace(
        family, spec=spec, model_names={**family.model_names, **with_leaves({"pool.0": stored("score")})},
        optional_prefix=family.optional_prefix or "model.",
    )  # fmt: skip


def default_convert(architecture: str) -> Convert:
    """What a checkpoint of this architecture is for, by its name, as vLLM takes it."""
    if architecture.endswith(_CLASSIFIER):
        return "classify"
    return "embed" if architecture.endswith("Model") and not architecture.endswith("LMHeadModel") else "none"


def generative_names(architecture: str) -> tuple[str, ...]:
    """What the decoder may be called of which this is the bare model or a classifier; the encoder of which this is a masked one."""
    if architecture.endswith(_MASKED):
        return (f"{architecture.removesuffix(_MASKED)}Model",)
    stem = architecture.removesuffix(_CLASSIFIER) if architecture.endswith(_CLASSIFIER) else architecture.removesuffix("Model")
    return architecture, f"{stem}ForCausalLM", f"{stem}LMHeadModel"
