"""The files that sentence-transformers puts beside a model: how it pools, what comes after, which prompts it was trained with.

modules.json                             the order of the modules and their folders
1_Pooling/config.json                    which hidden states count
2_Dense/config.json, model.safetensors   a layer behind pooling, its weights as linear.weight and linear.bias
sentence_bert_config.json                longest text, lower case
config_sentence_transformers.json        prompts
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.names import Family, stored, with_leaves
from jaxserve.models.spec import ModelSpec, PoolLayerSpec, PoolMethod, PoolSpec
from jaxserve.pooling import Pooling, ScoreActivation, read_matryoshka
from jaxserve.text.gguf_metadata import read_gguf_metadata
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.gguf import is_gguf
from jaxserve.weights.json_file import read_json, read_json_objects
from jaxserve.weights.tensors import Checkpoint

_METHODS: Mapping[str, PoolMethod] = {
    "cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean", "max": "max", "max_tokens": "max",
    "mean_sqrt_len": "mean_sqrt_len", "mean_sqrt_len_tokens": "mean_sqrt_len", "weightedmean": "weighted_mean",
    "weightedmean_tokens": "weighted_mean", "lasttoken": "last",
}  # fmt: skip
_GGUF_METHODS: Mapping[int, PoolMethod] = {1: "mean", 2: "cls", 3: "last"}
_ACTIVATIONS = {"Identity": "identity", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu", "Sigmoid": "sigmoid"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Modules:
    """What modules.json lists behind the model itself; `layers` are folders of Dense modules and what is in them."""

    method: PoolMethod | None
    normalize: bool
    layers: tuple[tuple[str, PoolLayerSpec], ...]


def makes_vectors(path: pathlib.Path) -> bool:
    """Whether the files of a model say that it makes vectors."""
    return bool(_gguf_pooling(path)) if is_gguf(path) else (path / "modules.json").is_file()


def read_modules(path: pathlib.Path) -> Modules | None:
    """The modules of a model's directory, or what a GGUF file has kept of them; None if it is not of sentence-transformers.

    Raises: ConfigError naming the module or option that is not understood.
    """
    if is_gguf(path):
        kind = _gguf_pooling(path)
        if kind not in (0, *_GGUF_METHODS):
            raise ConfigError(f"{path}: pooling_type={kind} is not supported; there are {', '.join(map(str, _GGUF_METHODS))}")
        # llama.cpp normalizes whatever the model's modules said, which is not in the file.
        return Modules(method=_GGUF_METHODS[kind], normalize=True, layers=()) if kind else None
    listed = path / "modules.json"
    if not listed.is_file():
        return None
    method: PoolMethod | None = None
    normalize, layers = False, []
    for module in read_json_objects(listed):
        kind, folder = str(module.get("type", "")).rpartition(".")[2], str(module.get("path", ""))
        match kind:
            case "Transformer":
                pass
            case "Pooling":
                method = _read_method(_inside(path, folder) / "config.json")
            case "Dense":
                layers.append((folder, _read_dense(_inside(path, folder) / "config.json")))
            case "Normalize":
                normalize = True
            case _:
                raise ConfigError(f"{listed}: a module of type {module.get('type')!r:.80} is not supported")
    return Modules(method=method, normalize=normalize, layers=tuple(layers))


def with_pooling(path: pathlib.Path, config: HfConfig, family: Family, *, matryoshka: bool) -> tuple[Family, Pooling]:
    """A family of vectors as the files beside the model have it, and what front ends need to know.

    Args:
      family: whose specs have a `pool`.
      matryoshka: embeddings may be cut to any length.
    Raises: ConfigError naming what is not understood.
    """
    classifies = config.architecture.endswith("ForSequenceClassification")
    modules = None if classifies else read_modules(path)
    if modules is not None:
        family = _with_modules(family, modules)
    spec = family.spec(config)
    assert spec.pool is not None, "a family of vectors has a pool"
    width = spec.pool.layers[-1].width if spec.pool.layers else spec.width
    sizes, prompts = _optional(path / "sentence_bert_config.json"), _optional(path / "config_sentence_transformers.json")
    max_len = sizes.get("max_seq_length")
    named = prompts.get("prompts")
    pooling = Pooling(
        task="classify" if classifies else "embed", width=width, normalize=modules is None or modules.normalize,
        activation=_activation(config, width), labels=_labels(config) if classifies else (),
        matryoshka=read_matryoshka(config.values, forced=matryoshka),
        prompts={str(name): str(text) for name, text in named.items()} if isinstance(named, dict) else {},
        default_prompt=prompts.get("default_prompt_name"), max_len=max_len if isinstance(max_len, int) and max_len > 0 else None,
        lowercase=sizes.get("do_lower_case") is True, modules=tuple(folder for folder, _ in modules.layers) if modules else (),
    )  # fmt: skip
    for key in ("sentence_transformers", "sbert_ce_default_activation_function", "matryoshka_dimensions", "is_matryoshka", "num_labels"):
        config.get(key)  # read above, or when the family's spec was made
    return family, pooling


class WithModules(Checkpoint):
    """A checkpoint with the tensors of the modules in some of its folders, under the folder's name."""

    def __init__(self, path: pathlib.Path, folders: Iterable[str]) -> None:
        self._parts = {"": open_checkpoint(path)} | {f"{folder}.": open_checkpoint(_inside(path, folder)) for folder in folders}
        super().__init__(path, {f"{at}{name}": tensor for at, part in self._parts.items() for name, tensor in part.tensors.items()})

    def read(self, name: str) -> np.ndarray:
        part, inner = self._find(name)
        return part.read(inner)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        part, inner = self._find(name)
        return part.read_rows(inner, start, stop)

    def close(self) -> None:
        for part in self._parts.values():
            part.close()

    def _find(self, name: str) -> tuple[Checkpoint, str]:
        at = next((at for at in self._parts if at and name.startswith(at)), "")
        return self._parts[at], name.removeprefix(at)


