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
    value = _read(path, max_bytes)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, not an object of keys and values")
    return value


def read_json_objects(path: pathlib.Path, *, max_bytes: int = 8 << 20) -> list[dict[str, Any]]:
    """The objects of the array in a JSON file.

    Raises: ConfigError as read_json does.
    """
    value = _read(path, max_bytes)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ConfigError(f"{path} is not an array of objects")
    return value


def _read(path: pathlib.Path, max_bytes: int) -> Any:
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ConfigError(f"{path} has {size} bytes; at most {max_bytes} are believable")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot read {path}: {error}") from None
