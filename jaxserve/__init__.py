"""jaxserve: an inference engine for large language models in JAX. `from jaxserve import LLM, SamplingParams`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.llm import LLM as LLM
    from jaxserve.request import SamplingParams as SamplingParams
    from jaxserve.request import StructuredOutputs as StructuredOutputs

__all__ = ["LLM", "SamplingParams", "StructuredOutputs"]
_HOMES = {"LLM": "jaxserve.llm", "SamplingParams": "jaxserve.request", "StructuredOutputs": "jaxserve.request"}


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that `import jaxserve` costs nothing and light modules never import jax."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
