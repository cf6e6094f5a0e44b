"""Named shapes of ragged paged attention, each with its reason."""

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
    num_kv_heads: int = 2
    head_size: int = 16
    value_size: int | None = None
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
    Case(name="gqa 8:1, padding tokens", rows=((3, 3), (1, 40), (7, 19)), num_heads=8, num_kv_heads=1, padding=5),
    Case(name="heads not grouped", rows=((2, 2), (1, 33)), num_heads=3, num_kv_heads=3),
    Case(name="one long prompt over several query blocks and key chunks", rows=((150, 700),), head_size=8),
    Case(
        name="mixed: prefill chunk after a prefix, decodes, an empty row between",
        rows=((70, 90), (1, 64), (0, 0), (5, 261), (1, 8)),
        padding=3,
    ),
    Case(name="values narrower than keys", rows=((1, 20), (9, 30)), value_size=12),
    Case(name="page of one token", rows=((4, 11), (1, 6)), page_size=1),
)

# A shape that all but the long prompt fit into, for pad_inputs.
COMMON = {"T": 96, "S": 5, "P": 39, "num_pages": 64}

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 7},
    "wide window": {"window": 133},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi_slopes": True},
    "sinks": {"sinks": True},
    "not causal": {"causal": False},
    "not causal, window": {"causal": False, "window": 9},
    "all": {"window": 21, "softcap": 4.0, "alibi_slopes": True, "sinks": True},
}


def make_inputs(case: Case, features: dict[str, Any], *, seed: int = 0, dtype: str = "float32", num_layers: int = 2) -> dict[str, Any]:
    """Numpy arguments for the op; everything that must not matter is NaN.

    Returns: q, k, v, pages, layer and keyword arguments by name; pages hold the context's keys and values, NaN elsewhere.
    """
    rng = np.random.default_rng(seed)
    S, T, H, K = len(case.rows), case.num_tokens + case.padding, case.head_size, case.num_kv_heads
    Hv = case.value_size or H
    pages_of = [-(-length // case.page_size) for _, length in case.rows]
    P, num_pages = max(max(pages_of), 1) + 1, 1 + sum(pages_of) + 2
    ids = rng.permutation(np.arange(1, num_pages))
    pages = np.full((num_layers, num_pages, case.page_size, 2 * K, H), np.nan, np.float32)
    page_table, used = np.zeros((S, P), np.int32), 0
    for s, (count, length) in enumerate(case.rows):
        page_table[s, : pages_of[s]] = ids[used : used + pages_of[s]]
        used += pages_of[s]
        for position in range(length - count):
            page, offset = page_table[s, position // case.page_size], position % case.page_size
            pages[:, page, offset] = rng.standard_normal((num_layers, 2 * K, H)) * 0.5
            pages[:, page, offset, 1::2, Hv:] = 0

    def tokens(heads: int, size: int) -> np.ndarray:
        x = rng.standard_normal((T, heads, size)).astype(np.float32)
        x[case.num_tokens :] = np.nan
        return x

    extra = dict(features)
    for name in ("alibi_slopes", "sinks"):
        if extra.get(name) is True:
            extra[name] = rng.uniform(0.05, 0.5, case.num_heads).astype(np.float32)
    return {
        "q": tokens(case.num_heads, H), "k": tokens(K, H), "v": tokens(K, Hv), "pages": pages, "layer": np.int32(num_layers - 1),
        "page_table": page_table, "query_start": np.cumsum([0, *(count for count, _ in case.rows)]).astype(np.int32),
        "kv_len": np.array([length for _, length in case.rows], np.int32), "sm_scale": 0.3, **extra,
    }  # fmt: skip


def pad_inputs(inputs: dict[str, Any], *, T: int = 0, S: int = 0, P: int = 0, num_pages: int = 0) -> dict[str, Any]:
    """Inputs of make_inputs with padding tokens, empty rows, more columns of the page table and free pages, up to these numbers.

    So that batches share a shape, and with it what is compiled; what is added is NaN where that must not matter.
    """
    tokens, (rows, columns), pages = inputs["q"].shape[0], inputs["page_table"].shape, inputs["pages"].shape[1]
    T, S, P, num_pages = max(T - tokens, 0), max(S - rows, 0), max(P - columns, 0), max(num_pages - pages, 0)
    more = {name: np.pad(inputs[name], ((0, T), (0, 0), (0, 0)), constant_values=np.nan) for name in ("q", "k", "v")}
    more["page_table"] = np.pad(inputs["page_table"], ((0, S), (0, P)))
    more["query_start"] = np.pad(inputs["query_start"], (0, S), mode="edge")
    more["kv_len"] = np.pad(inputs["kv_len"], (0, S))
    more["pages"] = np.pad(inputs["pages"], ((0, 0), (0, num_pages), (0, 0), (0, 0), (0, 0)), constant_values=np.nan)
    return inputs | more
