"""ALiBi's slopes, as MPT, BLOOM and Falcon have them."""

from __future__ import annotations

import math


def alibi_slopes(num_heads: int, bias_max: float = 8.0) -> tuple[float, ...]:
    """How much each head takes from a score per token of distance.

    Source: Press et al. 2021, section 3; for head counts that are no power of two, every second slope of the next one comes first.
    """
    full = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2.0 ** (-(head + 1) * bias_max / full) for head in range(full)]
    return tuple(slopes if full == num_heads else [*slopes[1::2], *slopes[::2]][:num_heads])
