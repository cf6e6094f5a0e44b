"""The JSON files beside a model's weights, read with suspicion."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from jaxserve.errors import ConfigError


def read_json(path: pathlib.Path, *, max_bytes: int = 8 << 20) -> dict[str, Any]:
    """The object in a JSON file.

    Raises: ConfigError naming the file if it is missing, larger than max_bytes, no JSON, or no object.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ConfigError(f"{path} has {size} bytes; at most {max_bytes} are believable")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, not an object of keys and values")
    return value
