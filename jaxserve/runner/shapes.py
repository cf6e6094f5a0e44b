"""The shapes that steps are compiled for: a sum of buckets, never a product."""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal

from jaxserve.config import EngineConfig
from jaxserve.scheduler.schedule import Schedule

StepKind = Literal["decode", "prefill", "score", "pool"]


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class StepShape:
    """One compiled step.

    Args:
      kind: decode has one token a row; prefill has any mix; score is a prefill that also returns log-probabilities of the prompt; pool
        is a prefill that returns vectors instead of tokens.
      tokens: T.
      rows: S.
    """

    kind: StepKind
    tokens: int
    rows: int

    @property
    def name(self) -> str:
        """Such as decode_32: kind and tokens."""
        return f"{self.kind}_{self.tokens}"


def make_shapes(config: EngineConfig, *, max_rows: int, max_step_tokens: int, pools: bool = False) -> tuple[StepShape, ...]:
    """Every shape that a schedule within the limits can need, largest first (it takes longest to compile).

    Args:
      pools: the model gives vectors, and has steps of that kind alone.
    """
    decode = _within(config.compile.decode_rows or _ladder(1, max_rows), max_rows)
    prefill = _within(config.compile.prefill_tokens or _ladder(16, max_step_tokens, halves_from=64), max_step_tokens)
    if pools:
        return tuple(StepShape("pool", tokens, min(tokens, max_rows)) for tokens in reversed(prefill))
    shapes = [StepShape("decode", rows, rows) for rows in decode]
    shapes += [StepShape("prefill", tokens, min(tokens, max_rows)) for tokens in prefill]
    shapes.append(StepShape("score", max_step_tokens, min(max_step_tokens, max_rows)))
    return tuple(sorted(shapes, key=lambda shape: -shape.tokens))


def pick_shape(shapes: tuple[StepShape, ...], schedule: Schedule) -> StepShape:
    """The smallest shape that takes the schedule."""
    scored = any(row.request.params.prompt_logprobs is not None and row.start < len(row.request.prompt_ids) for row in schedule.rows)
    decodes = schedule.num_tokens == len(schedule.rows)
    kinds = ("score",) if scored else ("decode", "prefill", "pool") if decodes else ("prefill", "pool")
    fitting = [
        shape for shape in shapes if shape.kind in kinds and shape.tokens >= schedule.num_tokens and shape.rows >= len(schedule.rows)
    ]
    assert fitting, f"no shape for {schedule.num_tokens=} rows={len(schedule.rows)} among {shapes}"
    return min(fitting, key=lambda shape: (shape.tokens, shape.kind))


def _ladder(first: int, last: int, *, halves_from: int = sys.maxsize) -> tuple[int, ...]:
    """Powers of two from first to last, and from halves_from on the steps half way between."""
    sizes, size = [], first
    while size < last:
        sizes.append(size)
        if size >= halves_from and size * 3 // 2 < last:
            sizes.append(size * 3 // 2)
        size *= 2
    return (*sizes, last)


def _within(sizes: tuple[int, ...], last: int) -> tuple[int, ...]:
    return tuple(sorted({min(size, last) for size in sizes} | {last}))
