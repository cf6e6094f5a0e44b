"""Where each parameter comes from in a checkpoint, as a table per family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from jaxserve.models.hf_config import HfConfig
from jaxserve.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """What the engine must know to run the checkpoints of one family.

    Args:
      architectures: values of "architectures" in config.json that this family takes.
      spec: reads a config into a ModelSpec; raises ConfigError on a value that is not understood.
      layer_names: parameter path within a layer -> checkpoint tensors, joined along their first axis; {i} is the layer's number.
      model_names: the same for parameters outside the layers.
    """

    architectures: tuple[str, ...]
    spec: Callable[[HfConfig], ModelSpec]
    layer_names: Mapping[str, tuple[str, ...]]
    model_names: Mapping[str, tuple[str, ...]]
