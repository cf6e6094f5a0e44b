"""Tests of the page pool by itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.scheduler.pages import PagePool


def make_pool(num_pages: int) -> tuple[PagePool, list[int]]:
    evicted: list[int] = []
    return PagePool(num_pages, evicted.append), evicted


def hold_and_cache(pool: PagePool, count: int) -> list[int]:
    pages = pool.allocate(count)
    for page in pages:
        pool.mark_indexed(page)
    pool.free(pages)
    return pages


def test_pool_hands_out_every_page_once_but_never_the_null_page() -> None:
    pool, _ = make_pool(7)
    assert sorted(pool.allocate(6)) == [1, 2, 3, 4, 5, 6]
    assert pool.num_free == 0


def test_pool_refuses_to_allocate_more_than_is_free() -> None:
    pool, _ = make_pool(4)
    with pytest.raises(AssertionError, match="count=4"):
        pool.allocate(4)


def test_page_is_free_only_when_its_last_holder_is_gone() -> None:
    pool, _ = make_pool(5)
    pages = pool.allocate(2)
    for page in pages:
        pool.mark_indexed(page)
    pool.share(pages)
    pool.check([pages, pages])
    pool.free(pages)
    assert pool.num_free == 2
    pool.free(pages)
    assert pool.num_free == 4


def test_freeing_a_page_that_nobody_holds_is_refused() -> None:
    pool, _ = make_pool(4)
    pages = pool.allocate(1)
    pool.free(pages)
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.free(pages)


def test_pages_without_content_go_before_cached_ones() -> None:
    pool, evicted = make_pool(8)
    cached = hold_and_cache(pool, 3)
    assert not set(pool.allocate(4)) & set(cached)
    assert evicted == []


def test_cached_pages_are_evicted_oldest_first_and_tails_before_heads() -> None:
    pool, evicted = make_pool(6)
    old, young = pool.allocate(3), pool.allocate(2)
    for page in old + young:
        pool.mark_indexed(page)
    pool.free(old)
    pool.free(young)
    assert pool.allocate(4) == evicted == [old[2], old[1], old[0], young[1]]


def test_sharing_a_cached_page_saves_it_from_eviction() -> None:
    pool, evicted = make_pool(4)
    cached = hold_and_cache(pool, 3)
    assert pool.count_idle(cached) == 3
    pool.share(cached[2:])
    assert pool.count_idle(cached) == 2
    assert sorted(pool.allocate(2)) == sorted(evicted) == sorted(cached[:2])


@given(st.data())
def test_pool_accounts_for_every_page_after_any_calls(data: st.DataObject) -> None:
    pool, evicted = make_pool(data.draw(st.integers(2, 12)))
    tables: list[list[int]] = []
    for _ in range(data.draw(st.integers(0, 25))):
        action = data.draw(st.sampled_from(["allocate", "free", "index", "share"]))
        if action == "allocate":
            tables.append(pool.allocate(data.draw(st.integers(0, pool.num_free))))
            assert not pool.indexed() & set(tables[-1])
        elif tables:
            table = data.draw(st.sampled_from(tables))
            if action == "free":
                tables.remove(table)
                pool.free(table)
            elif action == "index":
                for page in table:
                    pool.mark_indexed(page)
            else:
                shared = [page for page in table if page in pool.indexed()]
                pool.share(shared)
                tables.append(shared)
        pool.check(tables)
    assert 0 not in evicted
