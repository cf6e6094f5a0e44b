"""The language model of a checkpoint that also sees images, such as Gemma 3's, Mistral Small 3's and Llama 4's.

1. Its config is under text_config; what the others say (of images, and of how they reach the text) is left out, with a warning.
2. Its tensors are behind language_model; those of the other parts are left out.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Mapping
from typing import Any

from jaxserve.models.hf_config import MODEL_TYPES
from jaxserve.weights.tensors import Checkpoint, CheckpointView

log = logging.getLogger(__name__)

_KIND = "ForConditionalGeneration"
_INSIDE = ("model.language_model.", "language_model.")
_OTHERS = ("vision_tower", "vision_model", "vision_encoder", "multi_modal_projector", "patch_merger", "visual", "audio_tower")
# What else of the whole model's config is the text's too.
_SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "tie_word_embeddings", "torch_dtype", "dtype")
# Published configs leave out what transformers' class says.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {"gemma3_text": {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}}
)


def text_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json's values of the language model alone; themselves if there is nothing else in them."""
    named, text = values.get("architectures"), values.get("text_config")
    if not (isinstance(named, list) and named and str(named[0]).endswith(_KIND)) or not isinstance(text, dict):
        return values
    kind = str(text.get("model_type"))
    if kind not in MODEL_TYPES:
        return values
    _warn(str(named[0]))
    shared = {key: values[key] for key in _SHARED if key in values}
    return {**_DEFAULTS.get(kind, {}), **shared, **text, "architectures": [MODEL_TYPES[kind]]}


@functools.cache
def _warn(architecture: str) -> None:
    """Once an architecture, however often its config is read."""
    log.warning("%s sees images too; its language model alone is loaded, and requests with images are refused", architecture)


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """The language model of a checkpoint; the checkpoint itself if it is nothing else."""
    if not any(name.startswith(_INSIDE) for name in checkpoint.tensors):
        return checkpoint
    names = {_alone(name): name for name in checkpoint.tensors if not _is_other(name)}
    return CheckpointView(checkpoint, {name: checkpoint.tensors[stored] for name, stored in names.items()}, names=names)


def _is_other(name: str) -> bool:
    return name.removeprefix("model.").split(".", 1)[0] in _OTHERS


def _alone(name: str) -> str:
    whole, inside = _INSIDE
    return f"model.{name.removeprefix(whole)}" if name.startswith(whole) else name.removeprefix(inside)
