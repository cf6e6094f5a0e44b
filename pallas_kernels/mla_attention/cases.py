"""Named shapes of attention over the compressed cache, each with its reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One batch: per row the new tokens and the context length including them; (0, 0) is an empty row."""

    name: str
    rows: tuple[tuple[int, int], ...]
    num_heads: int = 4
    latent_size: int = 24
    rope_size: int = 8
    page_size: int = 8
    padding: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(count for count, _ in self.rows)


CASES = (
    Case(name="one row, one token, empty cache", rows=((1, 1),)),
    Case(name="decode rows of unlike lengths, last page not full", rows=((1, 5), (1, 24), (1, 17), (1, 140))),
    Case(name="decode with empty rows at the end", rows=((1, 9), (1, 300), (0, 0), (0, 0))),
    Case(name="many heads, padding tokens", rows=((3, 3), (1, 40), (7, 19)), num_heads=16, padding=5),
    Case(name="an odd number of heads", rows=((2, 2), (1, 33)), num_heads=3),
    Case(name="one long prompt over several query blocks and key chunks", rows=((150, 700),), num_heads=5, latent_size=16),
    Case(
        name="mixed: prefill chunk after a prefix, decodes, an empty row between",
        rows=((70, 90), (1, 64), (0, 0), (5, 261), (1, 8)),
        padding=3,
    ),
    Case(name="nothing but padding", rows=((0, 0), (0, 0)), padding=4),
    Case(name="pages of 16, rows that begin and end within one", rows=((9, 30), (16, 32), (20, 25)), page_size=16),
)


def make_inputs(case: Case, *, seed: int = 0, num_layers: int = 2) -> dict[str, Any]:
    """Numpy arguments for the op by name; everything that must not matter is NaN."""
    rng = np.random.default_rng(seed)
    S, T, C, Hr = len(case.rows), case.num_tokens + case.padding, case.latent_size, case.rope_size
    pages_of = [-(-length // case.page_size) for _, length in case.rows]
    P, num_pages = max(max(pages_of), 1) + 1, 1 + sum(pages_of) + 2
    ids = rng.permutation(np.arange(1, num_pages))
    pages = np.full((num_layers, num_pages, case.page_size, C + Hr), np.nan, np.float32)
    page_table, used = np.zeros((S, P), np.int32), 0
    for s, (count, length) in enumerate(case.rows):
        page_table[s, : pages_of[s]] = ids[used : used + pages_of[s]]
        used += pages_of[s]
        for position in range(length - count):
            page, offset = page_table[s, position // case.page_size], position % case.page_size
            pages[:, page, offset] = rng.standard_normal((num_layers, C + Hr)) * 0.5

    def tokens(*shape: int) -> np.ndarray:
        x = rng.standard_normal((T, *shape)).astype(np.float32)
        x[case.num_tokens :] = np.nan
        return x

    return {
        "q_latent": tokens(case.num_heads, C), "q_rope": tokens(case.num_heads, Hr), "latent": tokens(C), "rope_key": tokens(Hr),
        "pages": pages, "layer": np.int32(num_layers - 1), "page_table": page_table,
        "query_start": np.cumsum([0, *(count for count, _ in case.rows)]).astype(np.int32),
        "kv_len": np.array([length for _, length in case.rows], np.int32), "sm_scale": 0.3,
    }  # fmt: skip
