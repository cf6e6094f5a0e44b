"""What holds where a request leaves it open: of sampling, by generation_config.json and its overrides; of the chat template's variables."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxserve.config import ModelConfig
from jaxserve.errors import ConfigError, UserError
from jaxserve.request import SamplingParams

_FILE = "generation_config.json"
# As transformers names them -> as requests do; the same as vLLM takes.
_NAMES: Mapping[str, str] = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty", "max_new_tokens": "max_tokens",
}  # fmt: skip


def read_generation(config: ModelConfig, own: Mapping[str, Any]) -> Mapping[str, Any]:
    """The generation_config.json that --generation-config chooses: the model's `own`, or that of a directory.

    Raises: ConfigError if it cannot be read.
    """
    if config.generation_config in ("auto", "vllm"):
        return own
    path = pathlib.Path(config.generation_config)
    path = path / _FILE if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--generation-config={config.generation_config}: cannot read {path}: {error}") from None
    return _object(text, str(path))


def sampling_defaults(config: ModelConfig, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters by the names of requests, as far as they are not jaxserve's own defaults.

    Raises: ConfigError naming what cannot be.
    """
    chosen = {} if config.generation_config == "vllm" else dict(generation)
    if config.override_generation_config is not None:
        overrides = _object(config.override_generation_config, "--override-generation-config")
        unknown = sorted(set(overrides) - set(_NAMES))
        if unknown:
            raise ConfigError(f"--override-generation-config has {', '.join(unknown)}; known are {', '.join(_NAMES)}")
        chosen |= overrides
    defaults = {name: chosen[key] for key, name in _NAMES.items() if chosen.get(key) is not None}
    try:
        SamplingParams(**defaults)
    except UserError as error:
        raise ConfigError(f"{_FILE} or --override-generation-config: {error.message}") from None
    return defaults


def template_defaults(config: ModelConfig) -> dict[str, Any]:
    """Variables for the chat template that requests outrank. Raises: ConfigError."""
    text = config.default_chat_template_kwargs
    return {} if text is None else _object(text, "--default-chat-template-kwargs")


def _object(text: str, source: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{source} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{source} is not a JSON object")
    return found
