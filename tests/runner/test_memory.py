"""Dividing a device's memory: as many pages as fit, and a refusal that says where the memory would go."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config import CacheConfig
from jaxserve.errors import ConfigError
from jaxserve.runner.memory import MemoryPlan, plan_memory

sizes = st.integers(0, 400)
LEAST = 1 + 256 // 16  # pages with which a request of 256 tokens can be served


def plan(cache: CacheConfig | None = None, **sizes: Any) -> MemoryPlan:
    given = {"total": 1000, "weights": 200, "state": 30, "temporaries": 70, "page_bytes": 7, "max_pages": 90} | sizes
    return plan_memory(cache or CacheConfig(), on_cpu=False, page_size=16, max_len=512, **given)


@given(weights=sizes, state=sizes, temporaries=sizes, page_bytes=st.integers(1, 50), max_pages=st.integers(LEAST, 200))
def test_as_many_pages_as_fit_and_as_are_of_use(weights: int, state: int, temporaries: int, page_bytes: int, max_pages: int) -> None:
    room = 900 - weights - state - temporaries
    try:
        found = plan(weights=weights, state=state, temporaries=temporaries, page_bytes=page_bytes, max_pages=max_pages)
    except ConfigError:
        assert room < LEAST * page_bytes
        return
    assert found.cache == found.num_pages * page_bytes <= room
    assert found.num_pages == max_pages or found.cache + page_bytes > room
    found.check()


@pytest.mark.parametrize(
    ("cache", "sizes", "named"),
    [
        (CacheConfig(), {"weights": 5000}, r"weights  .* 500\.0 %"),
        (CacheConfig(), {"temporaries": 800}, r"temporaries  .* 80\.0 %"),
        (CacheConfig(num_pages=99), {}, r"99 cache pages\n(.*\n)+  cache  .* 69\.3 %"),
        (CacheConfig(cache_bytes=7), {}, "2 cache pages"),
        (CacheConfig(memory_utilization=0.3), {}, "of each device 30% may be used, a page takes 7 bytes"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_use_of_all_memory(cache: CacheConfig, sizes: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match="do not fit") as refused:
        plan(cache, **sizes)
    assert refused.match(named)
    assert refused.match("--mesh tensor=N")


def test_programs_that_take_more_than_was_thought_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"do not fit:\n(.*\n)+  temporaries  .* 70\.0 %"):
        dataclasses.replace(plan(), temporaries=700).check()
