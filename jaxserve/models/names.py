"""Where each parameter comes from in a checkpoint, as a table per family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from jaxserve.models.hf_config import HfConfig
from jaxserve.models.spec import ModelSpec

Layout = Literal[
    "rows", "transposed", "halves_swapped", "by_kv_head", "stacked", "head_starts", "head_ends",
    "expert", "expert_transposed", "expert_pairs", "expert_transposed_pairs",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """The checkpoint tensors that make up a parameter, joined along their first axis.

    Args:
      names: {i} is the layer's number; {h} repeats the name for each head; {e} is the expert's number.
      layout: of each tensor. "rows" as our parameters are; "transposed" [in, out], for each head if there is an axis of them;
        "halves_swapped" the second half of the rows first; "by_kv_head" the rows of fused queries, keys and values lie KV head after KV
        head, [its queries | its key | its value]; "stacked" is one row of the parameter; "head_starts" and "head_ends" are the first and
        the last rows of each head, as many as the parameter has.
        Parameters of experts are read one expert at a time. A tensor whose name has no {e} holds those of all, one after the other along
        its first axis. "expert" is [out, in], which the parameter has the other way round; "expert_transposed" [in, out]; with "pairs",
        outputs 2j and 2j + 1 are the parameter's j and j + half.
    """

    names: tuple[str, ...]
    layout: Layout = "rows"


Names = Mapping[str, tuple[Stored, ...]]
"""Parameter path -> ways in which checkpoints store it; the first whose tensors are all there is taken."""


def stored(*names: str, layout: Layout = "rows") -> tuple[Stored, ...]:
    """One way of storing a parameter; ways are added up with +."""
    return (Stored(names, layout),)


def with_leaves(table: Mapping[str, tuple[Stored, ...]]) -> dict[str, tuple[Stored, ...]]:
    """A table of modules as a table of their parameters: each entry for its .weight and its .bias, a vector, which is never transposed."""
    result: dict[str, tuple[Stored, ...]] = {}
    for path, ways in table.items():
        for leaf in ("weight", "bias"):
            result[f"{path}.{leaf}"] = tuple(
                Stored(
                    tuple(f"{name}.{leaf}" for name in way.names), "rows" if (leaf, way.layout) == ("bias", "transposed") else way.layout
                )
                for way in ways
            )
    return result


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the engine must know to run the checkpoints of one family.

    Args:
      architectures: values of "architectures" in config.json that this family takes.
      spec: reads a config into a ModelSpec; raises ConfigError on a value that is not understood.
      layer_names: where the parameters of a layer are, by their path within it.
      model_names: the same for parameters outside the layers.
      optional_prefix: of tensor names, which some checkpoints leave out.
      ignored: endings of tensors that hold nothing to be learnt, such as masks.
      predicts_ahead: checkpoints may have layers after the model's own, which guess further tokens and are left out.
    """

    architectures: tuple[str, ...]
    spec: Callable[[HfConfig], ModelSpec]
    layer_names: Names
    model_names: Names
    optional_prefix: str = ""
    ignored: tuple[str, ...] = ()
    predicts_ahead: bool = False