def _gguf_pooling(path: pathlib.Path) -> int:
    """llama.cpp's number for how a GGUF file's model pools; 0 if it does not."""
    found = read_gguf_metadata(path, lambda key: key.endswith(".pooling_type"))
    return next((kind for kind in found.values() if isinstance(kind, int)), 0)


def _with_modules(family: Family, modules: Modules) -> Family:
    """The family with the pooling and the layers of its modules."""

    def spec(config: HfConfig) -> ModelSpec:
        plain = family.spec(config)
        assert plain.pool is not None, "a family of vectors has a pool"
        pool = PoolSpec(method=modules.method or plain.pool.method, layers=tuple(layer for _, layer in modules.layers))
        return dataclasses.replace(plain, pool=pool)

    names = with_leaves({f"pool.{i}": stored(f"{folder}.linear") for i, (folder, _) in enumerate(modules.layers)})
    return dataclasses.replace(family, spec=spec, model_names={**family.model_names, **names})


def _inside(path: pathlib.Path, folder: str) -> pathlib.Path:
    if folder in ("", ".", "..") or pathlib.PurePath(folder).name != folder:
        raise ConfigError(f"{path / 'modules.json'}: {folder!r:.80} is not the name of a folder beside it")
    return path / folder


def _read_method(path: pathlib.Path) -> PoolMethod:
    values = read_json(path)
    if values.get("include_prompt", True) is not True:
        raise ConfigError(f"{path}: include_prompt=false, which leaves prompts out of pooling, is not supported")
    stated = values.get("pooling_mode")
    chosen = [stated] if isinstance(stated, str) else [
        key.removeprefix("pooling_mode_") for key, value in values.items() if key.startswith("pooling_mode_") and value is True
    ]  # fmt: skip
    if len(chosen) != 1 or chosen[0] not in _METHODS:
        raise ConfigError(
            f"{path}: pooling by {', '.join(map(str, chosen)) or 'nothing'} is not supported; one of {', '.join(_METHODS)} is"
        )
    return _METHODS[chosen[0]]


def _read_dense(path: pathlib.Path) -> PoolLayerSpec:
    values = read_json(path)
    width, bias = values.get("out_features"), values.get("bias", True)
    name = str(values.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    activation = _ACTIVATIONS.get(name)
    if not isinstance(width, int) or width < 1 or not isinstance(bias, bool) or activation in (None, "sigmoid"):
        raise ConfigError(f"{path}: out_features={width!r:.40}, bias={bias!r:.40}, activation_function={name!r:.40} is not supported")
    return PoolLayerSpec(width=width, bias=bias, activation=cast(Literal["identity", "tanh", "relu", "gelu", "silu"], activation))


def _optional(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _activation(config: HfConfig, width: int) -> ScoreActivation:
    """What makes scores of a classifier's numbers: stated by sentence-transformers, else by the problem, else by how many there are."""
    nested = config.values.get("sentence_transformers")
    stated = nested.get("activation_fn") if isinstance(nested, dict) else None
    stated = stated or config.values.get("sbert_ce_default_activation_function")
    if stated is not None:
        name = _ACTIVATIONS.get(str(stated).rpartition(".")[2])
        if name not in ("identity", "tanh", "relu", "sigmoid"):
            raise ConfigError(f"the scores' activation {stated!r:.80} is not supported; there are Identity, Sigmoid, Tanh and ReLU")
        return cast(ScoreActivation, name)
    match config.values.get("problem_type"):
        case "regression":
            return "identity"
        case "multi_label_classification":
            return "sigmoid"
        case _:
            return "sigmoid" if width == 1 else "softmax"


def _labels(config: HfConfig) -> tuple[str, ...]:
    names = config.get("id2label")
    if not isinstance(names, dict):
        return ()
    return tuple(str(names.get(str(i), names.get(i, f"LABEL_{i}"))) for i in range(len(names)))
