"""jaxserve: an inference engine for large language models in JAX. `from jaxserve import LLM, SamplingParams`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.async_llm import AsyncLLM as AsyncLLM
    from jaxserve.engine.beam import BeamSearchParams as BeamSearchParams
    from jaxserve.llm import LLM as LLM
    from jaxserve.pooling import PoolingParams as PoolingParams
    from jaxserve.request import SamplingParams as SamplingParams
    from jaxserve.request import StructuredOutputs as StructuredOutputs

__all__ = ["LLM", "AsyncLLM", "BeamSearchParams", "PoolingParams", "SamplingParams", "StructuredOutputs"]
_HOMES = {
    "LLM": "jaxserve.llm", "AsyncLLM": "jaxserve.async_llm", "PoolingParams": "jaxserve.pooling", "SamplingParams": "jaxserve.request",
    "StructuredOutputs": "jaxserve.request", "BeamSearchParams": "jaxserve.engine.beam",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that `import jaxserve` costs nothing and light modules never import jax."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
